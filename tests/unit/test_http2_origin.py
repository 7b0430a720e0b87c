"""The HTTP/2 backend in memory: what it is sent, what its answers become, what is asked again, what is left behind."""

import asyncio
import errno
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from h2.errors import ErrorCodes

from quictunnel.http.http2_frames import PREFACE
from quictunnel.http.limits import OriginLimits
from quictunnel.wire.credit import WindowBudget
from quictunnel.wire.errors import ErrorCode, TunnelError
from quictunnel.wire.frames import Data, End, Frame, RequestHead, ResponseHead
from tests.support.backend import END, MemoryHttp2Origin, Socket, Visitor, request, turns
from tests.support.clock import run
from tests.support.http2 import (
    DATA,
    END_HEADERS,
    END_STREAM,
    GOAWAY,
    HEADERS,
    PING,
    RST_STREAM,
    WINDOW_UPDATE,
    Wire,
    frame,
    settings_frame,
)
from tests.support.visitors import FakeTls

NOTHING_LEFT = (0, 1, 0, 0)
"no exchange, one connection, nobody waits, no dial"
POST = request(b"POST", [(b"content-length", b"5")], body=True)
UPLOAD = request(b"POST", body=True)
MAX_STREAMS = 3
REFUSED = int(ErrorCodes.REFUSED_STREAM).to_bytes(4, "big")


class Backend:
    """The other end of one connection."""

    def __init__(self, socket: Socket) -> None:
        self.socket = socket
        self.wire = Wire(is_client=False)
        self._heard = len(PREFACE)

    def hears(self) -> None:
        data = self.socket.written
        self.wire.takes(data[self._heard :])
        self._heard = len(data)

    async def says(self, *data: bytes) -> None:
        self.socket.says(*data)
        await turns()
        self.hears()

    async def answers(self, stream_id: int, *fields: tuple[bytes, bytes], body: bytes = b"", status: int = 200) -> None:
        await self.says(self.head(stream_id, *fields, end=not body, status=status))
        if body:
            await self.says(frame(DATA, END_STREAM, stream_id, body))

    def head(self, stream_id: int, *fields: tuple[bytes, bytes], end: bool = False, status: int = 200) -> bytes:
        return self.wire.head([(b":status", b"%d" % status), *fields], end=end, stream_id=stream_id)


class Site:
    """An origin, and the backends that it has dialled."""

    def __init__(self, settings: dict[int, int] | None = None, **limits: Any) -> None:
        self.origin = MemoryHttp2Origin(OriginLimits(**limits), WindowBudget(1 << 22))
        self.settings = settings or {}
        self.backends: list[Backend] = []

    async def meets(self, *, greet: bool = True) -> None:
        """Let every new connection be greeted."""
        await turns()
        while len(self.backends) < len(self.origin.sockets):
            backend = Backend(self.origin.sockets[len(self.backends)])
            self.backends.append(backend)
            if greet:
                await backend.says(backend.wire.hello(self.settings))
            await turns()
        for backend in self.backends:
            backend.hears()

    async def asks(self, head: RequestHead | None = None, *rest: Frame, greet: bool = True) -> Visitor:
        """A visitor whose request is at the backend, or waits."""
        visitor = Visitor().ask(self.origin.open(), head or request(), *rest)
        await self.meets(greet=greet)
        return visitor

    @property
    def backend(self) -> Backend:
        return self.backends[-1]

    @property
    def wire(self) -> Wire:
        return self.backend.wire


@asynccontextmanager
async def site(settings: dict[int, int] | None = None, **limits: Any) -> AsyncIterator[Site]:
    made = Site(settings, **limits)
    try:
        yield made
    finally:
        await made.origin.aclose()
        assert made.origin.counts == (0, 0, 0, 0)


# What a backend gets


async def test_a_request_reaches_the_backend_as_it_is() -> None:
    async with site() as it:
        fields = [(b"x", b"a\tb"), (b"cookie", b"1"), (b"connection", b"x-hop"), (b"x-hop", b"1"), (b"te", b"trailers")]
        await it.asks(request(b"pAtCh", fields, target=b"//a/../b?c", authority=b"App.Example:80"))
        assert it.wire.heads[1] == [
            [
                (b":method", b"pAtCh"),
                (b":scheme", b"http"),
                (b":authority", b"App.Example:80"),
                (b":path", b"//a/../b?c"),
                (b"x", b"a\tb"),
                (b"cookie", b"1"),
                (b"te", b"trailers"),
            ]
        ]
        assert it.wire.ended(1)
        assert it.wire.kinds(1) == [HEADERS]


async def test_a_request_without_a_host_gets_the_backends_own() -> None:
    async with site() as it:
        await it.asks(request(authority=b""))
        assert dict(it.wire.heads[1][0])[b":authority"] == b"backend.example"


@pytest.mark.parametrize(
    ("head", "rest", "body", "trailers"),
    [
        (POST, [Data(b"hel"), Data(b"lo"), END], b"hello", None),
        (UPLOAD, [END], b"", None),
        (UPLOAD, [Data(b"a"), End([(b"x-sum", b"1"), (b"host", b"evil")])], b"a", [(b"x-sum", b"1")]),
    ],
)
async def test_a_body_reaches_the_backend(head: RequestHead, rest: list[Frame], body: bytes, trailers: Any) -> None:
    async with site() as it:
        await it.asks(head, *rest)
        assert it.wire.body(1) == body
        assert it.wire.ended(1)
        assert it.wire.heads[1][1:] == ([trailers] if trailers else [])


async def test_a_head_does_not_wait_for_a_late_body() -> None:
    async with site() as it:
        visitor = await it.asks(POST)
        assert (it.wire.kinds(1), it.wire.ended(1)) == ([HEADERS], False)
        visitor.peer.receive(Data(b"hello"))
        visitor.peer.receive(END)
        await it.meets()
        assert (it.wire.body(1), it.wire.ended(1)) == (b"hello", True)


MALFORMED: dict[str, tuple[RequestHead, list[Frame]]] = {
    "line end in a value": (request(fields=[(b"a", b"b\r\nc")]), []),
    "colon in a name": (request(fields=[(b"a:b", b"c")]), []),
    "pseudo-header field": (request(fields=[(b":path", b"/admin")]), []),
    "second host": (request(fields=[(b"host", b"evil")]), []),
    "space in the target": (request(target=b"/ HTTP/1.1"), []),
    "line end in the method": (request(b"GET\r\n"), []),
    "line end in the authority": (request(authority=b"a\r\nb"), []),
    "two lengths": (request(b"POST", [(b"content-length", b"1"), (b"content-length", b"1")], body=True), []),
    "length without a body": (request(b"POST", [(b"content-length", b"1")]), []),
    "body too long": (POST, [Data(b"hello!")]),
    "body too short": (POST, [Data(b"hell"), END]),
    "line end in a trailer": (UPLOAD, [Data(b"a"), End([(b"a", b"b\r\n")])]),
}


@pytest.mark.parametrize("case", MALFORMED)
async def test_a_malformed_request_is_refused(case: str) -> None:
    head, rest = MALFORMED[case]
    async with site() as it:
        visitor = await it.asks(head, *rest)
        assert visitor.code is ErrorCode.BAD_REQUEST
        assert it.origin.in_flight == 0
        if it.backends:
            assert not it.wire.ended(1)
            assert it.wire.reset(1) == ErrorCodes.CANCEL


@pytest.mark.parametrize(("protocol", "code"), [(b"websocket", ErrorCode.NOT_IMPLEMENTED), (b"other", None)])
async def test_an_upgrade_is_ignored_unless_it_is_all_there_is(protocol: bytes, code: ErrorCode | None) -> None:
    async with site() as it:
        visitor = await it.asks(request(protocol=protocol, body=True))
        assert visitor.code is code
        assert bool(it.backends and it.wire.heads) == (code is None)


# What its answers become


ANSWERS: dict[str, tuple[bytes, list[tuple[bytes, Any]], list[Frame]]] = {
    # method, frames of the backend, frames of the visitor; the backend's stream is 1
    "all head": (b"GET", [(b"H+", [(b"x", b"1")])], [ResponseHead(200, [(b"x", b"1")]), END]),
    "body": (
        b"GET",
        [(b"H", [(b"content-length", b"5")]), (b"D", b"hel"), (b"D+", b"lo")],
        [ResponseHead(200, [(b"content-length", b"5")]), Data(b"hel"), Data(b"lo"), END],
    ),
    "an empty end": (b"GET", [(b"H", []), (b"D", b"a"), (b"D+", b"")], [ResponseHead(200, []), Data(b"a"), END]),
    "trailers": (
        b"GET",
        [(b"H", []), (b"D", b"a"), (b"T", [(b"grpc-status", b"0")])],
        [ResponseHead(200, []), Data(b"a"), End([(b"grpc-status", b"0")])],
    ),
    "trailers without a body": (
        b"GET",
        [(b"H", []), (b"T", [(b"grpc-status", b"0")])],
        [ResponseHead(200, []), End([(b"grpc-status", b"0")])],
    ),
    "HEAD": (b"HEAD", [(b"H+", [(b"content-length", b"5")])], [ResponseHead(200, [(b"content-length", b"5")]), END]),
    "HEAD and an empty end": (
        b"HEAD",
        [(b"H", [(b"content-length", b"5")]), (b"D+", b"")],
        [ResponseHead(200, [(b"content-length", b"5")]), END],
    ),
    "304": (b"GET", [(b"304+", [(b"content-length", b"5")])], [ResponseHead(304, [(b"content-length", b"5")]), END]),
    "304 and an empty end": (
        b"GET",
        [(b"304", [(b"content-length", b"5")]), (b"D+", b"")],
        [ResponseHead(304, [(b"content-length", b"5")]), END],
    ),
    "204": (b"GET", [(b"204+", [(b"content-length", b"0")])], [ResponseHead(204, []), END]),
    "interim": (
        b"GET",
        [(b"103", [(b"link", b"x"), (b"content-length", b"9")]), (b"H+", [])],
        [ResponseHead(103, [(b"link", b"x")]), ResponseHead(200, []), END],
    ),
}


def said(wire: Wire, kind: bytes, what: Any, stream_id: int = 1) -> bytes:
    """One frame of a table."""
    end = kind.endswith(b"+")
    kind = kind.removesuffix(b"+")
    if kind == b"D":
        return frame(DATA, END_STREAM if end else 0, stream_id, what)
    if kind == b"T":
        return wire.head(what, stream_id=stream_id)
    status = b"200" if kind == b"H" else kind
    return wire.head([(b":status", status), *what], end=end, stream_id=stream_id)


@pytest.mark.parametrize("case", ANSWERS)
async def test_an_answer_becomes(case: str) -> None:
    method, frames, expected = ANSWERS[case]
    async with site() as it:
        visitor = await it.asks(request(method))
        for kind, what in frames:
            await it.backend.says(said(it.wire, kind, what))
        assert visitor.frames == expected
        assert visitor.error is None
        assert it.origin.counts == NOTHING_LEFT


BROKEN: dict[str, list[tuple[bytes, Any]]] = {
    "no status": [(b"T", [(b"x", b"y")])],
    "status 101": [(b"101", [])],
    "status 099": [(b"099+", [])],
    "status 20x": [(b"20x+", [])],
    "status 1000": [(b"1000", [])],
    "two statuses": [(b"H", [(b":status", b"200")])],
    "a pseudo-header field of requests": [(b"H", [(b":path", b"/")])],
    "response splitting": [(b"H", [(b"x", b"a\r\n\r\nHTTP/1.1 200 OK")])],
    "line end in a name": [(b"H", [(b"x: y\r\nz", b"a")])],
    "upper case": [(b"H", [(b"Set-Cookie", b"a")])],
    "transfer-encoding": [(b"H", [(b"transfer-encoding", b"chunked")])],
    "two lengths": [(b"H", [(b"content-length", b"1"), (b"content-length", b"1")])],
    "a bad length": [(b"H", [(b"content-length", b"+1")])],
    "too many fields": [(b"H", [(b"x", b"y")] * 300)],
    "too large": [(b"H", [(b"x%d" % number, b"y" * 15_000) for number in range(1)] * 5)],
}
BROKEN_LATER: dict[str, tuple[bytes, list[tuple[bytes, Any]]]] = {
    "too long": (b"GET", [(b"H", [(b"content-length", b"1")]), (b"D", b"xy")]),
    "too short": (b"GET", [(b"H", [(b"content-length", b"3")]), (b"D+", b"xy")]),
    "too short with trailers": (b"GET", [(b"H", [(b"content-length", b"3")]), (b"T", [(b"x", b"y")])]),
    "nothing of it": (b"GET", [(b"H+", [(b"content-length", b"3")])]),
    "a pseudo-header field late": (b"GET", [(b"H", []), (b"T", [(b":status", b"200")])]),
    "line end in a trailer": (b"GET", [(b"H", []), (b"T", [(b"x", b"\n")])]),
    "a body for 304": (b"GET", [(b"304", []), (b"D", b"x")]),
    "a body for 204": (b"GET", [(b"204", []), (b"D", b"x")]),
}


@pytest.mark.parametrize("case", BROKEN)
async def test_an_answer_that_breaks_http_is_502_and_the_others_go_on(case: str) -> None:
    async with site() as it:
        visitor, other = await it.asks(), await it.asks()
        for kind, what in BROKEN[case]:
            data = said(it.wire, kind, what)
            if len(data) > 16_393:
                payload, flags = data[9:], data[4]
                parts = [payload[start : start + 16_000] for start in range(0, len(payload), 16_000)]
                data = frame(HEADERS, flags & ~END_HEADERS, 1, parts[0]) + b"".join(
                    frame(9, END_HEADERS if part is parts[-1] else 0, 1, part) for part in parts[1:]
                )
            await it.backend.says(data)
        assert visitor.code is ErrorCode.HTTP_PROTOCOL_ERROR
        assert visitor.statuses == []
        assert it.wire.reset(1) in (ErrorCodes.CANCEL, None)
        await it.backend.answers(3, body=b"ok")
        assert other.body == b"ok"
        assert it.origin.counts == NOTHING_LEFT


@pytest.mark.parametrize("case", BROKEN_LATER)
async def test_an_answer_that_goes_wrong_is_cut_and_the_others_go_on(case: str) -> None:
    method, frames = BROKEN_LATER[case]
    async with site() as it:
        visitor, other = await it.asks(request(method)), await it.asks()
        for kind, what in frames:
            await it.backend.says(said(it.wire, kind, what))
        assert visitor.code is ErrorCode.HTTP_PROTOCOL_ERROR
        assert not visitor.ended
        await it.backend.answers(3, body=b"ok")
        assert other.body == b"ok"
        assert it.origin.counts == NOTHING_LEFT


@pytest.mark.parametrize(
    "data",
    [
        frame(DATA, 0, 0, b"x"),
        frame(0x05, END_HEADERS, 1, b"\0\0\0\2\x88"),
        frame(HEADERS, END_HEADERS, 2, b"\x88"),
        frame(HEADERS, END_HEADERS, 1, b"\xff" * 10),
        frame(DATA, 0, 1, b"before its head"),
        b"HTTP/1.1 400 Bad Request\r\n\r\n",
    ],
)
async def test_a_broken_connection_is_502_for_all_that_it_carried(data: bytes) -> None:
    async with site() as it:
        visitors = [await it.asks(request(b"POST")) for _ in range(3)]
        await it.backend.says(data)
        assert [visitor.code for visitor in visitors] == [ErrorCode.HTTP_PROTOCOL_ERROR] * 3
        assert it.wire.goaways
        await turns()
        assert it.origin.counts == (0, 0, 0, 0)


async def test_a_backend_of_http1_is_told_from_one_of_http2() -> None:
    async with site() as it:
        visitor = await it.asks(greet=False)
        await it.backend.says(b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n")
        assert visitor.code is ErrorCode.HTTP_PROTOCOL_ERROR


async def test_an_early_answer_is_whole_and_stops_the_upload() -> None:
    async with site() as it:
        visitor = await it.asks(UPLOAD, Data(b"x"))
        await it.backend.answers(1, body=b"enough")
        assert (visitor.body, visitor.ended) == (b"enough", True)
        assert it.wire.reset(1) == ErrorCodes.CANCEL
        visitor.peer.receive(Data(b"more"))
        assert it.origin.counts == NOTHING_LEFT


async def test_a_reset_with_no_error_after_the_answer_is_no_error() -> None:
    async with site() as it:
        visitor = await it.asks(UPLOAD, Data(b"x"))
        await it.backend.says(
            it.backend.head(1), frame(DATA, END_STREAM, 1, b"enough"), frame(RST_STREAM, 0, 1, bytes(4))
        )
        assert (visitor.body, visitor.ended, visitor.error) == (b"enough", True, None)


@pytest.mark.parametrize("code", [ErrorCodes.INTERNAL_ERROR, ErrorCodes.NO_ERROR, ErrorCodes.CANCEL])
async def test_a_reset_is_502_before_the_head_and_a_cut_after_it(code: ErrorCodes) -> None:
    async with site() as it:
        before, after = await it.asks(), await it.asks()
        await it.backend.says(it.backend.head(3), *[frame(RST_STREAM, 0, n, code.to_bytes(4, "big")) for n in (1, 3)])
        assert before.code is after.code is ErrorCode.CONNECTION_TERMINATED
        assert (before.statuses, after.statuses, after.ended) == ([], [200], False)
        assert it.origin.counts == NOTHING_LEFT


async def test_a_backend_that_wants_http1_is_said_so() -> None:
    async with site() as it:
        visitor = await it.asks()
        await it.backend.says(frame(RST_STREAM, 0, 1, int(ErrorCodes.HTTP_1_1_REQUIRED).to_bytes(4, "big")))
        assert visitor.code is ErrorCode.HTTP_PROTOCOL_ERROR
        assert "HTTP/1.1" in str(visitor.error)


async def test_a_visitor_that_leaves_resets_its_stream_alone() -> None:
    async with site() as it:
        visitor, other = await it.asks(), await it.asks()
        visitor.peer.abort(TunnelError(ErrorCode.CANCELLED))
        await it.meets()
        assert it.wire.reset(1) == ErrorCodes.CANCEL
        await it.backend.answers(3, body=b"ok")
        assert other.body == b"ok"
        assert it.origin.counts == NOTHING_LEFT


# Asking again


@pytest.mark.parametrize("method", [b"GET", b"POST", b"PATCH"])
async def test_a_refused_request_is_asked_again_once_whatever_its_method(method: bytes) -> None:
    async with site() as it:
        head = request(method, [(b"content-length", b"5")], body=True)
        visitor = await it.asks(head, Data(b"hello"), END)
        await it.backend.says(frame(RST_STREAM, 0, 1, REFUSED))
        assert (it.wire.body(3), it.wire.ended(3)) == (b"hello", True)
        await it.backend.answers(3, body=b"ok")
        assert visitor.body == b"ok"
        again = await it.asks(head, Data(b"hello"), END)
        await it.backend.says(frame(RST_STREAM, 0, 5, REFUSED))
        await it.backend.says(frame(RST_STREAM, 0, 7, REFUSED))
        assert again.code is ErrorCode.NOT_ACCEPTED
        assert it.origin.counts == NOTHING_LEFT


async def test_a_refused_request_whose_body_is_gone_is_not_asked_again() -> None:
    async with site({4: 1 << 20}) as it:
        visitor = await it.asks(UPLOAD, Data(bytes(20_000)))
        await it.backend.says(frame(RST_STREAM, 0, 1, REFUSED))
        assert visitor.code is ErrorCode.NOT_ACCEPTED


async def test_a_refused_upload_goes_on_where_it_was() -> None:
    async with site() as it:
        visitor = await it.asks(UPLOAD, Data(b"one "))
        await it.backend.says(frame(RST_STREAM, 0, 1, REFUSED))
        visitor.peer.receive(Data(b"two"))
        visitor.peer.receive(END)
        await it.meets()
        assert (it.wire.body(3), it.wire.ended(3)) == (b"one two", True)


async def test_goaway_moves_what_it_did_not_see_and_finishes_the_rest() -> None:
    async with site() as it:
        seen, unseen = await it.asks(request(b"POST")), await it.asks(request(b"POST"))
        old = it.backend
        await old.says(frame(GOAWAY, 0, 0, (1).to_bytes(4, "big") + bytes(4)))
        await it.meets()
        assert len(it.backends) == 2
        await it.backend.answers(1, body=b"new")
        assert unseen.body == b"new"
        assert not old.socket.closing
        await old.answers(1, body=b"old")
        assert seen.body == b"old"
        assert old.socket.closing
        assert it.origin.counts == NOTHING_LEFT


async def test_an_idle_connection_that_goes_away_is_closed() -> None:
    async with site() as it:
        await it.asks()
        await it.backend.answers(1)
        await it.backend.says(frame(GOAWAY, 0, 0, bytes(8)))
        assert it.backend.socket.closing


@pytest.mark.parametrize(("method", "again"), [(b"GET", True), (b"PUT", True), (b"POST", False), (b"PATCH", False)])
async def test_a_lost_connection_is_made_up_for_only_if_that_is_safe(method: bytes, again: bool) -> None:
    async with site() as it:
        visitor = await it.asks(request(method))
        it.backend.socket.resets()
        await it.meets()
        if again:
            await it.backend.answers(1, body=b"ok")
            assert visitor.body == b"ok"
            other = await it.asks(request(method))
            for _ in range(2):
                it.backend.socket.resets()
                await it.meets()
            assert other.code is ErrorCode.CONNECTION_TERMINATED
        else:
            assert visitor.code is ErrorCode.CONNECTION_TERMINATED


async def test_an_answer_that_has_begun_is_never_asked_again() -> None:
    async with site() as it:
        visitor = await it.asks()
        await it.backend.says(it.backend.head(1))
        it.backend.socket.ends()
        await it.meets()
        assert visitor.code is ErrorCode.CONNECTION_TERMINATED
        assert len(it.backends) == 1


# Room


async def test_one_stream_at_a_time_is_kept_to_and_requests_wait_in_order() -> None:
    """The limit is known from the second request on; more connections are dialled only as it takes."""
    async with site({MAX_STREAMS: 1}) as it:
        first = await it.asks(request(target=b"/0"))
        it.origin.hold = asyncio.Event()  # no second connection
        waiting = [await it.asks(request(target=b"/%d" % number)) for number in range(1, 5)]
        for number, visitor in enumerate([first, *waiting]):
            stream_id = 2 * number + 1
            assert dict(it.wire.heads[stream_id][0])[b":path"] == b"/%d" % number
            assert stream_id + 2 not in it.wire.heads
            await it.backend.answers(stream_id, body=b"%d" % number)
            assert visitor.body == b"%d" % number


async def test_more_requests_than_one_connection_carries_are_spread() -> None:
    async with site({MAX_STREAMS: 2}) as it:
        await it.asks()
        visitors = [await it.asks() for _ in range(6)]
        await it.meets()
        assert len(it.backends) == 4
        assert sum(len(backend.wire.heads) for backend in it.backends) == 7
        assert all(len(backend.wire.heads) <= 2 for backend in it.backends)
        assert [visitor.code for visitor in visitors] == [None] * 6


async def test_a_limit_that_is_lowered_is_kept_to() -> None:
    async with site({MAX_STREAMS: 3}) as it:
        visitors = [await it.asks() for _ in range(3)]
        it.origin.hold = asyncio.Event()
        await it.backend.says(settings_frame({MAX_STREAMS: 1}))
        late = await it.asks()
        for stream_id in (1, 3):
            await it.backend.answers(stream_id)
            assert 7 not in it.wire.heads
        await it.backend.answers(5)
        assert 7 in it.wire.heads
        await it.backend.answers(7, body=b"late")
        assert late.body == b"late"
        assert all(visitor.ended for visitor in visitors)


def test_a_backend_that_allows_no_stream_is_503_in_time() -> None:
    async def scenario() -> None:
        async with site({MAX_STREAMS: 0}, connect_time=5.0) as it:
            visitor = Visitor().ask(it.origin.open(), request())
            await it.meets()
            it.origin.hold = asyncio.Event()
            await it.backend.says(frame(RST_STREAM, 0, 1, REFUSED))
            await visitor.over(limit=60)
            assert visitor.code is ErrorCode.CONNECTION_LIMIT_REACHED
            it.origin.hold.set()

    run(scenario())


async def test_what_waits_is_paused_and_goes_on_with_everything_it_was_given() -> None:
    async with site({MAX_STREAMS: 1}) as it:
        await it.asks()
        it.origin.hold = asyncio.Event()
        visitor = await it.asks(UPLOAD, Data(b"a"), Data(b"b"))
        assert visitor.paused
        await it.backend.answers(1)
        assert not visitor.paused
        assert it.wire.body(3) == b"ab"


async def test_a_visitor_that_leaves_while_it_waits_is_never_sent() -> None:
    async with site({MAX_STREAMS: 1}) as it:
        await it.asks()
        it.origin.hold = asyncio.Event()
        visitor = await it.asks()
        visitor.peer.abort(TunnelError(ErrorCode.CANCELLED))
        await it.backend.answers(1)
        assert 3 not in it.wire.heads


# Dials


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ConnectionRefusedError(errno.ECONNREFUSED, "no"), ErrorCode.CONNECTION_REFUSED),
        (TimeoutError(), ErrorCode.CONNECTION_TIMEOUT),
    ],
)
async def test_a_dial_that_fails_is_told_to_all_that_wait(error: Exception, code: ErrorCode) -> None:
    async with site() as it:
        it.origin.refuse = error
        visitors = [Visitor().ask(it.origin.open(), request()) for _ in range(5)]
        await turns()
        assert [visitor.code for visitor in visitors] == [code] * 5
        it.origin.refuse = None
        assert (await it.asks()).error is None


async def test_a_dial_that_fails_is_told_though_an_old_connection_drains() -> None:
    """A backend that restarts: the old process finishes, the new one does not listen yet."""
    async with site() as it:
        old = await it.asks()
        await it.backend.says(frame(GOAWAY, 0, 0, (1).to_bytes(4, "big") + bytes(4)))
        it.origin.refuse = ConnectionRefusedError(errno.ECONNREFUSED, "no")
        visitor = await it.asks()
        assert visitor.code is ErrorCode.CONNECTION_REFUSED
        await it.backend.answers(1, body=b"old")
        assert old.body == b"old"


@pytest.mark.parametrize(("alpn", "code"), [("h2", None), (None, ErrorCode.HTTP_PROTOCOL_ERROR)])
async def test_tls_must_agree_on_http2(alpn: str | None, code: ErrorCode | None) -> None:
    async with site() as it:
        it.origin.tls = FakeTls.agreed(alpn)
        visitor = await it.asks(greet=False)
        assert visitor.code is code
        assert bool(it.origin.sockets[0].written) == (code is None)


# Time


def test_limits_on_time() -> None:
    async def scenario() -> None:
        async with site(head_time=5.0, body_idle_time=3.0, idle_keep_alive=10.0) as it:
            loop = asyncio.get_running_loop()

            # No head.
            visitor = await it.asks()
            began = loop.time()
            await visitor.over(limit=60)
            assert visitor.code is ErrorCode.HTTP_RESPONSE_TIMEOUT
            assert 5 <= loop.time() - began < 7
            await turns()
            it.backend.hears()
            assert it.wire.reset(1) == ErrorCodes.CANCEL

            # An interim answer starts it anew, and silence within the body ends it.
            visitor = await it.asks()
            began = loop.time()
            await asyncio.sleep(4)
            await it.backend.says(it.backend.head(3, status=103))
            await asyncio.sleep(4)
            await it.backend.says(it.backend.head(3))
            await asyncio.sleep(2)
            await it.backend.says(frame(DATA, 0, 3, b"x"))
            await asyncio.sleep(2)
            assert visitor.error is None
            await visitor.over(limit=60)
            assert visitor.code is ErrorCode.HTTP_RESPONSE_TIMEOUT

            # An upload may take as long as its visitor likes, if the backend takes it.
            visitor = await it.asks(UPLOAD, Data(b"x"))
            await asyncio.sleep(30)
            assert visitor.error is None
            visitor.peer.receive(END)
            await visitor.over(limit=60)
            assert visitor.code is ErrorCode.HTTP_RESPONSE_TIMEOUT

            # An expectation is answered in time.
            visitor = await it.asks(request(b"POST", [(b"expect", b"100-continue")], body=True))
            await visitor.over(limit=60)
            assert visitor.code is ErrorCode.HTTP_RESPONSE_TIMEOUT

            # And who does not take the upload must at least answer.
            visitor = await it.asks(UPLOAD, Data(bytes(100_000)))
            assert visitor.paused
            await visitor.over(limit=60)
            assert visitor.code is ErrorCode.HTTP_RESPONSE_TIMEOUT

            # A connection that carries nothing is closed, having said so.
            socket = it.backend.socket
            await asyncio.sleep(12)
            it.backend.hears()
            assert socket.closing
            assert it.wire.goaways == [(0, 0)]

    run(scenario())


def test_a_backend_that_takes_an_upload_slowly_is_not_late() -> None:
    async def scenario() -> None:
        async with site({4: 1000}, head_time=5.0) as it:
            visitor = await it.asks(UPLOAD)
            visitor.peer.receive(Data(bytes(30_000)))
            for _ in range(12):
                await asyncio.sleep(2)
                await it.backend.says(frame(WINDOW_UPDATE, 0, 1, (1000).to_bytes(4, "big")))
                assert visitor.error is None
            await visitor.over(limit=60)
            assert visitor.code is ErrorCode.HTTP_RESPONSE_TIMEOUT

    run(scenario())


# Pausing


async def test_a_visitor_that_takes_nothing_is_not_granted_for() -> None:
    async with site() as it:
        visitor, other = await it.asks(), await it.asks()
        visitor.peer.pause()
        await it.backend.says(it.backend.head(1), *[frame(DATA, 0, 1, bytes(16_384))] * 16)
        assert WINDOW_UPDATE not in it.wire.kinds(1)
        await it.backend.answers(3, body=b"ok")
        assert other.body == b"ok"
        visitor.peer.resume()
        await it.meets()
        assert WINDOW_UPDATE in it.wire.kinds(1)


async def test_a_pause_before_there_is_a_stream_is_remembered() -> None:
    async with site() as it:
        it.origin.hold = asyncio.Event()
        visitor = await it.asks()
        visitor.peer.pause()
        it.origin.hold.set()
        await it.meets()
        await it.backend.says(it.backend.head(1), *[frame(DATA, 0, 1, bytes(16_384))] * 16)
        assert WINDOW_UPDATE not in it.wire.kinds(1)


async def test_a_backend_that_takes_nothing_pauses_the_visitor() -> None:
    async with site({4: 10}) as it:
        visitor = await it.asks(UPLOAD, Data(b"x" * 100))
        # The window was the default until the backend's SETTINGS came.
        visitor.peer.receive(Data(b"y" * 100_000))
        await it.meets()
        assert visitor.paused
        grant = (1 << 20).to_bytes(4, "big")
        await it.backend.says(frame(WINDOW_UPDATE, 0, 0, grant), frame(WINDOW_UPDATE, 0, 1, grant))
        assert not visitor.paused
        assert len(it.wire.body(1)) == 100_100


async def test_a_socket_that_takes_nothing_pauses_the_visitor() -> None:
    async with site() as it:
        visitor = await it.asks(UPLOAD, Data(b"x"))
        it.backend.socket.protocol.pause_writing()
        visitor.peer.receive(Data(b"y"))
        assert visitor.paused
        it.backend.socket.protocol.resume_writing()
        await it.meets()
        assert not visitor.paused
        assert it.wire.body(1) == b"xy"


# The end


async def test_closing_cuts_what_is_left() -> None:
    it = Site()
    visitor = await it.asks()
    await it.origin.aclose()
    assert visitor.code is ErrorCode.CONNECTION_TERMINATED
    late = Visitor().ask(it.origin.open(), request())
    assert late.code is ErrorCode.NOT_ACCEPTED
    assert it.origin.counts == (0, 0, 0, 0)


async def test_closing_with_grace_lets_what_is_under_way_finish() -> None:
    it = Site()
    visitor = await it.asks()
    closing = asyncio.ensure_future(it.origin.aclose(10.0))
    await turns()
    await it.backend.answers(1, body=b"done")
    await closing
    assert visitor.body == b"done"


async def test_floods_of_a_backend_end_its_connection() -> None:
    async with site() as it:
        visitor = await it.asks(request(b"POST"))
        it.backend.socket.says(*[frame(PING, 0, 0, bytes(8))] * 20_000)  # 10,000 are let pass, and 100 more a second
        await it.meets()
        assert visitor.code is ErrorCode.HTTP_PROTOCOL_ERROR
        assert it.wire.goaways[-1][1] == ErrorCodes.ENHANCE_YOUR_CALM
