"""aioquic, held back where it gives strangers room; the one file that relies on what is private in it."""

from typing import Any, Final

from aioquic.quic.connection import QuicConnection, QuicConnectionError
from aioquic.quic.packet import QuicErrorCode

__all__ = ["ReinedConnection"]

# What may be missing before the bytes that a peer has sent out of order, on one stream and on all of a connection.
# On one stream it is what a path loses of a burst; a control stream never has more under way. On all streams it is the
# flight of a very fast path, not what a peer was given credit for.
_HOLE_LIMIT: Final = 256 * 1024
_HOLES_LIMIT: Final = 32 * 1024 * 1024

# A lost packet makes one hole at most; every further packet is compared with each of them.
_FRAGMENTS_LIMIT: Final = 1024


_NEW_PATH_PACKETS: Final = 4
"that may be sent on a new path whatever was under way on the old one"


class ReinedConnection(QuicConnection):
    """aioquic's connection without the room that it gives to strangers.

    It keeps what comes out of order in one piece of memory that reaches from the first missing byte on, and lets the
    peer go twice as far whenever it has gone half of the way, missing bytes included: one byte far ahead is megabytes
    here, and sixteen such datagrams are two gigabytes, before a word of hello. It also takes streams that no peer of
    ours may open. Nothing public can be told to do otherwise; tests/server/test_hostile_client.py watches over the
    private names.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        # A client opens the control stream, a server its exchanges, and nobody a stream of one direction.
        self._local_max_streams_uni.value = self._local_max_streams_uni.sent = 0
        if not self._is_client:
            self._local_max_streams_bidi.value = self._local_max_streams_bidi.sent = 1

    def _handle_stream_frame(self, context: Any, frame_type: int, buf: Any) -> None:
        if frame_type & 4:  # it has an offset (RFC 9000 section 19.8)
            start = buf.tell()
            stream_id, offset = buf.pull_uint_var(), buf.pull_uint_var()
            buf.seek(start)
            stream = self._streams.get(stream_id)
            if stream is not None and offset > stream.receiver.starting_offset():
                self._out_of_order(frame_type, stream_id, offset - stream.receiver.starting_offset())
            elif stream is None and offset > _HOLE_LIMIT and not self._stream_is_discarded(stream_id):
                self._out_of_order(frame_type, stream_id, offset)
        super()._handle_stream_frame(context, frame_type, buf)

    def _out_of_order(self, frame_type: int, stream_id: int, hole: int) -> None:
        stream = self._streams.get(stream_id)
        fragments = 0 if stream is None else len(stream.receiver._ranges)
        if fragments < _FRAGMENTS_LIMIT and hole <= _HOLE_LIMIT:
            return
        held = hole + sum(
            each.receiver.highest_offset - each.receiver.starting_offset()
            for each in self._streams.values()
            if not each.receiver.is_finished and each is not stream
        )
        if fragments >= _FRAGMENTS_LIMIT or stream_id == 0 or held > _HOLES_LIMIT:
            raise QuicConnectionError(
                error_code=QuicErrorCode.FLOW_CONTROL_ERROR,
                frame_type=frame_type,
                reason_phrase="too much came out of order",
            )

    def path_changed(self) -> None:
        """Forget of congestion what the old path has taught (RFC 9000 section 9.4).

        What was under way there fills the window, and probes come ever more seldom: not even a ping would leave.
        """
        recovery = self._loss
        recovery._pto_count = 0
        recovery._cc.congestion_window = max(
            recovery.congestion_window, recovery.bytes_in_flight + _NEW_PATH_PACKETS * self._max_datagram_size
        )

    def get_send_buffer_size(self, stream_id: int | None = None) -> int:
        """What qh3 has by the same name."""
        if stream_id is None:
            return sum(map(self.get_send_buffer_size, self._streams))
        stream = self._streams.get(stream_id)
        if stream is None or stream.sender._reset_error_code is not None:
            return 0
        return stream.sender._buffer_stop - stream.sender.highest_offset
