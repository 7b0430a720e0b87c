"""Which of a tunnel's sessions takes the next request: that with the least load for its weight, or the visitor's own.

And which of its links: that with the most room, see ``LinkOrder``.

Load is exchanges in flight divided by weight. A heap with lazy deletion keeps the sessions in its order: whatever
changes a session's load *offers* it anew, which makes its older entry stale, and stale entries are thrown away when
they come to the top. Each change costs a push, and each push at most one pop later: O(log sessions). Among equals the
one whose load changed longest ago is first, so equals take turns.

A session that can take nothing now (no slot, suspect, unhealthy, put aside) is *parked*: it is in no order until it is
offered again, by what frees a slot or by the next look at those parked.

Visitors that are kept together by their address are spread by weighted rendezvous hashing: when a session comes or
goes, only the visitors that it gains or had move.
"""

import hashlib
from collections.abc import Callable, Iterable
from heapq import heapify, heappop, heappush
from math import log
from typing import Final, Generic, Protocol, TypeVar

__all__ = ["Balance", "Balanced", "LinkOrder", "Roomy", "rendezvous"]

# Stale entries are mostly thrown away at the top; those of sessions that are never the least loaded are not.
_SPARE: Final = 64


class Balanced(Protocol):
    """What is put in order."""

    in_flight: int
    weight: int
    place: int
    "the number of its valid entry, 0 for none; the order's own"


T = TypeVar("T", bound=Balanced)


class Balance(Generic[T]):
    """Sessions in order of their load."""

    __slots__ = ("_count", "_heap", "_limit", "parked")

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, T]] = []
        self._count = 0
        self._limit = _SPARE
        self.parked: set[T] = set()

    def __len__(self) -> int:
        """How many entries are kept, stale ones too."""
        return len(self._heap)

    def offer(self, session: T) -> None:
        """The session's load has changed, or it may be able to take something again."""
        self._count += 1
        session.place = self._count
        self.parked.discard(session)
        heappush(self._heap, (session.in_flight / session.weight, self._count, session))
        if len(self._heap) > self._limit:
            self._tidy()

    def withdraw(self, session: T) -> None:
        """The session is gone."""
        session.place = 0
        self.parked.discard(session)

    def park(self, session: T) -> None:
        """The session can take nothing now."""
        session.place = 0
        self.parked.add(session)

    def first(self) -> T | None:
        """The session with the least load of those that are offered."""
        heap = self._heap
        while heap:
            session = heap[0][2]
            if heap[0][1] == session.place:
                return session
            heappop(heap)
        return None

    def _tidy(self) -> None:
        self._heap = [entry for entry in self._heap if entry[1] == entry[2].place]
        heapify(self._heap)
        self._limit = 4 * len(self._heap) + _SPARE


# Links that can take nothing are looked at again this often, in seconds: one that is heard again tells nobody.
_LOOK_EVERY: Final = 0.1


class Roomy(Protocol):
    """A link, as an order of them sees it."""

    active: int
    "exchanges on it"


L = TypeVar("L", bound=Roomy)


class LinkOrder(Generic[L]):
    """The links of a session that has many, the one with the most room first: O(log links) for each request.

    Among equals the first of them has its turn, again and again: what a link's congestion window and round trip have
    learnt is worth most where it was learnt last, and a link that is used by turns of a hundred knows nothing.

    A heap like that of ``Balance``, but it mends itself: an entry whose link has more exchanges than it says is put in
    its place when it comes to the top, so only a link that has become emptier is to be offered. What is found to take
    nothing (no slot, suspect) is put aside until it is offered, or for a moment.
    """

    __slots__ = ("_aside", "_count", "_heap", "_look_at", "_places", "_ranks", "examined")

    def __init__(self, links: Iterable[L]) -> None:
        self._heap: list[tuple[int, int, int, L]] = []  # load, rank, number, link
        self._ranks: dict[L, int] = {}
        self._places: dict[L, int] = {}  # the number of its valid entry
        self._aside: list[L] = []
        self._look_at = 0.0
        self._count = 0
        self.examined = 0
        "links that were looked at, ever"

        for link in links:
            self.offer(link)

    def offer(self, link: L) -> None:
        """The link has more room than it had, or may be able to take something again."""
        self._count += 1
        self._places[link] = self._count
        heappush(self._heap, (link.active, self._ranks.setdefault(link, len(self._ranks)), self._count, link))
        if len(self._heap) > 4 * len(self._places) + _SPARE:
            self._heap = [entry for entry in self._heap if self._places.get(entry[3]) == entry[2]]
            heapify(self._heap)

    def choose(self, now: float, fits: Callable[[L], bool]) -> L | None:
        """The link with the most room of those that fit; ``now`` is the event loop's time."""
        if self._aside and now >= self._look_at:
            aside, self._aside = self._aside, []
            self._look_at = now + _LOOK_EVERY
            for link in aside:
                if link not in self._places:
                    self.offer(link)
        heap = self._heap
        while heap:
            load, _, count, link = heap[0]
            if self._places.get(link) != count:
                heappop(heap)
                continue
            self.examined += 1
            if link.active != load:
                heappop(heap)
                self.offer(link)
            elif fits(link):
                return link
            else:
                heappop(heap)
                del self._places[link]
                self._aside.append(link)
        return None


def rendezvous(visitor: str, candidates: Iterable[tuple[str, int]]) -> str | None:
    """Of ``candidates``, each a key and a weight, the key that ``visitor`` belongs to; None when there are none.

    Weighted rendezvous hashing: each candidate wins a share of all visitors that is its share of the weights.
    """
    best, best_score = None, 0.0
    for key, weight in candidates:
        digest = hashlib.blake2b(f"{key}/{visitor}".encode(), digest_size=8).digest()
        # Uniform in (0, 1), both ends excluded.
        chance = (int.from_bytes(digest, "big") + 0.5) / 2**64
        score = -weight / log(chance)
        if best is None or score > best_score:
            best, best_score = key, score
    return best
