"""What was cut never looks complete: answers and uploads, whoever goes away, wherever in the message, however framed.

The matrix of answers: each fault hits while requests are held at each point of an answer of each framing, all at once.
What comes then to a visitor who uses a library for HTTP:

| held at           | backend FIN                              | backend RST | client killed, stopped, packets lost |
|-------------------|------------------------------------------|-------------|--------------------------------------|
| before the head   | 502                                      | 502         | 502 after the link's idle time-out   |
| the head, or more | an error; close-delimited: its very end  | an error    | an error after that time             |

A FIN after the head of an answer that has neither a length nor chunks is its end (RFC 9112 section 6.3, rule 8), so
there, and only there, a visitor gets exactly what the backend sent, properly ended.
"""

import http.client
import signal
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NamedTuple

import h11
import httpx
import pytest

from tests.support.backends import Connection, RawBackend
from tests.support.processes import Processes, Tunnel, poll
from tests.support.relay import UdpRelay
from tests.support.visits import RawVisitor, visit

pytestmark = pytest.mark.either

QUICK = 5.0
"seconds in which an end of either side's own is known to the other, on a busy machine"

IDLE = 45.0
"seconds: the idle time-out of a link is 30 s, and the rest is for a busy machine"

FRAMINGS = ("length", "chunked", "close")
POINTS = ("before the head", "at the head", "after 1 byte", "midway", "1 byte before the end")
BODY = bytes(range(256)) * 40


@pytest.fixture
def processes(tmp_path: Path) -> Iterator[Processes]:
    with Processes(tmp_path / "processes") as processes:
        yield processes


@contextmanager
def relayed(backend: RawBackend, engine: str, processes: Processes) -> Iterator[tuple[Tunnel, UdpRelay]]:
    """A tunnel whose packets go through a relay."""
    server = processes.server("--grace", "100ms", engine=engine)
    with UdpRelay(server.quic_port) as relay:
        client = processes.client(server, backend.target, "--server", relay.address, engine=engine)
        yield Tunnel(server, client, "app"), relay


class Cell(NamedTuple):
    """A message that stops at a point."""

    framing: str
    point: str

    def __str__(self) -> str:
        return f"{self.framing}, {self.point}"

    def of(self, opening: bytes) -> tuple[bytes, int]:
        """The bytes of it that are sent, and how many bytes of its body are among them."""
        fields, body, midway = {
            "length": (b"Content-Length: %d\r\n" % len(BODY), BODY, len(BODY) // 2),
            "chunked": (b"Transfer-Encoding: chunked\r\n", *_chunked()),
            "close": (b"", BODY, len(BODY) // 2),
        }[self.framing]
        head = opening + fields + b"\r\n"
        first = body.index(BODY[:3]) + 1
        match self.point:
            case "before the head":
                return head[:-2], 0
            case "at the head":
                return head, 0
            case "after 1 byte":
                return head + body[:first], 1
            case "midway":
                return head + body[:midway], len(BODY) // 2
            case _:
                # In chunks, all of the body comes and the last line end lacks its LF.
                return head + body[:-1], len(BODY) - (self.framing != "chunked")


def _chunked() -> tuple[bytes, int]:
    """A body of two chunks, and where the first of them ends."""
    half = len(BODY) // 2
    chunks = [b"%x\r\n%b\r\n" % (half, part) for part in (BODY[:half], BODY[half:])]
    return b"".join(chunks) + b"0\r\n\r\n", len(chunks[0])


CELLS = [Cell(framing, point) for framing in FRAMINGS for point in POINTS]


class Outcome(NamedTuple):
    """What a library made of an answer."""

    status: int
    error: str
    "of Proxy-Status"

    body: bytes
    complete: bool
    ended: float
    "when, on the clock of time.monotonic()"


# The libraries. Each calls ``arrived`` when it has got what the backend had sent before the fault.

Library = Callable[[Tunnel, str, int | None, Callable[[], None]], Outcome]


def _http_client(
    tunnel: Tunnel, target: str, size: int | None, arrived: Callable[[], None], version: int = 11
) -> Outcome:
    connection = http.client.HTTPConnection(*tunnel.address, timeout=IDLE)
    connection._http_vsn = version  # type: ignore[attr-defined]
    connection._http_vsn_str = f"HTTP/1.{version - 10}"  # type: ignore[attr-defined]
    body, complete = b"", False
    try:
        connection.request("GET", target, headers={"Host": tunnel.host})
        response = connection.getresponse()
        if size is not None:
            body = response.read(size) if size else b""
            assert len(body) == size
            arrived()
        try:
            body += response.read()
            complete = True
        except http.client.IncompleteRead as error:
            body += error.partial
        except ConnectionResetError:
            pass
        return _outcome(response.status, response.getheader("Proxy-Status", ""), body, complete)
    finally:
        connection.close()


def _http_1_0(tunnel: Tunnel, target: str, size: int | None, arrived: Callable[[], None]) -> Outcome:
    """A visitor who knows no chunks: the end of the connection has to tell the end of the answer."""
    return _http_client(tunnel, target, size, arrived, version=10)


def _httpx(tunnel: Tunnel, target: str, size: int | None, arrived: Callable[[], None]) -> Outcome:
    """httpx reads HTTP/1.1 by h11."""
    url = f"http://127.0.0.1:{tunnel.address[1]}{target}"
    body, complete = b"", False
    with (
        httpx.Client(trust_env=False, timeout=IDLE, headers={"Host": tunnel.host}) as client,
        client.stream("GET", url) as response,
    ):
        if size == 0:
            arrived()
        try:
            for part in response.iter_raw():
                before, body = len(body), body + part
                if size is not None and before < size <= len(body):
                    arrived()
            complete = True
        except (httpx.RemoteProtocolError, httpx.ReadError):
            pass
        return _outcome(response.status_code, response.headers.get("Proxy-Status", ""), body, complete)


def _outcome(status: int, proxy_status: str, body: bytes, complete: bool) -> Outcome:
    error = proxy_status.partition("quictunnel; error=")[2].partition(";")[0]
    return Outcome(status, error, body, complete, time.monotonic())


LIBRARIES: dict[str, Library] = {"http.client": _http_client, "http.client, HTTP/1.0": _http_1_0, "httpx": _httpx}


class Held:
    """Counts requests up to the point where all are held, and lets them go on together."""

    def __init__(self, count: int) -> None:
        self._count = threading.Semaphore(0)
        self._wanted = count
        self._go = threading.Event()

    def here(self) -> None:
        self._count.release()

    def wait(self) -> None:
        here = self._go.wait(IDLE)
        assert here

    def all_here(self, running: list[Future[Outcome]]) -> None:
        for number in range(self._wanted):
            failed = [each for each in running if each.done() and each.exception()]
            assert self._count.acquire(timeout=20), f"{number} of {self._wanted} came: {failed}"

    def let_go(self) -> None:
        self._go.set()


class Fault(NamedTuple):
    """What goes wrong, and how long a visitor may then wait to hear of it."""

    hit: Callable[[Tunnel, UdpRelay], None] | None
    "None: the backend's doing"

    limit: float
    mend: Callable[[Tunnel, UdpRelay], None] = lambda tunnel, relay: None


def _set_drops(relay: UdpRelay, drops: bool) -> None:
    relay.drops = drops


FAULTS = {
    "backend FIN": Fault(None, QUICK),
    "backend RST": Fault(None, QUICK),
    "client killed": Fault(
        lambda tunnel, relay: tunnel.client.process.kill(), IDLE, lambda tunnel, relay: tunnel.client.start()
    ),
    "client stopped": Fault(
        lambda tunnel, relay: tunnel.client.process.signal(signal.SIGSTOP),
        IDLE,
        lambda tunnel, relay: tunnel.client.process.signal(signal.SIGCONT),
    ),
    "packets lost": Fault(
        lambda tunnel, relay: _set_drops(relay, True), IDLE, lambda tunnel, relay: _set_drops(relay, False)
    ),
}


@pytest.mark.timeout(150)
@pytest.mark.parametrize(
    "fault",
    [
        "backend FIN",
        "backend RST",
        pytest.param("client killed", marks=pytest.mark.slow),
        pytest.param("client stopped", marks=pytest.mark.slow),
        pytest.param("packets lost", marks=pytest.mark.slow),
    ],
)
def test_cut_answer_is_never_taken_for_complete(fault: str, engine: str, processes: Processes) -> None:
    hit, limit, mend = FAULTS[fault]
    cases = [(cell, library) for cell in CELLS for library in LIBRARIES]
    # A visitor that waits for its head has nothing to say: there, the backend's word is all there is.
    held = Held(sum(1 if cell.point == "before the head" else 2 for cell, _ in cases))

    def handle(connection: Connection) -> None:
        connection.sock.settimeout(2 * IDLE)
        head = connection.head()
        number = int(head.split(b" ")[1][1:])
        if number >= len(CELLS):
            connection.answer(200, b"ok")
            return
        connection.send(CELLS[number].of(b"HTTP/1.1 200 OK\r\n")[0])
        held.here()
        held.wait()
        if fault == "backend RST":
            connection.reset()
        elif fault != "backend FIN":
            connection.gone()

    with ExitStack() as stack:
        backend = stack.enter_context(RawBackend(handle))
        tunnel, relay = stack.enter_context(relayed(backend, engine, processes))
        pool = stack.enter_context(ThreadPoolExecutor(len(cases)))

        def ask(cell: Cell, library: str) -> Outcome:
            size = None if cell.point == "before the head" else cell.of(b"")[1]
            return LIBRARIES[library](tunnel, f"/{CELLS.index(cell)}", size, held.here)

        running = [pool.submit(ask, *case) for case in cases]
        try:
            held.all_here(running)
            began = time.monotonic()
            if hit is not None:
                hit(tunnel, relay)
        finally:
            held.let_go()
        outcomes = [each.result(2 * IDLE) for each in running]

        wrong = []
        for (cell, library), got in zip(cases, outcomes, strict=True):
            size = cell.of(b"")[1]
            if cell.point == "before the head":
                right = (got.status, got.error) == (502, "connection_terminated")
            elif fault == "backend FIN" and cell.framing == "close":
                right = got.complete and got.body == BODY[:size]
            else:
                right = not got.complete and BODY[:size].startswith(got.body)
            if not right or got.ended - began > limit:
                wrong.append(f"{cell}; {library}: {got._replace(body=got.body[:80])} after {got.ended - began:.2f} s")
        waited = sorted(got.ended - began for got in outcomes)
        print(f"{engine}, {fault}: {len(cases)} visitors waited {waited[0]:.3f} to {waited[-1]:.3f} s")
        assert not wrong, "\n".join(wrong)

        mend(tunnel, relay)
        poll(lambda: visit(tunnel.address, f"/{len(CELLS)}").status == 200, 20.0, "it serves again")


# Uploads

UPLOADS = [Cell(framing, point) for framing in ("length", "chunked") for point in POINTS[1:]]


class Upload:
    """What h11, as a server's library, makes of a request."""

    def __init__(self) -> None:
        self.received = b""
        self.complete = False
        self.ended = 0.0
        self.over = threading.Event()

    def read(self, connection: Connection, arrived: Callable[[], None], wanted: int) -> None:
        connection.sock.settimeout(2 * IDLE)
        parser = h11.Connection(h11.SERVER)
        asked = False
        try:
            while True:
                event = parser.next_event()
                if event is h11.NEED_DATA:
                    parser.receive_data(connection.sock.recv(65536))
                    continue
                asked = asked or isinstance(event, h11.Request)
                if isinstance(event, h11.Data):
                    self.received += event.data
                if asked and len(self.received) == wanted:
                    asked = False
                    arrived()
                if isinstance(event, h11.EndOfMessage | h11.ConnectionClosed):
                    self.complete = isinstance(event, h11.EndOfMessage)
                    return
        except (h11.RemoteProtocolError, ConnectionResetError):
            pass
        finally:
            self.ended = time.monotonic()
            self.over.set()


def _visitors_end(visitors: list[RawVisitor], *, reset: bool) -> None:
    for visitor in visitors:
        if reset:
            visitor.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            visitor.close()
        else:
            visitor.sock.shutdown(socket.SHUT_WR)


@pytest.mark.timeout(150)
@pytest.mark.parametrize(
    "fault",
    [
        "visitor FIN",
        "visitor RST",
        pytest.param("client killed", marks=pytest.mark.slow),
        pytest.param("server stopped in order", marks=pytest.mark.slow),
        pytest.param("server killed", marks=pytest.mark.slow),
        pytest.param("packets lost", marks=pytest.mark.slow),
    ],
)
def test_cut_upload_is_never_taken_for_complete(fault: str, engine: str, processes: Processes) -> None:
    uploads = {str(cell): Upload() for cell in UPLOADS}
    held = Held(len(UPLOADS))

    def handle(connection: Connection) -> None:
        # The name of the cell is in the first packet, which h11 is to read as well.
        name = connection.sock.recv(65536, socket.MSG_PEEK).split(b" ")[1][1:].decode().replace("_", " ")
        upload = uploads[name]
        cell = UPLOADS[list(uploads).index(name)]
        upload.read(connection, held.here, cell.of(b"")[1])

    with ExitStack() as stack:
        backend = stack.enter_context(RawBackend(handle))
        tunnel, relay = stack.enter_context(relayed(backend, engine, processes))
        visitors = []
        for cell in UPLOADS:
            visitor = stack.enter_context(RawVisitor(tunnel.address))
            opening = f"POST /{str(cell).replace(' ', '_')} HTTP/1.1\r\nHost: {tunnel.host}\r\n"
            visitor.send(cell.of(opening.encode())[0])
            visitors.append(visitor)
        held.all_here([])
        began = time.monotonic()
        limit = QUICK
        match fault:
            case "visitor FIN" | "visitor RST":
                _visitors_end(visitors, reset=fault == "visitor RST")
            case "client killed":
                tunnel.client.process.kill()
            case "server stopped in order":
                tunnel.server.process.signal(signal.SIGTERM)
            case "server killed":
                tunnel.server.process.kill()
                limit = IDLE
            case _:
                relay.drops = True
                limit = IDLE
        for name, upload in uploads.items():
            assert upload.over.wait(limit), name
        waited = sorted(upload.ended - began for upload in uploads.values())
        print(f"{engine}, {fault}: the backend knew after {waited[0]:.3f} to {waited[-1]:.3f} s")
        for name, upload in uploads.items():
            size = UPLOADS[list(uploads).index(name)].of(b"")[1]
            assert not upload.complete, name
            assert upload.received == BODY[:size], name
