"""One exchange with a backend over HTTP/1.1, as a leg.

A leg that has no connection yet holds what it is given and pauses its peer; one whose kept connection was lost before a
byte of an answer came may ask for a fresh one, once.

    new -> waiting (for a dial) -> asking -> over
"""

import asyncio
from typing import Final

from quictunnel.exchange import Leg
from quictunnel.http.origin_connection import FOREVER, OriginConnection, Owner
from quictunnel.http.origin_request import (
    announced_length,
    encode_request,
    encode_request_trailers,
)
from quictunnel.http.replay import IDEMPOTENT, ReplayLeg
from quictunnel.wire.errors import ErrorCode, TunnelError
from quictunnel.wire.frames import Data, End, Fields, Frame, RequestHead

__all__ = ["OriginLeg"]

_END: Final = End()


class OriginLeg(ReplayLeg):
    """One request to the backend and its answer."""

    __slots__ = (
        "_chunked",
        "_connection",
        "_early",
        "_head",
        "_held",
        "_left",
        "_length",
        "_opaque",
        "_over",
        "_owner",
        "_pause_wanted",
        "_peer_paused",
        "_pending",
        "answered",
        "asked",
        "dialling",
    )

    def __init__(self, owner: Owner) -> None:
        super().__init__()
        self._owner = owner
        self._connection: OriginConnection | None = None
        self._head: RequestHead | None = None
        self._over = False
        # How the body goes out.
        self._chunked = False
        self._opaque = False
        self._left = 0
        self._length: int | None = 0
        self._pending = b""
        "the head, until it leaves together with the first bytes of the body"
        # What waits for a connection, or for a 101.
        self._held: list[Frame] = []
        self._early: list[Frame] = []
        self._pause_wanted = False
        self._peer_paused = False

        self.asked = False
        "the request has been sent to its end"
        self.answered = False
        "the backend has ended its side of an upgraded connection"
        self.dialling: asyncio.Task[None] | None = None

    # The four verbs

    def receive(self, frame: Frame) -> None:
        if self._over:
            return
        if type(frame) is RequestHead:
            self._begin(frame)
        elif self._connection is None:
            self._hold(frame)
        else:
            self._send(self._connection, frame)

    def pause(self) -> None:
        self._pause_wanted = True
        if self._connection is not None:
            self._connection.pause_reading()

    def resume(self) -> None:
        self._pause_wanted = False
        if self._connection is not None:
            self._connection.resume_reading()

    def abort(self, error: TunnelError) -> None:
        connection = self._connection
        if not self._over:
            self.leave()
        if connection is not None:
            connection.drop()

    # What the owner and the connection call

    def connected(self, connection: OriginConnection) -> None:
        """The dial has succeeded: send what is held."""
        self.dialling = None
        if self._over:
            connection.close()
        elif connection.transport.is_closing():
            self.fail(TunnelError(ErrorCode.CONNECTION_TERMINATED, "the backend closed the connection at once"))
        else:
            self._ask(connection)

    def fail(self, error: TunnelError) -> None:
        """The backend failed: tell the peer."""
        if not self._over:
            self.leave().abort(error)

    def cut(self, error: TunnelError) -> None:
        """End the exchange from here: close the connection at once and tell the peer."""
        connection = self._connection
        self.fail(error)
        if connection is not None:
            connection.drop()

    def retry(self) -> bool:
        """A kept connection was closed under the request: ask again on a fresh one if that is safe, and say if it is.

        Safe is what RFC 9110 section 9.2.2 says: an idempotent method, and a body of which nothing is gone.
        """
        if self._replay is None or self._over:
            return False
        self._held = self._replay
        self._replay = None
        self._connection = None
        self._early = []
        self.asked = False
        if self._head is not None and self._head.body:
            self.pause_peer()
        self._owner.dial(self)
        return True

    def is_sent(self) -> bool:
        """Whether the backend has all of the request; a body that waits for a 101 was never a part of it."""
        return self.asked or (self._head is not None and self._head.protocol != b"" and not self._left)

    def pause_peer(self) -> None:
        """Nothing more can be taken for now."""
        if not self._peer_paused:
            self._peer_paused = True
            self.peer.pause()

    def resume_peer(self) -> None:
        """More can be taken, unless it waits for a 101."""
        if self._peer_paused and not self._early:
            self._peer_paused = False
            self.peer.resume()

    def upgraded(self) -> None:
        """The answer is 101: what the peer sent early goes out, and everything after it as it is."""
        self._replay = None
        self._chunked = False
        self._opaque = True
        asked, self.asked = self.asked, False
        early, self._early = self._early, []
        for frame in [*early, _END] if asked else early:
            if self._connection is not None:
                self._send_opaque(self._connection, frame)
        if self._connection is not None and not self._connection.write_paused:
            self.resume_peer()

    def leave(self) -> Leg:
        """The exchange is over for this leg: the peer, to be told so by the caller."""
        peer = self.peer
        self._over = True
        self._connection = None
        self._held = []
        self._early = []
        self._replay = None
        self._pending = b""
        self.detach()
        dialling, self.dialling = self.dialling, None
        if dialling is not None:
            dialling.cancel()
        if self._head is not None:
            self._owner.ended(self)
        return peer

    # The acts of a request

    def _begin(self, head: RequestHead) -> None:
        self._head = head
        self._owner.started(self)
        try:
            self._length = announced_length(head)
            self._pending = encode_request(head, self._owner.host, self._length)
        except TunnelError as error:
            self.fail(error)
            return
        connection = self._owner.take()
        if connection is None:
            self._owner.dial(self)
            return
        if head.method in IDEMPOTENT and not head.protocol:
            self._replay = []
        self._ask(connection)

    def _ask(self, connection: OriginConnection) -> None:
        head = self._head
        assert head is not None
        self._left = self._length or 0
        self._chunked = self._length is None and not head.protocol
        if not self._pending:
            self._pending = encode_request(head, self._owner.host, self._length)
        self._connection = connection
        connection.lend(self, head)
        if self._pause_wanted:
            connection.pause_reading()
        if self._held:
            self._send_held(connection)
        if self._connection is not connection:
            return
        if not connection.write_paused:
            self.resume_peer()
        if not head.body:
            self._flush(connection)
            return
        if head.protocol and not self._left:
            # The End comes when the two ends of the upgraded connection have had their say.
            self._flush(connection)
            connection.await_answer()
            return
        if any(name == b"expect" for name, _ in head.fields):
            connection.await_answer()
        if self._pending:
            # The first bytes of the body are probably here within this turn of the loop: one packet instead of two.
            connection.loop.call_soon(self._flush, connection)

    def _send_held(self, connection: OriginConnection) -> None:
        held, self._held = self._held, []
        for frame in held:
            if self._connection is not connection:
                return
            self._send(connection, frame)

    def _flush(self, connection: OriginConnection) -> None:
        if self._pending and self._connection is connection:
            pending, self._pending = self._pending, b""
            connection.transport.write(pending)

    def _send(self, connection: OriginConnection, frame: Frame) -> None:
        if self._opaque:
            self._send_opaque(connection, frame)
            return
        if self._replay is not None:
            self._remember(frame)
        if type(frame) is Data:
            self._send_body(connection, frame.data)
        elif type(frame) is End:
            self._send_end(connection, frame.trailers)

    def _send_body(self, connection: OriginConnection, data: bytes) -> None:
        if self._chunked:
            self._write(connection, b"%x\r\n%b\r\n" % (len(data), data))
        elif self._left >= len(data):
            self._left -= len(data)
            self._write(connection, data)
        elif self._head is not None and self._head.protocol:
            # Meant for the protocol that the backend has not agreed to yet.
            self._early.append(Data(data[self._left :]))
            self.pause_peer()
            self._left, data = 0, data[: self._left]
            self._write(connection, data)
        else:
            self._refuse("its body is longer than its content-length")

    def _send_end(self, connection: OriginConnection, trailers: Fields) -> None:
        if self._left:
            self._refuse("its body is shorter than its content-length")
            return
        if self._chunked:
            try:
                self._write(connection, encode_request_trailers(trailers))
            except TunnelError as error:
                self.cut(error)
                return
        elif self._pending:
            self._flush(connection)
        self.asked = True
        connection.await_answer()

    def _send_opaque(self, connection: OriginConnection, frame: Frame) -> None:
        if type(frame) is Data:
            connection.transport.write(frame.data)
            if self.answered:
                connection.half_closed()
        elif type(frame) is End:
            self.asked = True
            if self.answered:
                connection.close()
                self.leave()
                return
            connection.half_closed()
            connection.write_eof()

    def _write(self, connection: OriginConnection, data: bytes) -> None:
        if self._pending:
            data = self._pending + data
            self._pending = b""
        if not connection.write_paused:
            connection.deadline = FOREVER  # it takes the body, wanted or not
        if data:
            connection.transport.write(data)

    def _refuse(self, what: str) -> None:
        # Closed, so that the backend does not take what it got for the whole (RFC 9112 section 6.3, rule 6).
        self.cut(TunnelError(ErrorCode.BAD_REQUEST, f"the request is malformed: {what}"))

    # Holding

    def _hold(self, frame: Frame) -> None:
        self._held.append(frame)
        if type(frame) is Data:
            self.pause_peer()
