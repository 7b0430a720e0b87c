"""Visitors and backends that are slow, greedy or endless: what each costs, what ends it, and that others go on.

| what comes                                      | what ends it, or bounds it                                  |
|-------------------------------------------------|-------------------------------------------------------------|
| heads of a byte now and then                    | ``--head-time``: 408                                        |
| bodies that stop                                | ``--body-idle``: 408                                        |
| bodies of a byte now and then                   | nothing, as for any slow upload: each costs one exchange    |
| connections that say nothing, or nothing more   | ``--head-time``, ``--keep-alive``: closed                   |
| visitors that never read                        | ``--write-idle``: cut                                       |
| chunks of one byte                              | nothing: they are an upload or a download like any other    |
| requests without end, no answer read            | ``--write-idle``: cut                                       |
| heads, trailers and chunk extensions without end | ``--head-size``, ``--head-fields``: 431 or 400             |
| a backend's of these, and interim answers        | 64 KiB and 256 fields: 502 or a cut                         |
| a backend that falls silent within its answer   | ``--backend-body-idle``: a cut                              |
"""

import asyncio
import statistics
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import pytest

from tests.support.crowd import CrowdBackend, crowd_backend, fetch, opened, read_head, until
from tests.support.processes import Processes, Tunnel

# What is refused, and with what, is shown in the quick tests of the door and of the backend's answers.
pytestmark = pytest.mark.slow

MB = 1024 * 1024
SERVE = (
    *("--head-time", "1s", "--body-idle", "1s", "--keep-alive", "1s", "--write-idle", "1s"),
    *("--head-size", "16KiB", "--head-fields", "64"),
)
CONNECT = ("--backend-body-idle", "1s", "--backend-head-time", "5s")
LATE = 15.0
"seconds: limits are a second, they are looked at once a second, and the machine may be busy"

BUFFER = 64 * 1024


class Site:
    """A tunnel with short limits, and the backend behind it."""

    def __init__(self, tunnel: Tunnel, backend: CrowdBackend) -> None:
        self.tunnel = tunnel
        self.address = tunnel.address
        self.backend = backend

    @asynccontextmanager
    async def attacked(self, what: str, memory: int) -> AsyncIterator[None]:
        """While the block runs, others are served; it may cost so many bytes of memory on each side."""
        ends = {"server": self.tunnel.server.process, "client": self.tunnel.client.process}
        before = {name: (process.resident(), process.busy()) for name, process in ends.items()}
        for process in ends.values():
            process.forget_peak()
        times: list[float] = []
        neighbour = asyncio.ensure_future(self._others(times))
        began = time.monotonic()
        try:
            yield
            seconds = time.monotonic() - began
            await until(lambda: len(times) >= 5 or neighbour.done())
        finally:
            neighbour.cancel()
            with suppress(asyncio.CancelledError):
                await neighbour
        costs = {
            name: (process.peak() - before[name][0], process.busy() - before[name][1]) for name, process in ends.items()
        }
        said = ", ".join(f"{name} +{size / MB:.1f} MB {busy:.2f} s of CPU" for name, (size, busy) in costs.items())
        print(
            f"{what}: {seconds:.1f} s; {said}; {len(times)} others: "
            f"median {1000 * statistics.median(times):.0f} ms, at most {1000 * max(times):.0f} ms"
        )
        assert max(size for size, _ in costs.values()) < memory

    async def _others(self, times: list[float]) -> None:
        while True:
            status, body, seconds = await fetch(self.address, "/slow?1", limit=LATE)
            assert (status, body) == (200, b"ok")
            times.append(seconds)
            await asyncio.sleep(0.01)


@pytest.fixture
async def site(engine: str, tmp_path: Path) -> AsyncIterator[Site]:
    async with crowd_backend() as backend:
        with Processes(tmp_path / "processes") as processes:
            tunnel = await asyncio.to_thread(
                lambda: processes.tunnel(backend.target, (engine, engine), serve=SERVE, connect=CONNECT)
            )
            await fetch(tunnel.address, "/slow?1")
            yield Site(tunnel, backend)


async def ending(reader: asyncio.StreamReader) -> bytes:
    """All that comes until the other side ends the connection, by whatever means; not more than 64 KiB of it."""
    got = b""
    async with asyncio.timeout(LATE):
        with suppress(ConnectionError):
            while data := await reader.read(65536):
                got = (got + data)[:65536]
    return got


async def drip(writer: asyncio.StreamWriter, data: bytes, every: float) -> None:
    """Send a byte at a time, for as long as the other side lets it."""
    with suppress(ConnectionError):
        for at in range(len(data)):
            writer.write(data[at : at + 1])
            await writer.drain()
            await asyncio.sleep(every)


async def crowd(count: int, visitor: Callable[[], Awaitable[None]]) -> None:
    async with asyncio.TaskGroup() as group:
        for _ in range(count):
            group.create_task(visitor())  # type: ignore[arg-type]


# Slow


async def test_heads_that_drip_are_408(site: Site) -> None:
    async def visitor() -> None:
        reader, writer = await asyncio.open_connection(*site.address)
        dripping = asyncio.ensure_future(
            drip(writer, b"GET / HTTP/1.1\r\nHost: app.localhost\r\nX-A: " + b"a" * 99, 0.1)
        )
        assert (await ending(reader)).startswith(b"HTTP/1.1 408 ")
        dripping.cancel()
        writer.transport.abort()

    async with site.attacked("200 heads of 10 bytes a second", 16 * MB):
        await crowd(200, visitor)
    await until(lambda: site.backend.busy == 0)


async def test_bodies_that_stop_are_408_and_those_that_drip_cost_an_exchange_each(site: Site) -> None:
    held = 50

    async def stopping() -> None:
        reader, writer = await opened(site.address, "/up", "Content-Length: 1000", method="POST")
        writer.write(b"x")
        assert (await ending(reader)).startswith(b"HTTP/1.1 408 ")
        writer.transport.abort()

    async def dripping() -> None:
        reader, writer = await opened(site.address, "/up", "Content-Length: 10", method="POST")
        await drip(writer, b"x" * 10, 0.3)
        assert (await read_head(reader)).startswith(b"HTTP/1.1 200 ")
        writer.transport.abort()

    async with site.attacked(f"{held} bodies that stop, {held} of 3 bytes a second", 24 * MB):
        await asyncio.gather(crowd(held, stopping), crowd(held, dripping))
    await until(lambda: site.backend.busy == 0)


async def test_two_thousand_idle_connections_are_closed_in_time(site: Site) -> None:
    # Whoever connects and then has to wait for the test's own event loop is late with its head.
    gate = asyncio.Semaphore(50)

    async def silent() -> None:
        async with gate:
            reader, writer = await asyncio.open_connection(*site.address)
        assert await ending(reader) == b""
        writer.transport.abort()

    async def done() -> None:
        async with gate:
            reader, writer = await opened(site.address, "/once")
            assert (await read_head(reader)).startswith(b"HTTP/1.1 200 ")
        assert await ending(reader) == b"/once"
        writer.transport.abort()

    async with site.attacked("2000 idle connections", 64 * MB):
        await asyncio.gather(crowd(1000, silent), crowd(1000, done))


async def test_visitors_that_never_read_are_cut(site: Site) -> None:
    async def visitor() -> None:
        _, writer = await opened(site.address, f"/down?{1024 * MB}", buffer=BUFFER)
        writer.transport.pause_reading()  # type: ignore[attr-defined]
        # Cut by whom does not show to somebody who never reads; the backend, which is let go, does.
        await until(lambda: site.backend.busy <= 1 and site.backend.requests > 20, 3 * LATE)
        writer.transport.abort()

    async with site.attacked("20 visitors that never read", 96 * MB):
        await crowd(20, visitor)


async def test_backend_that_falls_silent_within_its_answer_is_cut(site: Site) -> None:
    async def visitor() -> None:
        reader, writer = await opened(site.address, "/hang")
        assert (await ending(reader)).endswith(b"\r\n\r\npart")
        writer.transport.abort()

    async with site.attacked("20 answers that stop", 16 * MB):
        await crowd(20, visitor)
    await until(lambda: site.backend.busy == 0)


# Large

CHUNKS = 5 * MB // len(b"1\r\nx\r\n")


async def test_chunks_of_one_byte_pass_both_ways(site: Site) -> None:
    async with site.attacked(f"an upload of {CHUNKS} chunks", 16 * MB):
        reader, writer = await opened(site.address, "/count", "Transfer-Encoding: chunked", method="POST")
        left = CHUNKS
        while left:
            part = min(left, 10_000)
            writer.write(b"1\r\nx\r\n" * part)
            await writer.drain()
            left -= part
        writer.write(b"0\r\n\r\n")
        assert (await read_head(reader)).startswith(b"HTTP/1.1 200 ")
        assert await reader.readexactly(len(b"%d" % CHUNKS)) == b"%d" % CHUNKS
        writer.transport.abort()
    async with site.attacked(f"an answer of {CHUNKS} chunks", 16 * MB):
        reader, writer = await opened(site.address, f"/tiny?{CHUNKS}")
        await read_head(reader)
        count = 0
        while size := int(await reader.readuntil(b"\r\n"), 16):
            await reader.readexactly(size + 2)
            count += size
        assert count == CHUNKS
        writer.transport.abort()


async def test_pipelined_requests_whose_answers_nobody_reads_are_cut(site: Site) -> None:
    count = 10_000
    async with site.attacked(f"{count} pipelined requests", 16 * MB):
        _, writer = await opened(site.address, "/first", buffer=BUFFER)
        writer.transport.pause_reading()  # type: ignore[attr-defined]
        request = b"GET /%b HTTP/1.1\r\nHost: app.localhost\r\n\r\n" % (b"a" * 1000)
        sent = 0
        with suppress(ConnectionError):
            async with asyncio.timeout(2 * LATE):
                while sent < count:
                    writer.write(request * 100)
                    await writer.drain()
                    sent += 100
        assert sent < count
        writer.transport.abort()
    assert site.backend.requests < count


HEAD = b"POST /count HTTP/1.1\r\nHost: app.localhost\r\nTransfer-Encoding: chunked\r\n\r\n"
BOMBS = {
    "many fields": (b"GET / HTTP/1.1\r\nHost: app.localhost\r\n", b"a: b\r\n", b"431"),
    "one large field": (b"GET / HTTP/1.1\r\nHost: app.localhost\r\nX-A: ", b"a" * 1000, b"431"),
    "a long target": (b"GET /", b"a" * 1000, b"414"),
    "many trailers": (HEAD + b"1\r\nx\r\n0\r\n", b"a: b\r\n", b"4"),
    "one large trailer": (HEAD + b"1\r\nx\r\n0\r\nX-A: ", b"a" * 1000, b"4"),
    "a large chunk extension": (HEAD + b"1;", b"a" * 1000, b"4"),
    "extensions larger than their chunks": (HEAD, b"1;" + b"a" * 4000 + b"\r\nx\r\n", b"4"),
    "empty lines": (b"\r\n", b"\r\n", b"4"),
}


@pytest.mark.parametrize("bomb", BOMBS)
async def test_message_without_end_is_refused_and_its_connection_closed(site: Site, bomb: str) -> None:
    begin, piece, status = BOMBS[bomb]
    size = 32 * MB
    taken: list[int] = []

    async def visitor() -> None:
        reader, writer = await asyncio.open_connection(*site.address)
        answer = asyncio.ensure_future(ending(reader))
        sent = 0
        with suppress(ConnectionError):
            writer.write(begin)
            while sent < size and not answer.done():
                writer.write(piece * (65536 // len(piece)))
                await writer.drain()
                sent += 65536
        taken.append(sent)
        # A reset may overtake the answer of one who goes on sending for long; the connection is over all the same.
        got = await answer
        assert not got or got.startswith(b"HTTP/1.1 " + status), got[:100]
        writer.transport.abort()

    async with site.attacked(f"20 times {bomb}", 16 * MB):
        await crowd(20, visitor)
    assert max(taken) < size
    await until(lambda: site.backend.busy == 0)


OK = b"HTTP/1.1 200 OK\r\n"
CHUNKED = OK + b"Transfer-Encoding: chunked\r\n\r\n"
ANSWERS = {
    "many fields": (OK, b"a: b\r\n"),
    "one large field": (OK + b"X-A: ", b"a" * 1000),
    "many trailers": (CHUNKED + b"1\r\nx\r\n0\r\n", b"a: b\r\n"),
    "one large trailer": (CHUNKED + b"1\r\nx\r\n0\r\nX-A: ", b"a" * 1000),
    "a large chunk extension": (CHUNKED + b"1\r\nx\r\n1;", b"a" * 1000),
    "interim answers": (b"", b"HTTP/1.1 100 Continue\r\n\r\n"),
}


@pytest.mark.parametrize("answer", ANSWERS)
async def test_answer_without_end_is_refused_or_cut(site: Site, answer: str) -> None:
    size = 32 * MB
    site.backend.raw["bomb"] = (*ANSWERS[answer], size)
    before = site.backend.sent

    async def visitor() -> None:
        reader, writer = await opened(site.address, "/raw?bomb")
        got = await ending(reader)
        writer.transport.abort()
        if got.startswith(OK):
            assert not got.endswith(b"0\r\n\r\n")
        else:
            assert b"HTTP/1.1 502 " in got, got[:100]

    async with site.attacked(f"10 answers of {answer}", 16 * MB):
        await crowd(10, visitor)
    assert site.backend.sent - before < 10 * size
    await until(lambda: site.backend.busy == 0)
