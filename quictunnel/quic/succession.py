"""Datagrams between two processes of which one has taken over the other's UDP socket.

The successor reads the socket. What belongs to links of its predecessor it passes on by a socket pair, with the address
that it came from; the predecessor answers by its own copy of the UDP socket. The pair keeps datagrams apart and tells
of its other end's end (SOCK_SEQPACKET). What does not fit into it is dropped, as the network drops: QUIC repeats it.
"""

import asyncio
import json
import socket
from collections.abc import Callable, Collection
from functools import lru_cache
from typing import Any, Final

from loguru import logger

from quictunnel.quic.sockets import enlarge_buffers

__all__ = ["Predecessor", "Successor", "channel"]

_LARGEST: Final = 65535 + 256
"bytes of a datagram, and of an address before it"

_AT_ONCE: Final = 32
"datagrams that are read before others get their turn on the event loop"


def channel() -> tuple[socket.socket, socket.socket]:
    """The two ends; either is the successor's or the predecessor's."""
    ends = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    for end in ends:
        end.setblocking(False)
        enlarge_buffers(end)
    return ends


class Predecessor:
    """The process before this one, as its successor has it."""

    def __init__(self, sock: socket.socket, handshakes: Collection[bytes] = ()) -> None:
        """``sock`` is this process's end; ``handshakes`` are connection ids of links that have not yet come to be."""
        self._loop = asyncio.get_running_loop()
        self._sock = sock
        self.handshakes = frozenset(handshakes)
        self.passed = 0
        self.dropped = 0
        self.gone = asyncio.Event()
        sock.setblocking(False)
        self._loop.add_reader(sock, self._readable)

    def __repr__(self) -> str:
        return f"<Predecessor{' gone' if self.gone.is_set() else ''} passed={self.passed} dropped={self.dropped}>"

    def pass_on(self, data: bytes, address: Any) -> None:
        """A datagram came that is not for us."""
        if self.gone.is_set():
            return
        try:
            self._sock.send(_packed(address) + data)
            self.passed += 1
        except BlockingIOError:
            self.dropped += 1
        except OSError:
            self.close()

    def close(self) -> None:
        """Nothing is passed on any more."""
        if not self.gone.is_set():
            self.gone.set()
            self._loop.remove_reader(self._sock)
            self._sock.close()

    def _readable(self) -> None:
        # It says nothing but that it has gone.
        try:
            if self._sock.recv(_LARGEST):
                return
        except BlockingIOError:
            return
        except OSError:
            pass  # it has gone in a hurry
        logger.info("= the process before this one has gone; {} datagrams were passed on to it", self.passed)
        self.close()


class Successor:
    """The process after this one, as its predecessor has it: where datagrams come from now."""

    def __init__(self, sock: socket.socket, received: Callable[[bytes, Any], None]) -> None:
        """``sock`` is this process's end."""
        self._loop = asyncio.get_running_loop()
        self._sock = sock
        self._received = received
        self._closed = False
        sock.setblocking(False)
        self._loop.add_reader(sock, self._readable)

    def close(self) -> None:
        """Take nothing more."""
        if not self._closed:
            self._closed = True
            self._loop.remove_reader(self._sock)
            self._sock.close()

    def _readable(self) -> None:
        for _ in range(_AT_ONCE):
            if self._closed:
                return
            try:
                message = self._sock.recv(_LARGEST)
            except BlockingIOError:
                return
            except OSError:
                message = b""
            if not message:
                self.close()
                return
            end = message.find(b"]") + 1
            self._received(message[end:], _unpacked(message[:end]))


# Address tuples of IPv4 and IPv6, as JSON. The system writes the hosts in them, and no bracket is in those.


@lru_cache(maxsize=4096)
def _packed(address: Any) -> bytes:
    return json.dumps(address, separators=(",", ":")).encode("ascii")


@lru_cache(maxsize=4096)
def _unpacked(packed: bytes) -> Any:
    return tuple(json.loads(packed))
