"""What a visitor gets when something is wrong, at whichever end it is, and that each limit holds."""

import http.client
import json
import re
import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from pathlib import Path

import httpx
import pytest

from tests.support.backends import Connection, Handler, RawBackend, answer, echo
from tests.support.processes import Processes, Server, Tunnel, poll
from tests.support.visits import RawVisitor, visit

pytestmark = pytest.mark.either

LIMITS = (
    *("--head-size", "4KiB", "--head-fields", "20", "--target-length", "200"),
    *("--head-time", "400ms", "--body-idle", "400ms", "--keep-alive", "600ms"),
    *("--max-visitors", "20", "--max-in-flight", "8", "--slot-wait", "300ms"),
)
TIMES = ("--backend-connect-time", "500ms", "--backend-head-time", "500ms")


@pytest.fixture(scope="module")
def servers(processes: Processes) -> Callable[[str], Server]:
    """A running server of an engine, with small limits; the tests of this file share it."""
    made: dict[str, Server] = {}

    def server(engine: str) -> Server:
        if engine not in made:
            made[engine] = processes.server(*LIMITS, engine=engine)
        return made[engine]

    return server


@pytest.fixture(scope="module")
def tunnels(
    processes: Processes, servers: Callable[[str], Server], raw: RawBackend
) -> Callable[[tuple[str, str]], Tunnel]:
    """A tunnel to ``raw`` of two engines."""
    made: dict[tuple[str, str], Tunnel] = {}

    def tunnel(engines: tuple[str, str]) -> Tunnel:
        if engines not in made:
            server, name = servers(engines[0]), f"raw-{engines[1]}"
            client = processes.client(server, raw.target, *TIMES, tunnel=name, engine=engines[1])
            made[engines] = Tunnel(server, client, name)
        return made[engines]

    return tunnel


@pytest.fixture
def tunnel(engine: str, tunnels: Callable[[tuple[str, str]], Tunnel], raw: RawBackend) -> Iterator[Tunnel]:
    """A tunnel to ``raw``, on each engine."""
    yield _fresh(tunnels((engine, engine)), raw)
    raw.handler = echo


@pytest.fixture
def mixed(engines: tuple[str, str], tunnels: Callable[[tuple[str, str]], Tunnel], raw: RawBackend) -> Iterator[Tunnel]:
    """A tunnel to ``raw``, on each pair of engines."""
    yield _fresh(tunnels(engines), raw)
    raw.handler = echo


def _fresh(tunnel: Tunnel, raw: RawBackend) -> Tunnel:
    raw.cut()  # no kept connection: a request on one may be asked again
    raw.requests.clear()
    return tunnel


def once(*parts: bytes, reset: bool = False) -> Handler:
    """A handler that answers a connection's first request with these bytes and ends it."""

    def handle(connection: Connection) -> None:
        connection.body(connection.head())
        connection.send(*parts)
        if reset:
            connection.reset()

    return handle


# Rows of the table: no tunnel, no client, no room.


def test_unknown_tunnel_is_404(tunnel: Tunnel) -> None:
    got = visit(tunnel.address, host="nobody.localhost")
    assert (got.status, got.error) == (404, "destination_not_found")
    assert got["retry-after"] == ""
    assert got["cache-control"] == "no-store"


def test_tunnel_without_client_is_503(engine: str, servers: Callable[[str], Server]) -> None:
    server = servers(engine)
    with RawBackend(echo) as backend:
        client = server.processes.client(server, backend.target, tunnel="left", engine=engine)
        assert visit(server.http, host="left.localhost").status == 200
        assert client.process.stop() == 0
    got = visit(server.http, host="left.localhost")
    assert (got.status, got.error) == (503, "destination_unavailable")
    assert int(got["retry-after"]) > 0


def test_more_in_flight_than_a_tunnel_may_have_is_503(tunnel: Tunnel, raw: RawBackend) -> None:
    held = threading.Event()

    def handle(connection: Connection) -> None:
        while connection.head():
            assert held.wait(10)
            connection.answer(200, b"held")

    raw.handler = handle
    server = tunnel.server
    client = server.processes.client(server, raw.target, tunnel="full", engine=tunnel.client.engine)
    with ThreadPoolExecutor(8) as pool:
        answers = [pool.submit(visit, tunnel.address, host="full.localhost") for _ in range(8)]
        poll(lambda: len(raw.requests) == 8, what="all requests at the backend")
        got = visit(tunnel.address, host="full.localhost")
        held.set()
        assert (got.status, got.error) == (503, "connection_limit_reached")
        assert int(got["retry-after"]) > 0
        assert {answer.result().status for answer in answers} == {200}
    assert visit(tunnel.address, host="full.localhost").status == 200
    assert client.process.stop() == 0


def test_no_free_stream_in_time_is_503(engine: str, processes: Processes) -> None:
    server = processes.server("--slot-wait", "300ms", engine=engine)
    held = threading.Event()

    def handle(connection: Connection) -> None:
        while connection.head():
            assert held.wait(10)
            connection.answer(200, b"held")

    with RawBackend(handle) as backend, ExitStack() as stack:
        client = processes.client(server, backend.target, "--max-links", "1", engine=engine)
        visitors = [stack.enter_context(RawVisitor(server.http)) for _ in range(130)]
        for visitor in visitors:
            visitor.get("/", "Connection: close")
        late = [visitor for visitor in visitors[-20:] if visitor.read_answer().error == "connection_limit_reached"]
        assert len(late) == 20
        held.set()
        answers = [visitor.read_answer() for visitor in visitors[:-20]]
        assert {answer.status for answer in answers} == {200, 503}
        assert sum(answer.status == 200 for answer in answers) >= 90
        assert client.process.stop() == 0
    server.process.kill()


# Rows of the table: the backend.


@pytest.mark.parametrize(
    ("backend", "status", "error"),
    [
        ("http://127.0.0.1:1", 502, "connection_refused"),
        ("unix:/nowhere/socket", 502, "connection_refused"),
        ("http://no-such-name.invalid:80", 502, "dns_error"),
    ],
)
def test_backend_that_cannot_be_reached(
    engine: str, servers: Callable[[str], Server], backend: str, status: int, error: str
) -> None:
    server = servers(engine)
    client = server.processes.client(server, backend, tunnel="down", engine=engine)
    got = visit(server.http, host="down.localhost")
    assert (got.status, got.error) == (status, error)
    got = visit(server.http, host="down.localhost", method="POST", body=b"x" * 100_000)
    assert (got.status, got.error) == (status, error)
    assert client.process.stop() == 0


def test_backend_that_comes_up_is_served_at_once(engine: str, servers: Callable[[str], Server], tmp_path: Path) -> None:
    server = servers(engine)
    client = server.processes.client(server, f"unix:{tmp_path}/socket", tunnel="later", engine=engine)
    assert visit(server.http, host="later.localhost").status == 502
    with RawBackend(echo, path=tmp_path / "socket"):
        assert visit(server.http, host="later.localhost").status == 200
    assert client.process.stop() == 0


def test_backend_that_accepts_nothing_is_504(engine: str, servers: Callable[[str], Server]) -> None:
    server = servers(engine)
    with ExitStack() as stack:
        listener = stack.enter_context(socket.create_server(("127.0.0.1", 0), backlog=0))
        # What fits into the backlog is accepted by the kernel; of the next ones it drops the SYN.
        for _ in range(4):
            filler = stack.enter_context(socket.socket())
            filler.setblocking(False)
            filler.connect_ex(listener.getsockname())
        backend = f"127.0.0.1:{listener.getsockname()[1]}"
        client = server.processes.client(server, backend, *TIMES, tunnel="mute", engine=engine)
        got = visit(server.http, host="mute.localhost")
        assert (got.status, got.error) == (504, "connection_timeout")
        assert client.process.stop() == 0


def test_backend_that_does_not_answer_in_time_is_504(mixed: Tunnel, raw: RawBackend) -> None:
    gone = threading.Event()

    def handle(connection: Connection) -> None:
        connection.head()
        connection.gone()
        gone.set()

    raw.handler = handle
    got = visit(mixed.address, host=mixed.host)
    assert (got.status, got.error) == (504, "http_response_timeout")
    assert gone.wait(5)


@pytest.mark.parametrize("parts", [(), (b"HTTP/1.1 200 OK\r\nContent-Le",)], ids=["nothing", "half a head"])
@pytest.mark.parametrize("reset", [False, True], ids=["FIN", "RST"])
def test_backend_that_ends_before_its_head_is_502(
    mixed: Tunnel, raw: RawBackend, parts: tuple[bytes, ...], reset: bool
) -> None:
    raw.handler = once(*parts, reset=reset)
    got = visit(mixed.address, host=mixed.host)
    assert (got.status, got.error) == (502, "connection_terminated")


OK = b"HTTP/1.1 200 OK\r\n"


@pytest.mark.parametrize(
    "head",
    [
        b"SSH-2.0-OpenSSH_9.2\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        b"HTTP/1.1 abc OK\r\nContent-Length: 0\r\n\r\n",
        b"HTTP/1.1 99 Low\r\nContent-Length: 0\r\n\r\n",
        b"HTTP/1.1 1000 High\r\nContent-Length: 0\r\n\r\n",
        b"HTTP/2.0 200 OK\r\nContent-Length: 0\r\n\r\n",
        b"ICY 200 OK\r\nContent-Length: 0\r\n\r\n",
        b"HTTP/1.1 101 Switching Protocols\r\nConnection: upgrade\r\nUpgrade: websocket\r\n\r\n",
        OK + b"Content-Length: 5\r\nContent-Length: 6\r\n\r\nhello",
        OK + b"Content-Length: -5\r\n\r\nhello",
        OK + b"Content-Length: 0x5\r\n\r\nhello",
        OK + b"Content-Length: 99999999999999999999\r\n\r\nhello",
        OK + b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n",
        OK + b"Transfer-Encoding: xchunked\r\n\r\nhello",
        OK + b"Transfer-Encoding: chunked, gzip\r\n\r\nhello",
        OK + b"X-A : 1\r\nContent-Length: 0\r\n\r\n",
        OK + b"X A: 1\r\nContent-Length: 0\r\n\r\n",
        OK + b": 1\r\nContent-Length: 0\r\n\r\n",
        OK + b"X-A: a\x00b\r\nContent-Length: 0\r\n\r\n",
        OK + b"X-A: a\x1bb\r\nContent-Length: 0\r\n\r\n",
        OK + b"X-A: 1\rX-B: 2\r\nContent-Length: 0\r\n\r\n",
        OK + b"X-A: " + b"a" * 300_000 + b"\r\nContent-Length: 0\r\n\r\n",
        OK + b"X-A: 1\r\n" * 5000 + b"Content-Length: 0\r\n\r\n",
    ],
    ids=lambda head: ascii(head[:60])[2:-1],
)
def test_answer_that_is_not_http_is_502(tunnel: Tunnel, raw: RawBackend, head: bytes) -> None:
    raw.handler = once(head)
    got = visit(tunnel.address, host=tunnel.host)
    assert (got.status, got.error) == (502, "http_protocol_error")
    raw.handler = echo
    assert visit(tunnel.address, host=tunnel.host).status == 200


def test_backend_connection_with_bytes_too_many_is_not_used_again(tunnel: Tunnel, raw: RawBackend) -> None:
    stray = b"HTTP/1.1 200 OK\r\nContent-Length: 6\r\n\r\nforged"

    def handle(connection: Connection) -> None:
        while connection.head():
            connection.send(b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\ngood" + stray)

    raw.handler = handle
    for _ in range(3):
        try:
            # Refusing all of it is as good: it cannot be known which of the bytes were meant.
            got = visit(tunnel.address, host=tunnel.host)
            assert (got.status, got.body) == (200, b"good") or (got.status, got.error) == (502, "http_protocol_error")
        except http.client.IncompleteRead:
            pass


def test_answers_of_the_backend_pass_whatever_their_status(tunnel: Tunnel, raw: RawBackend) -> None:
    for status in (400, 404, 408, 421, 429, 500, 502, 503, 504, 599):
        raw.handler = answer(status, b"mine", b"Retry-After: 7")
        got = visit(tunnel.address, host=tunnel.host)
        assert (got.status, got.body, got["proxy-status"], got["retry-after"]) == (status, b"mine", "", "7")


# Rows of the table: after the head.

LENGTH = OK + b"Content-Length: 100000\r\n\r\n"
CHUNKED = OK + b"Transfer-Encoding: chunked\r\n\r\n"
CUTS: dict[str, tuple[bytes, ...]] = {
    "length, FIN at once": (LENGTH,),
    "length, FIN": (
        LENGTH,
        b"a" * 99_999,
    ),
    "length, RST": (
        LENGTH,
        b"a" * 50_000,
    ),
    "chunked, FIN at once": (CHUNKED,),
    "chunked, FIN between chunks": (
        CHUNKED,
        b"5\r\nhello\r\n",
    ),
    "chunked, FIN in a chunk": (
        CHUNKED,
        b"5\r\nhel",
    ),
    "chunked, FIN in the last chunk": (
        CHUNKED,
        b"5\r\nhello\r\n0\r\n",
    ),
    "chunked, RST": (
        CHUNKED,
        b"5\r\nhello\r\n",
    ),
    "chunked, junk for a size": (
        CHUNKED,
        b"5\r\nhello\r\n",
        b"zz\r\nhello\r\n0\r\n\r\n",
    ),
    "close-delimited, RST": (
        OK + b"\r\n",
        b"hello" * 1000,
    ),
}


@pytest.mark.parametrize("cut", CUTS)
def test_cut_answer_never_looks_complete(mixed: Tunnel, raw: RawBackend, cut: str) -> None:
    raw.handler = once(*CUTS[cut], reset="RST" in cut)
    # 502 is right as well: nothing of the answer has gone out when the cut is known at once.
    try:
        got = visit(mixed.address, host=mixed.host)
        assert (got.status, got.error) in {(502, "connection_terminated"), (502, "http_protocol_error")}
    except (http.client.IncompleteRead, ConnectionResetError):
        pass
    headers = {"Host": mixed.host}
    with suppress(httpx.RemoteProtocolError, httpx.ReadError), httpx.Client(trust_env=False, headers=headers) as client:
        assert client.get(f"http://127.0.0.1:{mixed.address[1]}/").status_code == 502


@pytest.mark.parametrize("cut", CUTS)
def test_answer_cut_after_its_head_has_arrived_is_cut_for_the_visitor(
    tunnel: Tunnel, raw: RawBackend, cut: str
) -> None:
    arrived = threading.Event()
    parts = CUTS[cut]

    def handle(connection: Connection) -> None:
        connection.head()
        connection.send(parts[0])
        assert arrived.wait(10)
        connection.send(*parts[1:])
        if "RST" in cut:
            connection.reset()

    raw.handler = handle
    with RawVisitor(tunnel.address) as visitor:
        visitor.get(host=tunnel.host)
        assert visitor.read_line() == b"HTTP/1.1 200 OK\r\n"
        arrived.set()
        try:
            rest = visitor.read_all()
        except ConnectionResetError:
            return
        assert b"HTTP/1.1" not in rest  # no second answer in the middle of the first
        if b"transfer-encoding: chunked" in rest.lower():
            assert not rest.endswith(b"0\r\n\r\n")
        else:
            assert len(rest.partition(b"\r\n\r\n")[2]) < 100_000


@pytest.mark.parametrize("reset", [False, True], ids=["FIN", "RST"])
def test_http_1_0_visitor_sees_a_cut_as_a_reset(tunnel: Tunnel, raw: RawBackend, reset: bool) -> None:
    def handle(connection: Connection) -> None:
        connection.head()
        connection.send(CHUNKED, b"5\r\nhello\r\n")
        if reset:
            connection.reset()

    raw.handler = handle
    with RawVisitor(tunnel.address) as visitor:
        visitor.send(f"GET / HTTP/1.0\r\nHost: {tunnel.host}\r\n\r\n".encode())
        with suppress(ConnectionResetError):
            assert visitor.read_all().startswith(b"HTTP/1.1 502 ")


def test_answer_that_stays_incomplete_is_no_answer_when_the_client_goes(
    engines: tuple[str, str], servers: Callable[[str], Server]
) -> None:
    server = servers(engines[0])

    def handle(connection: Connection) -> None:
        connection.head()
        connection.send(LENGTH, b"a" * 1000)
        connection.gone()

    with RawBackend(handle) as backend, ExitStack() as stack:
        client = server.processes.client(server, backend.target, "--grace", "100ms", tunnel="goes", engine=engines[1])
        visitor = stack.enter_context(RawVisitor(server.http))
        visitor.get(host="goes.localhost")
        assert visitor.read_line() == OK
        client.process.stop()
        with pytest.raises((http.client.IncompleteRead, ConnectionResetError)):
            _read_length(visitor, 100_000)


def test_client_lost_before_a_head_is_502(engines: tuple[str, str], servers: Callable[[str], Server]) -> None:
    server = servers(engines[0])
    asked = threading.Event()

    def handle(connection: Connection) -> None:
        connection.head()
        asked.set()
        connection.gone()

    with RawBackend(handle) as backend, ExitStack() as stack:
        client = server.processes.client(server, backend.target, "--grace", "100ms", tunnel="lost", engine=engines[1])
        visitor = stack.enter_context(RawVisitor(server.http))
        visitor.send(b"POST / HTTP/1.1\r\nHost: lost.localhost\r\nContent-Length: 1\r\n\r\nx")
        assert asked.wait(10)
        client.process.stop()
        got = visitor.read_answer()
        assert (got.status, got.error) == (502, "connection_terminated")


def _read_length(visitor: RawVisitor, length: int) -> None:
    while visitor.read_line() != b"\r\n":
        pass
    body = visitor.read_all()
    if len(body) < length:
        raise http.client.IncompleteRead(body, length - len(body))


# Rows of the table: the visitor.


@pytest.mark.parametrize(
    ("request_bytes", "status"),
    [
        (b"GET / HTTP/1.1\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nHost: a b\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nHost: a/b\r\n\r\n", 400),
        (b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\nhello", 400),
        (b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 400),
        (b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: +5\r\n\r\nhello", 400),
        (b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: xchunked\r\n\r\n0\r\n\r\n", 400),
        (b"GET / HTTP/1.1\nHost: a\n\n", 400),
        (b"GET / HTTP/1.1\r\nHost: a\r\nX-A : 1\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nHost: a\r\nX-A: a\x00b\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nHost: a\r\nX-A: 1\r\n folded\r\n\r\n", 400),
        (b"GET /#fragment HTTP/1.1\r\nHost: a\r\n\r\n", 400),
        (b"GET /a b HTTP/1.1\r\nHost: a\r\n\r\n", 400),
        (b"GET /\r\n", 400),
        (b"hello\r\n\r\n", 400),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n", 400),
        (b"GET /" + b"a" * 200 + b" HTTP/1.1\r\nHost: a\r\n\r\n", 414),
        (b"GET / HTTP/1.1\r\nHost: a\r\nX-A: " + b"a" * 4096 + b"\r\n\r\n", 431),
        (b"GET / HTTP/1.1\r\nHost: a\r\n" + b"X-A: 1\r\n" * 20 + b"\r\n", 431),
    ],
    ids=lambda value: ascii(value[:70])[2:-1] if isinstance(value, bytes) else str(value),
)
def test_request_that_is_refused_at_the_door(
    tunnel: Tunnel, raw: RawBackend, request_bytes: bytes, status: int
) -> None:
    with RawVisitor(tunnel.address) as visitor:
        visitor.send(request_bytes.replace(b"Host: a\r", f"Host: {tunnel.host}\r".encode()))
        got = visitor.read_answer()
        assert (got.status, got.error, got["connection"]) == (status, "http_request_error", "close")
        assert visitor.read_all() == b""
    assert raw.requests == []


def test_target_and_fields_just_within_the_limits_pass(tunnel: Tunnel) -> None:
    with RawVisitor(tunnel.address) as visitor:
        visitor.get("/" + "a" * 199, *["X-A: 1"] * 19, host=tunnel.host)
        assert visitor.read_answer().status == 200


def test_malformed_chunk_of_an_upload_is_400_and_cut_at_the_backend(tunnel: Tunnel, raw: RawBackend) -> None:
    asked, gone = threading.Event(), threading.Event()

    def handle(connection: Connection) -> None:
        connection.head()
        asked.set()
        connection.gone()
        gone.set()

    raw.handler = handle
    with RawVisitor(tunnel.address) as visitor:
        head = f"POST / HTTP/1.1\r\nHost: {tunnel.host}\r\nTransfer-Encoding: chunked\r\n\r\n"
        visitor.send(head.encode() + b"5\r\nhello\r\n")
        assert asked.wait(10)
        visitor.send(b"zz\r\n")
        got = visitor.read_answer()
        assert (got.status, got.error) == (400, "http_request_error")
    assert gone.wait(5)


@pytest.mark.parametrize(
    "part", [b"", b"GET / HT", b"GET / HTTP/1.1\r\nHost: a\r\nX-"], ids=["nothing", "line", "field"]
)
def test_head_that_is_too_slow_is_408_or_closed(tunnel: Tunnel, part: bytes) -> None:
    with RawVisitor(tunnel.address) as visitor:
        visitor.send(part)
        if part:
            got = visitor.read_answer()
            assert (got.status, got.error) == (408, "http_request_error")
        assert visitor.read_all() == b""


def test_head_that_drips_is_408(tunnel: Tunnel) -> None:
    """A byte now and then does not buy time."""
    with RawVisitor(tunnel.address) as visitor:
        visitor.sock.settimeout(0.05)
        drips = 0
        while drips < 100:
            visitor.send(b"GET / HTTP/1.1\r\nX-A: "[drips : drips + 1] or b"a")
            drips += 1
            try:
                received = visitor.sock.recv(65536)
                break
            except TimeoutError:
                continue
        assert received.startswith(b"HTTP/1.1 408 ")
        assert drips < 40


def test_upload_that_stops_is_408(tunnel: Tunnel, raw: RawBackend) -> None:
    gone = threading.Event()

    def handle(connection: Connection) -> None:
        connection.head()
        connection.gone()
        gone.set()

    raw.handler = handle
    with RawVisitor(tunnel.address) as visitor:
        visitor.send(f"POST / HTTP/1.1\r\nHost: {tunnel.host}\r\nContent-Length: 10\r\n\r\nhello".encode())
        assert visitor.read_answer().status == 408
    assert gone.wait(5)


def test_idle_connection_is_closed_in_time(tunnel: Tunnel) -> None:
    with RawVisitor(tunnel.address) as visitor:
        visitor.get(host=tunnel.host)
        assert visitor.read_answer().status == 200
        assert 0.4 < visitor.closed_after() < 5


def test_visitors_beyond_the_limit_are_told_so(engine: str, servers: Callable[[str], Server], tunnel: Tunnel) -> None:
    with ExitStack() as stack:
        visitors = [stack.enter_context(RawVisitor(tunnel.address)) for _ in range(20)]
        for visitor in visitors:
            visitor.get(host=tunnel.host)
        assert {visitor.read_answer().status for visitor in visitors} <= {200, 503}
        with RawVisitor(tunnel.address) as late:
            late.get(host=tunnel.host)
            got = late.read_answer()
        assert (got.status, got.error) == (503, "connection_limit_reached")
        assert int(got["retry-after"]) > 0
    poll(lambda: visit(tunnel.address, host=tunnel.host).status == 200, what="room for visitors again")


# What it looks like.


def test_page_suits_who_asked(tunnel: Tunnel) -> None:
    def page(accept: str, method: str = "GET") -> tuple[str, bytes]:
        got = visit(tunnel.address, host="nobody.localhost", fields={"Accept": accept}, method=method)
        assert re.fullmatch(r'quictunnel; error=destination_not_found; details="[^"]+"', got["proxy-status"])
        return got["content-type"], got.body

    kind, body = page("text/html,application/xhtml+xml,*/*;q=0.8")
    assert kind.startswith("text/html")
    assert b"<h1>404 Not Found</h1>" in body
    kind, body = page("application/json")
    assert kind == "application/problem+json"
    problem = json.loads(body)
    assert (problem["status"], problem["title"], problem["error"]) == (404, "Not Found", "destination_not_found")
    assert page("application/problem+json")[0] == "application/problem+json"
    kind, body = page("*/*")
    assert kind.startswith("text/plain")
    assert body.startswith(b"404 Not Found\n")
    assert page("text/html", "HEAD")[1] == b""


def test_connection_lives_on_after_an_error(tunnel: Tunnel) -> None:
    with RawVisitor(tunnel.address) as visitor:
        for _ in range(2):
            visitor.get(host="nobody.localhost")
            assert visitor.read_answer().status == 404
        visitor.get(host=tunnel.host)
        assert visitor.read_answer().status == 200
