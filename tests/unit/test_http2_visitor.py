"""A visitor's HTTP/2 connection against peer legs in memory: what each exchange becomes, and how all of it ends."""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from h2.errors import ErrorCodes

from quictunnel.http.http2_frames import PREFACE
from quictunnel.http.http2_visitor import Http2VisitorConnection
from quictunnel.wire.errors import ErrorCode, TunnelError
from quictunnel.wire.frames import Data, End, Fields, RequestHead, ResponseHead
from tests.support.http2 import (
    DATA,
    END_HEADERS,
    END_STREAM,
    GOAWAY,
    HEADERS,
    PING,
    RST_STREAM,
    SETTINGS,
    WINDOW_UPDATE,
    Wire,
    frame,
    settings_frame,
)
from tests.support.visitors import DATE, Edge, FakeTransport, Peer, edge

SMALL = 256 * 1024
"bytes of a window at its beginning"


class Visit:
    """One visitor's connection: what it says, and what it hears."""

    def __init__(self, site: Edge, *, settings: dict[int, int] | None = None, tls: bool = False) -> None:
        self.site = site
        self.wire = Wire()
        _, self.transport = site.connect(tls=tls, alpn="h2")
        self._heard = 0
        self._say(self.wire.hello(settings))

    def _say(self, data: bytes) -> None:
        assert self.transport.protocol is not None
        self.transport.protocol.data_received(data)  # type: ignore[attr-defined]

    @property
    def connection(self) -> Http2VisitorConnection:
        found = self.transport.protocol
        assert isinstance(found, Http2VisitorConnection)
        return found

    async def says(self, *data: bytes) -> "Visit":
        """Send, and hear what comes of it."""
        for each in data:
            self._say(each)
        return await self.hears()

    async def hears(self) -> "Visit":
        for _ in range(4):
            await asyncio.sleep(0)
        written = self.transport.written
        new, self._heard = written[self._heard :], len(written)
        self.wire.takes(new)
        return self

    async def asks(self, path: bytes = b"/", *extra: tuple[bytes, bytes], **options: Any) -> Peer:
        """A request, and the peer that got it."""
        await self.says(self.wire.get(path, *extra, **options))
        return self.site.peer

    def head(self, stream_id: int = 1) -> Fields:
        return self.wire.heads[stream_id][-1]

    def error(self, stream_id: int = 1) -> str:
        return dict(self.head(stream_id)).get(b"proxy-status", b"").decode()

    @property
    def ended(self) -> bool:
        return self.transport.eof or self.transport.closed


@contextmanager
def visit(*, settings: dict[int, int] | None = None, **limits: Any) -> Iterator[Visit]:
    with edge(**limits) as site:
        yield Visit(site, settings=settings)


def now() -> float:
    return asyncio.get_running_loop().time()


# Requests


async def test_a_request_reaches_the_peer_as_frames() -> None:
    with visit() as it:
        await it.says(
            it.wire.get(
                b"/x?y",
                (b"x-a", b"1"),
                (b"x-tunnel-session", b"app"),
                (b"x-forwarded-for", b"spoof"),
                (b"content_length", b"9"),
                (b"proxy", b"p"),
                (b"te", b"trailers"),
                (b"content-length", b"5"),
                method=b"POST",
                end=False,
                authority=b"App.Example:8080",
            ),
            frame(DATA, 0, 1, b"hel"),
            frame(DATA, END_STREAM, 1, b"lo"),
        )
        [leg] = it.site.legs
        assert it.site.peer.frames == [
            RequestHead(
                b"POST",
                b"http",
                b"App.Example:8080",
                b"/x?y",
                [
                    (b"x-a", b"1"),
                    (b"content-length", b"5"),
                    (b"te", b"trailers"),
                    (b"x-forwarded-for", b"192.0.2.7"),
                    (b"x-forwarded-proto", b"http"),
                    (b"x-forwarded-host", b"App.Example:8080"),
                    (b"forwarded", b'for=192.0.2.7;host="App.Example:8080";proto=http'),
                    (b"via", b"2.0 quictunnel"),
                ],
                True,
            ),
            Data(b"hel"),
            Data(b"lo"),
            End(),
        ]
        assert (leg.tunnel_header, leg.host, leg.version, leg.bytes_in) == (b"app", "app.example", b"2.0", 5)


async def test_the_preface_may_come_in_any_pieces() -> None:
    with edge() as site:
        wire = Wire()
        _, transport = site.connect()
        for byte in wire.hello() + wire.get():
            assert transport.protocol is not None
            transport.protocol.data_received(bytes([byte]))  # type: ignore[attr-defined]
        assert site.peer.head.target == b"/"


async def test_alpn_tells_the_version() -> None:
    with edge() as site:
        it = Visit(site, tls=True)
        peer = await it.asks()
        assert peer.head.scheme == b"https"


async def test_requests_run_side_by_side() -> None:
    with visit() as it:
        one, two = await it.asks(b"/1"), await it.asks(b"/2")
        two.reply(200, b"two")
        await it.hears()
        assert (it.wire.body(3), it.wire.ended(1)) == (b"two", False)
        one.reply(200, b"one")
        await it.hears()
        assert it.wire.body(1) == b"one"
        assert [leg.target for leg in it.site.done] == [b"/2", b"/1"]


async def test_a_body_goes_on_as_it_comes_and_ends_with_its_trailers() -> None:
    with visit() as it:
        peer = await it.asks(method=b"PUT", end=False)
        assert [type(each) for each in peer.frames] == [RequestHead]
        await it.says(frame(DATA, 0, 1, b"a"), it.wire.head([(b"x-sum", b"1"), (b"host", b"evil")], stream_id=1))
        assert peer.frames[1:] == [Data(b"a"), End([(b"x-sum", b"1")])]


@pytest.mark.parametrize(
    "rest",
    [
        [frame(DATA, 0, 1, b"hello!")],
        [frame(DATA, 0, 1, b"hello"), frame(DATA, 0, 1, b"!")],
        [frame(DATA, END_STREAM, 1, b"hell")],
        [frame(DATA, END_STREAM, 1)],
        [frame(DATA, 0, 1, b"hell"), frame(HEADERS, END_HEADERS | END_STREAM, 1, b"\x00\x01x\x01y")],
    ],
    ids=["too long", "too long in pieces", "too short", "nothing", "too short with trailers"],
)
async def test_a_length_that_does_not_add_up_is_the_affair_of_one_request(rest: list[bytes]) -> None:
    with visit() as it:
        peer = await it.asks(b"/", (b"content-length", b"5"), method=b"PUT", end=False)
        other = await it.asks(b"/other")
        await it.says(*rest)
        assert it.wire.status(1) == 400
        assert [error.code for error in peer.errors] == [ErrorCode.BAD_REQUEST]
        assert not peer.ended
        other.reply()
        await it.hears()
        assert it.wire.status(3) == 200
        assert not it.ended


async def test_a_length_that_does_not_add_up_under_an_answer_resets_it() -> None:
    with visit() as it:
        peer = await it.asks(b"/", (b"content-length", b"5"), method=b"PUT", end=False)
        peer.answer(ResponseHead(200, []), Data(b"so far"))
        await it.hears()
        await it.says(frame(DATA, 0, 1, b"hello!"))
        assert not it.wire.ended(1)
        assert it.wire.reset(1) == ErrorCodes.INTERNAL_ERROR
        assert [leg.status for leg in it.site.done] == [200]


@pytest.mark.parametrize(
    ("section", "status"),
    [
        ([(b":method", b"GET")], 400),
        ([(b":method", b"CONNECT"), (b":authority", b"a:1")], 501),
        ([(b":method", b"GET"), (b":scheme", b"http"), (b":authority", b"a"), (b":path", b"/" + b"a" * 9000)], 414),
        (
            [
                (b":method", b"GET"),
                (b":scheme", b"http"),
                (b":authority", b"a"),
                (b":path", b"/"),
                (b"x", b"y" * 70_000),
            ],
            431,
        ),
    ],
)
async def test_a_request_that_is_none_is_answered_and_the_others_go_on(section: Fields, status: int) -> None:
    with visit() as it:
        data = it.wire.head(section)
        if len(data) > 16_384 + 9:  # in the frames that it takes
            payload = data[9:]
            parts = [payload[start : start + 16_384] for start in range(0, len(payload), 16_384)]
            data = frame(HEADERS, END_STREAM, 1, parts[0]) + b"".join(
                frame(9, END_HEADERS if part is parts[-1] else 0, 1, part) for part in parts[1:]
            )
        await it.says(data)
        assert (it.wire.status(1), it.wire.ended(1), it.site.peers) == (status, True, [])
        assert b"quictunnel; error=http_request_error" in dict(it.head())[b"proxy-status"]
        assert [leg.status for leg in it.site.done] == [status]
        (await it.asks()).reply()
        await it.hears()
        assert it.wire.status(3) == 200


async def test_what_follows_a_malformed_part_does_not_destroy_its_answer() -> None:
    with visit() as it:
        peer = await it.asks(b"/", (b"content-length", b"5"), method=b"PUT", end=False)
        it._say(frame(DATA, 0, 1, b"hello!") + frame(DATA, 0, 1, b"more") + frame(DATA, END_STREAM, 1, b"and more"))
        await it.hears()
        assert (it.wire.status(1), it.wire.ended(1), it.wire.reset(1)) == (400, True, None)
        assert len(peer.errors) == 1


async def test_trailers_that_are_malformed_are_400() -> None:
    with visit() as it:
        peer = await it.asks(method=b"PUT", end=False)
        await it.says(it.wire.head([(b"x", b"a\r\nb")], stream_id=1))
        assert it.wire.status(1) == 400
        assert [error.code for error in peer.errors] == [ErrorCode.BAD_REQUEST]


async def test_too_many_requests_that_are_none_end_the_connection() -> None:
    with visit() as it:
        for _ in range(1200):
            if not it.connection._closing:
                await it.says(it.wire.head([(b":method", b"GET")]))
        assert it.wire.goaways[-1][1] == ErrorCodes.ENHANCE_YOUR_CALM
        assert it.ended
        assert 500 < len(it.site.done) < 1200


# Answers


async def test_an_answer_that_is_all_head_is_one_frame() -> None:
    """gRPC tells by it that a call failed at once."""
    with visit() as it:
        peer = await it.asks()
        peer.answer(ResponseHead(200, [DATE, (b"grpc-status", b"12")]), End())
        await it.hears()
        assert it.wire.kinds(1) == [HEADERS]
        assert it.wire.ended(1)
        assert it.head() == [(b":status", b"200"), DATE, (b"grpc-status", b"12")]


async def test_a_head_does_not_wait_for_a_late_body() -> None:
    with visit() as it:
        peer = await it.asks()
        peer.answer(ResponseHead(200, [DATE]))
        await it.hears()
        assert it.wire.kinds(1) == [HEADERS]
        peer.answer(Data(b"x"))
        await it.hears()
        peer.answer(End([(b"grpc-status", b"0"), (b"connection", b"close"), (b"content-length", b"4")]))
        await it.hears()
        assert it.wire.kinds(1) == [HEADERS, DATA, HEADERS]
        assert it.head() == [(b"grpc-status", b"0")]
        assert it.wire.ended(1)


async def test_interim_answers_pass_and_101_does_not() -> None:
    with visit() as it:
        peer = await it.asks(method=b"POST", end=False)
        peer.answer(ResponseHead(100, [(b"content-length", b"0")]), ResponseHead(103, [(b"link", b"x")]))
        await it.hears()
        assert it.wire.heads[1] == [[(b":status", b"100")], [(b":status", b"103"), (b"link", b"x")]]
        peer.answer(ResponseHead(101, [(b"upgrade", b"x")]))
        await it.hears()
        assert (it.wire.status(1), it.wire.ended(1)) == (502, True)
        assert [error.code for error in peer.errors] == [ErrorCode.HTTP_PROTOCOL_ERROR]


@pytest.mark.parametrize(
    ("method", "status", "fields", "expected"),
    [
        (b"HEAD", 200, [(b"content-length", b"9")], [(b"content-length", b"9")]),
        (b"HEAD", 200, [], []),
        (b"GET", 204, [(b"content-length", b"0")], []),
        (b"GET", 304, [(b"content-length", b"9")], [(b"content-length", b"9")]),
        (b"GET", 205, [(b"content-length", b"9")], [(b"content-length", b"0")]),
        (b"GET", 200, [(b"connection", b"x"), (b"x", b"1"), (b"transfer-encoding", b"chunked")], []),
    ],
)
async def test_answers_without_a_body(method: bytes, status: int, fields: Fields, expected: Fields) -> None:
    with visit() as it:
        peer = await it.asks(method=method)
        peer.answer(ResponseHead(status, [DATE, *fields]), End())
        await it.hears()
        assert it.head() == [(b":status", b"%d" % status), DATE, *expected]
        assert it.wire.kinds(1) == [HEADERS]
        assert it.wire.ended(1)


async def test_an_answer_without_a_date_gets_one() -> None:
    with visit() as it:
        (await it.asks()).answer(ResponseHead(200, []), End())
        await it.hears()
        assert b"date" in dict(it.head())


WRONG: dict[str, list[Any]] = {
    "body for 204": [ResponseHead(204, []), Data(b"x")],
    "too long": [ResponseHead(200, [(b"content-length", b"1")]), Data(b"xy")],
    "too short": [ResponseHead(200, [(b"content-length", b"3")]), End()],
    "two lengths": [ResponseHead(200, [(b"content-length", b"1"), (b"content-length", b"1")])],
    "line end in a field": [ResponseHead(200, [(b"x", b"a\r\nb")])],
    "upper-case name": [ResponseHead(200, [(b"X", b"a")])],
    "data before a head": [Data(b"x")],
    "end before a head": [End()],
    "second head": [ResponseHead(200, []), ResponseHead(200, [])],
}


@pytest.mark.parametrize("case", WRONG)
async def test_an_answer_that_is_wrong_at_once_is_502(case: str) -> None:
    with visit() as it:
        peer = await it.asks()
        for each in WRONG[case]:
            if it.site.legs[0].peer is peer:
                peer.peer.receive(each)
        await it.hears()
        if case == "too long":
            # The head went with the first piece that fitted, or with none.
            assert it.wire.reset(1) is not None or it.wire.status(1) == 502
        else:
            assert (it.wire.status(1), it.wire.ended(1)) == (502, True)
        assert [error.code for error in peer.errors] == [ErrorCode.HTTP_PROTOCOL_ERROR]
        assert len(it.site.done) == 1


async def test_an_answer_that_goes_wrong_later_is_reset_and_never_ended() -> None:
    for last in (End(), Data(b"xyz"), End([(b"x", b"\n")])):
        with visit() as it:
            peer = await it.asks()
            length = [] if isinstance(last, End) and last.trailers else [(b"content-length", b"3")]
            peer.answer(ResponseHead(200, length), Data(b"x"))
            await it.hears()
            peer.answer(last)
            await it.hears()
            assert not it.wire.ended(1)
            assert it.wire.reset(1) == ErrorCodes.INTERNAL_ERROR
            assert not it.ended


async def test_a_failure_before_the_head_is_an_answer_and_after_it_a_reset() -> None:
    error = TunnelError(ErrorCode.CONNECTION_REFUSED)
    with visit() as it:
        first, second, third = await it.asks(), await it.asks(), await it.asks(method=b"HEAD")
        second.answer(ResponseHead(200, []), Data(b"x"))
        await it.hears()
        for peer in (first, second, third):
            peer.peer.abort(error)
            peer.detach()
        await it.hears()
        assert (it.wire.status(1), it.wire.ended(1)) == (502, True)
        assert it.error() == 'quictunnel; error=connection_refused; details="The backend refused the connection."'
        assert it.wire.body(1)
        assert (it.wire.reset(3), it.wire.ended(3)) == (ErrorCodes.INTERNAL_ERROR, False)
        assert (it.wire.kinds(5), it.wire.ended(5)) == ([HEADERS], True)
        assert it.site.listener.in_flight == 0


async def test_an_error_replaces_a_head_that_has_not_gone_out() -> None:
    with visit() as it:
        peer = await it.asks()
        peer.answer(ResponseHead(200, []))
        peer.peer.abort(TunnelError(ErrorCode.CONNECTION_TERMINATED))
        await it.hears()
        assert [dict(fields)[b":status"] for fields in it.wire.heads[1]] == [b"502"]


async def test_a_refusal_at_once_is_an_answer() -> None:
    with visit() as it:
        it.site.refusal = TunnelError(ErrorCode.DESTINATION_NOT_FOUND)
        await it.says(it.wire.get())
        assert (it.wire.status(1), it.wire.ended(1)) == (404, True)


async def test_an_early_answer_is_complete_and_the_upload_is_refused_without_blame() -> None:
    with visit() as it:
        peer = await it.asks(method=b"PUT", end=False)
        peer.reply(200, b"enough")
        await it.hears()
        assert (it.wire.body(1), it.wire.ended(1)) == (b"enough", True)
        assert it.wire.reset(1) == ErrorCodes.NO_ERROR
        await it.says(*[frame(DATA, 0, 1, bytes(16_384))] * 20)
        assert len([seen for seen in it.wire.of(1) if seen.kind == RST_STREAM]) == 1
        assert not it.ended


async def test_a_visitors_reset_reaches_the_peer_at_once() -> None:
    with visit() as it:
        peer = await it.asks()
        other = await it.asks()
        await it.says(frame(RST_STREAM, 0, 1, (8).to_bytes(4, "big")))
        assert [error.code for error in peer.errors] == [ErrorCode.CANCELLED]
        assert other.errors == []
        assert [(leg.status, leg.error and leg.error.code) for leg in it.site.done] == [(0, ErrorCode.CANCELLED)]


async def test_a_visitor_that_goes_away_takes_everything_with_it() -> None:
    with visit() as it:
        peers = [await it.asks(), await it.asks(method=b"PUT", end=False)]
        it.transport.abort()
        await it.hears()
        assert [[error.code for error in peer.errors] for peer in peers] == [[ErrorCode.CANCELLED]] * 2
        assert (len(it.site.listener), it.site.listener.in_flight) == (0, 0)


# Back-pressure


async def test_pieces_of_one_turn_share_a_frame_and_the_last_one_ends_the_stream() -> None:
    with visit() as it:
        peer = await it.asks()
        peer.answer(ResponseHead(200, []), *[Data(b"piece ")] * 10, End())
        await it.hears()
        assert [(seen.kind, seen.ends) for seen in it.wire.of(1)] == [(HEADERS, False), (DATA, True)]
        assert it.wire.body(1) == b"piece " * 10


async def test_what_the_visitor_does_not_take_pauses_the_peer() -> None:
    with visit() as it:
        peer = await it.asks()
        peer.answer(ResponseHead(200, []), Data(bytes(100_000)))
        await it.hears()
        assert peer.paused
        assert len(it.wire.body(1)) == 65_535
        grant = (100_000).to_bytes(4, "big")
        await it.says(frame(WINDOW_UPDATE, 0, 0, grant), frame(WINDOW_UPDATE, 0, 1, grant))
        assert not peer.paused
        assert len(it.wire.body(1)) == 100_000


async def test_what_the_peer_does_not_take_is_not_granted() -> None:
    with visit() as it:
        peer = await it.asks(method=b"PUT", end=False)
        peer.peer.pause()
        await it.says(*[frame(DATA, 0, 1, bytes(16_384))] * 16)
        assert not [seen for seen in it.wire.of(1) if seen.kind == WINDOW_UPDATE]
        peer.peer.resume()
        await it.hears()
        assert [seen.payload for seen in it.wire.of(1) if seen.kind == WINDOW_UPDATE] == [SMALL.to_bytes(4, "big")]


async def test_who_takes_no_answers_may_not_go_on_asking() -> None:
    with visit() as it:
        peer = await it.asks()
        it.connection.pause_writing()
        assert not it.transport.reading
        peer.reply(200, b"x")
        await it.hears()
        assert it.wire.body(1) == b""
        it.connection.resume_writing()
        await it.hears()
        assert it.transport.reading
        assert it.wire.body(1) == b"x"


# Limits


async def test_a_visitor_that_takes_nothing_is_ended() -> None:
    with visit(write_idle_time=10) as it:
        peer = await it.asks()
        it.transport.buffered = 1000
        it.connection.pause_writing()
        it.connection.expire(now() + 11)
        assert it.transport.aborted
        await it.hears()
        assert [error.code for error in peer.errors] == [ErrorCode.CANCELLED]


async def test_a_visitor_that_takes_slowly_is_not_taken_for_gone() -> None:
    """While it is waited for nothing is read, and its silence is ours."""
    with visit(write_idle_time=1000, idle_time=10) as it:
        await it.asks()
        it.transport.buffered = 1000
        it.connection.pause_writing()
        for after in range(0, 200, 5):
            it.connection.expire(now() + after)
        assert not it.transport.closed
        it.transport.buffered = 0
        it.connection.resume_writing()
        it.connection.expire(now() + 1)
        await it.hears()
        assert not it.transport.closed


async def test_an_answer_for_which_no_window_is_granted_is_ended_and_the_others_go_on() -> None:
    with visit(settings={4: 0}, write_idle_time=10) as it:
        stuck, other = await it.asks(), await it.asks()
        stuck.answer(ResponseHead(200, []), Data(b"x" * 100))
        await it.hears()
        it.connection.expire(now() + 9)
        assert stuck.errors == []
        it.connection.expire(now() + 11)
        await it.hears()
        assert [error.code for error in stuck.errors] == [ErrorCode.CANCELLED]
        assert it.wire.reset(1) == ErrorCodes.CANCEL
        assert other.errors == []
        assert not it.ended


async def test_an_upload_that_stops_is_408() -> None:
    with visit(body_idle_time=10) as it:
        peer = await it.asks(method=b"PUT", end=False)
        it.connection.expire(now() + 9)
        assert peer.errors == []
        it.connection.expire(now() + 11)
        await it.hears()
        assert (it.wire.status(1), it.wire.reset(1)) == (408, ErrorCodes.NO_ERROR)
        assert [error.code for error in peer.errors] == [ErrorCode.REQUEST_TIMEOUT]


async def test_uploads_that_are_held_back_or_answered_or_calls_have_no_such_limit() -> None:
    with visit(body_idle_time=10) as it:
        held = await it.asks(method=b"PUT", end=False)
        held.peer.pause()
        answered = await it.asks(method=b"PUT", end=False)
        answered.answer(ResponseHead(200, []))
        call = await it.asks(b"/", (b"content-type", b"application/grpc+proto"), method=b"POST", end=False)
        it.connection.expire(now() + 50)
        assert held.errors == answered.errors == call.errors == []
        held.peer.resume()
        it.connection.expire(now() + 50)
        assert [error.code for error in held.errors] == [ErrorCode.REQUEST_TIMEOUT]


async def test_a_visitor_that_goes_without_a_word_is_asked_and_then_ended() -> None:
    with visit(idle_time=10) as it:
        peer = await it.asks()
        it.connection.expire(now() + 11)
        await it.hears()
        assert PING in it.wire.kinds(0)
        it.connection.expire(now() + 29)
        assert not it.transport.closed
        await it.says(frame(PING, 1, 0, b"quictunl"))
        it.connection.expire(now() + 5)
        it.connection.expire(now() + 11)
        it.connection.expire(now() + 31)
        assert it.transport.aborted
        await it.hears()
        assert peer.errors


async def test_an_idle_connection_is_told_to_go_and_closed() -> None:
    with visit(idle_time=10) as it:
        await it.hears()
        assert it.connection.deadline == pytest.approx(now() + 10, abs=1)
        it.connection.expire(now() + 11)
        await it.hears()
        assert it.wire.goaways == [(0, 0)]
        assert it.transport.eof
        it.connection.expire(now() + 3)
        assert it.transport.aborted


async def test_half_a_frame_has_the_time_of_a_head() -> None:
    with visit(head_time=5, idle_time=100) as it:
        (await it.asks()).reply()
        await it.says(frame(PING, 0, 0, bytes(8))[:12])
        assert it.connection.deadline <= now() + 5
        await it.says(b"\0")  # a byte at a time gains nothing
        assert it.connection.deadline <= now() + 5
        it.connection.expire(now() + 6)
        await it.hears()
        assert it.wire.goaways[-1][1] == ErrorCodes.ENHANCE_YOUR_CALM
        assert it.ended


async def test_half_a_frame_at_the_end_of_an_exchange_has_its_time_too() -> None:
    """The rest of an upload that was answered early may be on its way."""
    with visit(head_time=5, idle_time=100) as it:
        peer = await it.asks(method=b"PUT", end=False)
        await it.says(frame(DATA, 0, 1, bytes(100))[:50])
        assert it.connection.deadline <= now()
        peer.reply()
        await it.hears()
        assert now() + 4 < it.connection.deadline <= now() + 5


async def test_a_preface_that_does_not_come_has_the_time_of_a_head() -> None:
    with edge(head_time=5) as site:
        _, transport = site.connect(tls=True, alpn="h2")
        found = transport.protocol
        assert isinstance(found, Http2VisitorConnection)
        found.data_received(PREFACE[:3])
        assert found.deadline <= now() + 5
        found.expire(now() + 6)
        await asyncio.sleep(0)
        assert transport.closed


async def test_one_connection_too_many_is_closed() -> None:
    with edge(connections=1) as site:
        one = Visit(site)
        await one.asks()
        _, transport = site.connect()
        assert transport.eof or transport.closed
        assert not one.ended


# The end


LAST = 2**31 - 1
"the stream that a first GOAWAY names: none is refused yet"


async def test_a_drained_connection_finishes_what_is_under_way_and_refuses_the_rest() -> None:
    with visit() as it:
        peer = await it.asks()
        upload = await it.asks(method=b"PUT", end=False)
        it.site.listener.drain()
        await it.hears()
        assert it.wire.goaways == [(LAST, 0)]
        await it.says(it.wire.pongs())
        assert it.wire.goaways == [(LAST, 0), (3, 0)]
        assert not it.ended
        await it.says(it.wire.get())
        assert it.wire.reset(5) == ErrorCodes.REFUSED_STREAM
        assert len(it.site.peers) == 2
        peer.reply(200, b"done")
        await it.says(frame(DATA, END_STREAM, 3, b"all"))
        assert (it.wire.body(1), it.ended) == (b"done", False)
        upload.reply(200, b"done too")
        await it.hears()
        assert (it.wire.body(3), it.transport.eof) == (b"done too", True)
        assert upload.body == b"all"


async def test_a_request_that_crosses_the_goaway_is_answered() -> None:
    with visit() as it:
        await it.hears()
        it.site.listener.drain()
        # It was sent before the visitor could know: before it answers the ping behind the first GOAWAY.
        peer = await it.asks()
        await it.hears()
        await it.says(it.wire.pongs())
        assert it.wire.goaways == [(LAST, 0), (1, 0)]
        assert not it.ended
        peer.reply(200, b"done")
        await it.hears()
        assert (it.wire.body(1), it.transport.eof) == (b"done", True)


async def test_a_visitor_that_does_not_answer_the_last_call_is_left_after_two_seconds() -> None:
    with visit() as it:
        peer = await it.asks()
        it.site.listener.drain()
        await it.hears()
        began = now()
        it.connection.expire(began + 1)
        await it.hears()
        assert it.wire.goaways == [(LAST, 0)]
        it.connection.expire(began + 2.1)
        await it.hears()
        assert it.wire.goaways == [(LAST, 0), (1, 0)]
        assert not it.ended
        peer.reply()
        await it.hears()
        assert it.ended


async def test_what_waits_for_a_slow_visitor_is_not_destroyed_by_the_end() -> None:
    with visit() as it:
        peer = await it.asks()
        it.site.listener.drain()
        peer.reply(200, b"x" * 1000)
        await it.hears()
        await it.says(it.wire.pongs())
        it.transport.buffered = 500
        assert it.transport.eof
        it.connection.expire(now() + 10)
        assert not it.transport.aborted
        it.transport.buffered = 0
        it.connection.expire(now() + 11)
        assert it.transport.aborted


async def test_an_idle_connection_is_closed_by_the_drain_as_soon_as_its_visitor_knows() -> None:
    with visit() as it:
        await it.hears()
        it.site.listener.drain()
        await it.hears()
        assert (it.wire.goaways, it.ended) == ([(LAST, 0)], False)
        await it.says(it.wire.pongs())
        assert (it.wire.goaways, it.transport.eof) == ([(LAST, 0), (0, 0)], True)


async def test_a_connection_that_comes_while_the_server_stops_may_ask_once() -> None:
    with edge() as site:
        site.listener.drain()
        it = Visit(site)
        await it.hears()
        assert (it.wire.goaways, it.ended) == ([], False)
        peer = await it.asks()
        assert it.wire.goaways == [(LAST, 0)]
        await it.says(it.wire.pongs())
        peer.reply(200, b"once")
        await it.hears()
        assert (it.wire.body(1), it.transport.eof) == (b"once", True)
        silent = Visit(site)
        await silent.hears()
        silent.connection.expire(now() + 2.1)
        await silent.hears()
        assert silent.ended


async def test_late_streams_are_refused_only_so_often() -> None:
    with visit() as it:
        await it.asks()
        it.connection.drain()
        await it.hears()
        await it.says(it.wire.pongs())
        for _ in range(1100):
            if not it.connection._closing:
                it._say(it.wire.get())
        await it.hears()
        assert it.wire.goaways[-1][1] == ErrorCodes.ENHANCE_YOUR_CALM
        assert it.ended


async def test_a_visitor_that_says_goaway_gets_its_answers() -> None:
    with visit() as it:
        peer = await it.asks()
        await it.says(frame(GOAWAY, 0, 0, bytes(8)))
        peer.reply(200, b"x")
        await it.hears()
        assert (it.wire.body(1), it.transport.eof) == (b"x", True)


async def test_a_broken_connection_ends_every_exchange_and_says_why() -> None:
    with visit() as it:
        peers = [await it.asks() for _ in range(3)]
        peers[0].answer(ResponseHead(200, []), Data(bytes(200_000)))  # held: the window is smaller
        peers[1].answer(ResponseHead(200, []))
        await it.says(frame(DATA, 0, 0, b"x"))
        assert [[error.code for error in peer.errors] for peer in peers] == [[ErrorCode.CANCELLED]] * 3
        assert it.wire.goaways == [(5, ErrorCodes.PROTOCOL_ERROR)]
        assert it.ended
        await it.says(it.wire.get())
        assert len(it.site.peers) == 3
        it.connection.expire(now() + 3)
        await it.hears()
        assert len(it.site.listener) == 0


async def test_more_answers_than_a_turn_carries_survive_a_broken_frame() -> None:
    with visit(settings={4: 2**20}) as it:
        await it.says(frame(WINDOW_UPDATE, 0, 0, (2**20).to_bytes(4, "big")))
        peer = await it.asks()
        peer.answer(ResponseHead(200, []), Data(bytes(300_000)))
        await asyncio.sleep(0)  # one turn: some of it has gone, and the window is open for the rest
        await it.says(frame(DATA, 0, 0, b"x"))
        assert it.wire.goaways == [(1, ErrorCodes.PROTOCOL_ERROR)]


async def test_settings_and_pings_alone_do_not_keep_a_connection() -> None:
    with visit(idle_time=10) as it:
        await it.hears()
        before = it.connection.deadline
        for _ in range(5):
            await it.says(frame(PING, 0, 0, bytes(8)), settings_frame({4: 1000}), frame(SETTINGS, 1))
        assert it.connection.deadline == before
        assert isinstance(it.transport, FakeTransport)
