"""What this package relies on of the two QUIC libraries: a new version that changes it fails here, by name."""

import asyncio
import dataclasses
import inspect
from importlib.util import find_spec
from pathlib import Path

import pytest
from aioquic.buffer import Buffer  # type: ignore[attr-defined]
from aioquic.quic.packet import QuicPacketType, pull_quic_header
from hypothesis import given
from hypothesis import strategies as st

from quictunnel.quic.engine import ALPN, ENGINES, ClientTrust, Connection, ServerIdentity, select_engine
from quictunnel.quic.first_packets import (
    InitialHeader,
    RetryTokens,
    parse_long_header,
    retry_packet,
    version_negotiation_packet,
)
from quictunnel.quic.link import SLOTS, Link
from quictunnel.wire.errors import ErrorCode, TunnelError
from quictunnel.wire.frames import End, RequestHead
from tests.support.clock import run
from tests.support.memory import Network, identity, opened

GET = RequestHead(b"GET", b"http", b"app.localhost", b"/", [])

METHODS = [name for name in vars(Connection) if not name.startswith("_") and callable(getattr(Connection, name))]

EVENTS = {
    "ConnectionIdIssued": {"connection_id"},
    "ConnectionIdRetired": {"connection_id"},
    "ConnectionTerminated": {"error_code", "reason_phrase"},
    "HandshakeCompleted": set(),
    "PingAcknowledged": {"uid"},
    "StopSendingReceived": {"stream_id", "error_code"},
    "StreamDataReceived": {"stream_id", "data", "end_stream"},
    "StreamReset": {"stream_id", "error_code"},
}


def test_engines_can_be_chosen_by_name(engine: str) -> None:
    assert select_engine(engine).name == engine


def test_auto_is_the_faster_one_where_it_is_installed() -> None:
    assert select_engine("auto").name == ("qh3" if find_spec("qh3") else "aioquic")


def test_unknown_engine_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match=", ".join(ENGINES)):
        select_engine("quiche")


def test_missing_engine_says_how_to_have_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("quictunnel.quic.engine.find_spec", lambda name: None)
    assert select_engine  # found; what it looks for is not
    with pytest.raises(ValueError, match=r"pip install 'quictunnel\[fast\]'"):
        select_engine("qh3")


@pytest.mark.parametrize("method", METHODS)
def test_connection_has_the_method(engine: str, method: str) -> None:
    theirs = inspect.signature(getattr(select_engine(engine).connection, method)).parameters
    ours = inspect.signature(getattr(Connection, method)).parameters
    for name in ours:
        assert name in theirs, f"{engine}: {method} has no parameter {name}: {list(theirs)}"


@pytest.mark.parametrize("event", EVENTS)
def test_event_has_the_members(engine: str, event: str) -> None:
    kind = getattr(select_engine(engine).events, event)
    members = {field.name for field in dataclasses.fields(kind)}
    assert members >= EVENTS[event]


def test_connection_has_an_id_of_eight_bytes_from_the_start(engine: str) -> None:
    connection = select_engine(engine).dial(ClientTrust("localhost", identity()[1]), 1200)
    assert len(connection.host_cid) == 8


def test_application_protocol_is_named_for_both_sides(engine: str) -> None:
    configuration = select_engine(engine).server_configuration(identity()[0], 1200)
    assert configuration.alpn_protocols == [ALPN]


def test_use_after_the_peers_goodbye_raises_what_the_engine_says(engine: str) -> None:
    assert issubclass(select_engine(engine).connection_error, Exception)


@pytest.mark.parametrize("what", ["missing", "garbage"])
def test_identity_that_cannot_be_used_is_refused(engine: str, tmp_path: Path, what: str) -> None:
    path = tmp_path / "server.pem"
    if what == "garbage":
        path.write_text("not a certificate")
    with pytest.raises((OSError, ValueError)):
        select_engine(engine).server_configuration(ServerIdentity(str(path), str(path)), 1200)


def test_new_connection_has_a_first_datagram_of_full_size(engine: str) -> None:
    connection = select_engine(engine).dial(ClientTrust("localhost", identity()[1]), 1200)
    connection.connect(("127.0.0.1", 4433), now=0.0)
    data, address = connection.datagrams_to_send(now=0.0)[0]
    header = parse_long_header(bytes(data))
    assert header is not None
    assert (len(data), address, header.version, header.is_initial) == (1200, ("127.0.0.1", 4433), 1, True)
    assert len(header.destination_cid) >= 8
    timer = connection.get_timer()
    assert timer is not None
    assert 0 < timer < 2


# Streams


def test_peer_allows_all_slots_and_is_asked_for_no_more(engines: tuple[str, str]) -> None:
    async def work() -> None:
        network = Network(*engines)
        _, server = await network.joined()
        held = [opened(network, server, GET, End()) for _ in range(SLOTS)]
        assert not server.has_slot()
        await network.until(lambda: len(network.client_owner.legs) == SLOTS)
        assert server.closed is None
        assert len(held) == server.active == SLOTS
        await network.close()

    run(work())


def test_streams_that_ended_are_allowed_anew(engine: str) -> None:
    async def work() -> None:
        network = Network(engine, engine)
        _, server = await network.joined()
        first = server.engine.streams_allowed(server._connection)
        await _serve(network, server, 3 * SLOTS)
        assert server.engine.streams_allowed(server._connection) >= first
        assert server.has_slot()
        await network.close()

    run(work())


async def _serve(network: Network, server: Link, count: int) -> None:
    """So many exchanges, one after the other, each cut by its visitor."""
    for _ in range(count):
        await network.until(server.has_slot)
        leg, _ = opened(network, server, GET, End())
        await asyncio.sleep(0.02)
        leg.abort(TunnelError(ErrorCode.CANCELLED))


# Habits of one library that the other lacks


def test_qh3_server_still_needs_a_retry() -> None:
    """When this fails, qh3 has been mended: ``Engine.needs_retry`` and its round trip can go."""
    if find_spec("qh3") is None:
        pytest.skip("qh3 is not installed")

    async def handshake_time(*, needs_retry: bool) -> float:
        network = Network("qh3", "aioquic", retry="never", delay=0.005)
        network.listener.engine = dataclasses.replace(network.listener.engine, needs_retry=needs_retry)
        began = network.loop.time()
        link = network.dial()
        await network.until(lambda: link.ready, 30)
        took = network.loop.time() - began
        await network.close()
        return took

    assert select_engine("qh3").needs_retry
    with_retry = run(handshake_time(needs_retry=True))
    assert with_retry < 0.1
    assert run(handshake_time(needs_retry=False)) > 1.5 * with_retry, "its first flight does not stall any more"


@pytest.mark.parametrize("server", ["aioquic", "qh3"])
def test_server_follows_a_client_to_other_addresses(server: str) -> None:
    """qh3's to three and no further; when this fails for it, ``Engine.address_changes`` is not needed any more."""
    if find_spec(server) is None:
        pytest.skip(f"{server} is not installed")

    async def work() -> int:
        network = Network(server, "aioquic")
        client, _ = await network.joined()
        for count in range(1, 9):
            await asyncio.sleep(1)
            address = ("10.0.1.1", 60_000 + count)
            network.clients = {address: client}
            client._send = lambda datagrams, source=address: [  # type: ignore[misc]
                network._carry(data, True, network.listener.datagram_received, source) for data, _ in datagrams
            ]
            heard = client.heard_at
            client.ping()
            await asyncio.sleep(1)
            if client.heard_at == heard:
                break
        await network.close()
        return count

    assert run(work()) == (4 if server == "qh3" else 8)


@pytest.mark.parametrize("server", ["aioquic", "qh3"])
def test_server_is_heard_again_after_an_address_that_gave_no_answer(server: str) -> None:
    """qh3's never is; when this fails for it, a way's old sockets (``quic.dial``) may be closed sooner."""
    if find_spec(server) is None:
        pytest.skip(f"{server} is not installed")

    async def work() -> bool:
        network = Network(server, "aioquic")
        client, _ = await network.joined()
        (home,) = network.clients

        def go_to(address: tuple[str, int], *, is_open: bool) -> None:
            network.clients = {address: client} if is_open else {}
            client._send = lambda datagrams: [  # type: ignore[misc]
                network._carry(data, True, network.listener.datagram_received, address) for data, _ in datagrams
            ]

        go_to(("10.0.1.1", 60_001), is_open=False)
        client.ping()
        await asyncio.sleep(0.1)
        go_to(home, is_open=True)
        for _ in range(10):
            client.ping()
            await asyncio.sleep(1)
        is_heard = client.silent_for() < 2
        await network.close()
        return is_heard

    assert run(work()) == (server == "aioquic")


def test_aioquic_server_needs_no_retry() -> None:
    assert not select_engine("aioquic").needs_retry


# What is read and written before there is a connection


HEADER = InitialHeader(1, True, False, b"destinat", b"source--", b"")


def test_retry_token_is_good_for_its_address_its_id_and_half_a_minute() -> None:
    tokens = RetryTokens()
    address = ("192.0.2.1", 5555)
    token = tokens.create(address, HEADER, b"new-cid-", 100.0)
    shown = dataclasses.replace(HEADER, destination_cid=b"new-cid-", token=token)
    assert tokens.original_cid(address, shown, 101.0) == b"destinat"
    assert tokens.original_cid(("2001:db8::1", 1, 0, 0), dataclasses.replace(shown, token=_v6(tokens)), 1.0)
    for wrong in (
        (("192.0.2.2", 5555), shown, 101.0),
        (("192.0.2.1", 5556), shown, 101.0),
        (address, dataclasses.replace(shown, destination_cid=b"destinat"), 101.0),
        (address, dataclasses.replace(shown, token=token[:-1] + bytes([token[-1] ^ 1])), 101.0),
        (address, dataclasses.replace(shown, token=b"x"), 101.0),
        (address, shown, 131.0),
    ):
        with pytest.raises(ValueError):
            tokens.original_cid(*wrong)
    with pytest.raises(ValueError):
        RetryTokens().original_cid(address, shown, 101.0)


def _v6(tokens: RetryTokens) -> bytes:
    return tokens.create(("2001:db8::1", 1, 0, 0), HEADER, b"new-cid-", 0.0)


def test_retry_and_version_negotiation_are_addressed_to_who_asked(engine: str) -> None:
    retry = parse_long_header(retry_packet(select_engine(engine), HEADER, b"new-cid-", b"token"))
    assert retry is not None
    assert (retry.destination_cid, retry.source_cid, retry.token, retry.is_initial) == (
        b"source--",
        b"new-cid-",
        b"token",
        False,
    )
    negotiation = parse_long_header(version_negotiation_packet(HEADER))
    assert negotiation is not None
    assert (negotiation.is_version_negotiation, negotiation.destination_cid, negotiation.source_cid) == (
        True,
        b"source--",
        b"destinat",
    )


def read_by_aioquic(data: bytes) -> InitialHeader | None:
    try:
        header = pull_quic_header(Buffer(data=data), host_cid_length=8)
    except ValueError:
        return None
    if header.version is None:
        return None
    kind, version = header.packet_type, header.version
    is_initial = version == 1 and kind == QuicPacketType.INITIAL
    token = header.token if version == 1 else b""
    return InitialHeader(version, is_initial, version == 0, header.destination_cid, header.source_cid, token)


@given(
    st.binary(max_size=80)
    | st.builds(
        lambda first, version, one, other, rest: b"".join(
            (bytes((first,)), version, bytes((len(one),)), one, bytes((len(other),)), other, rest)
        ),
        st.integers(128, 255),
        st.sampled_from([bytes(4), b"\0\0\0\1", b"\x6b\x33\x43\xcf"]),
        st.binary(max_size=21),
        st.binary(max_size=21),
        st.binary(max_size=40),
    )
)
def test_long_headers_are_read_as_a_library_reads_them(data: bytes) -> None:
    """Those of version 1, all of it; of others more may be taken, for what must be alike in all is all that is read."""
    ours, theirs = parse_long_header(data), read_by_aioquic(data)
    if theirs is not None or (ours is not None and ours.version == 1):
        assert ours == theirs


@pytest.mark.parametrize("data", [b"", b"\xc0", b"\xc0\0\0\0\1", b"\xc0\0\0\0\1\xff", b"\xff" * 1200, b"\xc3" * 30])
def test_garbage_has_no_header(data: bytes) -> None:
    assert parse_long_header(data) is None
