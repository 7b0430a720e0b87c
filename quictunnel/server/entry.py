"""ProxyEntry: where a visitor's request becomes an exchange. Limit, route, choose, join; the rest is the two legs'."""

import secrets
from collections.abc import Callable
from functools import lru_cache

from quictunnel.exchange import join
from quictunnel.http.visitor import VisitorLeg
from quictunnel.log import AccessLog
from quictunnel.quic.link import HEAD_LIMIT
from quictunnel.quic.stream import StreamLeg
from quictunnel.server.registry import Registry, Tunnel
from quictunnel.wire.control import CONNECT_CAPABILITY
from quictunnel.wire.credit import WindowBudget
from quictunnel.wire.errors import ErrorCode, TunnelError
from quictunnel.wire.frames import RequestHead
from quictunnel.wire.names import normalise_host, normalise_tunnel_name

__all__ = ["ProxyEntry"]


class ProxyEntry:
    """Joins each request to a stream of the tunnel it is for."""

    def __init__(
        self,
        registry: Registry,
        budget: WindowBudget,
        access: AccessLog,
        *,
        domain: str,
        default_tunnel: bool,
        clock: Callable[[], float],
    ) -> None:
        """``clock`` is the event loop's, in seconds."""
        self._registry = registry
        self._budget = budget
        self._access = access
        self._default_tunnel = default_tunnel
        self._clock = clock
        # Ids are for reading logs: unique within a server's run and hard to mistake for another run's.
        self._id_prefix = secrets.token_hex(3)
        self._count = 0
        self._label_of = lru_cache(maxsize=4096)(_Labels(domain))

    def open_exchange(self, head: RequestHead, visitor: VisitorLeg) -> None:
        """Join ``visitor`` to a stream leg, or abort it with what its visitor is to be told."""
        self._count += 1
        visitor.request_id = f"{self._id_prefix}{self._count:x}"
        try:
            tunnel = self._route(head, visitor.tunnel_header)
            if head.method == b"CONNECT" and not tunnel.offers(CONNECT_CAPABILITY):
                raise TunnelError(ErrorCode.NOT_IMPLEMENTED, "CONNECT is not offered here.")
            leg = StreamLeg(self._budget, HEAD_LIMIT, is_opener=True)
            self._registry.dispatch(tunnel, leg, self._clock())
        except TunnelError as error:
            visitor.abort(error)
            return
        visitor.tunnel = tunnel
        join(visitor, leg)

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

    def _route(self, head: RequestHead, tunnel_header: bytes) -> Tunnel:
        """The tunnel of a request: by host, then by X-Tunnel-Session, then the only one. Raises TunnelError."""
        # The host of a CONNECT is where its bytes are to go in the end, not who is to take them there.
        label: str = "" if head.method == b"CONNECT" else self._label_of(head.authority)
        if label:
            return self._named(label)
        if tunnel_header:
            try:
                name = normalise_tunnel_name(tunnel_header.decode("ascii", "replace"))
            except ValueError:
                raise TunnelError(ErrorCode.DESTINATION_NOT_FOUND, "X-Tunnel-Session is not a tunnel's name") from None
            return self._named(name)
        if self._default_tunnel:
            tunnel = self._registry.only_tunnel()
            if tunnel is not None:
                return tunnel
        raise TunnelError(
            ErrorCode.DESTINATION_NOT_FOUND, "The request names no tunnel, by its Host or by X-Tunnel-Session."
        )

    def _named(self, name: str) -> Tunnel:
        tunnel = self._registry.tunnel(name)
        if tunnel is None:
            raise TunnelError(ErrorCode.DESTINATION_NOT_FOUND)
        return tunnel


class _Labels:
    """The first label of ``NAME.<domain>``."""

    def __init__(self, domain: str) -> None:
        self._suffix = "." + domain

    def __call__(self, authority: bytes) -> str:
        """The name in an authority, empty if it isn't one below the domain."""
        host = authority.decode("ascii", "replace")
        if not host.endswith("]"):
            host = host.rpartition(":")[0] or host
        try:
            host = normalise_host(host)
        except ValueError:
            return ""
        if not host.endswith(self._suffix):
            return ""
        label = host[: -len(self._suffix)]
        # A deeper name is nobody's: it must not fall through to another tunnel.
        return label if "." not in label else label.replace(".", "..")
