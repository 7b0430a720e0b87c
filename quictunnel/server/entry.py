"""ProxyEntry: where a visitor's request becomes an exchange. Limit, route, choose, join; the rest is the two legs'.

When a client fails a request, it comes back here and is joined anew, if that is safe: see ``request_leg``.
"""

import re
import secrets
from collections.abc import Callable
from typing import Final, cast

from loguru import logger

from quictunnel.exchange import Leg, join
from quictunnel.http.visitor import VisitorLeg
from quictunnel.log import AccessLog
from quictunnel.quic.link import HEAD_LIMIT
from quictunnel.server.hosts import Hosts
from quictunnel.server.registry import Registry, Session, Tunnel
from quictunnel.server.request_leg import NO_BACKEND, Memory, RequestLeg
from quictunnel.wire.control import CONNECT_CAPABILITY
from quictunnel.wire.credit import WindowBudget
from quictunnel.wire.errors import ErrorCode, TunnelError
from quictunnel.wire.fields import tunnel_name
from quictunnel.wire.frames import RequestHead, ResponseHead
from quictunnel.wire.names import normalise_tunnel_name

__all__ = ["ProxyEntry"]

_COOKIE: Final = b"quictunnel-session"
_COOKIE_VALUE: Final = re.compile(rb"(?:^|;)[ \t]*quictunnel-session=([0-9a-f]{16})[ \t]*(?:;|$)")


class ProxyEntry:
    """Joins each request to a stream of the tunnel it is for."""

    def __init__(
        self,
        registry: Registry,
        hosts: Hosts,
        budget: WindowBudget,
        access: AccessLog,
        *,
        domain: str,
        default_tunnel: bool,
        clock: Callable[[], float],
    ) -> None:
        """``clock`` is the event loop's, in seconds."""
        self._registry = registry
        self._hosts = hosts
        self._budget = budget
        self._memory = Memory()
        self._access = access
        self._domain = domain
        self.default_tunnel = default_tunnel
        self._clock = clock
        # Ids are for reading logs: unique within a server's run and hard to mistake for another run's.
        self._id_prefix = secrets.token_hex(3)
        self._count = 0

    def open_exchange(self, head: RequestHead, visitor: VisitorLeg) -> None:
        """Join ``visitor`` to a stream leg, or abort it with what its visitor is to be told."""
        self._count += 1
        visitor.request_id = f"{self._id_prefix}{self._count:x}"
        try:
            tunnel = self._route(head, visitor)
            if head.method == b"CONNECT" and not tunnel.offers(CONNECT_CAPABILITY):
                raise TunnelError(ErrorCode.NOT_IMPLEMENTED, "CONNECT is not offered here.")
            leg = RequestLeg(self._budget, HEAD_LIMIT, self._again, self._memory)
            if tunnel.sticky:
                self._stick(tunnel, head, visitor, leg)
            self._registry.dispatch(tunnel, leg, self._clock())
        except TunnelError as error:
            visitor.abort(error)
            return
        visitor.tunnel = tunnel
        join(visitor, leg)

    # What a client fails

    def _again(self, leg: RequestLeg, peer: Leg, error: TunnelError) -> bool:
        """Give a request that failed before its answer to another link or session, if that is safe; whether it was."""
        visitor = cast(VisitorLeg, peer)
        tunnel: Tunnel = visitor.tunnel
        session, now = leg.session, self._clock()
        tried, may_wait = leg.tried, False
        if error.code in NO_BACKEND:
            if session is not None:
                session.fails(now)
                tried |= {session}
        elif error.code == ErrorCode.NOT_ACCEPTED:
            may_wait = True
            if session is not None:
                tried |= {session}
        elif error.code != ErrorCode.CONNECTION_TERMINATED or not (leg.unreached or leg.is_idempotent):
            return False
        elif leg.lost:
            may_wait = True  # for its client to come back
        elif session is not None:
            tried |= {session}  # its backend, or what is before it, ended the connection
        other = RequestLeg(self._budget, HEAD_LIMIT, self._again, self._memory)
        other.tried, other.failure = tried, error
        if not (may_wait or tunnel.choose_session(now, other)):
            return False
        join(visitor, other)
        leg.repeat_on(other)
        if other.peer is visitor and not self._registry.dispatch_again(tunnel, other, now, may_wait=may_wait):
            other.detach()
            return False
        logger.debug("= request {} goes to another link: {}", visitor.request_id, error)
        return True

    # Who belongs to whom

    def _stick(self, tunnel: Tunnel, head: RequestHead, visitor: VisitorLeg, leg: RequestLeg) -> None:
        if tunnel.sticky == "ip":
            leg.prefers = tunnel.session_of_address(visitor.client_address)
            return
        key = ""
        for name, value in head.fields:
            if name == b"cookie" and (found := _COOKIE_VALUE.search(value)):
                key = found[1].decode("ascii")
        leg.prefers = tunnel.session_of_key(key) if key else None
        visitor.amend = self._tell_cookie

    @staticmethod
    def _tell_cookie(visitor: VisitorLeg, head: ResponseHead) -> ResponseHead:
        """The answer with a cookie, where the session is not the one that the visitor brought the cookie of."""
        leg = cast(RequestLeg, visitor.peer)
        session: Session | None = leg.session
        if session is None or session is leg.prefers or visitor.head is None:
            return head
        secure = b"; Secure" if visitor.head.scheme == b"https" else b""
        cookie = b"%b=%b; Path=/; HttpOnly; SameSite=Lax%b" % (_COOKIE, session.key.encode("ascii"), secure)
        return head._replace(fields=[*head.fields, (b"set-cookie", cookie)])

    # The end

    def exchange_done(self, visitor: VisitorLeg) -> None:
        """The exchange is over for its visitor."""
        tunnel: Tunnel | None = visitor.tunnel
        if tunnel is not None:
            self._registry.finished(tunnel)
        access = self._access
        if access.enabled:
            error = visitor.error
            access.record(
                visitor.request_id,
                "" if tunnel is None else tunnel.name,
                visitor.method,
                visitor.target,
                visitor.status,
                visitor.bytes_in,
                visitor.bytes_out,
                self._clock() - visitor.started,
                visitor.client_address,
                "" if error is None else error.fault.proxy_status,
            )

    def _route(self, head: RequestHead, visitor: VisitorLeg) -> Tunnel:
        """The tunnel of a request: by host, then by X-Tunnel-Session, then the only one. Raises TunnelError."""
        # The host of a CONNECT is where its bytes are to go in the end, not who is to take them there.
        host = "" if head.method == b"CONNECT" else visitor.host
        if host:
            # No custom host is the domain or below it, so neither kind can come before the other.
            name = tunnel_name(host, self._domain)
            if name is not None:
                return self._named(name)
            tunnel = self._hosts.tunnel(host) if host != self._domain else None
            if tunnel is not None:
                return tunnel
        tunnel_header = visitor.tunnel_header
        if tunnel_header:
            try:
                name = normalise_tunnel_name(tunnel_header.decode("ascii", "replace"))
            except ValueError:
                raise TunnelError(ErrorCode.DESTINATION_NOT_FOUND, "X-Tunnel-Session is not a tunnel's name") from None
            return self._named(name)
        if self.default_tunnel:
            tunnel = self._registry.only_tunnel()
            if tunnel is not None:
                return tunnel
        raise TunnelError(
            ErrorCode.DESTINATION_NOT_FOUND, "The request names no tunnel, by its Host or by X-Tunnel-Session."
        )

    def _named(self, name: str) -> Tunnel:
        tunnel = self._registry.tunnel(name) if "." not in name else None
        if tunnel is None:
            raise TunnelError(ErrorCode.DESTINATION_NOT_FOUND)
        return tunnel
