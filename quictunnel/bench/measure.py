"""The load of the bench: requests one after another, requests on schedule, and bytes in bulk, each for a set time.

Connections and counting are those of the load test. Here each connection asks again when it was answered (a closed
loop), which is what tells how much there can be in a second; only ``on_schedule`` is the load test's open loop.
"""

import asyncio
import ssl
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from typing import Final, NamedTuple

import httptools

from quictunnel.load.connections import Connections, Shot
from quictunnel.load.figures import Histogram, Tally
from quictunnel.load.plan import BLOCK, Request, Target
from quictunnel.load.run import Pacer

__all__ = [
    "ANSWER_TIME",
    "Loop",
    "Marks",
    "Place",
    "Transfer",
    "ask",
    "closed_loop",
    "download",
    "on_schedule",
    "upload",
]

ANSWER_TIME: Final = 10.0
"seconds after which a request has failed"

WARM: Final = 0.2
"share of each time that does not count: connections are dialled, windows grow"

_WATCH: Final = 0.05
_LEAVE_TIME: Final = 1.0
"seconds that the last requests of a closed loop may take before they are cut"

_PATIENCE: Final = 20
"failures in a row after which a connection of a closed loop asks no more"

_ANSWER_LIMIT: Final = 4096
"bytes of a body that are looked at"

_PIECE: Final = 65536


class Place(NamedTuple):
    """Where requests go."""

    target: Target
    addresses: tuple[tuple[str, int], ...]
    "hosts and ports in numbers"

    context: ssl.SSLContext | None = None

    def request(self, path: str, body: int | None = None) -> Request:
        """A GET of ``path``, or a POST of so many bytes."""
        method = "GET" if body is None else "POST"
        lines = [f"{method} {path} HTTP/1.1", f"Host: {self.target.authority}", "User-Agent: quictunnel-bench"]
        lines += ["Accept: */*"] if body is None else [f"Content-Length: {body}"]
        head = "\r\n".join([*lines, "", ""]).encode("latin-1")
        return Request(head, bytes(min(body or 0, BLOCK)), body or 0, False)


async def _nothing() -> None:
    """Where nobody wants to know."""


class Marks(NamedTuple):
    """Who wants to know when that part of a time begins and ends that counts; both are awaited."""

    begin: Callable[[], Awaitable[None]] = _nothing
    end: Callable[[], Awaitable[None]] = _nothing


_NO_MARKS: Final = Marks()


class Loop(NamedTuple):
    """What a loop of small requests came to, in what counts of its time. Times in seconds."""

    rate: float
    "answers a second"

    answered: int
    latency: Histogram
    failures: Counter[str]
    late: bool = False
    "of an open loop: it was not the load that it should have been"


class Transfer(NamedTuple):
    """What a transfer came to."""

    rate: float
    "bytes a second, in what counts of its time"

    bytes: int
    failures: Counter[str]
    growth: float | None = None
    "what the second half of the time that counts moved, as a multiple of the first; None: it was over before"


class _Again(Tally):
    """Counts, and asks again for each request that ended, until it is stopped."""

    __slots__ = ("_again", "_bad", "_successor")

    def __init__(self, again: Callable[[Tally], None]) -> None:
        super().__init__(1.0, 1.0)
        self._again: Callable[[Tally], None] | None = again
        self._successor: Tally = self
        self._bad = 0

    def succeed(self, latency: float) -> None:
        super().succeed(latency)
        self._bad = 0
        if self._again is not None:
            self._again(self._successor)

    def fail(self, kind: str) -> None:
        super().fail(kind)
        self._bad += 1
        if self._again is not None and self._bad < _PATIENCE:
            self._again(self._successor)

    def left(self, lateness: float) -> None:
        """In a closed loop nothing has a schedule."""

    def hand_over(self, successor: "_Again") -> None:
        """Let those that end from now on be followed by requests that count elsewhere."""
        self._successor = successor

    def stop(self) -> None:
        """Ask no more."""
        self._again = None


async def closed_loop(place: Place, path: str, connections: int, seconds: float, marks: Marks = _NO_MARKS) -> Loop:
    """So many connections, each of which asks again when it was answered."""
    async with _connections(place, place.request(path), connections) as pool:

        def again(tally: Tally) -> None:
            tally.sent += 1
            pool.send(Shot(time.monotonic(), tally))

        warm, counted = _Again(again), _Again(again)
        for _ in range(connections):
            again(warm)
        await asyncio.sleep(WARM * seconds)
        # Not before each connection has had an answer: handshakes take longer than requests.
        await _until(lambda: warm.succeeded + warm.failed >= connections, ANSWER_TIME)
        await marks.begin()
        warm.hand_over(counted)
        began = time.monotonic()
        await asyncio.sleep((1 - WARM) * seconds)
        # And not less than that again, however slow it is.
        await _until(
            lambda: counted.succeeded + counted.failed >= connections or not warm.in_flight + counted.in_flight,
            ANSWER_TIME,
        )
        spent = time.monotonic() - began
        # Those that were asked before it counted and answered while it did are as many as those the other way round.
        answered = counted.succeeded
        await marks.end()
        warm.stop()
        counted.stop()
        with suppress(TimeoutError):
            async with asyncio.timeout(_LEAVE_TIME):
                await pool.drained()
        # Before what is left is cut, which has not failed.
        failures = Counter(counted.failures) if counted.succeeded else warm.failures + counted.failures
    return Loop(answered / spent, answered, counted.latency, failures)


async def on_schedule(place: Place, path: str, rate: float, seconds: float) -> Loop:
    """So many requests a second, whether or not earlier ones have been answered; latency counts from the schedule."""
    async with _connections(place, place.request(path), 4096) as pool:
        tally = Tally(rate, seconds)
        pacer = Pacer(tally, pool.send, ANSWER_TIME)
        pacer.start()
        try:
            await pacer.done
            await pool.drained()
        finally:
            pacer.stop()
            tally.finished = time.monotonic()
    return Loop(tally.achieved_rate, tally.succeeded, tally.latency, tally.failures, tally.fell_behind)


async def download(place: Place, streams: int, seconds: float, limit: int, marks: Marks = _NO_MARKS) -> Transfer:
    """Have the bench's backend send, on so many streams and no more than ``limit`` bytes in all."""
    each = max(1, limit // streams)
    async with _connections(place, place.request(f"/bytes?n={each}"), streams) as pool:
        tally = Tally(1.0, streams)

        async def received() -> int:
            return tally.received

        return await _transfer(pool, tally, streams, received, seconds, marks)


async def upload(
    place: Place,
    streams: int,
    seconds: float,
    limit: int,
    received: Callable[[], Awaitable[int]],
    marks: Marks = _NO_MARKS,
) -> Transfer:
    """Send to the bench's backend, whose count of bytes ``received`` asks for."""
    each = max(1, limit // streams)
    async with _connections(place, place.request("/sink", each), streams) as pool:
        return await _transfer(pool, Tally(1.0, streams), streams, received, seconds, marks)


async def _transfer(
    pool: Connections,
    tally: Tally,
    streams: int,
    count: Callable[[], Awaitable[int]],
    seconds: float,
    marks: Marks,
) -> Transfer:
    """Let the bytes of one request on each stream pass until the time or the bytes are over."""
    began = time.monotonic()
    first = await count()
    for _ in range(streams):
        tally.sent += 1
        pool.send(Shot(began + seconds, tally))  # its limit counts from the end of the transfer
    await _until(lambda: not tally.in_flight, WARM * seconds)
    # Not before something has passed. The count may be another process's, which has no event to wait for.
    while tally.in_flight and await count() == first and time.monotonic() < began + ANSWER_TIME:  # noqa: ASYNC110
        await asyncio.sleep(_WATCH / 5)
    await marks.begin()
    warm_at, warm = time.monotonic(), await count()
    half = (1 - WARM) * seconds / 2
    await _until(lambda: not tally.in_flight, half)
    middle_at, middle = time.monotonic(), await count()
    await _until(lambda: not tally.in_flight, half)
    ended, last = time.monotonic(), await count()
    await marks.end()
    failures = Counter(tally.failures)  # what is cut next has not failed
    if not tally.in_flight and warm - first > (last - first) / 2:
        # It was over before it was warm: then all of it counts.
        return Transfer((last - first) / max(ended - began, 1e-9), last - first, failures)
    growth = None
    if tally.in_flight and middle > warm:
        growth = (last - middle) / (ended - middle_at) / ((middle - warm) / (middle_at - warm_at))
    return Transfer((last - warm) / max(ended - warm_at, 1e-9), last - first, failures, growth)


async def _until(question: Callable[[], bool], seconds: float) -> None:
    """Wait until the answer is true, and no longer than so many seconds."""
    deadline = time.monotonic() + seconds
    # A moment too long is nothing here, and an event for each answer would be something.
    while not question() and (left := deadline - time.monotonic()) > 0:  # noqa: ASYNC110
        await asyncio.sleep(min(left, _WATCH / 5))


async def ask(place: Place, path: str, limit: float = ANSWER_TIME) -> tuple[int, bytes]:
    """One request over a connection of its own: the status, and the beginning of the body.

    Raises OSError with what a user can be told, TimeoutError among them.
    """
    failure: OSError = OSError("the host has no address")
    async with asyncio.timeout(limit):
        for host, port in place.addresses:
            try:
                reader, writer = await asyncio.open_connection(
                    host, port, ssl=place.context, server_hostname=place.target.host if place.context else None
                )
            except OSError as error:
                failure = error
                continue
            answer = _Answer()
            try:
                writer.write(place.request(path).head)
                while not answer.complete and (data := await reader.read(_PIECE)):
                    answer.feed(data)
                answer.ended()
            finally:
                writer.transport.abort()
            return answer.status, bytes(answer.body)
        raise failure


class _Answer:
    """Reads one answer; of its body no more is kept than is looked at."""

    def __init__(self) -> None:
        self._parser = httptools.HttpResponseParser(self)
        self.status = 0
        self.body = bytearray()
        self.complete = False

    def feed(self, data: bytes) -> None:
        """Raises OSError."""
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade):
            if not self.complete:
                raise OSError("what answers there does not speak HTTP") from None

    def ended(self) -> None:
        """It is over. Raises OSError when there was no answer; one without a length may end so."""
        if not self.status:
            raise OSError("the connection was closed before an answer")

    def on_headers_complete(self) -> None:
        status = self._parser.get_status_code()
        self.status = status if status >= 200 else 0

    def on_body(self, body: bytes) -> None:
        self.body += body[: _ANSWER_LIMIT - len(self.body)]
        if len(self.body) == _ANSWER_LIMIT:
            self.complete = True

    def on_message_complete(self) -> None:
        self.complete = self.status > 0


@asynccontextmanager
async def _connections(place: Place, request: Request, limit: int) -> AsyncIterator[Connections]:
    """Connections whose time-outs are looked after; all are closed at the end."""
    pool = Connections(
        place.target,
        place.addresses,
        request,
        context=place.context,
        limit=limit,
        timeout=ANSWER_TIME,
        clock=time.monotonic,
    )
    watcher = asyncio.get_running_loop().create_task(_watch(pool))  # ended here
    try:
        yield pool
    finally:
        watcher.cancel()
        await asyncio.gather(watcher, return_exceptions=True)
        await pool.close()


async def _watch(pool: Connections) -> None:
    while True:
        await asyncio.sleep(_WATCH)
        pool.expire(time.monotonic())
