"""Hostile visitors and backends of HTTP/2 on real sockets.

Each is bounded and ended, what it sends reaches nobody, and ordinary requests on another connection go on.
"""

import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress

import pytest
from h2.errors import ErrorCodes

from quictunnel.wire.frames import Fields
from tests.support.backends import Connection, RawBackend, answer, echo
from tests.support.http2 import (
    CONTINUATION,
    DATA,
    END_HEADERS,
    END_STREAM,
    HEADERS,
    PADDED,
    PING,
    PRIORITY,
    RST_STREAM,
    WINDOW_UPDATE,
    Wire,
    frame,
    settings_frame,
)
from tests.support.processes import Processes, Server, Tunnel, poll
from tests.support.visits import RawVisitor, visit

pytestmark = pytest.mark.either

LIMITS = (
    *("--head-time", "1s", "--body-idle", "1s", "--keep-alive", "2s"),
    *("--max-visitors", "1500", "--head-size", "16KiB"),
)
LIMIT = 20.0
MIB = 1024 * 1024
CALM = ErrorCodes.ENHANCE_YOUR_CALM
EIGHT = bytes(8)


@pytest.fixture(scope="module")
def raw() -> Iterator[RawBackend]:
    with RawBackend(echo) as backend:
        yield backend


@pytest.fixture(scope="module")
def servers(processes: Processes) -> Callable[[str], Server]:
    """A server of an engine; the tests share it."""
    made: dict[str, Server] = {}

    def server(engine: str) -> Server:
        if engine not in made:
            made[engine] = processes.server(*LIMITS, engine=engine)
        return made[engine]

    return server


@pytest.fixture(scope="module")
def tunnels(servers: Callable[[str], Server], raw: RawBackend) -> Callable[[str], Tunnel]:
    made: dict[str, Tunnel] = {}

    def tunnel(engine: str) -> Tunnel:
        if engine not in made:
            server = servers(engine)
            client = server.processes.client(server, raw.target, tunnel="app", engine=engine)
            made[engine] = Tunnel(server, client, "app")
        return made[engine]

    return tunnel


@pytest.fixture
def tunnel(engine: str, tunnels: Callable[[str], Tunnel], raw: RawBackend) -> Iterator[Tunnel]:
    raw.handler = echo
    raw.requests.clear()
    found = tunnels(engine)
    yield found
    raw.handler = echo
    for process in (found.server.process, found.client.process):
        assert process.running
        assert "Traceback" not in process.log


class Http2Visitor:
    """A socket that speaks HTTP/2 as a test likes."""

    def __init__(self, address: tuple[str, int], settings: dict[int, int] | None = None) -> None:
        self.wire = Wire()
        self.sock = socket.create_connection(address, timeout=LIMIT)
        self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.is_over = False
        self.send(self.wire.hello(settings))

    def __enter__(self) -> "Http2Visitor":
        return self

    def __exit__(self, *error: object) -> None:
        self.sock.close()

    def send(self, *data: bytes) -> None:
        self.sock.sendall(b"".join(data))

    def flood(self, data: bytes, times: int = 100) -> None:
        """Send until the server ends it, reading on the way."""
        self.sock.setblocking(False)
        with suppress(OSError):
            for _ in range(times):
                left = data
                deadline = time.monotonic() + LIMIT
                while left and not self.is_over:
                    with suppress(BlockingIOError):
                        left = left[self.sock.send(left) :]
                    with suppress(BlockingIOError):
                        self.read()
                    assert time.monotonic() < deadline
        self.sock.settimeout(LIMIT)

    def read(self) -> None:
        data = self.sock.recv(65536)
        self.is_over = self.is_over or not data
        self.wire.takes(data)

    def until(self, condition: Callable[[], object], limit: float = LIMIT) -> None:
        """Read until it holds."""
        self.sock.settimeout(limit)
        while not condition():
            assert not self.is_over, self.wire.frames[-5:]
            self.read()

    def ended(self, limit: float = LIMIT) -> tuple[int, int] | None:
        """Read until the server ends the connection; its last GOAWAY."""
        self.sock.settimeout(limit)
        with suppress(ConnectionError):
            while not self.is_over:
                self.read()
        return self.wire.goaways[-1] if self.wire.goaways else None


def others_go_on(tunnel: Tunnel) -> None:
    """Ordinary requests, on connections of their own and in both versions."""
    got = visit(tunnel.address, "/ordinary", host=tunnel.host)
    assert got.status == 200
    with Http2Visitor(tunnel.address) as other:
        other.send(other.wire.get(b"/ordinary"))
        other.until(lambda: other.wire.ended(1))
        assert other.wire.status(1) == 200


def foreign(raw: RawBackend) -> list[bytes]:
    """What the backend saw that was no ordinary request."""
    return [head for head in raw.requests if not head.startswith(b"GET /ordinary HTTP/1.1\r\n")]


# Floods

GET = [(b":method", b"GET"), (b":scheme", b"http"), (b":authority", b"app.localhost"), (b":path", b"/")]

FLOODS: dict[str, bytes] = {
    "PING": frame(PING, 0, 0, EIGHT) * 1000,
    "SETTINGS": settings_frame({4: 65_535}) * 1000,
    "unknown SETTINGS": settings_frame(dict.fromkeys(range(300, 500), 1)) * 100,
    "PRIORITY": frame(PRIORITY, 0, 1, bytes(5)) * 1000,
    "WINDOW_UPDATE": frame(WINDOW_UPDATE, 0, 0, b"\0\0\0\1") * 1000,
    "unknown frames": frame(0xFA, 0, 0, b"x") * 1000,
    "empty DATA": frame(DATA, 0, 1) * 1000,
    "padding": frame(DATA, PADDED, 1, b"\x0a" + bytes(10)) * 1000,
}


@pytest.mark.slow
@pytest.mark.parametrize("name", FLOODS)
def test_floods_of_what_costs_nothing_are_ended(tunnel: Tunnel, name: str) -> None:
    before = tunnel.server.process.resident()
    with Http2Visitor(tunnel.address) as hostile:
        hostile.send(hostile.wire.get(b"/ordinary", method=b"GET", end=False))
        hostile.flood(FLOODS[name], 300)
        assert hostile.ended() == (1, CALM)
    assert tunnel.server.process.resident() - before < 32 * MIB
    others_go_on(tunnel)


@pytest.mark.slow
def test_rapid_resets_are_ended(tunnel: Tunnel, raw: RawBackend) -> None:
    """CVE-2023-44487: a request and its reset in one packet, over and over."""
    with Http2Visitor(tunnel.address) as hostile:
        pairs = [
            hostile.wire.get(b"/ordinary") + frame(RST_STREAM, 0, hostile.wire.last, (8).to_bytes(4, "big"))
            for _ in range(3000)
        ]
        hostile.flood(b"".join(pairs), 1)
        found = hostile.ended()
        assert found is not None
        assert found[1] == CALM
        # Those that were begun were ended too.
    others_go_on(tunnel)
    poll(lambda: len(raw.requests) < 3000)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["data after the end", "a window over the edge"])
def test_resets_that_the_server_is_made_to_send_are_ended(tunnel: Tunnel, how: str) -> None:
    """CVE-2025-8671."""
    with Http2Visitor(tunnel.address) as hostile:
        parts = []
        for _ in range(3000):
            parts.append(hostile.wire.get(b"/ordinary"))
            if how == "data after the end":
                parts.append(frame(DATA, 0, hostile.wire.last, b"x"))
            else:
                parts.append(frame(WINDOW_UPDATE, 0, hostile.wire.last, b"\x7f\xff\xff\xff"))
        hostile.flood(b"".join(parts), 1)
        found = hostile.ended()
        assert found is not None
        assert found[1] == CALM
    others_go_on(tunnel)


@pytest.mark.slow
@pytest.mark.parametrize("size", [0, 1, 16_384])
def test_continuations_without_end_are_ended(tunnel: Tunnel, raw: RawBackend, size: int) -> None:
    before = tunnel.server.process.resident()
    with Http2Visitor(tunnel.address) as hostile:
        hostile.send(frame(HEADERS, END_STREAM, 1, b""))
        hostile.flood(frame(CONTINUATION, 0, 1, b"\0" * size) * 100, 200)
        found = hostile.ended()
        assert found is not None
        assert found[1] in (CALM, ErrorCodes.PROTOCOL_ERROR)
    assert tunnel.server.process.resident() - before < 16 * MIB
    others_go_on(tunnel)
    assert foreign(raw) == []


def test_header_bombs_are_ended(tunnel: Tunnel, raw: RawBackend) -> None:
    """A table entry of 4,000 bytes named thousands of times, a byte each."""
    before = tunnel.server.process.resident()
    size = 4000 - 127
    bomb = b"\x40\x01x\x7f" + bytes([size & 0x7F | 0x80, size >> 7]) + b"y" * 4000 + b"\xbe" * 10_000
    for _ in range(20):
        with Http2Visitor(tunnel.address) as hostile:
            hostile.send(frame(HEADERS, END_HEADERS | END_STREAM, 1, bomb))
            found = hostile.ended()
            assert found is not None
            assert found[1] == CALM
    assert tunnel.server.process.resident() - before < 16 * MIB
    others_go_on(tunnel)
    assert foreign(raw) == []


def test_a_list_of_fields_beyond_the_limit_is_431(tunnel: Tunnel, raw: RawBackend) -> None:
    with Http2Visitor(tunnel.address) as hostile:
        hostile.send(hostile.wire.get(b"/", *[(b"x", b"y")] * 400), hostile.wire.get(b"/ordinary"))
        hostile.until(lambda: hostile.wire.ended(1) and hostile.wire.ended(3))
        assert (hostile.wire.status(1), hostile.wire.status(3)) == (431, 200)
    assert foreign(raw) == []


# Windows

CHUNK = b"x" * 65_536
pushed: list[int] = []
"bytes, of each piece that a backend without end got rid of"


def endless(connection: Connection) -> None:
    """Answers without end."""
    connection.head()
    connection.send(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
    with suppress(OSError):
        while True:
            connection.send(b"10000\r\n" + CHUNK + b"\r\n")
            pushed.append(len(CHUNK))


def stands_still() -> None:
    """Wait until the backends get rid of nothing more."""
    seen = [-1, 0]
    deadline = time.monotonic() + LIMIT
    while seen[-1] != seen[-2]:
        time.sleep(0.5)
        seen.append(len(pushed))
        assert time.monotonic() < deadline, "it takes everything"


@pytest.mark.slow
def test_a_visitor_that_never_reads_is_bounded(tunnel: Tunnel, raw: RawBackend) -> None:
    """That the limit on writes ends it is shown in memory: it has five minutes."""
    raw.handler = endless
    before = tunnel.server.process.resident(), tunnel.client.process.resident()
    with Http2Visitor(tunnel.address, {4: 2**31 - 1}) as hostile:
        hostile.send(frame(WINDOW_UPDATE, 0, 0, (2**30).to_bytes(4, "big")))
        hostile.send(*[hostile.wire.get(b"/%d" % number) for number in range(20)])
        poll(lambda: len(raw.requests) >= 20, LIMIT)
        stands_still()
        after = tunnel.server.process.resident(), tunnel.client.process.resident()
        assert all(now - then < 64 * MIB for then, now in zip(before, after, strict=True))
        raw.handler = echo
        others_go_on(tunnel)
    poll(lambda: raw.open <= 2, LIMIT, "the backend's connections are still there")


@pytest.mark.slow
@pytest.mark.parametrize("settings", [{4: 0}, {}], ids=["zero", "used up"])
def test_a_visitor_that_grants_no_window_is_bounded(tunnel: Tunnel, raw: RawBackend, settings: dict[int, int]) -> None:
    raw.handler = endless
    before = tunnel.server.process.resident(), tunnel.client.process.resident()
    with Http2Visitor(tunnel.address, settings) as hostile:
        hostile.send(*[hostile.wire.get(b"/%d" % number) for number in range(20)])
        hostile.until(lambda: all(hostile.wire.status(number) for number in range(1, 40, 2)))
        stands_still()
        after = tunnel.server.process.resident(), tunnel.client.process.resident()
        assert all(now - then < 64 * MIB for then, now in zip(before, after, strict=True))
        raw.handler = echo
        others_go_on(tunnel)
        hostile.send(frame(PING, 0, 0, EIGHT))
        hostile.until(lambda: any(seen.kind == PING and seen.payload == EIGHT for seen in hostile.wire.frames))
        assert sum(len(hostile.wire.body(number)) for number in range(1, 40, 2)) <= (0 if settings else 65_535)
    poll(lambda: raw.open <= 2, LIMIT, "the backend's connections are still there")


@pytest.mark.slow
def test_a_visitor_that_grants_little_and_slowly_gets_its_answer(tunnel: Tunnel, raw: RawBackend) -> None:
    raw.handler = answer(200, b"z" * 2000)
    with Http2Visitor(tunnel.address, {4: 0}) as slow:
        slow.send(slow.wire.get())
        for size in range(0, 2000, 100):
            slow.until(lambda size=size: len(slow.wire.body(1)) >= size and slow.wire.status(1))  # type: ignore[misc]
            time.sleep(0.1)
            slow.send(frame(WINDOW_UPDATE, 0, 1, (100).to_bytes(4, "big")))
        slow.until(lambda: slow.wire.ended(1))
        assert slow.wire.body(1) == b"z" * 2000


@pytest.mark.parametrize("stream_id", [0, 1])
def test_a_window_over_the_edge_is_ended(tunnel: Tunnel, stream_id: int) -> None:
    with Http2Visitor(tunnel.address) as hostile:
        hostile.send(hostile.wire.get(b"/ordinary", end=False))
        hostile.send(frame(WINDOW_UPDATE, 0, stream_id, b"\x7f\xff\xff\xff"))
        if stream_id:
            hostile.until(lambda: hostile.wire.reset(1) == ErrorCodes.FLOW_CONTROL_ERROR)
        else:
            found = hostile.ended()
            assert found is not None
            assert found[1] == ErrorCodes.FLOW_CONTROL_ERROR


# Slow


@pytest.mark.slow
def test_half_frames_are_ended(tunnel: Tunnel, raw: RawBackend) -> None:
    halves = [frame(HEADERS, END_HEADERS, 1, b"\x82" * 50)[:20], frame(HEADERS, 0, 1, b"\x82"), b"\0", b""]
    crowd = [Http2Visitor(tunnel.address) for _ in range(20) for _ in halves]
    try:
        for hostile, half in zip(crowd, halves * 20, strict=True):
            hostile.send(half)
        others_go_on(tunnel)
        for hostile in crowd:
            assert hostile.ended(10) is not None
    finally:
        for hostile in crowd:
            hostile.sock.close()
    assert foreign(raw) == []


def test_half_a_preface_is_ended(tunnel: Tunnel) -> None:
    with RawVisitor(tunnel.address) as hostile:
        hostile.send(b"PRI * HTTP/2.0\r\n\r\nSM\r\n")
        assert hostile.read_all().startswith(b"HTTP/1.1 408 ")


@pytest.mark.slow
def test_a_thousand_idle_connections_cost_little_and_are_ended(tunnel: Tunnel) -> None:
    before = tunnel.server.process.resident()
    crowd = [Http2Visitor(tunnel.address) for _ in range(1000)]
    try:
        others_go_on(tunnel)
        assert tunnel.server.process.resident() - before < 64 * MIB
        for hostile in crowd:
            assert hostile.ended() == (0, 0)
    finally:
        for hostile in crowd:
            hostile.sock.close()
    others_go_on(tunnel)


# Frames where none may be

MISPLACED: dict[str, bytes] = {
    "data on stream 0": frame(DATA, 0, 0, b"x"),
    "data on an idle stream": frame(DATA, 0, 99, b"x"),
    "a head on stream 0": frame(HEADERS, 5, 0, b"\x82"),
    "a head on an even stream": frame(HEADERS, 5, 2, b"\x82"),
    "a reset of an idle stream": frame(RST_STREAM, 0, 99, bytes(4)),
    "a pushed stream": frame(5, 4, 1, b"\0\0\0\2\x82"),
    "settings of a stream": frame(4, 0, 1),
    "a large frame": (16_385).to_bytes(3, "big") + bytes((DATA, 0)) + (1).to_bytes(4, "big"),
    "a naked continuation": frame(CONTINUATION, 4, 1, b"\x82"),
    "HTTP/1.1 after the preface": b"GET / HTTP/1.1\r\nHost: app.localhost\r\n\r\n",
}


@pytest.mark.parametrize("name", MISPLACED)
def test_misplaced_frames_end_the_connection(tunnel: Tunnel, raw: RawBackend, name: str) -> None:
    with Http2Visitor(tunnel.address) as hostile:
        hostile.send(MISPLACED[name])
        found = hostile.ended()
        assert found is not None
        assert found[1] in (ErrorCodes.PROTOCOL_ERROR, ErrorCodes.FRAME_SIZE_ERROR)
    assert foreign(raw) == []


def test_streams_beyond_the_limit_are_refused_and_no_others(tunnel: Tunnel, raw: RawBackend) -> None:
    release = threading.Event()

    def wait(connection: Connection) -> None:
        while connection.head():
            release.wait(LIMIT)
            connection.answer(200, b"ok")

    raw.handler = wait
    with Http2Visitor(tunnel.address) as hostile:
        hostile.send(*[hostile.wire.get(b"/%d" % number) for number in range(130)])
        hostile.until(lambda: hostile.wire.reset(259) is not None)
        release.set()
        hostile.until(lambda: all(hostile.wire.ended(number) for number in range(1, 200, 2)))
        assert {hostile.wire.status(number) for number in range(1, 200, 2)} == {200}
        assert {hostile.wire.reset(number) for number in range(201, 260, 2)} == {ErrorCodes.REFUSED_STREAM}


# Smuggling


def pseudo(name: bytes, value: bytes) -> Fields:
    return [(key, value if key == name else old) for key, old in GET]


SMUGGLING: dict[str, Fields] = {
    "line end in a value": [*GET, (b"x", b"a\r\nHost: evil")],
    "a request in a value": [*GET, (b"x", b"a\r\n\r\nGET /evil HTTP/1.1\r\nHost: evil\r\n\r\n")],
    "lone LF in a value": [*GET, (b"x", b"a\nb: c")],
    "NUL in a value": [*GET, (b"x", b"a\0b")],
    "colon in a name": [*GET, (b"transfer-encoding: chunked", b"x")],
    "line end in a name": [*GET, (b"x: y\r\nz", b"a")],
    "space in a name": [*GET, (b"x y", b"a")],
    "upper-case name": [*GET, (b"Content-Length", b"5")],
    "transfer-encoding": [*GET, (b"transfer-encoding", b"chunked")],
    "connection": [*GET, (b"connection", b"content-length")],
    "upgrade": [*GET, (b"upgrade", b"websocket")],
    "a length and no body": [*GET, (b"content-length", b"5")],
    "two lengths": [*GET, (b"content-length", b"0"), (b"content-length", b"0")],
    "a length with a sign": [*GET, (b"content-length", b"+0")],
    "space in the path": pseudo(b":path", b"/ HTTP/1.1"),
    "a request in the path": pseudo(b":path", b"/ HTTP/1.1\r\nHost: a\r\n\r\nGET /evil"),
    "absolute path": pseudo(b":path", b"http://evil.localhost/"),
    "no slash": pseudo(b":path", b"evil"),
    "space in the method": pseudo(b":method", b"GET /evil HTTP/1.1\r\nX:"),
    "another Host": [*GET, (b"host", b"evil.localhost")],
    "userinfo": pseudo(b":authority", b"user@app.localhost"),
    "line end in the authority": pseudo(b":authority", b"app.localhost\r\nX: y"),
    "a request in the scheme": pseudo(b":scheme", b"http://evil/?"),
    "two paths": [*GET, (b":path", b"/evil")],
    "a path late": [*GET[:3], (b"x", b"y"), (b":path", b"/evil")],
}


def test_nothing_is_smuggled_to_the_backend(tunnel: Tunnel, raw: RawBackend) -> None:
    """Each is 400 on its own stream, the backend sees none of it, and the connection goes on."""
    with Http2Visitor(tunnel.address) as hostile:
        for name, section in SMUGGLING.items():
            hostile.send(hostile.wire.head(section))
            number = hostile.wire.last
            hostile.until(lambda number=number: hostile.wire.ended(number))  # type: ignore[misc]
            assert hostile.wire.status(number) == 400, name
        hostile.send(hostile.wire.get(b"/ordinary"))
        hostile.until(lambda: hostile.wire.ended(hostile.wire.last))
        assert hostile.wire.status(hostile.wire.last) == 200
    others_go_on(tunnel)
    assert foreign(raw) == []


@pytest.mark.parametrize(
    "body", [[b"hello!"], [b"hello", b"!"], [b"hello\r\n0\r\n\r\nGET /evil HTTP/1.1\r\nHost: evil\r\n\r\n"], [b"hell"]]
)
def test_a_body_that_is_not_what_its_length_says_never_looks_whole(
    tunnel: Tunnel, raw: RawBackend, body: list[bytes]
) -> None:
    seen: list[bytes] = []

    def take(connection: Connection) -> None:
        head = connection.head()
        if head.startswith(b"GET /ordinary "):
            connection.answer(200, b"ok")
            return
        with suppress(OSError):
            seen.append(connection.body(head))
        seen.append(connection.head())

    raw.handler = take
    with Http2Visitor(tunnel.address) as hostile:
        hostile.send(hostile.wire.get(b"/upload", (b"content-length", b"5"), method=b"POST", end=False))
        for index, part in enumerate(body):
            hostile.send(frame(DATA, END_STREAM if index == len(body) - 1 else 0, 1, part))
        hostile.until(lambda: hostile.wire.ended(1))
        assert hostile.wire.status(1) == 400
    assert not any(b"evil" in head for head in raw.requests)
    assert b"hell" not in seen
    others_go_on(tunnel)


# Hostile backends of HTTP/2


class Http2Backend:
    """A backend whose first answer on each connection is whatever ``says`` returns, given the wire and the request."""

    def __init__(self) -> None:
        self.says: Callable[[Wire], bytes] = lambda wire: b""
        self.goaways: list[tuple[int, int]] = []
        self.resets: list[int] = []
        self._raw = RawBackend(self._run)

    def _run(self, connection: Connection) -> None:
        wire = Wire(is_client=False)
        data = connection.sock.recv(65536)
        while len(data) < 24:
            data += connection.sock.recv(65536)
        connection.send(wire.hello())
        wire.takes(data[24:])
        with suppress(OSError):
            answered: set[int] = set()
            while True:
                for number in [number for number in wire.heads if number not in answered]:
                    answered.add(number)
                    if dict(wire.heads[number][0])[b":path"] == b"/ordinary":
                        good = wire.head([(b":status", b"200")], end=False, stream_id=number)
                        connection.send(good + frame(DATA, END_STREAM, number, b"ok"))
                    else:
                        connection.send(self.says(wire))
                data = connection.sock.recv(65536)
                if not data:
                    break
                wire.takes(data)
        self.goaways += wire.goaways
        self.resets += [seen.code for seen in wire.frames if seen.kind == RST_STREAM]

    def __enter__(self) -> "Http2Backend":
        self._raw.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._raw.close()

    def cut(self) -> None:
        self._raw.cut()

    @property
    def target(self) -> str:
        return self._raw.target


@pytest.fixture(scope="module")
def backend() -> Iterator[Http2Backend]:
    with Http2Backend() as backend:
        yield backend


@pytest.fixture(scope="module")
def h2_tunnels(servers: Callable[[str], Server], backend: Http2Backend) -> Callable[[str], Tunnel]:
    made: dict[str, Tunnel] = {}

    def tunnel(engine: str) -> Tunnel:
        if engine not in made:
            server = servers(engine)
            client = server.processes.client(server, backend.target, "--backend-http", "2", tunnel="h2", engine=engine)
            made[engine] = Tunnel(server, client, "h2")
        return made[engine]

    return tunnel


@pytest.fixture
def h2_tunnel(engine: str, h2_tunnels: Callable[[str], Tunnel], backend: Http2Backend) -> Iterator[Tunnel]:
    backend.cut()
    backend.goaways.clear()
    found = h2_tunnels(engine)
    yield found
    assert found.client.process.running
    assert "Traceback" not in found.client.log


def last(wire: Wire) -> int:
    return max(wire.heads)


def said(*fields: tuple[bytes, bytes], end: bool = True) -> Callable[[Wire], bytes]:
    return lambda wire: wire.head(list(fields), end=end, stream_id=last(wire))


OK = (b":status", b"200")
BAD_HEADS: dict[str, Callable[[Wire], bytes]] = {
    "response splitting in a value": said(OK, (b"x", b"a\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nevil")),
    "a cookie by a line end": said(OK, (b"x", b"a\r\nSet-Cookie: evil=1")),
    "response splitting in a name": said(OK, (b"x: y\r\nset-cookie", b"evil=1")),
    "a status with a phrase": said((b":status", b"200 OK\r\nSet-Cookie: evil=1")),
    "two statuses": said(OK, (b":status", b"204")),
    "no status": said((b"x", b"evil")),
    "status 101": said((b":status", b"101"), end=False),
    "upper case": said(OK, (b"Set-Cookie", b"evil=1")),
    "transfer-encoding": said(OK, (b"transfer-encoding", b"chunked")),
    "two lengths": said(OK, (b"content-length", b"4"), (b"content-length", b"5")),
    "a length and no body": said(OK, (b"content-length", b"4")),
    "a head that is too large": said(OK, *[(b"x", b"evil" * 10)] * 260),
}


@pytest.mark.parametrize("name", BAD_HEADS)
def test_a_bad_head_of_a_backend_is_502_for_every_visitor(h2_tunnel: Tunnel, backend: Http2Backend, name: str) -> None:
    backend.says = BAD_HEADS[name]
    with RawVisitor(h2_tunnel.address) as visitor:
        visitor.get("/bad", "Connection: close", host=h2_tunnel.host)
        whole = visitor.read_all()
        assert b"evil" not in whole.lower()
        if name == "a length and no body":
            # Cut within its body, of which there is nothing, or refused.
            assert whole.startswith(b"HTTP/1.1 502 ") or whole == b"" or whole.endswith(b"\r\n\r\n")
        else:
            assert whole.startswith(b"HTTP/1.1 502 ")
            assert whole.count(b"HTTP/1.1 ") == 1
    assert visit(h2_tunnel.address, "/ordinary", host=h2_tunnel.host).body == b"ok"


BACKEND_FLOODS: dict[str, Callable[[Wire], bytes]] = {
    "PING": lambda wire: frame(PING, 0, 0, EIGHT) * 10_200,
    "SETTINGS": lambda wire: settings_frame({4: 65_535}) * 10_200,
    "empty DATA": lambda wire: said(OK, end=False)(wire) + frame(DATA, 0, last(wire)) * 10_200,
    "interim answers": lambda wire: said((b":status", b"103"), end=False)(wire) * 10_200,
    "resets": lambda wire: frame(RST_STREAM, 0, last(wire), bytes(4)) * 1_200,
    "continuations": lambda wire: frame(HEADERS, 0, last(wire)) + frame(CONTINUATION, 0, last(wire), b"\0") * 200,
    "a bomb": lambda wire: frame(HEADERS, 5, last(wire), b"\x40\x01x\x7f\xa1\x1e" + b"y" * 4000 + b"\xbe" * 10_000),
    "streams of its own": lambda wire: frame(HEADERS, END_HEADERS, 2, b"\x88"),
    "a pushed stream": lambda wire: frame(5, END_HEADERS, last(wire), b"\0\0\0\2\x82"),
    "HTTP/1.1": lambda wire: b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n",
}


@pytest.mark.slow
@pytest.mark.parametrize("name", BACKEND_FLOODS)
def test_a_flood_of_a_backend_ends_its_connection_and_the_next_is_good(
    h2_tunnel: Tunnel, backend: Http2Backend, name: str
) -> None:
    backend.says = BACKEND_FLOODS[name]
    before = h2_tunnel.client.process.resident()
    with Http2Visitor(h2_tunnel.address) as visitor:
        visitor.send(visitor.wire.get(b"/bad", authority=b"h2.localhost", method=b"POST"))
        visitor.until(lambda: visitor.wire.ended(1) or visitor.wire.reset(1) is not None)
        assert visitor.wire.status(1) == 502 or visitor.wire.reset(1) is not None
    poll(lambda: backend.goaways, LIMIT, "the backend was not told to go")
    assert backend.goaways[-1][1] in (CALM, ErrorCodes.PROTOCOL_ERROR, ErrorCodes.FRAME_SIZE_ERROR)
    assert h2_tunnel.client.process.resident() - before < 32 * MIB
    assert visit(h2_tunnel.address, "/ordinary", host=h2_tunnel.host).body == b"ok"
