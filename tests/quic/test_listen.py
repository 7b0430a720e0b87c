"""The server's UDP door: address checks, versions, garbage, and handshakes that lead nowhere."""

import asyncio
import time

import pytest

from quictunnel.quic.dial import Way, dial, resolve
from quictunnel.quic.engine import ClientTrust, ServerIdentity, select_engine
from quictunnel.quic.first_packets import parse_long_header
from quictunnel.quic.link import Link, LinkClosed
from quictunnel.quic.listen import HANDSHAKE_TIME, LinkListener
from quictunnel.quic.sockets import QUOTED, DatagramSocket, Refusal
from tests.support.clock import run
from tests.support.crowd import until
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


# Refusals


def test_only_what_was_sent_to_a_client_can_be_refused(engine: str) -> None:
    """Anybody may send ICMP: without the beginning of a datagram that was sent there it says nothing."""

    async def work(door: Door) -> None:
        sent: list[bytes] = []
        door.lose = lambda data, to_server: bool(not to_server and sent.append(data))
        _, server = await door.joined()
        _, other_server = await door.joined()
        server.ping()
        await door.until(lambda: server.round_trip is not None)
        (place, elsewhere) = door.clients
        told: list[Link] = []
        door.server_owner.link_refused = told.append  # type: ignore[method-assign]
        number = server.sent - 1
        (quoted,) = [data[:QUOTED] for data in sent if server.number_of(data) == number]
        for beginning, where in [
            (quoted[:-1], place),
            (b"", place),
            (quoted[:8], place),
            (quoted[:-1] + bytes([quoted[-1] ^ 1]), place),
            (quoted, elsewhere),
            (quoted, (place[0], place[1] + 7)),
            (quoted, STRANGER),
        ]:
            door.listener._refused([Refusal(beginning, where)])
            assert not server.refused
            assert not other_server.refused
        door.listener._refused([Refusal(quoted, (*place, 0, 0))])
        assert (server.refused, server.refused_from, told) == (True, number, [server])
        assert server.silent_for() == float("inf")
        assert not other_server.refused

    at_door(work, engine)


def test_refusal_names_the_first_datagram_that_did_not_arrive(engine: str) -> None:
    async def work(door: Door) -> None:
        client, server = await door.joined()
        sent: list[bytes] = []
        door.lose = lambda data, to_server: not to_server and (sent.append(data) or True)
        first = server.sent
        for _ in range(4):
            server.ping()
            await asyncio.sleep(0.001)
        (place,) = door.clients
        assert [server.number_of(data) for data in sent] == [first, first + 1, first + 2, first + 3]
        door.listener._refused([Refusal(data[:QUOTED], place) for data in (sent[2], sent[3])])
        assert server.refused_from == first + 2
        door.listener._refused([Refusal(sent[1][:QUOTED], place)])
        assert server.refused_from == first + 1
        door.lose = lambda data, to_server: False
        client.ping()
        await door.until(lambda: not server.refused)
        door.listener._refused([Refusal(sent[3][:QUOTED], place)])
        assert server.refused_from == first + 3, "what was refuted counts no more"

    at_door(work, engine)


def test_only_the_last_datagrams_can_be_refused(engine: str) -> None:
    async def work(door: Door) -> None:
        _, server = await door.joined()
        sent: list[bytes] = []
        door.lose = lambda data, to_server: bool(not to_server and sent.append(data))
        first = server.sent
        while len(sent) < 300:
            server.ping()
            await asyncio.sleep(0.02)
        known = [number for number in map(server.number_of, sent) if number is not None]
        assert known == list(range(first + len(sent) - 256, first + len(sent)))

    at_door(work, engine)


def test_client_whose_port_stays_closed_is_given_up(engine: str) -> None:
    """Also where the server has nothing to say to it."""

    async def work(door: Door) -> None:
        _, server = await door.joined()
        door.listener.accepted(server)
        await asyncio.sleep(2)
        since = door.loop.time()
        door.lose = lambda data, to_server: True  # it is gone, and its host says so of each datagram
        server._send = lambda datagrams: door.loop.call_later(
            0.01, door.listener._refused, [Refusal(data[:QUOTED], address) for data, address in datagrams]
        )
        await door.until(lambda: server.refused)
        assert door.loop.time() - since <= 4
        refused = door.loop.time()
        await door.until(lambda: server.closed is not None)
        assert str(server.closed) == "nobody listens at the client's port any more"
        assert 1 <= door.loop.time() - refused <= 3
        assert door.tables == (0, 0, 0)

    at_door(work, engine)


def test_silent_client_is_asked_and_still_given_up_in_time(engine: str) -> None:
    async def work(door: Door) -> None:
        _, server = await door.joined()
        door.listener.accepted(server)
        door.lose = lambda data, to_server: True
        since = server.heard_at
        asked = server.sent
        await door.until(lambda: server.closed is not None)
        assert server.sent - asked >= 20
        assert 29 <= door.loop.time() - since <= 35, "asking in vain must not keep it alive"

    at_door(work, engine)


def test_client_that_is_heard_again_is_not_given_up(engine: str) -> None:
    async def work(door: Door) -> None:
        _, server = await door.joined()
        door.listener.accepted(server)
        (place,) = door.clients
        send = server._send
        sent: list[bytes] = []
        server._send = lambda datagrams: (sent.extend(data for data, _ in datagrams), send(datagrams))
        for _ in range(10):  # stale or forged by someone on the path: the client is there and answers
            server.ping()
            await asyncio.sleep(0.5)
            door.listener._refused([Refusal(sent[-1][:QUOTED], place)])
            assert server.refused
        await asyncio.sleep(2)
        assert not server.refused
        assert server.closed is None

    at_door(work, engine)


async def test_server_knows_by_its_next_datagram_that_a_client_was_killed(engine: str) -> None:
    """On real sockets, which are all that is told of a killed process: its port is closed."""
    network = Network(engine, engine)
    owner = network.server_owner
    listener = LinkListener(select_engine(engine), identity()[0], owner, network.server_budget)
    host, port = await listener.start("127.0.0.1", 0)
    trust = ClientTrust("localhost", identity()[1])
    (server, *_) = await resolve(host, port, 5)
    clients = [
        await dial(network.client_engine, server, trust, network.client_owner, network.client_budget, timeout=5)
        for _ in range(2)
    ]
    await until(lambda: len(owner.links) == 2)
    killed, neighbour = [
        next(link for link in owner.links if link.address == local_address(client)) for client in clients
    ]
    told: list[Link] = []
    owner.link_refused = told.append  # type: ignore[method-assign]
    local_socket(clients[0]).close()
    began = time.monotonic()
    number = killed.sent
    killed.ping()
    neighbour.ping()
    await until(lambda: killed.refused)
    print(f"{engine}: known after {1000 * (time.monotonic() - began):.1f} ms")
    assert told[0] is killed
    assert killed.refused_from == number
    await until(lambda: neighbour.round_trip is not None)
    assert not neighbour.refused
    assert listener.socket is not None
    assert listener.socket.dropped == 0
    listener.close()
    for client in clients:
        client.drop()
    await network.close()


def local_socket(way: Way) -> DatagramSocket:
    """The socket that a client's link goes over."""
    assert way._socket is not None
    return way._socket


def local_address(way: Way) -> tuple[str, int]:
    address: tuple[str, int] = local_socket(way).sock.getsockname()
    return address
