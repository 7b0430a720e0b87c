"""``quictunnel connect --processes``: several client processes on one tunnel, as many as the load is worth.

Each process is a session of its own with a backend of its own, so an ASGI application is loaded in each. The parent
only looks: it starts and ends them as ``scaling`` decides, and replaces those that die.
"""

import gc
import time
from collections.abc import Callable, Coroutine
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Any, Final

from loguru import logger

from quictunnel.app.connect import LIVE, connect
from quictunnel.app.gauge import REPORT_TIME
from quictunnel.app.process import choose_engine, say
from quictunnel.app.renewal import renewed
from quictunnel.app.scaling import Sample, Scaling
from quictunnel.app.supervise import Message, Parent, Supervisor, one_of_many
from quictunnel.failures import UsageError
from quictunnel.plain import replaced

if TYPE_CHECKING:
    from quictunnel.settings import ConnectSettings

__all__ = ["connect_processes"]

FRESH: Final = 4 * REPORT_TIME
"seconds for which a report counts; a process that is so busy that it cannot report is late by less"

_STOP_MARGIN: Final = 10.0
"seconds beyond --grace after which a process that should have ended is killed"

Run = Callable[[Coroutine[Any, Any, int]], int]


def connect_processes(settings: "ConnectSettings", again: "Callable[[], ConnectSettings]", run: Run) -> int:
    """Serve the backend by several processes; the exit status.

    ``again`` reads the settings anew and raises UsageError; ``run`` runs a coroutine in an event loop of its own.

    Raises CommandError for what none of them can do.
    """
    return _Pool(settings, again, run).run()


class _Pool:
    def __init__(self, settings: "ConnectSettings", again: "Callable[[], ConnectSettings]", run: Run) -> None:
        choose_engine(settings.engine)  # once, for all that are forked
        self._settings = settings
        self._again = again
        self._run = run
        self._scaling = Scaling(*settings.processes)
        self._supervisor = Supervisor(
            self._child,
            word="client",
            on_message=self._message,
            on_tick=self._look,
            on_hangup=self._renew,
            tick=REPORT_TIME,
            stop_time=settings.grace + _STOP_MARGIN,
        )
        self._ready: set[int] = set()
        self._announced = False
        self._samples: dict[int, tuple[float, Sample]] = {}

    def run(self) -> int:
        gc.collect()
        gc.freeze()
        # Whoever is the first to be given a name gives it to the others.
        self._start(1 if self._settings.tunnel is None else self._settings.processes.lowest)
        return self._supervisor.run()

    def _start(self, count: int) -> None:
        running = self._supervisor.indices
        free = (index for index in range(len(running) + count) if index not in running)
        for index, _ in zip(free, range(count - len(running)), strict=False):
            self._samples.pop(index, None)
            self._supervisor.start(index)

    def _child(self, index: int, parent: Parent) -> int:
        work = partial(connect, self._settings, self._read_again, parent)
        return one_of_many(lambda: self._run(work()), others_work=self._announced)

    def _read_again(self) -> "ConnectSettings":
        """The settings as a child is to have them. Raises UsageError."""
        found = self._again()
        return found if found.tunnel is not None else replaced(found, {"tunnel": self._settings.tunnel})

    def _renew(self) -> None:
        """Children read the settings for themselves; those that are started later are to have the new ones too."""
        with suppress(UsageError):  # which the children say
            self._settings = renewed(self._settings, self._read_again(), LIVE).settings

    def _message(self, index: int, message: Message) -> None:
        match message:
            case {"kind": "ready", "tunnel": str(tunnel), "url": str(url)}:
                self._welcomed(index, tunnel, url)
            case {"kind": "load", "cpu": float(cpu), "lag": float(lag), "worst": float(worst), "served": float(served)}:
                self._samples[index] = time.monotonic(), Sample(cpu, lag, worst, served)

    def _welcomed(self, index: int, tunnel: str, url: str) -> None:
        lowest = self._settings.processes.lowest
        if self._settings.tunnel is None:
            self._settings = replaced(self._settings, {"tunnel": tunnel})
            self._start(lowest)
        self._ready.add(index)
        if len(self._ready) >= lowest and not self._announced:
            self._announced = True
            say(f"ready tunnel={tunnel} url={url} processes={lowest}")

    def _look(self) -> None:
        now = time.monotonic()
        samples: dict[int, Sample | None] = dict.fromkeys(self._supervisor.indices)
        for index, (at, sample) in self._samples.items():
            if index in samples and now - at < FRESH:
                samples[index] = sample
        decision = self._scaling.observe(now, samples)
        if decision is None:
            return
        logger.info("pool: {}", decision.text)
        if decision.processes > len(samples):
            self._start(decision.processes)
        elif decision.processes < len(samples):
            self._supervisor.stop(self._supervisor.indices[-1])
