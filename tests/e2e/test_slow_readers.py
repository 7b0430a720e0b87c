"""Those who read slowly, on either side: they are waited for, and hold up nobody but themselves."""

import asyncio
import statistics
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from tests.support.crowd import PATTERN, CrowdBackend, crowd_backend, fetch, opened, read_head, until
from tests.support.processes import Processes, Tunnel

MB = 1024 * 1024

# What may be under way: the largest window, and on each side of it a socket's buffers, which the kernel lets grow to
# some MB.
UNDER_WAY = 32 * MB


@pytest.fixture
def processes(tmp_path: Path) -> Iterator[Processes]:
    with Processes(tmp_path / "processes") as processes:
        yield processes


@asynccontextmanager
async def tunnel_to(backend: CrowdBackend, processes: Processes, engine: str) -> AsyncIterator[Tunnel]:
    """A tunnel in processes of its own."""
    yield await asyncio.to_thread(lambda: processes.tunnel(backend.target, (engine, engine)))


class SlowVisitor:
    """Downloads at 10 kB/s."""

    def __init__(self) -> None:
        self.received = 0
        self.intact = True

    async def run(self, tunnel: Tunnel, size: int) -> None:
        reader, writer = await opened(tunnel.address, f"/down?{size}")
        try:
            await read_head(reader)
            while True:
                data = await reader.readexactly(1000)
                self.intact = self.intact and data == _at(self.received, 1000)
                self.received += len(data)
                await asyncio.sleep(0.1)
        finally:
            writer.transport.abort()


def _at(position: int, size: int) -> bytes:
    start = position % len(PATTERN)
    return (PATTERN + PATTERN)[start : start + size]


async def times_of_fifty(tunnel: Tunnel) -> list[float]:
    """50 visitors at once, each with two requests in turn; the seconds of all."""

    async def visitor() -> list[float]:
        seconds = []
        for _ in range(2):
            status, body, took = await fetch(tunnel.address, "/slow?20", limit=10)
            assert (status, body) == (200, b"ok")
            seconds.append(took)
        return seconds

    return [took for each in await asyncio.gather(*(visitor() for _ in range(50))) for took in each]


async def test_visitor_reading_at_10_kb_a_second_does_not_slow_fifty_others(engine: str, processes: Processes) -> None:
    async with crowd_backend() as backend, tunnel_to(backend, processes, engine) as tunnel:
        await times_of_fifty(tunnel)
        alone = await times_of_fifty(tunnel)
        slow = SlowVisitor()
        task = asyncio.ensure_future(slow.run(tunnel, 1024 * MB))
        try:
            await _settled(lambda: backend.sent)
            assert 0 < backend.sent < UNDER_WAY
            before = slow.received
            beside = await times_of_fifty(tunnel)
            # Twice the time, and what a busy machine may add.
            assert statistics.median(beside) < 2 * statistics.median(alone) + 0.05
            assert max(beside) < 2 * max(alone) + 0.5
            await until(lambda: slow.received > before + 2000)
            assert slow.intact
            assert not task.done()
        finally:
            task.cancel()
        await until(lambda: backend.busy == 0)


async def test_backend_reading_at_10_kb_a_second_does_not_slow_others(engine: str, processes: Processes) -> None:
    async with crowd_backend() as backend, tunnel_to(backend, processes, engine) as tunnel:
        await times_of_fifty(tunnel)
        alone = await times_of_fifty(tunnel)
        taken = 0

        async def upload() -> None:
            nonlocal taken
            _, writer = await opened(tunnel.address, "/up?10000", f"Content-Length: {1024 * MB}", method="POST")
            try:
                while True:
                    writer.write(PATTERN)
                    await writer.drain()
                    taken += len(PATTERN)
            finally:
                writer.transport.abort()

        task = asyncio.ensure_future(upload())
        try:
            await _settled(lambda: taken)
            assert 0 < taken < UNDER_WAY
            before = backend.received
            beside = await times_of_fifty(tunnel)
            assert statistics.median(beside) < 2 * statistics.median(alone) + 0.05
            assert max(beside) < 2 * max(alone) + 0.5
            await until(lambda: backend.received > before)
            assert not task.done()
        finally:
            task.cancel()


async def test_slow_reader_of_an_upload_gets_all_of_it(engine: str, processes: Processes) -> None:
    async with crowd_backend() as backend:
        tunnel = await asyncio.to_thread(lambda: processes.tunnel(backend.target, (engine, engine)))
        size = 3 * MB
        status, body, seconds = await fetch(tunnel.address, f"/up?{4 * MB}", upload=size)
        assert (status, body) == (200, b"%d intact" % size)
        assert seconds > 0.5


async def test_readers_that_stop_and_go_on_get_all_of_it(engine: str, processes: Processes) -> None:
    async with crowd_backend() as backend:
        tunnel = await asyncio.to_thread(lambda: processes.tunnel(backend.target, (engine, engine)))
        size = 4 * MB

        async def visitor() -> bytes:
            reader, writer = await opened(tunnel.address, f"/down?{size}")
            try:
                await read_head(reader)
                first = await reader.readexactly(100_000)
                await asyncio.sleep(0.5)
                return first + await reader.readexactly(size - 100_000)
            finally:
                writer.transport.abort()

        for body in await asyncio.gather(*(visitor() for _ in range(5))):
            assert body == PATTERN * (size // len(PATTERN))


async def _settled(count: object) -> None:
    """Wait until a count has stood still for half a second."""
    assert callable(count)
    last, since = -1, asyncio.get_running_loop().time()
    async with asyncio.timeout(20):
        while asyncio.get_running_loop().time() - since < 0.5:
            if count() != last or last <= 0:
                last, since = count(), asyncio.get_running_loop().time()
            await asyncio.sleep(0.02)
