"""A backend that speaks HTTP/1.1 on sockets: its kept connections, and its dials.

No task, queue, future or timer is made for a request that finds a kept connection; a dial is one task.
"""

import asyncio
from typing import Any

from quictunnel.http.end_watch import EndWatch
from quictunnel.http.limits import OriginLimits
from quictunnel.http.origin_connection import OriginConnection
from quictunnel.http.origin_leg import OriginLeg
from quictunnel.http.origin_pool import OriginPool
from quictunnel.wire.errors import ErrorCode, TunnelError

__all__ = ["Origin", "OriginLeg", "OriginLimits"]


class Origin(OriginPool[OriginLeg, OriginConnection]):
    """A backend; ``open`` gives a leg for each exchange."""

    def __init__(self, host: str = "localhost", port: int = 80, **options: Any) -> None:
        """As ``OriginPool``."""
        super().__init__(host, port, **options)
        self._kept: dict[OriginConnection, None] = {}
        self.end_watch = EndWatch(asyncio.get_running_loop())

    async def aclose(self, grace: float = 0.0) -> None:
        await super().aclose(grace)
        self.end_watch.close()

    def open(self) -> OriginLeg:
        """A fresh leg: join it, then let it receive a RequestHead."""
        return OriginLeg(self)

    @property
    def kept(self) -> int:
        """Connections that wait for a request."""
        return len(self._kept)

    # What legs and connections call

    def take(self) -> OriginConnection | None:
        """A kept connection, None if there is none."""
        while self._kept:
            # The one used last: the others grow old and are closed, so there are never more than are needed.
            connection, _ = self._kept.popitem()
            if not connection.transport.is_closing():
                return connection
        return None

    def dial(self, leg: OriginLeg) -> None:
        """Make a connection and call ``leg.connected`` with it, or ``leg.fail``; until then ``leg.dialling`` is set."""
        if self.closing:
            leg.fail(TunnelError(ErrorCode.NOT_ACCEPTED))
            return
        task = asyncio.get_running_loop().create_task(self._dial(leg), name="dial")
        self._own(task)
        leg.dialling = task

    def keep(self, connection: OriginConnection) -> None:
        """An exchange ended well: the connection may carry another one."""
        if self.closing or len(self._kept) >= self.limits.idle_connections:
            connection.close()
            return
        self._kept[connection] = None
        connection.deadline = connection.loop.time() + self.limits.idle_keep_alive

    def lost(self, connection: OriginConnection) -> None:
        self._kept.pop(connection, None)
        super().lost(connection)

    def unkeep(self, connection: OriginConnection) -> None:
        """The connection is about to close."""
        self._kept.pop(connection, None)

    # The acts

    async def _dial(self, leg: OriginLeg) -> None:
        try:
            connection = await self.dialler.dial(lambda: OriginConnection(self))
        except TunnelError as error:
            leg.dialling = None
            leg.fail(error)
            return
        leg.dialling = None
        leg.connected(connection)

    def _close_idle(self) -> None:
        for connection in list(self._kept):
            self.unkeep(connection)
            connection.close()
