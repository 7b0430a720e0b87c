"""The tunnels of a server, the sessions that serve them, and how one session and one link are chosen for a request.

A request that finds no slot waits in its tunnel's queue: for a slot, or for a client to come back. What becomes of one
whose client is lost is ``request_leg``'s affair; it comes here again for another place.
"""

import hashlib
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Final

from loguru import logger

from quictunnel.quic.link import SLOTS, SUSPECT_AFTER, Link
from quictunnel.server.balance import Balance, LinkOrder, rendezvous
from quictunnel.server.request_leg import RequestLeg
from quictunnel.trust.tokens import Grant
from quictunnel.wire.control import Grow
from quictunnel.wire.errors import ErrorCode, TunnelError

__all__ = ["Registry", "RegistryLimits", "Session", "Tunnel"]

# A link is asked for when those there are hold so many exchanges each: half of the slots are left for a burst to fall
# into while the new link shakes hands.
_STREAMS_PER_LINK: Final = SLOTS // 2

# Of so many links each is looked at for each request, which is quicker than to keep them in order.
_FEW_LINKS: Final = 8

# Waiting requests after which their number is told to the sessions again, that of half of a link.
_ASK_EVERY: Final = _STREAMS_PER_LINK // 2

# A session whose backend could not be connected to so many times in a row is put aside: for the first time so long,
# then twice as long each time, at most so long. In seconds.
_FAILURES: Final = 3
_ASIDE_FIRST: Final = 1.0
_ASIDE_LONGEST: Final = 30.0

# A tunnel that has been without a client for longer will not have one again any moment: its visitors need not wait.
_HELD_FOR: Final = 30.0
"seconds"

# Visitors whose session by address is remembered, per tunnel.
_ADDRESSES: Final = 4096

# Seconds for which a client's port counts as closed before what it may have got is given to another. One that has only
# gone to another address speaks there within half a second, as the pings of a link that is in use come.
_REFUSED_WAIT: Final = 0.75


@dataclass(frozen=True, slots=True)
class RegistryLimits:
    """What the registry may hold."""

    in_flight: int = 10_000
    "exchanges of one tunnel, waiting ones included"

    slot_wait: float = 5.0
    "seconds a request waits for a stream slot"

    hold: float = 3.0
    "seconds a request waits for a client to come back"

    held: int = 1024
    "requests of one tunnel that may wait so at a time"

    max_links: int = 256
    "links of one session"

    sessions: int = 1024
    "sessions of one tunnel"

    tunnels: int = 100_000
    "names remembered"


class Session:
    """One running client registered for a tunnel."""

    __slots__ = (
        "_aside_for",
        "_last",
        "_order",
        "agent",
        "aside_until",
        "capabilities",
        "failures",
        "grant",
        "health_text",
        "healthy",
        "hosts",
        "id",
        "in_flight",
        "key",
        "lingering",
        "links",
        "number",
        "peak",
        "place",
        "served",
        "since",
        "tunnel",
        "wanted_links",
        "weight",
    )

    def __init__(self, session_id: str, number: int, tunnel: "Tunnel", grant: Grant, agent: str, since: float) -> None:
        self.id = session_id
        # What visitors may know it by: the same at each of a server's processes, and no way back to the id.
        self.key = hashlib.sha256(b"sticky " + session_id.encode()).hexdigest()[:16]
        self.number = number  # for logs: the id is the client's secret
        self.tunnel = tunnel
        self.grant = grant
        self.agent = agent
        self.capabilities: frozenset[str] = frozenset()  # what its client said it can and will do
        self.hosts: tuple[str, ...] = ()  # custom hosts that its client serves: see ``hosts``
        self.since = since
        self.links: dict[int, Link] = {}
        self._order: LinkOrder[Link] | None = None  # of many links, until other ones are there
        self._last: Link | None = None  # which was chosen last, likewise
        self.lingering: set[Link] = set()  # replaced or retired, their exchanges still count
        self.weight = 1
        self.in_flight = 0
        self.served = 0  # exchanges, ever
        self.place = 0  # the balance's
        self.peak = 0  # of in_flight, since the last look
        self.wanted_links = 1

        # what its backend is like
        self.healthy = True  # by its client's checks
        self.health_text = ""
        self.failures = 0  # to connect to it, in a row
        self.aside_until = 0.0  # it is not chosen until then, on the loop's clock
        self._aside_for = 0.0

    def __repr__(self) -> str:
        return f"<Session {self.number} of {self.tunnel.name} links={len(self.links)} in_flight={self.in_flight}>"

    def fails(self, now: float) -> None:
        """Its client could not connect to the backend once more."""
        self.failures += 1
        # The only one there is stays in its place: a true error is better than none.
        if self.failures >= _FAILURES and self.aside_until <= now and len(self.tunnel.sessions) > 1:
            self._aside_for = min(2 * self._aside_for or _ASIDE_FIRST, _ASIDE_LONGEST)
            self.aside_until = now + self._aside_for
            if self.tunnel.sessions.get(self.id) is self:
                self.tunnel.aside.add(self)
            logger.warning(
                "session {} of {} is put aside for {:g} s: its backend could not be connected to, {} times in a row",
                self.number, self.tunnel.name, self._aside_for, self.failures,
            )  # fmt: skip

    def works(self) -> None:
        """Its backend has answered again."""
        self.failures = 0
        self.aside_until = self._aside_for = 0.0
        self.tunnel.aside.discard(self)

    def may_serve(self, now: float) -> bool:
        """Whether its backend is believed to be there."""
        return self.healthy and self.aside_until <= now

    def choose_link(self, now: float) -> Link | None:
        """The link with the most room of those that were heard lately; None when no slot is free.

        But requests of one moment go together as long as they leave together (``Link.filling``): a packet for each
        of them, and one to acknowledge each, costs both ends more than all the rest of a small request.

        What would be sent on a suspect link would wait for its idle time-out. In the queue it waits for the link that
        the client dials beside it, and is refused in time.
        """
        if self._last is None or not self._last.filling or not _fits(self._last):
            self._last = self._least_loaded(now)
        return self._last

    def _least_loaded(self, now: float) -> Link | None:
        if len(self.links) > _FEW_LINKS:
            if self._order is None:
                self._order = LinkOrder(self.links.values())
            return self._order.choose(now, _fits)
        best = _most_room(self.links.values())
        if best is not None and best.silent_for() > SUSPECT_AFTER:
            return _most_room(link for link in self.links.values() if not link.silent_for() > SUSPECT_AFTER)
        return best

    def has_room(self, link: Link) -> None:
        """A link of its own can take more than before."""
        if self._order is not None and not link.draining:
            self._order.offer(link)

    def links_changed(self) -> None:
        """Other links are there, or one takes nothing new any more."""
        self._order = self._last = None

    def is_leaving(self) -> bool:
        """Whether its client has said that it takes nothing new."""
        return bool(self.links) and all(link.draining for link in self.links.values())

    def is_suspect(self) -> bool:
        """Whether none of its links has been heard lately."""
        return all(link.silent_for() > SUSPECT_AFTER for link in self.links.values())

    def ask_for_links(self, waiting: int, maximum: int) -> None:
        """Have the client open as many links as the load wants, if it has not been asked already."""
        wanted = min((self.in_flight + waiting) // _STREAMS_PER_LINK + 1, maximum)
        if wanted > self.wanted_links:
            self.wanted_links = wanted
            self._say(Grow(wanted))

    def retire_links(self) -> None:
        """Give up links that the peak since the last call did not need; called now and then."""
        wanted = self.peak // _STREAMS_PER_LINK + 1
        self.peak = self.in_flight
        if wanted >= self.wanted_links:
            return
        self.wanted_links -= 1
        self._say(Grow(self.wanted_links))
        self.links_changed()
        for index in [index for index in self.links if index >= self.wanted_links]:
            link = self.links.pop(index)
            link.draining = True
            self.lingering.add(link)
            self.close_if_done(link)

    def close_if_done(self, link: Link) -> None:
        """Close a link that takes nothing new when its last exchange is over."""
        if link.draining and not link.active:
            link.close(ErrorCode.NO_ERROR, "no longer needed")

    def _say(self, message: Grow) -> None:
        for link in self.links.values():
            if link.closed is None:
                link.send_control(message)
                return


def _fits(link: Link) -> bool:
    return link.has_slot() and not link.silent_for() > SUSPECT_AFTER


def _most_room(links: Iterable[Link]) -> Link | None:
    best: Link | None = None
    for link in links:
        if (best is None or link.active < best.active) and link.has_slot():
            best = link
    return best


class Tunnel:
    """A public name, and who serves it."""

    __slots__ = (
        "_by_address",
        "_by_key",
        "aside",
        "balance",
        "in_flight",
        "lost_at",
        "name",
        "owner",
        "sessions",
        "sticky",
        "waiting",
    )

    def __init__(self, name: str, lost_at: float | None = None) -> None:
        self.name = name
        self.owner: Grant | None = None  # whose name it is, from its first registration on
        self.sessions: dict[str, Session] = {}
        self.balance: Balance[Session] = Balance()
        self.aside: set[Session] = set()  # put aside, for a time that may be over
        self.lost_at = lost_at  # since when it has no session, on the loop's clock; None while it has one
        self.sticky = ""  # how visitors are kept together: see wire.control.STICKY
        self.in_flight = 0
        self.waiting: deque[tuple[float, RequestLeg]] = deque()  # (until when, who), in order
        self._by_key: dict[str, Session] = {}
        self._by_address: dict[str, Session] = {}  # whose visitors they are, as long as no session changes

    def __repr__(self) -> str:
        return f"<Tunnel {self.name} sessions={len(self.sessions)} in_flight={self.in_flight}>"

    def choose_session(self, now: float, leg: RequestLeg | None = None) -> tuple[Session, Link] | None:
        """The session with the least load for its weight that can take one more, or the one that ``leg`` prefers.

        Sessions that ``leg`` has been to, or that are not believed to have a backend, are passed over; if none is left
        because each is put aside, one of those is tried.
        """
        tried = leg.tried if leg is not None else frozenset()
        if leg is not None and leg.prefers is not None:
            session = leg.prefers
            if self.sessions.get(session.id) is session and session not in tried and session.may_serve(now):
                link = session.choose_link(now)
                if link is not None:
                    return session, link
        if len(self.sessions) == 1 and not tried:
            # The usual case needs no order.
            for session in self.sessions.values():
                link = session.choose_link(now) if session.healthy else None
                return None if link is None else (session, link)
        return self._least_loaded(now, tried) or self._put_aside(now, tried)

    def _least_loaded(self, now: float, tried: frozenset[Session]) -> tuple[Session, Link] | None:
        balance = self.balance
        passed = []
        try:
            while (session := balance.first()) is not None:
                if session in tried:
                    balance.park(session)
                    passed.append(session)
                    continue
                link = session.choose_link(now) if session.may_serve(now) else None
                if link is not None:
                    return session, link
                balance.park(session)
            return None
        finally:
            for session in passed:
                balance.offer(session)

    def _put_aside(self, now: float, tried: frozenset[Session]) -> tuple[Session, Link] | None:
        if not self.aside:
            return None
        aside = [each for each in self.aside if each.healthy and each.aside_until > now and each not in tried]
        for session in sorted(aside, key=lambda each: each.aside_until):
            link = session.choose_link(now)
            if link is not None:
                return session, link
        return None

    def session_of_key(self, key: str) -> Session | None:
        """The session that visitors know by ``key``."""
        return self._by_key.get(key)

    def session_of_address(self, address: str) -> Session | None:
        """The session that the visitor from ``address`` belongs to as long as the same ones are there and healthy."""
        session = self._by_address.get(address)
        if session is None:
            fit = [(each.key, each.weight) for each in self.sessions.values() if each.healthy and not each.is_leaving()]
            key = rendezvous(address, fit)
            if key is None:
                return None
            if len(self._by_address) >= _ADDRESSES:
                self._by_address.clear()
            session = self._by_address[address] = self._by_key[key]
        return session

    def changed(self, session: Session) -> None:
        """The load of ``session`` has changed, or what it can take."""
        if len(self.sessions) > 1:
            self.balance.offer(session)

    def session_came(self, session: Session) -> None:
        """A session begins."""
        self.sessions[session.id] = session
        self._by_key[session.key] = session
        self.lost_at = None
        if len(self.sessions) == 2:
            for each in self.sessions.values():  # the first one had no need of an order
                self.changed(each)
        self.session_changed(session)

    def session_went(self, session: Session) -> None:
        """A session is over."""
        self.balance.withdraw(session)
        self.aside.discard(session)
        self._by_key.pop(session.key, None)
        self._by_address.clear()

    def session_changed(self, session: Session) -> None:
        """A session has changed in what it is chosen by."""
        self._by_address.clear()
        self.changed(session)

    def offers(self, capability: str) -> bool:
        """Whether each of its clients does what the word stands for, so that any of them may be chosen."""
        return bool(self.sessions) and all(capability in each.capabilities for each in self.sessions.values())

    def why_none_was_free(self) -> TunnelError:
        """What those are told who have waited too long."""
        if not self.is_served():
            return TunnelError(ErrorCode.DESTINATION_UNAVAILABLE)
        links = sum(len(session.links) for session in self.sessions.values())
        return TunnelError(
            ErrorCode.CONNECTION_LIMIT_REACHED,
            f"No stream came free in time on the {links} link{'s'[: links != 1]} of the tunnel's clients, "
            f"{SLOTS} on each (connect --max-links).",
        )

    def is_served(self) -> bool:
        """Whether a client is there that was heard lately."""
        return any(not session.is_suspect() for session in self.sessions.values())

    def is_left(self) -> bool:
        """Whether nobody is there who takes anything new."""
        return all(session.is_leaving() for session in self.sessions.values())

    def is_unwell(self) -> str:
        """What its clients say if none has a healthy backend; empty otherwise."""
        text = ""
        for session in self.sessions.values():
            if session.healthy:
                return ""
            text = session.health_text or "unhealthy"
        return text


class Registry:
    """All tunnels of a server."""

    def __init__(
        self,
        limits: RegistryLimits,
        known: Callable[[str], bool] = lambda name: False,
        only: Callable[[], str] = lambda: "",
        since: float = 0.0,
    ) -> None:
        """``known`` says of a name that was never registered here whether it is somebody's all the same.

        ``only`` gives the only such name, empty if there is not just one. ``since`` is when this server began, on the
        loop's clock: since then such a tunnel is without a client.
        """
        self.limits = limits
        self._known = known
        self._only = only
        self._since = since
        self.tunnels: dict[str, Tunnel] = {}
        self._served: dict[Tunnel, None] = {}  # those that have a session
        self._only_served: Tunnel | None = None  # if there is just one
        self._sessions = 0
        self._waiting: set[Tunnel] = set()
        self._parked: set[Tunnel] = set()  # those with sessions that nobody else will offer again
        self._refused: dict[Link, float] = {}  # whose client's host says that nobody listens there, since when

    def tunnel(self, name: str) -> Tunnel | None:
        """The tunnel of that name, if it was ever registered, here or elsewhere. Raises TunnelError."""
        tunnel = self.tunnels.get(name)
        if tunnel is None and self._known(name):
            tunnel = self._new_tunnel(name, self._since)
        return tunnel

    def only_tunnel(self) -> Tunnel | None:
        """The only tunnel that is served now, or that ever was. Raises TunnelError."""
        if self._served:
            return self._only_served
        if not self.tunnels and (name := self._only()):
            return self.tunnel(name)
        return next(iter(self.tunnels.values())) if len(self.tunnels) == 1 else None

    def _served_changed(self) -> None:
        # Not looked for by each request: the first of a table from which many have gone is far from its beginning.
        self._only_served = next(iter(self._served)) if len(self._served) == 1 else None

    def remember(self, name: str, lost_at: float) -> None:
        """A tunnel of that name was registered at another process, and had a client there until then."""
        if name not in self.tunnels and len(self.tunnels) < self.limits.tunnels:
            self.tunnels[name] = Tunnel(name, lost_at)

    def sessions(self) -> list[Session]:
        """Every session."""
        return [session for tunnel in self._served for session in tunnel.sessions.values()]

    # Clients come and go

    def register(self, grant: Grant, session_id: str, agent: str, index: int, link: Link, now: float) -> Session:
        """Make ``link`` number ``index`` of a session, which begins with its first. Raises TunnelError when full."""
        name = grant.tunnel
        tunnel = self.tunnels.get(name)
        if tunnel is None:
            tunnel = self._new_tunnel(name, now)
        session = tunnel.sessions.get(session_id)
        if session is None and len(tunnel.sessions) >= self.limits.sessions:
            raise TunnelError(ErrorCode.CONNECTION_LIMIT_REACHED, "the tunnel has as many sessions as it may")
        tunnel.owner = grant
        if session is None:
            self._sessions += 1
            session = Session(session_id, self._sessions, tunnel, grant, agent, now)
            tunnel.session_came(session)
            if len(tunnel.sessions) == 1:
                self._served[tunnel] = None
                self._served_changed()
        session.wanted_links = max(session.wanted_links, index + 1)  # as at the server before this one
        replaced = session.links.get(index)
        session.links[index] = link
        session.links_changed()
        link.session = session
        tunnel.changed(session)
        if replaced is not None:
            # Only now: a session whose last link is closed is over.
            replaced.draining = True
            session.lingering.add(replaced)
            session.close_if_done(replaced)
        return session

    def unregister(self, link: Link, now: float) -> Session | None:
        """The link is gone; returns its session if that was its last."""
        session: Session | None = link.session
        if session is None:
            return None
        session.lingering.discard(link)
        session.links_changed()
        for index, each in session.links.items():
            if each is link:
                del session.links[index]
                break
        if session.links or session.tunnel.sessions.get(session.id) is not session:
            return None
        self.end(session, now)
        return session

    def end(self, session: Session, now: float) -> None:
        """The session is over, whatever links it still has."""
        tunnel = session.tunnel
        if tunnel.sessions.pop(session.id, None) is None:
            return
        tunnel.session_went(session)
        if not tunnel.sessions:
            tunnel.lost_at = now
            self._served.pop(tunnel, None)
            self._served_changed()

    def drain(self, link: Link) -> None:
        """The client takes nothing new on the link: it ends with the last exchange on it."""
        link.draining = True
        session: Session | None = link.session
        if session is not None:
            session.links_changed()
            session.tunnel.session_changed(session)
            session.close_if_done(link)

    def health(self, session: Session, healthy: bool, text: str) -> None:
        """What its client's checks of the backend say."""
        if session.healthy != healthy:
            session.healthy = healthy
            session.tunnel.session_changed(session)
        session.health_text = text

    def refused(self, link: Link, now: float) -> None:
        """The client's host says that nobody listens there: what it never got is given to another at once.

        What it may have got waits for a moment: a client that has only gone to another address is heard from there.
        """
        self._refused.setdefault(link, now)
        self._rescue(link, only_unreached=True)

    def rescue(self) -> None:
        """Give what waits on suspect links to others that are heard; called every second or so."""
        for tunnel in list(self._served):
            suspects = [
                link
                for session in tunnel.sessions.values()
                for link in (*session.links.values(), *session.lingering)
                if link.active and link.silent_for() > SUSPECT_AFTER and link not in self._refused
            ]
            if suspects and tunnel.is_served():
                for link in suspects:
                    self._rescue(link)

    @staticmethod
    def _rescue(link: Link, *, only_unreached: bool = False) -> None:
        for leg in link.legs():
            if isinstance(leg, RequestLeg):
                leg.rescue(only_unreached=only_unreached)

    def _new_tunnel(self, name: str, lost_at: float) -> Tunnel:
        if len(self.tunnels) >= self.limits.tunnels:
            self._forget_one()
        tunnel = self.tunnels[name] = Tunnel(name, lost_at)
        return tunnel

    def _forget_one(self) -> None:
        for name, tunnel in self.tunnels.items():
            if not tunnel.sessions and not tunnel.in_flight:
                del self.tunnels[name]
                return
        raise TunnelError(ErrorCode.CONNECTION_LIMIT_REACHED, "the server has as many tunnels as it may")

    # Requests come and go

    def dispatch(self, tunnel: Tunnel, leg: RequestLeg, now: float) -> None:
        """Give ``leg`` a slot now, or a place in the queue. Raises TunnelError when there is no hope of one."""
        if tunnel.in_flight >= self.limits.in_flight:
            raise TunnelError(
                ErrorCode.CONNECTION_LIMIT_REACHED,
                f"The tunnel has {tunnel.in_flight} requests in flight, as many as it may (serve --max-in-flight).",
            )
        if tunnel.waiting or not self._assign(tunnel, leg, now):
            self._wait(tunnel, leg, now)
        tunnel.in_flight += 1

    def dispatch_again(self, tunnel: Tunnel, leg: RequestLeg, now: float, *, may_wait: bool) -> bool:
        """Find another place for a request that was dispatched before; whether there is one.

        It goes before those who wait: it has been in the queue.
        """
        if self._assign(tunnel, leg, now):
            return True
        if may_wait:
            try:
                self._wait(tunnel, leg, now)
            except TunnelError:
                return False
        return may_wait

    def _assign(self, tunnel: Tunnel, leg: RequestLeg, now: float) -> bool:
        choice = tunnel.choose_session(now, leg)
        if tunnel.balance.parked:
            self._parked.add(tunnel)
        if choice is None:
            return False
        session, link = choice
        leg.session = session
        session.served += 1
        self.occupy(session)
        if session.in_flight >= _STREAMS_PER_LINK * session.wanted_links:
            session.ask_for_links(0, self.limits.max_links)
        link.attach(leg)
        return True

    def occupy(self, session: Session) -> None:
        """One more slot of the session is about to be taken; ``slot_freed`` is its end."""
        session.in_flight += 1
        if session.in_flight > session.peak:
            session.peak = session.in_flight
        session.tunnel.changed(session)

    def _wait(self, tunnel: Tunnel, leg: RequestLeg, now: float) -> None:
        limits = self.limits
        wait = limits.slot_wait
        left = tunnel.is_left()
        if not left and (unwell := tunnel.is_unwell()):
            raise TunnelError(
                ErrorCode.DESTINATION_UNAVAILABLE, f"No client of this tunnel has a healthy backend: {_ascii(unwell)}"
            )
        if left or not tunnel.is_served():
            wait = limits.hold
            lost_at = tunnel.lost_at
            if not wait or (lost_at is not None and now - lost_at > _HELD_FOR):
                raise TunnelError(ErrorCode.DESTINATION_UNAVAILABLE)
            if len(tunnel.waiting) >= limits.held:
                raise TunnelError(ErrorCode.DESTINATION_UNAVAILABLE, "as many requests wait for a client as may")
        tunnel.waiting.append((now + wait, leg))
        self._waiting.add(tunnel)
        if len(tunnel.waiting) % _ASK_EVERY == 1:
            for session in tunnel.sessions.values():
                session.ask_for_links(len(tunnel.waiting) + _ASK_EVERY - 1, limits.max_links)

    def finished(self, tunnel: Tunnel) -> None:
        """An exchange of ``tunnel`` is over, whatever its fate."""
        tunnel.in_flight -= 1

    def slot_freed(self, session: Session, link: Link, now: float) -> None:
        """A slot of ``link`` is free: the first who waits gets it."""
        session.in_flight -= 1
        tunnel = session.tunnel
        if tunnel.sessions.get(session.id) is session:
            tunnel.changed(session)
        session.has_room(link)
        if link.draining:
            session.close_if_done(link)
        if tunnel.waiting:
            self.serve_waiting(tunnel, now)

    def slots_allowed(self, session: Session, now: float, link: Link | None = None) -> None:
        """The session can take more than it said before, on that link if it says so of one."""
        if link is not None:
            session.has_room(link)
        session.tunnel.changed(session)
        self.serve_waiting(session.tunnel, now)

    def serve_waiting(self, tunnel: Tunnel, now: float) -> None:
        """Hand free slots to those who wait, in order."""
        passed = []  # those who have been to the sessions that are free
        nowhere: set[frozenset[Session]] = set()  # who has been to these finds no place now
        while tunnel.waiting:
            # Taken out first: giving a slot may free another, and that one is for the next in line.
            place = tunnel.waiting.popleft()
            leg = place[1]
            if leg.ended:
                continue
            if leg.tried not in nowhere:
                if self._assign(tunnel, leg, now):
                    continue
                nowhere.add(leg.tried)
            passed.append(place)
            if not leg.tried:
                break
        tunnel.waiting.extendleft(reversed(passed))
        if not tunnel.waiting:
            self._waiting.discard(tunnel)

    def look_again(self, now: float) -> None:
        """Offer anew what has become able to serve, and refuse those who have waited too long.

        Called every fraction of a second.
        """
        for link, since in list(self._refused.items()):
            if not link.refused or link.closed is not None:
                del self._refused[link]
            elif now - since >= _REFUSED_WAIT:
                del self._refused[link]
                self._rescue(link)
        for tunnel in list(self._parked):
            for session in list(tunnel.balance.parked):
                if tunnel.sessions.get(session.id) is not session:
                    tunnel.balance.withdraw(session)
                elif session.may_serve(now) and session.choose_link(now) is not None:
                    tunnel.changed(session)
            if not tunnel.balance.parked:
                self._parked.discard(tunnel)
        for tunnel in list(self._waiting):
            self.serve_waiting(tunnel, now)
            # Whose visitors have left are not to be counted among those who want links.
            places = [place for place in tunnel.waiting if not place[1].ended]
            tunnel.waiting = deque(place for place in places if place[0] > now)
            if not tunnel.waiting:
                self._waiting.discard(tunnel)
            late = [leg for until, leg in places if until <= now]
            if late:
                why = tunnel.why_none_was_free()
                for leg in late:
                    visitor = leg.peer
                    error = leg.failure or why
                    leg.abort(error)
                    visitor.abort(error)


def _ascii(text: str) -> str:
    return ascii(text[:200])[1:-1]
