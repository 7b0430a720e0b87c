"""What an HTTP/2 head may look like: tables of requests and answers, let in as what they are or refused."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quictunnel.http.http2_door import field_section_size, read_request, read_response, read_trailers
from quictunnel.http.limits import VisitorLimits
from quictunnel.wire.errors import ErrorCode, TunnelError
from quictunnel.wire.frames import Fields, ResponseHead

LIMITS = VisitorLimits(head_size=4096, head_fields=20, target_length=100)
M, S, A, P = (b":method", b"GET"), (b":scheme", b"http"), (b":authority", b"a.example"), (b":path", b"/")
GOOD: Fields = [M, S, A, P]
CONTROLS = [bytes([byte]) for byte in (*range(0x09), *range(0x0A, 0x20), 0x7F)]


def with_fields(*fields: tuple[bytes, bytes]) -> Fields:
    return [*GOOD, *fields]


def with_pseudo(name: bytes, value: bytes) -> Fields:
    return [(key, value if key == name else old) for key, old in GOOD]


def without(name: bytes) -> Fields:
    return [field for field in GOOD if field[0] != name]


MALFORMED: dict[str, Fields] = {
    # pseudo-header fields (RFC 9113 section 8.3)
    "nothing": [],
    **{f"no {name.decode()}": without(name) for name in (b":method", b":scheme", b":path")},
    "no host at all": without(b":authority"),
    **{f"{name.decode()} twice": [*GOOD, (name, value)] for name, value in GOOD},
    **{f"{name.decode()} late": [*without(name), (b"x", b"y"), (name, value)] for name, value in GOOD},
    **{f"empty {name.decode()}": with_pseudo(name, b"") for name in (b":method", b":scheme", b":path", b":authority")},
    "unknown pseudo-header field": [*GOOD, (b":x", b"y")],
    "a response's pseudo-header field": [*GOOD, (b":status", b"200")],
    "a lone colon": [*GOOD, (b":", b"y")],
    "upper-case pseudo-header field": [(b":Method", b"GET"), S, A, P],
    "extended CONNECT": [(b":method", b"CONNECT"), (b":protocol", b"websocket"), S, A, P],
    ":protocol elsewhere": [*GOOD, (b":protocol", b"websocket")],
    # methods and schemes
    **{f"method {value!r}": with_pseudo(b":method", value) for value in (b"G ET", b"GET ", b"GET\r\n", b"G\0", b"G:T")},
    **{f"scheme {value!r}": with_pseudo(b":scheme", value) for value in (b"ftp", b"HTTP", b"http ", b"h", b"http\r\n")},
    # paths
    **{
        f"path {value!r}": with_pseudo(b":path", value)
        for value in (
            *(
                b"a",
                b"?a",
                b"*",
                b"/ a",
                b" /",
                b"/ ",
                b"/\t",
                b"/a\r\nX: y",
                b"/\n",
                b"/\0",
                b"/\x7f",
                b"/\x80",
                b"/#f",
            ),
            *(b"/ HTTP/1.1\r\nHost: b\r\n\r\nGET /", b"http://a.example/", b"https://a.example/", b"HTTP://b/", b"//#"),
        )
    },
    # authorities (RFC 9113 section 8.3.1)
    **{
        f"authority {value!r}": with_pseudo(b":authority", value)
        for value in (
            *(
                b"u@a",
                b"u:p@a",
                b"a b",
                b"a,b",
                b"a/b",
                b"a:x",
                b"a:99999",
                b":80",
                b"a\r\nX: y",
                b"a\0",
                b"[::1",
                b"a#b",
            ),
            *(b" a", b"a ", b"\xc3\xa9", b"a?b", b"http://a"),
        )
    },
    "authority and another Host": with_fields((b"host", b"b.example")),
    "authority and a Host of another port": with_fields((b"host", b"a.example:81")),
    "authority and an empty Host": with_fields((b"host", b"")),
    "authority and two Hosts": with_fields((b"host", b"a.example"), (b"host", b"a.example")),
    "two Hosts": [M, S, P, (b"host", b"a"), (b"host", b"a")],
    "a bad Host": [M, S, P, (b"host", b"u@a")],
    # names (RFC 9113 section 8.2.1)
    **{
        f"name {name!r}": with_fields((name, b"y"))
        for name in (
            *(
                b"",
                b"X",
                b"x-Y",
                b"x y",
                b" x",
                b"x ",
                b"x:",
                b"x:y",
                b"x\r\n",
                b"x\n",
                b"x\0",
                b"x\x7f",
                b"x\xe9",
                b"(x)",
            ),
            *(b"transfer-encoding: chunked\r\nx", b"content-length:", b"x,", b'x"', b"x/y", b"x@", b"x=", b"\tx"),
        )
    },
    # values
    **{f"value with {byte!r}": with_fields((b"x", b"a" + byte + b"b")) for byte in CONTROLS},
    "CR LF in a value": with_fields((b"x", b"a\r\nTransfer-Encoding: chunked")),
    **{f"value {value!r}": with_fields((b"x", value)) for value in (b" a", b"a ", b"\ta", b"a\t", b" ", b"\t")},
    # connection fields (section 8.2.2)
    **{
        f"{name.decode()}": with_fields((name, value))
        for name, value in (
            *((b"connection", b"close"), (b"connection", b"x"), (b"keep-alive", b"1"), (b"proxy-connection", b"x")),
            *(
                (b"transfer-encoding", b"chunked"),
                (b"transfer-encoding", b""),
                (b"upgrade", b"h2c"),
                (b"upgrade", b"x"),
            ),
        )
    },
    **{f"te {value!r}": with_fields((b"te", value)) for value in (b"gzip", b"", b"trailers, gzip", b"trailers;q=1")},
    # lengths
    "two lengths": with_fields((b"content-length", b"1"), (b"content-length", b"1")),
    "two lengths that differ": with_fields((b"content-length", b"1"), (b"content-length", b"2")),
    **{
        f"length {value!r}": with_fields((b"content-length", value))
        for value in (b"", b"+5", b"-5", b"0x5", b"5,5", b"5 5", b"five", b"9" * 19, b"\xb2", b"5.0")
    },
    "two tunnels": with_fields((b"x-tunnel-session", b"a"), (b"x-tunnel-session", b"b")),
}


def refused(section: Fields, *, ended: bool = True, limits: VisitorLimits = LIMITS) -> TunnelError:
    with pytest.raises(TunnelError) as caught:
        read_request(section, limits, ended=ended)
    return caught.value


@pytest.mark.parametrize("case", MALFORMED)
def test_malformed_request_is_400(case: str) -> None:
    for ended in (True, False):
        error = refused(MALFORMED[case], ended=ended)
        assert (error.code, error.fault.status) == (ErrorCode.BAD_REQUEST, 400)
        assert error.details.startswith("The request is malformed: ")


def test_a_body_that_is_announced_and_does_not_come_is_malformed() -> None:
    section = with_fields((b"content-length", b"5"))
    assert refused(section).code is ErrorCode.BAD_REQUEST
    assert read_request(section, LIMITS, ended=False).body


@pytest.mark.parametrize("method", [b"CONNECT"])
def test_connect_is_not_offered(method: bytes) -> None:
    for section in ([(b":method", method), A], [(b":method", method), S, A, P]):
        assert refused(section).code is ErrorCode.NOT_IMPLEMENTED


def test_limits() -> None:
    assert refused(with_pseudo(b":path", b"/" + b"a" * 100)).code is ErrorCode.TARGET_TOO_LONG
    read_request(with_pseudo(b":path", b"/" + b"a" * 99), LIMITS, ended=True)
    assert refused(with_fields(*[(b"x", b"y")] * 21)).code is ErrorCode.HEAD_TOO_LARGE
    read_request(with_fields(*[(b"x", b"y")] * 20), LIMITS, ended=True)
    size = field_section_size(GOOD) + 32 + 1
    assert refused(with_fields((b"x", b"a" * (4097 - size)))).code is ErrorCode.HEAD_TOO_LARGE
    read_request(with_fields((b"x", b"a" * (4096 - size))), LIMITS, ended=True)


# What is let in


def test_a_request_is_what_it_says() -> None:
    section = [
        (b":path", b"/a/../b?c=%2F"),
        (b":method", b"pAtCh"),
        (b":authority", b"A.Example.:8080"),
        (b":scheme", b"https"),
        (b"x", b"a\t b"),
        (b"x", b"\xff"),
        (b"empty", b""),
        (b"te", b"Trailers"),
        (b"content-length", b"5"),
        (b"x-tunnel-session", b"t"),
    ]
    request = read_request(section, LIMITS, ended=False)
    assert request == (
        *(b"pAtCh", b"/a/../b?c=%2F", b"A.Example.:8080", "a.example", b"2.0", section[4:], True, True, b"", b"t"),
    )


GOOD_ONES: dict[str, tuple[Fields, bytes, bytes]] = {
    # name: section, target, authority
    "plain": (GOOD, b"/", b"a.example"),
    "asterisk": ([(b":method", b"OPTIONS"), S, A, (b":path", b"*")], b"*", b"a.example"),
    "path like an authority": (with_pseudo(b":path", b"//b.example/x"), b"//b.example/x", b"a.example"),
    "an address": (with_pseudo(b":authority", b"[2001:db8::1]:80"), b"/", b"[2001:db8::1]:80"),
    "a Host instead of an authority": ([M, S, P, (b"host", b"B.example")], b"/", b"B.example"),
    "an empty authority and a Host": ([M, S, P, (b":authority", b""), (b"host", b"b")], b"/", b"b"),
    "a Host of the same name": ([*GOOD, (b"host", b"A.EXAMPLE.")], b"/", b"a.example"),
    "a length of 0": (with_fields((b"content-length", b"0")), b"/", b"a.example"),
}


@pytest.mark.parametrize("case", GOOD_ONES)
def test_good_request_is_let_in(case: str) -> None:
    section, target, authority = GOOD_ONES[case]
    request = read_request(section, LIMITS, ended=True)
    assert (request.target, request.authority, request.body) == (target, authority, False)


def test_pieces_of_a_cookie_become_one_in_the_place_of_the_first() -> None:
    section = with_fields((b"a", b"1"), (b"cookie", b"b=2"), (b"c", b"3"), (b"cookie", b"d=4"), (b"cookie", b""))
    fields = read_request(section, LIMITS, ended=True).fields
    assert fields == [(b"a", b"1"), (b"cookie", b"b=2; d=4; "), (b"c", b"3")]
    one = with_fields((b"cookie", b"b=2; d=4"))
    assert read_request(one, LIMITS, ended=True).fields == [(b"cookie", b"b=2; d=4")]


# Answers

BAD_ANSWERS: dict[str, Fields] = {
    "no status": [(b"x", b"y")],
    "nothing": [],
    **{
        f"status {value!r}": [(b":status", value)]
        for value in (
            b"",
            b"101",
            b"099",
            b"1000",
            b"20x",
            b"20",
            b"2",
            b" 200",
            b"200 ",
            b"+20",
            b"200 OK",
            b"\xb2\xb2\xb2",
        )
    },
    "status twice": [(b":status", b"200"), (b":status", b"200")],
    "two statuses": [(b":status", b"100"), (b":status", b"200")],
    "status late": [(b"x", b"y"), (b":status", b"200")],
    "a request's pseudo-header field": [(b":status", b"200"), (b":path", b"/")],
    "unknown pseudo-header field": [(b":status", b"200"), (b":x", b"y")],
    "upper case": [(b":status", b"200"), (b"Set-Cookie", b"a")],
    "empty name": [(b":status", b"200"), (b"", b"a")],
    "response splitting in a value": [(b":status", b"200"), (b"x", b"a\r\n\r\nHTTP/1.1 200 OK")],
    "response splitting in a name": [(b":status", b"200"), (b"x: y\r\n\r\nz", b"a")],
    **{f"value with {byte!r}": [(b":status", b"200"), (b"x", byte)] for byte in CONTROLS},
    "white space": [(b":status", b"200"), (b"x", b" a")],
    "connection": [(b":status", b"200"), (b"connection", b"close")],
    "transfer-encoding": [(b":status", b"200"), (b"transfer-encoding", b"chunked")],
    "upgrade": [(b":status", b"200"), (b"upgrade", b"x")],
    "too many fields": [(b":status", b"200"), *[(b"x", b"y")] * 11],
    "too large": [(b":status", b"200"), (b"x", b"y" * 1000)],
}


@pytest.mark.parametrize("case", BAD_ANSWERS)
def test_malformed_answer_is_refused(case: str) -> None:
    with pytest.raises(ValueError, match=r"^(its|it|a|white) "):
        read_response(BAD_ANSWERS[case], fields_limit=10, size_limit=1000)


@pytest.mark.parametrize("status", [100, 103, 199, 200, 204, 304, 404, 599, 999])
def test_answers_are_let_in(status: int) -> None:
    head = read_response(
        [(b":status", b"%d" % status), (b"x", b"y"), (b"x", b"\xff")], fields_limit=10, size_limit=1000
    )
    assert head == ResponseHead(status, [(b"x", b"y"), (b"x", b"\xff")])


@pytest.mark.parametrize(
    "section",
    [
        [(b":status", b"200")],
        [(b"x", b"y"), (b":path", b"/")],
        [(b"X", b"y")],
        [(b"x", b"\r\n")],
        [(b"connection", b"x")],
        [(b"x", b"y")] * 11,
        [(b"x", b"y" * 1000)],
    ],
)
def test_malformed_trailers_are_refused(section: Fields) -> None:
    with pytest.raises(ValueError, match=r"^(its|it|a) "):
        read_trailers(section, fields_limit=10, size_limit=1000)


def test_trailers_are_let_in() -> None:
    assert read_trailers([], fields_limit=10, size_limit=1000) == []
    assert read_trailers([(b"grpc-status", b"0")], fields_limit=1, size_limit=44) == [(b"grpc-status", b"0")]


# Whatever comes

NAMES = st.one_of(
    st.sampled_from([b":method", b":scheme", b":authority", b":path", b":status", b"host", b"cookie", b"te", b"x"]),
    st.binary(max_size=6),
)
VALUES = st.one_of(st.sampled_from([b"GET", b"http", b"a.example", b"/", b"*", b"200", b"5"]), st.binary(max_size=8))


@given(st.lists(st.tuples(NAMES, VALUES), max_size=8), st.booleans())
def test_whatever_comes_is_a_request_fit_for_http1_or_an_error(section: Fields, ended: bool) -> None:
    try:
        request = read_request(section, LIMITS, ended=ended)
    except TunnelError:
        return
    line = request.method + b" " + request.target + b" " + request.authority
    assert line.split() == [request.method, request.target, request.authority]
    assert line.isascii()
    for name, value in request.fields:
        assert name == name.lower()
        assert b":" not in name
        assert not any(byte in name + value for byte in (b"\r", b"\n", b"\0"))


@given(st.lists(st.tuples(NAMES, VALUES), max_size=8))
def test_whatever_comes_is_an_answer_fit_for_http1_or_an_error(section: Fields) -> None:
    try:
        head = read_response(section, fields_limit=10, size_limit=1000)
    except ValueError:
        return
    assert 100 <= head.status <= 999
    assert head.status != 101
    for name, value in head.fields:
        assert b":" not in name
        assert not any(byte in name + value for byte in (b"\r", b"\n", b"\0"))
