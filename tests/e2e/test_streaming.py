"""Bodies that come and go piece by piece, in both directions at once, and answers that do not wait for the request."""

import http.client
import socket
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from benchmarks.streaming import Delays, Pieces, chunk, download, upload
from tests.support.backends import Connection, RawBackend, echo
from tests.support.processes import Processes, Server, Tunnel
from tests.support.visits import RawVisitor, visit

pytestmark = pytest.mark.either

# Small enough to pass within a test: none of them is a limit on the whole.
SERVER_LIMITS = ("--keep-alive", "1s", "--body-idle", "1s", "--head-time", "1s")
CLIENT_LIMITS = ("--backend-keep-alive", "1s", "--backend-head-time", "1s", "--backend-connect-time", "1s")


@pytest.fixture(scope="module")
def tunnels(processes: Processes) -> Callable[[str, str], Tunnel]:
    """A tunnel of an engine to a backend; the tests of this file share them."""
    servers: dict[str, Server] = {}
    made: dict[tuple[str, str], Tunnel] = {}

    def tunnel(engine: str, target: str) -> Tunnel:
        if engine not in servers:
            servers[engine] = processes.server(*SERVER_LIMITS, engine=engine)
        key = (engine, target)
        if key not in made:
            name = f"t{len(made)}"
            client = processes.client(servers[engine], target, *CLIENT_LIMITS, tunnel=name, engine=engine)
            made[key] = Tunnel(servers[engine], client, name)
        return made[key]

    return tunnel


Tunnels = Callable[[str, str], Tunnel]


@pytest.fixture
def tunnel(engine: str, tunnels: Tunnels, raw: RawBackend) -> Iterator[Tunnel]:
    """A tunnel to ``raw``, on each engine, with limits of one second."""
    raw.requests.clear()
    yield tunnels(engine, raw.target)
    raw.handler = echo


def post(tunnel: Tunnel, *fields: str, target: str = "/") -> bytes:
    """The head of an upload."""
    return "\r\n".join([f"POST {target} HTTP/1.1", f"Host: {tunnel.host}", *fields, "", ""]).encode()


CHUNKED = "Transfer-Encoding: chunked"


def read_head(visitor: RawVisitor) -> bytes:
    lines = []
    while (line := visitor.read_line()) != b"\r\n":
        assert line, "the connection ended within a head"
        lines.append(line)
    return b"".join(lines).lower()


def read_chunk(source: RawVisitor | Connection) -> bytes:
    """The next chunk; empty for the last one."""
    line = source.read_line() if isinstance(source, RawVisitor) else source.line() + b"\r\n"
    return source.read(int(line, 16) + 2)[:-2]


# Single pieces. The figures are for benchmarks/streaming.py to show; here it is only that no piece waits for the next.


@pytest.mark.slow
@pytest.mark.parametrize("way", ["events", "upload", "tokens of an application"])
def test_each_of_many_pieces_comes_by_itself_and_at_once(engine: str, tunnels: Tunnels, way: str) -> None:
    """250 of them, one every 20 ms. What else the machine does may spoil a run, but not three."""
    with Pieces() as backend:
        target = "benchmarks.streaming:app" if way.startswith("tokens") else backend.target
        tunnel = tunnels(engine, target)
        measure: Callable[[tuple[str, int], str, int, float], Delays] = upload if way == "upload" else download
        for _ in range(3):
            found = measure(tunnel.address, tunnel.host, 250, 0.02)
            print(f"{engine} {way}: p50 {found.at(0.5):.2f} p99 {found.at(0.99):.2f} max {found.at(1):.2f} ms")
            assert len(found.seconds) == 250
            if found.merged == 0 and found.at(0.99) < 50:
                return
    raise AssertionError(f"{found.merged} merged, p50 {found.at(0.5):.2f} ms, p99 {found.at(0.99):.2f} ms")


def test_pieces_of_an_upload_and_of_its_answer_cross(tunnel: Tunnel, raw: RawBackend) -> None:
    """An echo: each piece is answered before the next one is sent, on one exchange."""

    def handle(connection: Connection) -> None:
        connection.head()
        connection.send(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
        while piece := read_chunk(connection):
            connection.send(chunk(piece[::-1]))
        connection.send(b"0\r\n\r\n")

    raw.handler = handle
    with RawVisitor(tunnel.address) as visitor:
        visitor.send(post(tunnel, CHUNKED))
        assert b"transfer-encoding: chunked" in read_head(visitor)
        for number in range(100):
            visitor.send(chunk(b"piece %d" % number))
            assert read_chunk(visitor) == (b"piece %d" % number)[::-1]
        visitor.send(b"0\r\n\r\n")
        assert read_chunk(visitor) == b""
        assert visitor.read_all() == b""


def test_megabytes_cross_on_one_exchange(tunnel: Tunnel, raw: RawBackend) -> None:
    size, block = 3 * 1024 * 1024, bytes(range(256)) * 256

    def handle(connection: Connection) -> None:
        connection.head()
        connection.send(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % size)
        for _ in range(0, size, len(block)):
            connection.send(connection.read(len(block)))

    raw.handler = handle
    with RawVisitor(tunnel.address) as visitor:
        visitor.send(post(tunnel, f"Content-Length: {size}"))

        def send() -> None:
            for _ in range(0, size, len(block)):
                visitor.send(block)

        sender = threading.Thread(target=send, daemon=True)
        sender.start()
        read_head(visitor)
        for _ in range(0, size, len(block)):
            assert visitor.read(len(block)) == block
        sender.join(10)


def test_exchange_may_last_longer_than_every_limit(tunnel: Tunnel, raw: RawBackend) -> None:
    """A piece every 0.3 s each way for 2.4 s; every limit is one second."""

    def handle(connection: Connection) -> None:
        connection.head()
        connection.send(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
        while piece := read_chunk(connection):
            connection.send(chunk(piece))
        connection.send(b"0\r\n\r\n")

    raw.handler = handle
    with RawVisitor(tunnel.address) as visitor:
        visitor.send(post(tunnel, CHUNKED))
        read_head(visitor)
        began = time.monotonic()
        for number in range(8):
            time.sleep(0.3)
            visitor.send(chunk(b"%d" % number))
            assert read_chunk(visitor) == b"%d" % number
        visitor.send(b"0\r\n\r\n")
        assert read_chunk(visitor) == b""
        assert time.monotonic() - began > 2


def test_answer_may_be_silent_for_longer_than_every_limit(tunnel: Tunnel, raw: RawBackend) -> None:
    def handle(connection: Connection) -> None:
        connection.head()
        connection.send(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
        time.sleep(1.8)
        connection.send(b"4\r\nlate\r\n0\r\n\r\n")

    raw.handler = handle
    assert visit(tunnel.address, host=tunnel.host).body == b"late"


# Answers before the end of the request.

EARLY = {
    "413, small": (413, b"too large"),
    "200, 2 MB": (200, b"whole " * 350_000),
    "401, empty": (401, b""),
}
FRAMINGS = ["length", "chunks"]


@pytest.mark.parametrize("framing", FRAMINGS)
@pytest.mark.parametrize("early", EARLY.values(), ids=EARLY.keys())
def test_answer_that_ends_before_the_upload_arrives_whole(
    tunnel: Tunnel, raw: RawBackend, framing: str, early: tuple[int, bytes]
) -> None:
    """A visitor that goes on sending meanwhile gets it too, and neither connection is used for anything else."""
    status, body = early
    gone = threading.Event()

    def handle(connection: Connection) -> None:
        connection.head()
        connection.read(10)
        connection.answer(status, body)
        connection.gone()
        gone.set()

    raw.handler = handle
    with RawVisitor(tunnel.address) as visitor:
        visitor.send(post(tunnel, "Content-Length: 10000000" if framing == "length" else CHUNKED))
        visitor.send(b"x" * 100_000 if framing == "length" else chunk(b"x" * 100_000))
        got = visitor.read_answer()
        assert (got.status, got.body, got["connection"]) == (status, body, "close")
        assert gone.wait(10)  # the backend is not left waiting for the rest
        visitor.send(b"x" * 10_000 if framing == "length" else chunk(b"x" * 10_000))
        assert visitor.read_all() == b""
    before = raw.connections
    raw.handler = echo
    assert visit(tunnel.address, "/after", host=tunnel.host).body.startswith(b"GET /after ")
    assert raw.connections == before + 1


def test_answer_that_ends_before_a_flood_of_upload_arrives_whole(tunnel: Tunnel, raw: RawBackend) -> None:
    """A visitor that sends without looking for an answer: 30 MB, of which the backend reads nothing."""

    def handle(connection: Connection) -> None:
        connection.head()
        connection.answer(413, b"too large")
        connection.gone()

    raw.handler = handle
    with RawVisitor(tunnel.address) as visitor:
        visitor.send(post(tunnel, "Content-Length: 30000000"))

        def send() -> None:
            try:
                for _ in range(300):
                    visitor.send(b"x" * 100_000)
            except OSError:
                pass  # cut, once the answer had its time

        sender = threading.Thread(target=send, daemon=True)
        sender.start()
        got = visitor.read_answer()
        assert (got.status, got.body) == (413, b"too large")
        sender.join(10)
        assert not sender.is_alive()


def test_answer_that_begins_early_ends_with_the_upload(tunnel: Tunnel, raw: RawBackend) -> None:
    """The backend's connection lives on. The visitor's was said to end, as nobody could know then that it need not."""

    def handle(connection: Connection) -> None:
        while connection.head():
            connection.send(b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nearly")
            assert connection.read(6) == b"upload"
            connection.send(b"-late")

    raw.handler = handle
    before = raw.connections
    for _ in range(3):
        with RawVisitor(tunnel.address) as visitor:
            visitor.send(post(tunnel, "Content-Length: 6"))
            head = read_head(visitor)
            assert head.startswith(b"http/1.1 200 ")
            assert b"connection: close\r\n" in head
            assert visitor.read(5) == b"early"
            visitor.send(b"upload")
            assert visitor.read_all() == b"-late"
    assert raw.connections - before <= 1


def test_standard_library_gets_an_early_answer(tunnel: Tunnel, raw: RawBackend) -> None:
    """http.client sends all of the body before it looks for an answer."""

    def handle(connection: Connection) -> None:
        connection.head()
        connection.answer(413, b"too large")
        connection.gone()

    raw.handler = handle
    client = http.client.HTTPConnection(*tunnel.address, timeout=10)
    client.request("POST", "/", body=b"x" * 500_000, headers={"Host": tunnel.host})
    with client.getresponse() as response:
        assert (response.status, response.read()) == (413, b"too large")
    raw.handler = echo
    client.request("GET", "/next", headers={"Host": tunnel.host})
    with client.getresponse() as response:
        assert response.status == 200
    client.close()


def test_application_answers_piece_by_piece_while_it_is_asked(engine: str, tunnels: Tunnels) -> None:
    """ASGI, full duplex: each part of the upload is answered before the next one is sent."""
    tunnel = tunnels(engine, "tests.support.apps:mirror")
    with RawVisitor(tunnel.address) as visitor:
        visitor.send(post(tunnel, CHUNKED))
        for number in range(20):
            visitor.send(chunk(b"part %d" % number))
            if not number:
                read_head(visitor)
            assert read_chunk(visitor) == b"part %d" % number
        visitor.send(b"0\r\n\r\n")
        assert read_chunk(visitor) == b""


def test_application_may_answer_before_the_upload_has_ended(engine: str, tunnels: Tunnels) -> None:
    tunnel = tunnels(engine, "tests.support.apps:mirror")
    with RawVisitor(tunnel.address) as visitor:
        visitor.send(post(tunnel, "Content-Length: 5000000", target="/refuse") + b"x" * 100_000)
        got = visitor.read_answer()
        assert (got.status, got.body) == (413, b"too large")
        assert visitor.read_all() == b""
    assert visit(tunnel.address, method="POST", body=b"abc", host=tunnel.host).body == b"abc"


@pytest.mark.parametrize("end", ["FIN", "RST"])
def test_upload_that_is_left_is_known_to_the_backend_though_the_answer_has_begun(
    tunnel: Tunnel, raw: RawBackend, end: str
) -> None:
    asked, gone = threading.Event(), threading.Event()

    def handle(connection: Connection) -> None:
        connection.head()
        connection.send(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nbegun\r\n")
        asked.set()
        connection.gone()
        gone.set()

    raw.handler = handle
    with RawVisitor(tunnel.address) as visitor:
        visitor.send(post(tunnel, CHUNKED) + chunk(b"a"))
        read_head(visitor)
        assert read_chunk(visitor) == b"begun"
        if end == "RST":
            visitor.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\0\0\0\0\0\0\0")
    assert gone.wait(10)
