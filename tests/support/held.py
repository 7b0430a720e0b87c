"""Very many visitors whose requests stay open, and the backend that keeps them so: both as light as they can be.

As a command (`python -m tests.support.held`) it is the backend: it prints ``ready PORT`` and ends with its input.

    GET /poll       is answered when it is released
    GET /websocket  with an upgrade becomes a WebSocket (RFC 6455) that sends each text message back
    GET /release    answers every poll that waits, and is answered with how many there were
    GET /count      says how many wait and how many WebSockets are open
    anything else   is answered at once
"""

import asyncio
import base64
import hashlib
import json
import resource
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Final, cast

try:
    from uvloop import new_event_loop
except ImportError:
    from asyncio import new_event_loop

__all__ = ["Crowd", "Held", "HeldBackend", "descriptors", "held_backend"]

_ROOT: Final = Path(__file__).parents[2]
_GUID: Final = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"
_KEY: Final = base64.b64encode(b"sixteen bytes ok")
_ACCEPT: Final = base64.b64encode(hashlib.sha1(_KEY + _GUID).digest())

_PER_ADDRESS: Final = 2000
"visitors from one address of the loopback: each has ports of its own"

MESSAGE: Final = b"are you there?"


def descriptors(wanted: int) -> int:
    """Take as many file descriptors as may be had; how many. Exits with what to do when they are fewer than wanted."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    if hard != resource.RLIM_INFINITY and hard < wanted:
        sys.exit(f"{wanted} file descriptors are needed and {hard} allowed: `ulimit -Hn {wanted}` as root, and again")
    return hard


# The backend


class _Connection(asyncio.Protocol):
    def __init__(self, waiting: dict["_Connection", None], sockets: set["_Connection"]) -> None:
        self._waiting = waiting
        self._sockets = sockets
        self._buffer = b""
        self._upgraded = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)  # uvloop's is none by its type

    def connection_lost(self, exc: Exception | None) -> None:
        self._waiting.pop(self, None)
        self._sockets.discard(self)

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        if self._upgraded:
            self._echo()
            return
        while b"\r\n\r\n" in self._buffer:
            head, _, self._buffer = self._buffer.partition(b"\r\n\r\n")
            self._answer(head)

    def _answer(self, head: bytes) -> None:
        path = head.split(b" ", 2)[1]
        if path == b"/websocket":
            self._upgraded = True
            self._sockets.add(self)
            self.transport.write(
                b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
                b"Sec-WebSocket-Accept: " + _ACCEPT + b"\r\n\r\n"
            )
        elif path == b"/poll":
            self._waiting[self] = None
        elif path == b"/release":
            waiting = list(self._waiting)
            self._waiting.clear()
            for each in waiting:
                each.say(MESSAGE)
            self.say(b"%d" % len(waiting))
        elif path == b"/count":
            self.say(json.dumps({"polls": len(self._waiting), "websockets": len(self._sockets)}).encode())
        else:
            self.say(b"ok")

    def say(self, body: bytes) -> None:
        self.transport.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body))

    def _echo(self) -> None:
        """Frames of up to 125 bytes (RFC 6455 section 5.2): a text comes back, a close is answered by one."""
        while len(self._buffer) >= 6 and len(self._buffer) >= 6 + (size := self._buffer[1] & 127):
            mask = self._buffer[2:6]
            text = bytes(byte ^ mask[index & 3] for index, byte in enumerate(self._buffer[6 : 6 + size]))
            opcode, self._buffer = self._buffer[0] & 15, self._buffer[6 + size :]
            self.transport.write(bytes((0x80 | opcode, size)) + text)
            if opcode == 8:
                self.transport.close()


async def _serve() -> None:
    waiting: dict[_Connection, None] = {}
    sockets: set[_Connection] = set()
    loop = asyncio.get_running_loop()
    server = await loop.create_server(lambda: _Connection(waiting, sockets), "127.0.0.1", 0, backlog=4096)
    print("ready", server.sockets[0].getsockname()[1], flush=True)
    await asyncio.to_thread(sys.stdin.read)


class HeldBackend:
    """The backend in a process of its own."""

    def __init__(self, process: asyncio.subprocess.Process, port: int) -> None:
        self.process = process
        self.port = port

    @property
    def target(self) -> str:
        return f"127.0.0.1:{self.port}"

    async def count(self) -> dict[str, int]:
        """How many polls wait and WebSockets are open."""
        found: dict[str, int] = json.loads(await ask((("127.0.0.1", self.port)), "/count"))
        return found

    async def reached(self, kind: str, count: int, missing: Callable[[], int] = lambda: 0, limit: float = 60.0) -> None:
        """Wait until so many polls or WebSockets are there, those left out that are ``missing`` for good."""
        loop = asyncio.get_running_loop()
        until = loop.time() + limit
        while (found := (await self.count())[f"{kind}s"]) != count - missing():
            assert loop.time() < until, f"{found} of {count} {kind}s are there"
            await asyncio.sleep(0.05)


@asynccontextmanager
async def held_backend() -> AsyncIterator[HeldBackend]:
    """A backend for the time of a with block."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "tests.support.held", stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=_ROOT
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        async with asyncio.timeout(30):
            word, port = (await process.stdout.readline()).split()
        assert word == b"ready"
        yield HeldBackend(process, int(port))
    finally:
        process.stdin.close()
        try:
            async with asyncio.timeout(10):
                await process.wait()
        except TimeoutError:
            process.kill()
            await process.wait()


# The visitors


async def ask(address: tuple[str, int], path: str, host: str = "app.localhost") -> bytes:
    """The body of the answer to a GET on a connection of its own. Raises OSError, and ValueError for another status."""
    reader, writer = await asyncio.open_connection(*address)
    try:
        writer.write(f"GET {path} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n".encode())
        head = await reader.readuntil(b"\r\n\r\n")
        if b" 200 " not in head[:16]:
            raise ValueError(head.decode("latin-1"))
        length = int(head.lower().partition(b"content-length:")[2].split()[0])
        return await reader.readexactly(length)
    finally:
        writer.close()


class Held(asyncio.Protocol):
    """A visitor with one request, which stays open."""

    def __init__(self, crowd: "Crowd", kind: str) -> None:
        self._crowd = crowd
        self._kind = kind
        self.received = b""
        self.lost = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)  # uvloop's is none by its type
        fields = ""
        if self._kind == "websocket":
            fields = "Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n"
            fields += f"Sec-WebSocket-Key: {_KEY.decode()}\r\n"
        transport.write(f"GET /{self._kind} HTTP/1.1\r\nHost: {self._crowd.host}\r\n{fields}\r\n".encode())

    def data_received(self, data: bytes) -> None:
        self.received += data
        self._crowd.changed.set()

    def connection_lost(self, exc: Exception | None) -> None:
        self.lost = True
        self._crowd.changed.set()

    @property
    def opened(self) -> bool:
        """Whether a WebSocket is open."""
        return self.received.startswith(b"HTTP/1.1 101 ") and b"\r\n\r\n" in self.received

    @property
    def refused(self) -> bool:
        """Whether it was given up, or answered with an error."""
        return self.lost or self.received.startswith((b"HTTP/1.1 4", b"HTTP/1.1 5"))

    @property
    def answered(self) -> bool:
        """Whether the message has come."""
        return self.received.endswith(MESSAGE)

    def say(self) -> None:
        """Send the message on a WebSocket, masked with zeros."""
        self.received = b""
        self.transport.write(bytes((0x81, 0x80 | len(MESSAGE), 0, 0, 0, 0)) + MESSAGE)


class Crowd:
    """Visitors from several addresses of the loopback."""

    def __init__(self, address: tuple[str, int], host: str = "app.localhost") -> None:
        self.address = address
        self.host = host
        self.visitors: list[Held] = []
        self.changed = asyncio.Event()

    async def come(self, kind: str, count: int, at_once: int = 64) -> None:
        """So many more visitors with a ``websocket`` or a ``poll``; WebSockets are all open when it returns."""
        loop = asyncio.get_running_loop()
        room = asyncio.Semaphore(at_once)

        async def one(number: int) -> None:
            async with room:
                source = f"127.0.0.{2 + number // _PER_ADDRESS}"
                sock = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
                sock.setblocking(False)
                # The port is chosen with the destination, so ports of another connection's TIME-WAIT do no harm.
                sock.setsockopt(socket.IPPROTO_IP, 24, 1)  # IP_BIND_ADDRESS_NO_PORT
                sock.bind((source, 0))
                await loop.sock_connect(sock, self.address)
                _, visitor = await loop.create_connection(lambda: Held(self, kind), sock=sock)
                self.visitors.append(visitor)
                if kind == "websocket":
                    await self.until(lambda: visitor.opened or visitor.refused, 60.0)

        await asyncio.gather(*(one(len(self.visitors) + number) for number in range(count)))

    async def until(self, condition: Callable[[], bool], limit: float) -> None:
        """Wait until it holds, or the time (seconds) is over."""
        async with asyncio.timeout(limit):
            while not condition():
                self.changed.clear()
                await self.changed.wait()

    @property
    def refused(self) -> list[Held]:
        return [each for each in self.visitors if each.refused]

    async def all_answered(self, limit: float = 120.0) -> int:
        """Wait until each has its message, for up to ``limit`` seconds; how many have."""
        loop = asyncio.get_running_loop()
        until = loop.time() + limit
        missing = self.visitors
        while missing and loop.time() < until:
            missing = [each for each in missing if not each.answered and not each.refused]
            await asyncio.sleep(0.05)
        return sum(each.answered for each in self.visitors)

    def leave(self) -> None:
        """All go away."""
        for each in self.visitors:
            each.transport.abort()
        self.visitors.clear()


if __name__ == "__main__":
    resource.setrlimit(resource.RLIMIT_NOFILE, (resource.getrlimit(resource.RLIMIT_NOFILE)[1],) * 2)
    with asyncio.Runner(loop_factory=new_event_loop) as runner:
        runner.run(_serve())
