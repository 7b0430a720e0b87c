"""Whose connection has ended while nobody reads it?

An event loop tells of an end by reading. A connection that is not read because the other leg cannot take more, or that
has been read to its end, still has something to say: that its peer has closed its side, or has reset the connection.
One epoll for all of them, itself watched by the event loop, tells of both at once and costs nothing while nothing
happens. Where there is no epoll, those who ask have to look now and then.
"""

import asyncio
import select
from collections.abc import Callable
from typing import TypeAlias

__all__ = ["EndWatch"]

Tell: TypeAlias = Callable[[bool], None]
"Called with whether the connection is reset: otherwise its peer has closed its side only."


class EndWatch:
    """The connections whose end is waited for."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._told: dict[int, Tell] = {}
        self._epoll = select.epoll() if hasattr(select, "epoll") else None
        if self._epoll is not None:
            loop.add_reader(self._epoll.fileno(), self._ready)

    def __len__(self) -> int:
        return len(self._told)

    def close(self) -> None:
        """Watch nothing any more."""
        if self._epoll is not None:
            self._loop.remove_reader(self._epoll.fileno())
            self._epoll.close()
            self._epoll = None
        self._told.clear()

    def add(self, fd: int, tell: Tell, *, reset_only: bool = False) -> None:
        """Call ``tell`` once. Discard a descriptor before it is closed."""
        epoll = self._epoll
        if epoll is None or fd < 0:
            return
        # Errors and resets are told of unasked.
        mask = select.EPOLLONESHOT | (0 if reset_only else select.EPOLLRDHUP)
        if fd in self._told:
            epoll.modify(fd, mask)
        else:
            epoll.register(fd, mask)
        self._told[fd] = tell

    def discard(self, fd: int) -> None:
        """Watch this one no more."""
        if self._told.pop(fd, None) is not None and self._epoll is not None:
            self._epoll.unregister(fd)

    def _ready(self) -> None:
        epoll = self._epoll
        assert epoll is not None
        for fd, events in epoll.poll(0):
            tell = self._told.get(fd)
            if tell is not None:
                self.discard(fd)
                tell(bool(events & (select.EPOLLERR | select.EPOLLHUP)))
