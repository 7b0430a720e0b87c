"""How many processes a pool should have, from what they measure of themselves. No clock and no process is touched here.

A pool grows when its processes have been *busy* for a while: they use their processor nearly all of the time, or their
event loops are late. It shrinks when the work of all has fitted into one less for a longer while. Two things keep it
from doing what helps nobody: growth that did not raise what is achieved is the last one for as long as the load stays,
and a pool that had to grow again soon after it had shrunk waits twice as long before the next time.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from math import inf
from statistics import fmean
from typing import Final

__all__ = ["Decision", "Sample", "Scaling"]

BUSY_SHARE: Final = 0.8
"of a processor, on average"

BUSY_LAG: Final = 0.03
"seconds that timers are late, on average: with a median like that, half of all work waits longer"

BUSY_TIME: Final = 2.0
IDLE_SHARE: Final = 0.5
IDLE_TIME: Final = 10.0
LONGEST_IDLE_TIME: Final = 300.0
SETTLE_TIME: Final = 2.0
"seconds after a change until the new processes have their part of the load"

WORTH: Final = 1.05
"times as much has to be achieved with one more"

COMPARABLE: Final = 60.0
"seconds for which what was achieved says something of the present load"

CALM_TIME: Final = 30.0
"seconds without being busy after which it is another load"


@dataclass(frozen=True, slots=True)
class Sample:
    """What one process has measured of itself in the last half of a second."""

    cpu: float
    "of one processor, 0.0 to 1.0, more with threads"

    lag: float
    "seconds that a timer is late, the median"

    worst: float
    "the worst of them"

    served: float
    "requests a second"


@dataclass(frozen=True, slots=True)
class Decision:
    """How many processes there are to be, and why, for the log."""

    processes: int
    text: str


class Scaling:
    """Decides within bounds, both allowed."""

    def __init__(self, lowest: int, highest: int) -> None:
        self._lowest = lowest
        self._highest = highest
        self._count = 0
        self._settled_at = 0.0
        self._busy_since: float | None = None
        self._idle_since: float | None = None
        self._calm_since: float | None = None
        self._rates: list[float] = []  # of requests, since it is busy
        self._worst = 0.0
        self._achieved: tuple[float, float] | None = None  # with one less, just before it grew; and when
        self._enough = False  # it said that more would not help, or must not be
        self._idle_time = IDLE_TIME
        self._shrunk_at = -inf

    def observe(self, now: float, samples: Mapping[int, Sample | None]) -> Decision | None:
        """What to change now, given each running process's newest sample, None for one that has not spoken lately."""
        known = [sample for sample in samples.values() if sample is not None]
        if not known or len(known) < len(samples):
            self._forget()
            return None  # one is starting, or cannot speak: what the others measure is not how it will be
        if len(known) != self._count:
            self._forget()
            self._count = len(known)
            self._settled_at = now + SETTLE_TIME
        if now < self._settled_at:
            return None
        cpu = fmean(sample.cpu for sample in known)
        lag = fmean(sample.lag for sample in known)
        if cpu > BUSY_SHARE or lag > BUSY_LAG:
            self._rates.append(sum(sample.served for sample in known))
            self._worst = max(self._worst, *(sample.worst for sample in known))
            return self._busy(now, cpu, lag)
        self._busy_since = None
        self._rates.clear()
        self._worst = 0.0
        return self._calm(now, sum(sample.cpu for sample in known))

    def _forget(self) -> None:
        self._busy_since = self._idle_since = self._calm_since = None
        self._rates.clear()
        self._worst = 0.0

    def _busy(self, now: float, cpu: float, lag: float) -> Decision | None:
        self._idle_since = self._calm_since = None
        if self._busy_since is None:
            self._busy_since = now
        seconds = now - self._busy_since
        if seconds < BUSY_TIME or self._enough:
            return None
        count, rate = self._count, fmean(self._rates)
        how = f"{cpu:.0%} busy" if cpu > BUSY_SHARE else f"event loop {lag * 1000:.0f} ms late"
        how = f"{how} for {seconds:.1f} s, worst lag {self._worst * 1000:.0f} ms"
        if self._achieved is not None and now - self._achieved[1] < COMPARABLE and rate < WORTH * self._achieved[0]:
            self._enough = True
            return Decision(
                count,
                f"staying at {_processes(count)}: {rate:,.0f} requests/s, and {self._achieved[0]:,.0f} with one less: "
                f"more would not help ({how})",
            )
        if count >= self._highest:
            self._enough = True
            return Decision(
                count, f"staying at {_processes(count)}, the most there may be: {how}, {rate:,.0f} requests/s"
            )
        soon = now - self._shrunk_at < COMPARABLE
        self._idle_time = min(2 * self._idle_time, LONGEST_IDLE_TIME) if soon else IDLE_TIME
        self._achieved = rate, now
        return Decision(count + 1, f"{count} -> {_processes(count + 1)}: {how}")

    def _calm(self, now: float, work: float) -> Decision | None:
        if self._calm_since is None:
            self._calm_since = now
        if now - self._calm_since >= CALM_TIME:
            self._enough = False
        count = self._count
        share = work / (count - 1) if count > 1 else 1.0
        if count <= self._lowest or share > IDLE_SHARE:
            self._idle_since = None
            return None
        if self._idle_since is None:
            self._idle_since = now
        seconds = now - self._idle_since
        if seconds < self._idle_time:
            return None
        self._shrunk_at = now
        self._achieved = None
        self._enough = False
        return Decision(
            count - 1, f"{count} -> {_processes(count - 1)}: with one less {share:.0%} busy, for {seconds:.0f} s"
        )


def _processes(count: int) -> str:
    return f"{count} process{'es' if count > 1 else ''}"
