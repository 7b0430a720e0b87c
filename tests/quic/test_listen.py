"""The server's UDP door: address checks, versions, garbage, and handshakes that lead nowhere."""

import asyncio

import pytest

from quictunnel.quic.engine import ClientTrust, ServerIdentity, select_engine
from quictunnel.quic.first_packets import parse_long_header
from quictunnel.quic.link import LinkClosed
from quictunnel.quic.listen import HANDSHAKE_TIME, LinkListener
from tests.support.clock import run
from tests.support.door import STRANGER, Door, at_door, first_flight, is_retry
from tests.support.memory import SERVER, Network, identity

# Address validation


def test_address_is_proved_first_when_that_is_asked_for(engines: tuple[str, str]) -> None:
    async def work(door: Door) -> None:
        (initial, *_) = first_flight(engines[1])
        (reply,) = door.knock(initial)
        header, sent = parse_long_header(reply), parse_long_header(initial)
        assert header is not None
        assert sent is not None
        assert header.token
        assert header.destination_cid == sent.source_cid
        assert len(reply) < len(initial) / 3
        assert door.tables == (0, 0, 0)
        link = door.dial()
        await door.until(lambda: link.ready)

    at_door(work, *engines, retry="always")


def test_address_is_not_proved_where_that_is_forbidden() -> None:
    async def work(door: Door) -> None:
        for _ in range(100):
            door.knock(first_flight("aioquic")[0])
        await asyncio.sleep(0.01)
        assert door.tables[0] == 100
        assert not any(is_retry(reply) for reply in door.replies)

    at_door(work, "aioquic", retry="never")


def test_many_half_open_handshakes_make_everyone_prove_its_address() -> None:
    async def work(door: Door) -> None:
        for _ in range(900):
            door.knock(first_flight("aioquic")[0])
        await asyncio.sleep(0.01)
        assert door.tables[0] == 64
        assert sum(is_retry(reply) for reply in door.replies) == 900 - 64
        link = door.dial()
        await door.until(lambda: link.ready)

    at_door(work, "aioquic")


def test_answers_to_an_address_that_is_not_proved_stay_small(engine: str) -> None:
    async def work(door: Door) -> None:
        flight = first_flight("qh3" if engine == "qh3" else "aioquic")
        door.knock(*flight)
        await asyncio.sleep(HANDSHAKE_TIME + 5)
        assert sum(map(len, door.replies)) <= 3 * sum(map(len, flight))  # RFC 9000 section 8.1

    at_door(work, engine, retry="never")


def test_token_of_another_address_is_worth_nothing(engine: str) -> None:
    async def work(door: Door) -> None:
        replies: list[bytes] = []
        addresses = iter([STRANGER, ("192.0.2.66", 1)])
        client = select_engine(engine).dial(ClientTrust("localhost", identity()[1]), 1200)
        client.connect(SERVER, now=0.0)
        for _ in range(2):
            address = next(addresses)
            for data, _ in client.datagrams_to_send(now=0.0):
                replies += door.knock(bytes(data), address=address)
            for reply in replies:
                client.receive_datagram(reply, SERVER, now=0.0)
            if address is STRANGER:
                assert [is_retry(reply) for reply in replies] == [True] * len(replies)
                replies.clear()
        assert not replies
        assert door.tables == (0, 0, 0)

    at_door(work, engine, retry="always")


def test_retry_mode_that_does_not_exist_is_refused(engine: str) -> None:
    async def work() -> None:
        with pytest.raises(ValueError, match="auto, always, never"):
            Network(engine, engine, retry="sometimes")

    run(work())


# Versions


def test_other_version_is_told_which_one_is_spoken(engine: str) -> None:
    async def work(door: Door) -> None:
        initial = first_flight(engine)[0]
        (reply,) = door.knock(initial[:1] + b"\x1a\x2a\x3a\x4a" + initial[5:])
        header, sent = parse_long_header(reply), parse_long_header(initial)
        assert header is not None
        assert sent is not None
        assert header.is_version_negotiation
        assert (header.destination_cid, header.source_cid) == (sent.source_cid, sent.destination_cid)
        assert reply.endswith(b"\0\0\0\1")
        assert not door.knock(initial[:1] + b"\x1a\x2a\x3a\x4a" + initial[5:1199]), "too small to begin a connection"
        assert not door.knock(reply), "version negotiation is never answered"
        assert not door.knock(reply.ljust(1200, b"\0"))
        assert door.tables == (0, 0, 0)

    at_door(work, engine)


# What begins nothing


def test_packets_of_no_connection_are_dropped_in_silence(engine: str) -> None:
    async def work(door: Door) -> None:
        initial = first_flight(engine)[0]
        handshake = b"\xe0" + initial[1:]
        short_id = initial[:5] + b"\x04abcd" + initial[14:] + b"\0" * 10
        nothing = [b"", b"\x40", b"\x40" + b"i" * 8, b"\x40" + b"i" * 1300, b"\0" * 1200]
        assert not door.knock(*nothing, initial[:1199], handshake, short_id)
        assert door.tables == (0, 0, 0)

    at_door(work, engine)


def test_handshake_that_stops_is_forgotten(engine: str) -> None:
    async def work(door: Door) -> None:
        link = door.dial()
        door.lose = lambda data, to_server: not to_server  # it never hears an answer, and tries again and again
        await asyncio.sleep(3)
        await door.until(lambda: door.tables == (0, 0, 0), 3 * HANDSHAKE_TIME)
        assert not link.ready

    at_door(work, engine, retry="never")


def test_accepted_link_is_not_on_the_clock(engine: str) -> None:
    async def work(door: Door) -> None:
        client, server = await door.joined()
        door.listener.accepted(server)
        for _ in range(20):
            await asyncio.sleep(1.5)
            client.ping()
        assert server.closed is None
        assert door.tables[2] == 0

    at_door(work, engine)


def test_tables_are_empty_when_the_links_are_gone(engines: tuple[str, str]) -> None:
    async def work(door: Door) -> None:
        links = [await door.joined() for _ in range(10)]
        assert door.tables[0] == 10
        for client, server in links[:5]:
            client.close()
            server.close()
        for client, _ in links[5:]:
            client.close()
        await door.until(lambda: door.tables == (0, 0, 0), 60)

    at_door(work, *engines)


def test_closing_ends_every_link_at_once(engine: str) -> None:
    async def work(door: Door) -> None:
        client, server = await door.joined()
        door.listener.close()
        assert door.tables == (0, 0, 0)
        assert str(server.closed) == "the server stops"
        await door.until(lambda: client.closed is not None, 5)

    at_door(work, engine)


def test_identity_that_cannot_be_used_changes_nothing(engine: str) -> None:
    async def work(door: Door) -> None:
        with pytest.raises((OSError, ValueError)):
            door.listener.replace_identity(ServerIdentity("/nowhere/server.pem", "/nowhere/server.key"))
        link = door.dial()
        await door.until(lambda: link.ready)

    at_door(work, engine)


async def test_bound_address_is_told(engine: str) -> None:
    network = Network(engine, engine)
    listener = LinkListener(
        select_engine(engine), identity()[0], network.server_owner, network.server_budget, retry="auto"
    )
    host, port = await listener.start("127.0.0.1", 0)
    assert (host, port > 0) == ("127.0.0.1", True)
    with pytest.raises(OSError):
        await LinkListener(
            select_engine(engine), identity()[0], network.server_owner, network.server_budget, retry="auto"
        ).start("127.0.0.1", port)
    listener.close()
    await network.close()


def test_link_that_is_abandoned_is_out_of_the_tables(engine: str) -> None:
    async def work(door: Door) -> None:
        _, server = await door.joined()
        server.abandon(LinkClosed(0, "gone"))
        assert door.tables == (0, 0, 0)
        assert not door.listener.links

    at_door(work, engine)
