"""The gate where clients register: hello, token, name; then welcome or a refusal that says why."""

import asyncio
from collections.abc import Callable, Sequence
from datetime import datetime
from typing import Final

from loguru import logger

from quictunnel import __version__
from quictunnel.log import escape
from quictunnel.quic.link import Link, LinkClosed, LinkOwner
from quictunnel.quic.stream import StreamLeg
from quictunnel.server.book import Book
from quictunnel.server.hosts import HostRefused, Hosts, custom_hosts
from quictunnel.server.registry import Registry, Session, Tunnel
from quictunnel.trust.files import TrustError
from quictunnel.trust.owners import Claim, NamesFull, NameTaken
from quictunnel.trust.tokens import Grant, TokenRefused, TokenStore
from quictunnel.wire.control import (
    STICKY,
    VERSION,
    WEIGHT_LIMIT,
    Authority,
    ControlMessage,
    Drain,
    Drained,
    Grow,
    Health,
    Hello,
    Refuse,
    Unknown,
    Welcome,
)
from quictunnel.wire.errors import ErrorCode, TunnelError
from quictunnel.wire.names import host_and_port, made_up_word

__all__ = ["Gate"]

# How long a refused client has to read why, in seconds, before its link is closed under it.
_REFUSAL_TIME: Final = 1.0
_SESSION_ID_LIMIT: Final = 128

# Seconds after which a client that comes while the server drains may try again; another process may serve already.
_RETRY_AFTER: Final = 1.0
_AGAIN_AFTER: Final = 0.1

# Of what a client calls itself, and asks for, so many characters go into logs.
_SHOWN: Final = 80


class Gate(LinkOwner):
    """Owns the links of a server."""

    def __init__(
        self,
        registry: Registry,
        tokens: TokenStore,
        book: Book,
        hosts: Hosts,
        *,
        domain: str,
        authority: Authority,
        public_urls: Callable[[str, Sequence[str]], list[str]],
        now: Callable[[], datetime],
        worker: int = 0,
        workers: int = 1,
    ) -> None:
        """``authority`` answers clients that only know a pin yet; ``now`` is the wall clock, aware.

        It is the gate of one of ``workers`` processes, and tells clients so: each session has links to each.
        """
        self._registry = registry
        self._tokens = tokens
        self._book = book
        self._hosts = hosts
        self._domain = domain
        self.authority = authority
        self._public_urls = public_urls
        self._now = now
        self._worker = worker
        self._workers = workers
        self._loop = asyncio.get_running_loop()
        self._refused: dict[Link, asyncio.TimerHandle] = {}  # until when they may read why
        self._asked: set[Link] = set()  # have had the authority's certificate
        self._rechecked = -1  # which reading of the tokens all sessions were last held against
        self._recheck_at: datetime | None = None  # when the first of their tokens expires
        self.draining = False
        self._retry_after = _RETRY_AFTER
        self.on_accepted: Callable[[Link], None] = lambda link: None

    # What links tell

    def link_control(self, link: Link, message: ControlMessage) -> None:
        if link in self._refused:
            return  # it is being shown out
        match message:
            case Hello():
                self._hello(link, message)
            case Authority():
                self._show_authority(link)
            case Drain():
                self._drain(link)
            case Health():
                self._health(link, message)
            case Welcome() | Refuse() | Grow() | Drained() | Unknown():
                logger.debug("< {!r}: unexpected {}", link, message.type)

    def link_slot_free(self, link: Link, leg: StreamLeg) -> None:
        if link.session is not None:
            self._registry.slot_freed(link.session, link, self._loop.time())

    def link_slots_allowed(self, link: Link) -> None:
        if link.session is not None:
            self._registry.slots_allowed(link.session, self._loop.time(), link)

    def link_moved(self, link: Link) -> None:
        allowed = link.engine.address_changes
        if allowed is not None and link.address_changes == allowed - 1 and link.session is not None:
            # In time: the client dials another link beside it, and this one ends when nothing is under way on it.
            link.send_control(Drain(again=True))

    def link_refused(self, link: Link) -> None:
        if link.session is not None:
            self._registry.refused(link, self._loop.time())

    def link_closed(self, link: Link, why: LinkClosed) -> None:
        self._asked.discard(link)
        closer = self._refused.pop(link, None)
        if closer is not None:
            closer.cancel()
        session = self._registry.unregister(link, self._loop.time())
        if session is not None:
            self._hosts.ended(session)
            seconds = self._loop.time() - session.since
            logger.info(
                "session {} of tunnel {} ended after {:.0f} s: {}", session.number, session.tunnel.name, seconds, why
            )

    # Registration

    def _show_authority(self, link: Link) -> None:
        # Kilobytes for a few bytes, before any token: one answer is all that a client needs.
        if link in self._asked or link.session is not None:
            self._refuse(link, Refuse("protocol", "one link asks for the authority once, and says nothing else"))
            return
        self._asked.add(link)
        link.send_control(self.authority)

    def _hello(self, link: Link, hello: Hello) -> None:
        if link.session is not None:
            self._refuse(link, Refuse("protocol", "one link says hello once"))
            return
        try:
            grant, hosts = self._admit(hello)
        except _Refused as refused:
            logger.warning(
                "refused {} for tunnel {!r}: {}", _place(link), hello.tunnel[:_SHOWN] or "(any)", refused.message.text
            )
            self._refuse(link, refused.message)
            return
        name = grant.tunnel
        known = self._registry.tunnels.get(name)
        begins = known is None or hello.session not in known.sessions
        try:
            session = self._registry.register(
                grant, hello.session, hello.agent[:_SHOWN], hello.link, link, self._loop.time()
            )
        except TunnelError as error:
            self._refuse(link, Refuse("limit", error.details, final=False, retry_after=5.0))
            return
        session.capabilities = frozenset(hello.capabilities)
        session.weight = hello.weight
        session.tunnel.sticky = hello.sticky if hello.sticky in STICKY else ""
        self._hosts.register(session, hosts)
        self._recheck_by(grant.expires)
        self.on_accepted(link)
        urls = self._public_urls(name, hosts)
        link.send_control(
            Welcome(
                name,
                urls,
                self._registry.limits.max_links,
                f"quictunnel/{__version__}",
                worker=self._worker,
                workers=self._workers,
            )
        )
        if begins:
            logger.info(
                "session {} serves tunnel {} from {} by token {} ({})",
                session.number, " and ".join([name, *hosts]), _place(link), grant.token_id,
                session.agent or "unnamed client",
            )  # fmt: skip
        self._registry.slots_allowed(session, self._loop.time())

    def _admit(self, hello: Hello) -> tuple[Grant, tuple[str, ...]]:
        """What the client may serve, custom hosts apart, and now has. Raises _Refused."""
        if self.draining:
            raise _Refused("draining", "the server is stopping", retry_after=self._retry_after)
        if hello.version != VERSION:
            raise _Refused(
                "version", f"the server speaks version {VERSION} of the protocol, the client {hello.version}"
            )
        if not 16 <= len(hello.session) <= _SESSION_ID_LIMIT:
            raise _Refused("protocol", "a session id has 16 to 128 characters")
        if not 1 <= hello.weight <= WEIGHT_LIMIT:
            raise _Refused("protocol", f"a session's weight is 1 to {WEIGHT_LIMIT}")
        if hello.link >= self._registry.limits.max_links:
            raise _Refused("limit", f"a session has at most {self._registry.limits.max_links} links", retry_after=60.0)
        now = self._now()
        try:
            # A token that was made a moment ago must do.
            self._tokens.reload_if_changed()
            grant = self._tokens.verify(hello.token, hello.tunnel or self._name_for(hello), now)
        except TokenRefused as refused:
            raise _Refused(f"token_{refused.kind}", refused.text) from None
        except TrustError as error:
            logger.error("{}", error)
            raise _Refused("unavailable", "the server cannot check tokens now", retry_after=5.0) from None
        try:
            hosts = custom_hosts(hello.hosts, grant, self._domain)
        except HostRefused as refused:
            raise _Refused(refused.code, str(refused)) from None
        fleeting = self._is_made_up(grant.tunnel, hello)
        self._claim(Claim(grant.token_id, grant.tunnel, hosts, fleeting, self._others(grant, hello)))
        return grant, hosts

    def _others(self, grant: Grant, hello: Hello) -> set[str]:
        """The hosts that other sessions of the tunnel serve."""
        tunnel = self._registry.tunnels.get(grant.tunnel)
        if tunnel is None or not self._hosts.has_any(tunnel):
            return set()  # without a look at each of them
        sessions = tunnel.sessions.values()
        mine = [each for each in sessions if each.grant.token_id == grant.token_id and each.id != hello.session]
        return {host for session in mine for host in session.hosts}

    def _claim(self, claim: Claim) -> None:
        """Have the names be the client's token's, or find that they are. Raises _Refused."""
        for host in claim.hosts:
            other = self._hosts.holder(host)
            if other is not None and other.name != claim.tunnel and other.is_served():
                owner = other.owner
                if owner is not None and owner.token_id == claim.token:
                    text = f"the host {host} is served by tunnel {other.name} of the same token now"
                    raise _Refused("name_taken", text, retry_after=5.0)
        try:
            self._book.claim(claim, self._is_in_use)
        except NameTaken as taken:
            raise _Refused("name_taken", str(taken)) from None
        except NamesFull as full:
            raise _Refused("limit", str(full), retry_after=60.0) from None
        except TrustError as error:
            logger.error("{}", error)
            raise _Refused("unavailable", "the server cannot look names up now", retry_after=1.0) from None
        tunnel = self._registry.tunnels.get(claim.tunnel)
        if tunnel is not None:
            # At once, so that not one request for the new owner goes to the old one.
            self._end_others(tunnel, claim.token)

    def _is_in_use(self, name: str) -> bool:
        tunnel = self._registry.tunnels.get(name)
        return tunnel is not None and bool(tunnel.sessions)

    def _name_for(self, hello: Hello) -> str:
        """A name for a client that asks for none: its token's first pattern, with a word of the session's for ``*``.

        The token is not verified yet: whoever brings a wrong one is refused for that next, whatever name this gives.
        """
        return self._pattern_of(hello).replace("*", made_up_word(hello.session))

    def _pattern_of(self, hello: Hello) -> str:
        token = self._tokens.get(hello.token[4:12])  # qtk_ID_…
        return "*" if token is None else token.tunnels[0]

    def _is_made_up(self, name: str, hello: Hello) -> bool:
        """Whether the name is what ``_name_for`` gives this session, and no other."""
        return "*" in self._pattern_of(hello) and name == self._name_for(hello)

    # The end of a registration

    def _drain(self, link: Link) -> None:
        session: Session | None = link.session
        # What has been given a slot opens its stream first: the client counts on every stream being in the number.
        link.flush()
        link.send_control(Drained(link.opened))
        if session is not None:
            logger.info("session {} of tunnel {}: the client drains a link", session.number, session.tunnel.name)
        self._registry.drain(link)

    def _health(self, link: Link, health: Health) -> None:
        session: Session | None = link.session
        if session is None:
            return
        text = escape(health.text[:_SHOWN])
        if session.healthy != health.healthy:
            logger.warning(
                "session {} of tunnel {}: its backend is {}",
                session.number, session.tunnel.name, "well again" if health.healthy else f"unhealthy: {text}",
            )  # fmt: skip
        self._registry.health(session, health.healthy, text)
        if health.healthy:
            self._registry.slots_allowed(session, self._loop.time())

    def recheck_tokens(self) -> None:
        """End the sessions whose token is not good any more; called every second."""
        try:
            self._tokens.reload_if_changed()
        except TrustError as error:
            logger.error("{}", error)
            return
        # Only another file or time makes a token bad, and there may be very many sessions.
        if self._tokens.loads == self._rechecked and (self._recheck_at is None or self._now() < self._recheck_at):
            return
        self._rechecked, self._recheck_at = self._tokens.loads, None
        for tunnel in list(self._registry.tunnels.values()):
            self._recheck(tunnel)

    def _recheck(self, tunnel: Tunnel) -> None:
        for session in list(tunnel.sessions.values()):
            try:
                self._recheck_session(session)
            except TrustError:
                return  # said once, when the file was read
            except TokenRefused as refused:
                self._end_session(session, Refuse(f"token_{refused.kind}", refused.text))

    def _recheck_session(self, session: Session) -> None:
        """Raises TokenRefused when its token does not allow it any more, and TrustError."""
        grant, now = session.grant, self._now()
        self._recheck_by(self._tokens.recheck(grant, now))
        for host in session.hosts:
            if not self._tokens.holds(grant.token_id, "host", host, now):
                raise TokenRefused("scope", f"token {grant.token_id} is not for the host {host}")

    def _recheck_by(self, expires: datetime | None) -> None:
        """A token is good until then."""
        if expires is not None and (self._recheck_at is None or expires < self._recheck_at):
            self._recheck_at = expires

    def _end_others(self, tunnel: Tunnel, token: str) -> None:
        """End a tunnel's sessions of other tokens: the name has passed to this one."""
        if tunnel.owner is not None and tunnel.owner.token_id == token:
            return  # this was done when it came to be so, and none of another has come since
        for session in list(tunnel.sessions.values()):
            if session.grant.token_id == token:
                continue
            text = f"the name {tunnel.name} was given free, and belongs to another token now"
            message = Refuse("name_taken", text)
            try:
                self._tokens.recheck(session.grant, self._now())
            except TokenRefused as refused:
                message = Refuse(f"token_{refused.kind}", refused.text)
            except TrustError:
                pass
            self._end_session(session, message)

    def _end_session(self, session: Session, message: Refuse) -> None:
        logger.warning("session {} of tunnel {} is ended: {}", session.number, session.tunnel.name, message.text)
        self._registry.end(session, self._loop.time())
        self._hosts.ended(session)
        for link in [*session.links.values(), *session.lingering]:
            link.draining = True
            self._refuse(link, message)

    def drain_all(self, *, again: bool = False) -> None:
        """Tell every client to dial anew, or ``again`` the same address. The links there are go on being used."""
        if self.draining:
            return
        self.draining = True
        self._retry_after = _AGAIN_AFTER if again else _RETRY_AFTER
        for session in self._registry.sessions():
            for link in session.links.values():
                link.send_control(Drain(again))

    def go_on(self) -> None:
        """Take clients in as before."""
        self.draining = False

    def _refuse(self, link: Link, message: Refuse) -> None:
        if link.closed is None and link not in self._refused:
            link.send_control(message)
            self._refused[link] = self._loop.call_later(_REFUSAL_TIME, link.close, ErrorCode.NOT_ACCEPTED, message.text)

    def close(self) -> None:
        """Drop the timers."""
        for handle in self._refused.values():
            handle.cancel()
        self._refused.clear()


class _Refused(Exception):
    def __init__(self, code: str, text: str, retry_after: float | None = None) -> None:
        self.message = Refuse(code, text, final=retry_after is None, retry_after=retry_after)
        super().__init__(text)


def _place(link: Link) -> str:
    return host_and_port(*link.address[:2])
