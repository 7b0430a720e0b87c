"""The public side: sockets that visitors come in by, and all their connections together."""

import asyncio
import ipaddress
import socket
from collections.abc import Callable, Iterable, Sequence
from email.utils import formatdate
from typing import Final, TypeAlias

from quictunnel.http.end_watch import EndWatch
from quictunnel.http.handshakes import TlsListener
from quictunnel.http.limits import VisitorLimits
from quictunnel.http.tls import VisitorTls, asked_host
from quictunnel.http.visitor_connection import VisitorConnection
from quictunnel.http.visitor_leg import VisitorLeg
from quictunnel.http.visitor_output import VisitorOutput
from quictunnel.wire.credit import WindowBudget
from quictunnel.wire.errors import ErrorCode, TunnelError
from quictunnel.wire.fields import Forwarding
from quictunnel.wire.frames import RequestHead

__all__ = ["OpenExchange", "VisitorLeg", "VisitorLimits", "VisitorListener"]

OpenExchange: TypeAlias = Callable[[RequestHead, VisitorLeg], None]
"Joins the leg to another one, or aborts it; hands over nothing. See ``visitor_leg``."

_Network: TypeAlias = ipaddress.IPv4Network | ipaddress.IPv6Network

# Longest time, in seconds, between two looks at the deadlines; it is also how old a Date may be.
_SWEEP: Final = 1.0
# How many connections beyond the limit are told so; those beyond that are only closed.
_TOLD: Final = 256
_BACKLOG: Final = 2048
# Seconds for which an idle connection is kept when the server stops: the way of a request that was sent just then.
_LINGER: Final = 2.0


class VisitorListener:
    """Listens for visitors, and owns their connections."""

    in_flight: int
    "exchanges under way"

    def __init__(
        self,
        open_exchange: OpenExchange,
        limits: VisitorLimits,
        trusted_proxies: Iterable[_Network] = (),
        on_done: Callable[[VisitorLeg], None] = lambda leg: None,
        budget: WindowBudget | None = None,
    ) -> None:
        """Make it within a running event loop. ``budget`` is what the windows of HTTP/2 uploads grow out of.

        ``on_done`` is called once for each leg when its exchange is over; the leg of bytes that were refused before
        they were a request has no head, and ``open_exchange`` never saw it.
        """
        self._open_exchange = open_exchange
        self.in_flight = 0
        self._on_done = on_done
        self.budget = budget or WindowBudget(0)
        self.draining = False
        self.date = b""
        self.loop = asyncio.get_running_loop()
        self.end_watch = EndWatch(self.loop)
        self._servers: list[asyncio.Server | TlsListener] = []
        self._connections: set[VisitorOutput] = set()
        self._unflushed: list[VisitorOutput] = []
        self._empty = asyncio.Event()
        self._empty.set()
        self._sweeper: asyncio.TimerHandle | None = None
        self.change(limits, trusted_proxies)
        self._sweep()

    def __repr__(self) -> str:
        return f"<VisitorListener {len(self._connections)} connections{' draining' if self.draining else ''}>"

    def __len__(self) -> int:
        """How many connections there are."""
        return len(self._connections)

    def change(self, limits: VisitorLimits, trusted_proxies: Iterable[_Network]) -> None:
        """Have other limits from now on; what a connection may send is said to new ones only."""
        self.limits = limits
        self._trusted = tuple(trusted_proxies)
        times = (limits.head_time, limits.idle_time, limits.body_idle_time, limits.write_idle_time)
        self._interval = min(_SWEEP, min(times) / 4)
        for server in self._servers:
            if isinstance(server, TlsListener):
                server.handshake_time, server.shutdown_time = limits.head_time, limits.write_idle_time

    async def start(
        self,
        host: str,
        port: int,
        *,
        tls: VisitorTls | None = None,
        reuse_port: bool = False,
        sockets: Sequence[socket.socket] = (),
    ) -> list[tuple[str, int]]:
        """Listen on one more address; the addresses bound, more than one for a host that has several.

        ``sockets`` that listen at it already are taken over. Raises OSError for an address that cannot be bound.
        """
        if tls is not None:
            listener = TlsListener(
                tls,
                lambda: VisitorConnection(self),
                handshake_time=self.limits.head_time,
                shutdown_time=self.limits.write_idle_time,
                is_full=lambda: len(self._connections) >= self.limits.connections + _TOLD,
                on_idle=self._look_if_empty,
            )
            self._servers.append(listener)
            return await listener.start(host, port, reuse_port=reuse_port, sockets=sockets)
        if sockets:
            for sock in sockets:
                server = await self.loop.create_server(lambda: VisitorConnection(self), sock=sock, backlog=_BACKLOG)
                self._servers.append(server)
            return [sock.getsockname()[:2] for sock in sockets]
        server = await self.loop.create_server(
            lambda: VisitorConnection(self), host, port, backlog=_BACKLOG, reuse_port=reuse_port or None
        )
        self._servers.append(server)
        return [sock.getsockname()[:2] for sock in server.sockets]

    @property
    def linger_time(self) -> float:
        """How long, in seconds, a connection stays when the server stops and nothing happens on it."""
        return min(_LINGER, self.limits.idle_time)

    @property
    def idle_time(self) -> float:
        """How long, in seconds, a connection stays on which nothing happens."""
        return self.linger_time if self.draining else self.limits.idle_time

    def sockets(self, *, tls: bool) -> list[int]:
        """The descriptors of the sockets it listens at, with or without TLS."""
        return [
            sock.fileno()
            for server in self._servers
            if isinstance(server, TlsListener) == tls
            for sock in server.sockets
        ]

    def drain(self) -> None:
        """Accept no more, and let each connection's current exchange, or the next one if it comes soon, be its last."""
        if self.draining:
            return
        self.draining = True
        for server in self._servers:
            if isinstance(server, TlsListener):
                server.drain()
            else:
                server.close()
        for connection in list(self._connections):
            connection.drain()
        if self._handshakes:
            self._empty.clear()

    @property
    def _handshakes(self) -> int:
        return sum(len(server) for server in self._servers if isinstance(server, TlsListener))

    async def wait_idle(self, grace: float) -> bool:
        """Wait up to ``grace`` seconds for the last connection to be gone; whether it is."""
        try:
            async with asyncio.timeout(grace):
                await self._empty.wait()
        except TimeoutError:
            return False
        return True

    def close(self) -> None:
        """Cut what is left, at once."""
        self.drain()
        for server in self._servers:
            server.close()
        if self._sweeper is not None:
            self._sweeper.cancel()
            self._sweeper = None
        self.end_watch.close()
        for connection in list(self._connections):
            connection.abort()

    # What connections tell

    def forwarding(self, address: str, scheme: bytes) -> Forwarding:
        """What backends are told of a connection from ``address``."""
        return Forwarding(address, scheme, trusted=bool(self._trusted) and self._is_trusted(address))

    def admit(self, connection: VisitorOutput) -> bool:
        """Count a new connection in; False if it is one too many, and has to be told."""
        connections = self._connections
        connections.add(connection)
        self._empty.clear()
        if len(connections) > self.limits.connections + _TOLD:
            connection.abort()
        return len(connections) <= self.limits.connections

    def replace(self, connection: VisitorOutput, other: VisitorOutput) -> None:
        """``other`` goes on with the socket of ``connection``."""
        self._connections.discard(connection)
        self._connections.add(other)

    def forget(self, connection: VisitorOutput) -> None:
        """A connection is gone."""
        self._connections.discard(connection)
        self._look_if_empty()

    def _look_if_empty(self) -> None:
        if not self._connections and not (self.draining and self._handshakes):
            self._empty.set()

    def held_to(self, address: str, transport: asyncio.BaseTransport) -> str:
        """The one host that a connection may ask for, empty for any: that of its handshake.

        A trusted proxy names the server that it dialled, not what its own visitors ask for (RFC 9110 section 7.4).
        """
        host = asked_host(transport.get_extra_info("ssl_object"))
        return "" if host and self._trusted and self._is_trusted(address) else host

    def begin(self, head: RequestHead, leg: VisitorLeg, held_to: str) -> None:
        """A request has come, on a connection that is held to that host."""
        self.in_flight += 1
        if held_to and leg.host != held_to:
            # Its certificate may be good for both (a wildcard): then another handshake is all that is missing, and any
            # client may do that, whatever the method (RFC 9110 section 15.5.20).
            leg.abort(TunnelError(ErrorCode.MISDIRECTED, f"This TLS connection is for {ascii(held_to)[1:-1]}."))
        else:
            self._open_exchange(head, leg)

    def done(self, leg: VisitorLeg) -> None:
        """An exchange is over."""
        if leg.head is not None:
            self.in_flight -= 1
        self._on_done(leg)

    def flush_soon(self, connection: VisitorOutput) -> None:
        """Flush a connection at the end of the loop's turn: one callback for all of them."""
        if not self._unflushed:
            self.loop.call_soon(self._flush)
        self._unflushed.append(connection)

    def _flush(self) -> None:
        connections, self._unflushed = self._unflushed, []
        for connection in connections:
            connection.flushed()

    def _sweep(self) -> None:
        self._sweeper = self.loop.call_later(self._interval, self._sweep)
        self.date = formatdate(usegmt=True).encode("ascii")
        now = self.loop.time()
        for connection in list(self._connections):
            if now >= connection.deadline or now >= connection.write_deadline:
                connection.expire(now)
            else:
                connection.look_if_held()

    def _is_trusted(self, address: str) -> bool:
        try:
            ip = ipaddress.ip_address(address.partition("%")[0])
        except ValueError:
            return False
        if isinstance(ip, ipaddress.IPv6Address):
            # A dual-stack socket shows an IPv4 visitor so.
            ip = ip.ipv4_mapped or ip
        return any(ip in network for network in self._trusted)
