"""HTTP's finer points: interim answers, trailers, lengths of bodies that are not there, and odd bytes."""

import re
import shutil
import socket
import subprocess
import threading
from collections.abc import Callable, Iterator

import pytest

from tests.support.backends import Connection, RawBackend, answer, echo
from tests.support.processes import Processes, Server, Tunnel
from tests.support.visits import RawVisitor, visit

pytestmark = pytest.mark.either


@pytest.fixture(scope="module")
def tunnels(processes: Processes) -> Callable[[str, str], Tunnel]:
    """A tunnel of an engine to a backend; the tests of this file share them."""
    servers: dict[str, Server] = {}
    made: dict[tuple[str, str], Tunnel] = {}

    def tunnel(engine: str, target: str) -> Tunnel:
        if engine not in servers:
            servers[engine] = processes.server(engine=engine)
        key = (engine, target)
        if key not in made:
            name = f"t{len(made)}"
            made[key] = Tunnel(
                servers[engine], processes.client(servers[engine], target, tunnel=name, engine=engine), name
            )
        return made[key]

    return tunnel


@pytest.fixture
def tunnel(engine: str, tunnels: Callable[[str, str], Tunnel], raw: RawBackend) -> Iterator[Tunnel]:
    """A tunnel to ``raw``, on each engine."""
    raw.requests.clear()
    yield tunnels(engine, raw.target)
    raw.handler = echo


def request(tunnel: Tunnel, *fields: str, method: str = "POST", target: str = "/", version: str = "1.1") -> bytes:
    """A request's head."""
    return "\r\n".join([f"{method} {target} HTTP/{version}", f"Host: {tunnel.host}", *fields, "", ""]).encode("latin-1")


EXPECT = "Expect: 100-continue"


def read_head(visitor: RawVisitor) -> list[bytes]:
    """The lines of the next head, an interim one or not."""
    lines = []
    while (line := visitor.read_line()) != b"\r\n":
        assert line, "the connection ended within a head"
        lines.append(line.removesuffix(b"\r\n"))
    return lines


def nothing_comes(sock: socket.socket, seconds: float = 0.2) -> bool:
    """Whether the other side says nothing for a while."""
    limit = sock.gettimeout()
    sock.settimeout(seconds)
    try:
        sock.recv(1, socket.MSG_PEEK)
    except TimeoutError:
        return True
    finally:
        sock.settimeout(limit)
    return False


# Expect: 100-continue (RFC 9110 section 10.1.1)


def test_body_is_asked_for_by_the_backend_alone(tunnel: Tunnel, raw: RawBackend) -> None:
    go = threading.Event()

    def handle(connection: Connection) -> None:
        while head := connection.head():
            assert b"\r\nexpect: 100-continue\r\n" in head.lower()
            assert nothing_comes(connection.sock)
            assert go.wait(10)
            connection.send(b"HTTP/1.1 100 Continue\r\n\r\n")
            connection.answer(200, connection.body(head))

    raw.handler = handle
    with RawVisitor(tunnel.address) as visitor:
        for framing, body in (
            ("Content-Length: 4", b"body"),
            ("Transfer-Encoding: chunked", b"4\r\nbody\r\n0\r\n\r\n"),
        ):
            go.clear()
            visitor.send(request(tunnel, EXPECT, framing))
            assert nothing_comes(visitor.sock)  # nobody but the backend may ask
            go.set()
            assert read_head(visitor)[0].startswith(b"HTTP/1.1 100 ")
            visitor.send(body)
            assert visitor.read_answer().body == b"body"


@pytest.mark.parametrize("status", [417, 401, 413, 200])
def test_refusal_instead_of_100_is_passed_and_the_body_never_asked_for(
    tunnel: Tunnel, raw: RawBackend, status: int
) -> None:
    gone = threading.Event()

    def handle(connection: Connection) -> None:
        connection.head()
        connection.answer(status, b"no body, please")
        connection.gone()
        gone.set()

    raw.handler = handle
    with RawVisitor(tunnel.address) as visitor:
        visitor.send(request(tunnel, EXPECT, "Content-Length: 4"))
        got = visitor.read_answer()
        assert (got.status, got.body) == (status, b"no body, please")
        # Whether the body comes now is the visitor's choice, so nothing that follows could be told from it.
        assert got["connection"] == "close"
        assert visitor.read_all() == b""
    assert gone.wait(10)


def test_backend_that_reads_without_saying_100_is_served(tunnel: Tunnel, raw: RawBackend) -> None:
    """A visitor need not wait for ever (RFC 9110 section 10.1.1), and gets no 100 that nobody said."""
    with RawVisitor(tunnel.address) as visitor:
        for _ in range(2):
            visitor.send(request(tunnel, EXPECT, "Content-Length: 4"))
            assert nothing_comes(visitor.sock, 0.1)
            visitor.send(b"body")
            got = visitor.read_answer()
            assert got.status == 200
            assert got.body.endswith(b"\r\n\r\nbody")


def test_body_that_comes_with_its_expectation_needs_no_100(tunnel: Tunnel, raw: RawBackend) -> None:
    with RawVisitor(tunnel.address) as visitor:
        for _ in range(2):
            visitor.send(request(tunnel, EXPECT, "Content-Length: 4") + b"body")
            assert visitor.read_answer().body.endswith(b"\r\n\r\nbody")


def test_http_1_0_visitor_gets_no_100(tunnel: Tunnel, raw: RawBackend) -> None:
    def handle(connection: Connection) -> None:
        head = connection.head()
        connection.send(b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\n")
        connection.answer(200, connection.body(head))

    raw.handler = handle
    with RawVisitor(tunnel.address) as visitor:
        visitor.send(request(tunnel, EXPECT, "Content-Length: 4", version="1.0") + b"body")
        assert read_head(visitor)[0].startswith(b"HTTP/1.1 200 ")
        assert visitor.read_all() == b"body"


def test_application_that_reads_asks_for_the_body(engine: str, tunnels: Callable[[str, str], Tunnel]) -> None:
    tunnel = tunnels(engine, "tests.support.apps:mirror")
    with RawVisitor(tunnel.address) as visitor:
        visitor.send(request(tunnel, EXPECT, "Content-Length: 4"))
        assert read_head(visitor)[0].startswith(b"HTTP/1.1 100 ")
        visitor.send(b"body")
        assert visitor.read_answer().body == b"body"
        visitor.send(request(tunnel, EXPECT, "Content-Length: 4", target="/refuse"))
        assert visitor.read_answer().status == 413


CURL = shutil.which("curl")


@pytest.mark.skipif(CURL is None, reason="there is no curl")
@pytest.mark.parametrize("says", ["100", "nothing", "417"])
def test_curl_gets_along_with_its_expectation(tunnel: Tunnel, raw: RawBackend, says: str) -> None:
    """It waits for a 100 for as long as it is told; a 417 that ends the connection is an answer like any other."""
    assert CURL is not None

    def handle(connection: Connection) -> None:
        while head := connection.head():
            expected = b"\r\nexpect: 100-continue\r\n" in head.lower()
            if says == "417" and expected:
                connection.answer(417, b"refused")
                connection.gone()
                return
            if says == "100":
                connection.send(b"HTTP/1.1 100 Continue\r\n\r\n")
            connection.answer(200, b"%d" % len(connection.body(head)))

    raw.handler = handle
    wait = "0.2" if says == "nothing" else "20"
    command = [CURL, "-sv", "--http1.1", "-H", EXPECT, "--expect100-timeout", wait, "-m", "15"]
    host, port = tunnel.address
    command += ["-H", f"Host: {tunnel.host}", "--data-binary", "x" * 50_000, f"http://{host}:{port}/"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    assert (done.returncode, done.stdout) == (0, "refused" if says == "417" else "50000"), done.stderr
    assert ("< HTTP/1.1 100" in done.stderr) == (says == "100")
    assert ("< HTTP/1.1 417" in done.stderr) == (says == "417")


# Other interim answers (RFC 9110 section 15.2, RFC 8297)


def test_early_hints_are_passed_on_with_their_fields_as_they_come(tunnel: Tunnel, raw: RawBackend) -> None:
    seen = threading.Semaphore(0)

    def handle(connection: Connection) -> None:
        connection.head()
        for number in range(3):
            links = b"Link: </%d.css>; rel=preload\r\nLink: </%d.js>\r\n" % (number, number)
            connection.send(b"HTTP/1.1 103 Early Hints\r\n%bX-A: \xe4\r\nContent-Length: 9\r\n\r\n" % links)
            assert seen.acquire(timeout=10)
        connection.send(b"HTTP/1.1 102 Processing\r\n\r\nHTTP/1.1 110 X\r\nX-A: 1\r\n\r\n")
        connection.answer(200, b"done", b"Link: </last>")

    raw.handler = handle
    with RawVisitor(tunnel.address) as visitor:
        visitor.get(host=tunnel.host)
        for number in range(3):
            line, *fields = read_head(visitor)
            assert line.startswith(b"HTTP/1.1 103 ")
            links = [value for name, _, value in (each.partition(b": ") for each in fields) if name == b"link"]
            assert links == [b"</%d.css>; rel=preload" % number, b"</%d.js>" % number]
            assert b"x-a: \xe4" in fields
            assert not any(field.startswith((b"content-length", b"date", b"connection")) for field in fields)
            seen.release()
        assert read_head(visitor)[0].startswith(b"HTTP/1.1 102 ")
        line, *fields = read_head(visitor)
        assert line.startswith(b"HTTP/1.1 110 ")
        assert fields == [b"x-a: 1"]
        got = visitor.read_answer()
        assert (got.status, got["link"], got.body) == (200, "</last>", b"done")


# Trailers (RFC 9110 section 6.5)

# What would change the message that they follow, and what nobody may claim there.
FORBIDDEN = (
    "Host: elsewhere",
    "Content-Type: text/plain",
    "Content-Encoding: gzip",
    "Trailer: x",
    "Connection: x",
    "Authorization: x",
    "Set-Cookie: a=1",
    "X-Forwarded-For: 192.0.2.1",
)


def test_trailers_of_a_request_arrive(tunnel: Tunnel, raw: RawBackend) -> None:
    lines: list[bytes] = []

    def handle(connection: Connection) -> None:
        while connection.head():
            assert connection.line() == b"4"
            assert connection.read(6) == b"body\r\n"
            assert connection.line() == b"0"
            lines.clear()
            while line := connection.line():
                lines.append(line.lower())
            connection.answer(200, b"read")

    raw.handler = handle
    trailers = ["X-Sum: 1", "X-Sum: 2", "X-Bytes: \xe4\xff", *FORBIDDEN]
    body = "4\r\nbody\r\n0\r\n" + "".join(f"{line}\r\n" for line in trailers) + "\r\n"
    with RawVisitor(tunnel.address) as visitor:
        for _ in range(2):
            visitor.send(
                request(tunnel, "Transfer-Encoding: chunked", "Trailer: X-Sum, X-Bytes", "TE: trailers, gzip;q=0.5")
            )
            visitor.send(body.encode("latin-1"))
            assert visitor.read_answer().body == b"read"
    assert lines == [b"x-sum: 1", b"x-sum: 2", b"x-bytes: \xe4\xff"]
    head = raw.requests[-1].lower()
    assert b"\r\ntrailer: x-sum, x-bytes\r\n" in head
    assert b"\r\nte: trailers\r\n" in head
    assert re.search(rb"\r\nconnection: te\r\n", head)


def test_te_without_trailers_is_the_hops_own(tunnel: Tunnel, raw: RawBackend) -> None:
    head = visit(tunnel.address, fields={"TE": "gzip", "Connection": "TE"}, host=tunnel.host).body.lower()
    assert b"\r\nte:" not in head


def test_trailers_of_an_answer_arrive(tunnel: Tunnel, raw: RawBackend) -> None:
    trailers = b"".join(
        f"{line}\r\n".encode() for line in ("X-Sum: 1", "X-Sum: 2", "Server-Timing: a;dur=1", *FORBIDDEN)
    )

    def handle(connection: Connection) -> None:
        while connection.head():
            head = b"HTTP/1.1 200 OK\r\nTrailer: X-Sum, Server-Timing\r\nTransfer-Encoding: chunked\r\n\r\n"
            connection.send(head + b"4\r\nbody\r\n0\r\n" + trailers + b"\r\n")

    raw.handler = handle
    with RawVisitor(tunnel.address) as visitor:
        for _ in range(2):
            visitor.get("/", "TE: trailers", "Connection: TE", host=tunnel.host)
            assert b"trailer: X-Sum, Server-Timing" in read_head(visitor)
            body = b""
            while size := int(visitor.read_line(), 16):
                body += visitor.read(size + 2)[:-2]
            assert body == b"body"
            assert read_head(visitor) == [b"x-sum: 1", b"x-sum: 2", b"server-timing: a;dur=1"]


@pytest.mark.parametrize("trailer", [b"Content-Length: 4", b"Transfer-Encoding: chunked"])
def test_framing_in_trailers_of_a_request_is_refused(tunnel: Tunnel, raw: RawBackend, trailer: bytes) -> None:
    """Whoever heeds it reads another message."""
    with RawVisitor(tunnel.address) as visitor:
        visitor.send(request(tunnel, "Transfer-Encoding: chunked") + b"4\r\nbody\r\n0\r\n%b\r\n\r\n" % trailer)
        assert visitor.read_answer().status == 400
        assert visitor.read_all() == b""


def test_trailers_without_a_chunked_answer_are_left_out(tunnel: Tunnel, raw: RawBackend) -> None:
    """HTTP/1.0 has no place for them."""

    def handle(connection: Connection) -> None:
        connection.head()
        connection.send(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n4\r\nbody\r\n0\r\nX-Sum: 1\r\n\r\n")

    raw.handler = handle
    with RawVisitor(tunnel.address) as visitor:
        visitor.send(request(tunnel, method="GET", version="1.0"))
        read_head(visitor)
        assert visitor.read_all() == b"body"


# Bodies that are not there, and the lengths that may stand for them

# method, what the backend says, what the visitor must see of it: the length, the transfer coding, the body
BODILESS: dict[str, tuple[str, bytes, tuple[str, str, bytes]]] = {
    "HEAD, length": ("HEAD", b"200 OK\r\nContent-Length: 1234\r\n\r\n", ("1234", "", b"")),
    "HEAD, length of 0": ("HEAD", b"200 OK\r\nContent-Length: 0\r\n\r\n", ("0", "", b"")),
    "HEAD, chunked": ("HEAD", b"200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", ("", "", b"")),
    "HEAD, nothing said": ("HEAD", b"200 OK\r\n\r\n", ("", "", b"")),
    "HEAD, 404": ("HEAD", b"404 No\r\nContent-Length: 9\r\n\r\n", ("9", "", b"")),
    "204": ("GET", b"204 No Content\r\n\r\n", ("", "", b"")),
    "204, length of 0": ("GET", b"204 No Content\r\nContent-Length: 0\r\n\r\n", ("", "", b"")),
    "204 to DELETE": ("DELETE", b"204 No Content\r\n\r\n", ("", "", b"")),
    "205": ("GET", b"205 Reset Content\r\nContent-Length: 0\r\n\r\n", ("0", "", b"")),
    "205, chunked": ("GET", b"205 Reset\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", ("0", "", b"")),
    "304": ("GET", b"304 Not Modified\r\n\r\n", ("", "", b"")),
    "304, length": ("GET", b"304 Not Modified\r\nContent-Length: 1234\r\n\r\n", ("1234", "", b"")),
    "304 to HEAD": ("HEAD", b"304 Not Modified\r\nContent-Length: 7\r\n\r\n", ("7", "", b"")),
    "200, length of 0": ("GET", b"200 OK\r\nContent-Length: 0\r\n\r\n", ("0", "", b"")),
    "200, chunks of nothing": ("GET", b"200 OK\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", ("", "chunked", b"")),
    "201 with length": ("PUT", b"201 Created\r\nContent-Length: 2\r\n\r\nok", ("2", "", b"ok")),
}


@pytest.mark.parametrize("case", BODILESS.values(), ids=BODILESS.keys())
def test_length_of_an_answer_is_what_it_may_say(
    tunnel: Tunnel, raw: RawBackend, case: tuple[str, bytes, tuple[str, str, bytes]]
) -> None:
    """Twice on one connection: whoever reads a byte too many or too few is out of step."""
    method, said, expected = case

    def handle(connection: Connection) -> None:
        while connection.head():
            connection.send(b"HTTP/1.1 " + said)

    raw.handler = handle
    with RawVisitor(tunnel.address) as visitor:
        for _ in range(2):
            visitor.send(request(tunnel, method=method))
            got = visitor.read_answer(method)
            assert got.status == int(said[:3])
            assert (got["content-length"], got["transfer-encoding"], got.body) == expected
        assert nothing_comes(visitor.sock, 0.02)


# Odd bytes


@pytest.mark.parametrize("status", [200, 226, 299, 300, 399, 418, 451, 499, 511, 599, 600, 799, 999])
def test_unusual_status_passes(tunnel: Tunnel, raw: RawBackend, status: int) -> None:
    raw.handler = answer(status, b"body")
    with RawVisitor(tunnel.address) as visitor:
        for _ in range(2):
            visitor.get(host=tunnel.host)
            got = visitor.read_answer()
            assert (got.status, got.body, got["proxy-status"]) == (status, b"body", "")


@pytest.mark.parametrize("phrase", [b"", b" ", b" Fine", b" Not \xe4t all\tfine: really", b" " + b"long " * 200])
def test_reason_phrase_does_no_harm(tunnel: Tunnel, raw: RawBackend, phrase: bytes) -> None:
    def handle(connection: Connection) -> None:
        while connection.head():
            connection.send(b"HTTP/1.1 200%b\r\nContent-Length: 4\r\n\r\nbody" % phrase)

    raw.handler = handle
    got = visit(tunnel.address, host=tunnel.host)
    assert (got.status, got.body) == (200, b"body")


def test_fields_of_an_answer_keep_their_bytes_order_and_repeats(tunnel: Tunnel, raw: RawBackend) -> None:
    fields = [
        b"x-b: 2",
        b"set-cookie: a=1; Expires=Thu, 01 Jan 2037 00:00:00 GMT",
        b"x-a: \xe4\xff  two spaces\tand a tab",
        b'www-authenticate: Basic realm="a, b", Digest qop="auth"',
        b'set-cookie: b="2, 3"; HttpOnly',
        b"x-b: 1",
        b"x-empty: ",
        b"set-cookie: a=1; Expires=Thu, 01 Jan 2037 00:00:00 GMT",
        b"vary: Accept",
        b"vary: Origin",
        b"x_under_score: 1",
        b"x-~!#$%&'*+.^`|: token",
    ]
    raw.handler = answer(200, b"ok", *fields)
    with RawVisitor(tunnel.address) as visitor:
        visitor.get(host=tunnel.host)
        _, *got = read_head(visitor)
    own = (b"content-length:", b"date:", b"connection:", b"via:")
    assert [line for line in got if not line.startswith(own)] == fields


def test_ranges_tags_and_codings_pass_untouched(tunnel: Tunnel, raw: RawBackend) -> None:
    """A proxy that is no cache has no opinion of them."""
    asked = {
        "Range": "bytes=0-4, -5",
        "If-Range": '"v1"',
        "If-None-Match": 'W/"a", "b"',
        "If-Modified-Since": "Thu, 01 Jan 2026 00:00:00 GMT",
        "Accept-Encoding": "br;q=1.0, gzip, *;q=0",
        "Cache-Control": "no-transform",
    }
    said = (
        b'ETag: W/"v1"',
        b"Content-Range: bytes 0-4/10",
        b"Content-Encoding: br, gzip",
        b"Accept-Ranges: bytes",
        b"Age: 7",
        b'Cache-Control: max-age=1, private="x"',
        b"Last-Modified: Thu, 01 Jan 2026 00:00:00 GMT",
        b"Content-Location: /a/../b",
        b"Location: //elsewhere.example/%7e/../x?y#z",
        b"Content-Disposition: attachment; filename*=UTF-8''%e2%82%ac",
        b"Strict-Transport-Security: max-age=1",
        b"Server: mine",
        b"Content-Type: multipart/byteranges; boundary=x",
    )
    body = bytes(range(256))
    raw.handler = answer(206, body, *said)
    got = visit(tunnel.address, fields=asked, host=tunnel.host)
    assert (got.status, got.body) == (206, body)
    for line in said:
        name, _, value = line.decode().partition(": ")
        assert got[name.lower()] == value
    head = raw.requests[-1].decode().lower()
    for name, value in asked.items():
        assert f"\r\n{name}: {value}\r\n".lower() in head


@pytest.mark.parametrize(
    "own", [b"Date: Thu, 01 Jan 2026 00:00:00 GMT", b"X-None: 1"], ids=["the backend's", "the tunnel's"]
)
def test_date_is_there_once(tunnel: Tunnel, raw: RawBackend, own: bytes) -> None:
    """The backend's, or one of the tunnel's (RFC 9110 section 6.6.1)."""
    raw.handler = answer(200, b"ok", own)
    dates = [value for name, value in visit(tunnel.address, host=tunnel.host).fields if name == "date"]
    assert len(dates) == 1
    assert (dates == ["Thu, 01 Jan 2026 00:00:00 GMT"]) == own.startswith(b"Date")
    assert re.fullmatch(r"\w{3}, \d\d \w{3} \d{4} \d\d:\d\d:\d\d GMT", dates[0])


METHODS = [
    "GET",
    "POST",
    "PUT",
    "PATCH",
    "DELETE",
    "OPTIONS",
    "TRACE",
    "PROPFIND",
    "M-SEARCH",
    "get",
    "x!#$%&'*+.^_`|~",
]


@pytest.mark.parametrize("method", METHODS)
def test_method_is_byte_exact_with_a_body_and_without(tunnel: Tunnel, raw: RawBackend, method: str) -> None:
    with RawVisitor(tunnel.address) as visitor:
        visitor.send(request(tunnel, method=method, target="/x"))
        got = visitor.read_answer()
        assert got.body.startswith(f"{method} /x HTTP/1.1\r\n".encode())
        assert b"content-length" not in got.body.lower()
        assert b"transfer-encoding" not in got.body.lower()
        visitor.send(request(tunnel, "Content-Length: 4", method=method, target="/x") + b"body")
        assert visitor.read_answer().body.endswith(b"\r\n\r\nbody")
        visitor.send(request(tunnel, "Content-Length: 0", method=method, target="/x"))
        assert b"\r\ncontent-length: 0\r\n" in visitor.read_answer().body.lower()


@pytest.mark.parametrize(
    ("method", "target", "seen"),
    [
        ("OPTIONS", "*", "*"),
        ("GET", "http://{host}/a/../b?c", "/a/../b?c"),
        ("GET", "HTTP://{host}", "/"),
        ("GET", "http://{host}?q", "/?q"),
        ("OPTIONS", "http://{host}", "*"),
        ("OPTIONS", "http://{host}/", "/"),
    ],
)
def test_target_forms_reach_the_backend_as_they_should(
    tunnel: Tunnel, raw: RawBackend, method: str, target: str, seen: str
) -> None:
    """RFC 9112 sections 3.2.2 and 3.2.4: absolute-form becomes origin-form, or asterisk-form where that was meant."""
    with RawVisitor(tunnel.address) as visitor:
        visitor.send(request(tunnel, method=method, target=target.format(host=tunnel.host)))
        head = visitor.read_answer().body
    assert head.split(b" ")[1] == seen.encode()
    assert f"\r\nhost: {tunnel.host}\r\n".encode() in head.lower()
