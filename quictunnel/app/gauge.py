"""What one of several processes tells its parent of its own load."""

import asyncio
import time
from collections.abc import Callable
from statistics import median
from typing import Final

from quictunnel.app.supervise import Parent

__all__ = ["REPORT_TIME", "Gauge"]

REPORT_TIME: Final = 0.5
"seconds between two reports"

TIMER: Final = 0.05
"seconds; how late this timer is says how busy the event loop is"


class Gauge:
    """Measures the process that it is in, and reports it for as long as its ``with`` block lasts."""

    def __init__(self, parent: Parent, served: Callable[[], int]) -> None:
        """``served`` tells how many requests there have been."""
        self._parent = parent
        self._served = served
        self._loop = asyncio.get_running_loop()
        self._lags: list[float] = []
        self._timer: asyncio.TimerHandle | None = None

    def __enter__(self) -> "Gauge":
        self._begin(self._loop.time())
        self._wait(self._loop.time())
        return self

    def __exit__(self, *_: object) -> None:
        if self._timer is not None:
            self._timer.cancel()

    def _begin(self, now: float) -> None:
        self._since = now
        self._cpu = time.process_time()
        self._count = self._served()
        self._lags.clear()

    def _wait(self, now: float) -> None:
        self._due = now + TIMER
        self._timer = self._loop.call_at(self._due, self._fired)

    def _fired(self) -> None:
        now = self._loop.time()
        self._lags.append(max(0.0, now - self._due))
        seconds = now - self._since
        if seconds >= REPORT_TIME:
            self._parent.tell(
                "load",
                cpu=(time.process_time() - self._cpu) / seconds,
                lag=median(self._lags),
                worst=max(self._lags),
                served=(self._served() - self._count) / seconds,
            )
            self._begin(now)
        self._wait(now)
