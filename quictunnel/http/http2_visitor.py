"""A visitor's HTTP/2 connection: many exchanges at a time, each a leg of its own.

Endings, gentlest first:

    END_STREAM    the answer is complete; what is left of the upload is then refused by RST_STREAM(NO_ERROR) (RFC 9113
                  section 8.1)
    RST_STREAM    the answer is incomplete; nothing else shows that
    GOAWAY        nothing new is taken, what is under way goes on: the server stops. It is said twice (RFC 9113 section
                  6.8): that it is coming, and when the visitor knows that, which stream was the last
    close         the visitor broke HTTP/2, or is gone

TCP's half-close has no meaning here: a visitor that closes its side is gone.
"""

import asyncio
from math import inf
from typing import TYPE_CHECKING, Final, cast

from h2.errors import ErrorCodes

from quictunnel.http.http2 import Http2Error, Http2Session, Http2Stream
from quictunnel.http.http2_door import read_request, read_trailers
from quictunnel.http.pages import error_answer
from quictunnel.http.reply import Framing, plan_reply
from quictunnel.http.visitor_leg import VisitorLeg
from quictunnel.http.visitor_output import VisitorOutput
from quictunnel.wire.errors import ErrorCode, TunnelError
from quictunnel.wire.fields import Forwarding, check_fields, content_length, end_to_end, trailer_fields
from quictunnel.wire.frames import Fields, RequestHead, ResponseHead

if TYPE_CHECKING:
    from quictunnel.http.door import Request
    from quictunnel.http.visitor import VisitorListener

__all__ = ["Http2VisitorConnection", "Http2VisitorLeg"]

# How long, in seconds, a visitor may take to answer a ping before it counts as gone.
_PONG_TIME: Final = 20.0
# How long what it was told last may take to reach it.
_GOODBYE_TIME: Final = 2.0


class Http2VisitorConnection(VisitorOutput):
    """One TCP or TLS connection of a visitor that speaks HTTP/2. The ``SessionOwner`` of its session."""

    __slots__ = (
        "_called",
        "_forwarding",
        "_held_to",
        "_idle_since",
        "_last_call",
        "_legs",
        "_pinged",
        "_reading",
        "_refused_above",
        "_scheme",
        "_session",
        "_waiting",
        "limits",
    )

    def __init__(self, listener: "VisitorListener", forwarding: Forwarding, scheme: bytes, held_to: str) -> None:
        """``held_to`` is the host of its TLS handshake, empty for none."""
        super().__init__(listener)
        self.limits = listener.limits
        self._forwarding = forwarding
        self._scheme = scheme
        self._held_to = held_to
        self._idle_since = self._loop.time()
        self._session = Http2Session(
            self,
            is_client=False,
            head_limit=self.limits.head_size,
            budget=listener.budget,
            clock=listener.loop.time,
        )
        self._legs: dict[Http2VisitorLeg, None] = {}
        self._waiting: dict[Http2VisitorLeg, None] = {}  # whose heads wait for the end of the turn
        self._reading = True
        self._pinged = False
        self._called = False  # the visitor was told that the end is near
        self._last_call = inf  # when it has had time enough to hear that
        self._refused_above: int | None = None  # streams beyond it come too late

    def __repr__(self) -> str:
        return f"<Http2VisitorConnection {self._forwarding.client} {self._session!r}>"

    # What the transport tells

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self.deadline = self._idle_since + self.limits.head_time
        if self._listener.draining:
            self._linger()
        self.wake()

    def data_received(self, data: bytes) -> None:
        if self._closing:
            return
        try:
            self._session.feed(data)
        except Http2Error as error:
            self._break(error)
            return
        self._pinged = False
        self._watch()

    def eof_received(self) -> bool:
        return False

    def connection_lost(self, exc: Exception | None) -> None:
        self._closing = True
        self._session.close()
        for leg in list(self._legs):
            leg.cancel(TunnelError(ErrorCode.CANCELLED, "The visitor went away."))
            self._leave(leg)
        self._listener.forget(self)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._session.write_paused = True
        # Who takes no answers gets none, and may not go on asking: what it asks for would be kept here.
        self._read(False)

    def resume_writing(self) -> None:
        super().resume_writing()
        # It has taken something: a sign of life as good as any, and no other was listened for.
        self._session.heard_at = self._loop.time()
        self._session.resume()
        self._read(True)

    # What the session tells

    def session_request(self, stream: Http2Stream, fields: Fields, ended: bool) -> None:
        if self._refused_above is not None and stream.id > self._refused_above:
            stream.reset(ErrorCodes.REFUSED_STREAM)
            self.misused()
            return
        leg = Http2VisitorLeg(self, stream, self._forwarding.client, self._loop.time())
        stream.user = leg
        self._legs[leg] = None
        if self._listener.draining:
            self.drain()  # it was not told at once, so that it could ask for something
        try:
            request = read_request(fields, self.limits, ended=ended)
        except TunnelError as error:
            leg.refuse(error)
            return
        self._open(leg, request)

    def session_goaway(self, last_stream_id: int, code: int) -> None:
        """The visitor opens no more streams; what it opened goes on."""
        self._refuse_more()

    def session_room(self) -> None:
        """Streams are the visitor's to open."""

    # What legs tell

    def hold_head(self, leg: "Http2VisitorLeg") -> None:
        """The head of ``leg`` waits for the end of the turn, or for what follows it."""
        self._waiting[leg] = None
        self.wake()

    def head_gone(self, leg: "Http2VisitorLeg") -> None:
        """The head of ``leg`` waits no more."""
        self._waiting.pop(leg, None)

    @property
    def body_deadline(self) -> float:
        """Until when a request's body may be silent from now on."""
        return self._loop.time() + self.limits.body_idle_time

    @property
    def write_idle_time(self) -> float:
        """How long a visitor may take nothing of an answer, in seconds."""
        return self.limits.write_idle_time

    def misused(self) -> None:
        """A stream had to be given up because of what the visitor sent."""
        try:
            self._session.gate.reset(self._loop.time())
        except Http2Error as error:
            self._break(error)

    def finish(self, leg: "Http2VisitorLeg") -> None:
        """The exchange is over, and its stream too."""
        self._leave(leg)
        if not self._legs:
            self._idle_since = self._loop.time()
            self.deadline = inf  # a frame under way has its time from now on
            self._watch()

    # Writing

    def flushed(self) -> None:
        self._scheduled = False
        for leg in list(self._waiting):
            leg.release_head()
        if self._transport.is_closing():
            return
        data = self._session.take()
        if data:
            self._transport.write(data)
        if not self._legs and self._refused_above is not None and not self._closing:
            self._close()

    # What the listener asks for

    def drain(self) -> None:
        if not self._called and self._refused_above is None and not self._closing:
            self._called = True
            self._linger()
            self._session.last_call(self._refuse_more)

    def expire(self, now: float) -> None:
        if now >= self.write_deadline:
            self._expire_writes()
        elif self._closing:
            # What waits to be taken has its own limit.
            if not self._transport.get_write_buffer_size():
                self.abort()
        elif now >= self._last_call and self._refused_above is None:
            self._refuse_more()
        elif self._legs:
            self._look(now)
        elif self._session.gate.is_waiting:
            self._break(Http2Error(ErrorCodes.ENHANCE_YOUR_CALM, "a frame took too long to arrive"))
        else:
            self._refuse_more()

    @property
    def is_reading(self) -> bool:
        return self._reading

    # The acts

    def _linger(self) -> None:
        """The server stops: there is little time left for what is on its way."""
        self._last_call = self._loop.time() + self._listener.linger_time
        self.deadline = min(self.deadline, self._last_call)

    def _refuse_more(self) -> None:
        """Take no new stream, and close when those under way are over."""
        if self._refused_above is None and not self._closing:
            self._refused_above = self._session.h2.highest_inbound_stream_id
            self._session.go_away(self._refused_above)
            self.wake()

    def _open(self, leg: "Http2VisitorLeg", request: "Request") -> None:
        fields = self._forwarding.apply(end_to_end(request.fields), request.authority, request.version)
        head = RequestHead(request.method, self._scheme, request.authority, request.target, fields, request.body)
        leg.begin(head, request.host, request.version, request.tunnel, keep_alive=True)
        self._listener.begin(head, leg, self._held_to)
        leg.peer.receive(head)
        if not request.body:
            leg.hand_end([])

    def _leave(self, leg: "Http2VisitorLeg") -> None:
        if leg in self._legs:
            del self._legs[leg]
            self._waiting.pop(leg, None)
            leg.leave()
            self._listener.done(leg)
            self.wake()

    def _watch(self) -> None:
        """When is something late? While there are exchanges, they are looked at in every sweep."""
        now = self._loop.time()
        if self._legs:
            self.deadline = now
        elif self._session.gate.is_waiting:
            self.deadline = min(self.deadline, now + self.limits.head_time)
        else:
            self.deadline = self._idle_since + self.limits.idle_time
        if self._refused_above is None:
            self.deadline = min(self.deadline, self._last_call)

    def _look(self, now: float) -> None:
        """Are there uploads that have stopped, or has the visitor gone without a word?"""
        if self._reading:  # while nothing is read, the limit on writes stands for this one
            silence = now - self._session.heard_at
            if self._pinged and silence >= self.limits.idle_time + _PONG_TIME:
                self.abort()
                return
            if not self._pinged and silence >= self.limits.idle_time:
                self._pinged = True
                self._session.ping()
        for leg in list(self._legs):
            leg.expire(now)

    def _read(self, reading: bool) -> None:
        if reading != self._reading and not self._transport.is_closing():
            self._reading = reading
            if reading:
                self._transport.resume_reading()
            else:
                self._transport.pause_reading()

    def _break(self, error: Http2Error) -> None:
        """The visitor broke HTTP/2: say so, and close."""
        if self._closing:
            return
        self._session.terminate(error)
        data = self._session.take()
        self._session.close()
        for leg in list(self._legs):
            leg.cancel(TunnelError(ErrorCode.CANCELLED, f"The visitor's connection ended: {error}."))
            self._leave(leg)
        self._transport.write(data)
        self._close()

    def _close(self) -> None:
        """Close when the visitor has, or in a moment: what it is still sending must not destroy what it has to read."""
        self._closing = True
        self.deadline = self._loop.time() + _GOODBYE_TIME
        self._watch_writes()
        self._read(True)
        if self._transport.can_write_eof():
            self.half_close()
        else:
            self._transport.close()


class Http2VisitorLeg(VisitorLeg):
    """One stream of a visitor. The ``StreamUser`` of its stream."""

    __slots__ = ("_connection", "_deadline", "_head", "_is_call", "_stream", "announced")

    announced: int | None
    "bytes of the request's body that are still due, None if no length was announced"

    def __init__(
        self, connection: Http2VisitorConnection, stream: Http2Stream, client_address: str, started: float
    ) -> None:
        super().__init__(client_address, started)
        self.version = b"2.0"
        self.announced = None
        self._connection = connection
        self._stream = stream
        self._head: Fields | None = None  # the answer's, until it is known whether anything follows it
        # When the request's body is late. A call of gRPC may be silent for as long as its two ends like.
        self._is_call = False
        self._deadline = inf

    # The verbs

    def pause(self) -> None:
        self._stream.pause()
        self._deadline = inf

    def resume(self) -> None:
        self._stream.resume()
        self._renew()

    def abort(self, error: TunnelError) -> None:
        if self.over:
            return
        self.error = error
        self.detach()
        if self.status and self._head is None:
            self._cut(ErrorCodes.INTERNAL_ERROR)
        else:
            self._answer(error)

    # What the connection tells

    def begin(self, head: RequestHead, host: str, version: bytes, tunnel_header: bytes, *, keep_alive: bool) -> None:
        super().begin(head, host, version, tunnel_header, keep_alive=keep_alive)
        fields = dict(head.fields)
        self._is_call = fields.get(b"content-type", b"").startswith(b"application/grpc")
        self.announced = content_length(head.fields)
        self._renew()

    def refuse(self, error: TunnelError) -> None:
        """Answer a request that is none, or no longer one."""
        self.cancel(error)
        self._connection.misused()
        if not self.over:
            self.abort(error)

    def expire(self, now: float) -> None:
        """The time is ``now``: is the request's body late, or does the visitor grant no window for the answer?"""
        if not self._connection.is_stuck and now >= self._stream.stuck_since + self._connection.write_idle_time:
            error = TunnelError(ErrorCode.CANCELLED, "The visitor takes nothing of the answer.")
            self.cancel(error)
            self._cut(ErrorCodes.CANCEL)
        elif now >= self._deadline:
            error = TunnelError(ErrorCode.REQUEST_TIMEOUT, "The request's body stopped coming.")
            self.cancel(error)
            self.abort(error)

    def release_head(self) -> None:
        """Let the head go without waiting for what follows."""
        if self._head is not None:
            self._write_head(end=False)

    # What the stream tells

    def stream_data(self, data: bytes) -> None:
        if self.error is not None:
            return  # its answer is on its way
        if self.announced is not None:
            self.announced -= len(data)
            if self.announced < 0:
                self.refuse(TunnelError(ErrorCode.BAD_REQUEST, "The request is malformed: its body is too long."))
                return
        self._renew()
        self.hand_body(data)

    def stream_end(self, trailers: Fields) -> None:
        self._deadline = inf
        if self.error is not None:
            return
        if self.announced:
            self.refuse(TunnelError(ErrorCode.BAD_REQUEST, "The request is malformed: its body is too short."))
            return
        limits = self._connection.limits
        try:
            fields = read_trailers(trailers, fields_limit=limits.head_fields, size_limit=limits.head_size)
        except ValueError as error:
            self.refuse(TunnelError(ErrorCode.BAD_REQUEST, f"The request is malformed: {error}."))
            return
        self.hand_end(trailer_fields(fields))

    def stream_reset(self, code: int) -> None:
        self.cancel(TunnelError(ErrorCode.CANCELLED, "The visitor gave the request up."))
        self._connection.finish(self)

    def stream_sent(self) -> None:
        stream = self._stream
        if stream.may_receive:
            # RFC 9113 section 8.1: the answer does not depend on the rest of the upload.
            stream.reset(ErrorCodes.NO_ERROR)
        else:
            stream.leave()
        self._connection.finish(self)

    def stream_head(self, fields: Fields, ended: bool) -> None:
        """Responses are for clients."""

    def stream_interim(self, fields: Fields) -> None:
        """Responses are for clients."""

    # The answer

    def _send_head(self, head: ResponseHead) -> None:
        try:
            if head.status < 200:
                self._send_interim(head)
                return
            fields, framing, length = plan_reply(head, self.method)
            check_fields(fields)
        except ValueError as error:
            self._broken(str(error))
            return
        if b"date" not in dict(fields):
            fields.append((b"date", self._connection.date))
        self.status = head.status
        self._framing, self._left = framing, length
        self._head = [(b":status", b"%d" % head.status), *fields]
        self._deadline = inf  # from here on it is a conversation
        self._connection.hold_head(self)

    def _send_interim(self, head: ResponseHead) -> None:
        if head.status == 101:
            raise ValueError("it switches protocols within HTTP/2")
        fields = [field for field in end_to_end(head.fields) if field[0] != b"content-length"]
        check_fields(fields)
        self._stream.send_head([(b":status", b"%d" % head.status), *fields], end=False)

    def _send_data(self, data: bytes) -> None:
        if data and self._count(len(data)):
            self.release_head()
            self._stream.send_data(data)

    def _send_end(self, trailers: Fields) -> None:
        if not self._may_end():
            return
        kept = trailer_fields(trailers) if self._framing is not Framing.NONE else []
        try:
            check_fields(kept)
        except ValueError as error:
            self._broken(str(error))
            return
        if self._head is not None and not kept:
            self._write_head(end=True)
        else:
            self.release_head()
            self._stream.send_end(kept)

    def _write_head(self, *, end: bool) -> None:
        head, self._head = self._head, None
        assert head is not None
        self._connection.head_gone(self)
        self._stream.send_head(head, end=end)

    def _answer(self, error: TunnelError) -> None:
        """Answer with ``error``'s status."""
        accept = dict(self.head.fields if self.head else ()).get(b"accept", b"")
        fields, body = error_answer(error, accept, self._connection.date)
        self._connection.head_gone(self)
        self._head = None
        self._deadline = inf
        self.status = error.fault.status
        stream = self._stream
        with_body = self.method != b"HEAD"
        stream.send_head([(b":status", b"%d" % error.fault.status), *fields], end=not with_body)
        if with_body:
            self.bytes_out = len(body)
            stream.send_data(body)
            stream.send_end([])

    def _cut(self, code: int) -> None:
        self._stream.reset(code)
        self._connection.finish(self)

    def _renew(self) -> None:
        if self._stream.may_receive and not self.status and not self._is_call:
            self._deadline = self._connection.body_deadline
