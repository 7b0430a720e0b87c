"""The client's side of an exchange in memory: a visitor that notes what it gets, and sockets of no network."""

import asyncio
from collections.abc import Callable
from typing import Any

from quictunnel.exchange import Leg, join
from quictunnel.http.dial import Dialler
from quictunnel.http.http2_origin import Http2Origin, Http2OriginConnection
from quictunnel.http.limits import OriginLimits
from quictunnel.http.origin import Origin
from quictunnel.http.origin_connection import OriginConnection
from quictunnel.wire.credit import WindowBudget
from quictunnel.wire.errors import ErrorCode, TunnelError
from quictunnel.wire.frames import Data, End, Fields, Frame, RequestHead, ResponseHead

END = End()


def request(
    method: bytes = b"GET",
    fields: Fields | None = None,
    *,
    target: bytes = b"/",
    body: bool = False,
    protocol: bytes = b"",
    authority: bytes = b"app.example",
) -> RequestHead:
    """A request's head; only what matters to the test has to be said."""
    return RequestHead(method, b"http", authority, target, fields or [], body, protocol)


class Visitor(Leg):
    """The leg that a backend's leg is joined to."""

    def __init__(self) -> None:
        super().__init__()
        self.frames: list[Frame] = []
        self.error: TunnelError | None = None
        self.paused = False
        self.pauses = 0
        self._changed = asyncio.Event()

    def receive(self, frame: Frame) -> None:
        assert self.error is None, "a frame after an abort"
        self.frames.append(frame)
        self._changed.set()

    def pause(self) -> None:
        self.paused = True
        self.pauses += 1
        self._changed.set()

    def resume(self) -> None:
        self.paused = False
        self._changed.set()

    def abort(self, error: TunnelError) -> None:
        assert self.error is None, "aborted twice"
        self.error = error
        self._changed.set()

    def ask(self, leg: Leg, head: RequestHead, *rest: Frame) -> "Visitor":
        """Join ``leg`` and hand it a request; without ``rest``, one that ends at once or goes on, as its head says."""
        join(self, leg)
        leg.receive(head)
        for frame in rest or (() if head.body else (END,)):
            self.peer.receive(frame)
        return self

    @property
    def statuses(self) -> list[int]:
        return [frame.status for frame in self.frames if isinstance(frame, ResponseHead)]

    @property
    def head(self) -> ResponseHead:
        return [frame for frame in self.frames if isinstance(frame, ResponseHead)][-1]

    @property
    def body(self) -> bytes:
        return b"".join(frame.data for frame in self.frames if isinstance(frame, Data))

    @property
    def ended(self) -> bool:
        return any(isinstance(frame, End) for frame in self.frames)

    @property
    def code(self) -> ErrorCode | None:
        return None if self.error is None else self.error.code

    async def until(self, condition: Any, limit: float = 10.0) -> None:
        """Wait until ``condition()`` holds."""
        async with asyncio.timeout(limit):
            while not condition():
                self._changed.clear()
                await self._changed.wait()

    async def over(self, limit: float = 10.0) -> "Visitor":
        """Wait until the answer is complete or cut."""
        await self.until(lambda: self.ended or self.error is not None, limit)
        return self


class Socket(asyncio.Transport):
    """A transport whose other end is the test."""

    def __init__(self, protocol: OriginConnection | Http2OriginConnection, tls: object = None) -> None:
        super().__init__({"ssl_object": tls})
        self.protocol = protocol
        self.writes: list[bytes] = []
        self.stuck = 0
        self.closing = False
        self.aborted = False
        self.reading = True
        self.eof = False
        self.reset = False
        "a reset has come that the event loop has not read yet"

    # What the connection calls

    def write(self, data: Any) -> None:
        assert not self.closing, "written after the end"
        self.writes.append(bytes(data))

    def write_eof(self) -> None:
        if self.reset:
            raise OSError(107, "Transport endpoint is not connected")
        self.eof = True

    def can_write_eof(self) -> bool:
        return True

    def is_closing(self) -> bool:
        return self.closing

    def get_write_buffer_size(self) -> int:
        return self.stuck

    def pause_reading(self) -> None:
        assert self.reading
        self.reading = False

    def resume_reading(self) -> None:
        assert not self.reading
        self.reading = True

    def close(self) -> None:
        self._end(None)

    def abort(self) -> None:
        self.aborted = True
        self._end(None)

    # What the test calls

    @property
    def written(self) -> bytes:
        return b"".join(self.writes)

    def says(self, *data: bytes) -> None:
        """The backend sends, in these packets."""
        for packet in data:
            if not self.closing:
                self.protocol.data_received(packet)

    def ends(self) -> None:
        """The backend sends FIN."""
        if not self.closing and not self.protocol.eof_received():
            self.close()

    def resets(self) -> None:
        """The backend sends RST."""
        self._end(ConnectionResetError(104, "reset"))

    def _end(self, error: Exception | None) -> None:
        if not self.closing:
            self.closing = True
            asyncio.get_running_loop().call_soon(self.protocol.connection_lost, error)


class MemoryDialler(Dialler):
    """Makes sockets of a MemoryOrigin."""

    def __init__(self, origin: "MemoryOrigin | MemoryHttp2Origin", connect_time: float) -> None:
        super().__init__("backend.example", 80, authority="backend.example", connect_time=connect_time)
        self._origin = origin

    async def connect(self, protocol: Callable[[], Any]) -> Any:
        origin = self._origin
        if origin.hold is not None:
            await origin.hold.wait()
        if origin.refuse is not None:
            raise origin.refuse
        connection = protocol()
        socket = Socket(connection, origin.tls)
        origin.sockets.append(socket)
        connection.connection_made(socket)
        return connection


class MemoryOrigin(Origin):
    """An origin whose dials end in the test. ``refuse`` is what the next ones fail with."""

    def __init__(self, limits: OriginLimits | None = None) -> None:
        super().__init__("backend.example", 80, authority="backend.example", limits=limits)
        self.dialler = MemoryDialler(self, self.limits.connect_time)
        self.sockets: list[Socket] = []
        self.refuse: Exception | None = None
        self.hold: asyncio.Event | None = None
        self.tls: object = None

    @property
    def socket(self) -> Socket:
        """The socket dialled last."""
        return self.sockets[-1]

    @property
    def counts(self) -> tuple[int, int, int, int]:
        """In flight, open connections, kept connections, dials."""
        return self.in_flight, self.connections, self.kept, self.dials


class MemoryHttp2Origin(Http2Origin):
    """A ``MemoryOrigin`` of HTTP/2; ``tls`` is what its sockets say of TLS."""

    def __init__(self, limits: OriginLimits | None = None, budget: WindowBudget | None = None) -> None:
        super().__init__("backend.example", 80, authority="backend.example", limits=limits, budget=budget)
        self.dialler = MemoryDialler(self, self.limits.connect_time)
        self.sockets: list[Socket] = []
        self.refuse: Exception | None = None
        self.hold: asyncio.Event | None = None
        self.tls: object = None

    @property
    def counts(self) -> tuple[int, int, int, int]:
        """In flight, open connections, legs that wait, dials."""
        return self.in_flight, self.connections, len(self._waiting), self.dials


async def turns(count: int = 8) -> None:
    """Let the event loop do what it has to do already."""
    for _ in range(count):
        await asyncio.sleep(0)
