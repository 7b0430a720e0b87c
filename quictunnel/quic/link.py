"""One QUIC connection of a session: its streams, its control stream, its timer, and one transmit for a whole burst.

A link is fed datagrams and turns the library's events into frames on stream legs. Whatever wants to be sent marks its
leg as dirty; one flush at the end of the event loop's turn writes all of them and sends the packets, so the frames of
many streams share a packet.
"""

import asyncio
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from math import inf
from typing import Any, Final

from loguru import logger
from mypy_extensions import mypyc_attr

from quictunnel.exchange import VOID
from quictunnel.log import escape
from quictunnel.quic.attention import Attention
from quictunnel.quic.engine import STREAM_OVER, Connection, Engine
from quictunnel.quic.path_mtu import BASE, PROBE_UIDS, PathMtu
from quictunnel.quic.sockets import QUOTED
from quictunnel.quic.stream import StreamLeg
from quictunnel.wire.control import (
    ControlDecoder,
    ControlMessage,
    Credit,
    Strange,
    Unknown,
    encode_control,
    encode_credit,
)
from quictunnel.wire.credit import WindowBudget
from quictunnel.wire.errors import ErrorCode, ProtocolError, TunnelError
from quictunnel.wire.frames import RequestHead

__all__ = ["SLOTS", "SUSPECT_AFTER", "Link", "LinkClosed", "LinkOwner"]

# qh3 lets a peer have 100 streams open, aioquic 128, neither can be told otherwise.
SLOTS: Final = 100

SUSPECT_AFTER: Final = 4.0
"seconds of silence, on either end, after which another link is preferred: more than two pings of a client are missing"

_SHORT: Final = 1.0
"seconds of silence that nobody draws a conclusion from"

STALL_TIME: Final = 300.0
"seconds in which a receiver may grant nothing to what waits for its credit; a visitor has as long to take an answer"

# A link asks for the round trip this often while credit is granted on it, in seconds.
_PROBE_EVERY: Final = 0.25

_DRAIN_EVERY: Final = 10.0
"seconds without a pause in which credit is granted, until the queues of it are let run empty to find the round trip"

_DRAIN_LIMIT: Final = 1.0
"seconds that it may take"

_PAUSE: Final = 1.0
"seconds without a grant that are one"

_LEAST_FOR: Final = 10.0
"seconds, once or twice, in which a round trip is the least"

_REMEMBERED: Final = 256
"datagrams of which it is remembered how they began: more are seldom under way"

_PROBE_WAIT: Final = 0.3
_UNKNOWN_WAIT: Final = 1.0
"seconds, or four round trips, that a probe of a size may take, and if the round trip is not known"

_SUSPICIOUS_LOSSES: Final = 8
"packets lost between two looks after which it is checked whether a large one still arrives, by so many probes:"
_CHECKS: Final = 2

_CONTROL_LIMIT: Final = 256 * 1024
"bytes of control messages that wait for the peer to read: far more than hours of credit are"

# Each control message costs as much as a packet, and a packet holds eighty. An honest end says a handful in a minute,
# and one for each link when a load begins. CREDIT is not counted: it is cheap, and there is some for every 128 KiB.
_CONTROL_BURST: Final = 256
_CONTROL_RATE: Final = 10.0
"a second"

_EARLY: Final = 0.001
"seconds that a timer of the event loop may fire too early"

_REASON_LIMIT: Final = 200
"characters of the peer's last words that are passed on"

HEAD_LIMIT: Final = 256 * 1024
"bytes of an encoded field section; the HTTP legs have limits of their own, far below"


class LinkClosed(Exception):
    """The link ended before what was asked of it: ``code`` is QUIC's error code, 0 for an orderly end."""

    def __init__(self, code: int, reason: str) -> None:
        self.code = code
        self.reason = reason
        super().__init__(code, reason)

    def __str__(self) -> str:
        return self.reason or f"QUIC error {self.code:#x}"


@mypyc_attr(allow_interpreted_subclasses=True)
class LinkOwner:
    """What a link tells the one who made it. Each call may close the link."""

    def link_ready(self, link: "Link") -> None:
        """The handshake is complete."""

    def link_control(self, link: "Link", message: ControlMessage) -> None:
        """A message came on the control stream."""

    def link_request(self, link: "Link", leg: StreamLeg, head: RequestHead) -> RequestHead:
        """The peer opened a stream: join ``leg`` or abort it; the head that is returned is handed to its peer next."""
        leg.abort(TunnelError(ErrorCode.NOT_ACCEPTED))
        return head

    def link_moved(self, link: "Link") -> None:
        """The peer's datagrams come from another address than before."""

    def link_refused(self, link: "Link") -> None:
        """The peer's host says that nobody listens there."""

    def link_slot_free(self, link: "Link", leg: StreamLeg) -> None:
        """The stream of ``leg``, one of ours, ended."""

    def link_slots_allowed(self, link: "Link") -> None:
        """The peer allows streams again after ``has_slot`` had found that it allowed no more."""

    def link_closed(self, link: "Link", why: LinkClosed) -> None:
        """The link is gone; its exchanges have been aborted."""

    def link_terminated(self, link: "Link") -> None:
        """Nothing more will be sent or received on the link."""


class Link:
    """One QUIC connection, either end."""

    def __init__(
        self,
        engine: Engine,
        connection: Connection,
        send: Callable[[list[tuple[bytes, Any]]], None],
        owner: LinkOwner,
        budget: WindowBudget,
        *,
        is_client: bool,
        datagram_limit: Callable[[Any], int] = lambda address: BASE,
        attention: Attention | None = None,
    ) -> None:
        """``datagram_limit`` says how large a datagram may be to leave for an address: larger ones are not tried.

        ``attention`` knows when the peer could not have been heard; None: it always could.
        """
        self.engine = engine
        self._burst = engine.burst
        self.is_client = is_client
        self.budget = budget
        self.owner = owner
        self.session: Any = None  # the owner's, to find its own again
        self.address: Any = None  # where the peer's last datagram came from
        self.address_changes = 0

        # for as long as the connection lives
        self._connection = connection
        self._send = send
        self._loop = asyncio.get_running_loop()
        self._control_in = ControlDecoder()
        self._control_out: list[bytes] = []
        self._control_room = float(_CONTROL_BURST)  # for messages of the peer's
        self._control_at = self._loop.time()
        self._legs: dict[int, StreamLeg] = {}
        # Streams that ended here before the peer had ended its direction: what still comes on them opens nothing. At
        # most as many as the peer may have open.
        self._deaf: set[int] = set()
        self._stalled: dict[StreamLeg, float] = {}  # those that wait for credit, since when
        self.begun = 0  # streams of the peer's that were ever seen
        self.probed = 0  # those of them that were only probes
        self.opened = 0  # streams of ours, ever
        self._allowed = 0  # how many the peer allows, as far as we last looked
        self._starved = False  # it allowed no more when we did
        self.active = 0  # slots of ours in use
        self.answered_at = self._loop.time()  # when the other end last took part in an exchange of ours
        self.ready = False
        self.resumed = False  # the handshake was that of an earlier link, by a ticket
        self.draining = False  # no new exchange may start on it
        self.closed: LinkClosed | None = None
        self.terminated = False  # the library has nothing more to send either
        self.on_terminated: Callable[[Link], None] = lambda link: None
        self.on_connection_id: Callable[[Link, bytes, bool], None] = lambda link, cid, issued: None
        self.on_address: Callable[[Link, Any], None] = lambda link, before: None

        # liveness, in seconds of the loop's clock
        self._attention = attention
        self.heard_at = self._loop.time()
        self.refused = False  # ICMP said that nobody listens at the peer's port; what comes from the peer refutes it
        self.refused_from = 0  # while it is: datagrams of this number and later ones did not arrive
        self._refused_at = self._refused_last = 0.0  # the first and the last time that it was said since
        self.sent = 0  # datagrams ever; the next one's number
        # How the last ones began, at a server's end: proof of what is said to be refused.
        self._beginnings: deque[bytes] = deque(maxlen=0 if is_client else _REMEMBERED)
        self.round_trip: float | None = None
        self._least = self._least_before = inf
        self._least_until = 0.0
        self._pings: dict[int, float] = {}
        self._ping_count = 0
        self.drains = False  # no credit is granted, until a ping has met no queue of what it was granted for
        self._drained: dict[StreamLeg, None] = {}  # those that wait for it
        self._drain_ping = 0
        self._drain_due = self._drain_until = 0.0
        self._granted_at = 0.0
        self._pinged_at = 0.0

        # the size of datagrams
        self._path = PathMtu()
        self._datagram_limit = datagram_limit
        self._prober: asyncio.TimerHandle | None = None  # for the search
        self._probed_at = 0.0
        self._losses = 0  # when it was last looked
        self._checks = 0  # probes of the present size that are missing
        self._checker: asyncio.TimerHandle | None = None

        # for one turn of the loop
        self._dirty: list[StreamLeg] = []
        self._scheduled = False
        self._timer: asyncio.TimerHandle | None = None
        self._timer_at = 0.0
        self._ahead = 0.0  # what the library was told that the time is, where the loop's clock has not come so far

    def __repr__(self) -> str:
        state = "closed" if self.closed else "ready" if self.ready else "handshake"
        return f"<Link {'client' if self.is_client else 'server'} {state} active={self.active} of {SLOTS}>"

    @property
    def connection_id(self) -> bytes:
        """The id that this end chose for the connection first."""
        return self._connection.host_cid

    @property
    def least_round_trip(self) -> float | None:
        """The least of late, in seconds: what waits in queues, our own too, is not in it. None if there is none yet."""
        least = min(self._least, self._least_before)
        return None if least == inf else least

    @property
    def exchanges(self) -> int:
        """How many exchanges are under way."""
        return len(self._legs)

    @property
    def stalls(self) -> int:
        """How many exchanges wait for the peer's credit."""
        return len(self._stalled)

    def legs(self) -> list[StreamLeg]:
        """Those that are under way."""
        return list(self._legs.values())

    def number_of(self, quoted: bytes) -> int | None:
        """The number of the last datagram that began like this; None if there is none or too little is quoted."""
        if len(quoted) < QUOTED:
            return None
        beginning = quoted[:QUOTED]
        for back, each in enumerate(reversed(self._beginnings), 1):
            if each == beginning:
                return self.sent - back
        return None

    def unreachable(self, number: int) -> None:
        """The peer's host refused a datagram of ours, proved by ``number_of``.

        A process that is gone does not come back to its port: whatever was sent after it did not arrive either.
        """
        if self.closed is not None:
            return
        now = self._loop.time()
        if not self.refused:
            self.refused = True
            self.refused_from = number
            self._refused_at = now
        self.refused_from = min(self.refused_from, number)
        self._refused_last = now
        self.owner.link_refused(self)

    def refused_for(self) -> float:
        """Seconds between the first refusal and the last, with nothing heard from the peer since."""
        return self._refused_last - self._refused_at if self.refused else 0.0

    def silent_for(self) -> float:
        """Seconds since the peer was heard, without those in which it could not have been.

        Endless when its host says that nobody listens.
        """
        if self.refused:
            return inf
        silent = self._loop.time() - self.heard_at
        return silent if silent < _SHORT else self.listened_since(self.heard_at)

    def listened_since(self, then: float) -> float:
        """Of the seconds since ``then``, those in which the peer could have been heard."""
        return self._loop.time() - then if self._attention is None else self._attention.seconds_since(then)

    # What others ask of a link

    def connect(self, address: Any) -> None:
        """Begin the handshake with the server at ``address``."""
        self.address = address
        self._connection.expect_datagrams(self._datagram_limit(address))
        self._connection.connect(address, now=self._loop.time())
        self.schedule()

    def has_slot(self) -> bool:
        """Whether one more stream of ours may be opened now."""
        return (
            self.active < SLOTS
            and self.ready
            and not self.draining
            and self.closed is None
            and (self.opened < self._allowed or self._may_open())
        )

    def _may_open(self) -> bool:
        self._allowed = self.engine.streams_allowed(self._connection)
        if self.opened < self._allowed:
            return True
        if not self._starved:
            self._starved = True
            self.ping()  # a peer with nothing to send has no packet to raise its limit in
        return False

    @property
    def filling(self) -> bool:
        """Whether streams have something to write at the end of this turn, and one more would leave with them."""
        return 0 < len(self._dirty) < self._burst

    def attach(self, leg: StreamLeg) -> None:
        """Give one of our slots to ``leg``; its stream is opened by the first flush that has bytes for it."""
        self.active += 1
        self.opened += 1
        leg.attached(self)

    def send_control(self, message: ControlMessage) -> None:
        """Say ``message`` on the control stream."""
        self._control_out.append(encode_control(message))
        self.schedule()

    def grant(self, leg: StreamLeg, limit: int) -> None:
        """Tell the peer the new limit of the direction that ``leg`` receives."""
        self._control_out.append(encode_credit(leg.stream_id, limit))
        now = self._loop.time()
        if now - self._pinged_at > _PROBE_EVERY:
            self.ping()
        if now - self._granted_at > _PAUSE:
            self._drain_due = now + _DRAIN_EVERY
        elif now > self._drain_due:
            self._drain_due = now + _DRAIN_EVERY
            self.drains = True
            self._drain_until = now + _DRAIN_LIMIT
        self._granted_at = now
        self.schedule()

    def drained(self, leg: StreamLeg) -> None:
        """Nearly all that ``leg`` was to get before the queues are empty has come."""
        self._drained[leg] = None
        if not self._drain_ping:
            self.ping()
            self._drain_ping = self._ping_count

    def _end_drain(self) -> None:
        self.drains = False
        self._drain_ping = 0
        drained, self._drained = self._drained, {}
        for leg in drained:
            leg.grant()

    def stalled(self, leg: StreamLeg) -> None:
        """From now on ``leg`` waits for the peer's credit."""
        self._stalled[leg] = self._loop.time()

    def moves(self, leg: StreamLeg) -> None:
        """``leg`` waits no longer."""
        self._stalled.pop(leg, None)

    def end_stalled(self) -> None:
        """End the exchanges that have waited too long for the peer's credit; called every second or two."""
        if self.drains and self._loop.time() > self._drain_until:
            self._end_drain()  # of a ping that is not answered, or of legs that all stopped before
        late = self._loop.time() - STALL_TIME
        for leg in [leg for leg, since in self._stalled.items() if since < late]:
            leg.stalled_too_long()

    def path_changed(self) -> None:
        """This end sends from another address than before: ask whether it is heard there."""
        if self.closed is None:
            self.engine.path_changed(self._connection)
            self._measure_path()
            self.ping()

    def ping(self) -> None:
        """Ask for a sign of life; ``round_trip`` and ``heard_at`` change when it comes."""
        if self.closed is not None or not self.ready:
            return
        self._pinged_at = now = self._loop.time()
        self._ping_count += 1
        if len(self._pings) > 64:
            self._pings.clear()
        self._pings[self._ping_count] = now
        try:
            self._connection.send_ping(self._ping_count)
        except Exception as error:
            self._broken(error)
        self.schedule()

    @property
    def datagram_size(self) -> int:
        """Bytes of the largest datagram that is sent on the link."""
        return self._connection.datagram_size

    def close(self, code: int = ErrorCode.NO_ERROR, reason: str = "") -> None:
        """End the link now: what is under way on it is aborted."""
        if self.closed is None:
            self.flush()  # what was said before the end is still sent
            self._end(code, reason)
            self.flush()

    def abandon(self, why: LinkClosed) -> None:
        """Drop a link whose peer cannot be told."""
        self._lost(why)
        self._terminate()

    # Sending

    def wake(self, leg: StreamLeg) -> None:
        """``leg`` has something to send."""
        if len(self._dirty) >= self._burst:
            self.flush()
        self._dirty.append(leg)
        self.schedule()

    def schedule(self) -> None:
        """There are packets to send."""
        if not self._scheduled:
            self._scheduled = True
            self._loop.call_soon(self._turn_ended)

    def open_stream(self, leg: StreamLeg) -> int:
        """The id of a new stream; bytes must be written to it before anything else happens."""
        stream_id = self._connection.get_next_available_stream_id()
        self._legs[stream_id] = leg
        return stream_id

    def cut_stream(self, stream_id: int, code: int, *, sending: bool, receiving: bool) -> None:
        """RESET_STREAM and STOP_SENDING, where those directions are still open."""
        # The libraries refuse for a direction that has ended in the meantime: it then needs nothing more.
        if sending:
            with suppress(*STREAM_OVER):
                self._connection.reset_stream(stream_id, code)
        if receiving:
            with suppress(*STREAM_OVER):
                self._connection.stop_stream(stream_id, code)
        self.schedule()

    def release(self, leg: StreamLeg) -> None:
        """``leg`` has ended: its slot is free."""
        self._legs.pop(leg.stream_id, None)
        self._stalled.pop(leg, None)
        self._drained.pop(leg, None)
        if self.is_client:
            if leg.may_receive:
                self._deaf.add(leg.stream_id)
        else:
            self.active -= 1
            if leg.stream_id < 0:
                self.opened -= 1  # it ended before its stream was opened
            self.owner.link_slot_free(self, leg)

    def _turn_ended(self) -> None:
        self._scheduled = False
        self.flush()

    def flush(self) -> None:
        """Write what the dirty legs hold and send all packets that may go."""
        if self.terminated:
            self._dirty.clear()
            return
        try:
            self._flush()
        except Exception as error:
            self._broken(error)

    def _flush(self) -> None:
        connection = self._connection
        if self.closed is None:
            if self._dirty:
                dirty, self._dirty = self._dirty, []
                for leg in dirty:
                    leg.flush(connection)
            if self._control_out and self.ready:
                self._flush_control()
        now = self._now()
        self._transmit(now)
        self._arm(connection.get_timer(), now)

    def _transmit(self, now: float) -> None:
        datagrams = self._connection.datagrams_to_send(now=now)
        if datagrams:
            self._send(datagrams)
            self.sent += len(datagrams)
            if not self.is_client:
                self._beginnings.extend([data[:QUOTED] for data, _ in datagrams])

    def _flush_control(self) -> None:
        data = b"".join(self._control_out)
        self._control_out.clear()
        try:
            self._connection.send_stream_data(0, data)
        except STREAM_OVER:
            self._end(ErrorCode.FRAME_ERROR, "the control stream was cut")
            return
        if self.queued(0) > _CONTROL_LIMIT:
            self._end(ErrorCode.FRAME_ERROR, "the control stream is not read")

    def queued(self, stream_id: int) -> int:
        """Bytes written to a stream that have not left yet."""
        return self._connection.get_send_buffer_size(stream_id)

    @property
    def unsent(self) -> int:
        """Bytes of all streams that have not left yet."""
        return 0 if self.closed is not None else self._connection.get_send_buffer_size(None)

    def refuse_unjoined(self) -> None:
        """Refuse what the peer has begun and nobody has taken up: it is safe to send elsewhere."""
        for leg in [leg for leg in self._legs.values() if leg.peer is VOID]:
            leg.abort(TunnelError(ErrorCode.NOT_ACCEPTED))

    def _arm(self, at: float | None, now: float) -> None:
        # Every packet moves the library's timer, nearly always to later: a handle that fires too early asks again,
        # which is cheaper than a cancelled handle for every burst.
        timer = self._timer
        if timer is not None:
            if at is not None and at >= self._timer_at:
                return
            timer.cancel()
            self._timer = None
        if at is not None:
            self._timer_at = at
            self._timer = self._loop.call_at(max(at, now), self._timer_fired)

    def _now(self) -> float:
        """The time as the library is to have it: it never goes back.

        uvloop's clock stands still within a turn and counts milliseconds, to which timers are rounded. One that was
        due in half a millisecond fires at once, again and again, if the clock then says that it is not due.
        """
        return max(self._loop.time(), self._ahead)

    def _timer_fired(self) -> None:
        self._timer = None
        if self.terminated:
            return
        try:
            at = self._connection.get_timer()
            now = self._now()
            if at is not None and at <= now + _EARLY:
                self._ahead = max(at, now)
                self._connection.handle_timer(now=self._ahead)
                self._events()
                self._watch_path()
                self.schedule()
            else:
                self._arm(at, now)
        except Exception as error:
            self._broken(error)

    # Receiving

    def datagram_received(self, data: bytes, address: Any) -> None:
        """Take a datagram of this connection."""
        self._take([data], address)

    def datagrams_received(self, datagrams: list[bytes], address: Any) -> None:
        """Take datagrams of this connection that came in one go from one address."""
        if len(datagrams) == 1 or (self.ready and self._connection.may_take_several()):
            self._take(datagrams, address)
        else:
            for data in datagrams:
                self._take([data], address)

    def _take(self, datagrams: list[bytes], address: Any) -> None:
        if self.terminated:
            return
        self.heard_at = now = self._now()
        self.refused = False
        if address != self.address:
            self._moved(address)
        try:
            if len(datagrams) == 1:
                self._connection.receive_datagram(datagrams[0], address, now=now)
            else:
                self._connection.receive_many_datagrams(datagrams, address, now=now)
            if self.engine.sends_before_events and self.ready:
                self._transmit(now)
            self._events()
            self._look_for_slots()
            trip = self._connection.latest_round_trip
            if trip is not None and (trip < self._least or now > self._least_until):
                self._note_least(trip)
        except Exception as error:
            self._broken(error)
        self.schedule()

    def _note_least(self, trip: float) -> None:
        if self.heard_at > self._least_until:
            self._least_before, self._least = self._least, inf
            self._least_until = self.heard_at + _LEAST_FOR
        self._least = min(self._least, trip)

    def _look_for_slots(self) -> None:
        if self._starved and self.opened < self.engine.streams_allowed(self._connection):
            self._starved = False
            self.owner.link_slots_allowed(self)

    def _moved(self, address: Any) -> None:
        before, self.address = self.address, address
        self.on_address(self, before)
        if before is None:
            self._connection.expect_datagrams(self._datagram_limit(address))
        else:
            self.address_changes += 1
            self._measure_path()
            self.owner.link_moved(self)

    def _events(self) -> None:
        events = self.engine.events
        next_event = self._connection.next_event
        while (event := next_event()) is not None:
            kind = type(event)
            if kind is events.StreamDataReceived:
                if self.closed is None:
                    self._stream_data(event.stream_id, event.data, event.end_stream)
            elif kind is events.PingAcknowledged:
                self._ping_acknowledged(event.uid)
            elif kind is events.StreamReset:
                self._stream_cut(event.stream_id, event.error_code, True)
            elif kind is events.StopSendingReceived:
                self._stream_cut(event.stream_id, event.error_code, False)
            elif kind is events.HandshakeCompleted:
                self.ready = True
                self.resumed = event.session_resumed
                self._measure_path()
                self.owner.link_ready(self)
            elif kind is events.ConnectionIdIssued:
                self.on_connection_id(self, event.connection_id, True)
            elif kind is events.ConnectionIdRetired:
                self.on_connection_id(self, event.connection_id, False)
            elif kind is events.ConnectionTerminated:
                # The peer's words are bound for logs and terminals.
                self._lost(LinkClosed(event.error_code, escape(event.reason_phrase[:_REASON_LIMIT])))
                self._terminate()
                return

    def _stream_data(self, stream_id: int, data: bytes, fin: bool) -> None:
        leg = self._legs.get(stream_id)
        if leg is not None:
            self.answered_at = self.heard_at
            leg.data_received(data, fin)
        elif stream_id == 0:
            self._control(data, fin)
        elif self.is_client and stream_id & 3 == 1:
            if stream_id in self._deaf:
                if fin:
                    self._deaf.discard(stream_id)
                return
            self.begun += 1
            leg = StreamLeg(self.budget, HEAD_LIMIT, is_opener=False)
            leg.stream_id = stream_id
            self._legs[stream_id] = leg
            leg.attached(self)
            leg.data_received(data, fin)
        elif not self.is_client and stream_id & 3 == 1:
            return  # the rest of an exchange that has ended here
        else:
            self.close(ErrorCode.FRAME_ERROR, f"stream {stream_id} must not be opened by the peer")

    def _stream_cut(self, stream_id: int, code: int, was_reset: bool) -> None:
        leg = self._legs.get(stream_id)
        if leg is not None:
            leg.cut_received(code, was_reset)
        elif stream_id & 3 != 1:
            what = f"stream {stream_id} must not be opened by the peer" if stream_id else "the control stream was cut"
            self._control_out.clear()  # the library takes no more for a stream that its peer has stopped
            self.close(ErrorCode.FRAME_ERROR, what)
        elif was_reset and stream_id in self._deaf:
            self._deaf.discard(stream_id)
        elif was_reset:
            self.begun += 1  # and ended before a byte of it came

    def _control(self, data: bytes, fin: bool) -> None:
        try:
            messages = self._control_in.feed(data)
        except ProtocolError as error:
            self.close(ErrorCode.FRAME_ERROR, str(error))
            return
        for message in messages:
            if self.closed is not None:
                return
            if type(message) is Credit:
                leg = self._legs.get(message.stream)
                if leg is not None:
                    self.answered_at = self.heard_at
                    leg.credit_received(message.limit)
            elif self._too_many():
                self.close(ErrorCode.FRAME_ERROR, "too many control messages")
            elif type(message) is Strange:
                logger.debug("= {!r}: control message of unknown type {!r}", self, message.of)
                self.send_control(Unknown(message.of))
            else:
                self.owner.link_control(self, message)  # type: ignore[arg-type]
        if fin:
            self.close(ErrorCode.FRAME_ERROR, "the control stream was ended")

    def _too_many(self) -> bool:
        now = self._loop.time()
        self._control_room = min(_CONTROL_BURST, self._control_room + (now - self._control_at) * _CONTROL_RATE) - 1
        self._control_at = now
        return self._control_room < 0

    def _ping_acknowledged(self, uid: int) -> None:
        self._watch_path()
        if uid >= PROBE_UIDS:
            self._size_acknowledged(uid)
            return
        then = self._pings.pop(uid, None)
        if then is not None:
            sample = self._loop.time() - then
            # RFC 9002 section 5.3's weight, on samples that are far apart.
            self.round_trip = sample if self.round_trip is None else 0.75 * self.round_trip + 0.25 * sample
            self._note_least(sample)
        if uid == self._drain_ping:
            self._end_drain()

    # The size of datagrams

    def _measure_path(self) -> None:
        """Find how large datagrams may be: the path is another one than before."""
        if not self.ready or self.closed is not None:
            return
        self._connection.probed.clear()
        self._connection.hold_datagram_size(BASE)
        self._path.begin(self._largest(), self._loop.time())
        if self._path.due is None:
            self._connection.use_datagram_size(BASE)
        self._arm_prober()

    def _largest(self) -> int:
        return min(self._datagram_limit(self.address), self._connection.datagram_limit)

    def _arm_prober(self) -> None:
        self._stop_checks()
        if self._prober is not None:
            self._prober.cancel()
            self._prober = None
        if self._path.due is not None:
            self._prober = self._loop.call_at(self._path.due, self._probe_path)

    def _probe_path(self) -> None:
        self._prober = None
        if self.closed is not None:
            return
        connection, now = self._connection, self._loop.time()
        if self.heard_at < self._probed_at:
            self._path.due = now + self._probe_wait()  # not narrow but gone: what is missing says nothing
            self._arm_prober()
            return
        connection.probed.clear()
        sizes = self._path.probes(now, self._probe_wait())
        if not sizes:
            connection.use_datagram_size(self._path.size)
        for size in sizes:
            connection.probe_datagram_size(size)
        if sizes:
            self._probed_at = now
            self.ping()  # where large ones do not arrive, this does
        self._arm_prober()

    def _probe_wait(self) -> float:
        return _UNKNOWN_WAIT if self.round_trip is None else max(_PROBE_WAIT, 4 * self.round_trip)

    def _size_acknowledged(self, uid: int) -> None:
        size = self._connection.probed.pop(uid, None)
        if size is None:
            return
        if size == self._path.size:
            self._stop_checks()
        elif self._path.acknowledged(size):
            logger.debug("= {!r}: datagrams of {} bytes", self, size)
            if self._path.due is not None:
                self._connection.hold_datagram_size(size)
            else:
                self._connection.use_datagram_size(size)
                self._arm_prober()

    def _watch_path(self) -> None:
        """See whether what was large enough to be lost is."""
        if self._path.size == BASE or self.closed is not None:
            return
        connection = self._connection
        loses_large = connection.loses_large()
        if loses_large and connection.may_grow:
            self._path_fell()
        elif (loses_large or connection.losses - self._losses >= _SUSPICIOUS_LOSSES) and self._checker is None:
            # A fall for good has to be proved: where nothing is heard, the path is not narrow but gone.
            self._check_path()
        self._losses = self._connection.losses

    def _check_path(self) -> None:
        self._checker = None
        if self.closed is not None:
            return
        if self.heard_at >= self._probed_at:
            if self._checks == _CHECKS:
                self._path_fell()
                return
            self._checks += 1
            self._probed_at = self._loop.time()
            self._connection.probe_datagram_size(self._path.size)
            self.ping()
        self._checker = self._loop.call_later(self._probe_wait(), self._check_path)

    def _stop_checks(self) -> None:
        self._checks = 0
        if self._checker is not None:
            self._checker.cancel()
            self._checker = None

    def _path_fell(self) -> None:
        logger.debug("= {!r}: datagrams of {} bytes do not arrive any more", self, self._path.size)
        self._connection.probed.clear()
        self._connection.use_datagram_size(BASE)
        self._path.fell(self._largest(), self._loop.time())
        self._arm_prober()
        self.schedule()

    # Ending

    def _end(self, code: int, reason: str) -> None:
        if self.closed is None:
            try:
                self._connection.close(error_code=code, reason_phrase=reason)
            except Exception as error:
                logger.debug("= {!r}: close: {!r}", self, error)
            self._lost(LinkClosed(code, reason))
            self.schedule()

    def _broken(self, error: Exception) -> None:
        if isinstance(error, self.engine.connection_error):
            # The peer has closed the connection: qh3 tells whoever uses it, and as an event only when it has drained.
            self._lost(LinkClosed(ErrorCode.NO_ERROR, f"the link is closed ({error})"))
            return
        # The library's own failure, or ours in an event handler: this link ends, the others and the process go on.
        logger.opt(exception=error).error("{!r}: {!r}", self, error)
        # What can still be said is that it is over: a peer that is not told waits for its idle time-out.
        with suppress(Exception):
            self._connection.close(error_code=ErrorCode.INTERNAL_ERROR, reason_phrase="internal error")
            self._transmit(self._now())
        self.abandon(LinkClosed(ErrorCode.INTERNAL_ERROR, f"{type(error).__name__}: {error}"))

    def _lost(self, why: LinkClosed) -> None:
        if self.closed is not None:
            return
        self.closed = why
        logger.debug("= {!r} ends with {} exchanges: {}", self, len(self._legs), escape(str(why)))
        legs, self._legs = list(self._legs.values()), {}
        for leg in legs:
            leg.link_lost()
        for leg in self._dirty:
            leg.link_lost()
        self._dirty.clear()
        self.owner.link_closed(self, why)

    def _terminate(self) -> None:
        if self.terminated:
            return
        self.terminated = True
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._prober is not None:
            self._prober.cancel()
            self._prober = None
        self._stop_checks()
        self.on_terminated(self)
        self.owner.link_terminated(self)
