"""What a large body costs in memory: the windows and the sockets' buffers, however large the body is."""

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.crowd import CrowdBackend, crowd_backend, fetch
from tests.support.processes import Processes, Tunnel

MB = 1024 * 1024

ALLOWED = 32
"MB: three times the largest window, which a sender's library holds once or twice, and the sockets' buffers"


@pytest.fixture
def processes(tmp_path: Path) -> Iterator[Processes]:
    with Processes(tmp_path / "processes") as processes:
        yield processes


async def transfer(tunnel: Tunnel, direction: str, size: int, limit: float) -> None:
    """One body of that size through the tunnel, seen to be whole."""
    if direction == "down":
        status, body, _ = await fetch(tunnel.address, f"/down?{size}", limit=limit)
    else:
        status, body, _ = await fetch(tunnel.address, "/up", upload=size, limit=limit)
    assert (status, body) == (200, b"%d intact" % size)


async def grown(
    backend: CrowdBackend, processes: Processes, engine: str, direction: str, size: int
) -> dict[str, float]:
    """By how many MB each process grows at most while a body of ``size`` bytes passes."""
    tunnel = await asyncio.to_thread(lambda: processes.tunnel(backend.target, (engine, engine)))
    ends = {"server": tunnel.server.process, "client": tunnel.client.process}
    await transfer(tunnel, direction, 2000, 10)  # what is loaded on first use is no growth
    before = {name: process.resident() for name, process in ends.items()}
    for process in ends.values():
        process.forget_peak()
    await transfer(tunnel, direction, size, size / MB + 30)
    return {name: (process.peak() - before[name]) / MB for name, process in ends.items()}


@pytest.mark.slow
@pytest.mark.timeout(120)
@pytest.mark.parametrize("direction", ["down", "up"])
async def test_64_megabytes_need_no_more_than_the_windows(engine: str, direction: str, processes: Processes) -> None:
    async with crowd_backend() as backend:
        growth = await grown(backend, processes, engine, direction, 64 * MB)
        assert max(growth.values()) < ALLOWED


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("direction", ["down", "up"])
async def test_a_gigabyte_needs_no_more_than_the_windows(engine: str, direction: str, processes: Processes) -> None:
    async with crowd_backend() as backend:
        growth = await grown(backend, processes, engine, direction, 1024 * MB)
        assert max(growth.values()) < ALLOWED
