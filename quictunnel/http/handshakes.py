"""TCP ports at which visitors speak TLS: nobody else hears of a connection before its handshake is done.

An event loop's own TLS server tells of a connection only then, so it can neither count handshakes nor bound them. Here
each has a task for as long as it lasts, and when there are too many the oldest makes way: a flood of handshakes that
never end then takes the time of each other, and one that is in earnest needs only some milliseconds of it.
"""

import asyncio
import errno
import socket
from collections.abc import Callable, Sequence
from typing import Final

from loguru import logger

from quictunnel.http.tls import VisitorTls

__all__ = ["HANDSHAKES", "TlsListener"]

HANDSHAKES: Final = 1024
"that may be under way; each takes some 70 kB on uvloop and 340 kB on asyncio, whose TLS has larger buffers"

_BACKLOG: Final = 2048
# Connections accepted in one turn of the event loop: a handshake takes more than a millisecond of it.
_ACCEPTED_AT_ONCE: Final = 16
# Seconds until another attempt when there are no more file descriptors or buffers, as asyncio's own servers have it.
_RETRY_AFTER: Final = 1.0
_EXHAUSTED: Final = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)


class TlsListener:
    """The sockets of one address, and the handshakes that came in by them."""

    def __init__(
        self,
        tls: VisitorTls,
        make_protocol: Callable[[], asyncio.Protocol],
        *,
        handshake_time: float,
        shutdown_time: float,
        is_full: Callable[[], bool],
        on_idle: Callable[[], None] = lambda: None,
    ) -> None:
        """``handshake_time`` and ``shutdown_time`` are in seconds: how long TLS may take to begin and to end.

        While ``is_full`` says so, whoever comes is turned away without a handshake. ``on_idle`` is called when no
        handshake is under way any more.
        """
        self._tls = tls
        self._make_protocol = make_protocol
        self.handshake_time = handshake_time
        self.shutdown_time = shutdown_time
        self._is_full = is_full
        self._on_idle = on_idle
        self._loop = asyncio.get_running_loop()
        self._sockets: list[socket.socket] = []
        self._timers: dict[socket.socket, asyncio.TimerHandle] = {}
        self._handshakes: dict[asyncio.Task[None], None] = {}  # in the order they came

    def __len__(self) -> int:
        """How many handshakes are under way."""
        return len(self._handshakes)

    @property
    def sockets(self) -> list[socket.socket]:
        """Those that it listens at."""
        return list(self._sockets)

    async def start(
        self, host: str, port: int, *, reuse_port: bool = False, sockets: Sequence[socket.socket] = ()
    ) -> list[tuple[str, int]]:
        """Listen, at ``sockets`` if there are any, which do so already; the addresses bound. Raises OSError."""
        if sockets:
            self._sockets = list(sockets)
        else:
            await self._bind(host, port, reuse_port)
        for sock in self._sockets:
            sock.setblocking(False)
            self._listen(sock)
        return [sock.getsockname()[:2] for sock in self._sockets]

    async def _bind(self, host: str, port: int, reuse_port: bool) -> None:
        found = await self._loop.getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        try:
            for family, kind, protocol, _, address in dict.fromkeys(found):
                sock = socket.socket(family, kind, protocol)
                self._sockets.append(sock)
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                if reuse_port:
                    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
                if family == socket.AF_INET6:
                    # The same port of IPv4 is for the socket of that address, if it was asked for.
                    sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
                sock.bind(address)
                sock.listen(_BACKLOG)
        except OSError:
            self.close()
            raise

    def drain(self) -> None:
        """Accept no more; handshakes under way go on."""
        sockets, self._sockets = self._sockets, []
        for timer in self._timers.values():
            timer.cancel()
        self._timers.clear()
        for sock in sockets:
            self._loop.remove_reader(sock)
            sock.close()

    def close(self) -> None:
        """Accept no more, and give up the handshakes that are under way: nobody has asked for anything yet."""
        self.drain()
        for task in self._handshakes:
            task.cancel()

    def _listen(self, sock: socket.socket) -> None:
        self._timers.pop(sock, None)
        self._loop.add_reader(sock, self._accept, sock)

    def _accept(self, sock: socket.socket) -> None:
        for _ in range(_ACCEPTED_AT_ONCE):
            try:
                connection, _address = sock.accept()
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                return
            except OSError as error:
                if error.errno not in _EXHAUSTED:
                    raise
                logger.error("cannot accept a visitor: {}", error.strerror)
                self._loop.remove_reader(sock)
                self._timers[sock] = self._loop.call_later(_RETRY_AFTER, self._listen, sock)
                return
            if self._is_full():
                connection.close()
            else:
                self._begin(connection)

    def _begin(self, connection: socket.socket) -> None:
        handshakes = self._handshakes
        if len(handshakes) >= HANDSHAKES:
            oldest = next(iter(handshakes))
            del handshakes[oldest]
            oldest.cancel()
        connection.setblocking(False)
        task = self._loop.create_task(self._shake_hands(connection))
        handshakes[task] = None

        def done(task: asyncio.Task[None]) -> None:
            handshakes.pop(task, None)
            if task.cancelled():
                connection.close()  # that of one that had not even begun is nobody's
            if not handshakes:
                self._on_idle()

        task.add_done_callback(done)

    async def _shake_hands(self, connection: socket.socket) -> None:
        try:
            await self._loop.connect_accepted_socket(
                self._make_protocol,
                connection,
                ssl=self._tls.context,
                ssl_handshake_timeout=self.handshake_time,
                ssl_shutdown_timeout=self.shutdown_time,
            )
        except OSError as error:
            # Port scans, plain HTTP, visitors that do not trust the certificate: nothing of ours is wrong.
            logger.debug("= no TLS with a visitor: {}", error)
