"""The stream leg: an exchange's frames on one bidirectional QUIC stream, under credit of our own.

The server's leg opens its stream, sends the request and receives the response; the client's leg is the mirror image.
What differs between the two is only which of them ends the exchange: the response's End does, whoever of the two
sends or receives it.
"""

from collections import deque
from typing import TYPE_CHECKING, Final

from mypy_extensions import mypyc_attr

from quictunnel.exchange import Leg
from quictunnel.quic.engine import STREAM_OVER
from quictunnel.wire.codec import EMPTY_DATA, StreamDecoder, encode_data, encode_head, encode_trailers
from quictunnel.wire.credit import ReceiveCredit, SendCredit, WindowBudget
from quictunnel.wire.errors import ErrorCode, ProtocolError, TunnelError
from quictunnel.wire.frames import Data, End, Frame, RequestHead, ResponseHead

if TYPE_CHECKING:
    from quictunnel.quic.engine import Connection
    from quictunnel.quic.link import Link

__all__ = ["StreamLeg"]

# The largest payload of one DATA frame: credit is spent and memory freed in steps of it.
_DATA_LIMIT: Final = 64 * 1024


@mypyc_attr(allow_interpreted_subclasses=True)
class StreamLeg(Leg):
    """One exchange on one stream of a link."""

    __slots__ = (
        "_budget",
        "_decoder",
        "_dirty",
        "_fin",
        "_held",
        "_is_opener",
        "_opaque",
        "_out",
        "_paused",
        "_peer_paused",
        "_receive_credit",
        "_send_credit",
        "ended",
        "first_sent",
        "link",
        "may_receive",
        "may_send",
        "stream_id",
        "written",
    )

    def __init__(self, budget: WindowBudget, head_limit: int, *, is_opener: bool) -> None:
        super().__init__()
        # for as long as the exchange lives
        self.link: Link | None = None
        self.stream_id = -1
        self.first_sent = -1  # the link's count of datagrams when the stream was opened
        self._is_opener = is_opener
        self._decoder = StreamDecoder(is_request=not is_opener, head_limit=head_limit)
        self._budget = budget
        self.ended = False
        self._opaque = False  # a 101 has passed: each End ends only its direction

        # the direction we send
        self._send_credit: SendCredit | None = None  # made with the first body bytes, as most directions have none
        self._out: list[bytes | memoryview] = []
        self._held: deque[bytes | memoryview | End] | None = None  # what waits for credit; an empty deque is 600 bytes
        self._fin = False
        self._dirty = False
        self.written = 0  # bytes handed to the library
        self.may_send = True
        self._peer_paused = False

        # the direction we receive
        self._receive_credit: ReceiveCredit | None = None
        self.may_receive = True
        self._paused = False

    def __repr__(self) -> str:
        role = "opener" if self._is_opener else "acceptor"
        return f"<StreamLeg {self.stream_id} {role}{' ended' if self.ended else ''}>"

    # The verbs

    def receive(self, frame: Frame) -> None:
        if not self.may_send or self.ended:
            return
        kind = type(frame)
        if kind is Data:
            if self._held:
                self._held.append(frame.data)  # type: ignore[union-attr]
            else:
                self._send_data(frame.data)  # type: ignore[union-attr]
        elif kind is End:
            if self._held:
                self._held.append(frame)  # type: ignore[arg-type]
            else:
                self._send_end(frame)  # type: ignore[arg-type]
            return
        else:
            self._send_head(frame)  # type: ignore[arg-type]
        self._wake()

    def pause(self) -> None:
        self._paused = True

    def resume(self) -> None:
        self._paused = False
        self.grant()

    def abort(self, error: TunnelError) -> None:
        if self.ended:
            return
        link = self.link
        if link is not None and self.stream_id >= 0:
            link.cut_stream(self.stream_id, error.code, sending=self.may_send, receiving=self.may_receive)
        self._end()

    # Sending

    def attached(self, link: "Link") -> None:
        """A slot of ``link`` is this leg's."""
        self.link = link
        if self._peer_paused:
            link.stalled(self)
        if self._out:
            self._dirty = True
            link.wake(self)

    def flush(self, connection: "Connection") -> None:
        """Write everything that was received since the last flush."""
        self._dirty = False
        if not self._out and not self._fin:
            return
        data = b"".join(self._out)
        self._out.clear()
        fin, self._fin = self._fin, False
        self.written += len(data)
        if self.stream_id < 0:
            assert self.link is not None
            self.first_sent = self.link.sent
            self.stream_id = self.link.open_stream(self)
            connection.send_stream_data(self.stream_id, data, fin)
            return
        try:
            connection.send_stream_data(self.stream_id, data, fin)
        except STREAM_OVER:
            # The peer's STOP_SENDING has closed the direction and its event is still to come, or never will.
            self._fail(TunnelError(ErrorCode.CONNECTION_TERMINATED))

    def _send_head(self, head: RequestHead | ResponseHead) -> None:
        self._out.append(encode_head(head))
        if isinstance(head, RequestHead):
            if head.body:
                self._out.append(EMPTY_DATA)
        elif head.status == 101:
            self._opaque = True

    def _send_data(self, data: bytes | memoryview) -> None:
        """Send as much as the credit allows, and hold the rest."""
        credit = self._send_credit
        if credit is None:
            credit = self._send_credit = SendCredit()
        size = len(data)
        if size <= _DATA_LIMIT and size <= credit.limit - credit.sent:
            credit.sent += size
            self._out.append(encode_data(data))
            self._out.append(data)
            return
        # Views: the flush copies what is sent, and a receiver that grants byte after byte must not cost a copy of the
        # rest each time.
        view = memoryview(data)
        position = 0
        while position < size:
            step = credit.spend(min(size - position, _DATA_LIMIT))
            if not step:
                if self._held is None:
                    self._held = deque()
                self._held.appendleft(view[position:])
                return
            chunk = view[position : position + step]
            self._out.append(encode_data(chunk))
            self._out.append(chunk)
            position += step

    def _send_end(self, end: End) -> None:
        if end.trailers:
            self._out.append(encode_trailers(end.trailers))
        self._fin = True
        self.may_send = False
        self._wake()
        if (not self._is_opener and not self._opaque) or not self.may_receive:
            self._finish()

    def _wake(self) -> None:
        if self._held and not self._peer_paused:
            self._peer_paused = True
            if self.link is not None:
                self.link.stalled(self)
            self.peer.pause()
        if not self._dirty and self.link is not None:
            self._dirty = True
            self.link.wake(self)

    def credit_received(self, limit: int) -> None:
        """The receiver of our direction can take bytes up to ``limit``."""
        if self._send_credit is None:
            self._send_credit = SendCredit()
        link = self.link
        queued = 0 if link is None or self.stream_id < 0 else link.queued(self.stream_id)
        if not self._send_credit.raise_limit(limit, queued):
            return
        held = self._held
        while held:
            waiting = held.popleft()
            if isinstance(waiting, End):
                if link is not None:
                    link.moves(self)
                self._send_end(waiting)
                return
            self._send_data(waiting)
            if self._send_credit.sent >= self._send_credit.limit:
                break
        self._wake()
        if self._peer_paused:
            if held and link is not None:
                link.stalled(self)
            elif not held:
                self._resume_peer()

    def stalled_too_long(self) -> None:
        """The receiver of our direction has taken nothing of what waits for it."""
        self._fail(TunnelError(ErrorCode.HTTP_RESPONSE_TIMEOUT, "the receiver takes no more"))

    def _resume_peer(self) -> None:
        self._peer_paused = False
        if self.link is not None:
            self.link.moves(self)
        self.peer.resume()

    # Receiving

    def data_received(self, data: bytes, fin: bool) -> None:
        """Take stream bytes: they become frames of the peer's."""
        try:
            for frame in self._decoder.feed(data, fin):
                kind = type(frame)
                if kind is Data:
                    credit = self._receive_credit
                    if credit is None:
                        credit = self._receive_credit = ReceiveCredit(self._budget)
                    credit.receive(len(frame.data))  # type: ignore[union-attr]
                    self.peer.receive(frame)
                elif kind is End:
                    self._end_received(frame)  # type: ignore[arg-type]
                else:
                    self._head_received(frame)  # type: ignore[arg-type]
                if self.ended:
                    return
        except ProtocolError as error:
            self._fail(TunnelError(ErrorCode.FRAME_ERROR, f"the peer broke the tunnel's protocol: {error}"))
            return
        if self._receive_credit is not None and not self._paused:
            self.grant()

    def _head_received(self, head: RequestHead | ResponseHead) -> None:
        if isinstance(head, RequestHead):
            assert self.link is not None
            head = self.link.owner.link_request(self.link, self, head)
        elif head.status == 101:
            self._opaque = True
        self.peer.receive(head)

    def _end_received(self, end: End) -> None:
        self.may_receive = False
        peer = self.peer
        if (self._is_opener and not self._opaque) or not self.may_send:
            # The response is over, and with it the exchange: what is left of the request is not needed.
            if self.may_send and self.link is not None:
                self._stop_sending()
                self.link.cut_stream(self.stream_id, ErrorCode.NO_ERROR, sending=True, receiving=False)
            self._finish()
        peer.receive(end)

    def grant(self) -> None:
        """Tell the sender how far it may go now, if it is time for that."""
        credit, link = self._receive_credit, self.link
        if credit is None or link is None or self._paused or not self.may_receive:
            return
        if link.drains:
            if credit.is_drained:
                link.drained(self)
            return
        limit = credit.grant(link.heard_at, link.least_round_trip)
        if limit is not None:
            link.grant(self, limit)

    # Ending

    def cut_received(self, code: int, was_reset: bool) -> None:
        """RESET_STREAM or STOP_SENDING came with ``code``."""
        if self.ended:
            return
        if was_reset:
            self.may_receive = False
        else:
            self._stop_sending()
        if code == ErrorCode.NO_ERROR:
            # The peer has all that it needs of our direction (RFC 9114 section 4.1), or gives up its request; the
            # other direction goes on to its end. An answer that is given up will have none.
            if (was_reset and self._is_opener) or not (self.may_send or self.may_receive):
                self._fail(TunnelError(ErrorCode.CONNECTION_TERMINATED))
            elif self._peer_paused:
                self._resume_peer()
            return
        self._fail(TunnelError.from_wire(code))

    def link_lost(self) -> None:
        """The link is gone."""
        if not self.ended:
            peer = self.peer
            self._end()
            self._tell(
                peer,
                TunnelError(ErrorCode.CONNECTION_TERMINATED, "the connection to the tunnel's client was lost"),
            )

    def _fail(self, error: TunnelError) -> None:
        peer = self.peer
        self.abort(error)
        self._tell(peer, error)

    def _tell(self, peer: Leg, error: TunnelError) -> None:
        """This leg has failed and let go of ``peer``."""
        peer.abort(error)

    def _finish(self) -> None:
        """Both legs have all they will get. Bytes that wait for a flush are still written."""
        if not self._is_opener and self.may_receive and self.link is not None:
            self.link.cut_stream(self.stream_id, ErrorCode.NO_ERROR, sending=False, receiving=True)
        self.detach()
        self._leave()

    def _end(self) -> None:
        """End at once: what has not been written is not."""
        self._stop_sending()
        self.detach()
        self._leave()

    def _stop_sending(self) -> None:
        self.may_send = False
        self._fin = False
        self._out.clear()
        if self._held is not None:
            self._held.clear()

    def _leave(self) -> None:
        self.ended = True
        if self._receive_credit is not None:
            self._receive_credit.release()
        if self.link is not None:
            self.link.release(self)
