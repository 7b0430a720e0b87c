"""The tunnels of a server, the sessions that serve them, and how one session and one link are chosen for a request."""

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from quictunnel.quic.link import SLOTS, SUSPECT_AFTER, Link
from quictunnel.quic.stream import StreamLeg
from quictunnel.trust.tokens import Grant
from quictunnel.wire.control import Grow
from quictunnel.wire.errors import ErrorCode, TunnelError

__all__ = ["Registry", "RegistryLimits", "Session", "Tunnel"]

# A link is asked for when those there are hold so many exchanges each: half of the slots are left for a burst to fall
# into while the new link shakes hands.
_STREAMS_PER_LINK: Final = SLOTS // 2


@dataclass(frozen=True, slots=True)
class RegistryLimits:
    """What the registry may hold."""

    in_flight: int = 10_000
    "exchanges of one tunnel, waiting ones included"

    slot_wait: float = 5.0
    "seconds a request waits for a stream slot"

    max_links: int = 64
    "links of one session"

    sessions: int = 256
    "sessions of one tunnel: each request looks at all of them"

    tunnels: int = 100_000
    "names remembered"


class Session:
    """One running client registered for a tunnel."""

    __slots__ = (
        "agent",
        "capabilities",
        "grant",
        "id",
        "in_flight",
        "lingering",
        "links",
        "number",
        "peak",
        "since",
        "tunnel",
        "wanted_links",
    )

    def __init__(self, session_id: str, number: int, tunnel: "Tunnel", grant: Grant, agent: str, since: float) -> None:
        self.id = session_id
        self.number = number  # for logs: the id is the client's secret
        self.tunnel = tunnel
        self.grant = grant
        self.agent = agent
        self.capabilities: frozenset[str] = frozenset()  # what its client said it can and will do
        self.since = since
        self.links: dict[int, Link] = {}
        self.lingering: set[Link] = set()  # replaced or retired, their exchanges still count
        self.in_flight = 0
        self.peak = 0  # of in_flight, since the last look
        self.wanted_links = 1

    def __repr__(self) -> str:
        return f"<Session {self.number} of {self.tunnel.name} links={len(self.links)} in_flight={self.in_flight}>"

    def choose_link(self) -> Link | None:
        """The link with the most room of those that were heard lately; None when no slot is free.

        What would be sent on a suspect link would wait for its idle time-out. In the queue it waits for the link that
        the client dials beside it, and is refused in time.
        """
        best = _most_room(self.links.values())
        if best is not None and best.silent_for() > SUSPECT_AFTER:
            return _most_room(link for link in self.links.values() if not link.silent_for() > SUSPECT_AFTER)
        return best

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
        for index in [index for index in self.links if index >= self.wanted_links]:
            link = self.links.pop(index)
            link.draining = True
            self.lingering.add(link)
            self.close_if_done(link)

    def close_if_done(self, link: Link) -> None:
        """Close a lingering link whose last exchange is over."""
        if link in self.lingering and not link.active:
            link.close(ErrorCode.NO_ERROR, "no longer needed")

    def _say(self, message: Grow) -> None:
        for link in self.links.values():
            if link.closed is None:
                link.send_control(message)
                return


def _most_room(links: Iterable[Link]) -> Link | None:
    best: Link | None = None
    for link in links:
        if (best is None or link.active < best.active) and link.has_slot():
            best = link
    return best


class Tunnel:
    """A public name, and who serves it."""

    __slots__ = ("in_flight", "name", "owner", "sessions", "waiting")

    def __init__(self, name: str) -> None:
        self.name = name
        self.owner: Grant | None = None  # whose name it is, from its first registration on
        self.sessions: dict[str, Session] = {}
        self.in_flight = 0
        self.waiting: deque[tuple[float, StreamLeg]] = deque()  # (until when, who), in order

    def __repr__(self) -> str:
        return f"<Tunnel {self.name} sessions={len(self.sessions)} in_flight={self.in_flight}>"

    def choose_session(self) -> tuple[Session, Link] | None:
        """The session with the fewest exchanges in flight that has a free slot."""
        best: tuple[Session, Link] | None = None
        for session in self.sessions.values():
            if best is None or session.in_flight < best[0].in_flight:
                link = session.choose_link()
                if link is not None:
                    best = session, link
        return best

    def offers(self, capability: str) -> bool:
        """Whether each of its clients does what the word stands for, so that any of them may be chosen."""
        return bool(self.sessions) and all(capability in each.capabilities for each in self.sessions.values())

    def is_served(self) -> bool:
        """Whether a client is there that was heard lately."""
        return any(not session.is_suspect() for session in self.sessions.values())


class Registry:
    """All tunnels of a server."""

    def __init__(self, limits: RegistryLimits) -> None:
        self.limits = limits
        self.tunnels: dict[str, Tunnel] = {}
        self._sessions = 0
        self._waiting: set[Tunnel] = set()

    def tunnel(self, name: str) -> Tunnel | None:
        """The tunnel of that name, if it was ever registered here."""
        return self.tunnels.get(name)

    def only_tunnel(self) -> Tunnel | None:
        """The only tunnel that is served now, or that ever was."""
        served = [tunnel for tunnel in self.tunnels.values() if tunnel.sessions]
        candidates = served or list(self.tunnels.values())
        return candidates[0] if len(candidates) == 1 else None

    def sessions(self) -> list[Session]:
        """Every session."""
        return [session for tunnel in self.tunnels.values() for session in tunnel.sessions.values()]

    # Clients come and go

    def register(self, grant: Grant, session_id: str, agent: str, index: int, link: Link, now: float) -> Session:
        """Make ``link`` number ``index`` of a session, which begins with its first. Raises TunnelError when full."""
        name = grant.tunnel
        tunnel = self.tunnels.get(name)
        if tunnel is None:
            if len(self.tunnels) >= self.limits.tunnels:
                self._forget_one()
            tunnel = self.tunnels[name] = Tunnel(name)
        session = tunnel.sessions.get(session_id)
        if session is None and len(tunnel.sessions) >= self.limits.sessions:
            raise TunnelError(ErrorCode.CONNECTION_LIMIT_REACHED, "the tunnel has as many sessions as it may")
        tunnel.owner = grant
        if session is None:
            self._sessions += 1
            session = Session(session_id, self._sessions, tunnel, grant, agent, now)
            tunnel.sessions[session_id] = session
        replaced = session.links.get(index)
        session.links[index] = link
        link.session = session
        if replaced is not None:
            # Only now: a session whose last link is closed is over.
            replaced.draining = True
            session.lingering.add(replaced)
            session.close_if_done(replaced)
        return session

    def unregister(self, link: Link) -> Session | None:
        """The link is gone; returns its session if that was its last."""
        session: Session | None = link.session
        if session is None:
            return None
        session.lingering.discard(link)
        for index, each in list(session.links.items()):
            if each is link:
                del session.links[index]
        if session.links or session.tunnel.sessions.get(session.id) is not session:
            return None
        del session.tunnel.sessions[session.id]
        return session

    def _forget_one(self) -> None:
        for name, tunnel in self.tunnels.items():
            if not tunnel.sessions and not tunnel.in_flight:
                del self.tunnels[name]
                return
        raise TunnelError(ErrorCode.CONNECTION_LIMIT_REACHED, "the server has as many tunnels as it may")

    # Requests come and go

    def dispatch(self, tunnel: Tunnel, leg: StreamLeg, now: float) -> None:
        """Give ``leg`` a slot now, or a place in the queue. Raises TunnelError when there is no hope of one."""
        if not tunnel.sessions:
            raise TunnelError(ErrorCode.DESTINATION_UNAVAILABLE)
        if tunnel.in_flight >= self.limits.in_flight:
            raise TunnelError(ErrorCode.CONNECTION_LIMIT_REACHED, "the tunnel has as many requests in flight as it may")
        tunnel.in_flight += 1
        if tunnel.waiting or not self._assign(tunnel, leg):
            if all(session.is_leaving() for session in tunnel.sessions.values()):
                tunnel.in_flight -= 1
                raise TunnelError(ErrorCode.DESTINATION_UNAVAILABLE)
            tunnel.waiting.append((now + self.limits.slot_wait, leg))
            self._waiting.add(tunnel)
            for session in tunnel.sessions.values():
                session.ask_for_links(len(tunnel.waiting), self.limits.max_links)

    def _assign(self, tunnel: Tunnel, leg: StreamLeg) -> bool:
        choice = tunnel.choose_session()
        if choice is None:
            return False
        session, link = choice
        session.in_flight += 1
        if session.in_flight > session.peak:
            session.peak = session.in_flight
        if session.in_flight >= _STREAMS_PER_LINK * session.wanted_links:
            session.ask_for_links(0, self.limits.max_links)
        link.attach(leg)
        return True

    def finished(self, tunnel: Tunnel) -> None:
        """An exchange of ``tunnel`` is over, whatever its fate."""
        tunnel.in_flight -= 1

    def slot_freed(self, session: Session, link: Link) -> None:
        """A slot of ``link`` is free: the first who waits gets it."""
        session.in_flight -= 1
        if session.lingering:
            session.close_if_done(link)
        if session.tunnel.waiting:
            self.serve_waiting(session.tunnel)

    def serve_waiting(self, tunnel: Tunnel) -> None:
        """Hand free slots to those who wait, in order."""
        while tunnel.waiting:
            # Taken out first: giving a slot may free another, and that one is for the next in line.
            place = tunnel.waiting.popleft()
            if not place[1].ended and not self._assign(tunnel, place[1]):
                tunnel.waiting.appendleft(place)
                return
        self._waiting.discard(tunnel)

    def expire_waiting(self, now: float) -> None:
        """Refuse those who have waited too long; called every fraction of a second."""
        for tunnel in list(self._waiting):
            self.serve_waiting(tunnel)
            # Whose visitors have left are not to be counted among those who want links.
            tunnel.waiting = deque(place for place in tunnel.waiting if not place[1].ended)
            while tunnel.waiting and (tunnel.waiting[0][0] <= now or not tunnel.sessions):
                _, leg = tunnel.waiting.popleft()
                visitor = leg.peer
                served = tunnel.is_served()
                code = ErrorCode.CONNECTION_LIMIT_REACHED if served else ErrorCode.DESTINATION_UNAVAILABLE
                error = TunnelError(code)
                leg.abort(error)
                visitor.abort(error)
            if not tunnel.waiting:
                self._waiting.discard(tunnel)
