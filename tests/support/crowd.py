"""Many visitors and a backend of theirs on the test's own event loop, for tests of many things at once."""

import asyncio
import re
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress

__all__ = [
    "PATTERN",
    "CrowdBackend",
    "Exchange",
    "SlowVisitor",
    "Uploader",
    "crowd_backend",
    "fetch",
    "opened",
    "read_head",
    "settled",
    "times_of_fifty",
    "until",
]

LIMIT = 60.0
"seconds for any one exchange"

PATTERN = bytes(range(256)) * 256
"64 KiB that bodies are made of"

Exchange = Callable[["CrowdBackend", bytes, asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


async def read_head(reader: asyncio.StreamReader) -> bytes:
    """A head with its empty line. Raises IncompleteReadError at the end of the connection."""
    return await reader.readuntil(b"\r\n\r\n")


class CrowdBackend:
    """A backend that does as a request's target says.

    ``/slow?MS`` answers after so many milliseconds; ``/down?SIZE`` sends so many bytes; ``/up`` reads a body and says
    how many bytes came; ``/up?RATE`` reads only so many bytes a second; ``/hang`` never answers; ``/tiny?COUNT`` sends
    so many chunks of one byte; ``/count`` reads a chunked body and says how many bytes came; ``/raw?NAME`` sends
    ``raw[NAME]`` over and over, up to its size, and ends the connection.
    """

    def __init__(self) -> None:
        self.requests = 0
        self.busy = 0
        self.connections: set[asyncio.StreamWriter] = set()
        self.sent = 0
        "body bytes that the sockets have taken"
        self.received = 0
        self.port = 0
        self.raw: dict[str, tuple[bytes, bytes, int]] = {}
        "what an answer begins with, what is sent again and again after it, and how many bytes of that"

    @property
    def target(self) -> str:
        """The BACKEND argument for it."""
        return f"http://127.0.0.1:{self.port}"

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections.add(writer)
        try:
            with suppress(ConnectionError, asyncio.IncompleteReadError):
                while True:
                    await self._answer(await read_head(reader), reader, writer)
        finally:
            self.connections.discard(writer)
            writer.transport.abort()

    async def _answer(self, head: bytes, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.requests += 1
        self.busy += 1
        try:
            target = head.split(b" ", 2)[1].decode()
            path, _, value = target.partition("?")
            match path:
                case "/slow":
                    await asyncio.sleep(int(value) / 1000)
                    writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")
                case "/down":
                    await self._send(int(value), writer)
                case "/up":
                    await self._receive(head, int(value) if value else 0, reader, writer)
                case "/tiny":
                    writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
                    await self._repeat(b"1\r\nx\r\n", int(value), writer)
                    writer.write(b"0\r\n\r\n")
                case "/count":
                    said = b"%d" % await _count_chunked(reader)
                    writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(said) + said)
                case "/raw":
                    begin, piece, size = self.raw[value]
                    writer.write(begin)
                    await self._repeat(piece, size // len(piece), writer)
                    raise ConnectionResetError
                case "/hang":
                    writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\npart")
                    await reader.read(1)  # until the other side goes away
                    raise ConnectionResetError
                case _:
                    writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(target) + target.encode())
            await writer.drain()
        finally:
            self.busy -= 1

    async def _repeat(self, piece: bytes, count: int, writer: asyncio.StreamWriter) -> None:
        at_once = max(1, 65536 // len(piece))
        while count > 0:
            writer.write(piece * min(count, at_once))
            await writer.drain()
            self.sent += len(piece) * min(count, at_once)
            count -= at_once

    async def _send(self, size: int, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % size)
        left = size
        while left:
            block = PATTERN if left >= len(PATTERN) else PATTERN[:left]
            writer.write(block)
            await writer.drain()
            left -= len(block)
            self.sent += len(block)

    async def _receive(
        self, head: bytes, rate: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        found = re.search(rb"content-length: (\d+)", head, re.I)
        assert found
        left, intact, position = int(found[1]), True, 0
        while left:
            data = await reader.read(min(left, rate // 10 or 65536))
            if not data:
                raise ConnectionResetError
            intact = intact and _matches(data, position)
            position = (position + len(data)) % len(PATTERN)
            left -= len(data)
            self.received += len(data)
            if rate:
                await asyncio.sleep(len(data) / rate)
        said = b"%s %s" % (found[1], b"intact" if intact else b"damaged")
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(said) + said)


async def _count_chunked(reader: asyncio.StreamReader) -> int:
    """How many bytes are in a chunked body."""
    count = 0
    while size := int((await reader.readuntil(b"\r\n")).partition(b";")[0], 16):
        await reader.readexactly(size + 2)
        count += size
    while await reader.readuntil(b"\r\n") != b"\r\n":
        pass
    return count


def _matches(data: bytes, position: int) -> bool:
    """Whether ``data`` is what comes at ``position`` of a body."""
    while data:
        part = PATTERN[position : position + len(data)]
        if data[: len(part)] != part:
            return False
        data, position = data[len(part) :], 0
    return True


@asynccontextmanager
async def crowd_backend(buffer: int = 0) -> AsyncIterator[CrowdBackend]:
    """A running CrowdBackend. ``buffer`` bounds what its kernel keeps of each connection, each way."""
    backend = CrowdBackend()
    tasks: set[asyncio.Task[None]] = set()

    def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.get_running_loop().create_task(backend.serve(reader, writer))
        tasks.add(task)
        task.add_done_callback(tasks.discard)

    listener = socket.create_server(("127.0.0.1", 0), backlog=2048)
    _bound(listener, buffer)
    server = await asyncio.start_server(accept, sock=listener, backlog=2048)
    backend.port = server.sockets[0].getsockname()[1]
    try:
        yield backend
    finally:
        server.close()
        for task in list(tasks):
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await server.wait_closed()


def _bound(sock: socket.socket, buffer: int) -> None:
    if buffer:
        # The loopback's segments of 64 KB make the other side's kernel keep 4 MB from the start; Ethernet's do not.
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG, 1448)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, buffer)


async def opened(
    address: tuple[str, int],
    target: str,
    *fields: str,
    host: str = "app.localhost",
    method: str = "GET",
    buffer: int = 0,
) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """A connection on which a request's head has been sent. ``buffer`` bounds what its kernel keeps, each way."""
    sock = socket.socket()
    try:
        sock.setblocking(False)
        _bound(sock, buffer)
        await asyncio.get_running_loop().sock_connect(sock, address)
        reader, writer = await asyncio.open_connection(sock=sock)
    except BaseException:
        sock.close()
        raise
    lines = (f"{method} {target} HTTP/1.1", f"Host: {host}", *fields, "", "")
    writer.write("\r\n".join(lines).encode())
    return reader, writer


async def fetch(
    address: tuple[str, int],
    target: str,
    *,
    host: str = "app.localhost",
    upload: int | None = None,
    limit: float = LIMIT,
) -> tuple[int, bytes, float]:
    """One request on a connection of its own: status, what is left of the body, seconds.

    Of a long body only its length and whether it is intact are kept, as ``b"LENGTH intact"``; ``upload`` bytes of
    the pattern are sent with it. Raises what a broken connection raises.
    """
    began = time.perf_counter()
    async with asyncio.timeout(limit):
        if upload is None:
            reader, writer = await opened(address, target, host=host)
        else:
            reader, writer = await opened(address, target, f"Content-Length: {upload}", host=host, method="POST")
        try:
            if upload is not None:
                await _upload(writer, upload)
            head = await read_head(reader)
            found = re.search(rb"content-length: (\d+)", head, re.I)
            assert found, head
            body = await _body(reader, int(found[1]))
        finally:
            writer.transport.abort()
    return int(head[9:12]), body, time.perf_counter() - began


async def _upload(writer: asyncio.StreamWriter, size: int) -> None:
    while size:
        block = PATTERN[:size]
        writer.write(block)
        await writer.drain()
        size -= len(block)


async def _body(reader: asyncio.StreamReader, size: int) -> bytes:
    if size <= 1000:
        return await reader.readexactly(size)
    left, intact = size, True
    while left:
        data = await reader.read(min(left, 1 << 20))
        if not data:
            raise asyncio.IncompleteReadError(b"", left)
        intact = intact and _matches(data, (size - left) % len(PATTERN))
        left -= len(data)
    return b"%d %s" % (size, b"intact" if intact else b"damaged")


async def until(condition: Callable[[], object], limit: float = 10.0) -> None:
    """Wait until the condition holds."""
    deadline = time.monotonic() + limit
    while not condition():
        assert time.monotonic() < deadline, f"it did not come true within {limit:g} s"
        await asyncio.sleep(0.005)


async def settled(count: Callable[[], int], limit: float = 20.0, still: float = 0.5) -> None:
    """Wait until a count has stood still for so many seconds."""
    last, since = -1, time.monotonic()
    deadline = since + limit
    while time.monotonic() - since < still:
        if count() != last or last <= 0:
            last, since = count(), time.monotonic()
        assert time.monotonic() < deadline, f"it did not stand still within {limit:g} s"
        await asyncio.sleep(0.02)


class SlowVisitor:
    """Downloads at 10 kB/s; ``buffer`` is what its kernel may hold for it, 0 for as much as the kernel likes."""

    def __init__(self, buffer: int = 0) -> None:
        self._buffer = buffer
        self.received = 0
        self.intact = True

    async def run(self, address: tuple[str, int], size: int) -> None:
        reader, writer = await opened(address, f"/down?{size}", buffer=self._buffer)
        try:
            await read_head(reader)
            while True:
                data = await reader.readexactly(1000)
                self.intact = self.intact and _matches(data, self.received % len(PATTERN))
                self.received += len(data)
                await asyncio.sleep(0.1)
        finally:
            writer.transport.abort()


class Uploader:
    """Uploads as fast as it may to a backend that reads at 10 kB/s; ``buffer`` as for SlowVisitor."""

    def __init__(self, buffer: int = 0) -> None:
        self._buffer = buffer
        self.taken = 0
        "bytes that its socket has taken"

    async def run(self, address: tuple[str, int], size: int) -> None:
        _, writer = await opened(address, "/up?10000", f"Content-Length: {size}", method="POST", buffer=self._buffer)
        try:
            while True:
                writer.write(PATTERN)
                await writer.drain()
                self.taken += len(PATTERN)
        finally:
            writer.transport.abort()


async def times_of_fifty(address: tuple[str, int], turns: int = 2) -> list[float]:
    """50 visitors at once, each with some requests in turn that take 20 ms; the seconds of all."""

    async def visitor() -> list[float]:
        seconds = []
        for _ in range(turns):
            status, body, took = await fetch(address, "/slow?20", limit=10)
            assert (status, body) == (200, b"ok")
            seconds.append(took)
        return seconds

    return [took for each in await asyncio.gather(*(visitor() for _ in range(50))) for took in each]
