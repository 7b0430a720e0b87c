"""One request of a visitor's HTTP/1.x connection, and its answer.

Only when the exchange is over is the visitor's next request looked at, so pipelined requests are answered in order and
wait as bytes.

A request that asks for an upgrade announces a body and no End follows its head: after a 101 the bytes of both sides
are Data, and each side's End is its half-close; after any other final head End is handed over, as there was no body.

A visitor that closed its side after a whole request may still read (RFC 9112 section 9.6), or may have gone. The
difference shows when something is sent to it: see ``departure``.
"""

from typing import TYPE_CHECKING

from quictunnel.http.reply import Framing, encode_interim, encode_reply, encode_switch, encode_trailers
from quictunnel.http.visitor_leg import VisitorLeg
from quictunnel.wire.errors import TunnelError
from quictunnel.wire.frames import Fields, ResponseHead

if TYPE_CHECKING:
    from quictunnel.http.visitor_connection import VisitorConnection

__all__ = ["Http1VisitorLeg"]


class Http1VisitorLeg(VisitorLeg):
    """One exchange of a ``VisitorConnection``."""

    __slots__ = ("_connection",)

    def __init__(self, connection: "VisitorConnection", client_address: str, started: float) -> None:
        super().__init__(client_address, started)
        self._connection = connection

    @property
    def ends_with_connection(self) -> bool:
        """Whether the end of the connection is what tells the answer's end."""
        return self._framing is Framing.CLOSE

    @property
    def is_chunked(self) -> bool:
        """Whether the answer goes out in chunks, and only whole ones have."""
        return self._framing is Framing.CHUNKED

    # The verbs

    def pause(self) -> None:
        if not self.over:
            self._connection.hold_body(True)

    def resume(self) -> None:
        if not self.over:
            self._connection.hold_body(False)

    def abort(self, error: TunnelError) -> None:
        if not self.over:
            self.error = error
            self._connection.fail(self)

    # The answer

    def _send_head(self, head: ResponseHead) -> None:
        try:
            if head.status >= 200:
                self._send_final(head)
            elif head.status == 101:
                self._switch(head)
            elif self.version == b"1.1":
                # RFC 9110 section 15.2: HTTP/1.0 knows none of these.
                self._connection.send_now(encode_interim(head))
        except ValueError as error:
            self._broken(str(error))

    def _send_final(self, head: ResponseHead) -> None:
        request, connection = self.head, self._connection
        assert request is not None
        keep_alive = self.keep_alive and connection.may_persist
        reply = encode_reply(head, request.method, self.version, connection.date, keep_alive=keep_alive)
        self.status = head.status
        self._framing = reply.framing
        self._left = reply.length
        self.keep_alive = reply.keep_alive
        connection.send_soon(reply.data)
        if request.protocol:
            self.hand_end([])

    def _switch(self, head: ResponseHead) -> None:
        request, connection = self.head, self._connection
        assert request is not None
        data = encode_switch(head, request.method, request.protocol)
        self.status = 101
        self.keep_alive = False
        self._framing = Framing.CLOSE
        connection.send_soon(data)
        connection.become_opaque(self)

    def _send_data(self, data: bytes) -> None:
        # A chunk of no bytes would end the body.
        if not data or not self._count(len(data)):
            return
        if self._framing is Framing.CHUNKED:
            self._connection.send_soon(b"%x\r\n" % len(data), data, b"\r\n")
        else:
            self._connection.send_soon(data)

    def _send_end(self, trailers: Fields) -> None:
        if self.status == 101:
            self._connection.end_opaque(self)
        elif self._may_end():
            if self._framing is Framing.CHUNKED:
                try:
                    self._connection.send_soon(encode_trailers(trailers))
                except ValueError as error:
                    self._broken(str(error))
                    return
            self._connection.finish(self, keep_alive=self.keep_alive)
