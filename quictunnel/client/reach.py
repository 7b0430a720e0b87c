"""How a server is found again: attempts beside each other, and the pauses between them.

QUIC's first flight backs off: an attempt that began while the path was down finds it back only seconds after it is. So
while none is answered another begins beside it, and the first link that is complete wins.
"""

import asyncio
import random
from collections.abc import Callable, Coroutine
from typing import Any, Final, NamedTuple

from quictunnel.quic.dial import DialError, Way

__all__ = ["FIRST_RETRY", "LONGEST_RETRY", "QUICK_FOR", "QUICK_RETRY", "Backoff", "Place", "Race"]

FIRST_RETRY: Final = 0.2
LONGEST_RETRY: Final = 15.0
QUICK_RETRY: Final = 1.0
"seconds at most between attempts as long as a server has not been away for long"

QUICK_FOR: Final = 120.0
"seconds that count as not long: a restart, a reboot, a tunnel that the train is in"

ANSWERED_FOR: Final = 1.5
"seconds that an answer to an attempt counts for"

BESIDE: Final = 4
"attempts at a time"


class Place(NamedTuple):
    """A server as it is dialled."""

    host: str
    port: int
    server_name: str
    "what its certificate must be for"

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


class Backoff:
    """Delays that grow to a limit, jittered so that a thousand clients do not come back at once.

    For ``quick_for`` seconds after the first the limit is QUICK_RETRY: an attempt costs little, a tunnel that is down
    for longer than it must be costs much.
    """

    def __init__(self, now: Callable[[], float] = lambda: 0.0, *, quick_for: float = 0.0) -> None:
        self._now = now
        self._quick_for = quick_for
        self._next = FIRST_RETRY
        self._since: float | None = None

    def reset(self) -> None:
        """The last attempt was a success."""
        self._next = FIRST_RETRY
        self._since = None

    def delay(self) -> float:
        """Seconds to wait before the next attempt."""
        if self._since is None:
            self._since = self._now()
        quick = self._now() - self._since < self._quick_for
        delay = self._next * random.uniform(0.5, 1.0)
        self._next = min(2 * self._next, QUICK_RETRY if quick else LONGEST_RETRY)
        return delay


class _Attempt(NamedTuple):
    """One that is under way."""

    place: Place
    since: float
    ways: list[Way]
    "its own, as soon as it has one"


class Race:
    """Attempts to reach one of some places, beside each other while none is answered.

    An attempt that has been answered is left alone: another would be a burden to a server that is only slow.
    """

    def __init__(self, backoff: Backoff, on_failure: Callable[[DialError, float | None], None]) -> None:
        """``on_failure`` is told what failed, and in how many seconds the next attempt begins if it waits for that.

        What it raises ends the race.
        """
        self._backoff = backoff
        self._on_failure = on_failure
        self._running: dict[asyncio.Task[Way], _Attempt] = {}
        self._loop = asyncio.get_running_loop()

    async def run(
        self,
        places: Callable[[], list[Place]],
        dial: Callable[[Place, int, Callable[[Way], None]], Coroutine[Any, Any, Way]],
        given_up: asyncio.Future[None],
    ) -> Way | None:
        """The way that is complete first, for ever if need be; None if ``given_up`` is done or there are no places.

        In each round every one of ``places`` has its turn, the next as soon as the one before has failed. ``dial`` is
        given a place, the number of the round, and what to call with its way once it has one.
        """
        try:
            turn = 0
            while not given_up.done():
                around = places()
                if not around:
                    return None
                number, at = divmod(turn, len(around))
                place, last = around[at], at == len(around) - 1
                turn += 1
                way = await self._attempt(place, number, self._backoff.delay() if last else 0.0, dial, given_up)
                if way is not None:
                    return way
            return None
        finally:
            await self._drop(*self._running)

    async def _attempt(
        self,
        place: Place,
        number: int,
        pause: float,
        dial: Callable[[Place, int, Callable[[Way], None]], Coroutine[Any, Any, Way]],
        given_up: asyncio.Future[None],
    ) -> Way | None:
        """Begin one attempt, and return when it is time for the next one, or with a way."""
        if len(self._running) == BESIDE:
            oldest, given = next(iter(self._running.items()))
            await self._drop(oldest)
            # It has failed as much as one whose time is over: unsaid, nobody would learn why nothing comes of it.
            waited = self._loop.time() - given.since
            self._on_failure(DialError(f"{given.place}: no answer within {waited:.1f} s (is UDP let through?)"), None)
        ways: list[Way] = []
        latest = self._loop.create_task(dial(place, number, ways.append))
        self._running[latest] = _Attempt(place, self._loop.time(), ways)
        until = self._loop.time() + max(pause, random.uniform(0.75, 1.0) * QUICK_RETRY)
        while not given_up.done():
            left = until - self._loop.time()
            if left <= 0:
                if not any(_is_answered(way) for each in self._running.values() for way in each.ways):
                    break
                left = QUICK_RETRY / 4  # then it is looked at again, unless something ends before
            events: set[asyncio.Future[Any]] = {*self._running, given_up}
            await asyncio.wait(events, timeout=left, return_when=asyncio.FIRST_COMPLETED)
            for task in [task for task in self._running if task.done()]:
                failure = task.exception()
                if failure is None:
                    del self._running[task]
                    return task.result()
            for task in [task for task in self._running if task.done()]:
                del self._running[task]
                failure = task.exception()
                if not isinstance(failure, DialError):
                    assert failure is not None
                    raise failure
                if task is latest:
                    until = min(until, self._loop.time() + pause)
                    self._on_failure(failure, max(0.0, until - self._loop.time()))
                else:
                    self._on_failure(failure, None)
        return None

    async def _drop(self, *tasks: asyncio.Task[Way]) -> None:
        for task in tasks:
            self._running.pop(task)
            task.cancel()
        for result in await asyncio.gather(*tasks, return_exceptions=True):
            if isinstance(result, Way):
                result.drop()  # complete in the moment that another won


def _is_answered(way: Way) -> bool:
    return way.heard and way.link.silent_for() < ANSWERED_FOR
