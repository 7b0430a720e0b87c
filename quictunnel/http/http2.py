"""One HTTP/2 connection without its socket: a session, and its streams under flow control (RFC 9113).

The state machine and HPACK are ``h2``'s; what goes in comes through ``http2_frames`` one frame at a time. A stream
belongs to a leg, which hears of everything by the calls of ``StreamUser``. Either role: a server's session for a
visitor, a client's for a backend.

Flow control. What a leg hands over is held by its stream until the end of the loop's turn, so that pieces share a
frame and the last one ends the stream. What does not fit the peer's window then, or comes while the socket takes
nothing, pauses the leg's peer; how much that can be is bounded by whoever is paused. What comes is counted by the
exchange's own kind of credit, so a stream's window opens only as its reader takes; the connection's window is given
back at once, or one stream's reader could stop all others.
"""

from collections import deque
from collections.abc import Callable, Iterable
from contextlib import suppress
from math import inf
from typing import Any, Final, Protocol, cast

from h2.config import H2Configuration
from h2.connection import H2Connection
from h2.errors import ErrorCodes
from h2.events import (
    DataReceived,
    Event,
    InformationalResponseReceived,
    PingAckReceived,
    RemoteSettingsChanged,
    RequestReceived,
    ResponseReceived,
    StreamReset,
    TrailersReceived,
    WindowUpdated,
)
from h2.exceptions import ProtocolError
from h2.settings import SettingCodes, Settings
from hpack import Decoder, HeaderTuple, NeverIndexedHeaderTuple

from quictunnel.exchange import Leg
from quictunnel.http.http2_frames import (
    DATA,
    GOAWAY,
    HEADERS,
    PRIORITY,
    SETTINGS,
    SUBSTANCE,
    FrameGate,
    Http2Error,
    RawFrame,
    goaway_frame,
    known_settings,
    ping_frame,
    window_frame,
)
from quictunnel.wire.credit import INITIAL_WINDOW, ReceiveCredit, WindowBudget
from quictunnel.wire.errors import ProtocolError as CreditError
from quictunnel.wire.frames import Fields

__all__ = ["STREAMS", "Http2Error", "Http2Session", "Http2Stream", "SessionOwner", "StreamUser"]

STREAMS: Final = 100
"concurrent streams of one connection: RFC 9113 section 6.5.2 advises no less, and no client opens more unasked"

# Given back as it is used, so it only has to be larger than what is under way.
_CONNECTION_WINDOW: Final = 16 * 1024 * 1024
# Bytes that one stream may write before it is the next one's turn, and all of them before the socket's.
_SLICE: Final = 16 * 1024
_BATCH: Final = 64 * 1024
# Ask for the round trip this often while windows are granted, in seconds.
_PROBE_EVERY: Final = 1.0
_LARGEST_STREAM_ID: Final = 2**31 - 1
# Streams that have ended, of which late frames may still come: more than any round trip can hold.
_REMEMBERED: Final = 1024
# RFC 9113 section 6.5.2: the initial value. A peer may allow more, which would be its to fill and ours to search.
_TABLE_SIZE: Final = 4096

_LAST_CALL: Final = b"lastcall"

# RFC 7541 section 7.1.3: a shared table must not tell one visitor of another's secrets.
_SECRET: Final = frozenset({b"authorization", b"cookie", b"proxy-authorization", b"set-cookie"})


class StreamUser(Protocol):
    """The leg of a stream. No call raises."""

    @property
    def peer(self) -> Leg:
        """The leg that it is joined to."""

    def stream_head(self, fields: Fields, ended: bool) -> None:
        """A response's final head; ``ended`` when nothing follows it."""

    def stream_interim(self, fields: Fields) -> None:
        """A response's head of 1xx."""

    def stream_data(self, data: bytes) -> None:
        """Content, never none."""

    def stream_end(self, trailers: Fields) -> None:
        """The peer has said all."""

    def stream_reset(self, code: int) -> None:
        """The peer gave the stream up, or broke it; it is gone."""

    def stream_sent(self) -> None:
        """Everything up to the end has been written."""


class SessionOwner(Protocol):
    """Whose socket it is."""

    def wake(self) -> None:
        """There may be something to write."""

    def session_request(self, stream: "Http2Stream", fields: Fields, ended: bool) -> None:
        """A request came on a new stream (servers only): give the stream a user, or reset it."""

    def session_goaway(self, last_stream_id: int, code: int) -> None:
        """The peer takes no new streams, and never saw those above ``last_stream_id``."""

    def session_room(self) -> None:
        """The peer allows another number of streams now, or one of ours has ended."""


class _Connection(H2Connection):
    # What late frames are told apart by; the default of 65,536 is megabytes of them.
    MAX_CLOSED_STREAMS = _REMEMBERED


class _Decoder(Decoder):
    """Keeps each field section whole, and content-length from ``h2``.

    For ``h2`` a length that does not add up ends the connection, with everybody's exchanges on it. It is the affair of
    the one request or answer (RFC 9113 section 8.1.1), and those who read heads check it.
    """

    section: Fields

    def decode(self, data: bytes, raw: bool = False) -> Iterable[HeaderTuple]:
        fields = list(super().decode(data, raw))
        self.section = cast(Fields, fields)
        return [field for field in fields if field[0] != b"content-length"]


class Http2Session:
    """One connection's state. Feed it, take its output, and keep its word to ``wake``."""

    def __init__(
        self,
        owner: SessionOwner,
        *,
        is_client: bool,
        head_limit: int,
        budget: WindowBudget,
        clock: Callable[[], float],
    ) -> None:
        """``head_limit`` bounds a field section in bytes (RFC 9113 section 6.5.2); ``clock`` is in seconds."""
        self.owner = owner
        self.is_client = is_client
        self.budget = budget
        self.clock = clock
        # Compressed and padded, a section within the limit is never larger than this.
        self.gate = FrameGate(is_server=not is_client, block_limit=2 * head_limit)
        self.h2 = _Connection(
            H2Configuration(
                client_side=is_client,
                header_encoding=None,
                validate_inbound_headers=False,
                normalize_inbound_headers=False,
                validate_outbound_headers=False,
                normalize_outbound_headers=False,
            )
        )
        self.h2.local_settings = Settings(
            client=is_client,
            initial_values={
                SettingCodes.MAX_CONCURRENT_STREAMS: STREAMS,
                SettingCodes.INITIAL_WINDOW_SIZE: INITIAL_WINDOW,
                SettingCodes.MAX_HEADER_LIST_SIZE: head_limit,
                SettingCodes.ENABLE_PUSH: 0,
            },
        )
        # Between what we announce and this, a section is decoded and refused as one request's affair; beyond it the
        # connection ends, as the decoder stops within it.
        self._decoder = self.h2.decoder = _Decoder()
        self._decoder.max_header_list_size = 2 * head_limit
        self.streams: dict[int, Http2Stream] = {}
        self.closed = False
        self.write_paused = False
        self.heard_at = clock()
        self.round_trip: float | None = None
        self._pinged_at: float | None = None  # of the ping that is under way
        self._probed_at = -_PROBE_EVERY
        self._unacknowledged = 0  # bytes of the connection's window
        self._held: dict[Http2Stream, None] = {}  # streams that hold something, in turn
        self._queued = 0  # content bytes since the last ``take``
        self._extra: list[bytes] = []  # frames that h2 must not know of
        self._given_up: dict[int, None] = {}  # streams that were reset from here, the last ones
        self._unwanted = 0  # bytes of the connection's window that came for them
        self._goaway_said = False
        self._heard_last_call: Callable[[], None] = lambda: None
        self.h2.initiate_connection()
        self.h2.increment_flow_control_window(_CONNECTION_WINDOW - self.h2.inbound_flow_control_window)
        # Announced is announced: h2 would end the connection at one stream more, we refuse that stream (RFC 9113
        # section 5.1.2). A client that has not seen our SETTINGS yet may not know better.
        self.h2.local_settings[SettingCodes.MAX_CONCURRENT_STREAMS] = STREAMS + 1
        self.h2.local_settings.acknowledge()

    def __repr__(self) -> str:
        return f"<Http2Session {'client' if self.is_client else 'server'} streams={len(self.streams)}>"

    # What the owner calls

    def feed(self, data: bytes) -> None:
        """Take bytes from the socket. Raises Http2Error; then ``terminate`` and write what is left to ``take``."""
        self.heard_at = now = self.clock()
        for frame in self.gate.feed(data, now):
            if frame.kind == GOAWAY:
                self._goaway(frame)
            elif frame.kind == DATA and frame.stream_id in self._given_up:
                self._drop(frame)
            elif frame.kind == SETTINGS:
                self._frame(frame, known_settings(frame))
                if self.h2.encoder.header_table_size > _TABLE_SIZE:
                    self.h2.encoder.header_table_size = _TABLE_SIZE
            elif frame.kind != PRIORITY:
                self._frame(frame, frame.raw)
            if self.closed:
                return

    def take(self) -> bytes:
        """What is to be written now; ``wake`` is called again when there is more."""
        if not self.closed:
            self._pump()
        self._queued = 0
        data = self.h2.data_to_send()
        if self._extra:
            data += b"".join(self._extra)
            self._extra.clear()
        if self._held and not self.closed and not self.write_paused and self._queued_any():
            self.owner.wake()
        return data

    def resume(self) -> None:
        """The socket takes more."""
        self.write_paused = False
        if self._held:
            self.owner.wake()

    def open_stream(self, user: StreamUser) -> "Http2Stream":
        """A new stream of ours; a head must be sent on it before anything else happens."""
        stream = Http2Stream(self, self.h2.get_next_available_stream_id())
        stream.user = user
        self.streams[stream.id] = stream
        return stream

    @property
    def room(self) -> int:
        """How many more streams of ours there may be."""
        return min(self.h2.remote_settings.max_concurrent_streams, STREAMS) - len(self.streams)

    def ping(self) -> None:
        """Ask for a sign of life, one at a time; ``heard_at`` and ``round_trip`` change when it comes."""
        if self._pinged_at is None and not self.closed:
            self._pinged_at = self.clock()
            self.h2.ping(b"quictunl")
            self.owner.wake()

    def go_away(self, last_stream_id: int = _LARGEST_STREAM_ID, code: int = ErrorCodes.NO_ERROR) -> None:
        """Say that no new stream above ``last_stream_id`` is taken; those under way go on."""
        # Not by h2, for which a GOAWAY is the end of everything.
        self._extra.append(goaway_frame(last_stream_id, code))
        self.owner.wake()

    def last_call(self, heard: Callable[[], None]) -> None:
        """Say that no streams will be taken soon (RFC 9113 section 6.8).

        ``heard`` is called when the peer knows, and everything that it opened before has come.
        """
        self._heard_last_call = heard
        # In this order: whoever answers the ping has read what was before it.
        self._extra.append(goaway_frame(_LARGEST_STREAM_ID, ErrorCodes.NO_ERROR) + ping_frame(_LAST_CALL))
        self.owner.wake()

    def terminate(self, error: Http2Error) -> None:
        """Say why the connection ends; nothing is fed or sent after it."""
        self.closed = True
        if not self._goaway_said:
            self.go_away(self.h2.highest_inbound_stream_id, error.code)

    def close(self) -> None:
        """The socket is gone, or to be closed: let go of every stream. Users are not told."""
        self.closed = True
        for stream in list(self.streams.values()):
            stream.leave()
        self._held.clear()

    # What comes

    def _frame(self, frame: RawFrame, raw: bytes) -> None:
        try:
            events = self.h2.receive_data(raw)
        except ProtocolError as error:
            self._goaway_said = True  # by h2, for which this is the end
            raise Http2Error(error.error_code, str(error)) from None
        if frame.kind in (DATA, HEADERS) and not events and frame.stream_id not in self.streams:
            self._late(frame)
        for event in events:
            self._event(event)
            if self.closed:
                return
        self.owner.wake()

    def _event(self, event: Event) -> None:
        match event:
            case DataReceived():
                self._data(event)
            case RequestReceived():
                if self.is_client:
                    # h2 lets a server open a stream by itself, which nothing may do but a PUSH_PROMISE that we forbid.
                    raise Http2Error(ErrorCodes.PROTOCOL_ERROR, "the server opened a stream")
                stream = Http2Stream(self, event.stream_id)
                stream.may_receive = event.stream_ended is None
                if len(self.streams) >= STREAMS:
                    stream.reset(ErrorCodes.REFUSED_STREAM)
                    self.gate.reset(self.heard_at)
                    return
                self.streams[stream.id] = stream
                self.owner.session_request(stream, self._decoder.section, event.stream_ended is not None)
            case ResponseReceived():
                if (found := self.streams.get(event.stream_id)) is not None:
                    ended = event.stream_ended is not None
                    found.may_receive = not ended
                    found.user.stream_head(self._decoder.section, ended)
            case InformationalResponseReceived():
                if (found := self.streams.get(event.stream_id)) is not None:
                    self.gate.chore(self.heard_at)
                    found.user.stream_interim(self._decoder.section)
            case TrailersReceived():
                if (found := self.streams.get(event.stream_id)) is not None:
                    found.ended(self._decoder.section)
            case StreamReset():
                self._reset(event)
            case WindowUpdated():
                if self._held:
                    self.owner.wake()
            case RemoteSettingsChanged():
                self.owner.session_room()
            case PingAckReceived(ping_data=data):
                if data == _LAST_CALL:
                    self._heard_last_call()
                else:
                    self._pong()
            case _:
                pass

    def _data(self, event: DataReceived) -> None:
        size = event.flow_controlled_length or 0
        self._unacknowledged += size
        if self._unacknowledged >= _CONNECTION_WINDOW // 4:
            self.h2.increment_flow_control_window(self._unacknowledged)
            self._unacknowledged = 0
        stream = self.streams.get(event.stream_id)
        if stream is None:
            self.gate.chore(self.heard_at)
            return
        ended = event.stream_ended is not None
        if not event.data and not ended:
            self.gate.chore(self.heard_at)
        stream.data(event.data or b"", size, ended)

    def _reset(self, event: StreamReset) -> None:
        stream = self.streams.get(event.stream_id)
        if not event.remote_reset:
            self.give_up(event.stream_id)
            self.gate.reset(self.heard_at)
        if stream is not None:
            user = stream.user
            stream.leave()
            user.stream_reset(int(event.error_code or 0))

    def _goaway(self, frame: RawFrame) -> None:
        payload = frame.raw[9:]
        self.owner.session_goaway(
            int.from_bytes(payload[:4], "big") & _LARGEST_STREAM_ID, int.from_bytes(payload[4:8], "big")
        )

    def _late(self, frame: RawFrame) -> None:
        """A frame came for a stream that has ended. What is under way at a reset is honest, if it is worth sending."""
        if len(frame.raw) < SUBSTANCE:
            self.gate.chore(self.heard_at)

    def _drop(self, frame: RawFrame) -> None:
        """DATA of a stream that was reset: ignored (RFC 9113 section 5.1), and its window given back (section 6.9)."""
        # h2 would answer each by a RST_STREAM, and a window of them looks like an attack to the peer.
        self._late(frame)
        self._unwanted += len(frame.raw) - 9
        if self._unwanted >= _CONNECTION_WINDOW // 4:
            self._extra.append(window_frame(self._unwanted))
            self._unwanted = 0
            self.owner.wake()

    def _pong(self) -> None:
        if self._pinged_at is not None:
            self.round_trip = self.clock() - self._pinged_at
            self._pinged_at = None

    # What goes

    def hold(self, stream: "Http2Stream") -> None:
        self._held[stream] = None
        self.owner.wake()

    def release(self, stream: "Http2Stream") -> None:
        self._held.pop(stream, None)

    def forget(self, stream: "Http2Stream") -> None:
        if self.streams.pop(stream.id, None) is not None and not self.closed:
            self.owner.session_room()

    def give_up(self, stream_id: int) -> None:
        """What still comes for this stream is to be ignored."""
        given_up = self._given_up
        given_up[stream_id] = None
        if len(given_up) > _REMEMBERED:
            del given_up[next(iter(given_up))]

    def write(self, stream_id: int, data: bytes, *, end: bool) -> int:
        """Send as much of ``data`` as the windows allow, and one frame at the most; how much it was.

        ``end`` is whether the direction ends with the last byte of it.
        """
        h2 = self.h2
        window = h2.local_flow_control_window(stream_id)
        size = min(len(data), window, h2.max_outbound_frame_size)
        if size <= 0:
            return 0
        if size == len(data):
            h2.send_data(stream_id, data, end_stream=end)
        else:
            h2.send_data(stream_id, data[:size])
        self._queued += size
        if size < window or size >= SUBSTANCE:
            # Who grants a byte at a time has earned nothing by it (CVE-2019-9511).
            self.gate.sent_data()
        return size

    def probe(self) -> None:
        """A window is being granted: keep the round trip fresh."""
        now = self.clock()
        if now - self._probed_at >= _PROBE_EVERY:
            self._probed_at = now
            self.ping()

    @property
    def is_full(self) -> bool:
        """Whether enough waits for the socket."""
        return self.write_paused or self._queued >= _BATCH

    def _pump(self) -> None:
        """Let each stream that holds something write in its turn."""
        idle = 0
        while self._held and not self.is_full and idle < len(self._held):
            stream = next(iter(self._held))
            del self._held[stream]
            idle = 0 if stream.pump(_SLICE) else idle + 1
            if stream.holds:
                self._held[stream] = None
        for stream in list(self._held):
            stream.pause_peer()

    def _queued_any(self) -> bool:
        return any(self.h2.local_flow_control_window(stream.id) > 0 for stream in self._held)


class Http2Stream:
    """One stream: both directions of one exchange."""

    __slots__ = (
        "_credit",
        "_end",
        "_held",
        "_paused",
        "_peer_paused",
        "_size",
        "id",
        "may_receive",
        "may_send",
        "session",
        "stuck_since",
        "user",
    )

    user: StreamUser
    stuck_since: float
    "since when what is held has not moved, in seconds of the session's clock; infinity while nothing is held"

    def __init__(self, session: Http2Session, stream_id: int) -> None:
        self.session = session
        self.id = stream_id
        # the direction we send
        self.may_send = True
        self._held: deque[bytes] = deque()
        self._size = 0  # bytes of it
        self._end: Fields | None = None  # it ends when what is held has gone
        self._peer_paused = False
        self.stuck_since = inf
        # the direction we receive
        self.may_receive = True
        self._credit: ReceiveCredit | None = None
        self._paused = False

    def __repr__(self) -> str:
        return f"<Http2Stream {self.id}{'' if self.may_send else ' sent'}{'' if self.may_receive else ' received'}>"

    @property
    def holds(self) -> bool:
        """Whether something waits to be written."""
        return bool(self._held) or (self._end is not None and self.may_send)

    # Sending

    def send_head(self, fields: Fields, *, end: bool) -> None:
        """A head, with ``end`` the last frame of the direction."""
        self.session.h2.send_headers(self.id, _marked(fields), end_stream=end)
        self.session.owner.wake()
        if end:
            self._sent()

    def send_data(self, data: bytes) -> None:
        """Content, which goes at the end of the loop's turn, together with what else comes in it."""
        if not data or not self.may_send:
            return
        if not self._held:
            self.stuck_since = self.session.clock()
        self._held.append(data)
        self._size += len(data)
        self.session.hold(self)
        if self._size >= _BATCH or self.session.write_paused:
            self.pause_peer()

    def pause_peer(self) -> None:
        """Nothing more can be taken until what is held has gone."""
        if self.holds and not self._peer_paused:
            self._peer_paused = True
            self.user.peer.pause()

    def resume_peer(self) -> None:
        """The peer was paused for want of a stream: it goes on when what is held has gone."""
        if self.holds:
            self._peer_paused = True
        else:
            self.user.peer.resume()

    def send_end(self, trailers: Fields) -> None:
        """The direction is complete."""
        if not self.may_send or self._end is not None:
            return
        self._end = trailers
        if not self._held:
            self._finish()

    def pump(self, limit: int) -> int:
        """Write up to ``limit`` bytes of what is held; how many it were."""
        wrote = 0
        held, session = self._held, self.session
        if len(held) > 1:
            data = b"".join(held)
            held.clear()
            held.append(data)
        while held and wrote < limit:
            size = session.write(self.id, held[0], end=self._end == [])
            if not size:
                break
            wrote += size
            rest = held.popleft()[size:]
            if rest:
                held.appendleft(rest)
        self._size -= wrote
        if held:
            if wrote:
                self.stuck_since = session.clock()
            return wrote
        self.stuck_since = inf
        if self._end is not None:
            self._finish(ended=self._end == [] and wrote > 0)
        elif self._peer_paused:
            self._peer_paused = False
            self.user.peer.resume()
        return wrote

    def _finish(self, *, ended: bool = False) -> None:
        end = self._end
        if end:
            self.session.h2.send_headers(self.id, _marked(end), end_stream=True)
        elif not ended:
            self.session.h2.end_stream(self.id)
        self.session.owner.wake()
        self._sent()

    def _sent(self) -> None:
        self.may_send = False
        self.user.stream_sent()

    # Receiving

    def data(self, data: bytes, size: int, ended: bool) -> None:
        """``data`` came, ``size`` bytes of it counting for the window (with padding)."""
        credit = self._credit
        if credit is None:
            credit = self._credit = ReceiveCredit(self.session.budget)
        try:
            credit.receive(size)
        except CreditError as error:
            raise Http2Error(ErrorCodes.FLOW_CONTROL_ERROR, str(error)) from None
        if data:
            self.user.stream_data(data)
        if ended:
            self.ended([])
        elif not self._paused:
            self._grant()

    def ended(self, trailers: Fields) -> None:
        """Nothing more comes."""
        if self.may_receive:
            self.may_receive = False
            self.user.stream_end(trailers)

    def pause(self) -> None:
        """The reader takes nothing more."""
        self._paused = True

    def resume(self) -> None:
        """The reader takes more."""
        self._paused = False
        self._grant()

    def _grant(self) -> None:
        credit, session = self._credit, self.session
        if credit is None or not self.may_receive or self.id not in session.streams:
            return
        before = credit.limit
        limit = credit.grant(session.heard_at, session.round_trip)
        if limit is not None:
            session.h2.increment_flow_control_window(limit - before, self.id)
            session.probe()
            session.owner.wake()

    # Ending

    def reset(self, code: int) -> None:
        """Give the stream up: the peer is told, the user is not."""
        # h2 refuses where both directions have ended in the meantime; then there is nothing left to say.
        with suppress(ProtocolError):
            self.session.h2.reset_stream(self.id, code)
            if self.may_receive:
                self.session.give_up(self.id)
        self.leave()
        self.session.owner.wake()

    def leave(self) -> None:
        """The stream is over."""
        self.may_send = self.may_receive = False
        self.stuck_since = inf
        self._held.clear()
        self._size = 0
        self._end = None
        if self._credit is not None:
            self._credit.release()
            self._credit = None
        self.session.release(self)
        self.session.forget(self)


def _marked(fields: Iterable[Any]) -> list[Any]:
    return [NeverIndexedHeaderTuple(*field) if field[0] in _SECRET else field for field in fields]
