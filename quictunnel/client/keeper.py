"""One link as its client keeps it: pinged, moved to another socket when it falls silent, and known when it is dead."""

import asyncio
from collections.abc import Callable
from contextlib import suppress
from typing import Final, NamedTuple

from loguru import logger

from quictunnel.client.reach import Place
from quictunnel.quic.dial import DialError, Way
from quictunnel.quic.link import SUSPECT_AFTER, Link
from quictunnel.wire.control import Drain
from quictunnel.wire.errors import ErrorCode

__all__ = ["Keeper", "Slot"]

PING_EVERY: Final = 1.0
BUSY_PING_EVERY: Final = 0.5
"seconds after which a link that is not heard is pinged, and one that has carried something lately"

PINGED_ALONE: Final = 16
SLOWEST_PING_EVERY: Final = 2.0
"""of more links to the same process each is pinged less often, down to once in so many seconds: that they all have lost
it is found out by whichever misses an answer first, and tells the others"""

BUSY_FOR: Final = 10.0
"seconds, after an exchange began"

FAST_PING_EVERY: Final = 0.25
SLOWEST_ANSWER: Final = 0.5
"seconds that an answer may take, or three round trips, before pings become fast"

FAST_FOR: Final = 10.0
"seconds of silence after which they become slow again: who has not come back by then is dialled"

SILENT_AFTER: Final = 2.0
MISSED_PINGS: Final = 4
"a link is suspect after SUSPECT_AFTER seconds of silence in any case, after SILENT_AFTER if so many pings are missing"

DRAINED_TIME: Final = 2.0
"seconds and some round trips for a server to answer that a link drains; one that knows no such answer never does"

POLL_EVERY: Final = 0.02
QUIET_ROUNDS: Final = 3
"so often a ping has to come back, with nothing under way, before a link that drains is closed"

MOVE_AFTER: Final = 1.2
MOVE_EVERY: Final = 2.0
TROUBLED_MOVE_EVERY: Final = 1.0
"""seconds: of silence with a fast ping missing after which a link goes on over another socket, and then again, sooner
if its packets cannot leave"""

MOVES: Final = 2
"""in one silence. The first is made because a path is what fails most often. But it may be the server that is held up,
and will read all that was sent to it: each move is then a change of address for it to follow, and qh3's follows three.
So another is made only when the server is heard on other links, and"""
PROVED_AFTER: Final = 1.0
"seconds for which it is: when it comes to itself, not all are heard at once"


_GOLDEN: Final = 0.618
"a fraction whose multiples spread evenly"


class Slot(NamedTuple):
    """Which of a session's links it is."""

    worker: int
    "the server's process that it goes to"

    number: int
    "counted from 0 for each of them: what its hello says"


class Keeper:
    """A link that the server has welcomed, from then until it is closed."""

    def __init__(self, way: Way, place: Place, slot: Slot) -> None:
        self.way = way
        self.link: Link = way.link
        self.place = place
        self.slot = slot
        self.leaving = False
        "whether another is to take its place though nothing is wrong with it: an end of it drains"

        self.outdated = False
        "whether other options than its hello said are to count now"

        self.parting = False
        "whether it is only to finish what is under way on it"

        self.drained: int | None = None
        "how many streams there were on it in all: the server's last word about them"

        self.since = asyncio.get_running_loop().time()
        self.healed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        "done when it is heard again after it was suspect; a new one each time that it becomes so"

        self._loop = asyncio.get_running_loop()
        self._changed = asyncio.Event()  # for who watches over its slot
        self._woken = asyncio.Event()  # for its own task
        self._pings: list[float] = []  # sent, of late
        self.beside: Callable[[], int] = lambda: 1  # how many links go to the same process, this one among them
        self.heard_beside: Callable[[], float] = lambda: 0.0  # when another of them was heard last
        self.on_missing: Callable[[], None] = lambda: None  # an answer is missing
        self._missed = False  # which was told
        self._alarmed = False  # one is missing on another link
        self._pinged_at = self.since
        self._moved_at = 0.0
        self._moves = 0  # in this silence
        self._proved_at = 0.0  # when it was first seen that the server is heard on other links
        self._begun = 0  # exchanges, when it was last looked
        self._busy_until = 0.0
        self._part_by = 0.0
        self._parted = asyncio.Event()
        self._has_trouble = False
        self._suspect = False
        way.on_trouble = self._trouble

    @property
    def suspect(self) -> bool:
        """Whether it has been silent for so long that another takes its place."""
        return self._suspect

    @property
    def good(self) -> bool:
        """Whether nothing has to take its place."""
        return not (self.leaving or self._suspect or self.link.draining or self.link.closed is not None)

    async def changed(self) -> None:
        """Wait until it is not good any more, or was told to be looked at."""
        await self._changed.wait()
        self._changed.clear()

    def look(self) -> None:
        """Have who waits for ``changed`` look."""
        self._changed.set()

    def wake(self) -> None:
        """Something was said of the link that must not wait for the next ping: it was closed, or refused."""
        self._woken.set()

    def alarm(self) -> None:
        """An answer is missing on another link to the same process: see whether one comes on this."""
        if not self._missing():
            self._alarmed = True
            self._woken.set()

    def _trouble(self) -> None:
        self._has_trouble = True
        self._woken.set()

    # Its life

    async def tend(self) -> None:
        """Ping it and judge its silence until it is closed."""
        link = self.link
        while link.closed is None:
            self._judge()
            if self._must_move():
                self._move()
            await self._sleep()
        self.look()

    async def _sleep(self) -> None:
        """Until the next ping is due, or the answer to the last one is."""
        with suppress(TimeoutError):
            async with asyncio.timeout_at(self._due()):
                await self._woken.wait()
        self._woken.clear()
        if self.link.closed is None:
            self.link.end_stalled()
            # The server's probes come all the time.
            if (begun := self.link.begun - self.link.probed) != self._begun:
                self._begun = begun
                self._busy_until = self._loop.time() + BUSY_FOR
            if self._loop.time() >= self._due():
                self._tell_missing()
                self._ping()

    def _due(self) -> float:
        """When the next ping is, as far as is known now."""
        # Whatever is heard says as much as the answer to a ping does.
        busy = self.link.exchanges or self._loop.time() < self._busy_until
        every = BUSY_PING_EVERY if busy else PING_EVERY
        if (links := self.beside()) > PINGED_ALONE:
            # Not all at the same time, though a probe may have come on each of them at once.
            every = max(every, min(links / PINGED_ALONE, SLOWEST_PING_EVERY) * (1 + self.slot.number * _GOLDEN % 1) / 2)
        heard = max(self._pinged_at, self.link.heard_at)
        due = heard + (FAST_PING_EVERY if self._alarmed else every)
        missing = self._missing()
        if missing and self.link.silent_for() < FAST_FOR:
            due = min(due, max(missing[0] + self._answer_time(), self._pinged_at + FAST_PING_EVERY))
        return due

    def _tell_missing(self) -> None:
        missed = bool(self._missing())
        if missed and not self._missed:
            self.on_missing()
        self._missed = missed

    def _ping(self) -> None:
        self._alarmed = False
        self._pinged_at = self._loop.time()
        self._pings = [*self._missing(), self._pinged_at]
        self.link.ping()

    def _missing(self) -> list[float]:
        """When the pings were sent that nothing was heard after."""
        heard = self.link.heard_at
        return [at for at in self._pings if at >= heard]

    def _answer_time(self) -> float:
        return max(3 * (self.link.round_trip or 0.0), SLOWEST_ANSWER)

    async def part(self, deadline: float) -> None:
        """Have nothing new come on the link, wait until ``deadline`` for what is under way, and close it."""
        link = self.link
        self._part_by = deadline
        if self.parting:
            await self._parted.wait()
            return
        self.parting = True
        link.send_control(Drain())
        answer_by = self._loop.time() + DRAINED_TIME + 4 * (link.round_trip or 0.0)
        quiet = 0
        while link.closed is None and self._loop.time() < self._part_by and quiet < QUIET_ROUNDS:
            asked = self._loop.time()
            # Until the server has said how many streams there were, the last ones may still be on their way; one that
            # does not say it is only waited for. And who has ended an exchange has only handed its end to QUIC: what a
            # path has lost of it is sent again while pings come and go.
            done = link.begun >= self.drained if self.drained is not None else asked > answer_by
            if not link.exchanges and link.silent_for() > SILENT_AFTER + DRAINED_TIME:
                break
            if done and not link.exchanges and not link.unsent:
                link.ping()
                await asyncio.sleep(POLL_EVERY + (link.round_trip or 0.0))
                quiet += link.heard_at >= asked
            else:
                quiet = 0
                await asyncio.sleep(POLL_EVERY)
        link.refuse_unjoined()
        link.close(ErrorCode.NO_ERROR, "the client is done with it")
        self._parted.set()

    # What its silence means

    def _judge(self) -> None:
        silent = self.link.silent_for()
        missed = len([at for at in self._missing() if at <= self._loop.time() - FAST_PING_EVERY])
        suspect = silent > SUSPECT_AFTER or (silent > SILENT_AFTER and missed >= MISSED_PINGS)
        if suspect and not self._suspect:
            why = "nobody listens there" if self.link.refused else f"silent for {silent:.1f} s"
            logger.warning("= link {} to the server is suspect ({}): dialling beside it", self.slot.number, why)
            self.healed = self._loop.create_future()
            self._suspect = True
            self.look()
        elif self._suspect and not suspect:
            logger.info("= link {} to the server is heard again", self.slot.number)
            self._suspect = False
            if not self.healed.done():
                self.healed.set_result(None)

    def _must_move(self) -> bool:
        if self._loop.time() - self._moved_at < (MOVE_EVERY if not self._has_trouble else TROUBLED_MOVE_EVERY):
            return False
        if self._has_trouble:
            return True
        # Of the pings that are missing the last one may have been sent just now. And where nobody listens, another
        # socket is none the better for it.
        if self.link.refused or self.link.silent_for() < MOVE_AFTER or len(self._missing()) < 2:
            return False
        if self._moved_at <= self.link.heard_at:
            self._moves = 0
            self._proved_at = 0.0
        # A server that has had it drain may follow it once more.
        if not self._moves and not self.link.draining:
            return True
        return self._moves < MOVES and self._is_heard_beside()

    def _is_heard_beside(self) -> bool:
        """Whether the server has been heard on other links for a while in this silence: it is the path that fails."""
        if self.heard_beside() <= max(self._moved_at, self.link.heard_at + MOVE_AFTER):
            return False
        now = self._loop.time()
        if not self._proved_at:
            self._proved_at = now
        return now - self._proved_at >= PROVED_AFTER

    def _move(self) -> None:
        self._moved_at = self._loop.time()
        self._moves += 1
        self._proved_at = 0.0
        self._has_trouble = False
        try:
            self.way.move()
        except DialError as error:
            logger.debug("= link {} to the server has no other way: {}", self.slot.number, error)
