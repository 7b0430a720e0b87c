"""Probes: is the way of requests open? A link whose pings are answered may still serve nobody.

A probe goes out as a request does, on a stream and in a slot of its own, and is answered by the client itself. What has
just answered a request is not asked. A link that is heard, but on which nothing moves while a probe waits, is dead
where it matters: it is closed, its client dials another, and what it held is repeated where that is safe.
"""

from collections.abc import Callable
from math import ceil
from typing import TYPE_CHECKING, Final

from quictunnel.quic.link import HEAD_LIMIT, SUSPECT_AFTER
from quictunnel.server.request_leg import RequestLeg
from quictunnel.wire.control import PROBE_CAPABILITY
from quictunnel.wire.errors import ErrorCode
from quictunnel.wire.frames import PROBE, End

if TYPE_CHECKING:
    from quictunnel.quic.link import Link
    from quictunnel.server.registry import Registry, Session
    from quictunnel.wire.credit import WindowBudget

__all__ = ["PROBE_EVERY", "PROBE_TIME", "Prober"]

# Together with a look every second, a link that serves nobody is known within ten seconds.
PROBE_EVERY: Final = 4.5
PROBE_TIME: Final = 4.0
"seconds"

_ROUND: Final = 1.0
_PARTS: Final = 9
"a round, in seconds, and in how many calls it is done: one less than there are"


class Prober:
    """Asks each link of a registry that has not answered anything lately."""

    def __init__(self, registry: "Registry", budget: "WindowBudget", clock: Callable[[], float]) -> None:
        """``clock`` is the event loop's, in seconds."""
        self._registry = registry
        self._budget = budget
        self._clock = clock
        self._asked: dict[Link, tuple[float, RequestLeg]] = {}  # since when, by what
        self._round: list[Session] = []  # those that are still to be looked at
        self._round_at = 0.0
        self._at_once = 0

    def look(self) -> None:
        """Ask who is to be asked, and close what has not answered; called ten times a second.

        Each session has its turn once a second: of very many some at a time, so that no request waits for all of them.
        """
        now = self._clock()
        self._judge(now)
        if not self._round and now >= self._round_at:
            self._round_at = now + _ROUND
            self._round = self._registry.sessions()
            self._at_once = ceil(len(self._round) / _PARTS)
        part, self._round = self._round[: self._at_once], self._round[self._at_once :]
        for session in part:
            if PROBE_CAPABILITY in session.capabilities:
                for link in list(session.links.values()):
                    if now - link.answered_at > PROBE_EVERY and link not in self._asked and link.has_slot():
                        self._ask(session, link, now)

    def _judge(self, now: float) -> None:
        """Close what has not answered."""
        for link, (since, leg) in list(self._asked.items()):
            if leg.ended or link.closed is not None:
                del self._asked[link]
            elif link.silent_for() > SUSPECT_AFTER or link.answered_at > since:
                # A silent one is suspect, and may only be far away for a while. And where anything moves on other
                # streams, the probe's packet was lost, or waits behind much else.
                self._asked[link] = (now, leg)
            elif link.listened_since(since) > PROBE_TIME:
                del self._asked[link]
                link.close(ErrorCode.INTERNAL_ERROR, f"a probe of this link was not answered within {PROBE_TIME:g} s")

    def _ask(self, session: "Session", link: "Link", now: float) -> None:
        leg = RequestLeg(self._budget, HEAD_LIMIT)  # joined to nobody: that something comes back is all
        self._registry.occupy(session)
        link.attach(leg)
        leg.receive(PROBE)
        leg.receive(End())
        link.ping()  # in the same packet, for the round trip that status shows
        self._asked[link] = (now, leg)
