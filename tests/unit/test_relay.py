"""The faulty network of the tests does what it is told, and nothing else: otherwise its figures say nothing."""

import random
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import pytest

from tests.support.processes import poll
from tests.support.relay import DEFAULTS, Path, UdpRelay

MANY = 4000


def path(**faults: Any) -> Path:
    return Path(DEFAULTS | faults, random.Random(1))


def sent(one: Path, count: int = MANY, every: float = 0.001) -> list[tuple[float, bytes]]:
    """What comes out for so many numbered datagrams, in the order in which it does."""
    out = [pair for number in range(count) for pair in one.take(number.to_bytes(4, "big") * 25, number * every)]
    return sorted(out, key=lambda pair: pair[0])


def numbers(out: list[tuple[float, bytes]]) -> list[int]:
    return [int.from_bytes(data[:4], "big") for _, data in out]


def test_faultless_path_changes_nothing() -> None:
    one = path()
    out = sent(one, 100)
    assert numbers(out) == list(range(100))
    assert [due for due, _ in out] == [number * 0.001 for number in range(100)]
    assert (one.counts["received"], one.counts["sent"], one.counts["bytes"]) == (100, 100, 10_000)


def test_delay_is_added_and_jitter_keeps_the_order() -> None:
    out = sent(path(delay=0.05, jitter=0.02))
    assert numbers(out) == list(range(MANY))
    late = [due - number * 0.001 for number, (due, _) in enumerate(out)]
    assert min(late) >= 0.05
    assert 0.065 < max(late) <= 0.07001


@pytest.mark.parametrize("chance", [0.001, 0.05, 0.3])
def test_loss_and_duplicates_have_their_chances_and_are_counted(chance: float) -> None:
    one = path(loss=chance)
    out = sent(one)
    assert len(out) == MANY - one.counts["lost"] == one.counts["sent"]
    assert one.counts["lost"] == pytest.approx(MANY * chance, rel=0.3, abs=8)
    one = path(duplicates=chance)
    out = sent(one)
    assert len(out) == MANY + one.counts["duplicated"]
    assert one.counts["duplicated"] == pytest.approx(MANY * chance, rel=0.3, abs=8)


def test_reordered_ones_come_later_than_some_behind_them_and_all_come() -> None:
    one = path(reorder=0.2)
    order = numbers(sent(one))
    assert sorted(order) == list(range(MANY))
    overtaken = sum(1 for before, after in pairwise(order) if after < before)
    assert one.counts["reordered"] == pytest.approx(MANY * 0.2, rel=0.2)
    assert overtaken > MANY * 0.1


def test_corruption_changes_one_byte_of_as_many_as_it_says() -> None:
    one = path(corrupt=0.05)
    changed = 0
    for number, (_, data) in enumerate(sent(one)):
        differences = sum(a != b for a, b in zip(data, number.to_bytes(4, "big") * 25, strict=True))
        assert differences <= 1
        changed += differences
    assert changed == one.counts["corrupted"] == pytest.approx(MANY * 0.05, rel=0.3)


def test_rate_spaces_datagrams_and_the_queue_is_bounded() -> None:
    one = path(rate=10_000.0, queue=1000)
    out = sent(one, 100, every=0.0)
    assert numbers(out) == list(range(10))
    assert [due for due, _ in out] == pytest.approx([0.01 * number for number in range(1, 11)])
    assert one.counts["overflowed"] == 90
    assert one.take(b"x" * 100, 0.5) == [(pytest.approx(0.51), b"x" * 100)]


def test_what_is_larger_than_the_mtu_vanishes() -> None:
    one = path(mtu=1280)
    assert one.take(b"x" * 1281, 0.0) == []
    assert one.take(b"x" * 1280, 0.0) == [(0.0, b"x" * 1280)]
    assert one.counts["too_large"] == 1


def test_same_seed_makes_the_same_faults() -> None:
    faults = {"loss": 0.1, "duplicates": 0.1, "reorder": 0.1, "corrupt": 0.1, "jitter": 0.01}
    assert sent(path(**faults)) == sent(path(**faults))


@contextmanager
def ends(**faults: Any) -> Iterator[tuple[UdpRelay, socket.socket, socket.socket]]:
    """A relay between a server's socket and a client's."""
    with (
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as server,
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client,
    ):
        server.bind(("127.0.0.1", 0))
        server.settimeout(10)
        client.settimeout(10)
        with UdpRelay(server.getsockname()[1], **faults) as relay:
            host, _, port = relay.address.rpartition(":")
            client.connect((host, int(port)))
            yield relay, server, client


def test_datagrams_go_both_ways_until_all_are_dropped_and_again_after() -> None:
    with ends() as (relay, server, client):
        client.send(b"one")
        data, way = server.recvfrom(100)
        assert data == b"one"
        server.sendto(b"two", way)
        assert client.recv(100) == b"two"
        assert not relay.drops
        relay.drops = True
        client.send(b"three")
        server.sendto(b"four", way)
        poll(lambda: relay.dropped == 2)
        relay.drops = False
        client.send(b"five")
        assert server.recvfrom(100) == (b"five", way)
        counts = relay.counts()
        assert (counts["ways"], counts["up"]["sent"], counts["down"]["sent"]) == (1, 2, 1)


def test_rebinding_changes_the_port_that_the_server_sees_and_nothing_for_the_client() -> None:
    with ends() as (relay, server, client):
        client.send(b"one")
        _, before = server.recvfrom(100)
        relay.rebind()
        server.sendto(b"to the old port", before)
        client.send(b"two")
        data, after = server.recvfrom(100)
        assert data == b"two"
        assert after != before
        server.sendto(b"to the new port", after)
        assert client.recv(100) == b"to the new port"
        assert relay.counts()["rebound"] == 1


def test_delayed_datagrams_are_on_the_way_and_arrive() -> None:
    with ends(delay=0.2) as (relay, server, client):
        for number in range(50):
            client.send(b"%d" % number)
        poll(lambda: relay.counts()["up"]["received"] == 50)
        assert [server.recv(100) for _ in range(50)] == [b"%d" % number for number in range(50)]
        assert relay.counts()["under_way"] == 0


def test_unknown_fault_is_refused_and_the_process_ends_with_the_block() -> None:
    with ends() as (relay, _, _):
        with pytest.raises(TypeError, match="no such fault: losss"):
            relay.set(losss=1)
        process = relay._process
    assert process.returncode == 0
