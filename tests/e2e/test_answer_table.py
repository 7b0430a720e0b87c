"""What a backend may answer: a table of answers, what two HTTP libraries make of what the visitor gets, and that a
backend connection which broke HTTP/1.1, or may have, never carries another request.

Sections are of RFC 9112 where nothing else is said.
"""

import http.client
import threading
from collections.abc import Callable, Iterator
from typing import NamedTuple

import httpx
import pytest

from tests.support.backends import Connection, RawBackend
from tests.support.processes import Processes, Tunnel, poll
from tests.support.visits import RawVisitor

pytestmark = pytest.mark.either

OK = b"HTTP/1.1 200 OK\r\n"
EMPTY = b"Content-Length: 0\r\n\r\n"
HELLO = OK + b"Content-Length: 5\r\n\r\nhello"
CHUNKED = OK + b"Transfer-Encoding: chunked\r\n\r\n"
CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"
FORGED = b"HTTP/1.1 200 OK\r\nContent-Length: 6\r\n\r\nforged"

WHOLE, BAD_GATEWAY, CUT = "whole", "502", "cut"


class Row(NamedTuple):
    """An answer to GET, or to ``method``; each part is sent when the visitor has seen what came before it."""

    name: str
    parts: tuple[bytes, ...]
    expected: str
    section: str = ""
    method: str = "GET"
    status: int = 200
    body: bytes = b""
    "of an answer that is taken for whole"
    ends: bool = False
    "the backend closes when the visitor has seen all of it"


def bad(name: str, answer: bytes, section: str = "") -> Row:
    return Row(name, (answer,), BAD_GATEWAY, section)


def cut(name: str, *parts: bytes, section: str = "8", ends: bool = False) -> Row:
    return Row(name, parts, CUT, section, ends=ends)


def whole(
    name: str, *parts: bytes, section: str = "", method: str = "GET", status: int = 200, body: bytes = b""
) -> Row:
    return Row(name, parts, WHOLE, section, method, status, body)


def head(field: bytes) -> bytes:
    return OK + field + b"\r\n" + EMPTY


TABLE = [
    bad("two unequal lengths", OK + b"Content-Length: 5\r\nContent-Length: 6\r\n\r\nhello", "6.3 rule 5"),
    bad("two equal lengths", OK + b"Content-Length: 5\r\nContent-Length: 5\r\n\r\nhello"),
    bad("list of lengths", OK + b"Content-Length: 5, 5\r\n\r\nhello"),
    bad("length with a sign", OK + b"Content-Length: +5\r\n\r\nhello", "6.3 rule 5"),
    bad("negative length", OK + b"Content-Length: -5\r\n\r\nhello", "6.3 rule 5"),
    bad("hexadecimal length", OK + b"Content-Length: 0x5\r\n\r\nhello", "6.3 rule 5"),
    bad("empty length", OK + b"Content-Length:\r\n\r\nhello", "6.3 rule 5"),
    bad("length of two words", OK + b"Content-Length: 5 5\r\n\r\nhello", "6.3 rule 5"),
    bad("length beyond 64 bits", OK + b"Content-Length: 18446744073709551621\r\n\r\nhello", "6.3 rule 5"),
    bad("length of 19 digits", OK + b"Content-Length: 9223372036854775807\r\n\r\nhello"),
    bad("length and coding", OK + b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n"),
    bad("coding and length", OK + b"Transfer-Encoding: chunked\r\nContent-Length: 5\r\n\r\n0\r\n\r\n"),
    bad("length and empty coding", OK + b"Content-Length: 5\r\nTransfer-Encoding:\r\n\r\nhello"),
    bad("xchunked", OK + b"Transfer-Encoding: xchunked\r\n\r\n0\r\n\r\n"),
    bad("gzip, chunked", OK + b"Transfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n"),
    bad("chunked, identity", OK + b"Transfer-Encoding: chunked, identity\r\n\r\n0\r\n\r\n"),
    bad("chunked twice", OK + b"Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n"),
    bad("identity", OK + b"Transfer-Encoding: identity\r\n\r\nhello"),
    bad("chunked and a vertical tab", OK + b"Transfer-Encoding: chunked\x0b\r\n\r\n0\r\n\r\n"),
    bad("chunked in HTTP/1.0", b"HTTP/1.0 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", "6.1"),
    bad("status of letters", b"HTTP/1.1 abc OK\r\n" + EMPTY, "4"),
    bad("status of two digits", b"HTTP/1.1 20 OK\r\n" + EMPTY, "4"),
    bad("status of four digits", b"HTTP/1.1 2000 OK\r\n" + EMPTY, "4"),
    bad("status below 100", b"HTTP/1.1 099 OK\r\n" + EMPTY, "4"),
    bad("negative status", b"HTTP/1.1 -20 OK\r\n" + EMPTY, "4"),
    bad("status joined to its reason", b"HTTP/1.1 200OK\r\n" + EMPTY, "4"),
    bad("no status", b"HTTP/1.1\r\n" + EMPTY, "4"),
    bad("tab before the status", b"HTTP/1.1\t200 OK\r\n" + EMPTY, "4"),
    bad("two spaces before the status", b"HTTP/1.1  200 OK\r\n" + EMPTY, "4"),
    bad("NUL in the reason", b"HTTP/1.1 200 O\x00K\r\n" + EMPTY, "4"),
    bad("escape in the reason", b"HTTP/1.1 200 \x1b[2J\r\n" + EMPTY, "4"),
    bad("CR in the reason", b"HTTP/1.1 200 OK\rSet-Cookie: a\r\n" + EMPTY, "2.2"),
    bad("HTTP/0.9", b"<html>hello</html>\r\n\r\n", "2.3"),
    bad("HTTP/0.9 by name", b"HTTP/0.9 200 OK\r\n" + EMPTY),
    bad("HTTP/1.2", b"HTTP/1.2 200 OK\r\n" + EMPTY),
    bad("HTTP/2.0", b"HTTP/2.0 200 OK\r\n" + EMPTY),
    bad("HTTP/2 frames", b"\x00\x00\x12\x04\x00\x00\x00\x00\x00" + b"\x00" * 18),
    bad("lower-case protocol", b"http/1.1 200 OK\r\n" + EMPTY, "2.3"),
    bad("RTSP", b"RTSP/1.0 200 OK\r\n" + EMPTY),
    bad("RTSP after 100", CONTINUE + b"RTSP/1.1 200 OK\r\n" + EMPTY),
    bad("ICY", b"ICY 200 OK\r\n" + EMPTY),
    bad("garbage before", b"garbage" + HELLO),
    bad("empty line before", b"\r\n" + HELLO),
    bad("empty line after 100", CONTINUE + b"\r\n" + HELLO),
    bad("a request", b"GET / HTTP/1.1\r\nHost: a\r\n\r\n"),
    bad("NUL in a value", head(b"X: a\x00b"), "RFC 9110 5.5"),
    bad("control in a value", head(b"X: a\x01b"), "RFC 9110 5.5"),
    bad("delete in a value", head(b"X: a\x7fb"), "RFC 9110 5.5"),
    bad("CR in a value", head(b"X: a\rSet-Cookie: b=1"), "RFC 9110 5.5"),
    bad("LF in a value", head(b"X: a\nSet-Cookie: b=1"), "2.2"),
    bad("CR LF CR in a value", head(b"X: a\r\n\rSet-Cookie: b=1"), "2.2"),
    bad("NUL in a name", head(b"X\x00: a"), "RFC 9110 5.1"),
    bad("empty name", head(b": a"), "RFC 9110 5.1"),
    bad("space before the colon", head(b"X : a"), "5.1"),
    bad("no colon", head(b"X"), "5"),
    bad("folded", head(b"X: a\r\n b"), "5.2"),
    bad("folded first line", head(b" X: a"), "2.2"),
    bad("LF everywhere", b"HTTP/1.1 200 OK\nContent-Length: 0\n\n"),
    bad("LF as the end of the head", OK + b"Content-Length: 0\r\n\n"),
    bad("unasked 101", b"HTTP/1.1 101 S\r\nConnection: upgrade\r\nUpgrade: websocket\r\n\r\n", "RFC 9110 7.8"),
    bad("unasked h2c", b"HTTP/1.1 101 S\r\nConnection: upgrade\r\nUpgrade: h2c\r\n\r\n", "RFC 9110 7.8"),
    bad("300,000 bytes of a field", head(b"X: " + b"a" * 300_000)),
    bad("300 fields", head(b"\r\n".join([b"X: a"] * 300))),
    bad("head without end", OK + b"X: " + b"a" * 300_000),
    bad("100 without end", CONTINUE * 20_000),
    bad("large 100s", (b"HTTP/1.1 100 Continue\r\nX: " + b"a" * 30_000 + b"\r\n\r\n") * 5 + HELLO),
    bad("longer than said, at once", OK + b"Content-Length: 5\r\n\r\nhello world", "6.3"),
    bad("second answer, at once", HELLO + FORGED, "9.2"),
    bad("chunk size with a sign, at once", CHUNKED + b"+5\r\nhello\r\n0\r\n\r\n", "7.1"),
    bad("bytes after the last chunk, at once", CHUNKED + b"5\r\nhello\r\n0\r\n\r\n" + FORGED),
    cut("shorter than said", OK + b"Content-Length: 50\r\n\r\nhello", ends=True),
    cut("chunks without the last", CHUNKED + b"5\r\nhello\r\n", ends=True),
    cut("last chunk without its end", CHUNKED + b"5\r\nhello\r\n0\r\n", ends=True),
    cut("chunk shorter than said", CHUNKED + b"5\r\nhel", ends=True),
    cut("chunk size with a sign", CHUNKED + b"1\r\na\r\n", b"+5\r\nhello\r\n0\r\n\r\n", section="7.1"),
    cut("chunk size with a prefix", CHUNKED + b"1\r\na\r\n", b"0x5\r\nhello\r\n0\r\n\r\n", section="7.1"),
    cut("chunk size with a space", CHUNKED + b"1\r\na\r\n", b"5 \r\nhello\r\n0\r\n\r\n", section="7.1"),
    cut("chunk size that overflows", CHUNKED + b"1\r\na\r\n", b"10000000000000000\r\n\r\n", section="7.1"),
    cut("chunk size of junk", CHUNKED + b"1\r\na\r\n", b"hello", section="7.1"),
    cut("chunk longer than said", CHUNKED + b"1\r\na\r\n", b"4\r\nhello\r\n0\r\n\r\n", section="7.1"),
    cut("LF after a chunk size", CHUNKED + b"1\r\na\r\n", b"5\nhello\r\n0\r\n\r\n", section="2.2"),
    cut("LF as the end of chunks", CHUNKED + b"1\r\na\r\n", b"0\r\n\n", section="2.2"),
    cut("NUL in an extension", CHUNKED + b"1\r\na\r\n", b"5;\x00\r\nhello\r\n0\r\n\r\n", section="7.1.1"),
    cut("length in a trailer", CHUNKED + b"1\r\na\r\n", b"0\r\nContent-Length: 5\r\n\r\n", section="RFC 9110 6.5.1"),
    cut(
        "coding and length in a trailer",
        CHUNKED + b"1\r\na\r\n",
        b"0\r\nTransfer-Encoding: x\r\nContent-Length: 1\r\n\r\n",
    ),
    cut("CR in a trailer", CHUNKED + b"1\r\na\r\n", b"0\r\nX: a\rb\r\n\r\n", section="2.2"),
    cut("folded trailer", CHUNKED + b"1\r\na\r\n", b"0\r\nX: a\r\n b\r\n\r\n", section="5.2"),
    cut("trailers without end", CHUNKED + b"1\r\na\r\n", b"0\r\nX: " + b"a" * 100_000),
    cut("extension without end", CHUNKED + b"1\r\na\r\n", b"5;" + b"a" * 100_000),
    cut("longer than said by the end", OK + b"Content-Length: 5\r\n\r\nhell", b"o" + FORGED, section="6.3"),
    # Whole for the visitor, but what came with it is nobody's answer.
    whole("bytes after a length", HELLO, FORGED, section="9.2", body=b"hello"),
    whole("line end after a length", HELLO, b"\r\n", body=b"hello"),
    whole("bytes after chunks", CHUNKED + b"5\r\nhello\r\n0\r\n\r\n", FORGED, section="9.2", body=b"hello"),
    whole("bytes after no body", OK + EMPTY, FORGED, section="9.2"),
    whole("204 with a body", b"HTTP/1.1 204 N\r\nContent-Length: 5\r\n\r\nhello", section="6.3 rule 1", status=204),
    whole(
        "204 with chunks", b"HTTP/1.1 204 N\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n", status=204
    ),
    whole("304 with a body", b"HTTP/1.1 304 N\r\nContent-Length: 5\r\n\r\nhello", section="6.3 rule 1", status=304),
    whole("304 with an answer after it", b"HTTP/1.1 304 N\r\n\r\n" + FORGED, section="6.3 rule 1", status=304),
    whole("HEAD with a body", HELLO, section="6.3 rule 1", method="HEAD"),
    whole("HEAD with chunks", CHUNKED + b"5\r\nhello\r\n0\r\n\r\n", section="6.3 rule 1", method="HEAD"),
    whole("HEAD with an answer after it", OK + EMPTY + FORGED, section="6.3 rule 1", method="HEAD"),
    whole("HEAD after 100 with a body", CONTINUE + HELLO, method="HEAD"),
]


class Liar:
    """A backend that gives ``row``'s answer to a request for ``/bad`` and an honest one to any other."""

    def __init__(self) -> None:
        self.row = TABLE[0]
        self.go_on = threading.Event()
        self.asked: list[tuple[int, bytes]] = []
        "the connection's number and the target of each request"
        self.over: set[int] = set()
        "numbers of connections that the tunnel has ended"
        self._numbers = iter(range(1_000_000))

    def __call__(self, connection: Connection) -> None:
        number = next(self._numbers)
        try:
            while request := connection.head():
                self.asked.append((number, request.split(b" ")[1]))
                if request.split(b" ")[1] != b"/bad":
                    connection.answer(200, b"honest")
                    continue
                connection.send(self.row.parts[0])
                for part in self.row.parts[1:]:
                    assert self.go_on.wait(10)
                    connection.send(part)
                if self.row.ends:
                    assert self.go_on.wait(10)
                    return
        finally:
            self.over.add(number)

    def ended(self, number: int) -> None:
        """Wait until the tunnel has ended that connection."""
        poll(lambda: number in self.over, what=f"the end of the connection that had: {self.row.name}")


liar = Liar()


@pytest.fixture(scope="module")
def backend() -> Iterator[RawBackend]:
    with RawBackend(liar) as backend:
        yield backend


@pytest.fixture(scope="module")
def tunnels(tmp_path_factory: pytest.TempPathFactory, backend: RawBackend) -> Iterator[Callable[[str], Tunnel]]:
    """One tunnel of each engine."""
    made: dict[str, Tunnel] = {}
    with Processes(tmp_path_factory.mktemp("processes")) as processes:

        def tunnel(engine: str) -> Tunnel:
            if engine not in made:
                made[engine] = processes.tunnel(backend.target, (engine, engine))
            return made[engine]

        yield tunnel


@pytest.fixture
def tunnel(engine: str, tunnels: Callable[[str], Tunnel], backend: RawBackend) -> Tunnel:
    found = tunnels(engine)
    backend.cut()
    honest(found)
    return found


def honest(tunnel: Tunnel) -> int:
    """An ordinary request is answered; the number of the backend connection that it took."""
    with RawVisitor(tunnel.address) as visitor:
        visitor.get("/honest")
        got = visitor.read_answer()
    assert (got.status, got.body) == (200, b"honest")
    return liar.asked[-1][0]


@pytest.fixture(scope="module")
def client() -> Iterator[httpx.Client]:
    with httpx.Client(
        trust_env=False, verify=False, timeout=20, limits=httpx.Limits(max_keepalive_connections=0)
    ) as client:
        yield client


def by_standard_library(client: httpx.Client, tunnel: Tunnel, row: Row) -> tuple[int, bytes]:
    connection = http.client.HTTPConnection(*tunnel.address, timeout=20)
    try:
        connection.request(row.method, "/bad")
        response = connection.getresponse()
        liar.go_on.set()
        return response.status, response.read()
    finally:
        connection.close()


def by_httpx(client: httpx.Client, tunnel: Tunnel, row: Row) -> tuple[int, bytes]:
    host, port = tunnel.address
    with client.stream(row.method, f"http://{host}:{port}/bad") as response:
        liar.go_on.set()
        return response.status_code, response.read()


LIBRARIES = {"http.client": by_standard_library, "httpx": by_httpx}
# What they raise for an answer that was cut.
BROKEN = (http.client.HTTPException, OSError, httpx.RemoteProtocolError, httpx.ReadError)


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("expected", [BAD_GATEWAY, CUT, WHOLE])
def test_broken_answer_is_refused_or_cut_and_its_connection_never_used_again(
    expected: str, library: str, tunnel: Tunnel, client: httpx.Client
) -> None:
    for row in TABLE:
        if row.expected != expected:
            continue
        liar.row = row
        liar.go_on.clear()
        kept = honest(tunnel)
        try:
            status, body = LIBRARIES[library](client, tunnel, row)
        except BROKEN:
            assert (row.name, CUT) == (row.name, expected)
        else:
            assert (row.name, expected) != (row.name, CUT), f"it looks whole: {status} {body!r}"
            assert (row.name, status) == (row.name, 502 if expected == BAD_GATEWAY else row.status)
            assert expected == BAD_GATEWAY or (row.name, body) == (row.name, row.body)
        assert (row.name, liar.asked[-1]) == (row.name, (kept, b"/bad")), "asked on another connection"
        liar.ended(kept)
        used = honest(tunnel)
        assert used not in liar.over, row.name
        assert used > kept, row.name


def test_connection_of_an_honest_backend_is_used_again(tunnel: Tunnel) -> None:
    assert len({honest(tunnel) for _ in range(5)}) == 1


@pytest.mark.parametrize(
    "late",
    [b"HTTP/1.1 200 OK\r\nContent-Length: 6\r\n\r\nforged", b"0\r\n\r\n", b"\r\n"],
    ids=["answer", "chunk", "line end"],
)
def test_bytes_that_nobody_asked_for_answer_nobody(late: bytes, tunnel: Tunnel, client: httpx.Client) -> None:
    """They come on a kept connection before the next request does."""
    liar.row = Row("late", (HELLO, late), WHOLE)
    for _ in range(5):
        liar.go_on.clear()
        kept = honest(tunnel)
        assert by_standard_library(client, tunnel, liar.row) == (200, b"hello")
        liar.ended(kept)
        assert honest(tunnel) > kept


def test_interim_answers_pass_as_far_as_a_head_may_go(tunnel: Tunnel) -> None:
    liar.row = Row("many", (b"HTTP/1.1 102 Processing\r\n\r\n" * 500 + HELLO,), WHOLE)
    with RawVisitor(tunnel.address) as visitor:
        visitor.get("/bad")
        for _ in range(500):
            assert visitor.read_line() == b"HTTP/1.1 102 Processing\r\n"
            assert visitor.read_line() == b"\r\n"
        assert visitor.read_answer().body == b"hello"


def test_interim_answers_without_end_are_cut_for_a_visitor_of_http_1_0(tunnel: Tunnel) -> None:
    """Such a visitor gets none of them, and would wait for ever."""
    liar.row = Row("flood", (CONTINUE * 20_000,), BAD_GATEWAY)
    with RawVisitor(tunnel.address) as visitor:
        visitor.send(b"GET /bad HTTP/1.0\r\nHost: a\r\n\r\n")
        assert visitor.read_answer().error == "http_protocol_error"


def test_the_table_is_as_long_as_it_should_be() -> None:
    assert len(TABLE) >= 100
    assert len({row.name for row in TABLE}) == len(TABLE)
