"""Many visitors and a backend of theirs on the test's own event loop, for tests of many things at once."""

import asyncio
import re
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress

__all__ = ["PATTERN", "CrowdBackend", "Exchange", "crowd_backend", "fetch", "opened", "read_head", "until"]

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
    how many bytes came; ``/up?RATE`` reads only so many bytes a second; ``/hang`` never answers.
    """

    def __init__(self) -> None:
        self.requests = 0
        self.busy = 0
        self.connections: set[asyncio.StreamWriter] = set()
        self.sent = 0
        "body bytes that the sockets have taken"
        self.received = 0
        self.port = 0

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
                case "/hang":
                    writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\npart")
                    await reader.read(1)  # until the other side goes away
                    raise ConnectionResetError
                case _:
                    writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(target) + target.encode())
            await writer.drain()
        finally:
            self.busy -= 1

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


def _matches(data: bytes, position: int) -> bool:
    """Whether ``data`` is what comes at ``position`` of a body."""
    while data:
        part = PATTERN[position : position + len(data)]
        if data[: len(part)] != part:
            return False
        data, position = data[len(part) :], 0
    return True


@asynccontextmanager
async def crowd_backend() -> AsyncIterator[CrowdBackend]:
    """A running CrowdBackend."""
    backend = CrowdBackend()
    tasks: set[asyncio.Task[None]] = set()

    def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.get_running_loop().create_task(backend.serve(reader, writer))
        tasks.add(task)
        task.add_done_callback(tasks.discard)

    server = await asyncio.start_server(accept, "127.0.0.1", 0, backlog=2048)
    backend.port = server.sockets[0].getsockname()[1]
    try:
        yield backend
    finally:
        server.close()
        for task in list(tasks):
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await server.wait_closed()


async def opened(
    address: tuple[str, int], target: str, *fields: str, host: str = "app.localhost", method: str = "GET"
) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """A connection on which a request's head has been sent."""
    reader, writer = await asyncio.open_connection(*address)
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
