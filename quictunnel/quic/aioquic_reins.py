"""aioquic, held back where it gives strangers room; the one file that relies on what is private in it."""

from collections.abc import Iterable
from typing import Any, Final

from aioquic._buffer import Buffer
from aioquic.quic.congestion.base import register_congestion_control
from aioquic.quic.congestion.reno import RenoCongestionControl
from aioquic.quic.connection import QuicConnection, QuicConnectionError
from aioquic.quic.events import PingAcknowledged
from aioquic.quic.packet import QuicErrorCode, QuicFrameType, QuicPacketType, pull_quic_transport_parameters
from aioquic.quic.packet_builder import QuicDeliveryState, QuicPacketBuilder, QuicSentPacket
from aioquic.tls import Epoch

from quictunnel.quic.path_mtu import BASE, LARGEST, PROBE_UIDS

__all__ = ["CONGESTION_CONTROL", "ReinedConnection"]

CONGESTION_CONTROL: Final = "quictunnel"
"the name in a configuration of what ``_Congestion`` does"

# What may be missing before the bytes that a peer has sent out of order, on one stream and on all of a connection.
# On one stream it is what a path loses of a burst; a control stream never has more under way. On all streams it is the
# flight of a very fast path, not what a peer was given credit for.
_HOLE_LIMIT: Final = 256 * 1024
_HOLES_LIMIT: Final = 32 * 1024 * 1024

# A lost packet makes one hole at most; every further packet is compared with each of them.
_FRAGMENTS_LIMIT: Final = 1024


_NEW_PATH_PACKETS: Final = 4
"that may be sent on a new path whatever was under way on the old one"


_LARGE_LOST: Final = 8
"""packets larger than BASE that are lost, with none acknowledged in between, before large ones count as lost for their
size: losses by chance at 10 % do that once in a hundred million packets"""

_TIMED_OUT: Final = 3
"such losses that a large packet counts for which waits for an acknowledgement until a time-out"


class _Congestion(RenoCongestionControl):
    """aioquic's Reno, which also keeps count of large packets that do not arrive."""

    def __init__(self, *, max_datagram_size: int) -> None:
        super().__init__(max_datagram_size=max_datagram_size)
        self.large_lost = 0
        self.latest_round_trip: float | None = None

    def on_rtt_measurement(self, *, now: float, rtt: float) -> None:
        self.latest_round_trip = rtt
        super().on_rtt_measurement(now=now, rtt=rtt)

    def on_packet_acked(self, *, now: float, packet: QuicSentPacket) -> None:
        if packet.sent_bytes > BASE:
            self.large_lost = 0
        super().on_packet_acked(now=now, packet=packet)

    def on_packets_lost(self, *, now: float, packets: Iterable[QuicSentPacket]) -> None:
        for packet in packets:
            if packet.sent_bytes > BASE:
                self.large_lost += 1
        super().on_packets_lost(now=now, packets=packets)

    def on_packets_expired(self, *, packets: Iterable[QuicSentPacket]) -> None:
        expired = list(packets)
        for packet in expired:
            if packet.sent_bytes > BASE:
                self.large_lost += _TIMED_OUT
        super().on_packets_expired(packets=expired)

    def resize(self, size: int) -> None:
        """Go on with datagrams of another size (RFC 9002 section 7.2)."""
        self._max_datagram_size = size
        if self.ssthresh is None:
            self.congestion_window = max(self.congestion_window, min(10 * size, max(14_720, 2 * size)))
        self.congestion_window = max(self.congestion_window, 2 * size)
        self.large_lost = 0


register_congestion_control(CONGESTION_CONTROL, _Congestion)


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
        congestion = self._loss._cc
        assert isinstance(congestion, _Congestion), "another algorithm is configured"
        self._congestion = congestion
        self.datagram_limit = LARGEST
        "bytes of a datagram that the peer takes, and this library can make"
        self._probes: list[int] = []  # the sizes to be tried
        self._probe_count = 0
        self.probed: dict[int, int] = {}

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

    @property
    def latest_round_trip(self) -> float | None:
        """Seconds, of the last packet that was acknowledged; None before the first."""
        return self._congestion.latest_round_trip

    def path_changed(self) -> None:
        """Forget of congestion what the old path has taught (RFC 9000 section 9.4).

        What was under way there fills the window, and probes come ever more seldom: not even a ping would leave.
        """
        recovery = self._loss
        recovery._pto_count = 0
        recovery._cc.congestion_window = max(
            recovery.congestion_window, recovery.bytes_in_flight + _NEW_PATH_PACKETS * self._max_datagram_size
        )

    # Datagrams' size

    @property
    def datagram_size(self) -> int:
        """Bytes of the largest datagram that is sent, probes left out."""
        size: int = self._max_datagram_size
        return size

    def expect_datagrams(self, size: int) -> None:
        """Nothing to do: the size may change at any time."""

    def hold_datagram_size(self, size: int) -> None:
        """Send datagrams of up to ``size`` bytes until it is known how large they may be."""
        self.use_datagram_size(size)

    def use_datagram_size(self, size: int) -> None:
        """Send datagrams of up to ``size`` bytes from now on."""
        if size != self._max_datagram_size:
            self._max_datagram_size = size
            self._loss._pacer._max_datagram_size = size
            self._congestion.resize(size)

    def probe_datagram_size(self, size: int) -> None:
        """Send a datagram of ``size`` bytes which nothing is lost with."""
        self._probes.append(size)

    may_grow = True
    losses = 0

    def loses_large(self) -> bool:
        """Whether datagrams larger than BASE seem not to arrive any more."""
        return self._max_datagram_size > BASE and self._congestion.large_lost >= _LARGE_LOST

    def datagrams_to_send(self, now: float) -> list[tuple[bytes, Any]]:
        datagrams: list[tuple[bytes, Any]] = super().datagrams_to_send(now)
        if self._probes and self._handshake_confirmed and not self._close_pending and self._close_event is None:
            datagrams += self._send_probes(now)
        return datagrams

    def _send_probes(self, now: float) -> list[tuple[bytes, Any]]:
        path = self._network_paths[0]
        if not path.is_validated or self._version is None:
            return []
        probes, self._probes = self._probes, []
        datagrams: list[tuple[bytes, Any]] = []
        for size in probes:
            if size > self.datagram_limit:
                continue
            self._probe_count += 1
            uid = PROBE_UIDS + self._probe_count
            self.probed[uid] = size
            builder = QuicPacketBuilder(
                host_cid=self.host_cid,
                is_client=self._is_client,
                max_datagram_size=size,
                packet_number=self._packet_number,
                peer_cid=self._peer_cid.cid,
                spin_bit=self._spin_bit,
                version=self._version,
            )
            builder.start_packet(QuicPacketType.ONE_RTT, self._cryptos[Epoch.ONE_RTT])
            buf = builder.start_frame(QuicFrameType.PING, handler=self._on_probe_delivery, handler_args=(uid,))
            buf.push_bytes(bytes(builder.remaining_buffer_space))
            # Neither counted as under way nor waited for: its loss says nothing of congestion, and no time-out is to
            # repeat it (RFC 9000 section 14.4).
            packet = builder._packet
            assert packet is not None
            packet.is_ack_eliciting = packet.in_flight = False
            datagrams += self._flush_builder(builder=builder, network_path=path, peer_cid=self._peer_cid.cid, now=now)
        return datagrams

    def _on_probe_delivery(self, delivery: QuicDeliveryState, uid: int) -> None:
        if delivery is QuicDeliveryState.ACKED:
            self._events.append(PingAcknowledged(uid=uid))

    def _parse_transport_parameters(self, data: bytes, from_session_ticket: bool = False) -> None:
        super()._parse_transport_parameters(data, from_session_ticket)
        limit = pull_quic_transport_parameters(Buffer(data=data)).max_udp_payload_size
        if limit is not None and not from_session_ticket:
            self.datagram_limit = min(self.datagram_limit, limit)

    def may_take_several(self) -> bool:
        return True

    def receive_many_datagrams(self, datagrams: list[bytes], addr: Any, now: float) -> None:
        """What qh3 has by the same name."""
        for data in datagrams:
            self.receive_datagram(data, addr, now)

    def get_send_buffer_size(self, stream_id: int | None = None) -> int:
        """What qh3 has by the same name."""
        if stream_id is None:
            return sum(map(self.get_send_buffer_size, self._streams))
        stream = self._streams.get(stream_id)
        if stream is None or stream.sender._reset_error_code is not None:
            return 0
        return stream.sender._buffer_stop - stream.sender.highest_offset
