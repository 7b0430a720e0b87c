"""A pool of client processes under a load that rises past what one of them can carry; benchmarks/pool.py shows it."""

import asyncio
import re
import time
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

from tests.support.nonces import Load, Record, percentile
from tests.support.processes import Processes, poll

__all__ = ["Rise", "rise"]

SETTLED = 1.5
"seconds after a change of their number that say nothing of what so many processes achieve"


@dataclass
class Rise:
    """What came of it."""

    records: list[Record]
    decisions: list[str]
    "what the pool said that it did, and why"

    processes: list[tuple[float, int]]
    "when there were how many, of time.monotonic()"

    rates: dict[int, float] = field(default_factory=dict)
    "requests a second that so many processes achieved under the full load"

    back_after: float = 0.0
    "seconds from the end of the load until there was one again"

    @property
    def failed(self) -> list[Record]:
        return [record for record in self.records if not record.ok]

    @property
    def p99(self) -> float:
        """Milliseconds."""
        return 1000 * percentile([record.ended - record.due for record in self.records], 99)


async def rise(
    directory: Path,
    engine: str,
    *,
    bounds: str = "auto",
    visitors: int = 24,
    milliseconds: int = 10,
    seconds: float = 30,
) -> Rise:
    """One visitor for some seconds, then many for ``seconds``, then none; each request computes for so long.

    What one process achieves is measured with a client without a pool before.
    """
    with Processes(directory) as processes:
        server = await asyncio.to_thread(processes.server, engine=engine)
        options = ("tests.support.apps:heavy", "--join", server.join, "--tunnel", "app", "--engine", engine)
        alone = processes.start("connect", *options)
        await asyncio.to_thread(alone.ready)
        began = time.monotonic()
        found = await _load(server.http, visitors, milliseconds, max(4.0, seconds / 4))
        rates = _rates(found, [(began, 1)], began, time.monotonic())
        await asyncio.to_thread(alone.stop)
        client = processes.start("connect", *options, "--processes", bounds)
        await asyncio.to_thread(client.ready)
        seen: list[tuple[float, int]] = []

        async def look() -> None:
            while True:
                count = len(client.children)
                if not seen or seen[-1][1] != count:
                    seen.append((time.monotonic(), count))
                await asyncio.sleep(0.05)

        looking = asyncio.get_running_loop().create_task(look())
        try:
            records = await _load(server.http, 1, milliseconds, 4)
            began = time.monotonic()
            full = await _load(server.http, visitors, milliseconds, seconds)
            ended = time.monotonic()
            lowest = int(bounds.partition("-")[0]) if bounds != "auto" else 1
            await asyncio.to_thread(poll, lambda: len(client.children) <= lowest, 60.0 * len(client.children))
            back_after = time.monotonic() - ended
            await asyncio.sleep(0.2)  # so that it is seen, too
        finally:
            looking.cancel()
        decisions = re.findall(r"pool: (.*)", client.log)
        assert await asyncio.to_thread(client.stop) == 0
    return Rise(records + full, decisions, seen, _rates(full, seen, began, ended) | rates, back_after)


async def _load(address: tuple[str, int], visitors: int, milliseconds: int, seconds: float) -> list[Record]:
    load = Load(address, post=0.3, wait=lambda chance: milliseconds)
    asyncio.get_running_loop().call_later(seconds, load.stop)
    return await load.in_turn(10_000_000, visitors)


def _rates(records: list[Record], seen: list[tuple[float, int]], began: float, ended: float) -> dict[int, float]:
    done: dict[int, tuple[int, float]] = {}
    changes = [*seen, (ended, 0)]
    for (at, count), (until, _) in pairwise(changes):
        first, last = max(at + SETTLED, began + SETTLED), min(until, ended)
        if last - first > 1:
            answered = sum(record.ok and first <= record.ended < last for record in records)
            before = done.get(count, (0, 0.0))
            done[count] = before[0] + answered, before[1] + last - first
    return {count: answered / time_ for count, (answered, time_) in done.items()}
