"""One socket to a backend: it is lent to a leg for an exchange, and kept for the next one if all went well.

kept (in the owner's list) <-> lent to a leg -> upgraded -> closed
"""

import asyncio
import ssl
from typing import TYPE_CHECKING, Final, Protocol, cast

from quictunnel.http import endings
from quictunnel.http.end_watch import EndWatch
from quictunnel.http.limits import OriginLimits
from quictunnel.http.origin_answer import AnswerParser
from quictunnel.wire.errors import ErrorCode, TunnelError
from quictunnel.wire.frames import Data, End, Frame, RequestHead, ResponseHead

if TYPE_CHECKING:
    from quictunnel.http.origin_leg import OriginLeg

__all__ = ["FOREVER", "OriginConnection", "Owner"]

FOREVER: Final = float("inf")
_END: Final = End()


class Owner(Protocol):
    """Who keeps the connections of one backend."""

    host: bytes
    "the Host of requests that name none"

    limits: OriginLimits

    end_watch: EndWatch
    "tells of resets that come while nothing is read"

    def take(self) -> "OriginConnection | None":
        """A kept connection, None if there is none."""

    def dial(self, leg: "OriginLeg") -> None:
        """Make a connection and call ``leg.connected`` with it, or ``leg.fail``; until then ``leg.dialling`` is set."""

    def keep(self, connection: "OriginConnection") -> None:
        """An exchange ended well: the connection may carry another one."""

    def made(self, connection: "OriginConnection") -> None:
        """The connection is open."""

    def lost(self, connection: "OriginConnection") -> None:
        """The connection is closed."""

    def unkeep(self, connection: "OriginConnection") -> None:
        """The connection was kept and is about to close."""

    def started(self, leg: "OriginLeg") -> None:
        """An exchange began."""

    def ended(self, leg: "OriginLeg") -> None:
        """An exchange that began is over."""


class OriginConnection(asyncio.Protocol):
    """One socket to the backend."""

    __slots__ = (
        "_owner",
        "_upgraded",
        "_watched",
        "deadline",
        "leg",
        "loop",
        "parser",
        "reading",
        "transport",
        "write_paused",
    )

    transport: asyncio.Transport

    def __init__(self, owner: Owner) -> None:
        self._owner = owner
        self._upgraded = False
        self._watched = -1  # the descriptor that the end watch knows, if it does
        self.parser = AnswerParser(size_limit=owner.limits.head_size, fields_limit=owner.limits.head_fields)
        self.loop = asyncio.get_running_loop()
        self.leg: OriginLeg | None = None
        self.deadline = FOREVER
        "event-loop time at which the owner calls ``expire``"
        self.reading = True
        self.write_paused = False

    def __repr__(self) -> str:
        state = "upgraded" if self._upgraded else "free" if self.leg is None else "lent"
        return f"<OriginConnection {state}>"

    # What a leg calls

    def lend(self, leg: "OriginLeg", head: RequestHead) -> None:
        """Carry ``leg``'s exchange."""
        self.leg = leg
        self.deadline = FOREVER
        self.parser.expect(head.method, head.protocol)

    def await_answer(self) -> None:
        """The request has been sent, or waits for the backend's word: the answer's head is due."""
        if not self.parser.head_seen:
            self.deadline = self.loop.time() + self._owner.limits.head_time

    def half_closed(self) -> None:
        """One direction of an upgraded connection has ended: the other may be silent for a bounded time."""
        self.deadline = self.loop.time() + self._owner.limits.half_close_time

    def pause_reading(self) -> None:
        if self.reading and not self.transport.is_closing():
            self.reading = False
            self.transport.pause_reading()
            self._watch_reset(True)

    def resume_reading(self) -> None:
        if not self.reading and not self.transport.is_closing():
            self.reading = True
            self._watch_reset(False)
            self.transport.resume_reading()
            self._renew()

    def write_eof(self) -> None:
        """Say that nothing follows what was written, where that can be said."""
        if self.transport.can_write_eof():
            endings.half_close(self.transport)

    def drop(self) -> None:
        """Close at once; nothing of it is needed any more."""
        leg, self.leg = self.leg, None
        if leg is not None and (self._upgraded or not leg.is_sent() or self.transport.get_write_buffer_size()):
            # An orderly end would stand behind what the backend has not taken yet, and may never take, or would tell
            # it nothing after a half-close.
            endings.reset(self.transport)
        else:
            self.transport.abort()

    # What the owner calls

    def expire(self) -> None:
        """``deadline`` has passed."""
        if self.leg is None:
            self._owner.unkeep(self)
            self.close()
        elif self.reading:
            self._fail(TunnelError(ErrorCode.HTTP_RESPONSE_TIMEOUT, self._late()))
        else:
            # The silence is the peer's doing, which cannot take more.
            self.deadline = FOREVER

    def close(self) -> None:
        """Close in good order, unless bytes are stuck."""
        self.leg = None
        if self.transport.get_write_buffer_size():
            self.transport.abort()
        else:
            self.transport.close()

    # What the event loop calls

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        self._owner.made(self)

    def data_received(self, data: bytes) -> None:
        leg = self.leg
        if leg is None:
            # Nobody asked: whatever this is, it must not become the next exchange's answer (RFC 9112 section 9.2).
            self.drop()
            return
        if self._upgraded:
            self._renew()
            leg.peer.receive(Data(data))
            return
        try:
            frames = self.parser.feed(data)
        except TunnelError as error:
            self._fail(error)
            return
        if frames:
            self._renew()
        for frame in frames:
            kind = type(frame)
            if kind is End:
                self._finish(leg, frame)
                return
            if kind is ResponseHead and cast(ResponseHead, frame).status == 101:
                self._upgrade(leg, frame)
            else:
                leg.peer.receive(frame)
            if self.leg is not leg:
                return

    def eof_received(self) -> bool:
        leg = self.leg
        if leg is None or not self._said_goodbye():
            return False
        if self._upgraded:
            return self._half_close(leg)
        try:
            (frame,) = self.parser.end()
        except TunnelError as error:
            self._broken(error)
        else:
            self._finish(leg, frame)
        return False

    def connection_lost(self, exc: Exception | None) -> None:
        self._watch_reset(False)
        self._owner.lost(self)
        self.write_paused = False
        leg = self.leg
        if leg is None:
            return
        if self._upgraded and leg.answered and exc is None:
            # TLS has no half-close: when its end has been passed on, the whole is over.
            self.leg = None
            leg.leave()
            return
        self._broken(TunnelError(ErrorCode.CONNECTION_TERMINATED, self._cut()))

    def pause_writing(self) -> None:
        self.write_paused = True
        if self.leg is not None:
            # A backend that takes nothing more must at least answer.
            self.await_answer()
            self.leg.pause_peer()

    def resume_writing(self) -> None:
        self.write_paused = False
        if self.leg is not None:
            if not self.leg.is_sent() and not self.parser.head_seen:
                self.deadline = FOREVER
            self.leg.resume_peer()

    # The acts of an answer

    def _renew(self) -> None:
        """The backend has said something whole, or may go on: what is it given now?"""
        leg = self.leg
        if self._upgraded:
            if leg is not None and (leg.asked or leg.answered):
                self.half_closed()
        elif not self.parser.head_seen:
            self.deadline = FOREVER
            if self.write_paused or (leg is not None and leg.is_sent()):
                self.await_answer()
        else:
            limit = self._owner.limits.body_idle_time
            self.deadline = FOREVER if limit is None else self.loop.time() + limit

    def _finish(self, leg: "OriginLeg", end: Frame) -> None:
        self.leg = None
        sent = leg.is_sent()
        if sent and self.parser.keep_alive and not self.write_paused and not self.transport.is_closing():
            self.resume_reading()
            self._owner.keep(self)
        elif sent:
            self.close()
        else:
            # The answer came before the end of the request, whose rest nobody will read (RFC 9112 section 9.3).
            self.transport.abort()
        leg.leave().receive(end)

    def _upgrade(self, leg: "OriginLeg", head: Frame) -> None:
        self._upgraded = True
        self.deadline = FOREVER
        leg.peer.receive(head)
        if self.leg is leg:
            leg.upgraded()

    def _half_close(self, leg: "OriginLeg") -> bool:
        leg.answered = True
        if leg.asked:
            self.close()
            leg.leave().receive(_END)
            return False
        self.half_closed()
        leg.peer.receive(_END)
        # asyncio closes a TLS connection after this, whatever it is told, and logs what it was told.
        stays = self.leg is leg and self.transport.can_write_eof()
        if stays:
            self._watch_reset(True)
        return stays

    def _watch_reset(self, watched: bool) -> None:
        """Nothing is read from now on, or again: the event loop does not tell of a reset, or does."""
        if not watched:
            if self._watched >= 0:
                self._owner.end_watch.discard(self._watched)
                self._watched = -1
        elif (sock := self.transport.get_extra_info("socket")) is not None:
            self._watched = sock.fileno()
            self._owner.end_watch.add(self._watched, self._reset_unread, reset_only=True)

    def _reset_unread(self, reset: bool) -> None:
        """The backend has reset the connection while nothing was read."""
        if self.leg is not None and self.leg.answered:
            self._fail(TunnelError(ErrorCode.CONNECTION_TERMINATED, self._cut()))
        else:
            # What came before it may complete the answer, and is no more than the socket's buffer holds.
            self.resume_reading()

    def _said_goodbye(self) -> bool:
        # Anyone on the path can send a FIN, only the backend a close_notify: without it, an answer that ends with its
        # connection may lack its rest (RFC 9112 section 9.8). asyncio tells of both alike.
        tls = self.transport.get_extra_info("ssl_object")
        if tls is None:
            return True
        try:
            return not tls.read(1)
        except ssl.SSLZeroReturnError:
            return True
        except ssl.SSLError:
            return False

    def _broken(self, error: TunnelError) -> None:
        leg = self.leg
        if leg is not None and not self.parser.started and leg.retry():
            self.leg = None
            self.transport.abort()
            return
        self._fail(error)

    def _fail(self, error: TunnelError) -> None:
        leg = self.leg
        self.drop()
        if leg is not None:
            leg.fail(error)

    def _cut(self) -> str:
        if self._upgraded:
            return "the backend cut the upgraded connection"
        if not self.parser.started:
            return "the backend cut the connection before it answered"
        return "the backend cut the connection within its answer"

    def _late(self) -> str:
        if self.parser.head_seen:
            return "the backend fell silent within its answer"
        return f"the backend did not answer within {self._owner.limits.head_time:g} s"
