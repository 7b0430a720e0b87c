"""What a visitor still gets: one side of its connection, which knows nothing of requests.

An answer's head, its first body bytes and its end leave in one write if they come in one turn of the event loop, and at
the end of that turn otherwise. What the visitor does not take is bounded by pausing whoever writes, and in time.
"""

import asyncio
import fcntl
import socket
import termios
from collections.abc import Callable
from math import inf
from typing import TYPE_CHECKING, Final, cast

from mypy_extensions import mypyc_attr

from quictunnel.http import endings

if TYPE_CHECKING:
    from quictunnel.http.visitor import VisitorListener

__all__ = ["WRITE_SIZE", "VisitorOutput"]

# Bytes that are not kept for the end of the turn: copying more together costs more than another write.
WRITE_SIZE: Final = 64 * 1024
# Bytes that pieces have in the mean which are written as they are: of smaller ones each costs more than its copy.
_LARGE_PIECE: Final = 4096
# Seconds between two questions of TCP's to a silent visitor; by default the first comes after two hours.
_KEEP_ALIVE: Final = 15


@mypyc_attr(allow_interpreted_subclasses=True)
class VisitorOutput(asyncio.Protocol):
    """The writing half of a visitor's connection, and what its listener asks of the whole."""

    __slots__ = (
        "_closing",
        "_listener",
        "_loop",
        "_out",
        "_out_size",
        "_scheduled",
        "_transport",
        "_watched",
        "_write_paused",
        "_write_size",
        "committed",
        "deadline",
        "write_deadline",
    )

    deadline: float
    "when ``expire`` is to be called next, in seconds of the event loop's clock"
    committed: bool
    "bytes of the current exchange's final answer have been written"
    write_deadline: float
    "when the visitor must have taken something, in seconds of the event loop's clock"

    def __init__(self, listener: "VisitorListener") -> None:
        self._listener = listener
        self._loop = listener.loop
        self._transport: asyncio.Transport = cast(asyncio.Transport, None)
        self._closing = False  # nothing more will be written
        self._watched = -1  # the descriptor that the end watch knows, if it does
        self.deadline = inf

        self._out: list[bytes] = []
        self._out_size = 0
        self._scheduled = False
        self.committed = False

        self._write_paused = False
        self._write_size = 0  # bytes in the transport's buffer when they were last looked at
        self.write_deadline = inf

    @property
    def date(self) -> bytes:
        """The time now, as Date has it."""
        return self._listener.date

    # Writing

    def send_soon(self, *parts: bytes) -> None:
        """Write these bytes of the final answer by the end of the loop's turn."""
        self._out += parts
        self._out_size += sum(map(len, parts))
        if self._out_size >= WRITE_SIZE:
            self.flush()
        else:
            self.wake()

    def wake(self) -> None:
        """There is something to write by the end of the loop's turn."""
        if not self._scheduled:
            self._scheduled = True
            self._listener.flush_soon(self)

    def send_now(self, data: bytes) -> None:
        """Write bytes that are not of the final answer."""
        if not self._closing:
            self._transport.write(data)

    def flush(self) -> None:
        """Write what is waiting."""
        out = self._out
        if out and not self._closing:
            in_pieces = self._out_size >= WRITE_SIZE and self._out_size >= _LARGE_PIECE * len(out)
            self._out = []
            self._out_size = 0
            self.committed = True
            if in_pieces:
                self._transport.writelines(out)  # uvloop has the kernel put them together
            else:
                self._transport.write(b"".join(out))

    def flushed(self) -> None:
        """The loop's turn is over."""
        self._scheduled = False
        self.flush()

    def half_close(self) -> None:
        """Say that nothing follows what was written."""
        endings.half_close(self._transport)

    def discard(self) -> None:
        """Forget what is waiting."""
        self._out.clear()
        self._out_size = 0

    # What the listener asks for

    def drain(self) -> None:
        """Begin nothing new, and close when what is under way is done."""
        raise NotImplementedError

    def expire(self, now: float) -> None:
        """A deadline has passed; ``now`` is the event loop's time."""
        raise NotImplementedError

    def look_if_held(self) -> None:
        """While nothing is read, a visitor's reset shows in no other way."""
        if not self.is_reading and self.is_reset:
            self.abort()

    @property
    def is_reading(self) -> bool:
        """Whether what the visitor sends is read now."""
        raise NotImplementedError

    # Visitors that do not read

    def pause_writing(self) -> None:
        self._write_paused = True
        self._watch_writes()

    def resume_writing(self) -> None:
        self._write_paused = False
        self.write_deadline = inf

    @property
    def is_stuck(self) -> bool:
        """Whether the visitor is to take something before it gets more."""
        return self._write_paused

    def _watch_writes(self) -> None:
        """Give the visitor until ``write_deadline`` to take some of what is in the transport's buffer."""
        self._write_size = self._transport.get_write_buffer_size()
        if self._write_size:
            self.write_deadline = self._loop.time() + self._listener.limits.write_idle_time

    def _expire_writes(self) -> None:
        size = self._write_size
        self._watch_writes()
        if not self._write_size:
            self.write_deadline = inf
        elif self._write_size >= size:
            self.abort()

    # Endings

    def abort(self) -> None:
        """Close without another word; ``connection_lost`` tells whoever needs to know."""
        self._transport.abort()

    def drop(self, *, reset: bool) -> None:
        """Close within an answer; by a ``reset``, which also destroys what is still on its way, or not."""
        if reset:
            endings.reset(self._transport)
        else:
            self._transport.abort()

    @property
    def has_unsent(self) -> bool:
        """Whether the visitor is still to take something of what was written."""
        if self._transport.get_write_buffer_size():
            return True
        sock = self._socket
        if sock is None or self._transport.get_extra_info("sslcontext") is None:
            return False
        # A TLS transport does not count what it has encrypted; that waits only while the kernel's queue is not empty.
        try:
            return fcntl.ioctl(sock.fileno(), termios.TIOCOUTQ, bytes(4)) != bytes(4)
        except OSError:
            return False

    @property
    def is_reset(self) -> bool:
        """Whether the visitor has sent a reset, seen or not."""
        sock = self._socket
        return sock is not None and sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) != 0

    def watch_end(self, tell: Callable[[bool], None] | None, *, reset_only: bool = False) -> None:
        """Have ``tell`` called when the visitor ends what is not read now, with whether that is a reset."""
        end_watch = self._listener.end_watch
        if tell is None:
            if self._watched >= 0:
                end_watch.discard(self._watched)
                self._watched = -1
        elif (sock := self._socket) is not None:
            self._watched = sock.fileno()
            end_watch.add(self._watched, tell, reset_only=reset_only)

    def keep_alive(self) -> None:
        """Have the system ask the visitor's, now and then, whether it still knows the connection."""
        sock = self._socket
        if sock is not None:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            if hasattr(socket, "TCP_KEEPIDLE"):
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, _KEEP_ALIVE)
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, _KEEP_ALIVE)

    @property
    def _socket(self) -> socket.socket | None:
        found: socket.socket | None = self._transport.get_extra_info("socket")
        return found
