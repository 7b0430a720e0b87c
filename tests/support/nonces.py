"""Requests that are told apart: what became of each, whether its answer is its own, and how often a backend got it.

Each request carries a nonce. Both bodies are made from it, so that each end knows what the other must have sent, and
the ledger counts how often its head came to a backend: a request that no backend got twice was not repeated.
"""

import asyncio
import random
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast
from urllib.parse import parse_qs, urlsplit

import httptools

__all__ = ["Figures", "Ledger", "Load", "NonceBackend", "Record", "body_of", "figures", "nonce_backend", "percentile"]

CLOSED_KEPT = "closed on a kept connection before any byte of an answer"
CLOSED = "closed before any byte of an answer"
CUT = "cut within the answer"
REFUSED = "connection refused"
TIMEOUT = "no complete answer in time"
BROKEN = "not HTTP"


def body_of(nonce: str, size: int) -> bytes:
    """So many bytes that belong to this nonce and to no other."""
    return random.Random(nonce).randbytes(size) if size else b""


class Ledger:
    """Which requests came to any of the backends that share it."""

    def __init__(self) -> None:
        self.heads: Counter[str] = Counter()
        "how often a request's head came, by nonce"

        self.whole: Counter[str] = Counter()
        "how often a whole request came"

        self.damaged: list[str] = []
        "uploads that were not what their nonce says"

        self.by_backend: Counter[str] = Counter()


# The backend


class _Served(asyncio.Protocol):
    """One connection: answers requests in order, each with what belongs to its nonce."""

    def __init__(self, backend: "NonceBackend") -> None:
        self._backend = backend
        self._parser = httptools.HttpRequestParser(self)
        self._transport: asyncio.Transport | None = None
        self._target = b""
        self._body: list[bytes] = []
        self._endless = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._backend.connections.add(self._transport)

    def connection_lost(self, exc: Exception | None) -> None:
        self._backend.connections.discard(cast(asyncio.Transport, self._transport))
        self._transport = None

    def data_received(self, data: bytes) -> None:
        self._parser.feed_data(data)

    def on_message_begin(self) -> None:
        self._target = b""
        self._body = []

    def on_url(self, url: bytes) -> None:
        self._target += url

    def on_headers_complete(self) -> None:
        self._backend.ledger.heads[self._nonce()] += 1
        self._backend.ledger.by_backend[self._backend.name] += 1

    def on_body(self, body: bytes) -> None:
        self._body.append(body)

    def on_message_complete(self) -> None:
        nonce, ledger = self._nonce(), self._backend.ledger
        if self._target.startswith(b"/endless"):
            self._endless = True
            self._write(b"HTTP/1.1 200 OK\r\nContent-Length: 1000000000000\r\n\r\n")
            self._pour()
            return
        options = parse_qs(urlsplit(self._target.decode()).query)

        def number(name: str) -> int:
            return int(options.get(name, ["0"])[0])

        ledger.whole[nonce] += 1
        intact = b"".join(self._body) == body_of(f"{nonce}/up", number("up"))
        if not intact:
            ledger.damaged.append(nonce)
        body = body_of(nonce, number("size"))
        head = (
            f"HTTP/1.1 {200 if intact else 400} Answer\r\nNonce: {nonce}\r\nServed-By: {self._backend.name}\r\n"
            f"Content-Length: {len(body)}\r\n\r\n"
        )
        if number("wait"):
            loop = asyncio.get_running_loop()
            loop.call_later(number("wait") / 1000, self._write, head.encode() + body)
        else:
            self._write(head.encode() + body)

    def pause_writing(self) -> None:
        self._endless = False

    def resume_writing(self) -> None:
        self._endless = True
        self._pour()

    def _pour(self) -> None:
        if self._endless and self._transport is not None and not self._transport.is_closing():
            self._write(_BLOCK)
            asyncio.get_running_loop().call_soon(self._pour)

    def _nonce(self) -> str:
        return self._target.split(b"?")[0].rpartition(b"/")[2].decode()

    def _write(self, data: bytes) -> None:
        if self._transport is not None and not self._transport.is_closing():
            self._transport.write(data)


_BLOCK = bytes(64 * 1024)


class NonceBackend:
    """Answers ``/NONCE?size=BYTES&up=BYTES&wait=MILLISECONDS``; ``/endless`` sends for as long as anybody takes it."""

    def __init__(self, ledger: Ledger, name: str) -> None:
        self.ledger = ledger
        self.name = name
        self.port = 0
        self.target = ""
        "the BACKEND argument for it"

        self.connections: set[asyncio.Transport] = set()


@asynccontextmanager
async def nonce_backend(ledger: Ledger, name: str = "one", path: Path | None = None) -> AsyncIterator[NonceBackend]:
    """A running backend that keeps ``ledger``, on a port of the loopback or on the unix socket ``path``."""
    backend = NonceBackend(ledger, name)
    loop = asyncio.get_running_loop()
    if path is None:
        server = await loop.create_server(lambda: _Served(backend), "127.0.0.1", 0, backlog=2048)
        backend.port = server.sockets[0].getsockname()[1]
        backend.target = f"http://127.0.0.1:{backend.port}"
    else:
        server = await loop.create_unix_server(lambda: _Served(backend), path, backlog=2048)
        backend.target = f"unix:{path}"
    try:
        yield backend
    finally:
        server.close()
        for transport in list(backend.connections):
            transport.abort()
        await server.wait_closed()


# The load


@dataclass(slots=True)
class Record:
    """One request and what became of it; times are of time.monotonic()."""

    nonce: str
    method: str
    due: float
    ended: float = 0.0
    status: int = 0
    error: str = ""
    "why there is no answer, or the word of Proxy-Status that came with it"

    right: bool = False
    "whether the whole answer came, with this nonce and the bytes that belong to it"

    repeated: bool = False
    "whether it was sent again, on a fresh connection"

    @property
    def ok(self) -> bool:
        return self.status == 200 and self.right

    @property
    def wrong(self) -> bool:
        """Whether an answer came that was taken for good and is not this request's."""
        return self.status == 200 and not self.right and not self.error

    @property
    def kind(self) -> str:
        """What its failure is called; empty for a success."""
        if self.ok:
            return ""
        if self.wrong:
            return "wrong answer"
        return f"{self.status} {self.error}".strip() if self.status and self.error not in (CUT, TIMEOUT) else self.error


class _Failed(Exception):
    """No complete answer: ``unanswered`` when not even a byte of one came."""

    def __init__(self, kind: str, unanswered: bool) -> None:
        self.kind = kind
        self.unanswered = unanswered
        super().__init__(kind)


class _Connection(asyncio.Protocol):
    """One of a visitor's connections, with one request at a time."""

    def __init__(self, load: "Load") -> None:
        self._load = load
        self._parser = httptools.HttpResponseParser(self)
        self._waiting: asyncio.Future[None] | None = None
        self.transport: asyncio.Transport | None = None
        self.open = False
        self.used = 0
        self.keep = False
        self._begin()

    def _begin(self) -> None:
        self.status = 0
        self.fields: dict[bytes, bytes] = {}
        self.body: list[bytes] = []
        self._bytes = 0
        self._done = False

    async def exchange(self, request: bytes) -> None:
        """Send a request and wait for the whole answer. Raises _Failed."""
        self._begin()
        self.used += 1
        self._waiting = asyncio.get_running_loop().create_future()
        cast(asyncio.Transport, self.transport).write(request)
        try:
            await self._waiting
        finally:
            self._waiting = None

    def close(self) -> None:
        self.open = False
        self._load.forget(self)
        if self.transport is not None:
            self.transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        self.open = True
        self._load.connections.add(self)

    def connection_lost(self, exc: Exception | None) -> None:
        self._over()
        self._load.connections.discard(self)
        self.transport = None

    def eof_received(self) -> None:
        self._over()

    def _over(self) -> None:
        self.open = False
        # From here on it is not in the list of kept ones: a request is never written to what is known to be closed.
        self._load.forget(self)
        if self._bytes:
            self._fail(CUT)
        else:
            self._fail(CLOSED_KEPT if self.used > 1 else CLOSED)

    def _fail(self, kind: str) -> None:
        if self._waiting is not None and not self._waiting.done():
            self._waiting.set_exception(_Failed(kind, not self._bytes))

    def data_received(self, data: bytes) -> None:
        self._bytes += len(data)
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError:
            self._fail(BROKEN)
            self.close()
            return
        if self._done and self._waiting is not None and not self._waiting.done():
            self._waiting.set_result(None)

    def on_header(self, name: bytes, value: bytes) -> None:
        self.fields[name.lower()] = value

    def on_headers_complete(self) -> None:
        self.status = self._parser.get_status_code()

    def on_body(self, body: bytes) -> None:
        self.body.append(body)

    def on_message_complete(self) -> None:
        self._done = True
        self.keep = self._parser.should_keep_alive()


@dataclass
class Load:
    """Visitors of one server: requests on connections that are kept, each with a nonce of its own.

    A kept connection that is closed before any byte of the answer is the oldest race of HTTP/1.1. A GET is then sent
    once more, on a fresh connection, and counted as ``repeated``. Anything else is a failure: it was written, so the
    server may have seen it. What is known to be closed before a request is written is never used for one.
    """

    address: tuple[str, int]
    host: Callable[[], str] = lambda: "app.localhost"
    post: float = 0.5
    "the share of POSTs"

    size: Callable[[random.Random], int] = lambda chance: 100
    "bytes of an answer"

    upload: Callable[[random.Random], int] = lambda chance: 100
    "bytes of a POST"

    wait: Callable[[random.Random], int] = lambda chance: 0
    "milliseconds that the backend takes"

    limit: float = 60.0
    "seconds for one request, from its due time on"

    seed: int = 0
    records: list[Record] = field(default_factory=list)
    connections: set[_Connection] = field(default_factory=set)

    def __post_init__(self) -> None:
        self._chance = random.Random(self.seed)
        self._word = f"{random.SystemRandom().getrandbits(40):010x}"
        self._kept: dict[_Connection, None] = {}
        self._stopped = asyncio.Event()
        self._done: list[Record] = []

    async def at_rate(self, rate: float, *, count: int | None = None, seconds: float | None = None) -> list[Record]:
        """Send ``rate`` requests a second, whatever becomes of the earlier ones, until ``stop`` or so many."""
        if seconds is not None:
            count = round(rate * seconds)
        tasks: set[asyncio.Task[None]] = set()
        loop = asyncio.get_running_loop()
        began, made, mine = time.monotonic(), 0, len(self.records)
        try:
            while not self._stopped.is_set() and (count is None or made < count):
                now = time.monotonic()
                while began + made / rate <= now and (count is None or made < count):
                    task = loop.create_task(self._one(self._record(began + made / rate)))
                    tasks.add(task)  # awaited below
                    task.add_done_callback(tasks.discard)
                    made += 1
                await asyncio.sleep(max(0.001, began + made / rate - time.monotonic()))
            while tasks:
                await asyncio.wait(tasks)
        finally:
            for task in list(tasks):
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            self._close()
        return self.records[mine:]

    async def in_turn(self, count: int, visitors: int) -> list[Record]:
        """``visitors`` at once, each with one request after the other, ``count`` in all."""
        left = iter(range(count))
        mine = len(self.records)

        async def visitor() -> None:
            for _ in left:
                await self._one(self._record(time.monotonic()))

        try:
            await asyncio.gather(*(visitor() for _ in range(visitors)))
        finally:
            self._close()
        return self.records[mine:]

    def stop(self) -> None:
        """Send nothing new."""
        self._stopped.set()

    @property
    def succeeded(self) -> int:
        return sum(record.ok for record in self.records)

    def forget(self, connection: _Connection) -> None:
        """A connection is of no use any more."""
        self._kept.pop(connection, None)

    def _record(self, due: float) -> Record:
        method = "POST" if self._chance.random() < self.post else "GET"
        record = Record(f"{self._word}-{len(self.records)}", method, due)
        self.records.append(record)
        return record

    async def _one(self, record: Record) -> None:
        chance = self._chance
        size, wait = self.size(chance), self.wait(chance)
        up = self.upload(chance) if record.method == "POST" else 0
        lines = [f"{record.method} /{record.nonce}?size={size}&up={up}&wait={wait} HTTP/1.1", f"Host: {self.host()}"]
        if record.method == "POST":
            lines.append(f"Content-Length: {up}")
        request = "\r\n".join([*lines, "", ""]).encode() + body_of(f"{record.nonce}/up", up)
        try:
            async with asyncio.timeout(record.due + self.limit - time.monotonic()):
                try:
                    await self._send(record, request, size, fresh=False)
                except _Failed as failure:
                    if failure.kind != CLOSED_KEPT or record.method != "GET":
                        raise
                    record.repeated = True
                    await self._send(record, request, size, fresh=True)
        except TimeoutError:
            record.error = TIMEOUT
        except _Failed as failure:
            record.error = failure.kind
        record.ended = time.monotonic()

    async def _send(self, record: Record, request: bytes, size: int, *, fresh: bool) -> None:
        connection = None if fresh or not self._kept else self._kept.popitem()[0]
        if connection is None:
            connection = await self._dial()
        finished = False
        try:
            await connection.exchange(request)
            finished = True
        finally:
            record.status = connection.status
            if finished and connection.keep and connection.open:
                self._kept[connection] = None
            else:
                connection.close()
        record.right = connection.fields.get(b"nonce") == record.nonce.encode() and b"".join(
            connection.body
        ) == body_of(record.nonce, size)
        _, found, rest = connection.fields.get(b"proxy-status", b"").partition(b"error=")
        record.error = rest.partition(b";")[0].decode() if found else ""

    async def _dial(self) -> _Connection:
        try:
            _, connection = await asyncio.get_running_loop().create_connection(lambda: _Connection(self), *self.address)
        except OSError as error:
            raise _Failed(REFUSED if isinstance(error, ConnectionRefusedError) else f"{error}", True) from None
        return connection

    def _close(self) -> None:
        for connection in list(self.connections):
            connection.close()


# What it comes to


def percentile(values: Iterable[float], percent: float) -> float:
    """The value that ``percent`` of all are not above (nearest rank); 0 if there is none."""
    ordered = sorted(values)
    return ordered[max(0, -(-len(ordered) * int(percent * 100) // 10000) - 1)] if ordered else 0.0


@dataclass
class Figures:
    """What became of many requests."""

    sent: int
    failed: int
    "all that did not get their own whole answer"

    failed_get: int
    failed_post_delivered: int
    "POSTs that had come to a backend before they failed"

    failed_post_undelivered: int
    closed_kept_post: int
    "of the failed POSTs, those on a kept connection that was closed: the race that visitors know"

    repeated_get: int
    "GETs that the visitor sent again because of that race"

    wrong: int
    post_twice: int
    "POSTs that came to backends more than once"

    get_twice: int
    "the same of GETs, without those that the visitor repeated"

    damaged: int
    "uploads that came to a backend with other bytes"

    p50: float
    p99: float
    longest: float
    "seconds, of the successes"

    kinds: dict[str, int]

    def as_dict(self) -> dict[str, Any]:
        return dict(vars(self))


def figures(records: Iterable[Record], ledger: Ledger) -> Figures:
    """Count them."""
    records = list(records)
    failed = [record for record in records if not record.ok]
    posts = [record for record in failed if record.method == "POST"]
    took = [record.ended - record.due for record in records if record.ok]
    return Figures(
        sent=len(records),
        failed=len(failed),
        failed_get=len(failed) - len(posts),
        failed_post_delivered=sum(1 for record in posts if ledger.heads[record.nonce]),
        failed_post_undelivered=sum(1 for record in posts if not ledger.heads[record.nonce]),
        closed_kept_post=sum(1 for record in posts if record.error == CLOSED_KEPT),
        repeated_get=sum(record.repeated for record in records),
        wrong=sum(record.wrong for record in records),
        post_twice=sum(1 for record in records if record.method == "POST" and ledger.heads[record.nonce] > 1),
        get_twice=sum(
            1 for record in records if record.method == "GET" and not record.repeated and ledger.heads[record.nonce] > 1
        ),
        damaged=len(ledger.damaged),
        p50=percentile(took, 50),
        p99=percentile(took, 99),
        longest=max(took, default=0.0),
        kinds=dict(Counter(record.kind for record in failed).most_common()),
    )


async def endless(address: tuple[str, int], host: str = "app.localhost") -> AsyncIterator[int]:
    """A download that lasts until it is closed; yields the sizes of what comes."""
    reader, writer = await asyncio.open_connection(*address, limit=1 << 20)
    try:
        writer.write(f"GET /endless HTTP/1.1\r\nHost: {host}\r\n\r\n".encode())
        head = await reader.readuntil(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 200"), head
        while data := await reader.read(1 << 20):
            yield len(data)
    finally:
        writer.transport.abort()
        with suppress(ConnectionError):
            await writer.wait_closed()
