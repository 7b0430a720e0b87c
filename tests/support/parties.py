"""Visitors and backends that do one thing at a time, as a test says, and note when they learn that the other has gone.

A ``Visit`` is a visitor's side of one exchange, an ``Exchange`` the backend's; both come in every version of HTTP that
the tunnel speaks, with the same verbs. All run on the test's own event loop.
"""

import asyncio
import re
import select
import socket
import struct
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, Final, cast

import h2.config
import h2.connection
import h2.errors
import h2.events
import httpx

__all__ = [
    "APP",
    "Application",
    "Exchange",
    "Http1Backend",
    "Http1Visit",
    "Http1Visitor",
    "Http2Backend",
    "Http2Visit",
    "Http2Visitor",
    "ScriptedTransport",
    "Side",
    "until",
]

APP: Final = "app.localhost"
BLOCK: Final = bytes(64 * 1024)


async def until(condition: Callable[[], object], limit: float = 5.0, what: str = "it") -> None:
    """Wait until the condition holds."""
    loop = asyncio.get_running_loop()
    deadline = loop.time() + limit
    while not condition():
        assert loop.time() < deadline, f"{what} did not come true within {limit:g} s"
        await asyncio.sleep(0.001)


def reset(transport: asyncio.Transport) -> None:
    """End a connection with RST."""
    sock = transport.get_extra_info("socket")
    if sock.fileno() >= 0:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        transport.abort()


def cut(transport: asyncio.Transport) -> None:
    """Close a connection at once, if it is not closed."""
    if transport.get_extra_info("socket").fileno() >= 0:
        transport.abort()


class Side:
    """What one side of an exchange has got so far."""

    def __init__(self) -> None:
        self.known_at: float | None = None
        "when it learned that the other side has gone, in seconds of the loop's clock"
        self.how = ""
        self.body = 0
        self.ended = False
        "the other side has said all"

    def learn(self, how: str) -> None:
        """The other side has gone."""
        if self.known_at is None:
            self.known_at = asyncio.get_running_loop().time()
            self.how = how


class _Sock(asyncio.Protocol):
    """A socket, which tells of its end even while nothing is read from it."""

    transport: asyncio.Transport

    def __init__(self) -> None:
        self._watch: asyncio.TimerHandle | None = None
        self.writable = True
        self.lost = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)

    def hold(self) -> None:
        """Read no more."""
        self.transport.pause_reading()
        self._look()

    def go_on(self) -> None:
        """Read again."""
        if self._watch is not None:
            self._watch.cancel()
            self._watch = None
        if not self.transport.is_closing():
            self.transport.resume_reading()

    def _look(self, events: int = select.POLLRDHUP) -> None:
        if self.lost:
            return
        poll = select.poll()
        poll.register(self.transport.get_extra_info("socket").fileno(), events)
        if found := poll.poll(0):
            self.writable = False
            self.over("RST" if found[0][1] & (select.POLLERR | select.POLLHUP) else "FIN")
        else:
            self._watch = asyncio.get_running_loop().call_later(0.001, self._look, events)

    def over(self, how: str) -> None:
        raise NotImplementedError

    def pause_writing(self) -> None:
        self.writable = False

    def resume_writing(self) -> None:
        self.writable = True

    def eof_received(self) -> bool | None:
        self.over("FIN")
        return None

    def connection_lost(self, exc: Exception | None) -> None:
        self.lost = True
        self.writable = False
        if self._watch is not None:
            self._watch.cancel()
        self.over("RST" if exc is not None else "closed")


# Visitors


class Http1Visit(Side, _Sock):
    """A visitor's connection, with one exchange on it."""

    version = "1.1"

    def __init__(self) -> None:
        Side.__init__(self)
        _Sock.__init__(self)
        self.raw = b""
        self._chunked = False
        self.half = False
        "its own side is closed"

    @property
    def statuses(self) -> list[int]:
        """Of all answers so far."""
        return [int(status) for status in re.findall(rb"HTTP/1\.1 (\d{3}) ", self.raw)]

    @property
    def is_complete(self) -> bool:
        """Whether an answer in chunks has its last one."""
        return self.raw.endswith(b"\r\n0\r\n\r\n")

    def data_received(self, data: bytes) -> None:
        if len(self.raw) > 1 << 16:
            self.body += len(data)
            return
        self.raw += data
        _, found, content = self.raw.rpartition(b"\r\n\r\n")
        self.body = len(content) if found else 0

    def over(self, how: str) -> None:
        self.learn(how)

    def eof_received(self) -> bool | None:
        self.over("FIN")
        if self.half:
            self._look(0)  # from here on the event loop reads no more, and would not tell of a reset
        return self.half

    def ask(self, target: str = "/", *fields: str, length: int | None = None, body: bool = False) -> None:
        """Send a request's head; with ``length`` or ``body`` its body follows."""
        self._chunked = body and length is None
        if length is not None:
            fields = (f"Content-Length: {length}", *fields)
        elif body:
            fields = ("Transfer-Encoding: chunked", *fields)
        lines = (f"{'POST' if body else 'GET'} {target} HTTP/1.1", f"Host: {APP}", *fields, "", "")
        self.transport.write("\r\n".join(lines).encode())

    def send(self, data: bytes) -> None:
        """Some of the body."""
        self.transport.write(b"%x\r\n%b\r\n" % (len(data), data) if self._chunked else data)

    def leave(self, how: str) -> None:
        """Go away."""
        match how:
            case "close":
                cut(self.transport)
            case "RST":
                reset(self.transport)
            case "half-close":
                self.half = True
                self.transport.write_eof()
            case _:
                raise AssertionError(how)

    def close(self) -> None:
        cut(self.transport)


class Http1Visitor:
    """Makes visits, each on a connection of its own."""

    ways = ("close", "RST", "half-close")

    def __init__(self, address: tuple[str, int]) -> None:
        self._address = address

    async def visit(self) -> Http1Visit:
        loop = asyncio.get_running_loop()
        sock = socket.socket()
        sock.setblocking(False)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65536)
        await loop.sock_connect(sock, self._address)
        _, protocol = await loop.create_connection(Http1Visit, sock=sock)
        return protocol


class Http2Visit(Side):
    """One stream of a visitor's connection."""

    version = "2"

    def __init__(self, connection: "_H2") -> None:
        super().__init__()
        self._connection = connection
        self.stream_id = 0
        self.statuses: list[int] = []
        self.held = False

    @property
    def is_complete(self) -> bool:
        """Whether the answer has ended as if it were whole."""
        return self.ended

    def ask(self, target: str = "/", *fields: str, length: int | None = None, body: bool = False) -> None:
        h2_ = self._connection.h2
        self.stream_id = h2_.get_next_available_stream_id()
        self._connection.sides[self.stream_id] = self
        pairs = [(name.lower(), value) for name, _, value in (field.partition(": ") for field in fields)]
        if length is not None:
            pairs.append(("content-length", str(length)))
        head = [(":method", "POST" if body else "GET"), (":scheme", "http"), (":authority", APP), (":path", target)]
        h2_.send_headers(self.stream_id, [*head, *pairs], end_stream=not body)
        self._connection.flush()

    def send(self, data: bytes) -> None:
        self._connection.send(self.stream_id, data)

    @property
    def writable(self) -> bool:
        return self._connection.room(self.stream_id) > 0

    def hold(self) -> None:
        self.held = True

    def go_on(self) -> None:
        self.held = False
        self._connection.acknowledge(self.stream_id)

    def leave(self, how: str) -> None:
        connection = self._connection
        match how:
            case "RST_STREAM":
                connection.h2.reset_stream(self.stream_id, h2.errors.ErrorCodes.CANCEL)
                connection.flush()
            case "GOAWAY":
                connection.h2.close_connection()
                connection.flush()
                connection.transport.close()
            case "close":
                cut(connection.transport)
            case "RST":
                reset(connection.transport)
            case _:
                raise AssertionError(how)

    def close(self) -> None:
        cut(self._connection.transport)


class _H2(_Sock):
    """A connection of HTTP/2, either end."""

    def __init__(self, *, client: bool) -> None:
        super().__init__()
        self.h2 = h2.connection.H2Connection(
            h2.config.H2Configuration(client_side=client, header_encoding="utf-8", validate_inbound_headers=False)
        )
        self.sides: dict[int, Any] = {}
        self._unacknowledged: dict[int, int] = {}

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self.h2.initiate_connection()
        self.flush()

    def flush(self) -> None:
        data = self.h2.data_to_send()
        if data and not self.transport.is_closing():
            self.transport.write(data)

    def room(self, stream_id: int) -> int:
        return min(self.h2.local_flow_control_window(stream_id), self.h2.max_outbound_frame_size)

    def send(self, stream_id: int, data: bytes) -> None:
        """As much as the window lets through; the rest is dropped."""
        room = self.room(stream_id)
        if room > 0:
            self.h2.send_data(stream_id, data[:room])
        self.flush()

    def acknowledge(self, stream_id: int) -> None:
        size = self._unacknowledged.pop(stream_id, 0)
        if size:
            self.h2.acknowledge_received_data(size, stream_id)
            self.flush()

    def data_received(self, data: bytes) -> None:
        for event in self.h2.receive_data(data):
            if isinstance(event, h2.events.ConnectionTerminated):
                self.over("GOAWAY")
                continue
            stream_id = getattr(event, "stream_id", None)
            if isinstance(event, h2.events.RequestReceived):
                self.request(event)
            side = self.sides.get(stream_id or 0)
            if side is None:
                continue
            if isinstance(event, h2.events.ResponseReceived | h2.events.InformationalResponseReceived):
                side.statuses.append(int(dict(event.headers)[":status"]))
            elif isinstance(event, h2.events.DataReceived):
                side.body += len(event.data)
                self._unacknowledged[side.stream_id] = (
                    self._unacknowledged.get(side.stream_id, 0) + event.flow_controlled_length
                )
                if not side.held:
                    self.acknowledge(side.stream_id)
            elif isinstance(event, h2.events.StreamEnded):
                side.ended = True
            elif isinstance(event, h2.events.StreamReset):
                side.learn(f"RST_STREAM({event.error_code:#x})")
                self.sides.pop(side.stream_id, None)
        self.flush()

    def request(self, event: h2.events.RequestReceived) -> None:
        """Requests are for servers."""

    def over(self, how: str) -> None:
        for side in list(self.sides.values()):
            side.learn(how)


class Http2Visitor:
    """Makes visits: streams of one connection, as long as it lives."""

    ways = ("RST_STREAM", "close", "RST", "GOAWAY")

    def __init__(self, address: tuple[str, int]) -> None:
        self._address = address
        self._connection: _H2 | None = None

    async def visit(self) -> Http2Visit:
        connection = self._connection
        if connection is None or connection.transport.is_closing() or connection.lost:
            loop = asyncio.get_running_loop()
            _, connection = await loop.create_connection(lambda: _H2(client=True), *self._address)
            self._connection = connection
        return Http2Visit(connection)


# Backends


class Exchange(Side):
    """A request as it came to the backend."""

    deaths: tuple[str, ...] = ()
    target = ""

    def interim(self, status: int) -> None:
        raise NotImplementedError

    def head(self, length: int | None = None, status: int = 200) -> None:
        """The answer's head; without ``length`` its body is in chunks."""
        raise NotImplementedError

    def data(self, data: bytes) -> None:
        raise NotImplementedError

    def end(self) -> None:
        raise NotImplementedError

    def hold(self) -> None:
        """Take no more of the upload."""
        raise NotImplementedError

    def go_on(self) -> None:
        """Take it again."""
        raise NotImplementedError

    @property
    def writable(self) -> bool:
        """Whether more of the answer would be taken now."""
        raise NotImplementedError

    def die(self, how: str) -> None:
        raise NotImplementedError

    def close(self) -> None:
        """The test is over."""


class Http1Exchange(Exchange):
    deaths = ("FIN", "RST")

    def __init__(self, connection: "_Http1Connection", target: str) -> None:
        super().__init__()
        self.target = target
        self._connection = connection
        self._chunked = False
        self.written = b""

    def interim(self, status: int) -> None:
        self._write(b"HTTP/1.1 %d Interim\r\n\r\n" % status)

    def switch(self) -> None:
        self._write(b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: echo\r\nConnection: Upgrade\r\n\r\n")

    def head(self, length: int | None = None, status: int = 200) -> None:
        self._chunked = length is None
        framing = b"Transfer-Encoding: chunked" if length is None else b"Content-Length: %d" % length
        self._write(b"HTTP/1.1 %d Answer\r\n%b\r\n\r\n" % (status, framing))

    def data(self, data: bytes) -> None:
        self._write(b"%x\r\n%b\r\n" % (len(data), data) if self._chunked else data)

    def raw(self, data: bytes) -> None:
        self._write(data)

    def keep_open(self) -> None:
        """Go on when the other side has closed its own."""
        self._connection.keeps_open = True

    def half_close(self) -> None:
        self.keep_open()
        self._connection.transport.write_eof()

    def end(self) -> None:
        if self._chunked:
            self._write(b"0\r\n\r\n")
        self._connection.exchange = None

    def hold(self) -> None:
        self._connection.hold()

    def go_on(self) -> None:
        self._connection.go_on()

    @property
    def writable(self) -> bool:
        return self._connection.writable

    def die(self, how: str) -> None:
        if how == "RST":
            reset(self._connection.transport)
        else:
            self._connection.transport.close()

    def close(self) -> None:
        cut(self._connection.transport)

    def _write(self, data: bytes) -> None:
        if not self._connection.transport.is_closing():
            self._connection.transport.write(data)


class _Http1Connection(_Sock):
    def __init__(self, backend: "Http1Backend") -> None:
        super().__init__()
        self._backend = backend
        self._read = b""
        self.keeps_open = False
        self.exchange: Http1Exchange | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self._backend.connections.add(self)

    def data_received(self, data: bytes) -> None:
        if self.exchange is not None:
            self.exchange.body += len(data)
            return
        self._read += data
        head, found, rest = self._read.partition(b"\r\n\r\n")
        if found:
            self._read = b""
            self.exchange = Http1Exchange(self, head.split(b" ")[1].decode())
            self.exchange.body = len(rest)
            self._backend.arrivals.put_nowait(self.exchange)

    def eof_received(self) -> bool | None:
        self.over("FIN")
        if self.exchange is not None:
            self.exchange.ended = True
        if self.keeps_open:
            self._look(0)
        return self.keeps_open

    def over(self, how: str) -> None:
        if self.exchange is not None:
            self.exchange.learn(how)

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._backend.connections.discard(self)


class Http1Backend:
    """Accepts connections, and puts each request into ``arrivals``."""

    kind = "1.1"
    exchange = Http1Exchange

    def __init__(self) -> None:
        self.arrivals: asyncio.Queue[Any] = asyncio.Queue()
        self.connections: set[Any] = set()
        self.port = 0
        self._server: asyncio.Server | None = None

    async def start(self) -> None:
        loop = asyncio.get_running_loop()
        self._server = await loop.create_server(self._connection, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]

    def _connection(self) -> asyncio.Protocol:
        return _Http1Connection(self)

    def stop(self) -> None:
        assert self._server is not None
        self._server.close()
        for connection in list(self.connections):
            cut(connection.transport)


class Http2Exchange(Exchange):
    deaths = ("RST_STREAM", "GOAWAY", "FIN", "RST")

    def __init__(self, connection: "_Http2Connection", stream_id: int, target: str) -> None:
        super().__init__()
        self.target = target
        self._connection = connection
        self.stream_id = stream_id
        self.held = False

    def interim(self, status: int) -> None:
        self._connection.h2.send_headers(self.stream_id, [(":status", str(status))])
        self._connection.flush()

    def head(self, length: int | None = None, status: int = 200) -> None:
        fields = [] if length is None else [("content-length", str(length))]
        self._connection.h2.send_headers(self.stream_id, [(":status", str(status)), *fields])
        self._connection.flush()

    def data(self, data: bytes) -> None:
        self._connection.send(self.stream_id, data)

    def end(self) -> None:
        self._connection.h2.end_stream(self.stream_id)
        self._connection.flush()

    def hold(self) -> None:
        self.held = True

    def go_on(self) -> None:
        self.held = False
        self._connection.acknowledge(self.stream_id)

    @property
    def writable(self) -> bool:
        return self.known_at is None and self._connection.room(self.stream_id) > 0

    def die(self, how: str) -> None:
        connection = self._connection
        match how:
            case "RST_STREAM":
                connection.h2.reset_stream(self.stream_id, h2.errors.ErrorCodes.INTERNAL_ERROR)
                connection.flush()
            case "GOAWAY":
                connection.h2.close_connection()
                connection.flush()
                connection.transport.close()
            case "FIN":
                connection.transport.close()
            case "RST":
                reset(connection.transport)

    def close(self) -> None:
        cut(self._connection.transport)


class _Http2Connection(_H2):
    def __init__(self, backend: "Http2Backend") -> None:
        super().__init__(client=False)
        self._backend = backend

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self._backend.connections.add(self)

    def request(self, event: h2.events.RequestReceived) -> None:
        exchange = Http2Exchange(self, event.stream_id, dict(event.headers)[":path"])
        self.sides[event.stream_id] = exchange
        self._backend.arrivals.put_nowait(exchange)

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._backend.connections.discard(self)


class Http2Backend(Http1Backend):
    kind = "2"
    exchange = Http2Exchange

    def _connection(self) -> asyncio.Protocol:
        return _Http2Connection(self)


class _TaskExchange(Exchange):
    """One whose answer a task gives; what the test says waits in ``steps``."""

    def __init__(self, target: str) -> None:
        super().__init__()
        self.target = target
        self.steps: asyncio.Queue[tuple[str, Any]] = asyncio.Queue()
        self.task = asyncio.current_task()
        self.reads = asyncio.Event()
        self.reads.set()
        self.length: int | None = None

    def head(self, length: int | None = None, status: int = 200) -> None:
        self.steps.put_nowait(("head", (status, length)))

    def data(self, data: bytes) -> None:
        self.steps.put_nowait(("data", data))

    def end(self) -> None:
        self.steps.put_nowait(("end", None))

    def hold(self) -> None:
        self.reads.clear()

    def go_on(self) -> None:
        self.reads.set()

    @property
    def writable(self) -> bool:
        return self.steps.qsize() < 4

    def die(self, how: str) -> None:
        if how == "cancelled":
            assert self.task is not None
            self.task.cancel()
        else:
            self.steps.put_nowait((how, None))

    def close(self) -> None:
        if self.task is not None and not self.task.done():
            self.task.cancel()


class Application:
    """An ASGI application that does as the test says, and listens for the visitor's leaving."""

    kind = "asgi"

    class exchange(_TaskExchange):
        deaths = ("raises", "returns", "cancelled")

    def __init__(self) -> None:
        self.arrivals: asyncio.Queue[Any] = asyncio.Queue()

    async def start(self) -> None:
        pass

    def stop(self) -> None:
        pass

    async def __call__(
        self,
        scope: dict[str, Any],
        receive: Callable[[], Awaitable[dict[str, Any]]],
        send: Callable[[dict[str, Any]], Awaitable[None]],
    ) -> None:
        exchange = self.exchange(scope["path"])
        self.arrivals.put_nowait(exchange)
        async with asyncio.TaskGroup() as group:
            answering = group.create_task(self._answer(exchange, send))
            listening = group.create_task(self._listen(exchange, receive, answering))
            await asyncio.wait([answering])
            listening.cancel()

    async def _listen(
        self, exchange: _TaskExchange, receive: Callable[[], Awaitable[dict[str, Any]]], answering: asyncio.Task[None]
    ) -> None:
        while True:
            waiting = asyncio.ensure_future(receive())
            message = await waiting
            if message["type"] == "http.disconnect":
                exchange.learn("http.disconnect")
                answering.cancel()
                return
            exchange.body += len(message["body"])
            exchange.ended = not message["more_body"]
            if not exchange.reads.is_set() and not exchange.ended:
                # It takes nothing more, so it hears of nothing either, as ASGI has one queue for both; but its next
                # send would tell it.
                await exchange.reads.wait()

    async def _answer(self, exchange: _TaskExchange, send: Callable[[dict[str, Any]], Awaitable[None]]) -> None:
        while True:
            step, value = await exchange.steps.get()
            match step:
                case "head":
                    status, length = value
                    headers = [] if length is None else [(b"content-length", b"%d" % length)]
                    await send({"type": "http.response.start", "status": status, "headers": headers})
                    await send({"type": "http.response.body", "body": b"", "more_body": True})
                case "data":
                    await send({"type": "http.response.body", "body": value, "more_body": True})
                case "end":
                    await send({"type": "http.response.body", "body": b""})
                    return
                case "returns":
                    return
                case "raises":
                    raise RuntimeError("the application fails, as the test says")


class ScriptedTransport(httpx.AsyncBaseTransport):
    """An httpx transport that does as the test says."""

    kind = "httpx"

    class exchange(_TaskExchange):
        deaths = ("raises", "cancelled")

    def __init__(self) -> None:
        self.arrivals: asyncio.Queue[Any] = asyncio.Queue()

    async def start(self) -> None:
        pass

    def stop(self) -> None:
        pass

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        exchange = self.exchange(request.url.raw_path.decode())
        self.arrivals.put_nowait(exchange)
        reading = asyncio.ensure_future(self._read(exchange, cast(httpx.AsyncByteStream, request.stream)))
        try:
            step, value = await exchange.steps.get()
        except asyncio.CancelledError:
            exchange.learn("cancelled")
            reading.cancel()
            raise
        if step != "head":
            reading.cancel()
            raise httpx.ReadError("the transport fails, as the test says")
        status, length = value
        headers = {} if length is None else {"content-length": str(length)}
        return httpx.Response(status, headers=headers, stream=_Answer(exchange, reading))

    async def _read(self, exchange: _TaskExchange, stream: httpx.AsyncByteStream) -> None:
        async for data in stream:
            exchange.body += len(data)
            await exchange.reads.wait()
        exchange.ended = True


class _Answer(httpx.AsyncByteStream):
    def __init__(self, exchange: _TaskExchange, reading: asyncio.Future[None]) -> None:
        self._exchange = exchange
        self._reading = reading
        self._ended = False

    async def __aiter__(self) -> AsyncIterator[bytes]:
        while True:
            step, value = await self._exchange.steps.get()
            if step == "data":
                yield value
            elif step == "raises":
                raise httpx.ReadError("the transport fails, as the test says")
            else:
                self._ended = True
                return

    async def aclose(self) -> None:
        if not self._ended:
            self._exchange.learn("closed")
        self._reading.cancel()
