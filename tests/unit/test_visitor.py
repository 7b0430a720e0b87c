"""A visitor's connection against a peer leg in memory, and a few times over real sockets."""

import asyncio
import socket
import struct
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quictunnel.exchange import VOID
from quictunnel.http.visitor_connection import VisitorConnection
from quictunnel.wire.errors import ErrorCode, TunnelError
from quictunnel.wire.frames import Data, End, Fields, RequestHead, ResponseHead
from tests.support.visitors import DATE, Edge, edge

GET = b"GET / HTTP/1.1\r\nHost: a\r\n\r\n"
LATER = 1e9
"seconds: past every deadline"


def get(path: bytes = b"/", fields: bytes = b"", method: bytes = b"GET", version: bytes = b"1.1") -> bytes:
    return b"%b %b HTTP/%b\r\nHost: a\r\n%b\r\n" % (method, path, version, fields)


def upload(size: int) -> bytes:
    return get(method=b"PUT", fields=b"Content-Length: %d\r\n" % size)


UPGRADE = get(fields=b"Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Key: x\r\n")
SWITCH = ResponseHead(101, [(b"upgrade", b"websocket"), (b"sec-websocket-accept", b"y")])
SWITCHED = (
    b"HTTP/1.1 101 Switching Protocols\r\nsec-websocket-accept: y\r\nconnection: Upgrade\r\nupgrade: websocket\r\n\r\n"
)


def look(connection: VisitorConnection) -> None:
    """Have a half-closed connection looked at now."""
    assert connection._departure is not None
    connection._departure.look()


# Requests


async def test_a_request_reaches_the_peer_as_frames() -> None:
    with edge() as site:
        connection, _ = site.connect()
        connection.data_received(
            b"POST /x?y HTTP/1.1\r\nHost: App.Example:8080\r\nX-A: 1\r\nX-Tunnel-Session: app\r\n"
            b"Connection: x-b\r\nX-B: 2\r\nX-Forwarded-For: spoof\r\n"
            b"Content_Length: 9\r\nProxy: p\r\nContent-Length: 5\r\n\r\nhello"
        )
        [leg] = site.legs
        assert site.peer.frames == [
            RequestHead(
                b"POST",
                b"http",
                b"App.Example:8080",
                b"/x?y",
                [
                    (b"x-a", b"1"),
                    (b"content-length", b"5"),
                    (b"x-forwarded-for", b"192.0.2.7"),
                    (b"x-forwarded-proto", b"http"),
                    (b"x-forwarded-host", b"App.Example:8080"),
                    (b"forwarded", b'for=192.0.2.7;host="App.Example:8080";proto=http'),
                    (b"via", b"1.1 quictunnel"),
                ],
                True,
            ),
            Data(b"hello"),
            End(),
        ]
        assert (leg.tunnel_header, leg.host, leg.client_address) == (b"app", "app.example", "192.0.2.7")
        assert (leg.method, leg.target, leg.bytes_in) == (b"POST", b"/x?y", 5)
        assert leg.head is site.peer.head


async def test_a_trusted_proxy_is_believed() -> None:
    with edge() as site:
        for address in ("10.1.2.3", "2001:db8::9", "::ffff:10.1.2.3"):
            connection, _ = site.connect((address, 1))
            connection.data_received(get(fields=b"X-Forwarded-For: 203.0.113.9\r\n"))
            assert dict(site.peer.head.fields)[b"x-forwarded-for"].startswith(b"203.0.113.9, ")


async def test_a_tls_visitor_came_by_https() -> None:
    with edge() as site:
        connection, _ = site.connect(tls=True)
        connection.data_received(GET)
        assert site.peer.head.scheme == b"https"
        assert dict(site.peer.head.fields)[b"x-forwarded-proto"] == b"https"


async def test_an_https_url_may_be_asked_for_over_tls_or_by_a_trusted_proxy() -> None:
    https_url = b"GET https://a/ HTTP/1.1\r\nHost: a\r\n\r\n"
    with edge() as site:
        for peer, tls, seen in ((("192.0.2.7", 1), False, 0), (("192.0.2.7", 1), True, 1), (("10.1.2.3", 1), False, 2)):
            connection, transport = site.connect(peer, tls=tls)
            connection.data_received(https_url)
            assert len(site.peers) == seen
            assert transport.written.startswith(b"HTTP/1.1 421 ") is (seen == 0)


@pytest.mark.parametrize("host", [b"app.localhost", b"app.localhost:8443", b"APP.LocalHost.", b"app.localhost.:1"])
async def test_the_host_of_the_handshake_is_served_however_it_is_written(host: bytes) -> None:
    with edge() as site:
        connection, _ = site.connect(tls=True, asked="app.localhost")
        connection.data_received(b"GET / HTTP/1.1\r\nHost: %b\r\n\r\n" % host)
        assert site.peer.head.authority == host


@pytest.mark.parametrize("asked", ["", "app.localhost"])
async def test_without_tls_or_a_name_in_the_handshake_any_host_is_served(asked: str) -> None:
    with edge() as site:
        connection, _ = site.connect(tls=not asked, asked=asked)
        connection.data_received(GET)
        assert site.peer.head.authority == b"a"


@pytest.mark.parametrize(
    "request_head",
    [
        b"GET / HTTP/1.1\r\nHost: other.localhost\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: x.app.localhost\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: app.localhost.example\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: [::1]\r\n\r\n",
        b"GET https://other.localhost/ HTTP/1.1\r\nHost: other.localhost\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: other.localhost\r\nX-Tunnel-Session: app\r\n\r\n",
        b"GET / HTTP/1.0\r\nConnection: keep-alive\r\nX-Tunnel-Session: other\r\n\r\n",
    ],
)
async def test_another_host_than_that_of_the_handshake_is_refused_and_the_connection_goes_on(
    request_head: bytes,
) -> None:
    with edge() as site:
        connection, transport = site.connect(tls=True, asked="app.localhost")
        connection.data_received(request_head)
        assert not site.legs, "nobody may hear of it"
        assert b" 421 Misdirected Request\r\n" in transport.written
        assert b"\r\nproxy-status: quictunnel; error=http_request_error" in transport.written
        assert not transport.closed
        connection.data_received(b"GET / HTTP/1.1\r\nHost: app.localhost\r\n\r\n")
        assert site.peer.head.authority == b"app.localhost"
        site.peer.reply()
        assert [leg.status for leg in site.done] == [421, 200]
        assert site.listener.in_flight == 0


async def test_a_misdirected_upload_is_refused_at_once() -> None:
    """Its rest is not waited for, so the connection cannot go on."""
    with edge() as site:
        connection, transport = site.connect(tls=True, asked="app.localhost")
        connection.data_received(upload(10) + b"hello")
        assert not site.legs
        assert b" 421 Misdirected Request\r\n" in transport.written
        assert b"\r\nconnection: close\r\n" in transport.written


async def test_a_trusted_proxy_may_ask_for_any_host() -> None:
    """It names the server that it dials; its own visitors ask for other hosts."""
    with edge() as site:
        connection, _ = site.connect(("10.1.2.3", 1), tls=True, asked="tunnel.internal")
        connection.data_received(GET)
        assert site.peer.head.authority == b"a"


@pytest.mark.parametrize("peer", [None, "", ("unix", 1)])
async def test_a_visitor_without_an_address_is_unknown(peer: object) -> None:
    with edge() as site:
        connection, _ = site.connect(peer)
        connection.data_received(GET)
        assert site.legs[0].client_address == "unknown"


async def test_a_request_without_a_body_says_so_and_ends_at_once() -> None:
    with edge() as site:
        connection, _ = site.connect()
        connection.data_received(get(method=b"POST", fields=b"Content-Length: 0\r\n"))
        head, end = site.peer.frames
        assert isinstance(head, RequestHead)
        assert not head.body
        assert (b"content-length", b"0") in head.fields
        assert end == End()


async def test_a_body_goes_on_as_it_comes_and_ends_with_its_trailers() -> None:
    with edge() as site:
        connection, _ = site.connect()
        connection.data_received(get(method=b"PUT", fields=b"Transfer-Encoding: chunked\r\n"))
        assert [type(frame) for frame in site.peer.frames] == [RequestHead]
        connection.data_received(b"5\r\nhel")
        connection.data_received(b"lo\r\n1\r\n!\r\n")
        connection.data_received(b"0\r\nX-Sum: 6\r\nX_Forwarded_For: spoof\r\n\r\n")
        assert site.peer.frames[1:] == [Data(b"hel"), Data(b"lo!"), End([(b"x-sum", b"6")])]


@given(st.sets(st.integers(0, 400), max_size=10), st.booleans())
@settings(max_examples=60, deadline=None)
def test_any_split_gives_the_peers_the_same(cuts: set[int], at_once: bool) -> None:
    asyncio.run(_split(sorted(cuts), at_once))


async def _split(cuts: list[int], at_once: bool) -> None:
    requests = [
        GET,
        get(b"/2", b"Transfer-Encoding: chunked\r\n", b"PUT") + b"5\r\nhello\r\n3;x=y\r\n\r\n\r\r\n0\r\nA: b\r\n\r\n",
        upload(7) + b"\r\n\r\nend",
        get(b"/4", b"Connection: Upgrade\r\nUpgrade: h2c\r\nContent-Length: 2\r\n") + b"ok",
        get(b"/5", version=b"1.0", fields=b"Connection: keep-alive\r\n"),
    ]
    data = b"".join(requests)
    with edge() as site:
        if at_once:
            site.on_open = lambda peer: setattr(peer, "on_frame", lambda frame: isinstance(frame, End) and peer.reply())
        connection, transport = site.connect()
        for start, end in zip([0, *cuts], [*cuts, len(data)], strict=True):
            if data[start:end]:
                connection.data_received(data[start:end])
        for number in range(5):
            if not at_once:
                site.peers[number].reply()
        assert [peer.head.target for peer in site.peers] == [b"/", b"/2", b"/", b"/4", b"/5"]
        assert [peer.body for peer in site.peers] == [b"", b"hello\r\n\r", b"\r\n\r\nend", b"ok", b""]
        assert [peer.frames[-1] for peer in site.peers] == [End(), End([(b"a", b"b")]), End(), End(), End()]
        assert transport.written.count(b"HTTP/1.1 200 OK\r\n") == 5
        assert len(site.done) == 5
        assert not transport.closed


async def test_a_body_that_goes_wrong_is_cut_off_and_answered() -> None:
    with edge() as site:
        connection, transport = site.connect()
        connection.data_received(get(method=b"PUT", fields=b"Transfer-Encoding: chunked\r\n") + b"1\r\nx\r\n")
        connection.data_received(b"1\r\ny\r\nJUNK\r\n")
        assert site.peer.body == b"x"
        assert [error.code for error in site.peer.errors] == [ErrorCode.BAD_REQUEST]
        assert transport.written.startswith(b"HTTP/1.1 400 Bad Request\r\n")
        assert transport.eof
        assert [leg.status for leg in site.done] == [400]


async def test_a_body_that_goes_wrong_under_an_answer_is_cut_with_it() -> None:
    with edge() as site:
        connection, transport = site.connect()
        connection.data_received(get(method=b"PUT", fields=b"Transfer-Encoding: chunked\r\n"))
        site.peer.answer(ResponseHead(200, []), Data(b"so far"))
        await asyncio.sleep(0)
        connection.data_received(b"JUNK\r\n")
        assert transport.aborted
        assert not transport.written.endswith(b"0\r\n\r\n")
        assert [error.code for error in site.peer.errors] == [ErrorCode.BAD_REQUEST]


# Answers

FRAMING = [
    # method, version, status, fields, body; then what follows the date, what follows the head, and whether kept alive
    (b"GET", b"1.1", 200, [(b"content-length", b"2")], b"ok", b"content-length: 2\r\n", b"ok", True),
    (b"GET", b"1.1", 200, [(b"content-length", b"0")], b"", b"content-length: 0\r\n", b"", True),
    (b"GET", b"1.1", 200, [], b"ok", b"transfer-encoding: chunked\r\n", b"2\r\nok\r\n0\r\n\r\n", True),
    (b"GET", b"1.1", 200, [], b"", b"transfer-encoding: chunked\r\n", b"0\r\n\r\n", True),
    (b"GET", b"1.0", 200, [(b"content-length", b"1")], b"x",
     b"content-length: 1\r\nconnection: close\r\n", b"x", False),
    (b"GET", b"1.0", 200, [], b"ok", b"connection: close\r\n", b"ok", False),
    (b"HEAD", b"1.1", 200, [(b"content-length", b"2")], b"", b"content-length: 2\r\n", b"", True),
    (b"HEAD", b"1.1", 200, [], b"", b"", b"", True),
    (b"HEAD", b"1.0", 200, [], b"", b"connection: close\r\n", b"", False),
    (b"GET", b"1.1", 204, [(b"content-length", b"0")], b"", b"", b"", True),
    (b"GET", b"1.1", 204, [], b"", b"", b"", True),
    (b"GET", b"1.1", 304, [(b"content-length", b"9")], b"", b"content-length: 9\r\n", b"", True),
    (b"GET", b"1.1", 304, [], b"", b"", b"", True),
    (b"GET", b"1.1", 205, [], b"", b"content-length: 0\r\n", b"", True),
    (b"GET", b"1.1", 205, [(b"content-length", b"0")], b"", b"content-length: 0\r\n", b"", True),
    (b"GET", b"1.1", 404, [], b"no", b"transfer-encoding: chunked\r\n", b"2\r\nno\r\n0\r\n\r\n", True),
    (b"GET", b"1.1", 799, [(b"content-length", b"1")], b"?", b"content-length: 1\r\n", b"?", True),
    # what was hop-by-hop for the backend's connection says nothing about this one
    (
        b"GET",
        b"1.1",
        200,
        [(b"transfer-encoding", b"chunked"), (b"connection", b"close, x"), (b"x", b"1"), (b"y", b"2")],
        b"ok",
        b"y: 2\r\ntransfer-encoding: chunked\r\n",
        b"2\r\nok\r\n0\r\n\r\n",
        True,
    ),
    (b"GET", b"1.1", 200, [(b"set-cookie", b"a"), (b"set-cookie", b"b"), (b"content-length", b"0")], b"",
     b"set-cookie: a\r\nset-cookie: b\r\ncontent-length: 0\r\n", b"", True),
]  # fmt: skip


@pytest.mark.parametrize(("method", "version", "status", "fields", "body", "head", "content", "kept"), FRAMING)
async def test_an_answer_is_framed_for_its_visitor(
    method: bytes, version: bytes, status: int, fields: Fields, body: bytes, head: bytes, content: bytes, kept: bool
) -> None:
    with edge() as site:
        connection, transport = site.connect()
        connection.data_received(get(method=method, version=version))
        data = [Data(body)] if body else []
        site.peer.answer(ResponseHead(status, [DATE, *fields]), *data, End())
        line, _, rest = transport.written.partition(b"\r\n")
        assert line.split(b" ")[:2] == [b"HTTP/1.1", b"%d" % status]
        assert rest == b"date: Thu, 01 Jan 2026 00:00:00 GMT\r\n" + head + b"\r\n" + content
        assert transport.closed is not kept
        assert len(transport.writes) == 1
        [leg] = site.done
        assert (leg.status, leg.bytes_out, leg.error) == (status, len(body), None)
        assert leg.over


@pytest.mark.parametrize(
    ("request_fields", "version", "kept", "said"),
    [
        (b"", b"1.1", True, b""),
        (b"Connection: close\r\n", b"1.1", False, b"connection: close\r\n"),
        (b"Connection: keep-alive\r\n", b"1.0", True, b"connection: keep-alive\r\n"),
        (b"", b"1.0", False, b"connection: close\r\n"),
    ],
)
async def test_a_connection_lives_on_if_its_visitor_wants(
    request_fields: bytes, version: bytes, kept: bool, said: bytes
) -> None:
    with edge() as site:
        connection, transport = site.connect()
        connection.data_received(get(fields=request_fields, version=version))
        site.peer.reply()
        assert transport.closed is not kept
        assert (b"connection: " in transport.written) is bool(said)
        assert said in transport.written


async def test_an_answer_without_a_date_gets_one() -> None:
    with edge() as site:
        connection, transport = site.connect()
        connection.data_received(GET)
        site.peer.answer(ResponseHead(200, []), End())
        assert transport.written.count(b"\r\ndate: ") == 1
        assert b" GMT\r\n" in transport.written


async def test_trailers_pass_to_a_chunked_answer_only() -> None:
    with edge() as site:
        connection, transport = site.connect()
        trailers = [(b"grpc-status", b"0"), (b"content-length", b"5"), (b"connection", b"x")]
        connection.data_received(GET)
        site.peer.answer(ResponseHead(200, []), Data(b"x"), End(trailers))
        assert transport.written.endswith(b"1\r\nx\r\n0\r\ngrpc-status: 0\r\n\r\n")
        connection.data_received(GET)
        site.peer.answer(ResponseHead(200, [(b"content-length", b"1")]), Data(b"x"), End(trailers))
        assert transport.written.endswith(b"\r\n\r\nx")


async def test_a_head_waits_for_its_body_one_turn_at_most() -> None:
    with edge() as site:
        connection, transport = site.connect()
        connection.data_received(GET)
        site.peer.answer(ResponseHead(200, []))
        assert transport.writes == []
        await asyncio.sleep(0)
        assert len(transport.writes) == 1
        site.peer.answer(Data(b"one"))
        await asyncio.sleep(0)
        site.peer.answer(Data(b"two"), Data(b"three"))
        await asyncio.sleep(0)
        assert transport.writes[1:] == [b"3\r\none\r\n", b"3\r\ntwo\r\n5\r\nthree\r\n"]


async def test_much_is_handed_to_the_transport_as_it_came_without_a_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    with edge() as site:
        connection, transport = site.connect()
        connection.data_received(GET)
        handed: list[object] = []
        monkeypatch.setattr(transport, "writelines", handed.extend)
        data = b"x" * 70000
        site.peer.answer(ResponseHead(200, [(b"content-length", b"70000")]), Data(data), End())
        assert any(part is data for part in handed)


async def test_much_is_written_before_the_turn_is_over() -> None:
    with edge() as site:
        connection, transport = site.connect()
        connection.data_received(GET)
        site.peer.answer(ResponseHead(200, []), Data(b"x" * 70000))
        assert len(transport.writes) == 1


async def test_interim_answers_are_written_at_once() -> None:
    with edge() as site:
        connection, transport = site.connect()
        connection.data_received(get(method=b"PUT", fields=b"Content-Length: 1\r\nExpect: 100-continue\r\n"))
        assert (b"expect", b"100-continue") in site.peer.head.fields
        site.peer.answer(ResponseHead(100, []))
        site.peer.answer(ResponseHead(103, [(b"link", b"</a>"), (b"connection", b"x"), (b"content-length", b"3")]))
        assert transport.writes == [b"HTTP/1.1 100 Continue\r\n\r\n", b"HTTP/1.1 103 Early Hints\r\nlink: </a>\r\n\r\n"]
        connection.data_received(b"x")
        site.peer.reply()
        assert transport.written.endswith(b"ok")
        assert not transport.closed


async def test_an_old_visitor_gets_no_interim_answer() -> None:
    with edge() as site:
        connection, transport = site.connect()
        connection.data_received(get(version=b"1.0"))
        site.peer.answer(ResponseHead(100, []))
        assert transport.writes == []


SPLIT = b"a\r\n\r\nHTTP/1.1 200 OK"
BROKEN: list[list[ResponseHead | Data | End]] = [
    [ResponseHead(200, [(b"x", SPLIT)]), End()],
    [ResponseHead(200, [(b"x\r\ny", b"a")]), End()],
    [ResponseHead(200, [(b"", b"a")]), End()],
    [ResponseHead(200, [(b"Content-Length", b"5")]), End()],
    [ResponseHead(200, [(b"Transfer-Encoding", b"chunked")]), End()],
    [ResponseHead(200, [(b"x", b"a\x00")]), End()],
    [ResponseHead(103, [(b"x", SPLIT)])],
    [ResponseHead(101, [(b"upgrade", b"websocket")])],
    [ResponseHead(200, [(b"content-length", b"5"), (b"content-length", b"5")])],
    [ResponseHead(200, [(b"content-length", b"+5")])],
    [ResponseHead(200, [(b"content-length", b"5,5")])],
    [ResponseHead(200, [(b"content-length", b"1")]), Data(b"xy")],
    [ResponseHead(200, [(b"content-length", b"1")]), End()],
    [ResponseHead(204, []), Data(b"x")],
    [ResponseHead(205, []), Data(b"x")],
    [ResponseHead(304, []), Data(b"x")],
    [ResponseHead(200, []), ResponseHead(200, [])],
    [ResponseHead(200, []), ResponseHead(103, [])],
    [ResponseHead(200, []), End([(b"x", SPLIT)])],
    [Data(b"x")],
    [End()],
]


@pytest.mark.parametrize("frames", BROKEN, ids=repr)
async def test_an_answer_that_breaks_http_is_refused(frames: list[ResponseHead | Data | End]) -> None:
    with edge() as site:
        connection, transport = site.connect()
        connection.data_received(GET)
        peer = site.peer
        for frame in frames:
            peer.peer.receive(frame)
        assert transport.written.startswith(b"HTTP/1.1 502 Bad Gateway\r\n")
        assert b"proxy-status: quictunnel; error=http_protocol_error" in transport.written
        assert SPLIT not in transport.written
        assert [error.code for error in peer.errors] == [ErrorCode.HTTP_PROTOCOL_ERROR]
        assert [leg.status for leg in site.done] == [502]
        assert not transport.closed


@pytest.mark.parametrize(
    ("fields", "frame"),
    [
        ([(b"content-length", b"3")], Data(b"more")),
        ([(b"content-length", b"3")], End()),
        ([], ResponseHead(200, [])),
        ([], End([(b"x", SPLIT)])),
    ],
)
async def test_an_answer_that_breaks_http_late_is_cut(fields: Fields, frame: ResponseHead | Data | End) -> None:
    with edge() as site:
        connection, transport = site.connect()
        connection.data_received(GET)
        peer = site.peer
        peer.answer(ResponseHead(200, fields), Data(b"x"))
        await asyncio.sleep(0)
        before = transport.written
        peer.peer.receive(frame)
        assert transport.aborted
        assert transport.written == before
        assert [error.code for error in peer.errors] == [ErrorCode.HTTP_PROTOCOL_ERROR]
        assert [leg.error is not None for leg in site.done] == [True]


async def test_what_is_shown_in_logs_says_what_it_is() -> None:
    with edge() as site:
        connection, _ = site.connect()
        assert "idle" in repr(connection)
        connection.data_received(get(b"/x"))
        assert "busy" in repr(connection)
        assert "/x" in repr(site.legs[0])
        site.peer.reply()
        assert "over" in repr(site.legs[0])
        assert repr(site.listener) == "<VisitorListener 1 connections>"


async def test_a_stale_peer_does_no_harm() -> None:
    with edge() as site:
        connection, transport = site.connect()
        connection.data_received(GET)
        leg = site.legs[0]
        site.peer.reply()
        before = transport.written
        for frame in (ResponseHead(200, []), Data(b"x"), End()):
            leg.receive(frame)
        leg.pause()
        leg.resume()
        leg.abort(TunnelError(ErrorCode.CONNECTION_TERMINATED))
        assert transport.written == before
        assert transport.reading
        assert leg.peer is VOID
        assert len(site.done) == 1


# Early answers


async def test_an_answer_before_the_upload_ends_both_after_a_while_of_listening() -> None:
    with edge() as site:
        connection, transport = site.connect()
        connection.data_received(upload(10_000_000) + b"some")
        site.peer.reply(413)
        assert transport.written.startswith(b"HTTP/1.1 413 ")
        assert b"\r\nconnection: close\r\n" in transport.written
        assert transport.eof
        assert not transport.closed
        assert len(site.done) == 1
        frames = list(site.peer.frames)
        connection.data_received(b"x" * 1000)
        assert site.peer.frames == frames
        connection.data_received(b"x" * 2**20)
        assert transport.closed


async def test_listening_on_has_a_limit_in_time() -> None:
    with edge() as site:
        connection, transport = site.connect()
        connection.data_received(upload(10))
        site.peer.reply()
        assert connection.deadline < connection._loop.time() + 3
        transport.buffered = 10
        connection.expire(connection.deadline)
        assert not transport.closed, "the answer is still on its way"
        transport.buffered = 0
        connection.expire(connection.deadline)
        assert transport.closed


# Pipelining


async def test_pipelined_requests_are_answered_in_order() -> None:
    with edge() as site:
        connection, transport = site.connect()
        connection.data_received(get(b"/1") + get(b"/2") + upload(5) + b"hel")
        assert [peer.head.target for peer in site.peers] == [b"/1"]
        connection.data_received(b"lo" + get(b"/4"))
        site.peer.reply(body=b"one")
        site.peer.reply(body=b"two")
        assert site.peer.body == b"hello"
        site.peer.reply(body=b"three")
        site.peer.reply(body=b"four")
        bodies = [part.partition(b"\r\n\r\n")[2] for part in transport.written.split(b"HTTP/1.1 ")[1:]]
        assert bodies == [b"one", b"two", b"three", b"four"]


async def test_a_bad_request_in_a_pipeline_is_refused_in_its_turn() -> None:
    with edge() as site:
        connection, transport = site.connect()
        connection.data_received(GET + b"BAD\r\n\r\n" + GET)
        site.peer.reply()
        assert [part[:3] for part in transport.written.split(b"HTTP/1.1 ")] == [b"", b"200", b"400"]
        assert len(site.peers) == 1
        assert transport.eof


async def test_a_pipeline_without_end_is_not_read() -> None:
    with edge(head_size=1024) as site:
        connection, transport = site.connect()
        connection.data_received(GET * 50)
        assert not transport.reading
        for _ in range(50):
            site.peer.reply()
        assert len(site.done) == 50
        assert transport.reading


async def test_no_answer_is_begun_for_a_visitor_that_does_not_read() -> None:
    with edge() as site:
        connection, _transport = site.connect()
        connection.data_received(GET * 3)
        connection.pause_writing()
        assert site.peer.paused
        site.peer.reply()
        assert len(site.peers) == 1
        connection.data_received(GET)
        assert len(site.peers) == 1
        connection.resume_writing()
        assert len(site.peers) == 2
        site.peer.reply()
        site.peer.reply()
        site.peer.reply()
        assert len(site.done) == 4


async def test_what_follows_a_last_request_is_not_read_as_one() -> None:
    with edge() as site:
        connection, transport = site.connect()
        connection.data_received(get(fields=b"Connection: close\r\n") + GET)
        site.peer.reply()
        assert transport.eof
        assert len(site.peers) == 1


# Back-pressure


async def test_a_slow_peer_stops_the_reading_of_a_body() -> None:
    with edge() as site:
        connection, transport = site.connect()
        connection.data_received(upload(10))
        leg = site.legs[0]
        leg.pause()
        leg.pause()
        assert not transport.reading
        assert connection.deadline == float("inf"), "who is held back is not silent"
        leg.resume()
        assert transport.reading
        assert connection.deadline < LATER
        leg.pause()
        connection.data_received(b"0123456789")
        assert site.peer.body == b"0123456789"
        assert transport.reading, "with the body read, the visitor's leaving must be seen"


async def test_a_slow_visitor_pauses_the_peer() -> None:
    with edge() as site:
        connection, _ = site.connect()
        connection.data_received(GET)
        connection.pause_writing()
        assert site.peer.paused
        connection.resume_writing()
        assert not site.peer.paused


async def test_a_visitor_that_takes_nothing_is_cut_and_one_that_takes_little_is_not() -> None:
    with edge() as site:
        connection, transport = site.connect()
        connection.data_received(GET)
        site.peer.answer(ResponseHead(200, []), Data(b"x" * 100_000))
        transport.buffered = 100_000
        connection.pause_writing()
        transport.buffered = 99_999
        connection.expire(connection.write_deadline)
        assert not transport.closed
        connection.expire(connection.write_deadline)
        assert transport.aborted
        await asyncio.sleep(0)
        assert [error.code for error in site.peer.errors] == [ErrorCode.CANCELLED]


# Visitors that go away


@pytest.mark.parametrize("phase", ["head", "upload", "answer", "opaque"])
async def test_a_visitor_that_is_gone_is_known_at_once(phase: str) -> None:
    with edge() as site:
        connection, _ = site.connect()
        connection.data_received({"upload": upload(9) + b"x", "opaque": UPGRADE}.get(phase, GET))
        if phase == "answer":
            site.peer.answer(ResponseHead(200, []), Data(b"x"))
        if phase == "opaque":
            site.peer.answer(SWITCH)
        connection.connection_lost(ConnectionResetError())
        assert [error.code for error in site.peer.errors] == [ErrorCode.CANCELLED]
        [leg] = site.done
        assert leg.error is not None
        assert leg.error.code is ErrorCode.CANCELLED
        assert leg.over
        assert len(site.listener) == 0
        assert site.listener.in_flight == 0
        site.peer.answer(Data(b"late"))


async def test_an_end_within_a_body_is_a_leaving() -> None:
    with edge() as site:
        connection, transport = site.connect()
        connection.data_received(upload(9) + b"x")
        assert not connection.eof_received()
        assert [error.code for error in site.peer.errors] == [ErrorCode.CANCELLED]
        assert not site.peer.ended
        assert transport.written == b""


async def test_an_end_after_the_request_is_no_leaving() -> None:
    with edge() as site:
        connection, transport = site.connect()
        connection.data_received(get(b"/1") + get(b"/2"))
        assert connection.eof_received()
        site.peer.reply(body=b"one")
        assert not transport.closed
        site.peer.reply(body=b"two")
        assert transport.written.endswith(b"connection: close\r\n\r\ntwo")
        assert transport.closed
        assert not transport.aborted


async def test_an_end_within_a_later_request_closes_after_the_answers() -> None:
    with edge() as site:
        connection, transport = site.connect()
        connection.data_received(GET + b"GET / HT")
        assert connection.eof_received()
        site.peer.reply()
        assert transport.written.endswith(b"ok")
        assert transport.closed
        assert len(site.peers) == 1


async def test_each_of_a_half_closed_visitors_requests_is_looked_after() -> None:
    with edge() as site:
        connection, transport = site.connect()
        connection.data_received(GET * 2)
        connection.eof_received()
        site.peer.reply()
        look(connection)
        assert transport.written.endswith(b"HTTP/1.1 100 Continue\r\n\r\n")
        transport.socket.error = 32
        look(connection)
        assert transport.aborted


@pytest.mark.parametrize("data", [b"", b"GET / HT", b"\r\n"])
async def test_an_end_between_requests_closes(data: bytes) -> None:
    with edge() as site:
        connection, transport = site.connect()
        if data:
            connection.data_received(data)
        assert not connection.eof_received()
        assert transport.written == b""


async def test_a_half_closed_visitor_that_is_gone_shows_itself() -> None:
    with edge() as site:
        connection, transport = site.connect()
        connection.data_received(GET)
        connection.eof_received()
        look(connection)
        assert transport.writes == [b"HTTP/1.1 100 Continue\r\n\r\n"]
        look(connection)
        assert len(transport.writes) == 1
        transport.socket.error = 32
        look(connection)
        assert transport.aborted
        await asyncio.sleep(0)
        assert [error.code for error in site.peer.errors] == [ErrorCode.CANCELLED]


async def test_a_half_closed_visitor_that_is_gone_shows_itself_within_a_chunked_answer() -> None:
    with edge() as site:
        connection, transport = site.connect()
        connection.data_received(GET)
        site.peer.answer(ResponseHead(200, []), Data(b"one"))
        connection.eof_received()
        look(connection)
        look(connection)
        site.peer.answer(Data(b"two"), End())
        assert transport.written.endswith(b"\r\n\r\n3\r\none\r\n03\r\ntwo\r\n0\r\n\r\n")
        assert transport.closed


@pytest.mark.parametrize(("version", "fields"), [(b"1.0", []), (b"1.1", [(b"content-length", b"9")])])
async def test_a_half_closed_visitor_gets_no_byte_that_it_could_mistake(version: bytes, fields: Fields) -> None:
    with edge() as site:
        connection, transport = site.connect()
        connection.data_received(get(version=version))
        if fields:
            site.peer.answer(ResponseHead(200, fields))
            await asyncio.sleep(0)
        before = transport.written
        connection.eof_received()
        look(connection)
        assert transport.written == before


async def test_a_reset_is_looked_for_while_nothing_is_read() -> None:
    with edge() as site:
        connection, transport = site.connect()
        connection.data_received(upload(10))
        site.legs[0].pause()
        connection.look_if_held()
        assert not transport.closed
        transport.socket.error = 104
        connection.look_if_held()
        assert transport.aborted


# Upgrades


async def test_an_upgrade_passes_bytes_both_ways() -> None:
    with edge() as site:
        connection, transport = site.connect()
        connection.data_received(UPGRADE + b"early")
        head = site.peer.head
        assert (head.protocol, head.body) == (b"websocket", True)
        assert (b"sec-websocket-key", b"x") in head.fields
        assert not {b"upgrade", b"connection"} & dict(head.fields).keys()
        assert len(site.peer.frames) == 1
        site.peer.answer(SWITCH)
        assert transport.written == SWITCHED
        connection.data_received(b"GET / HTTP/1.1\n\n\x00")
        assert site.peer.frames[1:] == [Data(b"early"), Data(b"GET / HTTP/1.1\n\n\x00")]
        site.peer.answer(Data(b"down"))
        await asyncio.sleep(0)
        assert transport.written == SWITCHED + b"down"
        assert connection.deadline == float("inf")
        leg = site.legs[0]
        assert (leg.status, leg.bytes_in, leg.bytes_out) == (101, 22, 4)


async def test_half_closes_pass_after_an_upgrade_and_the_second_one_ends_it() -> None:
    with edge() as site:
        connection, transport = site.connect()
        connection.data_received(UPGRADE)
        site.peer.answer(SWITCH)
        assert connection.eof_received()
        assert site.peer.ended
        site.peer.answer(Data(b"last"), End())
        assert transport.written == SWITCHED + b"last"
        assert transport.closed
        assert not transport.aborted
        assert len(site.done) == 1

        connection, transport = site.connect()
        connection.data_received(UPGRADE)
        site.peer.answer(SWITCH, Data(b"last"), End())
        assert transport.written == SWITCHED + b"last"
        assert transport.eof
        assert not transport.closed
        connection.data_received(b"still")
        assert site.peer.body == b"still"
        assert not connection.eof_received()
        assert site.peer.ended
        assert len(site.done) == 2


async def test_bytes_and_a_half_close_before_the_switch_are_passed_on_after_it() -> None:
    with edge() as site:
        connection, transport = site.connect()
        connection.data_received(UPGRADE)
        connection.data_received(b"early")
        assert connection.eof_received()
        assert len(site.peer.frames) == 1
        site.peer.answer(SWITCH)
        assert site.peer.frames[1:] == [Data(b"early"), End()]
        assert not transport.closed
        site.peer.answer(End())
        assert transport.closed
        assert not transport.aborted


async def test_a_half_closed_upgrade_may_not_be_silent_for_ever() -> None:
    with edge() as site:
        connection, transport = site.connect()
        connection.data_received(UPGRADE)
        site.peer.answer(SWITCH, End())
        connection.data_received(b"x")
        connection.expire(connection.deadline)
        assert not transport.closed
        connection.expire(connection.deadline)
        assert transport.aborted
        assert len(site.peer.errors) == 1


async def test_an_upgrade_ends_as_a_whole_over_tls() -> None:
    with edge() as site:
        connection, transport = site.connect(tls=True)
        connection.data_received(UPGRADE)
        site.peer.answer(SWITCH, End())
        assert site.peer.ended
        assert transport.closed
        assert not site.peer.errors


async def test_an_upgrade_that_is_refused_goes_on_as_http() -> None:
    with edge() as site:
        connection, transport = site.connect()
        connection.data_received(UPGRADE + get(b"/next"))
        first = site.peer
        first.reply(403, b"no")
        assert [type(frame) for frame in first.frames] == [RequestHead, End]
        assert transport.written.endswith(b"no")
        assert site.peer.head.target == b"/next"


async def test_an_upgrade_holds_the_visitor_back_while_the_peer_is_slow() -> None:
    with edge() as site:
        connection, transport = site.connect()
        connection.data_received(UPGRADE)
        site.peer.answer(SWITCH)
        site.legs[0].pause()
        assert not transport.reading
        site.legs[0].resume()
        assert transport.reading


@pytest.mark.parametrize(
    "agreed", [[], [(b"upgrade", b"other")], [(b"upgrade", b"websocket, h2c")], [(b"upgrade", b"")]]
)
async def test_a_switch_to_what_was_not_asked_for_is_refused(agreed: Fields) -> None:
    with edge() as site:
        connection, transport = site.connect()
        connection.data_received(UPGRADE)
        site.peer.answer(ResponseHead(101, agreed))
        assert transport.written.startswith(b"HTTP/1.1 502 ")


async def test_a_failed_upgrade_is_a_reset() -> None:
    with edge() as site:
        connection, transport = site.connect()
        connection.data_received(UPGRADE)
        site.peer.answer(SWITCH)
        site.legs[0].abort(TunnelError(ErrorCode.CONNECTION_TERMINATED))
        assert transport.aborted
        assert transport.socket.options


# Errors


@pytest.mark.parametrize("code", list(ErrorCode))
async def test_every_error_has_its_answer(code: ErrorCode) -> None:
    error = TunnelError(code)
    with edge() as site:
        site.refusal = error
        connection, transport = site.connect()
        connection.data_received(GET)
        head, _, body = transport.written.partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 %d " % error.fault.status)
        assert b"\r\nproxy-status: quictunnel; error=%b; details=" % error.fault.proxy_status.encode() in head
        assert (b"\r\nretry-after: " in head) is (error.fault.retry_after is not None)
        assert b"\r\ncontent-length: %d\r\n" % len(body) in head
        [leg] = site.done
        assert (leg.status, leg.error, leg.bytes_out) == (error.fault.status, error, len(body))
        assert not transport.closed
        site.refusal = None
        connection.data_received(GET)
        site.peer.reply()
        assert transport.written.endswith(b"ok")


@pytest.mark.parametrize(
    ("accept", "kind", "shown"),
    [
        (b"", b"text/plain; charset=utf-8", b"404 Not Found\n\n"),
        (b"Accept: */*\r\n", b"text/plain; charset=utf-8", b'"quoted"'),
        (b"Accept: text/html,*/*;q=0.8\r\n", b"text/html; charset=utf-8", b"&lt;b&gt;&quot;quoted&quot;"),
        (b"Accept: application/json\r\n", b"application/problem+json", rb'"detail": "<b>\"quoted\" \\ ??"'),
        (b"Accept: Application/Problem+JSON\r\n", b"application/problem+json", b'"status": 404'),
    ],
)
async def test_an_error_is_told_in_the_visitors_language(accept: bytes, kind: bytes, shown: bytes) -> None:
    with edge() as site:
        site.refusal = TunnelError(ErrorCode.DESTINATION_NOT_FOUND, '<b>"quoted" \\ \xe9\n')
        connection, transport = site.connect()
        connection.data_received(get(fields=accept))
        head, _, body = transport.written.partition(b"\r\n\r\n")
        assert b"\r\ncontent-type: %b\r\n" % kind in head
        assert shown in body
        assert rb'details="<b>\"quoted\" \\ ??"' in head


async def test_an_error_has_no_body_for_head() -> None:
    with edge() as site:
        site.refusal = TunnelError(ErrorCode.DESTINATION_NOT_FOUND)
        connection, transport = site.connect()
        connection.data_received(get(method=b"HEAD"))
        assert transport.written.endswith(b"\r\n\r\n")
        assert b"content-length: 0" not in transport.written


async def test_an_error_before_the_whole_request_closes_gently() -> None:
    with edge() as site:
        site.refusal = TunnelError(ErrorCode.DESTINATION_NOT_FOUND)
        connection, transport = site.connect()
        connection.data_received(upload(10) + b"x")
        assert b"\r\nconnection: close\r\n" in transport.written
        assert transport.eof
        assert not transport.closed


async def test_an_error_replaces_a_head_that_has_not_gone_out() -> None:
    with edge() as site:
        connection, transport = site.connect()
        connection.data_received(GET)
        site.peer.answer(ResponseHead(200, []), Data(b"x"))
        site.legs[0].abort(TunnelError(ErrorCode.CONNECTION_TERMINATED))
        assert transport.written.startswith(b"HTTP/1.1 502 ")
        assert b"200 OK" not in transport.written


@pytest.mark.parametrize(
    ("version", "fields", "reset"),
    [(b"1.1", [], False), (b"1.1", [(b"content-length", b"9")], False), (b"1.0", [], True)],
)
async def test_an_error_after_the_head_cuts(version: bytes, fields: Fields, reset: bool) -> None:
    with edge() as site:
        connection, transport = site.connect()
        connection.data_received(get(version=version))
        site.peer.answer(ResponseHead(200, fields), Data(b"x"))
        await asyncio.sleep(0)
        before = transport.written
        site.legs[0].abort(TunnelError(ErrorCode.CONNECTION_TERMINATED))
        assert transport.aborted
        assert transport.written == before
        assert bool(transport.socket.options) is reset
        assert not site.peer.errors, "who aborted need not be told"
        [leg] = site.done
        assert leg.status == 200
        assert leg.error is not None


# Time


async def test_a_silent_connection_is_closed_without_a_word() -> None:
    with edge(head_time=5.0) as site:
        connection, transport = site.connect()
        assert 4 < connection.deadline - connection._loop.time() <= 5
        connection.expire(connection.deadline)
        assert transport.closed
        assert transport.written == b""


async def test_a_slow_head_is_answered_408() -> None:
    with edge(head_time=5.0) as site:
        connection, transport = site.connect()
        connection.data_received(b"GET / HT")
        deadline = connection.deadline
        connection.data_received(b"T")
        assert connection.deadline == deadline, "bytes one by one win no time"
        connection.expire(connection.deadline)
        assert transport.written.startswith(b"HTTP/1.1 408 ")
        assert transport.eof


async def test_an_idle_connection_is_closed_without_a_word() -> None:
    with edge(idle_time=7.0) as site:
        connection, transport = site.connect()
        connection.data_received(GET)
        assert connection.deadline == float("inf"), "a backend may take its time"
        site.peer.reply()
        assert 6 < connection.deadline - connection._loop.time() <= 7
        before = transport.written
        connection.expire(connection.deadline)
        assert transport.closed
        assert transport.written == before


async def test_an_upload_that_stops_is_answered_408() -> None:
    with edge(body_idle_time=7.0) as site:
        connection, transport = site.connect()
        connection.data_received(upload(10))
        assert 6 < connection.deadline - connection._loop.time() <= 7
        connection.expire(connection.deadline)
        assert transport.written.startswith(b"HTTP/1.1 408 ")
        assert [error.code for error in site.peer.errors] == [ErrorCode.REQUEST_TIMEOUT]


async def test_an_upload_that_waits_for_the_answer_to_go_on_is_not_cut() -> None:
    with edge(body_idle_time=7.0) as site:
        connection, transport = site.connect()
        connection.data_received(upload(10))
        site.peer.peer.receive(ResponseHead(200, []))
        for _ in range(3):
            site.peer.peer.receive(Data(b"part"))
            connection.expire(connection.deadline)
            assert not transport.closed
            assert not site.peer.errors
        connection.expire(connection.deadline)
        assert [error.code for error in site.peer.errors] == [ErrorCode.REQUEST_TIMEOUT]


async def test_a_connection_has_an_idle_limit_after_an_answer_within_its_last_bytes() -> None:
    with edge() as site:
        site.on_open = lambda peer: setattr(peer, "on_frame", lambda frame: isinstance(frame, Data) and peer.reply())
        connection, transport = site.connect()
        connection.data_received(upload(5) + b"hello")
        assert transport.written.endswith(b"ok")
        assert not transport.closed
        assert connection.deadline < LATER


# Many connections


async def test_connections_beyond_the_limit_are_told() -> None:
    with edge(connections=2) as site:
        kept = [site.connect() for _ in range(2)]
        _, transport = site.connect()
        assert transport.written.startswith(b"HTTP/1.1 503 ")
        assert b"error=connection_limit_reached" in transport.written
        assert transport.eof
        for connection, _ in kept:
            connection.data_received(GET)
            site.peer.reply()
        for _ in range(300):
            _, transport = site.connect()
        assert transport.aborted


async def test_a_drain_lets_each_connection_have_one_more_answer_and_says_that_it_is_the_last() -> None:
    with edge() as site:
        idle, idle_transport = site.connect()
        idle.data_received(GET)
        site.peer.reply()
        busy, busy_transport = site.connect()
        busy.data_received(GET)
        begun, begun_transport = site.connect()
        begun.data_received(b"GET / HT")
        site.listener.drain()
        site.peer.reply()
        assert busy_transport.written.endswith(b"connection: close\r\n\r\nok")
        assert busy_transport.closed
        begun.data_received(b"TP/1.1\r\nHost: a\r\n\r\n")
        site.peer.reply()
        assert begun_transport.closed
        assert not idle_transport.closed
        idle.data_received(GET)  # it was on its way
        site.peer.reply()
        assert idle_transport.written.endswith(b"connection: close\r\n\r\nok")
        assert idle_transport.closed
        assert await site.listener.wait_idle(1.0)


async def test_connections_that_stay_idle_are_closed_soon_after_a_drain() -> None:
    with edge() as site:
        old, old_transport = site.connect()
        old.data_received(GET)
        site.peer.reply()
        site.listener.drain()
        new, new_transport = site.connect()
        now = asyncio.get_running_loop().time()
        for connection, transport in ((old, old_transport), (new, new_transport)):
            assert now + 1.5 < connection.deadline <= now + 2.0
            connection.expire(connection.deadline)
            assert transport.closed


async def test_an_answer_that_promised_more_before_a_drain_is_followed_by_it() -> None:
    with edge() as site:
        connection, transport = site.connect()
        connection.data_received(GET)
        site.peer.answer(ResponseHead(200, [DATE, (b"content-length", b"2")]))
        await asyncio.sleep(0)
        site.listener.drain()
        site.peer.answer(Data(b"ok"), End())
        assert b"connection: close" not in transport.written
        assert not transport.closed
        connection.data_received(GET)
        site.peer.reply()
        assert transport.written.endswith(b"connection: close\r\n\r\nok")
        assert transport.closed


async def test_requests_that_were_pipelined_before_a_drain_are_all_answered() -> None:
    with edge() as site:
        connection, transport = site.connect()
        connection.data_received(3 * GET)
        site.listener.drain()
        for _ in range(3):
            site.peer.reply()
        assert transport.written.count(b"HTTP/1.1 200 ") == 3
        assert transport.written.count(b"connection: close") == 1
        assert transport.written.endswith(b"connection: close\r\n\r\nok")
        assert transport.closed


async def test_a_close_cuts_what_is_left() -> None:
    with edge() as site:
        connection, transport = site.connect()
        connection.data_received(GET)
        site.listener.drain()
        assert not await site.listener.wait_idle(0.01)
        assert site.listener.in_flight == 1
        site.listener.close()
        assert await site.listener.wait_idle(1.0)
        assert transport.aborted
        assert len(site.peer.errors) == 1
        assert site.listener.in_flight == 0


# Real sockets


@asynccontextmanager
async def serving(**limits: float) -> AsyncIterator[tuple[Edge, int]]:
    with edge(**limits) as site:
        [(_, port)] = await site.listener.start("127.0.0.1", 0)
        yield site, port
        site.listener.close()
        assert await site.listener.wait_idle(1.0)


async def until(condition: object) -> float:
    """Seconds until ``condition()`` holds."""
    assert callable(condition)
    start = time.monotonic()
    while not condition():
        assert time.monotonic() - start < 5
        await asyncio.sleep(0.002)
    return time.monotonic() - start


async def test_a_request_over_a_socket() -> None:
    async with serving() as (site, port):
        site.on_open = lambda peer: setattr(peer, "on_frame", lambda frame: isinstance(frame, End) and peer.reply())
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(GET + get(fields=b"Connection: close\r\n"))
        assert (await reader.read()).count(b"ok") == 2
        writer.close()
        await writer.wait_closed()
        assert site.legs[0].client_address == "127.0.0.1"


@pytest.mark.parametrize("reset", [False, True])
@pytest.mark.parametrize("phase", ["head", "upload", "answer", "opaque"])
async def test_a_visitor_that_closes_is_known_within_a_tenth_of_a_second(phase: str, reset: bool) -> None:
    async with serving() as (site, port):
        _, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write({"upload": upload(9) + b"x", "opaque": UPGRADE}.get(phase, GET))
        await until(lambda: site.peers)
        if phase == "answer":
            site.peer.answer(ResponseHead(200, []), Data(b"x"))
        if phase == "opaque":
            site.peer.answer(SWITCH)
        await asyncio.sleep(0)
        if reset:
            writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        writer.transport.abort()
        if phase == "opaque":
            await until(lambda: site.peer.ended or site.peer.errors)
        else:
            assert await until(lambda: site.peer.errors) < 0.1
            assert site.peer.errors[0].code is ErrorCode.CANCELLED
            await until(lambda: len(site.listener) == 0)


@pytest.mark.parametrize("reset", [False, True])
@pytest.mark.parametrize("kind", ["length", "chunked", "opaque"])
async def test_a_visitor_that_closes_while_its_upload_is_held_back_is_known(kind: str, reset: bool) -> None:
    async with serving() as (site, port):
        site.on_open = lambda peer: peer.peer.pause()
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        chunked = get(method=b"PUT", fields=b"Transfer-Encoding: chunked\r\n")
        writer.write({"length": upload(9_000_000), "chunked": chunked, "opaque": UPGRADE}[kind])
        await until(lambda: site.peers)
        if kind == "opaque":
            site.peer.answer(SWITCH)
            site.legs[0].pause()
            await reader.readuntil(b"\r\n\r\n")  # what is unread when it closes would make that a reset
        [connection] = site.listener._connections
        assert not connection.is_reading
        writer.write(b"5\r\nhello\r\n")
        if reset:
            writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        writer.transport.abort()
        if kind == "opaque" and not reset:
            await until(lambda: site.peer.ended)
            assert site.peer.body == b"5\r\nhello\r\n"
        else:
            assert await until(lambda: site.peer.errors) < 0.1
            assert site.peer.errors[0].code is ErrorCode.CANCELLED
            await until(lambda: len(site.listener) == 0)
            assert len(site.listener.end_watch) == 0


async def test_a_visitor_that_half_closes_a_whole_upload_that_is_held_back_gets_its_answer() -> None:
    async with serving() as (site, port):
        site.on_open = lambda peer: peer.peer.pause()
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(upload(50_000))
        await until(lambda: site.peers)
        writer.write(b"x" * 50_000)
        writer.write_eof()
        await until(lambda: site.peer.ended)
        site.peer.reply()
        assert (await reader.read()).endswith(b"ok")
        writer.close()


async def test_a_visitor_whose_pipeline_is_too_long_to_be_read_is_known_to_have_gone() -> None:
    async with serving(head_size=2048) as (site, port):
        _, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(GET * 200)
        await until(lambda: site.peers and not next(iter(site.listener._connections)).is_reading)
        writer.transport.abort()
        await until(lambda: site.peers[0].errors)
        await until(lambda: len(site.listener) == 0)


async def test_a_half_closed_visitor_that_goes_later_is_known_when_something_is_sent_to_it() -> None:
    async with serving() as (site, port):
        _, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(GET)
        writer.write_eof()
        await until(lambda: site.peers)
        site.peer.answer(ResponseHead(200, [(b"content-length", b"9")]), Data(b"a"))
        await asyncio.sleep(0.1)
        assert not site.peer.errors
        writer.transport.abort()
        await asyncio.sleep(0.01)
        site.peer.answer(Data(b"b"))
        assert await until(lambda: site.peer.errors) < 0.1
        await until(lambda: len(site.listener) == 0)


@pytest.mark.parametrize("kind", ["upload", "opaque"])
async def test_a_reset_that_has_not_been_read_yet_is_nobody_elses_failure(kind: str) -> None:
    # What the legs of others are told in the same turn must still reach them.
    with edge() as site:
        connection, transport = site.connect()
        transport.reset = True
        connection.data_received(UPGRADE if kind == "opaque" else upload(10))
        if kind == "opaque":
            site.peer.answer(SWITCH, End())
        else:
            site.legs[0].abort(TunnelError(ErrorCode.CONNECTION_TERMINATED))
        assert transport.aborted
        await asyncio.sleep(0)
        assert len(site.done) == 1
        assert len(site.listener) == 0


async def test_a_visitor_that_half_closes_gets_its_answer() -> None:
    async with serving() as (site, port):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(GET)
        writer.write_eof()
        await until(lambda: site.peers)
        site.peer.reply()
        answer = await reader.read()
        assert answer.startswith(b"HTTP/1.1 200 OK")
        assert answer.endswith(b"ok")
        writer.close()


async def test_an_answer_survives_an_upload_that_goes_on() -> None:
    async with serving() as (site, port):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(upload(400_000))
        await until(lambda: site.peers)
        site.peer.reply(413, b"too much")
        writer.write(b"x" * 400_000)
        assert (await reader.read()).endswith(b"too much")
        writer.close()


async def test_a_cut_close_delimited_answer_is_a_reset() -> None:
    async with serving() as (site, port):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(get(version=b"1.0"))
        await until(lambda: site.peers)
        site.peer.answer(ResponseHead(200, []), Data(b"part"))
        assert (await reader.readuntil(b"part")).startswith(b"HTTP/1.1 200")
        site.legs[0].abort(TunnelError(ErrorCode.CONNECTION_TERMINATED))
        with pytest.raises(ConnectionResetError):
            await reader.read()
        writer.close()


async def test_slow_heads_are_swept_away() -> None:
    async with serving(head_time=0.1) as (_, port):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"GET / HT")
        assert (await reader.read()).startswith(b"HTTP/1.1 408 ")
        writer.close()


async def test_a_taken_port_is_an_error() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken, edge() as site, pytest.raises(OSError, match="in use"):
        await site.listener.start("127.0.0.1", taken.getsockname()[1])
