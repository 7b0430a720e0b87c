"""A backend that speaks HTTP/1.1 on sockets: its kept connections, its dials, and the clock that ends waits.

No task, queue, future or timer is made for a request that finds a kept connection; a dial is one task, and one timer
for all connections looks at their deadlines.
"""

import asyncio
import errno
import ipaddress
import re
import socket
import ssl
from typing import Any, Final

from quictunnel.http.origin_connection import OriginConnection, OriginLimits
from quictunnel.http.origin_leg import OriginLeg
from quictunnel.wire.errors import ErrorCode, TunnelError

__all__ = ["Origin", "OriginLeg", "OriginLimits"]

# RFC 8305 section 8
_SECOND_ADDRESS_DELAY: Final = 0.25
# Seconds for a TLS connection to say goodbye.
_TLS_GOODBYE: Final = 5.0
# Seconds for the event loop to close what has been aborted.
_CLOSING_TIME: Final = 1.0
_SWEEP_PERIOD: Final = 1.0

_BY_ERRNO: Final = {
    errno.ECONNREFUSED: ErrorCode.CONNECTION_REFUSED,
    errno.ENOENT: ErrorCode.CONNECTION_REFUSED,  # no such unix socket
    errno.EACCES: ErrorCode.CONNECTION_REFUSED,  # a unix socket of somebody else
    errno.ENOTSOCK: ErrorCode.CONNECTION_REFUSED,
    errno.EAGAIN: ErrorCode.CONNECTION_REFUSED,  # a unix socket whose backlog is full
    errno.ETIMEDOUT: ErrorCode.CONNECTION_TIMEOUT,
    errno.ENETUNREACH: ErrorCode.DESTINATION_IP_UNROUTABLE,
    errno.EHOSTUNREACH: ErrorCode.DESTINATION_IP_UNROUTABLE,
    errno.EADDRNOTAVAIL: ErrorCode.DESTINATION_IP_UNROUTABLE,
    errno.EMFILE: ErrorCode.CONNECTION_LIMIT_REACHED,
    errno.ENFILE: ErrorCode.CONNECTION_LIMIT_REACHED,
}


class Origin:
    """The connections to one backend. Made within a running event loop; ``open`` gives a leg for each exchange."""

    def __init__(
        self,
        host: str = "localhost",
        port: int = 80,
        *,
        path: str | None = None,
        tls: ssl.SSLContext | None = None,
        server_hostname: str | None = None,
        authority: str = "",
        limits: OriginLimits | None = None,
    ) -> None:
        """Dial ``host`` and ``port``, or the unix socket at ``path``; nothing is dialled before the first request.

        ``server_hostname`` is the name that the backend's certificate must hold, ``host`` if None. ``authority`` is the
        Host that the backend knows itself by, and that it gets with requests that name none.
        """
        self._address = (host, port)
        self._path = path
        self._tls = tls
        self._server_hostname = server_hostname
        self.limits = limits or OriginLimits()
        place = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        self.name = f"unix:{path}" if path else f"{'https' if tls else 'http'}://{place}"
        self.authority = authority or ("localhost" if path else place)
        self.host = self.authority.encode("ascii")
        self._connections: set[OriginConnection] = set()
        self._kept: dict[OriginConnection, None] = {}
        self._legs: set[OriginLeg] = set()
        self._dials: set[asyncio.Task[None]] = set()
        self._sweeper: asyncio.TimerHandle | None = None
        self._waiter: asyncio.Future[None] | None = None
        self._closing = False
        limit = self.limits
        shortest = min(limit.head_time, limit.idle_keep_alive, limit.half_close_time, limit.body_idle_time or 60.0)
        self._period = min(_SWEEP_PERIOD, shortest / 4)

    def __repr__(self) -> str:
        return (
            f"<Origin {self.name} in_flight={len(self._legs)} connections={len(self._connections)} "
            f"kept={len(self._kept)} dials={len(self._dials)}>"
        )

    def open(self) -> OriginLeg:
        """A fresh leg: join it, then let it receive a RequestHead."""
        return OriginLeg(self)

    async def aclose(self, grace: float = 0.0) -> None:
        """Take no new request, let what is in flight finish for ``grace`` seconds, cut the rest, close all."""
        self._closing = True
        for connection in list(self._kept):
            self._discard(connection)
        await self._until_idle(grace)
        for leg in list(self._legs):
            leg.cut(TunnelError(ErrorCode.CONNECTION_TERMINATED, "the client is leaving"))
        for task in self._dials:
            task.cancel()
        await asyncio.gather(*self._dials, return_exceptions=True)
        for connection in list(self._connections):
            connection.drop()
        await self._until_idle(_CLOSING_TIME)
        if self._sweeper is not None:
            self._sweeper.cancel()
            self._sweeper = None

    # Counts

    @property
    def in_flight(self) -> int:
        """Exchanges that have begun and are not over."""
        return len(self._legs)

    @property
    def connections(self) -> int:
        """Open connections, the kept ones included."""
        return len(self._connections)

    @property
    def kept(self) -> int:
        """Connections that wait for a request."""
        return len(self._kept)

    @property
    def dials(self) -> int:
        """Connections being made."""
        return len(self._dials)

    # What legs and connections call

    def take(self) -> OriginConnection | None:
        while self._kept:
            # The one used last: the others grow old and are closed, so there are never more than are needed.
            connection, _ = self._kept.popitem()
            if not connection.transport.is_closing():
                return connection
        return None

    def dial(self, leg: OriginLeg) -> None:
        if self._closing:
            leg.fail(TunnelError(ErrorCode.NOT_ACCEPTED))
            return
        task = asyncio.get_running_loop().create_task(self._dial(leg), name="dial")
        self._dials.add(task)
        task.add_done_callback(self._dialled)
        leg.dialling = task

    def keep(self, connection: OriginConnection) -> None:
        if self._closing or len(self._kept) >= self.limits.idle_connections:
            connection.close()
            return
        self._kept[connection] = None
        connection.deadline = connection.loop.time() + self.limits.idle_keep_alive

    def made(self, connection: OriginConnection) -> None:
        self._connections.add(connection)
        self._watch()

    def lost(self, connection: OriginConnection) -> None:
        self._connections.discard(connection)
        self._kept.pop(connection, None)
        self._tell_waiter()

    def started(self, leg: OriginLeg) -> None:
        self._legs.add(leg)

    def ended(self, leg: OriginLeg) -> None:
        self._legs.discard(leg)
        if self._waiter is not None:
            self._tell_waiter()

    # Dialling

    async def _dial(self, leg: OriginLeg) -> None:
        try:
            async with asyncio.timeout(self.limits.connect_time):
                connection = await self._connect()
        except Exception as error:
            leg.dialling = None
            leg.fail(self._dial_error(error))
            return
        leg.dialling = None
        leg.connected(connection)

    async def _connect(self) -> OriginConnection:
        loop = asyncio.get_running_loop()
        options: dict[str, Any] = {}
        if self._tls is not None:
            options["ssl"] = self._tls
            options["server_hostname"] = self._server_hostname or self._address[0]
            options["ssl_handshake_timeout"] = 2 * self.limits.connect_time  # never the first to fire
            options["ssl_shutdown_timeout"] = _TLS_GOODBYE
        if self._path is not None:
            _, connection = await loop.create_unix_connection(self._connection, self._path, **options)
            return connection
        host, port = self._address
        # Not where it can't help: asyncio's race leaves sockets to the garbage collector when it is cancelled, as
        # visitors who go away cancel it. uvloop has none, and tries one address after the other.
        if isinstance(loop, asyncio.BaseEventLoop) and host != "localhost" and not _is_address(host):
            options["happy_eyeballs_delay"] = _SECOND_ADDRESS_DELAY
        try:
            _, connection = await loop.create_connection(self._connection, host, port, **options)
        except OSError as error:
            if host != "localhost" or _errno(error) != errno.ECONNREFUSED:
                raise
            # The name means both loopbacks (RFC 6761 section 6.3), but many hosts files know one of them only, and many
            # a development server listens on the other.
            _, connection = await loop.create_connection(self._connection, "::1", port, **options)
        return connection

    def _connection(self) -> OriginConnection:
        return OriginConnection(self)

    def _dialled(self, task: asyncio.Task[None]) -> None:
        self._dials.discard(task)
        self._tell_waiter()

    def _dial_error(self, error: Exception) -> TunnelError:
        if isinstance(error, TimeoutError):
            return TunnelError(ErrorCode.CONNECTION_TIMEOUT)
        if isinstance(error, socket.gaierror):
            return TunnelError(ErrorCode.DNS_ERROR)
        if isinstance(error, ssl.SSLCertVerificationError):
            return TunnelError(ErrorCode.TLS_CERTIFICATE_ERROR)
        if isinstance(error, ssl.SSLError):
            return TunnelError(ErrorCode.TLS_ERROR)
        if isinstance(error, OSError):
            code = _BY_ERRNO.get(_errno(error))
            if code is not None:
                return TunnelError(code)
            # The connection stood when it was lost, so it is the handshake that failed.
            return TunnelError(ErrorCode.TLS_ERROR if self._tls else ErrorCode.CONNECTION_TERMINATED)
        return TunnelError(ErrorCode.INTERNAL_ERROR, f"dialling the backend failed with {type(error).__name__}")

    # The clock

    def _watch(self) -> None:
        if self._sweeper is None:
            self._sweeper = asyncio.get_running_loop().call_later(self._period, self._sweep)

    def _sweep(self) -> None:
        self._sweeper = None
        now = asyncio.get_running_loop().time()
        for connection in [each for each in self._connections if each.deadline <= now]:
            if connection in self._kept:
                self._discard(connection)
            else:
                connection.expire()
        if self._connections:
            self._watch()

    def _discard(self, connection: OriginConnection) -> None:
        self._kept.pop(connection, None)
        connection.close()

    # The end

    async def _until_idle(self, limit: float) -> None:
        if limit <= 0 or not self._is_busy():
            return
        self._waiter = asyncio.get_running_loop().create_future()
        await asyncio.wait([self._waiter], timeout=limit)
        self._waiter = None

    def _is_busy(self) -> bool:
        return bool(self._legs or self._connections or self._dials)

    def _tell_waiter(self) -> None:
        if self._waiter is not None and not self._waiter.done() and not self._is_busy():
            self._waiter.set_result(None)


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def _errno(error: OSError) -> int:
    # Several addresses that fail each in its own way come as one error without a number, its text made of theirs.
    found = re.search(r"\[Errno (\d+)\]", str(error))
    return error.errno or (int(found[1]) if found else 0)
