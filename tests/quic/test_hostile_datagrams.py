"""Whatever datagrams come: no exception escapes, nothing grows, and whoever is there is served."""

import asyncio
import logging
import random
import time

import pytest

from quictunnel.quic.engine import ClientTrust, select_engine
from quictunnel.quic.first_packets import parse_long_header, retry_packet
from quictunnel.quic.listen import HANDSHAKE_TIME
from tests.support.door import STRANGER, Door, answered, at_door, first_flight, garbage, is_retry, recorded
from tests.support.memory import SERVER, identity, resident

MIB = 1 << 20


def _all_packets(engine: str, door: Door, to_server: list[bytes]) -> list[bytes]:
    """Every kind of packet there is, for either end."""
    initial = first_flight(engine)[0]
    header = parse_long_header(initial)
    assert header is not None
    retry = retry_packet(
        door.listener.engine, header, b"r" * 8, door.listener._tokens.create(STRANGER, header, b"r" * 8, 0.0)
    )
    (negotiation,) = door.knock(initial[:1] + b"\x1a\x2a\x3a\x4a" + initial[5:])
    return [initial, *first_flight("aioquic"), *to_server, retry, negotiation, b"\xe0" + initial[1:]]


def _feed(engine: str, log_lines: list[str], caplog: pytest.LogCaptureFixture, count: int, retry: str) -> None:
    caplog.set_level(logging.ERROR)

    async def work(door: Door) -> None:
        client, server = await door.joined()
        door.listener.accepted(server)
        chance = random.Random(count)
        seeds = _all_packets(engine, door, await recorded(door, client, server))
        ids = list(door.listener._links)
        addresses = [(f"192.0.2.{chance.randrange(1, 255)}", chance.randrange(1024, 65536)) for _ in range(1000)]
        fed = 0

        async def feed(number: int) -> None:
            nonlocal fed
            for _ in range(number):
                door.knock(garbage(chance, seeds, ids), address=chance.choice(addresses))
                if fed % 10 == 0:  # as if it came from the server, which a network in between can do
                    client.datagram_received(garbage(chance, seeds, [client.connection_id]), SERVER)
                fed += 1
                if fed % 250 == 0:
                    client.ping()
                    await asyncio.sleep(0.05)
                    door.replies.clear()
                    assert door.tables[0] <= 1 + 64 + 1
                if fed % 2500 == 0:
                    await answered(door, server)

        await feed(count // 10)  # until every table and cache has its size
        await asyncio.sleep(HANDSHAKE_TIME + 2)
        before, began = resident(), time.perf_counter()
        await feed(count)
        seconds = time.perf_counter() - began
        await answered(door, server)
        assert server in door.listener.links
        for _ in range(20):
            client.ping()
            await asyncio.sleep(1.5)
        grown = resident() - before
        print(
            f"{engine}, retry={retry}: {fed} datagrams in {seconds:.1f} s, {grown / MIB:+.1f} MiB, amplification "
            f"{door.amplification:.3f}"
        )
        assert door.tables[0] == 1
        assert door.tables[1] <= 16
        assert door.tables[2] == 0
        assert grown < 16 * MIB
        assert door.amplification <= (1 if retry == "always" or engine == "qh3" else 3)
        await answered(door, server)

    at_door(work, engine, retry=retry)
    assert not [line for line in log_lines if line.startswith(("ERROR", "CRITICAL"))]
    assert not caplog.records


def test_hostile_datagrams_harm_nobody(engine: str, log_lines: list[str], caplog: pytest.LogCaptureFixture) -> None:
    _feed(engine, log_lines, caplog, 3_000, "auto")


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("retry", ["auto", "always"])
def test_hundred_thousand_hostile_datagrams_harm_nobody(
    engine: str, retry: str, log_lines: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    _feed(engine, log_lines, caplog, 100_000, retry)


# Floods


def _flood(engine: str, retry: str, count: int, at_once: int, log_lines: list[str]) -> None:
    async def work(door: Door) -> None:
        before, most = resident(), 0
        links = []
        for number in range(count):
            address = (f"198.51.{number >> 8 & 255}.{number & 255}", 1024 + number % 60_000)
            door.knock(first_flight("aioquic")[0], address=address)
            if number % at_once == 0:
                await asyncio.sleep(0.01)
                most = max(most, len(door.listener._half_open))
            if number in (count // 4, count // 2, 3 * count // 4):
                links.append(door.dial())
        grown = resident() - before
        retries = sum(map(is_retry, door.replies))
        await door.until(lambda: all(link.ready for link in links), 5)
        print(
            f"{engine}, retry={retry}: {count} first packets, {retries} Retries, at most {most} half open, "
            f"{grown / MIB:+.1f} MiB, amplification {door.amplification:.2f} (worst address {door.worst:.2f})"
        )
        asked_all = retry == "always" or engine == "qh3"
        if asked_all:
            assert (retries, most) == (count, most)
            assert most <= len(links)
        elif retry == "auto":
            assert retries == count - 64
            assert most <= 64 + len(links)
        else:
            assert retries == 0
            assert most <= 1024
        assert door.amplification < (1 if asked_all else 3.001)
        assert door.worst < (1 if asked_all else 3.001)
        assert grown < 200 * MIB
        await asyncio.sleep(HANDSHAKE_TIME + 2)
        assert door.tables[2] == 0
        assert door.worst < (1 if asked_all else 3.001)

    at_door(work, engine, retry=retry)
    assert not [line for line in log_lines if line.startswith(("ERROR", "CRITICAL"))]


@pytest.mark.parametrize("retry", ["auto", "always"])
def test_client_gets_in_during_a_flood_of_first_packets(engine: str, retry: str, log_lines: list[str]) -> None:
    _flood(engine, retry, 600, 20, log_lines)


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("retry", ["auto", "always", "never"])
def test_client_gets_in_during_a_flood_of_thousands_of_first_packets(
    engine: str, retry: str, log_lines: list[str]
) -> None:
    _flood(engine, retry, 5_000, 100, log_lines)


def test_half_open_links_are_bounded_where_no_address_is_proved(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("quictunnel.quic.listen._HALF_OPEN_LIMIT", 50)

    async def work(door: Door) -> None:
        link = None
        for number in range(160):
            door.knock(first_flight("aioquic")[0], address=("198.51.100.1", 2000 + number))
            assert door.tables[2] <= 50
            assert door.tables[0] <= 50 + 1
            if number % 5 == 0:
                await asyncio.sleep(0.01)
            if number == 80:
                link = door.dial()
        assert link is not None
        assert link.ready
        assert not any(is_retry(reply) for reply in door.replies)

    at_door(work, "aioquic", retry="never")


def test_proved_addresses_that_never_say_hello_are_bounded(engine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole handshakes, one after another, from whoever can: the oldest make room, and none that was accepted."""
    monkeypatch.setattr("quictunnel.quic.listen._HALF_OPEN_LIMIT", 20)

    async def work(door: Door) -> None:
        client, server = await door.joined()
        door.listener.accepted(server)
        silent = []
        for _ in range(60):
            link = door.dial()
            await door.until(lambda link=link: link.ready)  # type: ignore[misc]
            silent.append(link)
            assert door.tables[2] <= 20
            client.ping()
        assert len([link for link in door.listener.links if link.closed is None]) <= 21
        await door.until(lambda: sum(link.closed is None for link in silent) == 20, 5)
        assert server.closed is None
        await answered(door, server)

    at_door(work, engine, retry="always")


def test_token_opens_one_link_and_no_second(engine: str) -> None:
    async def work(door: Door) -> None:
        client = select_engine("aioquic").dial(ClientTrust("localhost", identity()[1]), 1200)
        client.connect(SERVER, now=0.0)
        (retry,) = door.knock(*[bytes(data) for data, _ in client.datagrams_to_send(now=0.0)])
        client.receive_datagram(retry, SERVER, now=0.0)
        (initial,) = [bytes(data) for data, _ in client.datagrams_to_send(now=0.0)]
        door.knock(*[initial] * 50)
        assert door.tables[0] == 1
        door.knock(initial[:6] + b"another!" + initial[14:])
        door.knock(initial, address=("192.0.2.10", 4242))
        assert door.tables[0] == 1

    at_door(work, engine, retry="always")
