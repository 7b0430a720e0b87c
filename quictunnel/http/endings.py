"""How a connection of either side is ended, where the event loop's own way does not do."""

import asyncio
import socket
import struct
from typing import Final

__all__ = ["half_close", "reset"]

# SO_LINGER on, with no time: closing sends a reset (socket(7)).
_RESET_ON_CLOSE: Final = struct.pack("ii", 1, 0)


def half_close(transport: asyncio.Transport) -> None:
    """Say that nothing follows what was written."""
    try:
        transport.write_eof()
    except OSError:
        # A reset has come and has not been read yet, which must not become the caller's failure; ``connection_lost``
        # tells of it.
        transport.abort()


def reset(transport: asyncio.Transport) -> None:
    """Close by a reset, which also destroys what is still on its way."""
    sock: socket.socket | None = transport.get_extra_info("socket")
    if sock is not None:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET_ON_CLOSE)
    transport.abort()
