"""Every version of a visitor's HTTP against every kind of backend: the same requests, the same answers."""

import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import BinaryIO, NamedTuple

import pytest
from h2.config import H2Configuration
from h2.connection import H2Connection
from h2.events import DataReceived, Event, RequestReceived, StreamEnded, StreamReset, TrailersReceived, WindowUpdated

from quictunnel.wire.frames import Fields
from tests.support.apps import BIG_BODY, Asked, application
from tests.support.backends import Connection, RawBackend
from tests.support.http2 import DATA, END_STREAM, WINDOW_UPDATE, Wire, frame
from tests.support.processes import Processes, Server

pytestmark = pytest.mark.either

LIMIT = 30.0
BIG = len(BIG_BODY)

VISITORS = ("1.1", "2")
BACKENDS = ("http1", "http2", "asgi")


# One application behind three kinds of backend; ``apps.mixed`` is the third


def http1(connection: Connection) -> None:
    """The application behind HTTP/1.1."""
    while head := connection.head():
        method, path, _ = head.split(b"\r\n", 1)[0].decode().split(" ")
        if b"\r\nexpect: 100-continue\r\n" in head.lower():
            connection.send(b"HTTP/1.1 100 Continue\r\n\r\n")
        trailers: Fields = []
        if b"\r\ntransfer-encoding: chunked\r\n" in head.lower():
            body = b"".join(connection.chunks(trailers))
        else:
            body = connection.body(head)
        said = application(Asked(method, path, body, trailers))
        parts = [b"HTTP/1.1 %d X\r\n" % said.status, *[b"%b: %b\r\n" % field for field in said.fields]]
        if said.interim:
            parts.insert(0, b"HTTP/1.1 %d X\r\nLink: <x>\r\n\r\n" % said.interim)
        chunked = said.status not in (204, 304) and not any(name == b"content-length" for name, _ in said.fields)
        if chunked:
            parts.append(b"Transfer-Encoding: chunked\r\n")
        parts.append(b"\r\n")
        if method != "HEAD" and chunked:
            if said.body:
                parts.append(b"%x\r\n%b\r\n" % (len(said.body), said.body))
            parts += [b"0\r\n", *[b"%b: %b\r\n" % field for field in said.trailers or []], b"\r\n"]
        elif method != "HEAD":
            parts.append(said.body)
        connection.send(b"".join(parts))


class _Http2Server:
    """The application behind HTTP/2, by the library's own state machine."""

    def __init__(self, connection: Connection) -> None:
        self._sock = connection.sock
        self._h2 = H2Connection(H2Configuration(client_side=False, header_encoding=None))
        self._asked: dict[int, tuple[dict[bytes, bytes], bytearray, Fields]] = {}
        self._left: dict[int, tuple[bytes, Fields]] = {}

    def run(self) -> None:
        h2 = self._h2
        h2.initiate_connection()
        with suppress(OSError):
            while True:
                self._sock.sendall(h2.data_to_send())
                data = self._sock.recv(65536)
                if not data:
                    return
                for event in h2.receive_data(data):
                    self._event(event)
                for number in list(self._left):
                    self._write(number)

    def _event(self, event: Event) -> None:
        match event:
            case RequestReceived():
                head = {bytes(name): bytes(value) for name, value in event.headers}
                self._asked[event.stream_id] = (head, bytearray(), [])
                if head.get(b"expect") == b"100-continue":
                    self._h2.send_headers(event.stream_id, [(b":status", b"100")])
            case DataReceived():
                self._asked[event.stream_id][1].extend(event.data or b"")
                self._h2.acknowledge_received_data(event.flow_controlled_length or 0, event.stream_id)
            case TrailersReceived():
                self._asked[event.stream_id][2].extend((bytes(name), bytes(value)) for name, value in event.headers)
            case StreamEnded():
                self._answer(event.stream_id)
            case StreamReset():
                self._left.pop(event.stream_id, None)
            case WindowUpdated():
                pass

    def _answer(self, number: int) -> None:
        head, body, trailers = self._asked.pop(number)
        method, path = head[b":method"].decode(), head[b":path"].decode()
        said = application(Asked(method, path, bytes(body), trailers))
        if said.interim:
            self._h2.send_headers(number, [(b":status", b"%d" % said.interim), (b"link", b"<x>")])
        rest = b"" if method == "HEAD" else said.body
        end = not rest and not said.trailers
        self._h2.send_headers(number, [(b":status", b"%d" % said.status), *said.fields], end_stream=end)
        if not end:
            self._left[number] = (rest, said.trailers or [])

    def _write(self, number: int) -> None:
        h2 = self._h2
        rest, trailers = self._left[number]
        while rest and (size := min(h2.local_flow_control_window(number), h2.max_outbound_frame_size, len(rest))) > 0:
            h2.send_data(number, rest[:size])
            rest = rest[size:]
        self._left[number] = (rest, trailers)
        if not rest:
            del self._left[number]
            if trailers:
                h2.send_headers(number, trailers, end_stream=True)
            else:
                h2.end_stream(number)


def http2(connection: Connection) -> None:
    _Http2Server(connection).run()


# Visitors


class Got(NamedTuple):
    status: int
    fields: Fields
    body: bytes
    trailers: Fields
    interim: list[int]

    def field(self, name: bytes) -> bytes | None:
        return dict(self.fields).get(name)


def by_http1(
    address: tuple[str, int],
    host: str,
    method: str,
    path: str,
    body: bytes | None,
    fields: Fields,
    chunked: bool,
    trailers: Fields,
) -> Got:
    """A request by HTTP/1.1, and its answer read to the end."""
    lines = [f"{method} {path} HTTP/1.1".encode(), b"Host: " + host.encode(), *[b"%b: %b" % field for field in fields]]
    if chunked:
        lines.append(b"Transfer-Encoding: chunked")
    elif body is not None:
        lines.append(b"Content-Length: %d" % len(body))
    expects = (b"expect", b"100-continue") in fields
    with socket.create_connection(address, timeout=LIMIT) as sock, sock.makefile("rb") as file:
        sock.sendall(b"\r\n".join([*lines, b"", b""]))
        interim: list[int] = []
        status, head = _head(file) if expects else (0, [])
        if expects:
            assert status == 100
            interim.append(status)

        def upload() -> None:
            if chunked:
                parts = [b"%x\r\n%b\r\n" % (len(body), body)] if body else []
                sock.sendall(b"".join([*parts, b"0\r\n", *[b"%b: %b\r\n" % field for field in trailers], b"\r\n"]))
            elif body:
                sock.sendall(body)

        sender = threading.Thread(target=upload)
        sender.start()
        while True:
            status, head = _head(file)
            if status >= 200:
                break
            interim.append(status)
        known = dict(head)
        got, late = b"", []
        if method != "HEAD" and status not in (204, 304):
            if known.get(b"transfer-encoding") == b"chunked":
                pieces = []
                while size := int(file.readline(), 16):
                    pieces.append(file.read(size))
                    assert file.readline() == b"\r\n"
                got, late = b"".join(pieces), _fields(file)
            else:
                size = int(known[b"content-length"])
                got = file.read(size)
                assert len(got) == size
        sender.join(LIMIT)
        return Got(status, head, got, late, interim)


def _head(file: BinaryIO) -> tuple[int, Fields]:
    line = file.readline()
    assert line.startswith(b"HTTP/1.1 "), line
    return int(line.split()[1]), _fields(file)


def _fields(file: BinaryIO) -> Fields:
    fields: Fields = []
    while (line := file.readline()) not in (b"\r\n", b""):
        name, _, value = line.rstrip(b"\r\n").partition(b": ")
        fields.append((name.lower(), value))
    return fields


def by_http2(
    address: tuple[str, int],
    host: str,
    method: str,
    path: str,
    body: bytes | None,
    fields: Fields,
    chunked: bool,
    trailers: Fields,
) -> Got:
    """The same by HTTP/2: ``chunked`` is a body without a length."""
    wire = Wire()
    extra = list(fields)
    if body is not None and not chunked:
        extra.append((b"content-length", b"%d" % len(body)))
    with socket.create_connection(address, timeout=LIMIT) as sock:

        def hear() -> None:
            data = sock.recv(65536)
            assert data, wire.frames[-3:]
            grant = b""
            for seen in wire.takes(data):
                if seen.kind == DATA and seen.payload:
                    size = len(seen.payload).to_bytes(4, "big")
                    grant += frame(WINDOW_UPDATE, 0, 0, size) + frame(WINDOW_UPDATE, 0, 1, size)
                assert seen.kind not in (3, 7), seen
            sock.sendall(grant)

        def granted() -> int:
            """Bytes that may be sent in all, by the tighter of the two windows."""
            windows = {0: 65_535, 1: 65_535}
            for seen in wire.frames:
                if seen.kind == WINDOW_UPDATE:
                    windows[seen.stream_id] += int.from_bytes(seen.payload, "big")
                elif seen.kind == 4:
                    for start in range(0, len(seen.payload), 6):
                        if seen.payload[start : start + 2] == b"\0\4":
                            windows[1] += int.from_bytes(seen.payload[start + 2 : start + 6], "big") - 65_535
            return min(windows.values())

        has_body = bool(body) or chunked
        sock.sendall(
            wire.hello()
            + wire.get(path.encode(), *extra, method=method.encode(), end=not has_body, authority=host.encode())
        )
        if (b"expect", b"100-continue") in fields:
            while not wire.heads.get(1):
                hear()
            assert wire.status(1) == 100
        rest, sent = body or b"", 0
        while rest:
            while granted() <= sent:
                hear()
            size = min(len(rest), 16_384, granted() - sent)
            last = size == len(rest) and not trailers
            sock.sendall(frame(DATA, END_STREAM if last else 0, 1, rest[:size]))
            rest, sent = rest[size:], sent + size
        if trailers:
            sock.sendall(wire.head(trailers, stream_id=1))
        elif has_body and not body:
            sock.sendall(frame(DATA, END_STREAM, 1))
        while not wire.ended(1):
            hear()
    statuses = [int(dict(fields)[b":status"]) for fields in wire.heads[1] if fields[0][0] == b":status"]
    final = wire.heads[1][len(statuses) - 1]
    late = wire.heads[1][len(statuses) :]
    return Got(statuses[-1], final[1:], wire.body(1), late[0] if late else [], statuses[:-1])


# The mixes


@pytest.fixture(scope="module")
def backends() -> Iterator[dict[str, str]]:
    """The BACKEND argument for each kind."""
    with RawBackend(http1) as one, RawBackend(http2) as two:
        yield {"http1": one.target, "http2": two.target, "asgi": "tests.support.apps:mixed"}


@pytest.fixture(scope="module")
def addresses(processes: Processes, backends: dict[str, str]) -> Callable[[str, str], tuple[tuple[str, int], str]]:
    servers: dict[str, Server] = {}
    made: dict[tuple[str, str], str] = {}

    def address(engine: str, backend: str) -> tuple[tuple[str, int], str]:
        if engine not in servers:
            servers[engine] = processes.server(engine=engine)
        server = servers[engine]
        if (engine, backend) not in made:
            options = ("--backend-http", "2") if backend == "http2" else ()
            processes.client(server, backends[backend], *options, tunnel=backend, engine=engine)
            made[engine, backend] = f"{backend}.localhost"
        return server.http, made[engine, backend]

    return address


Ask = Callable[..., Got]


@pytest.fixture(params=[(visitor, backend) for visitor in VISITORS for backend in BACKENDS], ids="-".join)
def mix(
    request: pytest.FixtureRequest, engine: str, addresses: Callable[[str, str], tuple[tuple[str, int], str]]
) -> tuple[Ask, str, str]:
    """A visitor of one version for a backend of one kind, and what they are."""
    visitor, backend = request.param
    address, host = addresses(engine, backend)
    ask = by_http1 if visitor == "1.1" else by_http2

    def asks(
        method: str,
        path: str,
        body: bytes | None = None,
        *fields: tuple[bytes, bytes],
        chunked: bool = False,
        trailers: Fields | None = None,
    ) -> Got:
        return ask(address, host, method, path, body, list(fields), chunked, trailers or [])

    return asks, visitor, backend


def test_requests_and_answers_are_the_same_in_every_mix(mix: tuple[Ask, str, str]) -> None:
    ask, _, _ = mix
    for path in ("/length", "/unknown"):
        got = ask("GET", path)
        assert (got.status, got.body, got.interim) == (200, f"GET {path} 0".encode(), [])
    assert ask("DELETE", "/length").body == b"DELETE /length 0"

    # Bodies with and without a length, empty ones too.
    for chunked in (False, True):
        for body in (b"", b"hello", BIG_BODY[:100_000]):
            got = ask("POST", "/echo", body, chunked=chunked)
            assert (got.status, got.body) == (200, body), (chunked, len(body))
            assert got.field(b"content-length") == b"%d" % len(body)

    # Answers without a body.
    got = ask("GET", "/empty")
    assert (got.status, got.body, got.field(b"content-length")) == (200, b"", b"0")
    assert ask("GET", "/nothing").body == b""
    for status in (204, 304):
        got = ask("GET", f"/{status}")
        assert (got.status, got.body, got.field(b"etag")) == (status, b"", b'"x"')
        assert got.field(b"transfer-encoding") is None
    got = ask("HEAD", "/length")
    assert (got.status, got.body) == (200, b"")
    assert got.field(b"content-length") == b"14"
    assert ask("HEAD", "/nothing").body == b""


@pytest.mark.slow
def test_big_bodies_are_whole_both_ways_in_every_mix(mix: tuple[Ask, str, str]) -> None:
    ask, _, _ = mix
    assert ask("GET", "/big").body == BIG_BODY
    assert ask("POST", "/echo", BIG_BODY).body == BIG_BODY
    assert ask("PUT", "/length", BIG_BODY, chunked=True).body == b"PUT /length %d" % BIG


def test_trailers_pass_both_ways_in_every_mix(mix: tuple[Ask, str, str]) -> None:
    ask, _, backend = mix
    if backend == "asgi":
        pytest.skip("the application's interface has no trailers of requests")
    got = ask("POST", "/trailers", b"hello", (b"te", b"trailers"), chunked=True, trailers=[(b"x-up", b"1")])
    assert got.body == b"POST /trailers 5"
    assert got.trailers == [(b"x-sum", b"16"), (b"x-got", b"[(b'x-up', b'1')]")]


def test_interim_answers_pass_in_every_mix(mix: tuple[Ask, str, str]) -> None:
    ask, _, backend = mix
    if backend != "asgi":  # whose interface has none
        got = ask("GET", "/early")
        assert (got.interim, got.status, got.body) == ([103], 200, b"GET /early 0")
    got = ask("POST", "/echo", b"hello", (b"expect", b"100-continue"))
    assert (got.status, got.body) == (200, b"hello")
