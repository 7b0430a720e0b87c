"""What a request and its answer look like on the two ends of a tunnel, compared with no tunnel in between."""

import asyncio
import gzip
import http.client
import re
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.support.backends import Connection, HttpbinBackend, RawBackend, answer, echo
from tests.support.processes import Processes, Server, Tunnel, poll
from tests.support.visits import Answer, RawVisitor, visit

pytestmark = pytest.mark.either

SLOTS = 100
"streams of a connection: both libraries' limit"


@pytest.fixture(scope="module")
def httpbin() -> Iterator[HttpbinBackend]:
    with HttpbinBackend() as backend:
        yield backend


@pytest.fixture(scope="module")
def servers(processes: Processes) -> Callable[[str], Server]:
    """A running server of an engine; the tests of this file share it."""
    made: dict[str, Server] = {}

    def server(engine: str) -> Server:
        if engine not in made:
            made[engine] = processes.server(engine=engine)
        return made[engine]

    return server


@pytest.fixture(scope="module")
def tunnels(
    processes: Processes, servers: Callable[[str], Server]
) -> Callable[[tuple[str, str], HttpbinBackend | RawBackend], Tunnel]:
    """A tunnel of two engines to one of the backends that the tests of this file share."""
    made: dict[tuple[str, ...], Tunnel] = {}

    def tunnel(engines: tuple[str, str], backend: HttpbinBackend | RawBackend) -> Tunnel:
        key = (*engines, backend.target)
        if key not in made:
            server = servers(engines[0])
            name = f"{type(backend).__name__.lower()}-{engines[1]}"
            client = processes.client(server, backend.target, tunnel=name, engine=engines[1])
            made[key] = Tunnel(server, client, name)
        return made[key]

    return tunnel


Tunnels = Callable[[tuple[str, str], HttpbinBackend | RawBackend], Tunnel]


@pytest.fixture
def tunnel(engine: str, tunnels: Tunnels, raw: RawBackend) -> Iterator[Tunnel]:
    """A tunnel to ``raw``, on each engine."""
    raw.requests.clear()
    yield tunnels((engine, engine), raw)
    raw.handler = echo


@pytest.fixture
def mixed(engines: tuple[str, str], tunnels: Tunnels, raw: RawBackend) -> Iterator[Tunnel]:
    """A tunnel to ``raw``, on each pair of engines."""
    raw.requests.clear()
    yield tunnels(engines, raw)
    raw.handler = echo


def unpredictable(body: bytes) -> bytes:
    """httpbin's answer without what the way of a request shows in it."""
    for pattern in (rb'"origin": "[^"]*"', rb'"(?:X-Forwarded-[A-Za-z]+|Forwarded|Via|X-Real-Ip)": "[^"]*",?\s*'):
        body = re.sub(pattern, b"", body)
    return body


# httpbin, with and without the tunnel.

SAMPLE = [
    ("GET", "/get?a=1&a=2&b=%C3%A4%2F..", None, {"X-Test": "one, two"}),
    ("POST", "/post", b"field=value", {"Content-Type": "application/x-www-form-urlencoded"}),
    ("PUT", "/put", bytes(range(256)) * 40, {"Content-Type": "application/octet-stream"}),
    ("PATCH", "/patch", b'{"a": 1}', {"Content-Type": "application/json"}),
    ("DELETE", "/delete", None, {}),
    ("HEAD", "/get", None, {}),
    ("OPTIONS", "/get", None, {}),
    ("GET", "/status/204", None, {}),
    ("GET", "/status/304", None, {}),
    ("GET", "/status/404", None, {}),
    ("GET", "/status/418", None, {}),
    ("GET", "/status/500", None, {}),
    ("GET", "/status/503", None, {}),
    ("GET", "/redirect-to?url=http%3A%2F%2Felsewhere.example%2F&status_code=307", None, {}),
    ("GET", "/redirect/2", None, {}),
    ("GET", "/absolute-redirect/1", None, {}),
    ("GET", "/gzip", None, {"Accept-Encoding": "gzip"}),
    ("GET", "/deflate", None, {}),
    ("GET", "/encoding/utf8", None, {}),
    ("GET", "/response-headers?X-A=1&X-A=2&X-Empty=", None, {}),
    ("GET", "/cookies/set?a=1&b=2&c=3", None, {}),
    ("GET", "/cookies", None, {"Cookie": "a=1; b=2"}),
    ("GET", "/basic-auth/user/secret", None, {"Authorization": "Basic dXNlcjpzZWNyZXQ="}),
    ("GET", "/basic-auth/user/secret", None, {}),
    ("GET", "/bearer", None, {"Authorization": "Bearer word"}),
    ("GET", "/cache", None, {"If-None-Match": "x"}),
    ("GET", "/etag/abc", None, {"If-None-Match": "abc"}),
    ("GET", "/range/1000", None, {"Range": "bytes=100-199"}),
    ("GET", "/bytes/50000?seed=7", None, {}),
    ("GET", "/stream-bytes/50000?seed=7&chunk_size=999", None, {}),
    ("GET", "/stream/5", None, {}),
    ("GET", "/drip?numbytes=5&duration=0&code=200", None, {}),
    ("GET", "/image/png", None, {}),
    ("GET", "/anything/a%20b/../c//d;e?q=%00#", None, {}),
]


@pytest.mark.parametrize("case", SAMPLE, ids=lambda case: f"{case[0]} {case[1][:24]}")
def test_httpbin_answers_as_it_does_without_the_tunnel(
    engine: str, tunnels: Tunnels, httpbin: HttpbinBackend, case: tuple[str, str, bytes | None, dict[str, str]]
) -> None:
    method, target, body, fields = case
    target = target.removesuffix("#")
    tunnel = tunnels((engine, engine), httpbin)
    direct = visit(("127.0.0.1", httpbin.port), target, method=method, body=body, fields=fields, host=tunnel.host)
    through = visit(tunnel.address, target, method=method, body=body, fields=fields, host=tunnel.host)
    assert through.status == direct.status
    assert _fields(through) == _fields(direct)
    assert unpredictable(through.body) == unpredictable(direct.body)


def _fields(answer: Answer) -> list[tuple[str, str]]:
    """The fields that must be the same: all but framing, which is made anew, and what the clock or a length changes."""
    left_out = {"connection", "transfer-encoding", "content-length", "date", "via"}
    return [(name, re.sub(r"(?<=Expires=)[^;]*", "", value)) for name, value in answer.fields if name not in left_out]


def test_cookies_stay_apart_and_in_order(mixed: Tunnel, raw: RawBackend) -> None:
    cookies = [b"a=1; Path=/; Expires=Thu, 01 Jan 2037 00:00:00 GMT", b"b=2; HttpOnly", b"a=3"]
    raw.handler = answer(200, b"ok", *(b"Set-Cookie: " + cookie for cookie in cookies))
    got = visit(mixed.address, host=mixed.host)
    assert [value.encode() for name, value in got.fields if name == "set-cookie"] == cookies


def test_chunked_upload_arrives_whole(mixed: Tunnel) -> None:
    parts = [b"a" * 10, b"b" * 70_000, b"c"]
    got = visit(mixed.address, method="POST", body=iter(parts), host=mixed.host)
    assert got.body.endswith(b"\r\n\r\n" + b"".join(parts))


def test_large_bodies_arrive_whole_in_both_directions(mixed: Tunnel) -> None:
    body = bytes(range(256)) * 8 * 1024
    got = visit(mixed.address, method="POST", body=body, host=mixed.host)
    assert got.body.partition(b"\r\n\r\n")[2] == body


def test_gzip_passes_unopened(tunnel: Tunnel, raw: RawBackend) -> None:
    packed = gzip.compress(b"hello " * 1000)
    raw.handler = answer(200, packed, b"Content-Encoding: gzip")
    got = visit(tunnel.address, fields={"Accept-Encoding": "gzip"}, host=tunnel.host)
    assert (got.body, got["content-encoding"]) == (packed, "gzip")
    assert b"accept-encoding: gzip" in raw.requests[-1].lower()


def test_parts_of_an_answer_come_one_by_one(mixed: Tunnel, raw: RawBackend) -> None:
    seen = threading.Semaphore(0)

    def handle(connection: Connection) -> None:
        connection.head()
        connection.send(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n")
        for number in range(3):
            connection.send(b"4\r\nev%d\n\r\n" % number)
            assert seen.acquire(timeout=10)  # the next one leaves when this one has arrived
        connection.send(b"0\r\n\r\n")

    raw.handler = handle
    with RawVisitor(mixed.address) as visitor:
        visitor.get(host=mixed.host)
        while visitor.read_line() != b"\r\n":
            pass
        for number in range(3):
            assert visitor.read_line() == b"4\r\n"
            assert visitor.read_line() == b"ev%d\n" % number
            assert visitor.read_line() == b"\r\n"
            seen.release()
        assert visitor.read_line() == b"0\r\n"


def test_parts_of_an_upload_go_one_by_one(mixed: Tunnel, raw: RawBackend) -> None:
    arrived = threading.Semaphore(0)

    def handle(connection: Connection) -> None:
        connection.head()
        for number in range(3):
            assert connection.read(3) == b"ev%d" % number
            arrived.release()
        connection.answer(200, b"done")

    raw.handler = handle
    with RawVisitor(mixed.address) as visitor:
        visitor.send(f"POST / HTTP/1.1\r\nHost: {mixed.host}\r\nContent-Length: 9\r\n\r\n".encode())
        for number in range(3):
            visitor.send(b"ev%d" % number)
            assert arrived.acquire(timeout=10)
        assert visitor.read_answer().body == b"done"


def test_answer_to_head_has_the_length_and_no_body(tunnel: Tunnel, raw: RawBackend) -> None:
    def handle(connection: Connection) -> None:
        while connection.head():
            connection.send(b"HTTP/1.1 200 OK\r\nContent-Length: 1234\r\n\r\n")

    raw.handler = handle
    with RawVisitor(tunnel.address) as visitor:
        for _ in range(2):
            visitor.send(f"HEAD / HTTP/1.1\r\nHost: {tunnel.host}\r\n\r\n".encode())
            got = visitor.read_answer("HEAD")
            assert (got.status, got["content-length"], got.body) == (200, "1234", b"")


@pytest.mark.parametrize("status", [204, 304])
def test_answers_without_body_leave_the_connection_in_step(tunnel: Tunnel, raw: RawBackend, status: int) -> None:
    def handle(connection: Connection) -> None:
        while connection.head():
            connection.send(b'HTTP/1.1 %d X\r\nETag: "1"\r\n\r\n' % status)

    raw.handler = handle
    with RawVisitor(tunnel.address) as visitor:
        for _ in range(2):
            visitor.get(host=tunnel.host)
            got = visitor.read_answer()
            assert (got.status, got["etag"], got["transfer-encoding"]) == (status, '"1"', "")


def test_target_and_fields_are_byte_exact(tunnel: Tunnel) -> None:
    target = b"/a/../b//c;d=%2F%2f/%zz?x=[1]&y='\"|`{}^\\"
    with RawVisitor(tunnel.address) as visitor:
        visitor.send(
            b"GET %b HTTP/1.1\r\nHost: %b\r\nX-B: 2\r\nX-A: \xe4\xff  x\ty\r\nX-B: 1\r\nX-Empty:\r\n\r\n"
            % (target, tunnel.host.encode())
        )
        head = visitor.read_answer().body
    lines = head.split(b"\r\n")
    assert lines[0] == b"GET %b HTTP/1.1" % target
    own = [
        line.split(b":", 1)[1].strip(b" ") for line in lines if line.lower().startswith((b"x-b:", b"x-a:", b"x-empty"))
    ]
    assert own == [b"2", b"\xe4\xff  x\ty", b"1", b""]


def test_connection_fields_stay_on_their_hop(tunnel: Tunnel) -> None:
    fields = {"Connection": "X-Private, keep-alive", "X-Private": "1", "Keep-Alive": "timeout=5", "Proxy": "x"}
    head = visit(tunnel.address, fields=fields, host=tunnel.host).body.lower()
    assert b"x-private" not in head
    assert b"keep-alive:" not in head
    assert b"\r\nproxy:" not in head


# Many at once.


def test_more_requests_at_once_than_a_connection_has_slots(mixed: Tunnel, raw: RawBackend) -> None:
    count = SLOTS + SLOTS // 2
    barrier = threading.Barrier(count)

    def handle(connection: Connection) -> None:
        while head := connection.head():
            barrier.wait(15)  # nobody is answered before all have arrived
            connection.answer(200, head.split(b" ")[1])

    raw.handler = handle

    async def one(number: int) -> None:
        reader, writer = await asyncio.open_connection(*mixed.address)
        writer.write(f"GET /{number} HTTP/1.1\r\nHost: {mixed.host}\r\nConnection: close\r\n\r\n".encode())
        got = await reader.read()
        writer.close()
        await writer.wait_closed()
        assert got.startswith(b"HTTP/1.1 200 ")
        assert got.endswith(f"\r\n\r\n/{number}".encode())

    async def all_of_them() -> None:
        async with asyncio.timeout(20):
            await asyncio.gather(*(one(number) for number in range(count)))

    asyncio.run(all_of_them())


def test_many_quick_requests_are_answered_each_with_its_own(mixed: Tunnel) -> None:
    def one(number: int) -> None:
        with RawVisitor(mixed.address) as visitor:
            for turn in range(10):
                visitor.get(f"/{number}/{turn}", host=mixed.host)
                assert visitor.read_answer().body.startswith(f"GET /{number}/{turn} ".encode())

    with ThreadPoolExecutor(16) as pool:
        list(pool.map(one, range(32)))


# The visitor's connection.


def test_keep_alive_connection_serves_many_requests(mixed: Tunnel) -> None:
    with RawVisitor(mixed.address) as visitor:
        for number in range(5):
            visitor.get(f"/{number}", host=mixed.host)
            assert visitor.read_answer().body.startswith(b"GET /%d " % number)


def test_pipelined_requests_are_answered_in_order(mixed: Tunnel, raw: RawBackend) -> None:
    slow = threading.Event()

    def handle(connection: Connection) -> None:
        while head := connection.head():
            target = head.split(b" ")[1]
            if target == b"/0":
                assert slow.wait(10)
            connection.answer(200, target + connection.body(head))

    raw.handler = handle
    post = f"POST /1 HTTP/1.1\r\nHost: {mixed.host}\r\nContent-Length: 4\r\n\r\nbody".encode()
    gets = [f"GET /{number} HTTP/1.1\r\nHost: {mixed.host}\r\n\r\n".encode() for number in (0, 2, 3)]
    with RawVisitor(mixed.address) as visitor:
        visitor.send(gets[0] + post + gets[1] + gets[2])
        slow.set()
        assert [visitor.read_answer().body for _ in range(4)] == [b"/0", b"/1body", b"/2", b"/3"]


def test_request_in_single_bytes_is_understood(tunnel: Tunnel) -> None:
    with RawVisitor(tunnel.address) as visitor:
        for byte in f"POST /x HTTP/1.1\r\nHost: {tunnel.host}\r\nContent-Length: 3\r\n\r\nabc".encode():
            visitor.send(bytes([byte]))
        assert visitor.read_answer().body.endswith(b"\r\n\r\nabc")


def test_connection_close_is_obeyed(tunnel: Tunnel) -> None:
    with RawVisitor(tunnel.address) as visitor:
        visitor.get("/", "Connection: close", host=tunnel.host)
        got = visitor.read_answer()
        assert (got.status, got["connection"]) == (200, "close")
        assert visitor.read_all() == b""


def test_http_1_0_visitor_is_answered_in_its_own_way(mixed: Tunnel, raw: RawBackend) -> None:
    def handle(connection: Connection) -> None:
        while connection.head():
            connection.send(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n")

    raw.handler = handle
    with RawVisitor(mixed.address) as visitor:
        visitor.send(f"GET / HTTP/1.0\r\nHost: {mixed.host}\r\n\r\n".encode())
        head, _, body = visitor.read_all().partition(b"\r\n\r\n")
        assert b"transfer-encoding" not in head.lower()
        assert body == b"abc"


def test_http_1_0_visitor_may_keep_its_connection(tunnel: Tunnel) -> None:
    with RawVisitor(tunnel.address) as visitor:
        for number in range(2):
            visitor.send(f"GET /{number} HTTP/1.0\r\nHost: {tunnel.host}\r\nConnection: keep-alive\r\n\r\n".encode())
            got = visitor.read_answer()
            assert got.body.startswith(b"GET /%d " % number)
            assert got["connection"] == "keep-alive"


def test_backend_connections_are_kept(mixed: Tunnel, raw: RawBackend) -> None:
    visit(mixed.address, host=mixed.host)
    before = raw.connections
    for _ in range(10):
        visit(mixed.address, host=mixed.host)
    assert raw.connections - before <= 1


def test_answer_until_close_arrives_whole(mixed: Tunnel, raw: RawBackend) -> None:
    def handle(connection: Connection) -> None:
        connection.head()
        connection.send(b"HTTP/1.0 200 OK\r\nX-A: 1\r\n\r\n", b"abc" * 50_000)

    raw.handler = handle
    got = visit(mixed.address, host=mixed.host)
    assert got.body == b"abc" * 50_000


def test_visitor_that_goes_away_is_known_at_the_backend(mixed: Tunnel, raw: RawBackend) -> None:
    asked, gone = threading.Event(), threading.Event()

    def handle(connection: Connection) -> None:
        connection.head()
        asked.set()
        connection.gone()
        gone.set()

    raw.handler = handle
    with RawVisitor(mixed.address) as visitor:
        visitor.get(host=mixed.host)
        assert asked.wait(10)
    assert gone.wait(5)


# Other backends.


def test_asgi_application_in_the_client_process(engine: str, servers: Callable[[str], Server]) -> None:
    server = servers(engine)
    client = server.processes.client(server, "tests.support.apps:app", tunnel="asgi", engine=engine)
    got = visit(server.http, "/a%2Fb?c=d", host="asgi.localhost", method="POST", body=b"hello")
    assert got.body == b"POST /a%2Fb?c=d asgi.localhost hello"
    assert [value for name, value in got.fields if name == "x-app"] == ["1", "2"]
    failed = visit(server.http, "/raise", host="asgi.localhost")
    assert (failed.status, failed.error) == (502, "connection_terminated")
    assert client.process.stop() == 0
    assert "application stopped" in client.process.output


def test_unix_socket_backend(engine: str, servers: Callable[[str], Server], tmp_path: Path) -> None:
    server = servers(engine)
    with RawBackend(echo, path=tmp_path / "socket") as backend:
        client = server.processes.client(server, backend.target, tunnel="unix", engine=engine)
        got = visit(server.http, "/a", host="unix.localhost", method="POST", body=b"hello")
        assert got.body.startswith(b"POST /a HTTP/1.1\r\n")
        assert got.body.endswith(b"\r\n\r\nhello")
        assert client.process.stop() == 0


# Which tunnel a request is for.


@pytest.fixture
def two(engine: str, servers: Callable[[str], Server]) -> Iterator[Server]:
    """A server with the tunnels ``one`` and ``two``, whose backends say so."""
    processes = servers(engine).processes
    server = processes.server(engine=engine)
    with RawBackend(answer(200, b"one")) as one, RawBackend(answer(200, b"two")) as two:
        clients = [
            processes.client(server, backend.target, tunnel=name, engine=engine)
            for name, backend in (("one", one), ("two", two))
        ]
        yield server
        for client in clients:
            assert client.process.stop() == 0
    server.process.kill()


def test_request_finds_its_tunnel_by_host_then_by_header(two: Server) -> None:
    def body(host: str, name: str = "") -> bytes | int:
        got = visit(two.http, host=host, fields={"X-Tunnel-Session": name} if name else {})
        return got.body if got.status == 200 else got.status

    assert body("one.localhost") == b"one"
    assert body("two.localhost:8080") == b"two"
    assert body("ONE.LocalHost.") == b"one"
    assert body("one.localhost", "two") == b"one"
    assert body("127.0.0.1", "two") == b"two"
    assert body("elsewhere.example", "TWO") == b"two"
    assert body("elsewhere.example") == 404  # there are two: none is the default
    assert body("three.localhost") == 404
    assert body("three.localhost", "one") == 404
    assert body("deep.one.localhost") == 404
    assert body("elsewhere.example", "three") == 404
    assert body("elsewhere.example", "no such/name") == 404


def test_header_that_names_the_tunnel_goes_no_further(tunnel: Tunnel) -> None:
    head = visit(tunnel.address, host="elsewhere.example", fields={"X-Tunnel-Session": tunnel.name}).body.lower()
    assert b"x-tunnel-session" not in head
    assert b"host: elsewhere.example" in head


def test_only_tunnel_is_the_default(engine: str, processes: Processes) -> None:
    server = processes.server(engine=engine)
    with RawBackend(echo) as backend:
        client = processes.client(server, backend.target, tunnel="lone", engine=engine)
        assert visit(server.http, host="127.0.0.1").status == 200
        assert visit(server.http, host="other.localhost").status == 404
        assert client.process.stop() == 0
    assert server.process.stop() == 0


def test_default_tunnel_can_be_refused(engine: str, processes: Processes) -> None:
    server = processes.server("--no-default-tunnel", engine=engine)
    client = processes.client(server, "127.0.0.1:9", tunnel="lone", engine=engine)
    assert visit(server.http, host="127.0.0.1").status == 404
    assert client.process.stop() == 0
    assert server.process.stop() == 0


def test_default_tunnel_is_off_for_a_public_domain(engine: str, processes: Processes) -> None:
    server = processes.server("--domain", "tunnel.example", engine=engine)
    with RawBackend(echo) as backend:
        client = processes.client(server, backend.target, tunnel="lone", engine=engine)
        assert visit(server.http, host="127.0.0.1").status == 404
        assert visit(server.http, host="lone.tunnel.example").status == 200
        assert visit(server.http, host="lone.localhost").status == 404
        assert client.process.ready()["url"].startswith("http://lone.tunnel.example:")
        assert client.process.stop() == 0
    server.process.kill()


def test_two_clients_share_the_requests_of_a_tunnel(engine: str, servers: Callable[[str], Server]) -> None:
    """Least in flight: what is held at both backends is never uneven by more than one."""
    server = servers(engine)
    held = threading.Event()

    def handle(connection: Connection) -> None:
        while connection.head():
            assert held.wait(15)
            connection.answer(200, str(connection.backend.port).encode())

    with RawBackend(handle) as one, RawBackend(handle) as two:
        clients = [server.processes.client(server, each.target, tunnel="shared", engine=engine) for each in (one, two)]
        with ThreadPoolExecutor(20) as pool:
            answers = [pool.submit(visit, server.http, host="shared.localhost") for _ in range(20)]
            poll(lambda: len(one.requests) + len(two.requests) == 20, what="all requests at the backends")
            assert len(one.requests) == len(two.requests) == 10
            held.set()
            assert {answer.result(15).status for answer in answers} == {200}
        for client in clients:
            assert client.process.stop() == 0


# What the backend is told.


def test_forwarded_fields_are_set_afresh(tunnel: Tunnel) -> None:
    claims = {
        "X-Forwarded-For": "203.0.113.9",
        "X-Forwarded-Proto": "https",
        "X-Forwarded-Host": "bank.example",
        "Forwarded": "for=203.0.113.9;proto=https",
        "X-Real-IP": "203.0.113.9",
    }
    head = visit(tunnel.address, fields=claims, host=tunnel.host).body.lower()
    assert b"x-forwarded-for: 127.0.0.1\r\n" in head
    assert b"x-forwarded-proto: http\r\n" in head
    assert f"x-forwarded-host: {tunnel.host}\r\n".encode() in head
    assert f'forwarded: for=127.0.0.1;host="{tunnel.host}";proto=http\r\n'.encode() in head
    assert b"203.0.113.9" not in head
    assert b"bank.example" not in head


def test_trusted_proxy_is_believed(engine: str, processes: Processes) -> None:
    server = processes.server("--trusted-proxies", "127.0.0.0/8", engine=engine)
    with RawBackend(echo) as backend:
        client = processes.client(server, backend.target, engine=engine)
        claims = {
            "X-Forwarded-For": "203.0.113.9",
            "X-Forwarded-Proto": "https",
            "X-Forwarded-Host": "shop.example",
            "Forwarded": "for=203.0.113.9;proto=https",
        }
        head = visit(server.http, fields=claims).body.lower()
        assert b"x-forwarded-for: 203.0.113.9, 127.0.0.1\r\n" in head
        assert b"x-forwarded-proto: https\r\n" in head
        assert b"x-forwarded-host: shop.example\r\n" in head
        assert b"forwarded: for=203.0.113.9;proto=https, for=127.0.0.1;" in head
        assert client.process.stop() == 0
    server.process.kill()


@pytest.mark.parametrize("rule", ["preserve", "backend", "app.internal:99"])
def test_host_that_the_backend_sees(engine: str, servers: Callable[[str], Server], rule: str) -> None:
    server = servers(engine)
    with RawBackend(echo) as backend:
        client = server.processes.client(server, backend.target, "--host-header", rule, tunnel="hosts", engine=engine)
        head = visit(server.http, host="hosts.localhost:8080").body.lower()
        expected = {"preserve": "hosts.localhost:8080", "backend": f"127.0.0.1:{backend.port}"}.get(rule, rule)
        assert re.findall(rb"\r\nhost: (.*)\r\n", head) == [expected.encode()]
        assert b"x-forwarded-host: hosts.localhost:8080\r\n" in head
        assert client.process.stop() == 0


def test_lone_request_waits_for_no_timer(mixed: Tunnel) -> None:
    with RawVisitor(mixed.address) as visitor:
        times = []
        for _ in range(30):
            began = time.monotonic()
            visitor.get(host=mixed.host)
            visitor.read_answer()
            times.append(time.monotonic() - began)
    assert sorted(times)[len(times) // 2] < 0.03


def test_standard_library_takes_the_answers(mixed: Tunnel) -> None:
    connection = http.client.HTTPConnection(*mixed.address, timeout=10)
    for method in ("GET", "POST", "PUT", "DELETE"):
        connection.request(method, "/x", body=b"12345", headers={"Host": mixed.host})
        with connection.getresponse() as response:
            assert response.status == 200
            assert response.read().endswith(b"12345")
    connection.close()
