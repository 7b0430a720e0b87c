"""What every backend on sockets has: exchanges and connections, dials, one clock for all, and an orderly end."""

import asyncio
import ssl
from typing import Final, Generic, Protocol, TypeVar

from quictunnel.http.dial import Dialler
from quictunnel.http.limits import OriginLimits
from quictunnel.wire.errors import ErrorCode, TunnelError

__all__ = ["OriginPool", "PooledConnection", "PooledLeg"]

# Seconds for the event loop to close what has been aborted.
_CLOSING_TIME: Final = 1.0
_SWEEP_PERIOD: Final = 1.0


class PooledLeg(Protocol):
    """One exchange, as its pool knows it."""

    def cut(self, error: TunnelError) -> None:
        """End the exchange from here, and tell the peer."""


class PooledConnection(Protocol):
    """One connection, as its pool knows it."""

    @property
    def deadline(self) -> float:
        """Event-loop time at which ``expire`` is to be called."""

    def expire(self) -> None:
        """``deadline`` has passed."""

    def drop(self) -> None:
        """Close at once."""


L = TypeVar("L", bound=PooledLeg)
C = TypeVar("C", bound=PooledConnection)


class OriginPool(Generic[L, C]):
    """The connections to one backend. Made within a running event loop; a timer sweeps only while there are any."""

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
        self.limits = limits or OriginLimits()
        self.dialler = Dialler(
            host,
            port,
            path=path,
            tls=tls,
            server_hostname=server_hostname,
            authority=authority,
            connect_time=self.limits.connect_time,
        )
        self.name = self.dialler.name
        self.authority = self.dialler.authority
        self.host = self.authority.encode("ascii")
        self._connections: set[C] = set()
        self._legs: set[L] = set()
        self._dials: set[asyncio.Task[None]] = set()
        self._sweeper: asyncio.TimerHandle | None = None
        self._waiter: asyncio.Future[None] | None = None
        self.closing = False
        limit = self.limits
        shortest = min(limit.head_time, limit.idle_keep_alive, limit.half_close_time, limit.body_idle_time or 60.0)
        self._period = min(_SWEEP_PERIOD, shortest / 4)

    def __repr__(self) -> str:
        return (
            f"<{type(self).__name__} {self.name} in_flight={len(self._legs)} connections={len(self._connections)} "
            f"dials={len(self._dials)}>"
        )

    async def aclose(self, grace: float = 0.0) -> None:
        """Take no new request, let what is in flight finish for ``grace`` seconds, cut the rest, close all."""
        self.closing = True
        self._close_idle()
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
        """Open connections, idle ones included."""
        return len(self._connections)

    @property
    def dials(self) -> int:
        """Connections being made."""
        return len(self._dials)

    # What legs and connections call

    def made(self, connection: C) -> None:
        """The connection is open."""
        self._connections.add(connection)
        self._watch()

    def lost(self, connection: C) -> None:
        """The connection is closed."""
        self._connections.discard(connection)
        self._tell_waiter()

    def started(self, leg: L) -> None:
        """An exchange began."""
        self._legs.add(leg)

    def ended(self, leg: L) -> None:
        """An exchange that began is over."""
        self._legs.discard(leg)
        if self._waiter is not None:
            self._tell_waiter()

    # What a pool of its own kind says

    def _close_idle(self) -> None:
        """Close the connections that serve nothing."""
        raise NotImplementedError

    # The tasks that dial, and the clock

    def _own(self, task: "asyncio.Task[None]") -> None:
        self._dials.add(task)
        task.add_done_callback(self._dialled)

    def _dialled(self, task: "asyncio.Task[None]") -> None:
        self._dials.discard(task)
        self._tell_waiter()

    def _watch(self) -> None:
        if self._sweeper is None:
            self._sweeper = asyncio.get_running_loop().call_later(self._period, self._sweep)

    def _sweep(self) -> None:
        self._sweeper = None
        now = asyncio.get_running_loop().time()
        for connection in [each for each in self._connections if each.deadline <= now]:
            connection.expire()
        if self._is_busy():
            self._watch()

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
