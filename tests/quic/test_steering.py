"""Several processes at one UDP port: each datagram comes to the one that its connection id names."""

import asyncio
import socket
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from quictunnel.quic.dial import Endpoint, dial
from quictunnel.quic.engine import ClientTrust, select_engine
from quictunnel.quic.link import Link, LinkClosed
from quictunnel.quic.listen import LinkListener
from quictunnel.quic.sockets import settle
from quictunnel.quic.steering import Steering, steer
from quictunnel.wire.credit import WindowBudget
from tests.support.crowd import until
from tests.support.memory import Owner, identity
from tests.support.relay import UdpRelay

WORKERS = 3


@contextmanager
def group(workers: int) -> Iterator[list[socket.socket]]:
    """The sockets of so many workers at one port of the loopback."""
    socks = [socket.socket(socket.AF_INET, socket.SOCK_DGRAM) for _ in range(workers)]
    try:
        port = 0
        for sock in socks:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            sock.bind(("127.0.0.1", port))
            port = sock.getsockname()[1]
        steer(socks[0], workers)
        yield socks
    finally:
        for sock in socks:
            sock.close()


def counted(socks: list[socket.socket], data: bytes) -> Counter[int]:
    """Which socket gets a datagram that is sent from 30 ports."""
    found: Counter[int] = Counter()
    for _ in range(30):
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
            sender.sendto(data, socks[0].getsockname())
        for number, sock in enumerate(socks):
            sock.setblocking(False)
            try:
                assert sock.recv(2000) == data
                found[number] += 1
            except BlockingIOError:
                pass
    return found


@pytest.mark.parametrize("workers", [2, 3, 5])
def test_datagrams_go_where_their_connection_id_leads(workers: int) -> None:
    with group(workers) as socks:
        for worker in range(workers):
            cid = Steering(worker, workers).new_id()
            assert Steering(worker, workers).fits(cid)
            assert counted(socks, b"\x40" + cid + b"x" * 30) == {worker: 30}, "short header"
            assert counted(socks, b"\xc0\0\0\0\1\x08" + cid + b"x" * 1200) == {worker: 30}, "long header"


@pytest.mark.parametrize("data", [b"", b"\xc0", b"\x40", b"\xc0\0\0\0\1"])
def test_datagrams_too_short_for_an_id_come_to_somebody(data: bytes) -> None:
    with group(2) as socks:
        assert sum(counted(socks, data).values()) == 30


def test_new_ids_are_of_all_kinds() -> None:
    assert len({Steering(1, 3).new_id() for _ in range(100)}) == 100
    assert {Steering(0, 1).new_id()[0] for _ in range(3000)} == set(range(256))


@pytest.mark.either
@pytest.mark.parametrize("retry", ["never", pytest.param("always", marks=pytest.mark.slow)])
async def test_link_stays_with_its_worker_when_its_address_changes(engines: tuple[str, str], retry: str) -> None:
    trust = ClientTrust("localhost", identity()[1])
    with group(WORKERS) as socks, UdpRelay(socks[0].getsockname()[1]) as relay:
        listeners = [
            LinkListener(
                select_engine(engines[0]), identity()[0], Owner(), WindowBudget(0), retry=retry,
                steering=Steering(number, WORKERS),
            )
            for number in range(WORKERS)
        ]  # fmt: skip
        for listener, sock in zip(listeners, socks, strict=True):
            await listener.start("127.0.0.1", 0, sock=sock)
        links: list[Link] = []
        try:
            host, _, port = relay.address.partition(":")
            endpoint = Endpoint(socket.AF_INET, (host, int(port)))
            client = select_engine(engines[1])
            dials = (dial(client, endpoint, trust, Owner(), WindowBudget(0), timeout=10) for _ in range(6))
            links += [way.link for way in await asyncio.gather(*dials)]
            await until(lambda: sum(link.ready for each in listeners for link in each.links) == 6)
            homes = [list(listener.links) for listener in listeners]
            for _ in range(2):  # qh3 takes no fourth address, whoever listens
                before = {link: link.address for home in homes for link in home}
                relay.rebind()
                for link in links:
                    link.round_trip = None
                    link.ping()
                await until(lambda: all(link.round_trip is not None for link in links))
                assert all(link.address != address for link, address in before.items()), "it did come from elsewhere"
                assert [list(listener.links) for listener in listeners] == homes
            assert all(link.closed is None for link in links)
        finally:
            for listener in listeners:
                listener.close()
            for link in links:
                link.abandon(LinkClosed(0, ""))
            await settle()
