"""One exchange with a visitor, whatever version of HTTP it speaks.

Who does what, in order:

1. The connection has read a request's head and checked it. It makes a leg, with everything known of the request on it,
   and calls ``open_exchange(head, leg)``.
2. ``open_exchange`` joins the leg to another, or aborts it. It hands over no frame.
3. The connection hands the head to the leg's peer, then Data as it comes, then End. To a leg that was aborted meanwhile
   all this is harmless, because its peer is then ``VOID``.
4. The answer's End, a cut or the visitor's leaving ends the exchange; ``on_done(leg)`` is called once.
"""

from collections.abc import Callable
from typing import Any, Final

from mypy_extensions import mypyc_attr

from quictunnel.exchange import Leg
from quictunnel.http.reply import Framing
from quictunnel.wire.errors import ErrorCode, TunnelError
from quictunnel.wire.frames import Data, End, Fields, Frame, RequestHead, ResponseHead

__all__ = ["VisitorLeg"]

_END: Final = End()


@mypyc_attr(allow_interpreted_subclasses=True)
class VisitorLeg(Leg):
    """One exchange with a visitor: a handle that stays harmless when its connection has gone on to others."""

    __slots__ = (
        "_framing",
        "_left",
        "_request_ended",
        "amend",
        "bytes_in",
        "bytes_out",
        "client_address",
        "error",
        "head",
        "host",
        "keep_alive",
        "over",
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
    amend: "Callable[[VisitorLeg, ResponseHead], ResponseHead] | None"
    "what whoever opens the exchange makes of the final answer's head"
    version: bytes
    "of the visitor's HTTP, ``1.0``, ``1.1`` or ``2.0``"
    keep_alive: bool
    "whether the connection may live on after this exchange"

    over: bool
    "whether the exchange has ended"

    def __init__(self, client_address: str, started: float) -> None:
        super().__init__()
        self.client_address = client_address
        self.started = started
        self.head = None
        self.host = ""
        self.tunnel_header = b""
        self.status = self.bytes_in = self.bytes_out = 0
        self.error = None
        self.tunnel = self.session = None
        self.request_id = ""
        self.amend = None
        self.version = b"1.1"
        self.keep_alive = False
        self.over = False

        self._framing = Framing.NONE
        self._left = 0
        self._request_ended = False

    def __repr__(self) -> str:
        head = self.head
        what = f"{head.method!r} {head.target[:64]!r}" if head else "no request"
        return f"<{type(self).__name__} {self.client_address} {what} {self.status or ''}{' over' if self.over else ''}>"

    @property
    def method(self) -> bytes:
        """Of the request; empty for bytes that were none."""
        return self.head.method if self.head is not None else b""

    @property
    def target(self) -> bytes:
        """Of the request; empty for bytes that were none."""
        return self.head.target if self.head is not None else b""

    # The verbs

    def receive(self, frame: Frame) -> None:
        if self.over:
            return
        kind = type(frame)
        if kind is Data:
            self._send_data(frame.data)  # type: ignore[union-attr]
        elif kind is End:
            self._send_end(frame.trailers)  # type: ignore[union-attr]
        elif kind is ResponseHead:
            if self.status:
                self._broken("a second head")
            elif self.amend is not None and (frame.status >= 200 or frame.status == 101):  # type: ignore[union-attr]
                self._send_head(self.amend(self, frame))  # type: ignore[arg-type]
            else:
                self._send_head(frame)  # type: ignore[arg-type]

    # What the connection tells

    def begin(self, head: RequestHead, host: str, version: bytes, tunnel_header: bytes, *, keep_alive: bool) -> None:
        """The request's head; ``keep_alive`` is whether the visitor lets the connection live on."""
        self.head = head
        self.host = host
        self.version = version
        self.tunnel_header = tunnel_header
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
        self.over = True
        self.detach()

    # The answer, as a version of HTTP writes it

    def _send_head(self, head: ResponseHead) -> None:
        raise NotImplementedError

    def _send_data(self, data: bytes) -> None:
        raise NotImplementedError

    def _send_end(self, trailers: Fields) -> None:
        raise NotImplementedError

    def _count(self, size: int) -> bool:
        """Take ``size`` bytes of the answer's body into account; whether they may be there."""
        if self._framing is Framing.LENGTH:
            self._left -= size
            if self._left < 0:
                self._broken("more body than its Content-Length")
                return False
        elif self._framing is Framing.NONE:
            self._broken("a body where none may be" if self.status else "a body before its head")
            return False
        self.bytes_out += size
        return True

    def _may_end(self) -> bool:
        """Whether an end may come now."""
        if not self.status:
            self._broken("an end before its head")
            return False
        if self._framing is Framing.LENGTH and self._left:
            self._broken("less body than its Content-Length")
            return False
        return True

    def _broken(self, what: str) -> None:
        """The answer breaks HTTP: refuse it if nothing of it has gone out, else cut it; it never looks complete."""
        error = TunnelError(ErrorCode.HTTP_PROTOCOL_ERROR, f"The backend's answer is not valid HTTP: {what}.")
        self.cancel(error)
        self.abort(error)
