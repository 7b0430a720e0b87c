"""UDP sockets as both ends of a link need them."""

import asyncio
import errno
import functools
import socket
import sys
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Final

from loguru import logger

__all__ = ["DATAGRAM_SIZE", "DatagramSocket", "enlarge_buffers", "settle"]

# Fits every path that carries QUIC (RFC 9000 section 14).
DATAGRAM_SIZE: Final = 1200

# A burst of a whole congestion window arrives faster than Python reads it; what does not fit is lost and halves the
# window.
_BUFFER_SIZE: Final = 4 * 1024 * 1024

_LARGEST: Final = 2048
"bytes of a datagram that are read: no peer sends more in one, and more room costs more time to make"

_AT_ONCE: Final = 32
"datagrams that are read before others get their turn on the event loop, and that are written when it is writable"

_WAITING: Final = 2048
"datagrams that may wait for room in the kernel's buffer; a link's congestion window is mostly less"


async def settle() -> None:
    """Let sockets that were closed just now be closed: event loops do it in the turn after, and uvloop in the next."""
    for _ in range(3):
        await asyncio.sleep(0)


def enlarge_buffers(sock: socket.socket) -> None:
    """Ask for large kernel buffers; says once how to allow them when the kernel gives much smaller ones."""
    small: list[str] = []
    least = _BUFFER_SIZE
    for option, limit in (("SO_RCVBUF", "net.core.rmem_max"), ("SO_SNDBUF", "net.core.wmem_max")):
        force = getattr(socket, option + "FORCE", None)  # beyond the limit, for root
        try:
            if force is None:
                raise PermissionError
            sock.setsockopt(socket.SOL_SOCKET, force, _BUFFER_SIZE)
        except OSError:
            with suppress(OSError):  # macOS gives nothing to who asks for too much
                sock.setsockopt(socket.SOL_SOCKET, getattr(socket, option), _BUFFER_SIZE)
        granted = sock.getsockopt(socket.SOL_SOCKET, getattr(socket, option))
        if sys.platform == "linux":
            granted //= 2  # the kernel doubles what it is asked for, for its own bookkeeping
        if granted < _BUFFER_SIZE // 2:
            small.append(f"{limit}={_BUFFER_SIZE}")
            least = min(least, granted)
    if small:
        _tell_small(least, " ".join(small))


@functools.cache
def _tell_small(granted: int, limits: str) -> None:
    remedy = f"; sysctl -w {limits} allows it" if sys.platform == "linux" else ""
    logger.warning(
        "bursts of packets may be lost: the kernel gives a UDP socket {} KiB of buffer where {} KiB are asked for{}",
        granted // 1024, _BUFFER_SIZE // 1024, remedy,
    )  # fmt: skip


class DatagramSocket:
    """A UDP socket on the event loop: datagrams come by a call and go at once.

    No transport of asyncio's or uvloop's: those cannot be paused, keep what they cannot send without a bound, and hide
    what Linux tells of single datagrams.
    """

    def __init__(
        self,
        sock: socket.socket,
        received: Callable[[bytes, Any], None],
        failed: Callable[[OSError], None] | None = None,
    ) -> None:
        """Take over ``sock``, bound or connected, and read from it.

        ``failed`` is told of errors in the loop's next turn, of one at most.
        """
        self._loop = asyncio.get_running_loop()
        sock.setblocking(False)
        self._sock = sock
        self._fd = sock.fileno()  # uvloop counts references of socket objects, and keeps them open by it
        self._received = received
        self._failed = failed
        try:
            peer = sock.getpeername()
        except OSError:
            peer = None
        self._receive: Callable[[int], tuple[bytes, Any]] = sock.recvfrom
        self._put: Callable[[bytes, Any], object] = sock.sendto
        if peer is not None:
            # Address tuples need not be made and read again for each datagram.
            self._receive = lambda size: (sock.recv(size), peer)
            self._put = lambda data, address: sock.send(data)
        self._waiting: deque[tuple[bytes, Any]] = deque()
        self._error: OSError | None = None  # not told yet
        self._shaken = False  # there was an error since the last wake-up
        self.closed = False
        self.reading = False
        self.dropped = 0
        "datagrams that could not be sent: QUIC repeats what was in them"
        self.resume()

    def __repr__(self) -> str:
        state = "closed" if self.closed else "reading" if self.reading else "paused"
        return f"<DatagramSocket {state} waiting={len(self._waiting)} dropped={self.dropped}>"

    @property
    def sock(self) -> socket.socket:
        """For options, addresses, and to hand it to another process; reading and writing is done here."""
        return self._sock

    def pause(self) -> None:
        """Leave what comes to the kernel, or to another process that reads from the same socket; sending goes on."""
        if self.reading:
            self.reading = False
            self._loop.remove_reader(self._fd)

    def resume(self) -> None:
        """Read again."""
        if not self.reading and not self.closed:
            self.reading = True
            self._loop.add_reader(self._fd, self._readable)

    def close(self) -> None:
        """Close the socket; what still waits is dropped."""
        if self.closed:
            return
        self.pause()
        self.closed = True
        if self._waiting:
            self._loop.remove_writer(self._fd)
            self.dropped += len(self._waiting)
            self._waiting.clear()
        self._sock.close()

    # Sending

    def send(self, data: bytes, address: Any) -> None:
        """Send at once, or as soon as the kernel has room; the address of a connected socket is its peer's."""
        if self._waiting:
            self._wait(data, address)
            return
        try:
            self._put(data, address)
        except OSError as error:
            if not self._sent_after(error, data, address):
                self._wait(data, address)

    def _sent_after(self, error: OSError, data: bytes, address: Any) -> bool:
        """Whether a datagram, which met ``error`` when it was to be sent, is done with; else it waits for room."""
        if self.closed:
            return True
        if isinstance(error, BlockingIOError):
            return False
        if error.errno == errno.ENOBUFS:
            self.dropped += 1  # as a full queue does anywhere on the path
            return True
        # What ICMP said of an earlier datagram is reported by whatever call comes next, and that datagram, perhaps
        # another link's, is not sent.
        self._note(error)
        try:
            self._put(data, address)
        except BlockingIOError:
            return False
        except OSError:
            self.dropped += 1
        return True

    def _wait(self, data: bytes, address: Any) -> None:
        if len(self._waiting) >= _WAITING:
            self.dropped += 1
            return
        if not self._waiting:
            self._loop.add_writer(self._fd, self._writable)
        self._waiting.append((data, address))

    def _writable(self) -> None:
        waiting = self._waiting
        for _ in range(min(len(waiting), _AT_ONCE)):
            data, address = waiting[0]
            try:
                self._put(data, address)
            except OSError as error:
                if not self._sent_after(error, data, address):
                    break
            waiting.popleft()
        if not waiting:
            self._loop.remove_writer(self._fd)
        if self._shaken:
            self._rearm()

    # Receiving

    def _readable(self) -> None:
        receive, received = self._receive, self._received
        came = False
        try:
            for _ in range(_AT_ONCE):
                try:
                    data, address = receive(_LARGEST)
                except BlockingIOError:
                    break
                except OSError as error:
                    self._note(error)
                    continue
                came = True
                received(data, address)
                if not self.reading:
                    break
        finally:
            if self._shaken or not came:
                self._rearm()

    def _rearm(self) -> None:
        # uvloop stops watching a socket that has an error pending, though it may have been taken by a send since: it is
        # seen here as a wake-up with nothing to read.
        self._shaken = False
        if self.reading:
            self._loop.remove_reader(self._fd)
            self._loop.add_reader(self._fd, self._readable)
        if self._waiting:
            self._loop.remove_writer(self._fd)
            self._loop.add_writer(self._fd, self._writable)

    # Errors

    def _note(self, error: OSError) -> None:
        self._shaken = True
        if self._error is None and self._failed is not None:
            self._error = error
            self._loop.call_soon(self._tell)

    def _tell(self) -> None:
        error, self._error = self._error, None
        if error is not None and self._failed is not None and not self.closed:
            self._failed(error)
