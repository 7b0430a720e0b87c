"""qh3, kept from filling its congestion window; the one file that relies on what is private in it."""

from collections import deque
from typing import Any, Final

from qh3.quic.connection import QuicConnection

from quictunnel.quic.path_mtu import BASE

__all__ = ["CONGESTION_CONTROL", "ReinedConnection"]

CONGESTION_CONTROL: Final = None
"there is no choice: CUBIC"

_SHARE: Final = 0.7
"of the congestion window that may be under way: as much as a loss leaves of it (CUBIC, RFC 9438 section 4.6)"

_PIECE: Final = 4096
"bytes of one stream before it is another's turn"


class ReinedConnection(QuicConnection):
    """qh3's connection, given no more than a part of its congestion window to send.

    qh3 2.1 sends nothing while as much is under way as its congestion window allows, not even acknowledgements. Two
    ends that both have much to send then wait for each other's: a link with 80 exchanges of 20 kB both ways stood still
    until its idle time-out. It also breaks when a needless repetition waits for the window while its stream ends. So
    what does not fit waits here, and each stream has its turn. tests/quic/test_both_ways.py watches over it.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._waiting: dict[int, deque[memoryview]] = {}
        self._ends: set[int] = set()  # those of them whose last bytes are there

    def send_stream_data(self, stream_id: int, data: Any, end_stream: bool = False) -> None:
        waiting = self._waiting.get(stream_id)
        core = self._core
        if waiting is None:
            if core is None or not self._handshake_complete or len(data) <= max(self._room(), 1):
                super().send_stream_data(stream_id, data, end_stream)
                return
            view = memoryview(data)
            # A stream's first byte opens it, whatever else is under way: ids are given in order.
            is_new = stream_id & 1 != self._is_client and stream_id not in self._created_local_stream_ids
            first = max(self._room(), 1 if is_new else 0)
            if first:
                super().send_stream_data(stream_id, bytes(view[:first]))
            waiting = self._waiting[stream_id] = deque((view[first:],))
        elif core is not None and not core.can_send_stream(stream_id):
            self._drop(stream_id)
            raise ValueError("the stream takes no more")
        else:
            waiting.append(memoryview(data))
        if end_stream:
            self._ends.add(stream_id)

    def datagrams_to_send(self, now: float) -> list[tuple[bytes, Any]]:
        if not self._waiting:
            return super().datagrams_to_send(now)
        datagrams: list[tuple[bytes, Any]] = []
        while True:
            self._feed()
            more = super().datagrams_to_send(now)
            datagrams += more
            if not more or not self._waiting:
                return datagrams

    def get_send_buffer_size(self, stream_id: int | None = None) -> int:
        size: int = super().get_send_buffer_size(stream_id)
        if stream_id is None:
            return size + sum(len(piece) for pieces in self._waiting.values() for piece in pieces)
        return size + sum(len(piece) for piece in self._waiting.get(stream_id, ()))

    datagram_limit = BASE

    @property
    def datagram_size(self) -> int:
        return BASE

    def hold_datagram_size(self) -> None:
        pass

    def use_datagram_size(self, size: int) -> None:
        pass

    def probe_datagram_size(self, size: int, uid: int) -> None:
        pass

    def loses_large(self) -> bool:
        return False

    def reset_stream(self, stream_id: int, error_code: int) -> None:
        self._drop(stream_id)
        super().reset_stream(stream_id, error_code)

    def _room(self) -> int:
        core = self._core
        assert core is not None
        return int(core.congestion_window * _SHARE) - core.bytes_in_flight - super().get_send_buffer_size(None)

    def _feed(self) -> None:
        """Hand over what fits, a piece of each stream in turn."""
        while self._waiting and (room := self._room()) > 0:
            stream_id, pieces = next(iter(self._waiting.items()))
            piece = pieces.popleft()
            size = min(room, _PIECE)
            if len(piece) > size:
                pieces.appendleft(piece[size:])
                piece = piece[:size]
            last = not pieces and stream_id in self._ends
            del self._waiting[stream_id]
            if pieces:
                self._waiting[stream_id] = pieces  # behind the others
            else:
                self._ends.discard(stream_id)
            try:
                super().send_stream_data(stream_id, bytes(piece), last)
            except (ValueError, RuntimeError, AssertionError):
                self._drop(stream_id)  # its event is still to come

    def _drop(self, stream_id: int) -> None:
        self._waiting.pop(stream_id, None)
        self._ends.discard(stream_id)
