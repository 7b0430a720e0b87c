"""A client that breaks every rule, before a server as it is: what its visitors get, and what others notice."""

import asyncio
import random
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from quictunnel.quic.listen import HANDSHAKE_TIME
from quictunnel.server.registry import RegistryLimits
from quictunnel.wire.codec import EMPTY_DATA, FrameType, encode_data, encode_head, encode_trailers, push_varint
from quictunnel.wire.control import Authority, Credit, Drain, Grow, Hello, Refuse, Unknown, Welcome, encode_credit
from quictunnel.wire.credit import INITIAL_WINDOW, MAXIMUM_WINDOW
from quictunnel.wire.errors import ErrorCode
from quictunnel.wire.frames import Fields, ResponseHead
from tests.support.ends import Backend, Ends, Visit, play
from tests.support.hostile import HostileClient, control, frame
from tests.support.memory import resident

pytestmark = pytest.mark.either

Scenario = Callable[[Ends], Awaitable[None]]
Play = Callable[..., None]

MIB = 1 << 20


@pytest.fixture
def on_each(engine: str, tmp_path: Path, log_lines: list[str]) -> Play:
    """Runs a scenario with a server of each engine; nothing may be logged as an error of the server's own."""

    def run(scenario: Scenario, **options: Any) -> None:
        play(scenario, (engine, engine), tmp_path, **options)
        assert not [
            line for line in log_lines if line.startswith(("ERROR", "CRITICAL")) and "ended the session" not in line
        ]

    return run


async def at_work(ends: Ends, engine: str = "aioquic", **options: Any) -> HostileClient:
    """A hostile client that serves ``app``, with an honest neighbour that serves ``other``."""
    await ends.connected(tunnel="other")
    return await HostileClient(ends, engine, **options).serving()


async def neighbour_is_served(ends: Ends) -> None:
    visit = await ends.visited(host="other.localhost")
    assert (visit.status, visit.answer[-2:]) == (200, "ok")


def complete(visit: Visit) -> bool:
    """Whether a visitor must take the answer for a whole one."""
    head, _, body = visit.final.partition("\r\n\r\n")
    lengths = [line.split(":")[1] for line in head.lower().split("\r\n") if line.startswith("content-length:")]
    if lengths:
        return len(body) == int(lengths[0])
    return body.endswith("0\r\n\r\n")


# Answers


def head(*fields: tuple[bytes, bytes], status: bytes = b"200") -> bytes:
    return encode_trailers([(b":status", status), *fields])


def body(data: bytes) -> bytes:
    return encode_data(data) + data


SPLIT = b"x\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 6\r\n\r\nforged"
WHOLE = head((b"content-length", b"2")) + body(b"ok")

BAD_ANSWERS: dict[str, bytes] = {
    "garbage": bytes(range(256)),
    "field section of garbage": frame(FrameType.HEADERS, b"\xff" * 40),
    "empty field section": frame(FrameType.HEADERS, b""),
    "dynamic table": frame(FrameType.HEADERS, b"\x02\x00\x80"),
    "post-base index": frame(FrameType.HEADERS, b"\x02\x80\x10"),
    "static index beyond the table": frame(FrameType.HEADERS, b"\x00\x00\xff\x7f"),
    "huffman garbage": frame(FrameType.HEADERS, b"\x00\x00\x5f\x00\x83\xff\xff\xff"),
    "section over the limit": push_varint(1) + push_varint(262_145) + b"\0" * 1000,
    "section that decodes to megabytes": frame(FrameType.HEADERS, b"\x00\x00\xd9" + b"\xf9" * 200_000),
    "body before the head": body(b"hello") + WHOLE,
    "only a body of nothing": EMPTY_DATA,
    "nothing": b"",
    "request": encode_trailers([(b":method", b"GET"), (b":scheme", b"http"), (b":authority", b"x"), (b":path", b"/")]),
    "trailers instead of a head": encode_trailers([(b"a", b"b")]),
    "half a head": WHOLE[:5],
    "only an informational head": head(status=b"103"),
    "frame within which it ends": head() + push_varint(0) + push_varint(10) + b"short",
    "unknown frame of a gigabyte": push_varint(0x21) + push_varint(1 << 30),
    "control message on an exchange": control(b'{"type":"drain"}'),
    "status of two digits": head(status=b"20"),
    "status of four digits": head(status=b"2000"),
    "status with a sign": head(status=b"+20"),
    "status with a phrase": head(status=b"200 OK"),
    "status with a line end": head(status=b"200\r\nx: y"),
    "status of letters": head(status=b"abc"),
    "status below 100": head(status=b"099"),
    "status twice": encode_trailers([(b":status", b"200"), (b":status", b"200")]),
    "status second": encode_trailers([(b"a", b"b"), (b":status", b"200")]),
    "method in a response": head((b":method", b"GET")),
    "status that quotes": head(status=b'"\\"'),
    "unasked upgrade": head((b"upgrade", b"websocket"), status=b"101"),
    "name in upper case": head((b"X-Upper", b"1")),
    "name with a space": head((b"a b", b"1")),
    "name with a colon": head((b"a:b", b"1")),
    "name with a line end": head((b"a\r\nb", b"1")),
    "name with NUL": head((b"a\0b", b"1")),
    "name of nothing": frame(FrameType.HEADERS, b"\x00\x00\xd9\x20\x011"),
    "name outside ASCII": head((b"\xc3\xa9", b"1")),
    "value with CR LF": head((b"x", SPLIT)),
    "value with LF": head((b"x", SPLIT.replace(b"\r", b""))),
    "value with CR": head((b"x", b"a\rb")),
    "value with NUL": head((b"x", b"a\0b")),
    "value with ESC": head((b"x", b"\x1b[2J")),
    "split in an informational head": head((b"x", SPLIT), status=b"103") + WHOLE,
    "two lengths": head((b"content-length", b"2"), (b"content-length", b"3")) + body(b"ok"),
    "two equal lengths": head((b"content-length", b"2"), (b"content-length", b"2")) + body(b"ok"),
    "length with a sign": head((b"content-length", b"+2")) + body(b"ok"),
    "list of lengths": head((b"content-length", b"2, 2")) + body(b"ok"),
    "hexadecimal length": head((b"content-length", b"0x2")) + body(b"ok"),
    "less than its length": head((b"content-length", b"20")) + body(b"ok"),
    "two heads": head() + head() + body(b"ok"),
    "two heads around a body": WHOLE + head(),
    "trailers twice": head() + body(b"ok") + encode_trailers([(b"a", b"b")]) * 2,
    "body after the trailers": head() + body(b"ok") + encode_trailers([(b"a", b"b")]) + body(b"more"),
    "trailers that split": head() + body(b"ok") + encode_trailers([(b"x", SPLIT)]),
    "trailers with a pseudo-header": head() + body(b"ok") + encode_trailers([(b":status", b"200")]),
}


@pytest.mark.parametrize("pieces", [1, 7], ids=["at once", "in pieces"])
def test_answers_that_break_the_rules_are_502_or_cut_and_never_reach_the_visitor(on_each: Play, pieces: int) -> None:
    async def scenario(ends: Ends) -> None:
        client = await at_work(ends)
        for number, (name, data) in enumerate(BAD_ANSWERS.items()):
            visit = ends.visit(f"/{number}")
            stream = (await client.asked(number + 1))[number]
            step = len(data) // pieces + 1
            for at in range(0, len(data), step):
                if stream not in client.cut:
                    client.send(stream, data[at : at + step])
                    await asyncio.sleep(0.02)
            if stream not in client.cut:
                client.send(stream, b"", True)
            await ends.until(lambda visit=visit: visit.status >= 200 or visit.transport.closed, 30)  # type: ignore[misc]
            await asyncio.sleep(0.05)
            assert "forged" not in visit.answer, name
            if visit.status != 502:
                # What came after a whole answer cannot take it back: it ends with it all the same.
                whole = name == "two heads around a body" and visit.final.endswith("\r\n\r\nok")
                assert visit.transport.closed and (whole or not complete(visit)), (name, visit.answer)
            else:
                assert visit.error in ("http_protocol_error", "connection_terminated"), (name, visit.answer)
                assert complete(visit), name
        assert client.closed is None
        session = ends.session()
        await ends.until(lambda: session.in_flight == 0)
        assert [link.exchanges for link in session.links.values()] == [0]
        await neighbour_is_served(ends)

    on_each(scenario)


@pytest.mark.parametrize("apart", [False, True], ids=["at once", "apart"])
def test_what_is_more_than_the_length_never_reaches_the_visitor(on_each: Play, apart: bool) -> None:
    async def scenario(ends: Ends) -> None:
        client = await at_work(ends)
        visit = ends.visit()
        (stream,) = await client.asked()
        client.send(stream, head((b"content-length", b"2")) + body(b"ok"))
        if apart:
            await ends.until(lambda: visit.status)
        client.send(stream, body(b"HTTP/1.1 200 OK\r\ncontent-length: 6\r\n\r\nforged"), True)
        await ends.until(lambda: client.cut or visit.transport.closed)
        assert "forged" not in visit.answer
        assert visit.transport.closed or visit.status == 502

    on_each(scenario)


ODD_ANSWERS: dict[str, tuple[Fields, str]] = {
    "hop-by-hop fields": ([(b"transfer-encoding", b"chunked"), (b"keep-alive", b"1"), (b"x-a", b"1")], "x-a: 1"),
    "nominated field": ([(b"connection", b"x-b"), (b"x-b", b"1"), (b"x-a", b"1")], "x-a: 1"),
    "upgrade without 101": ([(b"upgrade", b"h2c"), (b"x-a", b"1")], "x-a: 1"),
    "proxy connection": ([(b"proxy-connection", b"keep-alive"), (b"x-a", b"1")], "x-a: 1"),
}


@pytest.mark.parametrize("name", ODD_ANSWERS)
def test_framing_is_made_anew_whatever_a_client_says_of_it(on_each: Play, name: str) -> None:
    fields, kept = ODD_ANSWERS[name]

    async def scenario(ends: Ends) -> None:
        client = await at_work(ends)
        visit = ends.visit()
        (stream,) = await client.asked()
        client.send(stream, head(*fields) + body(b"ok"), True)
        await ends.until(lambda: visit.answer.endswith("0\r\n\r\n"))
        lines = visit.answer.partition("\r\n\r\n")[0].lower().split("\r\n")
        assert lines[0] == "http/1.1 200 ok"
        assert kept in lines
        assert [line for line in lines if line.startswith("transfer-encoding")] == ["transfer-encoding: chunked"]
        assert not [line for line in lines if line.startswith(("x-b", "upgrade", "keep-alive", "proxy-connection"))]

    on_each(scenario)


def test_flood_of_informational_heads_is_cut_before_it_fills_memory(on_each: Play) -> None:
    async def scenario(ends: Ends) -> None:
        client = await at_work(ends)
        visit = ends.visit()
        (stream,) = await client.asked()
        flood = head((b"link", b"x" * 4000), status=b"103") * 16
        for _ in range(100):
            if stream not in client.cut:
                client.send(stream, flood)
            await asyncio.sleep(0.02)
        assert client.cut[stream] == ErrorCode.FRAME_ERROR
        assert len(visit.answer) < 300_000
        assert visit.error == "http_protocol_error"
        await neighbour_is_served(ends)

    on_each(scenario)


def test_answer_goes_on_after_its_end_and_no_more_than_its_link_is_lost(on_each: Play) -> None:
    async def scenario(ends: Ends) -> None:
        client = await at_work(ends)
        visit, other = ends.visit(), ends.visit()
        first, second = await client.asked(2)
        sender = client.connection._streams[first].sender
        sender.on_data_delivery = lambda *delivery: None  # the library would notice
        client.send(first, WHOLE, True)
        await ends.until(lambda: visit.status)
        sender._buffer_fin = None
        client.send(first, body(b"and more"))
        await asyncio.sleep(0.5)
        if client.closed is None:  # aioquic has forgotten the stream by then, and takes it for an echo
            client.send(second, WHOLE, True)
        await ends.until(lambda: other.status)
        assert visit.answer.count("HTTP/1.1") == 1
        assert (visit.status, visit.answer[-2:]) == (200, "ok")
        assert (other.status, other.error) in ((200, ""), (502, "connection_terminated"))
        await neighbour_is_served(ends)

    on_each(scenario)


def test_bytes_beyond_the_credit_cut_the_exchange(on_each: Play) -> None:
    async def scenario(ends: Ends) -> None:
        client = await at_work(ends)
        visit = ends.visit()
        visit.connection.pause_writing()  # it takes nothing, so nothing is granted
        (stream,) = await client.asked()
        client.send(stream, head() + body(b"x" * INITIAL_WINDOW))
        await ends.until(lambda: visit.status)
        assert stream not in client.cut
        client.send(stream, body(b"x"))
        await ends.until(lambda: client.cut.get(stream) == ErrorCode.FRAME_ERROR)
        assert not [each for each in client.messages if isinstance(each, Credit)]
        assert not complete(visit)
        await neighbour_is_served(ends)

    on_each(scenario)


# Resets


@pytest.mark.parametrize("method", ["GET", "POST"])
@pytest.mark.parametrize("answered", [False, True], ids=["before a head", "after it"])
@pytest.mark.parametrize("code", [0, 1, 2, 3, 4, 0x10, 0x22, 0x27, 0x30, 0x7777, 2**62 - 1], ids=hex)
def test_reset_with_any_code_ends_the_exchange_at_once(on_each: Play, code: int, answered: bool, method: str) -> None:
    """NO_ERROR too, in the middle of an upload: without an answer's end there is no answer."""

    async def scenario(ends: Ends) -> None:
        client = await at_work(ends)
        visit = ends.visit("/", *(["Content-Length: 10"] if method == "POST" else []), method=method)
        (stream,) = await client.asked()
        if answered:
            client.send(stream, head() + body(b"half"))
            await ends.until(lambda: visit.status)
        client.connection.reset_stream(stream, code)
        client.pump()
        await asyncio.sleep(0.1)
        if method == "POST" and not visit.transport.closed:
            visit.send(b"0123456789")
        await ends.until(lambda: visit.transport.closed if answered else visit.status, 5)
        assert not answered or not complete(visit)
        assert answered or visit.status >= 400
        await ends.until(lambda: ends.session().in_flight == 0, 5)
        await neighbour_is_served(ends)

    on_each(scenario)


# Credit


def upload(ends: Ends) -> Visit:
    return ends.visit("/", "Content-Length: 1000000000", method="POST")


async def push(ends: Ends, visit: Visit, size: int) -> int:
    """Send an upload for as long as it is taken, up to ``size`` bytes; how much was."""
    sent = 0
    while sent < size and visit.transport.reading and not visit.transport.closed:
        visit.send(b"u" * 65536)
        sent += 65536
        await asyncio.sleep(0.002)
    return sent


STALL_TIME = 20.0


@pytest.mark.interpreted  # a constant is another
def test_upload_that_is_never_granted_stalls_and_is_ended_by_a_limit(
    on_each: Play, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("quictunnel.quic.link.STALL_TIME", STALL_TIME)

    async def scenario(ends: Ends) -> None:
        client = await at_work(ends)
        visit = upload(ends)
        await client.asked()
        before = resident()
        sent = await push(ends, visit, 64 * MIB)
        assert sent <= INITIAL_WINDOW + 2 * 65536
        assert not visit.transport.reading
        took = await ends.until(lambda: visit.status, 2 * STALL_TIME)
        assert STALL_TIME - 1 < took < STALL_TIME + 3
        assert (visit.status, visit.error) == (504, "http_response_timeout")
        assert resident() - before < 8 * MIB
        await ends.until(lambda: client.cut)
        assert ends.session().in_flight == 0

    on_each(scenario)


@pytest.mark.interpreted  # a constant is another
def test_upload_that_is_granted_now_and_then_is_not_ended(on_each: Play, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("quictunnel.quic.link.STALL_TIME", STALL_TIME)

    async def scenario(ends: Ends) -> None:
        client = await at_work(ends)
        visit = upload(ends)
        (stream,) = await client.asked()
        await push(ends, visit, 64 * MIB)
        for number in range(1, 6):
            await asyncio.sleep(STALL_TIME - 3)
            client.say(encode_credit(stream, INITIAL_WINDOW + 1000 * number))
        await asyncio.sleep(STALL_TIME - 3)
        assert visit.status == 0 and not visit.transport.closed
        assert stream not in client.cut

    on_each(scenario)


def test_absurd_credit_lets_no_more_wait_than_a_window(on_each: Play) -> None:
    """The client lets nothing out of the server by QUIC's windows, and grants all there is, again and again."""

    async def scenario(ends: Ends) -> None:
        client = await at_work(ends, deaf=100_000)
        visit = upload(ends)
        (stream,) = await client.asked()
        before, sent = resident(), 0
        for _ in range(40):
            client.say(encode_credit(stream, 2**62 - 1))
            await asyncio.sleep(0.02)
            sent += await push(ends, visit, 8 * MIB)
        print(f"granted 2**62-1 forty times: {sent / MIB:.0f} MiB taken, {(resident() - before) / MIB:.0f} MiB grown")
        assert len(client.streams[stream]) <= 100_000
        assert sent <= 3 * MAXIMUM_WINDOW + MIB
        assert resident() - before < 64 * MIB
        await neighbour_is_served(ends)

    on_each(scenario)


def test_credit_that_falls_or_is_for_other_streams_changes_nothing(on_each: Play) -> None:
    async def scenario(ends: Ends) -> None:
        client = await at_work(ends)
        visit = upload(ends)
        (stream,) = await client.asked()
        await push(ends, visit, 64 * MIB)
        await ends.until(lambda: len(client.streams[stream]) > INITIAL_WINDOW)
        before = len(client.streams[stream])
        for limit in (0, 1, INITIAL_WINDOW, INITIAL_WINDOW - 1):
            client.say(encode_credit(stream, limit))
        for other in (0, 2, 3, 4, stream + 4, stream + 400, 2**62 - 1):
            client.say(encode_credit(other, 2**40))
        await asyncio.sleep(1)
        assert client.closed is None
        assert len(client.streams[stream]) == before
        assert not visit.transport.reading
        client.say(encode_credit(stream, 2 * INITIAL_WINDOW))
        await ends.until(lambda: len(client.streams[stream]) > before)

    on_each(scenario)


def test_credit_of_one_link_is_nothing_to_another(on_each: Play) -> None:
    """Both have a stream of the same number; the hostile one grants for it."""

    async def scenario(ends: Ends) -> None:
        backend = Backend(None)
        await ends.connected(backend, tunnel="other")
        client = await HostileClient(ends, "aioquic").serving()
        ours = ends.visit("/", "Content-Length: 1000000000", method="POST", host="other.localhost")
        theirs = upload(ends)
        (stream,) = await client.asked()
        await ends.until(lambda: backend.requests)
        (link,) = ends.session("other").links.values()
        assert stream in link._legs
        backend.requests[0].peer.pause()
        await push(ends, ours, 64 * MIB)
        await asyncio.sleep(0.5)
        for _ in range(10):
            client.say(encode_credit(stream, 2**40))
        await push(ends, theirs, MIB)
        await asyncio.sleep(0.5)
        received = sum(len(each.data) for each in backend.requests[0].frames if hasattr(each, "data"))
        assert received <= INITIAL_WINDOW
        assert len(client.streams[stream]) > INITIAL_WINDOW

    on_each(scenario)


# Streams


@pytest.mark.parametrize("stream", [4, 8, 400, 2, 6], ids=lambda stream: f"stream {stream}")
@pytest.mark.parametrize("what", [b"", b"hello", WHOLE], ids=["nothing", "garbage", "answer"])
def test_stream_that_a_client_may_not_open_ends_its_link(on_each: Play, stream: int, what: bytes) -> None:
    async def scenario(ends: Ends) -> None:
        client = await at_work(ends)
        connection = client.connection
        connection._remote_max_streams_bidi = connection._remote_max_streams_uni = 1000
        connection._remote_max_stream_data_bidi_remote = connection._remote_max_stream_data_uni = MIB
        client.send(stream, what, True)
        await ends.until(lambda: not ends.server.registry.tunnels["app"].sessions, 10)
        await neighbour_is_served(ends)

    on_each(scenario)


@pytest.mark.parametrize("how", ["end", "reset", "stop", "stop with answers due"])
def test_control_stream_that_is_cut_ends_the_link(on_each: Play, how: str) -> None:
    async def scenario(ends: Ends) -> None:
        client = await at_work(ends)
        visit = ends.visit()
        await client.asked()
        if how == "end":
            client.send(0, b"", True)
        elif how == "reset":
            client.connection.reset_stream(0, 7)
        else:
            if how == "stop with answers due":
                client.connection.send_stream_data(0, control(b'{"type":"dance"}') * 50)
            client.connection.stop_stream(0, 7)
        client.pump()
        await ends.until(lambda: visit.status, 10)
        assert (visit.status, visit.error) == (502, "connection_terminated")
        await ends.until(lambda: client.closed)
        assert client.closed is not None
        assert client.closed[0] == ErrorCode.FRAME_ERROR
        await neighbour_is_served(ends)

    on_each(scenario)


def test_bytes_far_ahead_of_what_came_take_no_memory(on_each: Play) -> None:
    """Before a word of hello: aioquic makes room up to the last byte, and lets it go twice as far each time."""

    async def scenario(ends: Ends) -> None:
        await ends.connected(tunnel="other")
        before = resident()
        for stream, offset in ((0, 15 * MIB), (0, 200_000), (4, 15 * MIB), (2, 15 * MIB)):
            client = await HostileClient(ends, "aioquic").connect()
            connection = client.connection
            connection._remote_max_streams_bidi = connection._remote_max_streams_uni = 1000
            connection._remote_max_stream_data_bidi_remote = connection._remote_max_stream_data_uni = 1 << 40
            connection._remote_max_data = 1 << 50
            for step in range(6):
                if client.closed is None:
                    client.send_at(stream, offset << step if offset > MIB else offset + step, b"x")
                    await asyncio.sleep(0.05)
        grown = resident() - before
        print(f"bytes far ahead: {grown / MIB:.1f} MiB grown")
        assert grown < 16 * MIB
        await neighbour_is_served(ends)

    on_each(scenario)


def test_thousands_of_fragments_are_not_compared_with_each_other(
    on_each: Play, engine: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """aioquic compares each piece that comes out of order with all that came before it."""
    monkeypatch.setattr("quictunnel.quic.aioquic_reins._FRAGMENTS_LIMIT", 50)

    async def scenario(ends: Ends) -> None:
        await ends.connected(tunnel="other")
        client = await HostileClient(ends, "aioquic").connect()
        for number in range(1, 100):
            if client.closed is None:
                client.send_at(0, 2 * number, b"x")
                await asyncio.sleep(0.02)
        if engine == "aioquic":
            assert client.closed is not None
            assert client.closed[1] == "too much came out of order"
        await neighbour_is_served(ends)

    on_each(scenario)


# Control messages


@pytest.mark.parametrize(
    "data",
    [
        control(b"{"),
        control(b"\xff\xfe"),
        control('{"type":"grow","links":1}'.encode("utf-16")),
        control(b'{"type":"hello","version":1,"tunnel":"app","session":"\\ud800","token":"t"}'),
        control(b'{"type":"\\udfff"}'),
        control(b"[" * 60_000),
        push_varint(FrameType.CONTROL) + push_varint(65_537),
        push_varint(0x21) + push_varint(2**62 - 1),
        frame(FrameType.CREDIT, b"\x01"),
        bytes(range(255, 0, -1)) * 5,
    ],
    ids=lambda data: repr(data[:24]),
)
@pytest.mark.parametrize("welcomed", [True, False], ids=["after hello", "before hello"])
def test_garbage_on_the_control_stream_ends_the_link(on_each: Play, data: bytes, welcomed: bool) -> None:
    async def scenario(ends: Ends) -> None:
        await ends.connected(tunnel="other")
        client = HostileClient(ends, "aioquic")
        await (client.serving() if welcomed else client.connect())
        client.say(data)
        await ends.until(lambda: client.closed, 10)
        assert client.closed is not None
        assert client.closed[0] == ErrorCode.FRAME_ERROR
        await neighbour_is_served(ends)

    on_each(scenario)


def test_server_messages_from_a_client_change_nothing(on_each: Play) -> None:
    async def scenario(ends: Ends) -> None:
        client = await at_work(ends)
        client.say(Welcome("other"), Refuse("x", "y"), Grow(10**9), Unknown("x"), encode_credit(1, 1))
        visit = ends.visit()
        (stream,) = await client.asked()
        client.send(stream, WHOLE, True)
        await ends.until(lambda: visit.status)
        assert visit.status == 200
        assert [type(each) for each in client.messages] == [Welcome]
        await neighbour_is_served(ends)

    on_each(scenario)


def test_answers_that_a_client_never_reads_do_not_pile_up(on_each: Play, engine: str) -> None:
    async def scenario(ends: Ends) -> None:
        client = await at_work(ends, deaf=2000)
        before = resident()
        sent = 0
        while client.closed is None and sent < 20_000:  # not in a rush, which is another limit's affair
            client.say(*[control(b'{"type":"%b"}' % (b"d" * 60))] * 50)
            sent += 50
            await asyncio.sleep(5)
        print(f"unread answers: cut after {sent} questions, {(resident() - before) / MIB:.1f} MiB grown")
        assert client.closed is not None
        # qh3 waits for its time-outs beside this, and one of them may be the first to end it.
        assert client.closed[1] in ("the control stream is not read", "Idle timeout")
        assert client.closed[1] != "Idle timeout" or engine == "qh3"
        assert resident() - before < 16 * MIB
        await neighbour_is_served(ends)

    on_each(scenario)


@pytest.mark.parametrize("what", [b'{"type":"dance"}', b'{"type":"drain"}', b'{"type":"grow","links":1}'], ids=repr)
def test_flood_of_control_messages_ends_the_link(on_each: Play, what: bytes) -> None:
    async def scenario(ends: Ends) -> None:
        client = await at_work(ends)
        client.say(control(what) * 3000)
        await ends.until(lambda: client.closed, 5)
        # The first drain of a link with nothing under way ends it.
        whole = (ErrorCode.NO_ERROR, "no longer needed") if b"drain" in what else None
        assert client.closed in (whole, (ErrorCode.FRAME_ERROR, "too many control messages"))
        assert len(client.messages) <= 257
        await neighbour_is_served(ends)

    on_each(scenario)


def test_authority_is_shown_once(on_each: Play) -> None:
    async def scenario(ends: Ends) -> None:
        client = await HostileClient(ends, "aioquic").connect()
        client.say(*[Authority()] * 50)
        await ends.until(lambda: client.closed)
        assert [type(each) for each in client.messages] == [Authority, Refuse]
        await ends.until(lambda: not ends.server.links.links)

    on_each(scenario)


def test_one_link_is_refused_once_however_often_it_says_hello(on_each: Play, log_lines: list[str]) -> None:
    async def scenario(ends: Ends) -> None:
        client = await HostileClient(ends, "aioquic").connect()
        wrong = Hello(1, "app", "s" * 32, "qtk_nothing")
        right = Hello(1, "app", "s" * 32, ends.token.secret)
        client.say(*[wrong] * 2000, right)
        await ends.until(lambda: client.closed)
        assert [type(each) for each in client.messages] == [Refuse]
        assert not ends.server.registry.tunnels
        assert not ends.server.gate._refused
        assert len([line for line in log_lines if "refused" in line]) == 1

    on_each(scenario)


def test_second_hello_ends_a_link_and_its_session_is_another_s_never(on_each: Play) -> None:
    async def scenario(ends: Ends) -> None:
        client = await at_work(ends)
        client.say(*[Hello(1, "other", "s" * 32, ends.token.secret)] * 1000)
        await ends.until(lambda: client.closed)
        assert [type(each) for each in client.messages] == [Welcome, Refuse]
        assert list(ends.server.registry.tunnels) == ["other", "app"]
        assert len(ends.server.registry.tunnels["other"].sessions) == 1
        await neighbour_is_served(ends)

    on_each(scenario)


def test_client_that_drains_at_once_gets_nothing(on_each: Play) -> None:
    async def scenario(ends: Ends) -> None:
        client = await at_work(ends)
        client.say(*[Drain()] * 1000)
        await asyncio.sleep(0.1)
        visit = await ends.visited()
        assert (visit.status, visit.error) == (503, "destination_unavailable")
        assert not client.requests
        await neighbour_is_served(ends)

    on_each(scenario)


# Lies in the hello


LIES: dict[str, tuple[dict[str, Any], str]] = {
    "version of tomorrow": ({"version": 2}, "version"),
    "version of never": ({"version": 2**61}, "version"),
    "link beyond the limit": ({"link": RegistryLimits().max_links}, "limit"),
    "link beyond all": ({"link": 2**62 - 1}, "limit"),
    "short session": ({"session": "s"}, "protocol"),
    "long session": ({"session": "s" * 60_000}, "protocol"),
    "no token": ({"token": ""}, "token_unknown"),
    "token of nobody": ({"token": "qtk_aaaaaaaa_" + "x" * 43}, "token_unknown"),
    "token of 60 kB": ({"token": "qtk_" + "x" * 60_000}, "token_unknown"),
    "name out of scope": ({"tunnel": "other"}, "token_scope"),
    "name held by another": ({"tunnel": "held"}, "name_taken"),
    "name held by another, in capitals": ({"tunnel": "HELD"}, "name_taken"),
    "name with a final dot": ({"tunnel": "held."}, "token_scope"),
    "name with a space": ({"tunnel": "held "}, "token_scope"),
    "name with NUL": ({"tunnel": "held\0"}, "token_scope"),
    "name with a line end": ({"tunnel": "held\r\n"}, "token_scope"),
    "deeper name": ({"tunnel": "x.held"}, "token_scope"),
    "name in wide letters": ({"tunnel": "\uff48\uff45\uff4c\uff44"}, "token_scope"),
    "name with the Kelvin sign": ({"tunnel": "\u212aeld"}, "token_scope"),
    "punycode out of scope": ({"tunnel": "xn--held-"}, "token_scope"),
    "name of a star": ({"tunnel": "*"}, "token_scope"),
    "path for a name": ({"tunnel": "../held"}, "token_scope"),
    "name of 60 kB": ({"tunnel": "h" * 60_000}, "token_scope"),
}


def test_lies_in_a_hello_are_refused_and_take_nothing_from_anybody(on_each: Play, log_lines: list[str]) -> None:
    async def scenario(ends: Ends) -> None:
        await ends.connected(tunnel="held")
        # Patterns cover the odd spellings too: only the name's one form may decide.
        token = ends.tokens.create(["app", "held*", "h-*"], None, datetime.now(UTC))
        before = dict(ends.server.registry.tunnels["held"].sessions)
        for name, (values, code) in LIES.items():
            client = await HostileClient(ends, "aioquic").connect()
            answer = await client.hello(**{"token": token.secret, **values})
            assert isinstance(answer, Refuse), name
            assert answer.code == code, name
            assert len(answer.text) < 400
        assert ends.server.registry.tunnels["held"].sessions == before
        assert set(ends.server.registry.tunnels) == {"held"}
        visit = await ends.visited(host="held.localhost")
        assert visit.status == 200
        assert max(map(len, log_lines)) < 1000

    on_each(scenario)


def test_session_id_of_another_is_worth_nothing_with_ones_own_token(on_each: Play) -> None:
    """Whoever has read an id in a log or a dump still needs the token of its tunnel."""

    async def scenario(ends: Ends) -> None:
        honest = await ends.connected(tunnel="held")
        stolen, before = honest._session, ends.session("held")
        links = dict(before.links)
        token = ends.tokens.create(["*"], None, datetime.now(UTC))
        for name, expected in (("held", "name_taken"), ("HELD", "name_taken"), ("mine", "")):
            client = await HostileClient(ends, "aioquic").connect()
            answer = await client.hello(tunnel=name, session=stolen, token=token.secret)
            assert (answer.code if isinstance(answer, Refuse) else "") == expected
        assert ends.session("held") is before
        assert before.links == links
        assert ends.session("mine") is not before
        assert (await ends.visited(host="held.localhost")).status == 200

    on_each(scenario)


def test_hello_of_a_revoked_token_is_refused_from_the_same_moment(on_each: Play) -> None:
    async def scenario(ends: Ends) -> None:
        client = await HostileClient(ends, "aioquic").serving()
        second = await HostileClient(ends, "aioquic").connect()
        ends.tokens.revoke(ends.token.id, datetime.now(UTC))
        answer = await second.hello(link=1)
        assert isinstance(answer, Refuse)
        assert answer.code == "token_revoked"
        await ends.until(lambda: client.closed, 5)
        assert isinstance(client.messages[-1], Refuse)
        assert not ends.server.registry.sessions()

    on_each(scenario)


def test_name_that_changes_hands_sends_nothing_more_to_its_old_owner(on_each: Play) -> None:
    """Not even in the second until all tokens are looked at again."""

    async def scenario(ends: Ends) -> None:
        old = Backend()
        agent = await ends.connected(old)
        second = await HostileClient(ends, "aioquic").connect()
        token = ends.tokens.create(["app"], None, datetime.now(UTC))
        ends.server.gate.recheck_tokens = lambda: None  # type: ignore[method-assign]
        ends.tokens.revoke(ends.token.id, datetime.now(UTC))
        assert isinstance(await second.hello(token=token.secret), Welcome)
        visits = [ends.visit() for _ in range(10)]
        await second.asked(10)
        assert not old.requests
        assert agent._session not in ends.server.registry.tunnels["app"].sessions
        assert {visit.status for visit in visits} == {0}

    on_each(scenario)


def test_session_has_its_links_and_a_tunnel_its_sessions_and_no_more(on_each: Play) -> None:
    async def scenario(ends: Ends) -> None:
        ends.limits = RegistryLimits(max_links=3, sessions=4)
        await ends.serve()
        await ends.connected(tunnel="other")
        clients = [await HostileClient(ends, "aioquic").serving(link=number) for number in range(3)]
        answer = await (await HostileClient(ends, "aioquic").connect()).hello(link=3)
        assert (type(answer), answer.code) == (Refuse, "limit")  # type: ignore[union-attr]
        # The same number again and again: each replaces the one before.
        clients += [await HostileClient(ends, "aioquic").serving(link=0) for _ in range(30)]
        await ends.until(lambda: len([client for client in clients if client.closed is None]) == 3)
        for number in range(3):
            await HostileClient(ends, "aioquic").serving(session=f"{number}" * 20)
        answer = await (await HostileClient(ends, "aioquic").connect()).hello(session="z" * 20)
        assert (type(answer), answer.code) == (Refuse, "limit")  # type: ignore[union-attr]
        assert len(ends.server.registry.tunnels["app"].sessions) == 4
        await neighbour_is_served(ends)

    on_each(scenario, serve=False)


def test_replaced_links_that_hold_exchanges_are_as_many_as_their_visitors(on_each: Play) -> None:
    async def scenario(ends: Ends) -> None:
        visits = []
        for number in range(20):
            client = await HostileClient(ends, "aioquic").serving()
            visits.append(ends.visit(f"/{number}"))
            await client.asked()
        session = ends.session()
        assert len(session.lingering) == 19
        for visit in visits:
            visit.leave()
        await ends.until(lambda: not session.lingering)
        await ends.until(lambda: len(ends.server.links.links) == 1, 30)

    on_each(scenario)


# Everything at once


def test_random_bytes_on_every_stream_harm_nobody_else(on_each: Play) -> None:
    async def scenario(ends: Ends) -> None:
        await ends.connected(tunnel="other")
        chance = random.Random(11)
        for round_number in range(40):
            client = await HostileClient(ends, "aioquic").serving(session=f"{round_number:032}")
            visits = [ends.visit() for _ in range(10)]
            await client.asked(10)
            for stream in client.requests:
                data = bytearray(WHOLE + encode_trailers([(b"a", b"b")]))
                for _ in range(chance.randrange(4)):
                    data[chance.randrange(len(data))] = chance.randrange(256)
                if chance.random() < 0.3:
                    data = bytearray(chance.randbytes(chance.randrange(200)))
                if client.closed is None and stream not in client.cut:
                    client.send(stream, bytes(data), chance.random() < 0.7)
            client.say(chance.randbytes(chance.randrange(100)))
            await asyncio.sleep(0.2)
            client.connection.close(error_code=1)
            client.pump()
            await ends.until(lambda visits=visits: all(v.status or v.transport.closed for v in visits), 60)  # type: ignore[misc]
            await ends.until(lambda: not ends.server.registry.tunnels["app"].sessions, 60)
        await neighbour_is_served(ends)
        await ends.until(lambda: len(ends.server.links.links) == 1, HANDSHAKE_TIME + 60)
        assert ends.server.registry.tunnels["app"].in_flight == 0

    on_each(scenario)


def test_encoders_of_these_tests_are_the_tunnels() -> None:
    """The answers above are bad for what they say, not for how they are written."""
    assert head((b"content-length", b"2")) == encode_head(ResponseHead(200, [(b"content-length", b"2")]))
