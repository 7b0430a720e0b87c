"""A backend that speaks HTTP/2 on sockets: few connections, many exchanges on each.

In clear text by prior knowledge (RFC 9113 section 3.3), over TLS by ALPN. A leg waits in order for a connection with
room; when those there are full, one more is dialled. What the backend says it never looked at (REFUSED_STREAM, or a
stream above GOAWAY's last) is asked again, once, whatever its method (RFC 9110 section 9.2.2, RFC 9113 section 8.7);
what a connection took with it when it was lost, only if that is safe.

    new -> waiting (for room) -> asking -> over
"""

import asyncio
from math import inf
from typing import Any, Final, cast

from h2.errors import ErrorCodes

from quictunnel.exchange import Leg
from quictunnel.http.http2 import Http2Error, Http2Session, Http2Stream
from quictunnel.http.http2_door import read_response, read_trailers
from quictunnel.http.origin_pool import OriginPool
from quictunnel.http.origin_request import announced_length, check_request
from quictunnel.http.replay import IDEMPOTENT, ReplayLeg
from quictunnel.wire.credit import WindowBudget
from quictunnel.wire.errors import ErrorCode, TunnelError
from quictunnel.wire.fields import check_fields, content_length, end_to_end, trailer_fields, without_upgrade
from quictunnel.wire.frames import Data, End, Fields, Frame, RequestHead, ResponseHead

__all__ = ["Http2Origin", "Http2OriginLeg"]

# Connections to one backend: at 100 streams each, more than a session's links carry.
_CONNECTIONS: Final = 64
# Stream ids end at 2**31 (RFC 9113 section 5.1.1): a connection is given up well before.
_LAST_STREAM_ID: Final = 2**30
_END: Final = End()


class Http2Origin(OriginPool["Http2OriginLeg", "Http2OriginConnection"]):
    """A backend; ``open`` gives a leg for each exchange."""

    def __init__(
        self, host: str = "localhost", port: int = 80, *, budget: WindowBudget | None = None, **options: Any
    ) -> None:
        """As ``OriginPool``; ``tls`` must offer h2 by ALPN. ``budget`` is what windows of downloads grow out of."""
        super().__init__(host, port, **options)
        self.scheme = b"https" if self.dialler.tls else b"http"
        self.budget = budget or WindowBudget(0)
        self._waiting: dict[Http2OriginLeg, float] = {}  # until when, in order
        self._dialling: asyncio.Task[None] | None = None

    def open(self) -> "Http2OriginLeg":
        """A fresh leg: join it, then let it receive a RequestHead."""
        return Http2OriginLeg(self)

    # What legs and connections call

    def place(self, leg: "Http2OriginLeg") -> None:
        """Have ``leg.attached`` called with a connection that has room, or ``leg.fail``."""
        if self.closing:
            leg.fail(TunnelError(ErrorCode.NOT_ACCEPTED))
            return
        self._waiting[leg] = asyncio.get_running_loop().time() + self.limits.connect_time
        self.serve_waiting()

    def forget(self, leg: "Http2OriginLeg") -> None:
        """``leg`` waits no more."""
        if self._waiting.pop(leg, None) is not None and not self._waiting and self._dialling is not None:
            # Nobody is left to be dialled for.
            self._dialling.cancel()
            self._dialling = None

    def serve_waiting(self) -> None:
        """There may be room."""
        while self._waiting:
            connection = max(self._connections, key=lambda each: each.room, default=None)
            if connection is None or connection.room <= 0:
                break
            leg = next(iter(self._waiting))
            del self._waiting[leg]
            leg.attached(connection)
        if self._waiting and self._dialling is None and len(self._connections) < _CONNECTIONS and not self.closing:
            self._dialling = asyncio.get_running_loop().create_task(self._dial(), name="dial")
            self._own(self._dialling)

    def lost(self, connection: "Http2OriginConnection") -> None:
        super().lost(connection)
        self.serve_waiting()

    # The acts

    async def _dial(self) -> None:
        try:
            connection = await self.dialler.dial(lambda: Http2OriginConnection(self))
            if not connection.is_agreed:
                connection.drop()
                raise TunnelError(ErrorCode.HTTP_PROTOCOL_ERROR, "the backend does not offer HTTP/2 (by ALPN)")
        except TunnelError as error:
            self._dialling = None
            if not any(each.is_open for each in self._connections):
                for leg in list(self._waiting):
                    leg.fail(error)
            return
        self._dialling = None
        connection.begin()
        self.serve_waiting()

    def _close_idle(self) -> None:
        for connection in list(self._connections):
            connection.drain()

    def _sweep(self) -> None:
        now = asyncio.get_running_loop().time()
        for leg, until in list(self._waiting.items()):
            if until <= now:
                leg.fail(TunnelError(ErrorCode.CONNECTION_LIMIT_REACHED, "the backend allows no more streams"))
        super()._sweep()


class Http2OriginConnection(asyncio.Protocol):
    """One socket to the backend. The ``SessionOwner`` of its session."""

    __slots__ = ("_closed", "_draining", "_loop", "_origin", "_scheduled", "_session", "deadline", "legs", "transport")

    transport: asyncio.Transport

    def __init__(self, origin: Http2Origin) -> None:
        self._origin = origin
        self._loop = asyncio.get_running_loop()
        self._session = Http2Session(
            self, is_client=True, head_limit=origin.limits.head_size, budget=origin.budget, clock=self._loop.time
        )
        self.legs: dict[Http2OriginLeg, None] = {}
        self.deadline = inf
        self._scheduled = False
        self._draining = True  # until it is agreed that this is HTTP/2
        self._closed = False

    def __repr__(self) -> str:
        return f"<Http2OriginConnection {self._session!r}{' draining' if self._draining else ''}>"

    @property
    def is_agreed(self) -> bool:
        """Whether the backend agreed to speak HTTP/2, or was not asked."""
        tls = self.transport.get_extra_info("ssl_object")
        return tls is None or tls.selected_alpn_protocol() == "h2"

    @property
    def is_open(self) -> bool:
        """Whether it may ever carry another exchange."""
        return not self._draining

    @property
    def room(self) -> int:
        """How many more exchanges it can carry."""
        if self._draining or self._session.h2.highest_outbound_stream_id > _LAST_STREAM_ID:
            return 0
        return self._session.room

    # What the origin calls

    def begin(self) -> None:
        """It is HTTP/2: say hello, and carry exchanges."""
        self._draining = self._closed
        self._renew()
        self.wake()

    def drain(self) -> None:
        """Carry no new exchange, and close with the last one."""
        self._draining = True
        self._renew()

    def drop(self) -> None:
        """Close at once."""
        self.transport.abort()

    def expire(self) -> None:
        now = self._loop.time()
        if not self.legs:
            self.drop() if self._draining else self.drain()
            return
        for leg in list(self.legs):
            leg.expire(now)
        self._renew()

    # What legs call

    def ask(self, leg: "Http2OriginLeg") -> Http2Stream:
        """A stream for ``leg``; its head must be sent at once."""
        self.legs[leg] = None
        self._renew()
        return self._session.open_stream(leg)

    def left(self, leg: "Http2OriginLeg") -> None:
        """The exchange of ``leg`` is over, or goes on elsewhere."""
        self.legs.pop(leg, None)
        if not self.legs:
            self._renew()

    # What the session tells

    def wake(self) -> None:
        if not self._scheduled and not self._closed:
            self._scheduled = True
            self._loop.call_soon(self._flush)

    def session_request(self, stream: Http2Stream, fields: Fields, ended: bool) -> None:
        """Requests are for servers."""

    def session_goaway(self, last_stream_id: int, code: int) -> None:
        self._draining = True
        for leg in list(self.legs):
            if leg.stream_id > last_stream_id:
                leg.refused()
        self._renew()

    def session_room(self) -> None:
        self._origin.serve_waiting()

    # What the event loop calls

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        self._origin.made(self)

    def data_received(self, data: bytes) -> None:
        if self._closed:
            return
        try:
            self._session.feed(data)
        except Http2Error as error:
            self._end(TunnelError(ErrorCode.HTTP_PROTOCOL_ERROR, f"the backend broke HTTP/2: {error}"), error)

    def eof_received(self) -> bool:
        return False

    def connection_lost(self, exc: Exception | None) -> None:
        self._end(TunnelError(ErrorCode.CONNECTION_TERMINATED, "the backend cut the connection"), None)
        self._origin.lost(self)

    def pause_writing(self) -> None:
        self._session.write_paused = True

    def resume_writing(self) -> None:
        self._session.resume()

    # The acts

    def _flush(self) -> None:
        self._scheduled = False
        if self._closed or self.transport.is_closing():
            return
        data = self._session.take()
        if data:
            self.transport.write(data)

    def _renew(self) -> None:
        """When is it to be looked at?"""
        if self.legs:
            self.deadline = self._loop.time()
        elif self._draining and not self._closed:
            self.deadline = inf
            self._close()
        else:
            self.deadline = self._loop.time() + self._origin.limits.idle_keep_alive

    def _end(self, error: TunnelError, broken: Http2Error | None) -> None:
        """The connection is over, with all that it carries."""
        if self._closed:
            return
        self._closed = self._draining = True
        if broken is not None and not self.transport.is_closing():
            self._session.terminate(broken)
            self.transport.write(self._session.take())
        self._session.close()
        for leg in list(self.legs):
            leg.lost(error)
        self.legs.clear()
        self.transport.close()

    def _close(self) -> None:
        self._closed = True
        self._session.go_away(0)
        self.transport.write(self._session.take())
        self._session.close()
        self.transport.close()


class Http2OriginLeg(ReplayLeg):
    """One request to the backend and its answer. The ``StreamUser`` of its stream."""

    __slots__ = (
        "_answer_left",
        "_asked",
        "_bodiless",
        "_connection",
        "_expects",
        "_head",
        "_head_seen",
        "_held",
        "_left",
        "_length",
        "_origin",
        "_over",
        "_pause_wanted",
        "_peer_paused",
        "_stream",
        "_tries",
        "deadline",
    )

    deadline: float
    "when the backend is late, in seconds of the event loop's clock"

    def __init__(self, origin: Http2Origin) -> None:
        super().__init__()
        self._origin = origin
        self._connection: Http2OriginConnection | None = None
        self._stream: Http2Stream | None = None
        self._over = False
        self.deadline = inf
        # the request
        self._head: RequestHead | None = None
        self._length: int | None = None
        self._left: int | None = None  # bytes of its body still due, None if no length was announced
        self._asked = False
        self._expects = False  # the visitor waits for a 100 before it sends the body
        self._held: list[Frame] = []
        self._peer_paused = False
        self._replay = []
        self._tries = 0
        # the answer
        self._head_seen = False
        self._bodiless = False
        self._answer_left: int | None = None
        self._pause_wanted = False

    def __repr__(self) -> str:
        state = "over" if self._over else "waiting" if self._stream is None else f"stream {self._stream.id}"
        return f"<Http2OriginLeg {state}>"

    @property
    def stream_id(self) -> int:
        """Of its stream, 0 while it has none."""
        return self._stream.id if self._stream is not None else 0

    # The four verbs

    def receive(self, frame: Frame) -> None:
        if self._over:
            return
        if type(frame) is RequestHead:
            self._begin(frame)
        elif self._stream is None:
            self._held.append(frame)
            if type(frame) is Data and not self._peer_paused:
                self._peer_paused = True
                self.peer.pause()
        else:
            self._send(self._stream, frame)

    def pause(self) -> None:
        self._pause_wanted = True
        if self._stream is not None:
            self._stream.pause()

    def resume(self) -> None:
        self._pause_wanted = False
        if self._stream is not None:
            self._stream.resume()
            self._renew()

    def abort(self, error: TunnelError) -> None:
        if not self._over:
            self._give_up()

    # What the origin and the connection call

    def attached(self, connection: Http2OriginConnection) -> None:
        """There is room on ``connection``: send what is held."""
        head = self._head
        assert head is not None
        self._tries += 1
        self._connection = connection
        self._left = self._length
        self._asked = not head.body
        stream = self._stream = connection.ask(self)
        if self._pause_wanted:
            stream.pause()
        stream.send_head(self._section(head), end=not head.body)
        held, self._held = self._held, []
        for frame in held:
            if self._stream is stream:
                self._send(stream, frame)
        if self._stream is stream and self._peer_paused:
            self._peer_paused = False
            stream.resume_peer()
        if not self._asked and not self._replay_size and any(name == b"expect" for name, _ in head.fields):
            self._expects = True
        self._renew()

    def fail(self, error: TunnelError) -> None:
        """The backend failed: tell the peer."""
        if not self._over:
            self._leave().abort(error)

    def cut(self, error: TunnelError) -> None:
        """End the exchange from here, and tell the peer."""
        if not self._over:
            self._give_up().abort(error)

    def refused(self) -> None:
        """The backend has not looked at the request, and never will: ask again."""
        self._part()
        if not self._again():
            self.fail(TunnelError(ErrorCode.NOT_ACCEPTED, "the backend takes no request now"))

    def lost(self, error: TunnelError) -> None:
        """The connection is gone."""
        self._part()
        head = self._head
        safe = head is not None and head.method in IDEMPOTENT and not self._head_seen
        if error.code is not ErrorCode.CONNECTION_TERMINATED or not safe or not self._again():
            self.fail(error)

    def expire(self, now: float) -> None:
        """The time is ``now``: is the backend late?"""
        if now < self.deadline:
            return
        if self._stream is not None and not (self._asked or self._expects or self._head_seen):
            # It is late only in taking the upload: since when has it taken nothing of it?
            self.deadline = self._stream.stuck_since + self._origin.limits.head_time
            if now < self.deadline:
                return
        if self._head_seen:
            what = "the backend fell silent within its answer"
        else:
            what = f"the backend did not answer within {self._origin.limits.head_time:g} s"
        self.cut(TunnelError(ErrorCode.HTTP_RESPONSE_TIMEOUT, what))

    # What the stream tells

    def stream_head(self, fields: Fields, ended: bool) -> None:
        head = self._read(fields)
        if head is None:
            return
        self._replay = None
        self._head_seen = True
        kept = end_to_end(head.fields)
        try:
            self._answer_left = content_length(kept)
        except ValueError as error:
            self._broken(str(error))
            return
        assert self._head is not None
        if self._head.method == b"HEAD" or head.status in (204, 304):
            self._bodiless = True
            self._answer_left = None
            if head.status == 204:
                # RFC 9110 section 8.6
                kept = [field for field in kept if field[0] != b"content-length"]
        self._renew()
        self.peer.receive(ResponseHead(head.status, kept))
        if ended and not self._over:
            self.stream_end([])

    def stream_interim(self, fields: Fields) -> None:
        head = self._read(fields)
        if head is None:
            return
        self._renew()
        plain = [field for field in end_to_end(head.fields) if field[0] != b"content-length"]
        self.peer.receive(ResponseHead(head.status, plain))

    def stream_data(self, data: bytes) -> None:
        if self._bodiless:
            self._broken("a body where none may be")
            return
        if self._answer_left is not None:
            self._answer_left -= len(data)
            if self._answer_left < 0:
                self._broken("its body is longer than its content-length")
                return
        self._renew()
        self.peer.receive(Data(data))

    def stream_end(self, trailers: Fields) -> None:
        if self._answer_left:
            self._broken("its body is shorter than its content-length")
            return
        limits = self._origin.limits
        try:
            fields = read_trailers(trailers, fields_limit=limits.head_fields, size_limit=limits.head_size)
        except ValueError as error:
            self._broken(str(error))
            return
        kept = end_to_end(fields)
        stream = self._stream
        if stream is not None and stream.may_send:
            # The answer came before the end of the request, whose rest nobody needs (RFC 9113 section 8.1).
            stream.reset(ErrorCodes.CANCEL)
        elif stream is not None:
            stream.leave()
        self._leave().receive(End(kept) if kept else _END)

    def stream_reset(self, code: int) -> None:
        if code == ErrorCodes.REFUSED_STREAM and not self._head_seen:
            self.refused()
        elif code == ErrorCodes.HTTP_1_1_REQUIRED:
            self.fail(TunnelError(ErrorCode.HTTP_PROTOCOL_ERROR, "the backend wants HTTP/1.1 for this request"))
        else:
            what = f"the backend gave the request up (HTTP/2 error {code:#x})"
            self.fail(TunnelError(ErrorCode.CONNECTION_TERMINATED, what))

    def stream_sent(self) -> None:
        self._asked = True
        self._await_head()

    # The acts

    def _begin(self, head: RequestHead) -> None:
        self._origin.started(self)
        self._head = head
        try:
            self._head = head = without_upgrade(head, "a backend of HTTP/2")
            self._length = announced_length(head)
            check_request(head)
        except TunnelError as error:
            self.fail(error)
            return
        self._origin.place(self)

    def _section(self, head: RequestHead) -> Fields:
        fields = end_to_end(head.fields)
        return [
            (b":method", head.method),
            (b":scheme", self._origin.scheme),
            (b":authority", head.authority or self._origin.host),
            (b":path", head.target),
            *fields,
        ]

    def _send(self, stream: Http2Stream, frame: Frame) -> None:
        if self._replay is not None:
            self._remember(frame)
        if type(frame) is Data:
            if self._left is not None:
                self._left -= len(frame.data)
                if self._left < 0:
                    self._refuse("its body is longer than its content-length")
                    return
            if self._expects:
                self._expects = False
                self.deadline = inf
            stream.send_data(frame.data)
            if stream.holds and self.deadline == inf:
                self._await_head()  # a backend that takes nothing more must at least answer
        elif type(frame) is End and stream.may_send:
            if self._left:
                self._refuse("its body is shorter than its content-length")
                return
            trailers = trailer_fields(frame.trailers)
            try:
                check_fields(trailers)
            except ValueError as error:
                self._refuse(str(error))
                return
            stream.send_end(trailers)

    def _refuse(self, what: str) -> None:
        self.cut(TunnelError(ErrorCode.BAD_REQUEST, f"the request is malformed: {what}"))

    def _again(self) -> bool:
        """Ask once more, if nothing of the request is gone."""
        if self._over or self._replay is None or self._tries > 1:
            return False
        self._held, self._replay, self._replay_size = self._replay, [], 0
        self.deadline = inf
        self._origin.place(self)
        return True

    def _read(self, section: Fields) -> ResponseHead | None:
        limits = self._origin.limits
        try:
            return read_response(section, fields_limit=limits.head_fields, size_limit=limits.head_size)
        except ValueError as error:
            self._broken(str(error))
            return None

    def _broken(self, what: str) -> None:
        self.cut(TunnelError(ErrorCode.HTTP_PROTOCOL_ERROR, f"the backend broke HTTP/2: {what}"))

    def _await_head(self) -> None:
        if not self._head_seen:
            self.deadline = asyncio.get_running_loop().time() + self._origin.limits.head_time

    def _renew(self) -> None:
        """The backend has said something, or may go on: what is it given now?"""
        if self._head_seen:
            limit = self._origin.limits.body_idle_time
            self.deadline = inf if limit is None else asyncio.get_running_loop().time() + limit
        elif self._asked or self._expects:
            self._await_head()

    def _give_up(self) -> Leg:
        """End the exchange and the stream: the peer, to be told."""
        stream = self._stream
        peer = self._leave()
        if stream is not None:
            stream.reset(ErrorCodes.CANCEL)
        return peer

    def _part(self) -> None:
        """The stream is gone."""
        stream, self._stream = self._stream, None
        connection, self._connection = self._connection, None
        if stream is not None:
            stream.leave()
        if connection is not None:
            connection.left(self)

    def _leave(self) -> Leg:
        peer = self.peer
        self._over = True
        self.deadline = inf
        self._stream = None
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.left(self)
        self._origin.forget(self)
        self._held = []
        self._replay = None
        self.detach()
        if self._head is not None:
            self._origin.ended(self)
        return peer
