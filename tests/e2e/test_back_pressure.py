"""What those who take 10 kB/s of a gigabyte cost both sides in memory, one of them and 200 of them at once.

What a process may hold for one of them is its window, which a sender's library holds once more, and what was read from
a socket before it was told to stop. All windows together grow by no more than ``--window-budget``, so 200 of them
cost little more than 200 windows of the initial size.
"""

import asyncio
import statistics
from collections.abc import Iterator
from pathlib import Path

import pytest

from quictunnel.wire.credit import MAXIMUM_WINDOW
from tests.support.crowd import SlowVisitor, Uploader, crowd_backend, fetch, settled, times_of_fifty, until
from tests.support.processes import Process, Processes

MB = 1024 * 1024

SIZE = 1024 * MB
CROWD = 200
CROWD_MEMORY = 200 * MB
"of each process, all that it holds before they come included"

ONE_MEMORY = 3 * MAXIMUM_WINDOW + 8 * MB
"the largest window, which a sender's library holds once or twice, and what was read before the word to stop"

BUFFER = 64 * 1024
"bytes that the kernel keeps for a slow reader: it is not the kernel's memory that is looked at"

# Each socket takes some MB before it says that it is full; everything beyond the tunnel's own is the kernel's.
UNDER_WAY = 32 * MB


@pytest.fixture
def processes(tmp_path: Path) -> Iterator[Processes]:
    with Processes(tmp_path / "processes") as processes:
        yield processes


class Watch:
    """What the processes of a tunnel use from here on."""

    def __init__(self, ends: dict[str, Process]) -> None:
        self.ends = ends
        self.before = {name: process.resident() for name, process in ends.items()}
        for process in ends.values():
            process.forget_peak()

    @property
    def peaks(self) -> dict[str, int]:
        return {name: process.peak() for name, process in self.ends.items()}

    @property
    def growth(self) -> dict[str, int]:
        return {name: peak - self.before[name] for name, peak in self.peaks.items()}

    def __str__(self) -> str:
        return ", ".join(
            f"{name} {self.before[name] / MB:.0f} -> {peak / MB:.0f} MB" for name, peak in self.peaks.items()
        )


async def median(address: tuple[str, int]) -> float:
    """The median of what 50 visitors' requests took, in ms; all of them are answered."""
    return 1000 * statistics.median(await times_of_fifty(address))


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("direction", ["down", "up"])
@pytest.mark.parametrize("count", [1, CROWD])
async def test_slow_takers_of_a_gigabyte_cost_their_windows_and_hold_up_nobody(
    engine: str, direction: str, count: int, processes: Processes
) -> None:
    async with crowd_backend(BUFFER) as backend:
        tunnel = await asyncio.to_thread(processes.tunnel, backend.target, (engine, engine))
        for path, upload in ((f"/down?{MB // 4}", None), ("/up", MB // 4)):
            await fetch(tunnel.address, path, upload=upload)  # what is loaded on first use is no growth
        await median(tunnel.address)
        alone = await median(tunnel.address)
        watch = Watch({"server": tunnel.server.process, "client": tunnel.client.process})
        down = [SlowVisitor(BUFFER) for _ in range(count if direction == "down" else 0)]
        up = [Uploader(BUFFER) for _ in range(count if direction == "up" else 0)]
        came = backend.sent, backend.received
        tasks = [asyncio.ensure_future(each.run(tunnel.address, SIZE)) for each in (*down, *up)]

        def pushed() -> int:
            return backend.sent - came[0] + sum(each.taken for each in up)

        def taken() -> int:
            return backend.received - came[1] + sum(each.received for each in down)

        try:
            await until(lambda: backend.busy == count, 30.0)
            filling = await median(tunnel.address)
            # They go on taking 10 kB/s each, so it never stands quite still.
            await settled(
                lambda: pushed() // (10 * MB if count > 1 else MB // 4), 150.0, still=3.0 if count > 1 else 1.0
            )
            assert 0 < pushed() < count * UNDER_WAY
            before = taken()
            beside = await median(tunnel.address)
            await until(lambda: taken() > before + count * 1000, 30.0)
            assert not any(task.done() for task in tasks)
            assert all(each.intact for each in down)
            print(
                f"{engine}, {direction}, {count}: {watch}; {pushed() / count / MB:.1f} MB each under way; 50 others: "
                f"median {alone:.1f} ms alone, {filling:.1f} ms while the windows fill, {beside:.1f} ms then"
            )
            # While the windows fill, 200 transfers have the links to share; a busy machine adds what it likes.
            assert beside < 10 * alone + 500
            if count == 1:
                assert max(watch.growth.values()) < ONE_MEMORY
            else:
                assert max(watch.peaks.values()) < CROWD_MEMORY
        finally:
            for task in tasks:
                task.cancel()
        if down:  # a backend that reads slowly has the kernel's share to read before it sees the end
            await until(lambda: backend.busy == 0, 30.0)
