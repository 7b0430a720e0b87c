"""Visitors of this program's own, for what no load generator tells: first bytes, whole bodies, and sitting still."""

import asyncio
import base64
import os
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self, cast

from benchmarks.sidebyside.processes import START_LIMIT, Process, Trouble

__all__ = ["Held", "Target", "Transfer", "Visitor", "answered", "held", "transfer"]

LIMIT = 15.0
"seconds for an answer, if nothing else is said"

AT_ONCE = 1 << 20
HEAD_LIMIT = 1 << 16
OPENING = 64
"connections that are opened at a time"


@dataclass(frozen=True)
class Target:
    """Where visitors go for what is behind a peer."""

    port: int
    fields: tuple[tuple[str, str], ...] = ()
    "header fields that tell the peer which tunnel is meant"

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    def head(self, path: str, method: str = "GET", *more: str) -> bytes:
        """A request's head."""
        host = () if any(name.lower() == "host" for name, _ in self.fields) else (f"Host: {self.address}",)
        named = (f"{name}: {value}" for name, value in self.fields)
        return "\r\n".join((f"{method} {path} HTTP/1.1", *host, *named, *more, "", "")).encode()


def parse_head(head: bytes) -> tuple[int, int]:
    """The status and the length of the body, -1 if it is not told. Raises Trouble for what is no answer."""
    first, *lines = head.split(b"\r\n")
    words = first.split(b" ", 2)
    if len(words) < 2 or not words[0].startswith(b"HTTP/1.") or not words[1].isdigit():
        raise Trouble(f"no HTTP answer: {first[:40]!r}")
    length = -1
    for line in lines:
        name, _, value = line.partition(b":")
        if name.strip().lower() == b"content-length":
            length = int(value)
    return int(words[1]), length


class Visitor:
    """A connection for one request after the other. What goes wrong is OSError or Trouble."""

    def __init__(self, target: Target, limit: float = LIMIT) -> None:
        self.target = target
        self.sock = socket.create_connection(("127.0.0.1", target.port), timeout=limit)
        self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._room = bytearray(AT_ONCE)
        self._rest = b""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.sock.close()

    def ask(self, path: str, size: int) -> tuple[float, float]:
        """Seconds until the first byte and until the last of an answer that must be 200 with so many bytes."""
        began = time.perf_counter()
        self.sock.sendall(self.target.head(path))
        first, length = self.begin(began)
        if length != size:
            raise Trouble(f"an answer of {length} bytes instead of {size}")
        for _ in self.body(length):
            pass
        return first, time.perf_counter() - began

    def begin(self, began: float) -> tuple[float, int]:
        """Take an answer's head, which must be 200: when its first byte came, and how long its body is."""
        data = self.sock.recv(AT_ONCE)
        first = time.perf_counter() - began
        while b"\r\n\r\n" not in data:
            more = self.sock.recv(AT_ONCE) if data else b""
            if not more:
                raise Trouble("the connection ended before an answer")
            data += more
            if len(data) > HEAD_LIMIT:
                raise Trouble("no end of an answer's head")
        head, _, self._rest = data.partition(b"\r\n\r\n")
        status, length = parse_head(head)
        if status != 200:
            raise Trouble(f"status {status}")
        if length < 0:
            raise Trouble("an answer without a length")
        return first, length

    def body(self, length: int) -> Iterator[int]:
        """The sizes of the pieces of a body, as they come."""
        left = length
        size, self._rest = len(self._rest), b""
        while left:
            size = size or self.sock.recv_into(self._room, min(AT_ONCE, left))
            if not size:
                raise Trouble(f"the connection ended {left} bytes before the end of the body")
            left -= size
            yield size
            size = 0

    def text(self, length: int) -> str:
        """A short body."""
        data, self._rest = self._rest, b""
        while len(data) < length:
            more = self.sock.recv(length - len(data))
            if not more:
                raise Trouble("the connection ended within the body")
            data += more
        return data.decode("latin-1")


def answered(target: Target, path: str, size: int, *needs: Process, limit: float = START_LIMIT) -> float:
    """Ask again and again until the answer is right; how many seconds that took.

    Raises Trouble with the last reason when it does not come within ``limit`` seconds, or one of the processes that
    it needs ends.
    """
    began = time.perf_counter()
    while True:
        why = ""
        try:
            with Visitor(target, limit=min(5.0, limit)) as visitor:
                visitor.ask(path, size)
                return time.perf_counter() - began
        except (OSError, Trouble) as error:
            why = str(error)
        for process in needs:
            process.alive()
        if time.perf_counter() - began > limit:
            raise Trouble(f"no right answer within {limit:g} s: {why}")
        time.sleep(0.005)


# Bulk


@dataclass
class Transfer:
    """What some bodies at the same time came to."""

    bytes: int
    seconds: float
    whole: bool
    "whether all of them came to their end, within the time that there was"


def transfer(target: Target, path: str, size: int, *, count: int, limit: float, sink: Target | None = None) -> Transfer:
    """Fetch ``count`` bodies of ``size`` bytes at the same time, or send them, for at most ``limit`` seconds.

    With a ``sink`` they are sent: it is the benchmarks/backend.py behind the target. It must answer with how many bytes
    came, and says of a body that was cut how much of it had come. Raises OSError or Trouble when one of them fails, and
    Trouble when nothing moved at all.
    """
    before = settled(sink) if sink is not None else 0
    moved = [0] * count
    ends = [0.0] * count
    whole = [False] * count
    errors: list[Exception] = []
    begin = threading.Barrier(count + 1)

    def one(number: int) -> None:
        try:
            with Visitor(target, limit=LIMIT) as visitor:
                begin.wait(LIMIT)
                deadline = time.perf_counter() + limit
                steps = _fetch(visitor, path, size, deadline) if sink is None else _send(visitor, size, deadline)
                for step in steps:
                    moved[number] += step
                whole[number] = moved[number] == size
                if sink is not None and not whole[number]:
                    # What the sockets hold is not to be brought to its end when the time is over.
                    visitor.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        except (OSError, Trouble, threading.BrokenBarrierError) as error:
            errors.append(error)
            begin.abort()
        finally:
            ends[number] = time.perf_counter()

    threads = [threading.Thread(target=one, args=(number,), daemon=True) for number in range(count)]
    for thread in threads:
        thread.start()
    with suppress(threading.BrokenBarrierError):
        begin.wait(LIMIT)
    began = time.perf_counter()
    for thread in threads:
        thread.join(limit + 2 * LIMIT)
    if errors:
        raise errors[0]
    seconds = max(ends) - began
    total = sum(moved) if sink is None else ask_number(sink, "/received") - before
    if total <= 0:
        raise Trouble(f"not a byte within {limit:g} s")
    return Transfer(total, seconds, all(whole))


def ask_number(backend: Target, path: str) -> int:
    """The first number that benchmarks/backend.py answers."""
    with Visitor(backend) as visitor:
        visitor.sock.sendall(backend.head(path))
        return int(visitor.text(visitor.begin(0.0)[1]).split()[0])


def settled(sink: Target, limit: float = 5.0) -> int:
    """How many bytes have come to a backend, when no more come of what was sent before."""
    deadline = time.monotonic() + limit
    came = -1
    while (now := ask_number(sink, "/received")) != came and time.monotonic() < deadline:
        came = now
        time.sleep(0.2)
    return now


def _fetch(visitor: Visitor, path: str, size: int, deadline: float) -> Iterator[int]:
    visitor.sock.sendall(visitor.target.head(path))
    visitor.sock.settimeout(max(0.1, deadline - time.perf_counter()))
    try:
        length = visitor.begin(0.0)[1]
    except TimeoutError:
        return
    if length != size:
        raise Trouble(f"an answer of {length} bytes instead of {size}")
    pieces = visitor.body(length)
    while (left := deadline - time.perf_counter()) > 0:
        visitor.sock.settimeout(left)
        try:
            yield next(pieces)
        except (StopIteration, TimeoutError):
            return


def _send(visitor: Visitor, size: int, deadline: float) -> Iterator[int]:
    visitor.sock.sendall(visitor.target.head("/sink", "POST", f"Content-Length: {size}"))
    block, sent = memoryview(os.urandom(AT_ONCE)), 0
    while sent < size:
        left = deadline - time.perf_counter()
        if left <= 0:
            return
        visitor.sock.settimeout(left)
        try:
            step = visitor.sock.send(block[: size - sent])
        except TimeoutError:
            return
        except ConnectionError:
            visitor.begin(0.0)  # an answer that came too early tells more
            raise
        sent += step
        yield step
    visitor.sock.settimeout(max(LIMIT, deadline - time.perf_counter()))
    length = visitor.begin(0.0)[1]
    came = visitor.text(length)
    if came != str(size):
        raise Trouble(f"{came} bytes of {size} came to the backend")


# Sitting still


@dataclass
class Held:
    """Visitors that wait, and what became of them."""

    asked: int
    opened: int = 0
    survived: int = 0
    "that were answered, or echoed, when they were asked to be at the end"

    seconds: float = 0.0
    "until all were there"

    why: Counter[str] = field(default_factory=Counter)
    "what kept the others"


class _Sitter(asyncio.Protocol):
    """A connection that sends a head, and takes what comes."""

    def __init__(self) -> None:
        self.data = bytearray()
        self.over = False
        self.news = asyncio.Event()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        self.data += data
        self.news.set()

    def connection_lost(self, exc: Exception | None) -> None:
        self.over = True
        self.news.set()

    async def head(self) -> tuple[int, int]:
        """The status and length of the next answer, taken from what has come."""
        await self.until(lambda: b"\r\n\r\n" in self.data)
        head, _, rest = bytes(self.data).partition(b"\r\n\r\n")
        self.data = bytearray(rest)
        return parse_head(head)

    async def until(self, there: Callable[[], bool]) -> None:
        """Wait until enough has come. Raises Trouble when the connection ends before."""
        while not there():
            if self.over:
                raise Trouble("the connection ended")
            self.news.clear()
            await self.news.wait()


@asynccontextmanager
async def held(target: Target, backend: Target, count: int, *, sockets: bool, limit: float) -> AsyncIterator[Held]:
    """So many visitors that wait for the time of the block, and are then all asked to show that they are there.

    They are WebSockets, or requests to /poll of the ``backend`` behind the target (see benchmarks/backend.py), which is
    asked directly how many have come. ``limit``: seconds for the opening, and for the end.
    """
    loop = asyncio.get_running_loop()
    found = Held(count)
    dialled: list[_Sitter] = []
    sitters: list[_Sitter] = []
    turn = asyncio.Semaphore(OPENING)
    key = base64.b64encode(bytes(16)).decode()
    upgrade = ("Upgrade: websocket", "Connection: Upgrade", "Sec-WebSocket-Version: 13", f"Sec-WebSocket-Key: {key}")

    async def sit() -> None:
        async with turn:
            try:
                _, sitter = await loop.create_connection(_Sitter, "127.0.0.1", target.port)
                dialled.append(sitter)
                if sockets:
                    sitter.transport.write(target.head("/socket", "GET", *upgrade))
                    status, _ = await sitter.head()
                    if status != 101:
                        raise Trouble(f"status {status}")
                    found.opened += 1
                else:
                    sitter.transport.write(target.head("/poll"))
                sitters.append(sitter)
            except (OSError, Trouble) as error:
                found.why[str(error)] += 1

    async def end(sitter: _Sitter) -> None:
        try:
            if sockets:
                sitter.transport.write(bytes((0x81, 0x84)) + bytes(4) + b"here")
                await sitter.until(lambda: len(sitter.data) >= 6)
                right = bytes(sitter.data) == b"\x81\x04here"
            else:
                status, length = await sitter.head()
                await sitter.until(lambda: len(sitter.data) >= length)
                right = status == 200
                if not right:
                    raise Trouble(f"status {status}")
            if not right:
                raise Trouble("another echo than what was sent")
            found.survived += 1
        except (OSError, Trouble) as error:
            found.why[str(error)] += 1

    began = time.perf_counter()
    try:
        try:
            async with asyncio.timeout(limit):
                await asyncio.gather(*(sit() for _ in range(count)))
                while not sockets:
                    found.opened = await asyncio.to_thread(ask_number, backend, "/waiting")
                    if found.opened >= sum(not sitter.over and not sitter.data for sitter in sitters):
                        break
                    await asyncio.sleep(0.1)
        except TimeoutError:
            # Of those that ask for /poll, what became of them is told at the end.
            late = count - found.why.total() - (found.opened if sockets else len(sitters))
            found.why[f"not open within {limit:g} s"] += late
            found.why = +found.why
        found.seconds = time.perf_counter() - began
        yield found
        if not sockets:
            with Visitor(backend) as visitor:
                visitor.sock.sendall(backend.head("/release"))
                await asyncio.to_thread(visitor.begin, 0.0)
        ending = [loop.create_task(end(sitter)) for sitter in sitters]
        if ending:
            _, unanswered = await asyncio.wait(ending, timeout=limit)
            if unanswered:
                found.why[f"no answer at the end within {limit:g} s"] += len(unanswered)
            for task in unanswered:
                task.cancel()
            await asyncio.gather(*ending, return_exceptions=True)
    finally:
        for sitter in dialled:
            sitter.transport.abort()
        await asyncio.sleep(0)
