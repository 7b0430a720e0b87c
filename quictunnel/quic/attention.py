"""For how long could a peer have been heard? Not while this process was held up, nor while what came waits unread.

A process that was stopped, swapped out, asleep with its machine or kept from the processor wakes up with every timer
late and everything that its peers said still in its sockets. Whoever judges a peer by its silence then must count only
the time in which it was able to listen, and give the peer a round trip from now on.
"""

import asyncio
from math import inf
from typing import Final

from quictunnel.quic.sockets import DatagramSocket

__all__ = ["Attention"]

_LOOK_EVERY: Final = 0.5
_HELD_UP: Final = 1.0
"seconds between two looks after which the process has been held up in between"


class Attention:
    """A process's attention to its peers; in seconds of the event loop's clock."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._since = -inf  # when it was held up last
        self._looked_at = inf
        self._timer: asyncio.TimerHandle | None = None
        self.socket: DatagramSocket | None = None
        "where everything comes, if it all comes by one socket"

    def start(self) -> None:
        """Watch over the event loop until ``close``; without it all time counts as spent listening."""
        self._looked_at = self._loop.time()
        self._timer = self._loop.call_later(_LOOK_EVERY, self._look)

    def close(self) -> None:
        """Watch no more."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._looked_at = inf

    def _look(self) -> None:
        self._notice(self._loop.time())
        self._timer = self._loop.call_later(_LOOK_EVERY, self._look)

    def _notice(self, now: float) -> None:
        if now - self._looked_at > _HELD_UP:
            self._since = now
        if self._looked_at < inf:
            self._looked_at = now

    def seconds_since(self, then: float) -> float:
        """Of the seconds since ``then``, those in which what a peer sent would have been heard."""
        now = self._loop.time()
        # Whoever asks first after a pause has not waited for the timer.
        self._notice(now)
        until = now if self.socket is None else self.socket.read_until(now)
        return max(0.0, until - max(then, self._since))
