"""UDP sockets as both ends of a link need them."""

import asyncio
import socket
from typing import Final

__all__ = ["DATAGRAM_SIZE", "enlarge_buffers", "settle"]

# Fits every path that carries QUIC (RFC 9000 section 14).
DATAGRAM_SIZE: Final = 1200

# A burst of a whole congestion window arrives faster than Python reads it; what does not fit is lost and halves the
# window.
_BUFFER_SIZE: Final = 4 * 1024 * 1024


async def settle() -> None:
    """Let sockets that were closed just now be closed: event loops do it in the turn after, and uvloop in the next."""
    for _ in range(3):
        await asyncio.sleep(0)


def enlarge_buffers(sock: socket.socket) -> None:
    """Ask for large kernel buffers; the kernel gives what its limits (net.core.rmem_max, wmem_max) allow."""
    for plain, force in (("SO_RCVBUF", "SO_RCVBUFFORCE"), ("SO_SNDBUF", "SO_SNDBUFFORCE")):
        option = getattr(socket, force, None)
        try:
            if option is None:
                raise PermissionError
            sock.setsockopt(socket.SOL_SOCKET, option, _BUFFER_SIZE)
        except OSError:
            sock.setsockopt(socket.SOL_SOCKET, getattr(socket, plain), _BUFFER_SIZE)
