"""Those who read slowly, on either side: they are waited for, and hold up nobody but themselves."""

import asyncio
import statistics
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from tests.support.crowd import (
    PATTERN,
    CrowdBackend,
    SlowVisitor,
    Uploader,
    crowd_backend,
    fetch,
    opened,
    read_head,
    settled,
    times_of_fifty,
    until,
)
from tests.support.processes import Processes, Tunnel

pytestmark = pytest.mark.either

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


async def as_fast_as(alone: list[float], tunnel: Tunnel) -> None:
    """Fifty visitors take at most twice the time. Who holds them up does it always, a busy machine now and then."""
    for _ in range(4):
        beside = await times_of_fifty(tunnel.address)
        if statistics.median(beside) < 2 * statistics.median(alone) + 0.05 and max(beside) < 2 * max(alone) + 0.5:
            return
    pytest.fail(f"slower than {statistics.median(alone):.3f} s each: {statistics.median(beside):.3f} s")


async def test_visitor_reading_at_10_kb_a_second_does_not_slow_fifty_others(engine: str, processes: Processes) -> None:
    async with crowd_backend() as backend, tunnel_to(backend, processes, engine) as tunnel:
        await times_of_fifty(tunnel.address)
        alone = await times_of_fifty(tunnel.address)
        slow = SlowVisitor()
        task = asyncio.ensure_future(slow.run(tunnel.address, 1024 * MB))
        try:
            await settled(lambda: backend.sent)
            assert 0 < backend.sent < UNDER_WAY
            before = slow.received
            await as_fast_as(alone, tunnel)
            await until(lambda: slow.received > before + 2000)
            assert slow.intact
            assert not task.done()
        finally:
            task.cancel()
        await until(lambda: backend.busy == 0)


async def test_backend_reading_at_10_kb_a_second_does_not_slow_others(engine: str, processes: Processes) -> None:
    async with crowd_backend() as backend, tunnel_to(backend, processes, engine) as tunnel:
        await times_of_fifty(tunnel.address)
        alone = await times_of_fifty(tunnel.address)
        uploader = Uploader()
        task = asyncio.ensure_future(uploader.run(tunnel.address, 1024 * MB))
        try:
            await settled(lambda: uploader.taken)
            assert 0 < uploader.taken < UNDER_WAY
            before = backend.received
            await as_fast_as(alone, tunnel)
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
