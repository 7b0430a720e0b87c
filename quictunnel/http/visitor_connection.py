"""A visitor's connection: bytes in and out, time limits and endings.

One exchange runs at a time. What a visitor sends beyond the request under way is kept as bytes, up to ``head_size``;
then nothing more is read until the answer is done, nor is a further request looked at while the visitor does not read
the answers it has.

Endings, gentlest first:

    close     after a complete answer to a complete request
    linger    the answer is complete and the visitor still sends: say so by a half-close (TLS has none), and read on
              for a moment, because closing would make the kernel send a reset, and that can destroy the answer before
              it is read (RFC 9112 section 9.6)
    cut       the answer is incomplete: an end in its middle shows that, except where the end of the connection is the
              end of the body; there it is a reset. TLS says no goodbye then (RFC 8446 section 6.1)

A visitor that goes away is known by its reset or the end of its bytes, so at once while bytes are read. While they are
not, because the backend holds an upload back, ``end_watch`` tells of both; an end is then read up to, past what is held
back, as only that shows whether the request is whole. After a half-close see ``departure``.
"""

import asyncio
from math import inf
from typing import TYPE_CHECKING, Final, cast

from quictunnel.http.departure import Departure
from quictunnel.http.door import DoorParser, Request
from quictunnel.http.http1_visitor import Http1VisitorLeg
from quictunnel.http.http2_frames import PREFACE
from quictunnel.http.pages import error_page
from quictunnel.http.visitor_output import WRITE_SIZE, VisitorOutput
from quictunnel.wire.errors import ErrorCode, TunnelError
from quictunnel.wire.fields import Forwarding, end_to_end
from quictunnel.wire.frames import RequestHead

if TYPE_CHECKING:
    from quictunnel.http.visitor import VisitorListener

__all__ = ["VisitorConnection"]

# How long, in seconds, and for how many bytes a visitor is listened to after the last answer.
_LINGER_TIME: Final = 2.0
_LINGER_SIZE: Final = 1024 * 1024
_GONE: Final = "The visitor went away."
_NOBODY: Final = Forwarding("", b"http", trusted=False)  # before there is a transport to ask


class VisitorConnection(VisitorOutput):
    """One TCP or TLS connection of a visitor."""

    __slots__ = (
        "_advancing",
        "_all_sent",
        "_body_held",
        "_departure",
        "_eof",
        "_forwarding",
        "_held_to",
        "_leg",
        "_linger_left",
        "_lingering",
        "_listener",
        "_opaque",
        "_opaque_ended",
        "_parser",
        "_passed",
        "_pending",
        "_reading",
        "_reading_to_end",
        "_scheme",
        "_unread",
    )

    def __init__(self, listener: "VisitorListener") -> None:
        super().__init__(listener)
        # for as long as the connection lives
        self._parser = DoorParser(listener.limits)
        self._forwarding = _NOBODY
        self._scheme = b"http"
        self._unread: bytes | None = b""  # the first bytes, until they tell which HTTP this is
        self._held_to = ""  # the host of its TLS handshake

        # what the visitor may still send
        self._reading = True
        self._reading_to_end = False  # the end has come, and what comes before it is in the socket already
        self._eof = False
        self._pending = b""
        self._body_held = False
        self._advancing = False

        # the exchange under way
        self._leg: Http1VisitorLeg | None = None
        self._departure: Departure | None = None  # of a visitor that half-closed
        self._opaque = False
        self._opaque_ended = False  # the peer has said its End
        self._passed = 0  # bytes that had passed when the time was last looked at

        # the end
        self._lingering = False
        self._linger_left = _LINGER_SIZE
        self._all_sent = False  # as it seemed at the last look

    def __repr__(self) -> str:
        state = "closing" if self._closing else "opaque" if self._opaque else "busy" if self._leg else "idle"
        return f"<VisitorConnection {self._forwarding.client} {state}>"

    # What the transport tells

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # asyncio and uvloop switch Nagle's algorithm off themselves.
        self._transport = cast(asyncio.Transport, transport)
        listener = self._listener
        if transport.get_extra_info("sslcontext") is not None:
            self._scheme = b"https"
            # What an event loop gives every other transport; for TLS it is half a megabyte each.
            self._transport.set_write_buffer_limits(high=WRITE_SIZE)
        peer = transport.get_extra_info("peername")
        address = peer[0] if isinstance(peer, tuple) else ""
        self._forwarding = listener.forwarding(address, self._scheme)
        self._held_to = listener.held_to(address, transport)
        self._parser.secure = self._scheme == b"https" or self._forwarding.trusted
        # When the server stops, whoever came at the last moment has as long to begin as the others.
        self.deadline = self._loop.time() + (listener.linger_time if listener.draining else listener.limits.head_time)
        if not listener.admit(self):
            if not transport.is_closing():
                text = "There are as many visitors as may be (serve --max-visitors)."
                self._refuse(TunnelError(ErrorCode.CONNECTION_LIMIT_REACHED, text))
        elif self._scheme == b"https":
            self._unread = None
            if transport.get_extra_info("ssl_object").selected_alpn_protocol() == "h2":
                self._become_http2(b"")

    def data_received(self, data: bytes) -> None:
        leg = self._leg
        if self._opaque and leg is not None:
            leg.hand_body(data)
        elif self._lingering:
            self._linger_left -= len(data)
            if self._linger_left < 0:
                self.abort()
        elif self._pending or self._must_wait:
            self._keep(data)
        elif not self._closing:
            if self._unread is None:
                self._advance(data)
            else:
                self._greet(self._unread + data)

    def eof_received(self) -> bool:
        """Whether the connection stays open for writing."""
        self._eof = True
        leg = self._leg
        if self._closing:
            return False
        if self._scheme == b"https":
            # A TLS connection ends as a whole, and the event loop is about to say a proper goodbye.
            if leg is not None:
                leg.cancel(TunnelError(ErrorCode.CANCELLED, _GONE))
                self._cut(leg)
            return False
        if leg is None:
            return bool(self._pending)
        if self._opaque:
            leg.hand_end([])
            if self._opaque_ended and self._leg is not None:
                self._finish_opaque(leg)
            else:
                self._watch_opaque()
            return not self._closing
        if not self._parser.complete:
            leg.cancel(TunnelError(ErrorCode.CANCELLED, "The visitor went away within its request."))
            self._cut(leg)
            return False
        self._departure = Departure(self, leg)
        return True

    def connection_lost(self, exc: Exception | None) -> None:
        self._closing = True
        self.watch_end(None)
        self.discard()
        self._pending = b""
        leg = self._leg
        if leg is not None:
            leg.cancel(TunnelError(ErrorCode.CANCELLED, _GONE))
            self._leave(leg)
        self._parser.close()
        self._listener.forget(self)

    def pause_writing(self) -> None:
        super().pause_writing()
        if self._leg is not None:
            self._leg.peer.pause()

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._leg is not None:
            self._leg.peer.resume()
        else:
            self._continue()

    # Which HTTP

    def _greet(self, data: bytes) -> None:
        """The first bytes in clear text: HTTP/2 begins with a preface (RFC 9113 section 3.3), nothing else does."""
        if len(data) < len(PREFACE) and PREFACE.startswith(data):
            self._unread = data
        elif data.startswith(PREFACE):
            self._become_http2(data)
        else:
            self._unread = None
            self._advance(data)

    def _become_http2(self, data: bytes) -> None:
        """Give the socket, and what was read from it, to a connection of the other version."""
        # Most servers never see a visitor of that version who does not come by TLS, and what reads it is 2 MB.
        from quictunnel.http.http2_visitor import Http2VisitorConnection

        self._closing = True
        connection = Http2VisitorConnection(self._listener, self._forwarding, self._scheme, self._held_to)
        self._listener.replace(self, connection)
        self._parser.close()
        self._transport.set_protocol(connection)
        connection.connection_made(self._transport)
        if data:
            connection.data_received(data)

    # Requests

    @property
    def _must_wait(self) -> bool:
        """Whether what comes now belongs to a request whose turn has not come."""
        return self._write_paused if self._leg is None else self._parser.complete

    def _advance(self, data: bytes) -> None:
        self._advancing = True
        while data:
            data = self._step(data)
        self._advancing = False
        if self._eof and self._leg is None and not self._pending:
            self._close()

    def _step(self, data: bytes) -> bytes:
        """Read up to the end of one request; what is left is for the next step."""
        parser = self._parser
        was_idle = parser.complete
        try:
            rest = parser.feed(data)
        except TunnelError as error:
            self._refuse(error)
            return b""
        if parser.request is not None:
            self._open(parser.request)
        elif was_idle:
            self.deadline = self._loop.time() + self._listener.limits.head_time
        self._hand_over()
        if self._closing:
            return b""
        if rest and self._must_wait:
            self._keep(rest)
            return b""
        return rest

    def _open(self, request: Request) -> None:
        """Begin an exchange."""
        forwarding = self._forwarding
        fields = forwarding.apply(end_to_end(request.fields), request.authority, request.version)
        if request.protocol:
            # A length of 0; the bytes after the 101 are no body.
            fields = [field for field in fields if field[0] != b"content-length"]
        head = RequestHead(
            request.method,
            self._scheme,
            request.authority,
            request.target,
            fields,
            request.body or bool(request.protocol),
            request.protocol,
        )
        leg = self._leg = Http1VisitorLeg(self, forwarding.client, self._loop.time())
        leg.begin(head, request.host, request.version, request.tunnel, keep_alive=request.keep_alive)
        self.deadline = inf
        if self._eof:
            self._departure = Departure(self, leg)
        self._listener.begin(head, leg, self._held_to)
        leg.peer.receive(head)

    def _hand_over(self) -> None:
        parser, leg = self._parser, self._leg
        body = parser.take_body()
        if leg is None:
            return
        if body:
            leg.hand_body(body)
            if self._leg is not leg:
                return
        if not parser.complete:
            self._watch_body()
            return
        self.deadline = inf
        if self._body_held:
            self._update_reading()
        assert leg.head is not None
        if not leg.head.protocol:
            leg.hand_end(parser.trailers)

    def _keep(self, data: bytes) -> None:
        self._pending += data
        self._update_reading()

    def _continue(self) -> None:
        """Go on with what was kept, if its turn has come."""
        if self._pending and not self._advancing and not self._closing and not self._must_wait:
            data, self._pending = self._pending, b""
            self._update_reading()
            self._advance(data)

    def _refuse(self, error: TunnelError) -> None:
        """Answer bytes that are no request, or no longer one."""
        leg = self._leg
        if leg is None:
            leg = self._leg = Http1VisitorLeg(self, self._forwarding.client, self._loop.time())
        leg.cancel(error)
        self.fail(leg)

    # What the leg tells

    @property
    def may_persist(self) -> bool:
        """Whether another exchange may follow, as far as the server is concerned.

        Not when the server stops, unless the visitor has asked for something more already.
        """
        return self._may_follow and (bool(self._pending) or not self._listener.draining)

    @property
    def _may_follow(self) -> bool:
        """Whether the visitor can ask for something more.

        Not behind a request that still comes: its answer may end first, and with it the connection.
        """
        return self._parser.complete and (not self._eof or bool(self._pending))

    def hold_body(self, held: bool) -> None:
        """Stop or go on reading the request's body."""
        self._body_held = held
        if not self._parser.complete:
            self._watch_body()
        self._update_reading()

    def finish(self, leg: Http1VisitorLeg, *, keep_alive: bool) -> None:
        """The answer is complete."""
        self.flush()
        self._leave(leg)
        if leg.head is None or not self._parser.complete:
            self._linger(leg)
        elif keep_alive and self._may_follow:
            # The server may stop since it has said so: what the visitor makes of that is on its way.
            self.deadline = self._loop.time() + self._listener.idle_time
            self._continue()
        elif self._pending:
            self._linger(leg)
        else:
            self._close()

    def fail(self, leg: Http1VisitorLeg) -> None:
        """The exchange failed: answer with ``leg.error`` if no byte of another answer has been written, else cut."""
        leg.detach()
        error = leg.error
        assert error is not None
        if self.committed:
            self._cut(leg)
            return
        self.discard()
        keep_alive = leg.keep_alive and self.may_persist
        head = leg.head
        page, size = error_page(
            error,
            b",".join([value for name, value in head.fields if name == b"accept"]) if head else b"",
            self.date,
            version=leg.version,
            keep_alive=keep_alive,
            with_body=head is None or head.method != b"HEAD",
        )
        leg.status = error.fault.status
        leg.bytes_out = size
        self.send_soon(page)
        self.finish(leg, keep_alive=keep_alive)

    def become_opaque(self, leg: Http1VisitorLeg) -> None:
        """A 101 has passed: what was kept, and all that follows, is for the peer."""
        self._opaque = True
        self.flush()
        early, self._pending = self._pending, b""
        self._update_reading()
        if early:
            leg.hand_body(early)
        if self._eof:
            leg.hand_end([])
            self._watch_opaque()

    def end_opaque(self, leg: Http1VisitorLeg) -> None:
        """The peer has said all it had to say after a 101."""
        self.flush()
        self._opaque_ended = True
        if self._eof:
            self._finish_opaque(leg)
        elif self._transport.can_write_eof():
            self.half_close()
            self._watch_opaque()
        else:
            leg.hand_end([])
            self._finish_opaque(leg)

    # Endings

    def drain(self) -> None:
        # Its next request may be on its way: that is answered, and the answer says that it was the last.
        if self._leg is None and not self._pending and self._parser.complete and not self._closing:
            self.deadline = min(self.deadline, self._loop.time() + self._listener.idle_time)

    def _leave(self, leg: Http1VisitorLeg) -> None:
        self._leg = None
        self.committed = self._opaque = False
        self._body_held = False
        if self._departure is not None:
            self._departure.cancel()
            self._departure = None
        self.watch_end(None)
        leg.leave()
        self._listener.done(leg)
        if not self._closing:
            self._update_reading()

    def _cut(self, leg: Http1VisitorLeg) -> None:
        reset = leg.ends_with_connection
        self._closing = True
        self._leave(leg)
        self.drop(reset=reset)

    def _finish_opaque(self, leg: Http1VisitorLeg) -> None:
        self._leave(leg)
        self._close()

    def _close(self) -> None:
        if not self._closing:
            self._closing = True
            self._watch_writes()
            self._say_goodbye()

    def _say_goodbye(self) -> None:
        self._transport.close()
        # TLS would wait for the visitor's goodbye too; once it has everything, nobody needs that.
        self.deadline = self._loop.time() if self._scheme == b"https" else inf

    def _linger(self, leg: Http1VisitorLeg) -> None:
        tls = self._scheme == b"https"
        if self._eof or (tls and leg.ends_with_connection):
            self._close()
            return
        self._closing = self._lingering = True
        self._pending = b""
        self._update_reading()
        self.deadline = self._loop.time() + _LINGER_TIME
        self._watch_writes()
        if not tls:  # there a goodbye is for both directions: what the visitor still sends would break it
            self.half_close()

    # Time limits, and visitors that are gone

    def expire(self, now: float) -> None:
        if now >= self.write_deadline:
            self._expire_writes()
        elif self._closing:
            self._expire_goodbye()
        elif self._opaque:
            self._expire_opaque()
        elif self._leg is not None and self._leg.bytes_out != self._passed:
            self._watch_body()  # the answer goes on: the upload may be waiting for it
        elif self._leg is not None:
            self._refuse(TunnelError(ErrorCode.REQUEST_TIMEOUT, "The request's body stopped coming."))
        elif self._parser.in_head or self._unread:
            self._refuse(TunnelError(ErrorCode.REQUEST_TIMEOUT))
        else:
            self._close()

    def _expire_goodbye(self) -> None:
        if self.has_unsent:
            self._all_sent = False
        elif self._scheme == b"https" and not self._all_sent:
            # The kernel's queue may have become empty just now, and what is to follow comes in the loop's next turn.
            self._all_sent = True
        elif self._lingering and self._scheme == b"https":
            self._lingering = self._all_sent = False
            self._say_goodbye()
        else:
            self.abort()

    @property
    def is_reading(self) -> bool:
        return self._reading

    def _watch_body(self) -> None:
        self.deadline = inf if self._body_held else self._loop.time() + self._listener.limits.body_idle_time
        self._passed = self._leg.bytes_out if self._leg is not None else 0

    def _watch_opaque(self) -> None:
        """One direction is closed: the other may not stay silent for ever."""
        if self._leg is not None:
            if self._eof:
                self.watch_end(self._ended_unread, reset_only=True)
            self._passed = self._leg.bytes_in + self._leg.bytes_out
            self.deadline = self._loop.time() + self._listener.limits.idle_time

    def _expire_opaque(self) -> None:
        leg = self._leg
        if leg is not None and leg.bytes_in + leg.bytes_out == self._passed:
            leg.cancel(TunnelError(ErrorCode.CANCELLED, "The half-closed connection was silent for too long."))
            self._cut(leg)
        else:
            self._watch_opaque()

    def _update_reading(self) -> None:
        """Read unless the peer holds an unfinished request back, or too much is kept."""
        held = self._body_held and (self._opaque or not self._parser.complete)
        waits = held or len(self._pending) >= self._listener.limits.head_size
        reading = self._lingering or self._reading_to_end or not waits
        if reading == self._reading or self._eof or self._transport.is_closing():
            return
        self._reading = reading
        if reading:
            self.watch_end(None)
            self._transport.resume_reading()
        else:
            self._transport.pause_reading()
            self.watch_end(self._ended_unread)

    def _ended_unread(self, reset: bool) -> None:
        """The visitor has ended the connection, its side of it at least, while nothing is read."""
        if reset:
            self.abort()
        elif self._leg is None or self._opaque or not self._parser.complete:
            # No more than the socket's buffer holds.
            self._reading_to_end = True
            self._update_reading()
        elif self._departure is None:
            self._departure = Departure(self, self._leg)
