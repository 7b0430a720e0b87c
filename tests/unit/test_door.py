"""What a visitor may send: a table of requests, each with its answer and with exactly what the other leg saw."""

from typing import NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quictunnel.http.door import DoorParser, Request
from quictunnel.http.limits import VisitorLimits
from quictunnel.wire.errors import ErrorCode, TunnelError
from quictunnel.wire.frames import Fields
from tests.support.visitors import edge

HOST = b"Host: a\r\n"


class Refused(NamedTuple):
    """Bytes that get an error and a close, and that nobody behind the door ever sees."""

    data: bytes
    status: int = 400


def get(fields: bytes) -> Refused:
    return Refused(b"GET / HTTP/1.1\r\n" + HOST + fields + b"\r\n\r\n")


def line(start: bytes, status: int = 400) -> Refused:
    return Refused(start + b"\r\n" + HOST + b"\r\n", status)


def host(*values: bytes, version: bytes = b"1.1") -> Refused:
    return Refused(
        b"GET / HTTP/" + version + b"\r\n" + b"".join(b"Host:" + value + b"\r\n" for value in values) + b"\r\n"
    )


def body(fields: bytes, content: bytes = b"hello", version: bytes = b"1.1") -> Refused:
    return Refused(b"POST / HTTP/" + version + b"\r\n" + HOST + fields + b"\r\n\r\n" + content)


def length(value: bytes) -> Refused:
    return body(b"Content-Length:" + value)


def coding(value: bytes) -> Refused:
    return body(b"Transfer-Encoding:" + value, b"5\r\nhello\r\n0\r\n\r\n")


def chunks(content: bytes) -> Refused:
    return body(b"Transfer-Encoding: chunked", content)


REFUSED = [
    # the request line (RFC 9112 section 3)
    *map(line, [b"GET /", b"GET / HTTP/0.9", b"GET / HTTP/1.2", b"GET / HTTP/1.10", b"GET / HTTP/2.0"]),
    *map(line, [b"GET / HTTP/3"]),
    *map(line, [b"GET / http/1.1", b"GET / RTSP/1.0", b"SOURCE / ICE/1.0", b"GET / HTTP/1", b"GET / HTTP/11"]),
    *map(line, [b"GET / HTTP/+1.1"]),
    *map(line, [b"GET  / HTTP/1.1", b"GET /  HTTP/1.1", b"GET / HTTP/1.1 ", b" GET / HTTP/1.1", b"GET\t/ HTTP/1.1"]),
    *map(line, [b"GET /\tHTTP/1.1"]),
    *map(line, [b"GET /a b HTTP/1.1", b"GET /\x00 HTTP/1.1", b"GET /\x01 HTTP/1.1", b"GET /\x7f HTTP/1.1"]),
    *map(line, [b"GET /\x80 HTTP/1.1"]),
    *map(line, [b"GET /\xc3\xa9 HTTP/1.1", b"GET /#f HTTP/1.1", b"GET /?a#b HTTP/1.1", b"GET # HTTP/1.1"]),
    *map(line, [b"GET  HTTP/1.1", b"GET HTTP/1.1"]),
    *map(line, [b"G(T / HTTP/1.1", b"G\x00T / HTTP/1.1", b"G:T / HTTP/1.1", b"/ HTTP/1.1", b"GET / HTTP/1.1\rX: y"]),
    *map(line, [b"GET / HTTP/1.1\x0b"]),
    *map(line, [b"GET * HTTP/1.1", b"GET foo HTTP/1.1", b"GET a:80 HTTP/1.1", b"GET ?a HTTP/1.1"]),
    *map(line, [b"GET ../a HTTP/1.1", b"\x00GET / HTTP/1.1"]),
    *map(line, [b"GET ftp://a/ HTTP/1.1", b"GET http:///x HTTP/1.1", b"GET http:a HTTP/1.1"]),
    *map(line, [b"GET http://u@a/ HTTP/1.1"]),
    *map(line, [b"GET http://b/ HTTP/1.1", b"GET http://a:81/ HTTP/1.1", b"GET http://a,b/ HTTP/1.1"]),
    *map(line, [b"GET http://a/#f HTTP/1.1"]),
    *map(line, [b"PRI * HTTP/2.0", b"\xef\xbb\xbfGET / HTTP/1.1", b"GET /\r HTTP/1.1", b"HTTP/1.1 200 OK"]),
    line(b"GET https://a/ HTTP/1.1", 421),
    line(b"CONNECT / HTTP/1.1"),
    line(b"CONNECT a HTTP/1.1"),
    line(b"CONNECT http://a:80 HTTP/1.1"),
    line(b"CONNECT u@a:80 HTTP/1.1"),
    line(b"CONNECT a:80/x HTTP/1.1"),
    line(b"CONNECT other:80 HTTP/1.1"),
    Refused(b"CONNECT a:80 HTTP/1.1\r\nHost: a:81\r\n\r\n"),
    Refused(b"CONNECT a:80 HTTP/1.1\r\nHost: a:80\r\nContent-Length: 0\r\n\r\n"),
    Refused(b"CONNECT a:80 HTTP/1.1\r\nHost: a:80\r\nTransfer-Encoding: chunked\r\n\r\n"),
    line(b"GET /" + b"a" * 8192 + b" HTTP/1.1", 414),
    line(b"GET /" + b"a" * 70000 + b" HTTP/1.1", 414),
    Refused(b"TRACE / HTTP/1.1\r\nHost: a\r\nMax-Forwards: 0\r\n\r\n", 501),
    Refused(b"OPTIONS * HTTP/1.1\r\nHost: a\r\nMax-Forwards: x\r\n\r\n"),
    # line ends (RFC 9112 section 2.2)
    Refused(b"GET / HTTP/1.1\nHost: a\n\n"),
    Refused(b"GET / HTTP/1.1\nHost: a\r\n\r\n"),
    Refused(b"GET / HTTP/1.1\r\nHost: a\n\r\n"),
    Refused(b"GET / HTTP/1.1\r\nHost: a\r\n\n"),
    Refused(b"GET / HTTP/1.1\rHost: a\r\r"),
    Refused(b"\nGET / HTTP/1.1\r\nHost: a\r\n\r\n"),
    Refused(b"\r\n\nGET / HTTP/1.1\r\nHost: a\r\n\r\n"),
    Refused(b"\rGET / HTTP/1.1\r\nHost: a\r\n\r\n"),
    Refused(b"\r\n\r\n\r\nGET / HTTP/1.1\r\nHost: a\r\n\r\n"),
    Refused(b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03"),
    *map(get, [b"X: a\nY: b", b"X: a\rY: b", b"X: a\r\r\nY: b", b"X: a\n\rY: b"]),
    # fields (RFC 9112 section 5, RFC 9110 section 5.5)
    *map(get, [b"X: a\r\n fold", b"X: a\r\n\tfold", b" X: a", b"\tX: a", b"X : a", b"X\t: a", b": a", b" : a", b"X"]),
    *map(get, [b"X y: a"]),
    *map(get, [b"X(: a", b"X@: a", b"X/: a", b'X": a', b"X{: a", b"X\\: a", b"X;: a", b"X=: a", b"X[]: a"]),
    *map(get, [b"X\xc3\xa9: a"]),
    *map(get, [b"X\x00: a", b"X\x01: a", b"X\x0b: a", b"X\x7f: a"]),
    *map(get, [b"X: a\x00b", b"X: a\x01b", b"X: a\x08b", b"X: a\x0bb", b"X: a\x0cb", b"X: a\x1bb", b"X: a\x7fb"]),
    *map(get, [b"X: \x00"]),
    get(b"X-Tunnel-Session: a\r\nX-Tunnel-Session: b"),
    # Host (RFC 9112 section 3.2)
    Refused(b"GET / HTTP/1.1\r\n\r\n"),
    Refused(b"GET http://a/ HTTP/1.1\r\n\r\n"),
    *map(host, [b"", b" ", b" :80", b" a b", b" a,b", b" a/b", b" u@a", b" a:x", b" a:-1", b" a:99999", b" a:80:80"]),
    *map(host, [b" ..", b" a?b"]),
    *map(host, [b" a#b", b" a%20b", b" [::1", b" [::1]x", b" [zz]", b" ::1", b" a\\b", b' "a"', b" http://a"]),
    *map(host, [b" \xc3\xa9", b" a\tb"]),
    host(b" a", b" a"),
    host(b" a", b" b"),
    host(b" a", b" b", version=b"1.0"),
    host(b" a b", version=b"1.0"),
    # lengths (RFC 9112 section 6.3)
    *map(length, [b"+5", b" +5", b"-5", b"0x5", b"5,5", b" 5, 5", b" 5 5", b" 5.0", b" 5;", b' "5"', b" five", b" "]),
    *map(length, [b"", b" 5\x0b"]),
    *map(length, [b" 18446744073709551621", b" 18446744073709551615", b" 99999999999999999999999", b" 1e3", b" 5_0"]),
    *map(length, [b" \xb2"]),
    body(b"Content-Length: 5\r\nContent-Length: 5"),
    body(b"Content-Length: 5\r\nContent-Length: 6"),
    body(b"Content-Length: 5\r\nX: y\r\ncontent-length: 5"),
    # transfer codings (RFC 9112 section 6.1)
    *map(coding, [b" xchunked", b" chunkedx", b" chunked, identity", b" identity, chunked", b" gzip, chunked"]),
    *map(coding, [b" chunked, chunked"]),
    *map(coding, [b" identity", b" gzip", b" chunked;a", b" chunked,", b" ,chunked", b' "chunked"']),
    *map(coding, [b" chunked gzip", b" \x0bchunked"]),
    *map(coding, [b"", b" CHUNKEDX", b" ch unked", b" chunked\x0b", b" chunked\t,"]),
    *map(coding, [b" chunked\r\nTransfer-Encoding: chunked"]),
    *map(coding, [b" gzip\r\nTransfer-Encoding: chunked", b" chunked\r\nTransfer-Encoding: identity"]),
    coding(b" chunked\r\nContent-Length: 5"),
    body(b"Content-Length: 5\r\nTransfer-Encoding: chunked"),
    body(b"Content-Length: 5\r\nTransfer-Encoding: identity"),
    body(b"Transfer-Encoding: chunked", b"5\r\nhello\r\n0\r\n\r\n", version=b"1.0"),
    # chunks (RFC 9112 section 7.1)
    *map(chunks, [b"+5\r\nhello\r\n0\r\n\r\n", b"-5\r\nhello\r\n0\r\n\r\n", b"0x5\r\nhello\r\n0\r\n\r\n"]),
    *map(chunks, [b"5 \r\nhello\r\n0\r\n\r\n"]),
    *map(chunks, [b" 5\r\nhello\r\n0\r\n\r\n", b"5\t\r\nhello\r\n0\r\n\r\n", b"5_\r\nhello\r\n0\r\n\r\n"]),
    *map(chunks, [b"g\r\nhello\r\n0\r\n\r\n"]),
    *map(chunks, [b"\r\nhello\r\n0\r\n\r\n", b"5;\r\nhello\r\n0\r\n\r\n", b"5;a b\r\nhello\r\n0\r\n\r\n"]),
    *map(chunks, [b"5 ;a\r\nhello\r\n0\r\n\r\n"]),
    *map(chunks, [b"5;a\nb\r\nhello\r\n0\r\n\r\n", b"5;a\x00\r\nhello\r\n0\r\n\r\n", b"5;a\r\r\nhello\r\n0\r\n\r\n"]),
    *map(chunks, [b"5\nhello\n0\n\n"]),
    *map(chunks, [b"5\rhello\r\n0\r\n\r\n", b"5\r\nhello0\r\n\r\n", b"5\r\nhelloX\r\n0\r\n\r\n"]),
    *map(chunks, [b"5\r\nhello\n0\r\n\r\n"]),
    *map(chunks, [b"5\r\nhello\r0\r\n\r\n", b"10000000000000005\r\nhello\r\n0\r\n\r\n", b"5\r\nhell\r\n0\r\n\r\n"]),
    *map(chunks, [b"5,5\r\nhello\r\n"]),
    *map(chunks, [b"0\n\n", b"0\r\n\n", b"5\r\nhello\r\n0\r\nX: a\nb\r\n\r\n", b"0\r\nX : a\r\n\r\n"]),
    *map(chunks, [b"0\r\n fold\r\n\r\n"]),
    *map(chunks, [b"0\r\nX: a\r\n b\r\n\r\n", b"0\r\nX: a\x00b\r\n\r\n", b"0\r\nX(: a\r\n\r\n"]),
    *map(chunks, [b"0\r\nContent-Length: 5\r\n\r\n"]),
    *map(chunks, [b"0\r\nTransfer-Encoding: chunked\r\n\r\n", b"0\r\n: a\r\n\r\n", b"0\r\nX\r\n\r\n"]),
    *map(chunks, [b"0\rX\r\n\r\n"]),
    chunks(b"1;" + b"a" * 70000 + b"\r\nx\r\n0\r\n\r\n"),
    Refused(chunks(b"0\r\nX: " + b"a" * 70000 + b"\r\n\r\n").data, 431),
    Refused(chunks(b"0\r\n" + b"X: a\r\n" * 129 + b"\r\n").data, 431),
    # sizes
    Refused(get(b"X: " + b"a" * 65536).data, 431),
    Refused(get(b"X: a\r\n" * 128 + b"X: a").data, 431),
]  # fmt: skip


@pytest.mark.parametrize("case", REFUSED, ids=lambda case: repr(case.data[:70]))
async def test_what_is_malformed_is_refused_and_never_seen(case: Refused) -> None:
    with edge() as site:
        connection, transport = site.connect()
        connection.data_received(case.data)
        assert transport.written.startswith(b"HTTP/1.1 %d " % case.status)
        assert b"\r\nconnection: close\r\n" in transport.written
        assert b"\r\nproxy-status: quictunnel; error=http_request_error; details=" in transport.written
        assert transport.eof
        assert site.peers == []
        [leg] = site.done
        assert (leg.status, leg.head, leg.error is not None) == (case.status, None, True)
        connection.data_received(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n")
        connection.eof_received()
        assert site.peers == []


@pytest.mark.parametrize("case", REFUSED[::3], ids=lambda case: repr(case.data[:70]))
def test_what_is_malformed_is_refused_however_it_is_split(case: Refused) -> None:
    parser = DoorParser(VisitorLimits())
    requests = 0
    with pytest.raises(TunnelError):
        for position in range(len(case.data)):
            if parser.feed(case.data[position : position + 1]) or parser.request is not None:
                requests += 1
                assert parser.request is None or not parser.complete, "complete before what is wrong with it"
        raise AssertionError(case.data[:70])
    assert requests <= 1


def test_the_table_is_as_long_as_it_should_be() -> None:
    assert len(REFUSED) >= 150
    assert len({case.data for case in REFUSED}) == len(REFUSED)


@pytest.mark.parametrize(
    ("data", "code"),
    [
        (b"GET / HTTP/1.1\n", ErrorCode.BAD_REQUEST),
        (b"GET / HTTP/1.1\r\nHost: a\n", ErrorCode.BAD_REQUEST),
        (b"GET / HTTP/1.1\rH", ErrorCode.BAD_REQUEST),
        (b"GET / HTTP/9.9\r\n", ErrorCode.BAD_REQUEST),
        (b"\x16\x03", ErrorCode.BAD_REQUEST),
        (b"\r\n\r\n\r\n", ErrorCode.BAD_REQUEST),
        (b"\n", ErrorCode.BAD_REQUEST),
        (b"GET /" + b"a" * 8300, ErrorCode.TARGET_TOO_LONG),
        (b"A" * 8300, ErrorCode.TARGET_TOO_LONG),
        (b"GET / HTTP/1.1\r\nX: " + b"a" * 65536, ErrorCode.HEAD_TOO_LARGE),
    ],
)
def test_what_can_never_become_a_head_is_refused_before_its_end(data: bytes, code: ErrorCode) -> None:
    with pytest.raises(TunnelError) as refused:
        DoorParser(VisitorLimits()).feed(data)
    assert refused.value.code is code


# What passes


class Passed(NamedTuple):
    """One whole request, read from some bytes."""

    data: bytes
    method: bytes
    target: bytes
    authority: bytes = b"a"
    host: str = "a"
    body: bytes = b""
    trailers: Fields = []  # noqa: RUF012


def passes(start: bytes, target: bytes, fields: bytes = HOST, authority: bytes = b"a", host: str = "a") -> Passed:
    return Passed(start + b" HTTP/1.1\r\n" + fields + b"\r\n", start.partition(b" ")[0], target, authority, host)


def content(fields: bytes, data: bytes, body: bytes, trailers: Fields | None = None) -> Passed:
    return Passed(
        b"PUT / HTTP/1.1\r\nHost: a\r\n" + fields + b"\r\n\r\n" + data, b"PUT", b"/", body=body, trailers=trailers or []
    )


CHUNKED = b"Transfer-Encoding: chunked"
DIGITS = b"hello01234567899876543210"
PASSED = [
    passes(b"GET /", b"/"),
    *(
        passes(method + b" /x", b"/x")
        for method in b"HEAD POST PUT DELETE OPTIONS TRACE PATCH PROPFIND M-SEARCH get FOO PRI a!#$%&'*+-.^_`|~".split()
    ),
    *(
        passes(b"GET " + target, target)
        for target in b"// //a/../b /./%2e%2E/%00/;a=b?c&d=%20 /?? /\"<>\\^`{|}[] /http://b/ /:@!$&'()*+,;".split()
    ),
    passes(b"GET /" + b"a" * 8191, b"/" + b"a" * 8191),
    passes(b"OPTIONS *", b"*"),
    passes(b"GET http://a", b"/"),
    passes(b"GET http://a/", b"/"),
    passes(b"GET HTTP://A:80/x?y", b"/x?y", b"Host: a:80\r\n", b"A:80"),
    passes(b"GET http://a?y", b"/?y"),
    passes(b"OPTIONS http://a", b"*"),
    passes(b"OPTIONS http://a/", b"/"),
    passes(b"GET http://a//b/../c?http://d", b"//b/../c?http://d"),
    passes(b"GET http://a./", b"/", HOST, b"a."),
    passes(b"GET /", b"/", b"hOsT:\tExample.COM.:8080 \t\r\n", b"Example.COM.:8080", "example.com"),
    passes(b"GET /", b"/", b"Host: [::1]:8080\r\n", b"[::1]:8080", "[::1]"),
    passes(b"GET /", b"/", b"Host: a_b.localhost\r\n", b"a_b.localhost", "a_b.localhost"),
    Passed(b"\r\nGET / HTTP/1.1\r\nHost: a\r\n\r\n", b"GET", b"/"),
    Passed(b"\r\n\r\nGET / HTTP/1.1\r\nHost: a\r\n\r\n", b"GET", b"/"),
    Passed(b"GET / HTTP/1.0\r\n\r\n", b"GET", b"/", b"", ""),
    Passed(b"GET http://b/x HTTP/1.0\r\n\r\n", b"GET", b"/x", b"b", "b"),
    content(b"Content-Length: 5", b"hello", b"hello"),
    content(b"Content-Length:5\t ", b"hello", b"hello"),
    content(b"Content-Length: 0005", b"hello", b"hello"),
    content(b"Content-Length: 0", b"", b""),
    content(b"content_length: 7\r\nContent-Length: 5", b"\r\n\r\n\n", b"\r\n\r\n\n"),
    content(CHUNKED, b"0\r\n\r\n", b""),
    content(CHUNKED, b"000\r\n\r\n", b""),
    content(b"transfer-encoding:\tCHUNKED ", b"5\r\nhello\r\n0\r\n\r\n", b"hello"),
    content(CHUNKED, b"00000005\r\nhello\r\nA\r\n0123456789\r\na;x\r\n9876543210\r\n0\r\n\r\n", DIGITS),
    content(CHUNKED, b'5;a=b;c="d e\\"";f\r\nhello\r\n0;last\r\n\r\n', b"hello"),
    content(CHUNKED, b"8\r\n\r\n\r\n\r\n\r\n\r\n4\r\n\r\n\r\n\r\n0\r\n\r\n", b"\r\n" * 6),
    content(CHUNKED, b"7\r\n0\r\n\r\n\r\n\r\n0\r\n\r\n", b"0\r\n\r\n\r\n"),
    content(CHUNKED, b"1\r\nh\r\n0\r\nX-Sum: 1\r\nHost: b\r\ny:\r\n\r\n", b"h", [(b"x-sum", b"1"), (b"y", b"")]),
    content(b"Connection: Upgrade\r\nUpgrade: x\r\nContent-Length: 5", b"hello", b"hello"),
    content(b"Connection: Upgrade\r\nUpgrade: h2c\r\n" + CHUNKED, b"1\r\nh\r\n0\r\nX: y\r\n\r\n", b"h", [(b"x", b"y")]),
]  # fmt: skip


def read(parser: DoorParser, pieces: list[bytes]) -> list[tuple[Request, bytes, Fields]]:
    """All requests in some pieces of bytes."""
    found = []
    request: Request | None = None
    body = b""
    for piece in pieces:
        while piece:
            piece = parser.feed(piece)
            request = parser.request or request
            body += parser.take_body()
            if parser.complete:
                assert request is not None
                found.append((request, body, parser.trailers))
                request, body = None, b""
    return found


def check(case: Passed, found: tuple[Request, bytes, Fields]) -> None:
    request, body, trailers = found
    assert request.method == case.method
    assert request.target == case.target
    assert request.authority == case.authority
    assert request.host == case.host
    assert (body, trailers) == (case.body, case.trailers)


@pytest.mark.parametrize("case", PASSED, ids=lambda case: repr(case.data[:70]))
def test_what_is_well_formed_passes_byte_for_byte(case: Passed) -> None:
    [found] = read(DoorParser(VisitorLimits()), [case.data])
    check(case, found)


@given(st.data())
@settings(max_examples=200, deadline=None)
def test_any_split_of_any_requests_reads_the_same(data: st.DataObject) -> None:
    cases = data.draw(st.lists(st.sampled_from(PASSED), min_size=1, max_size=4))
    whole = b"".join(case.data for case in cases)
    cuts = sorted(data.draw(st.sets(st.integers(0, len(whole)), max_size=12)))
    pieces = [whole[start:end] for start, end in zip([0, *cuts], [*cuts, len(whole)], strict=True)]
    parser = DoorParser(VisitorLimits())
    found = read(parser, pieces)
    assert len(found) == len(cases)
    for case, one in zip(cases, found, strict=True):
        check(case, one)
    assert parser.complete


@pytest.mark.parametrize("case", PASSED, ids=lambda case: repr(case.data[:70]))
def test_byte_by_byte_reads_the_same(case: Passed) -> None:
    [found] = read(DoorParser(VisitorLimits()), [bytes([byte]) for byte in case.data])
    check(case, found)


@given(
    st.lists(
        st.one_of(
            st.binary(max_size=40), st.sampled_from([case.data for case in PASSED + REFUSED if len(case.data) < 500])
        )
    )
)
@settings(max_examples=200, deadline=None)
def test_garbage_gives_a_refusal_and_nothing_else(pieces: list[bytes]) -> None:
    parser = DoorParser(VisitorLimits())
    try:
        read(parser, pieces)
    except TunnelError as error:
        assert 400 <= error.fault.status < 600
        assert error.details.isascii()
        assert error.details.isprintable()


@pytest.mark.parametrize(
    ("fields", "version", "expected"),
    [
        (b"", b"1.1", True),
        (b"Connection: close\r\n", b"1.1", False),
        (b"Connection: x, CLOSE\r\n", b"1.1", False),
        (b"Connection: keep-alive\r\nConnection: close\r\n", b"1.1", False),
        (b"Connection: closed\r\n", b"1.1", True),
        (b"", b"1.0", False),
        (b"Connection: Keep-Alive\r\n", b"1.0", True),
        (b"Connection: keep-alive, close\r\n", b"1.0", False),
    ],
)
def test_keep_alive_is_as_each_version_has_it(fields: bytes, version: bytes, expected: bool) -> None:
    parser = DoorParser(VisitorLimits())
    parser.feed(b"GET / HTTP/" + version + b"\r\nHost: a\r\n" + fields + b"\r\n")
    assert parser.request is not None
    assert parser.request.keep_alive is expected


@pytest.mark.parametrize(
    ("fields", "version", "expected"),
    [
        (b"Connection: Upgrade\r\nUpgrade: websocket\r\n", b"1.1", b"websocket"),
        (b"Connection: keep-alive, uPgrade\r\nUpgrade: a/1,, b\r\nUpgrade: c\r\n", b"1.1", b"a/1, b, c"),
        (b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAA\r\n", b"1.1", b""),
        (b"Connection: Upgrade\r\nUpgrade: H2C, websocket\r\n", b"1.1", b"websocket"),
        (b"Upgrade: websocket\r\n", b"1.1", b""),
        (b"Connection: Upgrade\r\n", b"1.1", b""),
        (b"Connection: Upgrade\r\nUpgrade: websocket\r\n", b"1.0", b""),
        (b"Connection: Upgrade\r\nUpgrade: websocket\r\nContent-Length: 5\r\n", b"1.1", b""),
        (b"Connection: Upgrade\r\nUpgrade: websocket\r\nContent-Length: 0\r\n", b"1.1", b"websocket"),
    ],
)
def test_an_upgrade_is_asked_for_only_in_due_form(fields: bytes, version: bytes, expected: bytes) -> None:
    parser = DoorParser(VisitorLimits())
    parser.feed(b"GET / HTTP/" + version + b"\r\nHost: a\r\n" + fields + b"\r\n")
    assert parser.request is not None
    assert parser.request.protocol == expected


@pytest.mark.parametrize("name", [b"Connection", b"Proxy-Connection", b"Keep-Alive"])
@pytest.mark.parametrize("value", [b"close", b"keep-alive, close", b"Upgrade", b"x"])
@pytest.mark.parametrize("fields", [b"", b"Upgrade: h2c\r\n", b"Content-Length: 0\r\n"], ids=["", "h2c", "length"])
def test_what_follows_a_request_is_read_whatever_its_fields_say_of_the_connection(
    name: bytes, value: bytes, fields: bytes
) -> None:
    head = b"POST / HTTP/1.1\r\nHost: a\r\n" + name + b": " + value + b"\r\n" + fields + b"\r\n"
    found = read(DoorParser(VisitorLimits()), [head, PASSED[0].data])
    assert [request.method for request, _, _ in found] == [b"POST", b"GET"]


def test_https_url_may_be_asked_for_where_there_is_tls() -> None:
    parser = DoorParser(VisitorLimits())
    parser.secure = True
    parser.feed(b"GET HTTPS://a?y HTTP/1.1\r\nHost: a\r\n\r\n")
    assert parser.request is not None
    assert (parser.request.target, parser.request.authority) == (b"/?y", b"a")


def test_only_trace_and_options_count_max_forwards() -> None:
    parser = DoorParser(VisitorLimits())
    for method, expected in ((b"GET", b"5"), (b"OPTIONS", b"4"), (b"TRACE", b"4")):
        parser.feed(method + b" / HTTP/1.1\r\nHost: a\r\nMax-Forwards: 5\r\n\r\n")
        assert parser.request is not None
        assert parser.request.fields == [(b"host", b"a"), (b"max-forwards", expected)]


def test_http_1_0_expects_nothing() -> None:
    parser = DoorParser(VisitorLimits())
    parser.feed(b"POST / HTTP/1.0\r\nHost: a\r\nExpect: 100-continue\r\nContent-Length: 1\r\n\r\n")
    assert parser.request is not None
    assert parser.request.fields == [(b"host", b"a"), (b"content-length", b"1")]


def test_tiny_chunks_pass_and_extensions_without_end_do_not() -> None:
    head = b"PUT / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n"
    parser = DoorParser(VisitorLimits())
    [(_, body, _)] = read(parser, [head, *[b"1\r\nx\r\n" * 5000] * 8, b"0\r\n\r\n"])
    assert len(body) == 40000
    with pytest.raises(TunnelError):
        read(parser, [head, *[b"1;" + b"e" * 100 + b"\r\nx\r\n"] * 2000])


def test_trailer_field_too_many_is_refused_before_the_section_ends() -> None:
    parser = DoorParser(VisitorLimits(head_fields=10))
    parser.feed(b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n")
    with pytest.raises(TunnelError) as caught:
        parser.feed(b"0\r\n" + b"a: b\r\n" * 12)
    assert caught.value.code is ErrorCode.HEAD_TOO_LARGE
