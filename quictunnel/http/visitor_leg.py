"""The visitor leg: one request of a visitor's HTTP/1.1 connection, and its answer.

Who does what, in order:

1. The connection has read a request's head and checked it (``door``). It makes a leg, with everything known of the
   request on it, and calls ``open_exchange(head, leg)``.
2. ``open_exchange`` joins the leg to another, or aborts it. It hands over no frame.
3. The connection hands the head to the leg's peer, then Data as it comes, then End. To a leg that was aborted meanwhile
   all this is harmless, because its peer is then ``VOID``.
4. The answer's End, a cut or the visitor's leaving ends the exchange; ``on_done(leg)`` is called once. Only then is the
   visitor's next request looked at, so pipelined requests are answered in order and wait as bytes.

A request that asks for an upgrade announces a body and no End follows its head: after a 101 the bytes of both sides
are Data, and each side's End is its half-close; after any other final head End is handed over, as there was no body.

A visitor that closed its side after a whole request may still read (RFC 9112 section 9.6), or may have gone. The
difference shows when something is sent to it: see ``departure``.
"""

from typing import TYPE_CHECKING, Any, Final

from quictunnel.exchange import Leg
from quictunnel.http.reply import Framing, encode_interim, encode_reply, encode_switch, encode_trailers
from quictunnel.wire.errors import ErrorCode, TunnelError
from quictunnel.wire.frames import Data, End, Fields, Frame, RequestHead, ResponseHead

if TYPE_CHECKING:
    from quictunnel.http.visitor_connection import VisitorConnection

__all__ = ["VisitorLeg"]

_END: Final = End()


class VisitorLeg(Leg):
    """One exchange with a visitor: a handle that stays harmless when its connection has gone on to others."""

    __slots__ = (
        "_connection",
        "_framing",
        "_left",
        "_request_ended",
        "bytes_in",
        "bytes_out",
        "client_address",
        "error",
        "head",
        "host",
        "keep_alive",
        "request_id",
        "session",
        "started",
        "status",
        "tunnel",
        "tunnel_header",
        "version",
    )

    client_address: str
    "the visitor's IP address, ``unknown`` if it has none"
    host: str
    "the host asked for, in lower case, without final dot and port; empty if none was"
    tunnel_header: bytes
    "the value of X-Tunnel-Session, which is not among the head's fields; empty for none"
    head: RequestHead | None
    "what was asked; None for bytes that were refused before they were a request"
    started: float
    "when the head was read, in seconds of the event loop's clock"
    status: int
    "of the final answer; 101 after an upgrade, 0 if none has been given"
    bytes_in: int
    "body bytes from the visitor"
    bytes_out: int
    "body bytes to the visitor, without framing"
    error: TunnelError | None
    "why the exchange failed; CANCELLED if the visitor went away"
    tunnel: Any
    session: Any
    request_id: str
    "three places for whoever opens the exchange"
    version: bytes
    "of the visitor's HTTP, ``1.0`` or ``1.1``"
    keep_alive: bool
    "whether the connection may live on after this exchange"

    def __init__(self, connection: "VisitorConnection", client_address: str, started: float) -> None:
        super().__init__()
        self._connection: VisitorConnection | None = connection
        self.client_address = client_address
        self.started = started
        self.head = None
        self.host = ""
        self.tunnel_header = b""
        self.status = self.bytes_in = self.bytes_out = 0
        self.error = None
        self.tunnel = self.session = None
        self.request_id = ""
        self.version = b"1.1"
        self.keep_alive = False

        self._framing = Framing.NONE
        self._left = 0
        self._request_ended = False

    def __repr__(self) -> str:
        head = self.head
        what = f"{head.method!r} {head.target[:64]!r}" if head else "no request"
        return f"<VisitorLeg {self.client_address} {what} {self.status or ''}{' over' if self.over else ''}>"

    @property
    def over(self) -> bool:
        """Whether the exchange has ended."""
        return self._connection is None

    @property
    def method(self) -> bytes:
        """Of the request; empty for bytes that were none."""
        return self.head.method if self.head is not None else b""

    @property
    def target(self) -> bytes:
        """Of the request; empty for bytes that were none."""
        return self.head.target if self.head is not None else b""

    @property
    def ends_with_connection(self) -> bool:
        """Whether the end of the connection is what tells the answer's end."""
        return self._framing is Framing.CLOSE

    @property
    def is_chunked(self) -> bool:
        """Whether the answer goes out in chunks, and only whole ones have."""
        return self._framing is Framing.CHUNKED

    # The verbs

    def receive(self, frame: Frame) -> None:
        connection = self._connection
        if connection is None:
            return
        kind = type(frame)
        if kind is Data:
            self._send_data(connection, frame.data)  # type: ignore[union-attr]
        elif kind is End:
            self._send_end(connection, frame.trailers)  # type: ignore[union-attr]
        elif kind is ResponseHead:
            self._send_head(connection, frame)  # type: ignore[arg-type]

    def pause(self) -> None:
        if self._connection is not None:
            self._connection.hold_body(True)

    def resume(self) -> None:
        if self._connection is not None:
            self._connection.hold_body(False)

    def abort(self, error: TunnelError) -> None:
        connection = self._connection
        if connection is not None:
            self.error = error
            connection.fail(self)

    # What the connection tells

    def begin(self, head: RequestHead, host: str, version: bytes, *, keep_alive: bool) -> None:
        """The request's head; ``keep_alive`` is whether the visitor lets the connection live on."""
        self.head = head
        self.host = host
        self.version = version
        self.keep_alive = keep_alive

    def hand_body(self, data: bytes) -> None:
        """Content from the visitor, or opaque bytes."""
        self.bytes_in += len(data)
        self.peer.receive(Data(data))

    def hand_end(self, trailers: Fields) -> None:
        """The visitor has said all; at most once."""
        if not self._request_ended:
            self._request_ended = True
            self.peer.receive(End(trailers) if trailers else _END)

    def cancel(self, error: TunnelError) -> None:
        """The visitor's side failed: the peer hears of it at once."""
        self.error = error
        peer = self.peer
        self.detach()
        peer.abort(error)

    def leave(self) -> None:
        """The exchange is over: nothing reaches the connection any more."""
        self._connection = None
        self.detach()

    # The answer

    def _send_head(self, connection: "VisitorConnection", head: ResponseHead) -> None:
        if self.status:
            self._broken("a second head")
            return
        try:
            if head.status >= 200:
                self._send_final(connection, head)
            elif head.status == 101:
                self._switch(connection, head)
            elif self.version == b"1.1":
                # RFC 9110 section 15.2: HTTP/1.0 knows none of these.
                connection.send_now(encode_interim(head))
        except ValueError as error:
            self._broken(str(error))

    def _send_final(self, connection: "VisitorConnection", head: ResponseHead) -> None:
        request = self.head
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

    def _switch(self, connection: "VisitorConnection", head: ResponseHead) -> None:
        request = self.head
        assert request is not None
        data = encode_switch(head, request.protocol)
        self.status = 101
        self.keep_alive = False
        self._framing = Framing.CLOSE
        connection.send_soon(data)
        connection.become_opaque(self)

    def _send_data(self, connection: "VisitorConnection", data: bytes) -> None:
        size = len(data)
        framing = self._framing
        if not size:
            return  # a chunk of no bytes would end the body
        if framing is Framing.LENGTH:
            self._left -= size
            if self._left < 0:
                self._broken("more body than its Content-Length")
                return
            connection.send_soon(data)
        elif framing is Framing.CHUNKED:
            connection.send_soon(b"%x\r\n" % size, data, b"\r\n")
        elif framing is Framing.CLOSE:
            connection.send_soon(data)
        else:
            self._broken("a body where none may be" if self.status else "a body before its head")
            return
        self.bytes_out += size

    def _send_end(self, connection: "VisitorConnection", trailers: Fields) -> None:
        framing = self._framing
        if not self.status:
            self._broken("an end before its head")
        elif self.status == 101:
            connection.end_opaque(self)
        elif framing is Framing.LENGTH and self._left:
            self._broken("less body than its Content-Length")
        else:
            if framing is Framing.CHUNKED:
                try:
                    connection.send_soon(encode_trailers(trailers))
                except ValueError as error:
                    self._broken(str(error))
                    return
            connection.finish(self, keep_alive=self.keep_alive)

    def _broken(self, what: str) -> None:
        """The answer breaks HTTP: refuse it if nothing of it has gone out, else cut it; it never looks complete."""
        error = TunnelError(ErrorCode.HTTP_PROTOCOL_ERROR, f"The backend's answer is not valid HTTP: {what}.")
        self.cancel(error)
        self.abort(error)
