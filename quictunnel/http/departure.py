"""Has a visitor gone that closed its side of the connection?

Closing one side after a whole request is legal, and the visitor still reads (RFC 9112 section 9.6); but closing
everything looks just the same from here until something is sent to it. So if the answer takes long, bytes are sent that
mean nothing, and a visitor that is gone answers them with a reset:

    before the head           100 Continue (RFC 9110 section 15.2: a visitor must take any number of them)
    within a chunked body     a leading zero of the next chunk's size (RFC 9112 section 7.1)

Other bodies, and HTTP/1.0, have no such bytes; there the next piece of the answer does it, or at last TCP: the system
of a visitor that is gone forgets the half-closed connection after a while (on Linux a minute), and then answers a
keep-alive probe with a reset. ``end_watch`` tells of a reset, as an event loop that has read to the end watches no more
for what may be read; where it cannot, it is looked for.
"""

import asyncio
from typing import TYPE_CHECKING, Final

from quictunnel.http.http1_visitor import Http1VisitorLeg

if TYPE_CHECKING:
    from quictunnel.http.visitor_connection import VisitorConnection

__all__ = ["Departure"]

# Seconds from a visitor's half-close to the bytes that mean nothing, and from there to the first look; each later look
# comes after twice the time, up to a bound.
_PROBE_AFTER: Final = 0.04
_FIRST_LOOK: Final = 0.02
_LAST_LOOK: Final = 1.0
_CONTINUE: Final = b"HTTP/1.1 100 Continue\r\n\r\n"


class Departure:
    """Looks after a half-closed visitor for as long as one exchange lasts."""

    __slots__ = ("_after", "_connection", "_leg", "_probed", "_timer")

    def __init__(self, connection: "VisitorConnection", leg: Http1VisitorLeg) -> None:
        self._connection = connection
        self._leg = leg
        self._probed = False
        self._after = _FIRST_LOOK
        self._timer = asyncio.get_running_loop().call_later(_PROBE_AFTER, self.look)
        connection.watch_end(self._reset, reset_only=True)
        connection.keep_alive()

    def cancel(self) -> None:
        """The exchange is over."""
        self._timer.cancel()
        self._connection.watch_end(None)

    def _reset(self, reset: bool) -> None:
        self._connection.abort()

    def look(self) -> None:
        """Cut the connection if the visitor has gone; otherwise come back."""
        self._timer.cancel()
        connection = self._connection
        if connection.is_reset:
            connection.abort()
            return
        if not self._probed and not connection.is_stuck:
            self._probe()
        self._timer = asyncio.get_running_loop().call_later(self._after, self.look)
        self._after = min(2 * self._after, _LAST_LOOK)

    def _probe(self) -> None:
        connection, leg = self._connection, self._leg
        connection.flush()
        if connection.committed:
            probe = b"0" if leg.is_chunked else b""
        else:
            probe = _CONTINUE if leg.version == b"1.1" else b""
        if probe:
            self._probed = True
            connection.send_now(probe)
