"""Flow control of our own: how far a sender may be ahead of what the receiver's socket has taken.

Neither QUIC library lets an application withhold credit, nor bounds what it buffers for sending. So each direction of
each exchange carries a limit in body bytes, absolute from the direction's start as in RFC 9000 section 4.1: the
sender stops at it and the receiver raises it as its socket drains. That bounds memory in all four places at once:
both sides' libraries and both sides' sockets.

A receiver's window starts small and doubles while it is taken in less than three round trips, which means that the path
may carry more than the window allows; it stops at ``MAXIMUM_WINDOW``, and at what the budget of the whole process still
has. What takes longer than eight waits in queues on the way, before everything else that goes there: the window halves,
down to where it began. The round trip is the least of late: a larger window makes longer queues, so that by the present
one it would justify its own growth. A transfer without a pause lets its queue run empty now and then to find it.
"""

from math import inf
from typing import Final

from quictunnel.wire.errors import ProtocolError

__all__ = ["INITIAL_WINDOW", "MAXIMUM_WINDOW", "ReceiveCredit", "SendCredit", "WindowBudget"]

INITIAL_WINDOW: Final = 256 * 1024
"bytes; part of quictunnel/1: both ends assume it before the first CREDIT"

# 6 MiB fill 60 MB/s at 100 ms of round trip, cloudflared's choice too; the power of two above it lets doubling reach
# it.
MAXIMUM_WINDOW: Final = 8 * 1024 * 1024

_TURN: Final = 0.0005
"seconds beside the round trip in which an end comes to reading and granting: an event loop's turn"

_TICK: Final = 0.001
"seconds that a round trip may seem longer than it is, as uvloop's clock counts them"

_MEASURED: Final = 3 * _TICK
"seconds over which a pace is measured at least"

_DOUBLES_BELOW: Final = 3
_HALVES_ABOVE: Final = 8
"round trips in which a window is taken; so far apart that neither step brings about the other"

_SLOWEST: Final = 2
"times as long as before that the next bytes may seem to take: what is longer is a pause of the sender's"


class WindowBudget:
    """What all receive windows of a process may hold beyond their initial size, in bytes."""

    __slots__ = ("left", "total")

    def __init__(self, total: int) -> None:
        self.total = total
        self.left = total

    def take(self, size: int) -> bool:
        """Whether ``size`` bytes could be had; they are then taken."""
        if size > self.left:
            return False
        self.left -= size
        return True

    def give_back(self, size: int) -> None:
        """Return what ``take`` gave."""
        self.left += size


class SendCredit:
    """The sender's side of one direction."""

    __slots__ = ("limit", "sent")

    def __init__(self) -> None:
        self.limit = INITIAL_WINDOW
        self.sent = 0

    def spend(self, wanted: int) -> int:
        """How many of ``wanted`` bytes may go now; they count as sent."""
        size = min(wanted, self.limit - self.sent)
        self.sent += size
        return size

    def raise_limit(self, limit: int, queued: int = 0) -> bool:
        """Take the receiver's word for a new limit; whether more may be sent than before.

        A limit never falls (RFC 9000 section 4.1), and one that is absurdly far ahead counts only up to the largest
        window: the receiver's word must not make this side buffer without bound. ``queued`` are the bytes, layout
        included, that count as sent and have not left: nobody can have taken them, so nobody can grant more for them.
        """
        # A DATA frame of one byte takes three: at least a third of what is queued is body, and no limit that an honest
        # receiver names is ever cut.
        limit = min(limit, self.sent - queued // 3 + MAXIMUM_WINDOW)
        if limit <= self.limit:
            return False
        self.limit = limit
        return True


class ReceiveCredit:
    """The receiver's side of one direction."""

    __slots__ = ("_budget", "_counted", "_measured_at", "_pace", "limit", "received", "window")

    def __init__(self, budget: WindowBudget) -> None:
        self._budget = budget
        self._measured_at: float | None = None
        self._counted = 0  # bytes that had been received then
        self._pace = inf  # seconds for a byte, of late
        self.window = INITIAL_WINDOW
        self.limit = INITIAL_WINDOW
        self.received = 0

    def receive(self, size: int) -> None:
        """Count ``size`` bytes that came; raises ProtocolError when the sender is past its limit."""
        self.received += size
        if self.received > self.limit:
            raise ProtocolError(f"{self.received} body bytes came under a limit of {self.limit}")

    @property
    def is_drained(self) -> bool:
        """Whether nearly all has come that may."""
        return self.limit - self.received <= self.window // 8

    def grant(self, now: float, round_trip: float | None) -> int | None:
        """The new limit to tell the sender, if it is time for one: call it whenever all that came has been taken.

        ``now`` and ``round_trip``, the least of late, are in seconds; one that isn't known yet changes no window.
        """
        window = self.window
        if self.limit - self.received > window // 2:
            return None
        then = self._measured_at
        if then is None:
            self._measured_at, self._counted = now, self.received
        elif now - then >= _MEASURED:
            pace, before = (now - then) / (self.received - self._counted), self._pace
            self._measured_at, self._counted = now, self.received
            if pace < before:
                self._pace = pace if before == inf else (pace + before) / 2
            else:
                self._pace = 0.75 * before + 0.25 * min(pace, _SLOWEST * before)
            if round_trip is not None:
                self._fit(self._pace * window, max(0.0, round_trip - _TICK) + _TURN)
        limit = self.received + self.window
        if limit <= self.limit:
            return None
        self.limit = limit
        return limit

    def _fit(self, taken_in: float, unit: float) -> None:
        window = self.window
        if taken_in < _DOUBLES_BELOW * unit:
            if window < MAXIMUM_WINDOW and self._budget.take(window):
                self.window = 2 * window
        elif taken_in > _HALVES_ABOVE * unit and window > INITIAL_WINDOW:
            self.window = window // 2
            self._budget.give_back(self.window)

    def release(self) -> None:
        """The direction is over: its share of the budget goes back."""
        if self.window > INITIAL_WINDOW:
            self._budget.give_back(self.window - INITIAL_WINDOW)
            self.window = INITIAL_WINDOW
