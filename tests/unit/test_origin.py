"""The HTTP/1.1 backend in memory: what it is sent, what its answers become, and what is left behind."""

import asyncio
import errno
import socket
import ssl
import sys
from collections.abc import Awaitable, Callable
from itertools import pairwise

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from quictunnel.http.limits import OriginLimits
from quictunnel.http.origin_answer import AnswerParser
from quictunnel.wire.errors import ErrorCode, TunnelError
from quictunnel.wire.frames import Data, End, Fields, Frame, RequestHead, ResponseHead
from tests.support.backend import END, MemoryDialler, MemoryOrigin, Visitor, request, turns
from tests.support.clock import run

OK = b"HTTP/1.1 200 OK\r\n"
HELLO = OK + b"Content-Length: 5\r\n\r\nhello"
CHUNKED = OK + b"Transfer-Encoding: chunked\r\n\r\n"
SWITCH = b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\r\n"
HANDSHAKE = request(protocol=b"websocket", body=True)
POST = request(b"POST", [(b"content-length", b"5")], body=True)
UPLOAD = request(b"POST", body=True)

NOTHING_LEFT = (0, 0, 0, 0)
ONE_KEPT = (0, 1, 1, 0)


async def asked(origin: MemoryOrigin, head: RequestHead | None = None, *rest: Frame) -> Visitor:
    """A visitor whose request is at the backend."""
    visitor = Visitor().ask(origin.open(), head or request(), *rest)
    await turns()
    return visitor


async def answered(origin: MemoryOrigin, answer: bytes = HELLO) -> Visitor:
    """A visitor whose request was answered."""
    visitor = await asked(origin)
    origin.socket.says(answer)
    await turns()
    return visitor


# What a backend gets


def lines(*more: bytes, start: bytes = b"GET / HTTP/1.1") -> bytes:
    return b"\r\n".join([start, b"Host: app.example", *more, b"", b""])


REQUESTS: dict[str, tuple[RequestHead, list[Frame], bytes]] = {
    "no body": (request(), [END], lines()),
    "fields as they are": (
        request(fields=[(b"x", b"a\tb  c"), (b"cookie", b"1"), (b"cookie", b"2"), (b"y", b"\xff")]),
        [END],
        lines(b"x: a\tb  c", b"cookie: 1", b"cookie: 2", b"y: \xff"),
    ),
    "target byte-exact": (
        request(target=b"//a/../b/%2e;x?y=/../%zz&"),
        [END],
        lines(start=b"GET //a/../b/%2e;x?y=/../%zz& HTTP/1.1"),
    ),
    "asterisk-form": (request(b"OPTIONS", target=b"*"), [END], lines(start=b"OPTIONS * HTTP/1.1")),
    "method byte-exact": (request(b"pAtCh"), [END], lines(start=b"pAtCh / HTTP/1.1")),
    "no host": (request(authority=b""), [END], b"GET / HTTP/1.1\r\nHost: backend.example\r\n\r\n"),
    "a length of 0 without a body": (
        request(b"POST", [(b"content-length", b"0")]),
        [END],
        lines(b"content-length: 0", start=b"POST / HTTP/1.1"),
    ),
    "a body with its length": (
        POST,
        [Data(b"hel"), Data(b"lo"), END],
        lines(b"content-length: 5", start=b"POST / HTTP/1.1") + b"hello",
    ),
    "an empty body with its length": (
        request(b"PUT", [(b"content-length", b"0")], body=True),
        [END],
        lines(b"content-length: 0", start=b"PUT / HTTP/1.1"),
    ),
    "a body without a length": (
        UPLOAD,
        [Data(b"hello"), Data(b"x" * 17), END],
        lines(b"Transfer-Encoding: chunked", start=b"POST / HTTP/1.1")
        + b"5\r\nhello\r\n11\r\n"
        + b"x" * 17
        + b"\r\n0\r\n\r\n",
    ),
    "an empty body without a length": (
        UPLOAD,
        [END],
        lines(b"Transfer-Encoding: chunked", start=b"POST / HTTP/1.1") + b"0\r\n\r\n",
    ),
    "trailers": (
        UPLOAD,
        [Data(b"a"), End([(b"x-sum", b"1"), (b"content-length", b"9"), (b"host", b"evil")])],
        lines(b"Transfer-Encoding: chunked", start=b"POST / HTTP/1.1") + b"1\r\na\r\n0\r\nx-sum: 1\r\n\r\n",
    ),
    "te: trailers": (request(fields=[(b"te", b"trailers")]), [END], lines(b"te: trailers", b"Connection: TE")),
    "hop-by-hop fields": (
        request(fields=[(b"connection", b"x-hop"), (b"x-hop", b"1"), (b"transfer-encoding", b"gzip"), (b"a", b"b")]),
        [END],
        lines(b"a: b"),
    ),
    "upgrade": (HANDSHAKE, [], lines(b"Connection: Upgrade", b"Upgrade: websocket")),
    "expectation": (
        request(b"POST", [(b"expect", b"100-continue")], body=True),
        [],
        lines(b"expect: 100-continue", b"Transfer-Encoding: chunked", start=b"POST / HTTP/1.1"),
    ),
}


@pytest.mark.parametrize("case", REQUESTS)
async def test_request_reaches_the_backend_as(case: str) -> None:
    head, rest, expected = REQUESTS[case]
    origin = MemoryOrigin()
    visitor = await asked(origin, head, *rest)
    assert visitor.error is None
    assert origin.socket.written == expected
    await origin.aclose()


@pytest.mark.parametrize("case", REQUESTS)
async def test_request_is_the_same_on_a_kept_connection(case: str) -> None:
    head, rest, expected = REQUESTS[case]
    origin = MemoryOrigin()
    await answered(origin)
    origin.socket.writes.clear()
    await asked(origin, head, *rest)
    assert origin.socket.written == expected
    assert len(origin.sockets) == 1
    await origin.aclose()


MALFORMED: dict[str, tuple[RequestHead, list[Frame]]] = {
    "line end in a value": (request(fields=[(b"a", b"b\r\nGET / HTTP/1.1")]), []),
    "NUL in a value": (request(fields=[(b"a", b"\0")]), []),
    "colon in a name": (request(fields=[(b"transfer-encoding: chunked\r\nx", b"1")]), []),
    "empty name": (request(fields=[(b"", b"1")]), []),
    "second host": (request(fields=[(b"host", b"evil")]), []),
    "space in the target": (request(target=b"/ HTTP/1.1\r\nA: b\r\n"), []),
    "empty target": (request(target=b""), []),
    "line end in the method": (request(b"GET / HTTP/1.1\r\n\r\nGET"), []),
    "line end in the authority": (request(authority=b"a\r\nb: c"), []),
    "line end in the protocol": (request(protocol=b"a\r\nb: c", body=True), []),
    "h2c": (request(protocol=b"websocket, H2C", body=True), []),
    "h2c with a version": (request(protocol=b"h2c/2", body=True), []),
    "something like h2c": (request(protocol=b'"h2c"', body=True), []),
    "no protocol in a list of them": (request(protocol=b" ,", body=True), []),
    "two lengths": (request(b"POST", [(b"content-length", b"1"), (b"content-length", b"1")], body=True), []),
    "bad length": (request(b"POST", [(b"content-length", b"+1")], body=True), []),
    "length without a body": (request(b"POST", [(b"content-length", b"1")]), []),
    "body too long": (POST, [Data(b"hello!")]),
    "body too long in pieces": (POST, [Data(b"hello"), Data(b"!")]),
    "body too short": (POST, [Data(b"hell"), END]),
    "line end in a trailer": (UPLOAD, [Data(b"a"), End([(b"a", b"b\r\n\r\nGET")])]),
}


@pytest.mark.parametrize("kept", [False, True], ids=["fresh", "kept"])
@pytest.mark.parametrize("case", MALFORMED)
async def test_malformed_request_is_refused(case: str, kept: bool) -> None:
    head, rest = MALFORMED[case]
    origin = MemoryOrigin()
    if kept:
        await answered(origin)
        origin.socket.writes.clear()
    visitor = await asked(origin, head, *rest)
    assert visitor.code is ErrorCode.BAD_REQUEST
    assert origin.in_flight == 0
    if origin.sockets and origin.socket.writes:
        assert origin.socket.aborted, "what was sent must not look complete"
        assert not origin.socket.written.endswith(b"0\r\n\r\n")
    await origin.aclose()


async def test_head_and_first_bytes_of_the_body_leave_in_one_packet() -> None:
    origin = MemoryOrigin()
    await asked(origin, POST, Data(b"hello"), END)
    await asked(origin, UPLOAD, Data(b"hello"), END)
    assert [len(each.writes) for each in origin.sockets] == [1, 2]
    await origin.aclose()


async def test_head_does_not_wait_for_a_late_body() -> None:
    origin = MemoryOrigin()
    visitor = await asked(origin, POST)
    assert origin.socket.written.endswith(b"\r\n\r\n")
    visitor.peer.receive(Data(b"hello"))
    assert origin.socket.written.endswith(b"hello")
    await origin.aclose()


# What its answers become

ANSWERS: dict[str, tuple[bytes, bytes, list[Frame], bool]] = {
    # name: method, answer, frames, connection kept
    "length": (b"GET", HELLO, [ResponseHead(200, [(b"content-length", b"5")]), Data(b"hello"), END], True),
    "length of 0": (
        b"GET",
        OK + b"Content-Length: 0\r\n\r\n",
        [ResponseHead(200, [(b"content-length", b"0")]), END],
        True,
    ),
    "chunks": (
        b"GET",
        CHUNKED + b"5\r\nhello\r\n1;x=y\r\n!\r\n0\r\n\r\n",
        [ResponseHead(200, []), Data(b"hello!"), END],
        True,
    ),
    "no chunks": (b"GET", CHUNKED + b"0\r\n\r\n", [ResponseHead(200, []), END], True),
    "trailers": (
        b"GET",
        CHUNKED + b"1\r\na\r\n0\r\nGrpc-Status: 0\r\nX:  y \r\nHost: evil\r\nTransfer-Encoding: chunked\r\n\r\n",
        [ResponseHead(200, []), Data(b"a"), End([(b"grpc-status", b"0"), (b"x", b"y")])],
        True,
    ),
    "chunked in capitals": (
        b"GET",
        OK + b"Transfer-Encoding: Chunked\r\n\r\n0\r\n\r\n",
        [ResponseHead(200, []), END],
        True,
    ),
    "until the end": (b"GET", OK + b"\r\nhello", [ResponseHead(200, []), Data(b"hello"), END], False),
    "until the end, nothing": (b"GET", OK + b"\r\n", [ResponseHead(200, []), END], False),
    "HTTP/1.0": (b"GET", b"HTTP/1.0 200 OK\r\n\r\nhello", [ResponseHead(200, []), Data(b"hello"), END], False),
    "HTTP/1.0 with a length": (
        b"GET",
        b"HTTP/1.0 200 OK\r\nContent-Length: 1\r\n\r\na",
        [ResponseHead(200, [(b"content-length", b"1")]), Data(b"a"), END],
        False,
    ),
    "HTTP/1.0 that stays": (
        b"GET",
        b"HTTP/1.0 200 OK\r\nConnection: keep-alive\r\nContent-Length: 1\r\n\r\na",
        [ResponseHead(200, [(b"content-length", b"1")]), Data(b"a"), END],
        True,
    ),
    "close": (
        b"GET",
        OK + b"Connection: close\r\nContent-Length: 1\r\n\r\na",
        [ResponseHead(200, [(b"content-length", b"1")]), Data(b"a"), END],
        False,
    ),
    "fields": (
        b"GET",
        OK + b"Set-Cookie: a\r\nX:\r\nSET-COOKIE: \tb \t\r\nY: \xff\r\nContent-Length: 0\r\n\r\n",
        [
            ResponseHead(
                200,
                [(b"set-cookie", b"a"), (b"x", b""), (b"set-cookie", b"b"), (b"y", b"\xff"), (b"content-length", b"0")],
            ),
            END,
        ],
        True,
    ),
    "hop-by-hop": (
        b"GET",
        OK + b"Connection: keep-alive, X\r\nKeep-Alive: timeout=5\r\nX: 1\r\nUpgrade: h2c\r\nContent-Length: 0\r\n\r\n",
        [ResponseHead(200, [(b"content-length", b"0")]), END],
        True,
    ),
    "no reason": (
        b"GET",
        b"HTTP/1.1 200\r\nContent-Length: 0\r\n\r\n",
        [ResponseHead(200, [(b"content-length", b"0")]), END],
        True,
    ),
    "unknown status": (
        b"GET",
        b"HTTP/1.1 799 ?\r\nContent-Length: 0\r\n\r\n",
        [ResponseHead(799, [(b"content-length", b"0")]), END],
        True,
    ),
    "204": (b"GET", b"HTTP/1.1 204 No Content\r\n\r\n", [ResponseHead(204, []), END], True),
    "204 with a length": (
        b"GET",
        b"HTTP/1.1 204 No Content\r\nContent-Length: 0\r\n\r\n",
        [ResponseHead(204, []), END],
        True,
    ),
    "304 with the length it would have": (
        b"GET",
        b"HTTP/1.1 304 Not Modified\r\nContent-Length: 500\r\n\r\n",
        [ResponseHead(304, [(b"content-length", b"500")]), END],
        True,
    ),
    "205": (
        b"GET",
        b"HTTP/1.1 205 Reset\r\nContent-Length: 0\r\n\r\n",
        [ResponseHead(205, [(b"content-length", b"0")]), END],
        True,
    ),
    "HEAD with a length": (
        b"HEAD",
        OK + b"Content-Length: 500\r\n\r\n",
        [ResponseHead(200, [(b"content-length", b"500")]), END],
        True,
    ),
    "HEAD with chunked": (b"HEAD", CHUNKED, [ResponseHead(200, []), END], True),
    "HEAD with neither": (b"HEAD", OK + b"\r\n", [ResponseHead(200, []), END], True),
    "HEAD and close": (b"HEAD", OK + b"Connection: Close\r\n\r\n", [ResponseHead(200, []), END], False),
    "HEAD in HTTP/1.0": (b"HEAD", b"HTTP/1.0 200 OK\r\n\r\n", [ResponseHead(200, []), END], False),
    "100 and 103": (
        b"GET",
        b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\nLink: </a>\r\nContent-Length: 3\r\n\r\n" + HELLO,
        [
            ResponseHead(100, []),
            ResponseHead(103, [(b"link", b"</a>")]),
            ResponseHead(200, [(b"content-length", b"5")]),
            Data(b"hello"),
            END,
        ],
        True,
    ),
    "an interim status of its own": (
        b"GET",
        b"HTTP/1.1 199 Mine\r\n\r\n" + HELLO,
        [ResponseHead(199, []), ResponseHead(200, [(b"content-length", b"5")]), Data(b"hello"), END],
        True,
    ),
    # A body where none can be is no part of the answer: left out, and the connection with it.
    "204 with a body": (
        b"GET",
        b"HTTP/1.1 204 No Content\r\nContent-Length: 5\r\n\r\nhello",
        [ResponseHead(204, []), END],
        False,
    ),
    "304 with a body": (b"GET", b"HTTP/1.1 304 Not Modified\r\n\r\nhello", [ResponseHead(304, []), END], False),
    "HEAD with a body": (b"HEAD", HELLO, [ResponseHead(200, [(b"content-length", b"5")]), END], False),
    "HEAD with chunks": (b"HEAD", CHUNKED + b"5\r\nhello\r\n0\r\n\r\n", [ResponseHead(200, []), END], False),
    "HEAD with the last chunk": (b"HEAD", CHUNKED + b"0\r\n\r\n", [ResponseHead(200, []), END], False),
    "HEAD with an answer after it": (
        b"HEAD",
        OK + b"Content-Length: 0\r\n\r\n" + HELLO,
        [ResponseHead(200, [(b"content-length", b"0")]), END],
        False,
    ),
}


def merged(frames: list[Frame]) -> list[Frame]:
    """Frames with neighbouring Data as one: how bytes are cut is nobody's promise."""
    found: list[Frame] = []
    for frame in frames:
        if isinstance(frame, Data) and found and isinstance(found[-1], Data):
            found[-1] = Data(found[-1].data + frame.data)
        else:
            found.append(frame)
    return found


@pytest.mark.parametrize("step", [0, 1, 2, 7], ids=["whole", "by 1", "by 2", "by 7"])
@pytest.mark.parametrize("case", ANSWERS)
async def test_answer_becomes(case: str, step: int) -> None:
    method, answer, expected, kept = ANSWERS[case]
    origin = MemoryOrigin()
    visitor = await asked(origin, request(method))
    packets = [answer[start : start + step] for start in range(0, len(answer), step)] if step else [answer]
    origin.socket.says(*packets)
    if not kept:
        origin.socket.ends()
    await turns()
    assert visitor.error is None
    assert merged(visitor.frames) == expected
    assert origin.counts == (ONE_KEPT if kept else NOTHING_LEFT)
    await origin.aclose()


BROKEN: dict[str, bytes] = {
    "two equal lengths": OK + b"Content-Length: 5\r\nContent-Length: 5\r\n\r\nhello",
    "two unequal lengths": OK + b"Content-Length: 5\r\nContent-Length: 6\r\n\r\nhello",
    "a list of lengths": OK + b"Content-Length: 5, 5\r\n\r\nhello",
    "length with a sign": OK + b"Content-Length: +5\r\n\r\nhello",
    "negative length": OK + b"Content-Length: -5\r\n\r\nhello",
    "hexadecimal length": OK + b"Content-Length: 0x5\r\n\r\nhello",
    "empty length": OK + b"Content-Length: \r\n\r\nhello",
    "overflowing length": OK + b"Content-Length: 99999999999999999999999\r\n\r\nhello",
    "absurd length": OK + b"Content-Length: 18446744073709551615\r\n\r\nhello",
    "length and chunked": OK + b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "chunked and length": OK + b"Transfer-Encoding: chunked\r\nContent-Length: 5\r\n\r\n0\r\n\r\n",
    "chunked twice": OK + b"Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "a list of chunked": OK + b"Transfer-Encoding: chunked, chunked\r\n\r\n0\r\n\r\n",
    "gzip, chunked": OK + b"Transfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n",
    "chunked, identity": OK + b"Transfer-Encoding: chunked, identity\r\n\r\n0\r\n\r\n",
    "xchunked": OK + b"Transfer-Encoding: xchunked\r\n\r\n0\r\n\r\n",
    "chunked in HTTP/1.0": b"HTTP/1.0 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "HTTP/0.9": b"HTTP/0.9 200 OK\r\nContent-Length: 0\r\n\r\n",
    "HTTP/2.0": b"HTTP/2.0 200 OK\r\nContent-Length: 0\r\n\r\n",
    "HTTP/2.0 after 100": b"HTTP/1.1 100 Continue\r\n\r\nHTTP/2.0 200 OK\r\nContent-Length: 0\r\n\r\n",
    "RTSP after 100": b"HTTP/1.1 100 Continue\r\n\r\nRTSP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n",
    "ICE within 100": b"HTTP/1.1 100 Continue\r\n\r\nICE/1.1 103 Hints\r\n\r\n" + HELLO,
    "empty line after 100": b"HTTP/1.1 100 Continue\r\n\r\n\r\n" + HELLO,
    "LF after 100": b"HTTP/1.1 100 Continue\r\n\r\n\n" + HELLO,
    "interim answers without end": b"HTTP/1.1 102 Processing\r\n\r\n" * 3000 + HELLO,
    "interim answers that are large": (b"HTTP/1.1 103 Hints\r\nX: " + b"y" * 30000 + b"\r\n\r\n") * 3 + HELLO,
    "RTSP": b"RTSP/1.0 200 OK\r\nContent-Length: 0\r\n\r\n",
    "no HTTP at all": b"SSH-2.0-OpenSSH_9.2p1 Debian\r\n",
    "a body and no head": b"hello\r\n\r\n",
    "empty line before": b"\r\n" + HELLO,
    "status of two digits": b"HTTP/1.1 20 OK\r\n\r\n",
    "status of four digits": b"HTTP/1.1 2000 OK\r\n\r\n",
    "status under 100": b"HTTP/1.1 099 OK\r\nContent-Length: 0\r\n\r\n",
    "two spaces": b"HTTP/1.1  200 OK\r\n\r\n",
    "NUL in the reason": b"HTTP/1.1 200 O\0K\r\nContent-Length: 0\r\n\r\n",
    "escape in the reason": b"HTTP/1.1 200 \x1b[2J\r\nContent-Length: 0\r\n\r\n",
    "bare LF": b"HTTP/1.1 200 OK\nContent-Length: 0\n\n",
    "bare CR in a value": OK + b"X: a\rSet-Cookie: b\r\nContent-Length: 0\r\n\r\n",
    "bare LF in a value": OK + b"X: a\nSet-Cookie: b\r\nContent-Length: 0\r\n\r\n",
    "NUL in a value": OK + b"X: a\0b\r\nContent-Length: 0\r\n\r\n",
    "control in a value": OK + b"X: a\x01b\r\nContent-Length: 0\r\n\r\n",
    "folded line": OK + b"X: a\r\n b\r\nContent-Length: 0\r\n\r\n",
    "space before the colon": OK + b"X : a\r\nContent-Length: 0\r\n\r\n",
    "empty name": OK + b": a\r\nContent-Length: 0\r\n\r\n",
    "name that is no token": OK + b"X(: a\r\nContent-Length: 0\r\n\r\n",
    "no colon": OK + b"X\r\nContent-Length: 0\r\n\r\n",
    "unasked 101": SWITCH,
    "body longer than said": OK + b"Content-Length: 5\r\n\r\nhello world",
    "line end after the body": HELLO + b"\r\n",
    "line end after an empty body": OK + b"Content-Length: 0\r\n\r\n\r\n",
    "line end after the last chunk": CHUNKED + b"1\r\na\r\n0\r\n\r\n\r\n",
    "second answer": HELLO + HELLO,
    "bytes after close": OK + b"Connection: close\r\nContent-Length: 5\r\n\r\nhelloHTTP",
    "chunk size with a sign": CHUNKED + b"+5\r\nhello\r\n0\r\n\r\n",
    "chunk size with a prefix": CHUNKED + b"0x5\r\nhello\r\n0\r\n\r\n",
    "chunk size with a space": CHUNKED + b"5 \r\nhello\r\n0\r\n\r\n",
    "chunk size overflow": CHUNKED + b"fffffffffffffffff\r\nhello\r\n0\r\n\r\n",
    "chunk shorter than said": CHUNKED + b"6\r\nhello\r\n0\r\n\r\n",
    "chunk longer than said": CHUNKED + b"4\r\nhello\r\n0\r\n\r\n",
    "bare LF after a chunk size": CHUNKED + b"5\nhello\r\n0\r\n\r\n",
    "control in a chunk extension": CHUNKED + b"5;\0\r\nhello\r\n0\r\n\r\n",
    "NUL in a trailer": CHUNKED + b"0\r\nX: \0\r\n\r\n",
    "length in the trailers": CHUNKED + b"0\r\nContent-Length: 5\r\n\r\n",
    "too many fields": OK + b"X: y\r\n" * 257 + b"Content-Length: 0\r\n\r\n",
    "head too large": OK + b"X: " + b"y" * 66000 + b"\r\nContent-Length: 0\r\n\r\n",
    "head without an end": OK + b"X: " + b"y" * 70000,
    "trailers too many": CHUNKED + b"0\r\n" + b"X: y\r\n" * 257 + b"\r\n",
}


@pytest.mark.parametrize("case", BROKEN)
async def test_broken_answer_is_a_502(case: str) -> None:
    origin = MemoryOrigin()
    visitor = await asked(origin)
    origin.socket.says(BROKEN[case])
    await turns()
    assert visitor.frames == []
    assert visitor.error is not None
    assert visitor.error.code is ErrorCode.HTTP_PROTOCOL_ERROR
    assert visitor.error.fault.status == 502
    assert visitor.error.details.isascii()
    assert visitor.error.details.isprintable()
    assert origin.socket.aborted
    assert origin.counts == NOTHING_LEFT
    await origin.aclose()


@pytest.mark.parametrize("case", BROKEN)
async def test_broken_answer_in_single_bytes_is_never_a_complete_one(case: str) -> None:
    origin = MemoryOrigin()
    visitor = await asked(origin)
    answer = BROKEN[case]
    origin.socket.says(*(answer[at : at + 1] for at in range(len(answer))))
    await turns()
    # What follows a complete answer in a later packet was never a part of it.
    follows = "after" in case or case in ("second answer", "body longer than said")
    if follows and visitor.ended:
        assert visitor.error is None
    else:
        assert visitor.code is ErrorCode.HTTP_PROTOCOL_ERROR
        assert not visitor.ended
    assert origin.counts == NOTHING_LEFT
    await origin.aclose()


CUTS: dict[str, tuple[bytes, str]] = {
    "at once": (b"", "before it answered"),
    "within the status line": (b"HTTP/1.1 20", "answer"),
    "within the head": (OK + b"X: y\r\n", "answer"),
    "after 100": (b"HTTP/1.1 100 Continue\r\n\r\n", "answer"),
    "at the body": (OK + b"Content-Length: 5\r\n\r\n", "answer"),
    "within the body": (OK + b"Content-Length: 5\r\n\r\nhell", "answer"),
    "within a chunk": (CHUNKED + b"5\r\nhell", "answer"),
    "between chunks": (CHUNKED + b"5\r\nhello\r\n", "answer"),
    "before the last empty line": (CHUNKED + b"5\r\nhello\r\n0\r\n", "answer"),
    "within the trailers": (CHUNKED + b"0\r\nX: y\r\n", "answer"),
}


@pytest.mark.parametrize("how", ["FIN", "RST"])
@pytest.mark.parametrize("case", CUTS)
async def test_cut_answer_is_never_complete(case: str, how: str) -> None:
    answer, details = CUTS[case]
    origin = MemoryOrigin()
    visitor = await asked(origin)
    if answer:
        origin.socket.says(answer)
    if how == "FIN":
        origin.socket.ends()
    else:
        origin.socket.resets()
    await turns()
    assert not visitor.ended
    assert visitor.error is not None
    assert visitor.error.code is ErrorCode.CONNECTION_TERMINATED
    assert details in visitor.error.details
    assert origin.counts == NOTHING_LEFT
    await origin.aclose()


async def test_reset_does_not_complete_an_answer_that_ends_with_its_connection() -> None:
    origin = MemoryOrigin()
    visitor = await asked(origin)
    origin.socket.says(OK + b"\r\nhello")
    origin.socket.resets()
    await turns()
    assert visitor.body == b"hello"
    assert not visitor.ended
    assert visitor.code is ErrorCode.CONNECTION_TERMINATED


@pytest.mark.parametrize("piece", [b"X: y\r\n", b"y", b"y" * 999], ids=["fields", "bytes", "packets"])
@pytest.mark.parametrize("start", [CHUNKED + b"0\r\nX: y", CHUNKED + b"5;x"], ids=["trailers", "chunk extension"])
async def test_section_without_an_end_is_cut(start: bytes, piece: bytes) -> None:
    origin = MemoryOrigin()
    visitor = await asked(origin)
    origin.socket.says(start)
    for _ in range(70000 // len(piece)):
        origin.socket.says(piece)
    await turns()
    assert visitor.code is ErrorCode.HTTP_PROTOCOL_ERROR
    assert origin.counts == NOTHING_LEFT


@pytest.mark.parametrize("packets", [1, 4000], ids=["one read", "one by one"])
async def test_interim_answers_without_an_end_are_a_502(packets: int) -> None:
    origin = MemoryOrigin()
    visitor = await asked(origin)
    for _ in range(packets):
        origin.socket.says(b"HTTP/1.1 100 Continue\r\n\r\n" * (4000 // packets))
    await turns()
    assert visitor.code is ErrorCode.HTTP_PROTOCOL_ERROR
    assert origin.counts == NOTHING_LEFT


def test_fields_too_many_are_not_collected_first() -> None:
    for start in (OK, CHUNKED + b"0\r\n"):
        parser = AnswerParser(size_limit=1 << 30, fields_limit=100)
        parser.expect(b"GET", b"")
        with pytest.raises(TunnelError, match="too large"):
            parser.feed(start + b"a: b\r\n" * 102)


# Any split of the bytes


def parse(packets: list[bytes], method: bytes) -> tuple[list[Frame], bool]:
    parser = AnswerParser(size_limit=65536, fields_limit=256)
    parser.expect(method, b"")
    frames: list[Frame] = []
    for packet in packets:
        frames += parser.feed(packet)
    return merged(frames), parser.complete and parser.keep_alive


@given(st.sampled_from([case for case in ANSWERS.values() if case[3]]), st.lists(st.integers(0, 400), max_size=12))
def test_any_split_gives_the_same_frames(case: tuple[bytes, bytes, list[Frame], bool], cuts: list[int]) -> None:
    method, answer, expected, _ = case
    places = [0, *sorted(cut % (len(answer) + 1) for cut in cuts), len(answer)]
    packets = [answer[one:other] for one, other in pairwise(places) if one < other]
    assert parse(packets, method) == (expected, True)


@given(st.lists(st.binary(max_size=40), max_size=6), st.sampled_from([b"", OK, CHUNKED, OK + b"Content-Length: 5\r\n"]))
@example([b"\x00"], b"")
def test_garbage_gives_only_a_protocol_error(packets: list[bytes], start: bytes) -> None:
    try:
        parse([start, *packets], b"GET")
    except TunnelError as error:
        assert error.code is ErrorCode.HTTP_PROTOCOL_ERROR


@given(st.lists(st.tuples(st.sampled_from([b"a", b"x-y", b"cookie"]), st.text("\t !~aé\xff", max_size=9)), max_size=8))
def test_fields_of_a_request_come_back_from_an_answer(pairs: list[tuple[bytes, str]]) -> None:
    fields: Fields = [(name, value.strip(" \t").encode("latin-1")) for name, value in pairs]
    head = b"".join(b"%b: %b\r\n" % field for field in fields)
    frames, _ = parse([OK + head + b"Content-Length: 0\r\n\r\n"], b"GET")
    assert frames[0] == ResponseHead(200, [*fields, (b"content-length", b"0")])


# Kept connections


@pytest.mark.parametrize("end", [b"", b"x"], ids=["under way", "complete"])
def test_parser_keeps_nothing_of_a_body_that_has_gone_out(end: bytes) -> None:
    parser = AnswerParser(size_limit=65536, fields_limit=100)
    parser.expect(b"GET", b"")
    frames = parser.feed(b"HTTP/1.1 200 OK\r\nContent-Length: 100001\r\n\r\n" + b"x" * 100_000 + end)
    assert parser.complete is bool(end)
    assert sys.getrefcount(frames) == 2  # this name, and the call's argument


async def test_connection_is_used_again() -> None:
    origin = MemoryOrigin()
    for _ in range(5):
        visitor = await answered(origin)
        assert visitor.body == b"hello"
    assert len(origin.sockets) == 1
    assert origin.counts == ONE_KEPT
    await origin.aclose()
    assert origin.counts == NOTHING_LEFT


async def test_requests_at_once_have_a_connection_each() -> None:
    origin = MemoryOrigin()
    visitors = [await asked(origin) for _ in range(20)]
    assert origin.counts == (20, 20, 0, 0)
    for each in origin.sockets:
        each.says(HELLO)
    assert all(visitor.ended for visitor in visitors)
    assert origin.counts == (0, 20, 20, 0)
    await origin.aclose()


async def test_list_of_kept_connections_is_bounded() -> None:
    origin = MemoryOrigin(OriginLimits(idle_connections=3))
    for _ in range(5):
        await asked(origin)
    for each in origin.sockets:
        each.says(HELLO)
    await turns()
    assert origin.counts == (0, 3, 3, 0)
    await origin.aclose()


@pytest.mark.parametrize("how", ["FIN", "RST", "bytes"])
async def test_kept_connection_that_ends_is_dropped(how: str) -> None:
    origin = MemoryOrigin()
    await answered(origin)
    first = origin.socket
    {"FIN": first.ends, "RST": first.resets, "bytes": lambda: first.says(HELLO)}[how]()
    visitor = Visitor().ask(origin.open(), request())
    await turns()
    assert len(origin.sockets) == 2
    origin.socket.says(OK + b"Content-Length: 1\r\n\r\n!")
    assert visitor.body == b"!"
    assert origin.counts == ONE_KEPT
    await origin.aclose()


def test_kept_connection_is_closed_when_it_has_been_idle() -> None:
    async def work() -> None:
        origin = MemoryOrigin(OriginLimits(idle_keep_alive=30))
        await answered(origin)
        await asyncio.sleep(29)
        assert origin.counts == ONE_KEPT
        await asyncio.sleep(2.5)
        assert origin.counts == NOTHING_LEFT
        await origin.aclose()

    run(work())


async def test_paused_connection_is_read_again_once_it_is_kept() -> None:
    origin = MemoryOrigin()
    visitor = await asked(origin)
    visitor.peer.pause()
    assert not origin.socket.reading
    origin.socket.says(HELLO)  # read before the pause took effect
    assert visitor.ended
    assert origin.socket.reading
    await origin.aclose()


async def test_answer_before_the_end_of_the_request_ends_the_exchange() -> None:
    origin = MemoryOrigin()
    visitor = await asked(origin, UPLOAD, Data(b"a"))
    leg = visitor.peer
    origin.socket.says(HELLO)
    assert visitor.ended
    leg.receive(Data(b"b"))
    leg.receive(END)
    await turns()
    assert origin.socket.aborted
    assert b"b\r\n" not in origin.socket.written
    assert origin.counts == NOTHING_LEFT


async def test_answer_may_begin_before_the_request_has_ended() -> None:
    origin = MemoryOrigin()
    visitor = await asked(origin, UPLOAD, Data(b"a"))
    origin.socket.says(CHUNKED + b"1\r\nA\r\n")
    visitor.peer.receive(Data(b"b"))
    origin.socket.says(b"1\r\nB\r\n")
    visitor.peer.receive(END)
    origin.socket.says(b"0\r\n\r\n")
    assert visitor.body == b"AB"
    assert visitor.ended
    assert origin.counts == ONE_KEPT
    await origin.aclose()


# Asking again


async def stale(
    origin: MemoryOrigin, head: RequestHead, *rest: Frame, how: str = "FIN", answer: bytes = b""
) -> Visitor:
    """A request on a kept connection that the backend had closed already."""
    await answered(origin)
    visitor = await asked(origin, head, *rest)
    assert len(origin.sockets) == 1
    if answer:
        origin.socket.says(answer)
    if how == "FIN":
        origin.socket.ends()
    else:
        origin.socket.resets()
    await turns()
    return visitor


PUT = request(b"PUT", [(b"content-length", b"5")], body=True)


@pytest.mark.parametrize("how", ["FIN", "RST"])
@pytest.mark.parametrize(
    ("head", "rest"),
    [(request(), [END]), (request(b"DELETE"), [END]), (PUT, [Data(b"hello"), END]), (PUT, [Data(b"he")]), (PUT, [])],
    ids=["GET", "DELETE", "PUT", "PUT halfway", "PUT before its body"],
)
async def test_idempotent_request_on_a_stale_connection_is_sent_again(
    head: RequestHead, rest: list[Frame], how: str
) -> None:
    origin = MemoryOrigin()
    visitor = await stale(origin, head, *rest, how=how)
    assert visitor.error is None
    assert len(origin.sockets) == 2
    for frame in (
        [Data(b"hello"[sum(len(f.data) for f in rest if isinstance(f, Data)) :]), END] if END not in rest else []
    ):
        if frame != Data(b""):
            visitor.peer.receive(frame)
    assert not visitor.paused
    assert origin.socket.written.startswith(head.method + b" / HTTP/1.1\r\n")
    if head.body:
        assert origin.socket.written.endswith(b"\r\n\r\nhello")
    origin.socket.says(HELLO)
    assert visitor.body == b"hello"
    assert origin.counts == ONE_KEPT
    await origin.aclose()


@pytest.mark.parametrize(
    ("head", "rest", "answer"),
    [
        (request(b"POST"), [END], b""),
        (request(b"PATCH"), [END], b""),
        (request(b"get"), [END], b""),
        (UPLOAD, [Data(b"a"), END], b""),
        (request(b"PUT", body=True), [Data(b"a" * 20000), END], b""),
        (request(), [END], b"H"),
    ],
    ids=["POST", "PATCH", "unknown method", "POST with a body", "large PUT", "answer begun"],
)
async def test_request_that_may_have_had_an_effect_is_not_sent_again(
    head: RequestHead, rest: list[Frame], answer: bytes
) -> None:
    origin = MemoryOrigin()
    visitor = await stale(origin, head, *rest, answer=answer)
    assert visitor.code is ErrorCode.CONNECTION_TERMINATED
    assert len(origin.sockets) == 1
    assert origin.counts == NOTHING_LEFT


async def test_request_is_not_sent_a_third_time() -> None:
    origin = MemoryOrigin()
    visitor = await stale(origin, request())
    origin.socket.ends()
    await turns()
    assert visitor.code is ErrorCode.CONNECTION_TERMINATED
    assert len(origin.sockets) == 2
    assert origin.counts == NOTHING_LEFT


async def test_request_on_a_fresh_connection_is_not_sent_again() -> None:
    origin = MemoryOrigin()
    visitor = await asked(origin)
    origin.socket.ends()
    await turns()
    assert visitor.code is ErrorCode.CONNECTION_TERMINATED
    assert len(origin.sockets) == 1


async def test_visitor_that_leaves_while_it_is_asked_again_leaves_nothing() -> None:
    origin = MemoryOrigin()
    await answered(origin)
    origin.hold = asyncio.Event()
    visitor = await asked(origin)
    origin.socket.ends()
    await turns()
    assert origin.dials == 1
    visitor.peer.abort(TunnelError(ErrorCode.CANCELLED))
    await turns()
    assert visitor.error is None
    assert origin.counts == NOTHING_LEFT


# Dialling

FAILURES: dict[str, tuple[Exception, ErrorCode]] = {
    "refused": (ConnectionRefusedError(errno.ECONNREFUSED, "no"), ErrorCode.CONNECTION_REFUSED),
    "all refused": (
        OSError("Multiple exceptions: [Errno 111] Connect call failed ('::1'), [Errno 111] Connect call failed"),
        ErrorCode.CONNECTION_REFUSED,
    ),
    "no unix socket": (FileNotFoundError(errno.ENOENT, "no"), ErrorCode.CONNECTION_REFUSED),
    "forbidden unix socket": (PermissionError(errno.EACCES, "no"), ErrorCode.CONNECTION_REFUSED),
    "unknown name": (socket.gaierror(socket.EAI_NONAME, "no"), ErrorCode.DNS_ERROR),
    "no route": (OSError(errno.EHOSTUNREACH, "no"), ErrorCode.DESTINATION_IP_UNROUTABLE),
    "no network": (OSError(errno.ENETUNREACH, "no"), ErrorCode.DESTINATION_IP_UNROUTABLE),
    "time-out of the kernel": (TimeoutError(errno.ETIMEDOUT, "no"), ErrorCode.CONNECTION_TIMEOUT),
    "untrusted": (ssl.SSLCertVerificationError(1, "no"), ErrorCode.TLS_CERTIFICATE_ERROR),
    "bad handshake": (ssl.SSLError(1, "no"), ErrorCode.TLS_ERROR),
    "reset": (ConnectionResetError(errno.ECONNRESET, "no"), ErrorCode.CONNECTION_TERMINATED),
    "too many files": (OSError(errno.EMFILE, "no"), ErrorCode.CONNECTION_LIMIT_REACHED),
    "anything else": (RuntimeError("no"), ErrorCode.INTERNAL_ERROR),
}


@pytest.mark.parametrize("case", FAILURES)
async def test_failed_dial_is_told_as(case: str) -> None:
    error, code = FAILURES[case]
    origin = MemoryOrigin()
    origin.refuse = error
    visitor = await asked(origin, UPLOAD, Data(b"a"))
    assert visitor.code is code
    assert origin.counts == NOTHING_LEFT


def test_dial_has_a_limit() -> None:
    async def work() -> None:
        origin = MemoryOrigin(OriginLimits(connect_time=10))
        origin.hold = asyncio.Event()
        visitor = await asked(origin)
        await asyncio.sleep(9.9)
        assert visitor.error is None
        await asyncio.sleep(0.2)
        assert visitor.code is ErrorCode.CONNECTION_TIMEOUT
        assert origin.counts == NOTHING_LEFT

    run(work())


async def test_what_comes_during_the_dial_is_held_and_the_peer_paused() -> None:
    origin = MemoryOrigin()
    origin.hold = asyncio.Event()
    visitor = await asked(origin, UPLOAD)
    assert not visitor.paused
    visitor.peer.receive(Data(b"a"))
    assert visitor.paused
    visitor.peer.receive(Data(b"b"))
    assert visitor.pauses == 1
    visitor.peer.pause()
    origin.hold.set()
    await turns()
    assert not visitor.paused
    assert origin.socket.written.endswith(b"1\r\na\r\n1\r\nb\r\n")
    assert not origin.socket.reading, "the pause of the peer holds for the connection that came later"
    visitor.peer.resume()
    assert origin.socket.reading
    await origin.aclose()


async def test_dial_is_dropped_when_the_visitor_leaves() -> None:
    origin = MemoryOrigin()
    origin.hold = asyncio.Event()
    visitor = await asked(origin)
    assert origin.counts == (1, 0, 0, 1)
    visitor.peer.abort(TunnelError(ErrorCode.CANCELLED))
    await turns()
    assert origin.counts == NOTHING_LEFT
    assert visitor.error is None


async def test_backend_that_closes_during_the_dial_is_told() -> None:
    class Closing(MemoryDialler):
        async def connect(self, protocol):  # type: ignore[no-untyped-def]
            connection = await super().connect(protocol)
            origin.socket.ends()
            return connection

    origin = MemoryOrigin()
    origin.dialler = Closing(origin, 10)
    visitor = await asked(origin)
    assert visitor.code is ErrorCode.CONNECTION_TERMINATED
    assert origin.counts == NOTHING_LEFT


# Leaving


@pytest.mark.parametrize("phase", ["asked", "uploading", "head", "body", "upgraded", "half-closed", "kept connection"])
async def test_visitor_that_leaves_closes_the_backend_connection_at_once(phase: str) -> None:
    origin = MemoryOrigin()
    if phase == "kept connection":
        await answered(origin)
    visitor = await asked(
        origin, HANDSHAKE if phase in ("upgraded", "half-closed") else UPLOAD if phase == "uploading" else request()
    )
    {
        "head": lambda: origin.socket.says(OK + b"Content-Length: 5\r\n\r\n"),
        "body": lambda: origin.socket.says(OK + b"\r\nhello"),
        "upgraded": lambda: origin.socket.says(SWITCH),
        "half-closed": lambda: (origin.socket.says(SWITCH), origin.socket.ends()),
    }.get(phase, lambda: None)()
    visitor.peer.abort(TunnelError(ErrorCode.CANCELLED))
    assert origin.socket.aborted
    await turns()
    assert origin.counts == NOTHING_LEFT
    assert visitor.error is None


async def test_verbs_after_the_end_do_nothing() -> None:
    origin = MemoryOrigin()
    visitor = await asked(origin)
    leg = visitor.peer
    origin.socket.says(HELLO)
    frames = list(visitor.frames)
    leg.pause()
    leg.resume()
    leg.receive(Data(b"x"))
    leg.receive(END)
    leg.abort(TunnelError(ErrorCode.CANCELLED))
    await turns()
    assert visitor.frames == frames
    assert origin.counts == ONE_KEPT
    await origin.aclose()


async def test_peer_that_leaves_while_it_is_handed_frames_gets_no_more() -> None:
    class Leaving(Visitor):
        def receive(self, frame: Frame) -> None:
            super().receive(frame)
            self.peer.abort(TunnelError(ErrorCode.CANCELLED))

    origin = MemoryOrigin()
    visitor = Leaving().ask(origin.open(), request())
    await turns()
    origin.socket.says(HELLO)
    await turns()
    assert len(visitor.frames) == 1
    assert origin.counts == NOTHING_LEFT


# Back-pressure


async def test_backend_that_does_not_read_pauses_the_peer() -> None:
    origin = MemoryOrigin()
    visitor = await asked(origin, UPLOAD, Data(b"a"))
    origin.socket.protocol.pause_writing()
    assert visitor.paused
    origin.socket.protocol.resume_writing()
    assert not visitor.paused
    await origin.aclose()


async def test_peer_that_cannot_take_more_stops_the_reading() -> None:
    origin = MemoryOrigin()
    visitor = await asked(origin)
    for _ in range(2):
        visitor.peer.pause()
        visitor.peer.pause()
        assert not origin.socket.reading
        visitor.peer.resume()
        visitor.peer.resume()
        assert origin.socket.reading
    await origin.aclose()


# Time


def timed(work: Callable[[MemoryOrigin], Awaitable[None]], **limits: float) -> None:
    async def main() -> None:
        origin = MemoryOrigin(OriginLimits(**{"head_time": 60.0, **limits}))  # type: ignore[arg-type]
        await work(origin)
        await origin.aclose()
        assert origin.counts == NOTHING_LEFT

    run(main())


def test_backend_that_does_not_answer_is_a_504() -> None:
    async def work(origin: MemoryOrigin) -> None:
        visitor = await asked(origin)
        await asyncio.sleep(59)
        assert visitor.error is None
        await asyncio.sleep(2.1)
        assert visitor.error is not None
        assert visitor.error.code is ErrorCode.HTTP_RESPONSE_TIMEOUT
        assert visitor.error.fault.status == 504
        assert "60 s" in visitor.error.details
        assert origin.socket.aborted

    timed(work)


def test_backend_that_trickles_its_head_is_a_504() -> None:
    async def work(origin: MemoryOrigin) -> None:
        visitor = await asked(origin)
        for byte in OK + b"X: y\r\n" * 10:
            origin.socket.says(bytes([byte]))
            await asyncio.sleep(1)
            if visitor.error is not None:
                break
        assert visitor.code is ErrorCode.HTTP_RESPONSE_TIMEOUT

    timed(work)


def test_interim_answer_starts_the_time_anew() -> None:
    async def work(origin: MemoryOrigin) -> None:
        visitor = await asked(origin)
        for _ in range(5):
            await asyncio.sleep(50)
            origin.socket.says(b"HTTP/1.1 102 Processing\r\n\r\n")
        assert visitor.statuses == [102] * 5
        await asyncio.sleep(62)
        assert visitor.code is ErrorCode.HTTP_RESPONSE_TIMEOUT

    timed(work)


def test_slow_upload_is_not_the_backends_fault() -> None:
    async def work(origin: MemoryOrigin) -> None:
        visitor = await asked(origin, UPLOAD)
        for _ in range(5):
            await asyncio.sleep(100)
            visitor.peer.receive(Data(b"a"))
        visitor.peer.receive(END)
        assert visitor.error is None
        await asyncio.sleep(62)
        assert visitor.code is ErrorCode.HTTP_RESPONSE_TIMEOUT

    timed(work)


def test_backend_that_takes_no_more_of_the_upload_is_a_504() -> None:
    async def work(origin: MemoryOrigin) -> None:
        visitor = await asked(origin, UPLOAD, Data(b"a"))
        origin.socket.protocol.pause_writing()
        await asyncio.sleep(62)
        assert visitor.code is ErrorCode.HTTP_RESPONSE_TIMEOUT

    timed(work)


def test_backend_that_never_says_continue_is_a_504() -> None:
    async def work(origin: MemoryOrigin) -> None:
        visitor = await asked(origin, request(b"POST", [(b"expect", b"100-continue")], body=True))
        await asyncio.sleep(62)
        assert visitor.code is ErrorCode.HTTP_RESPONSE_TIMEOUT

    timed(work)


def test_upload_after_continue_may_take_its_time() -> None:
    async def work(origin: MemoryOrigin) -> None:
        visitor = await asked(origin, request(b"POST", [(b"expect", b"100-continue")], body=True))
        origin.socket.says(b"HTTP/1.1 100 Continue\r\n\r\n")
        await asyncio.sleep(300)
        assert visitor.error is None
        assert visitor.statuses == [100]

    timed(work)


def test_handshake_that_is_not_answered_is_a_504() -> None:
    async def work(origin: MemoryOrigin) -> None:
        visitor = await asked(origin, HANDSHAKE)
        await asyncio.sleep(62)
        assert visitor.code is ErrorCode.HTTP_RESPONSE_TIMEOUT

    timed(work)


def test_body_may_be_silent_for_ever() -> None:
    async def work(origin: MemoryOrigin) -> None:
        visitor = await asked(origin)
        origin.socket.says(CHUNKED)
        await asyncio.sleep(10_000)
        origin.socket.says(b"1\r\na\r\n0\r\n\r\n")
        assert visitor.body == b"a"
        assert visitor.ended

    timed(work)


def test_silence_within_a_body_can_be_limited() -> None:
    async def work(origin: MemoryOrigin) -> None:
        visitor = await asked(origin)
        origin.socket.says(CHUNKED)
        for _ in range(5):
            await asyncio.sleep(8)
            origin.socket.says(b"1\r\na\r\n")
        visitor.peer.pause()  # now the silence is the visitor's
        await asyncio.sleep(100)
        visitor.peer.resume()
        await asyncio.sleep(8)
        assert visitor.error is None
        await asyncio.sleep(4)
        assert visitor.code is ErrorCode.HTTP_RESPONSE_TIMEOUT
        assert not visitor.ended

    timed(work, body_idle_time=10.0)


# Upgrade


async def upgraded(origin: MemoryOrigin, answer: bytes = SWITCH) -> Visitor:
    visitor = await asked(origin, HANDSHAKE)
    origin.socket.says(answer)
    return visitor


async def test_upgraded_connection_passes_bytes_both_ways() -> None:
    origin = MemoryOrigin()
    visitor = await upgraded(origin)
    assert visitor.frames == [ResponseHead(101, [(b"upgrade", b"websocket")])]
    origin.socket.writes.clear()
    visitor.peer.receive(Data(b"\x81\x00"))
    origin.socket.says(b"HTTP/1.1 200", b"\r\n\r\n")
    assert origin.socket.written == b"\x81\x00"
    assert visitor.body == b"HTTP/1.1 200\r\n\r\n"
    await origin.aclose()


@pytest.mark.parametrize("step", [1, 3, 1000])
async def test_bytes_that_come_with_the_101_are_not_lost(step: int) -> None:
    origin = MemoryOrigin()
    visitor = await asked(origin, HANDSHAKE)
    answer = b"HTTP/1.1 100 Continue\r\n\r\n" + SWITCH + b"early\r\n\r\n"
    origin.socket.says(*(answer[at : at + step] for at in range(0, len(answer), step)))
    assert visitor.statuses == [100, 101]
    assert visitor.body == b"early\r\n\r\n"
    await origin.aclose()


async def test_bytes_that_come_before_the_101_wait_for_it() -> None:
    origin = MemoryOrigin()
    visitor = await asked(origin, HANDSHAKE, Data(b"a"), Data(b"b"))
    assert origin.socket.written.endswith(b"\r\n\r\n")
    assert visitor.paused
    origin.socket.says(SWITCH)
    assert origin.socket.written.endswith(b"\r\n\r\nab")
    assert not visitor.paused
    await origin.aclose()


async def test_refused_handshake_goes_on_as_http() -> None:
    origin = MemoryOrigin()
    visitor = await asked(origin, HANDSHAKE)
    origin.socket.says(b"HTTP/1.1 426 Upgrade Required\r\nContent-Length: 2\r\n\r\nno")
    assert visitor.statuses == [426]
    assert visitor.ended
    assert origin.counts == ONE_KEPT
    await origin.aclose()


@pytest.mark.parametrize(
    "answer",
    [
        b"HTTP/1.1 101 S\r\n\r\n",
        b"HTTP/1.1 101 S\r\nUpgrade: websocket\r\n\r\n",
        b"HTTP/1.1 101 S\r\nConnection: Upgrade\r\n\r\n",
        b"HTTP/1.1 101 S\r\nUpgrade: h2c\r\nConnection: Upgrade\r\n\r\n",
        b"HTTP/1.0 101 S\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\r\n",
    ],
    ids=["bare", "no connection", "no upgrade", "another protocol", "HTTP/1.0"],
)
async def test_malformed_101_is_a_502(answer: bytes) -> None:
    origin = MemoryOrigin()
    visitor = await upgraded(origin, answer)
    await turns()
    assert visitor.code is ErrorCode.HTTP_PROTOCOL_ERROR
    assert origin.counts == NOTHING_LEFT


async def test_half_close_of_the_visitor_is_passed_on() -> None:
    origin = MemoryOrigin()
    visitor = await upgraded(origin)
    visitor.peer.receive(END)
    assert origin.socket.eof
    origin.socket.says(b"late")
    origin.socket.ends()
    await turns()
    assert visitor.body == b"late"
    assert visitor.ended
    assert visitor.error is None
    assert origin.counts == NOTHING_LEFT


async def test_a_reset_that_has_not_been_read_yet_is_nobody_elses_failure() -> None:
    origin = MemoryOrigin()
    visitor = await upgraded(origin)
    origin.socket.reset = True
    visitor.peer.receive(END)
    await turns()
    assert visitor.code is ErrorCode.CONNECTION_TERMINATED
    assert origin.counts == NOTHING_LEFT


async def test_half_close_of_the_backend_is_passed_on() -> None:
    origin = MemoryOrigin()
    visitor = await upgraded(origin)
    origin.socket.ends()
    assert visitor.ended
    visitor.peer.receive(Data(b"late"))
    assert origin.socket.written.endswith(b"late")
    visitor.peer.receive(END)
    await turns()
    assert visitor.error is None
    assert origin.counts == NOTHING_LEFT


async def test_half_close_before_the_101_is_passed_on_after_it() -> None:
    origin = MemoryOrigin()
    visitor = await asked(origin, HANDSHAKE, Data(b"a"), END)
    assert not origin.socket.eof
    origin.socket.says(SWITCH)
    assert origin.socket.written.endswith(b"\r\n\r\na")
    assert origin.socket.eof
    assert visitor.error is None
    await origin.aclose()


async def test_reset_of_an_upgraded_connection_cuts() -> None:
    origin = MemoryOrigin()
    visitor = await upgraded(origin)
    origin.socket.resets()
    await turns()
    assert visitor.code is ErrorCode.CONNECTION_TERMINATED
    assert not visitor.ended


def test_upgraded_connection_has_no_limit_until_half_of_it_has_ended() -> None:
    async def work(origin: MemoryOrigin) -> None:
        visitor = await upgraded(origin)
        await asyncio.sleep(10_000)
        assert visitor.error is None
        visitor.peer.receive(END)
        for _ in range(5):
            await asyncio.sleep(50)
            origin.socket.says(b"a")
        await asyncio.sleep(62)
        assert visitor.code is ErrorCode.HTTP_RESPONSE_TIMEOUT

    timed(work, body_idle_time=10.0)


# The end


def test_closing_lets_what_is_in_flight_finish() -> None:
    async def work() -> None:
        origin = MemoryOrigin()
        await answered(origin)
        kept = origin.socket
        visitor = await asked(origin)
        other = await asked(origin)
        loop = asyncio.get_running_loop()
        for each in origin.sockets:
            loop.call_later(5, each.says, HELLO)
        await origin.aclose(grace=30)
        assert loop.time() < 1010, "it waits no longer than it has to"
        assert visitor.body == other.body == b"hello"
        assert kept.closing
        assert origin.counts == NOTHING_LEFT

    run(work())


def test_closing_cuts_what_does_not_finish() -> None:
    async def work() -> None:
        origin = MemoryOrigin()
        visitor = await asked(origin)
        origin.hold = asyncio.Event()
        dialling = await asked(origin)
        await origin.aclose(grace=3)
        assert visitor.code is ErrorCode.CONNECTION_TERMINATED
        assert dialling.code is ErrorCode.CONNECTION_TERMINATED
        assert origin.counts == NOTHING_LEFT

    run(work())


async def test_request_after_closing_is_not_accepted() -> None:
    origin = MemoryOrigin()
    await origin.aclose()
    visitor = await asked(origin)
    assert visitor.code is ErrorCode.NOT_ACCEPTED
    assert origin.counts == NOTHING_LEFT
