"""qh3, kept from filling its congestion window; the one file that relies on what is private in it."""

import copy
import os
from collections import OrderedDict, deque
from math import inf
from typing import Any, Final

from qh3.quic.connection import QuicConnection, QuicConnectionError
from qh3.quic.packet import QuicErrorCode, QuicTransportParameters

from quictunnel.quic.path_mtu import BASE, LARGEST, PROBE_UIDS

__all__ = ["CONGESTION_CONTROL", "ReinedConnection"]

CONGESTION_CONTROL: Final = None
"there is no choice: CUBIC"

_SHARE: Final = 0.7
"of the congestion window that may be under way: as much as a loss leaves of it (CUBIC, RFC 9438 section 4.6)"

_CAUTIOUS: Final = 256
"bursts after a loss that are still taken one by one"

_PIECE: Final = 4096
"bytes of one stream before it is another's turn"

_ALONE: Final = 65_536
"the same for a stream that waits alone"

_BRIEF: Final = 600
"bytes of a packet that has room for more: what is not in it was not there"

_HEADERS: Final = 80
_FRAME: Final = 28
"bytes of a packet that are not stream data, and of each piece of stream data in it"

_CRYPTO: Final = 900
"bytes of a handshake in one datagram of 1200"

_NO_ROOM: Final = "packet builder capacity exhausted"

_ACK_WAIT: Final = 0.001
"seconds that the acknowledgement of a small datagram waits for an answer to leave with, as long as qh3 delays one"

_NEWS_WAIT: Final = 0.025
"the same for what the peer has no need of yet: RFC 9000 section 18.2's default of max_ack_delay"

_ROUNDED: Final = 1e-6
"seconds by which a timer is late, so that it is due on qh3's clock when it is on the caller's"

_UNANSWERED: Final = 2
"time-outs of a handshake that nobody has answered until it is begun anew"

_TIMED_OUT: Final = 3
"time-outs in a row that say that large datagrams do not arrive"

# What qh3's client says of max_udp_payload_size (RFC 9000 section 18.2) whatever its socket takes: 1472. And 65,527.
_SAYS: Final = b"\x03\x02\x45\xc0"
_MEANS: Final = b"\x03\x04\x80\x00\xff\xf7"


class ReinedConnection(QuicConnection):
    """qh3's connection, given no more than a part of its congestion window to send, and datagrams that a path carries.

    qh3 2.1 sends nothing while as much is under way as its congestion window allows, not even acknowledgements. Two
    ends that both have much to send then wait for each other's: a link with 80 exchanges of 20 kB both ways stood still
    until its idle time-out. It also breaks when a needless repetition waits for the window while its stream ends. So
    what does not fit waits here, and each stream has its turn. tests/quic/test_both_ways.py watches over it.

    The size of its datagrams is settled when a connection begins. Afterwards it can only fall: a peer's transport
    parameters may be applied again with a smaller max_udp_payload_size. So a connection begins with the largest size
    that its first hop carries, its handshake goes out in pieces, and until that size is proved it is handed no more at
    a time than fits a smaller one. Its own search knows nothing above 1472 bytes, takes place in clients only, and ends
    for good with the first loss; it is not used. tests/quic/test_path_mtu.py watches over it.

    It paces: a window's worth of datagrams in a round trip, and whenever it is asked for one that counts as one of full
    size, even if it is a small one and even if there is none. At a distance a lone request waited for half a round
    trip. So it is not asked needlessly, and while nothing is under way its clock is put forward by as long as it takes
    to forget what it was asked. tests/quic/test_round_trips.py watches over it.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._waiting: OrderedDict[int, deque[memoryview]] = OrderedDict()
        self._ends: set[int] = set()  # those of them whose last bytes are there
        self._left: int | None = None  # of the room there was when it was last looked, since the last packets left
        self._held = 0  # bytes of a datagram, until it is known what the path carries; 0 when it is
        self._begun_anew = False
        self._now = 0.0
        self._early: list[tuple[bytes, Any]] = []  # the handshake's datagrams
        self._probes: list[int] = []
        self._probe_count = 0
        self.probed: dict[int, int] = {}
        self._cautious = 0
        self._losses = 0  # when it was last asked
        self._may_end = True  # something may be under way on streams other than the control stream
        self._settled = False  # nothing has changed since there was nothing more to send
        self._heard = False  # but that small datagrams were received
        self._late = inf  # when what follows from that has to be sent, on qh3's clock
        self._lost = 0  # packets, when it was last looked
        self._hasty = 0  # bursts since then, counted down
        self._asked = 0  # datagrams that count for the pacer
        self._ahead = 0.0  # seconds of qh3's clock before the caller's
        self._peer: Any = None  # where the last datagram came from
        self._home: Any = None  # what is passed off as that, once the size has fallen

    # Sending

    def send_stream_data(self, stream_id: int, data: Any, end_stream: bool = False) -> None:
        if stream_id:
            self._may_end = True
        waiting = self._waiting.get(stream_id)
        core = self._core
        if waiting is None:
            if core is None or not self._handshake_complete:
                super().send_stream_data(stream_id, data, end_stream)
                return
            size = len(data)
            left = self._left
            if left is None:
                left = self._room()
            if size <= left or size <= 1:
                self._left = left - size
                super().send_stream_data(stream_id, data, end_stream)
                return
            view = memoryview(data)
            # A stream's first byte opens it, whatever else is under way: ids are given in order.
            is_new = stream_id & 1 != self._is_client and stream_id not in self._created_local_stream_ids
            first = max(left, 1 if is_new else 0)
            if first:
                super().send_stream_data(stream_id, view[:first])
            self._left = 0
            waiting = self._waiting[stream_id] = deque((view[first:],))
        elif core is not None and not core.can_send_stream(stream_id):
            self._drop(stream_id)
            raise ValueError("the stream takes no more")
        else:
            waiting.append(memoryview(data))
        if end_stream:
            self._ends.add(stream_id)

    def datagrams_to_send(self, now: float) -> list[tuple[bytes, Any]]:
        core = self._core
        if core is None:
            return []
        datagrams, self._early = self._early, []
        self._left = None
        now += self._ahead
        if not self._probes and (self._settled or (self._heard and self._may_wait(now))):
            return datagrams
        self._late = inf
        poll = core.poll_transmit
        asked = 0
        try:
            while True:
                fed = self._feed() if self._waiting else False
                if asked and not fed:
                    if not self._probes or not self._handshake_complete:
                        break
                    self._probe(now, datagrams)
                asked += 1
                while (transmit := poll(now)) is not None:
                    datagrams.append((transmit[0], transmit[1]))
                    if self._heard and len(transmit[0]) < _BRIEF and not self._waiting:
                        break  # what follows from small datagrams is in it
                    asked += 1
            self._settled, self._heard = True, False
            return datagrams if self._home is None else self._to_peer(datagrams)
        except RuntimeError as error:
            # What waits first is larger than may be sent to an address that is not proved yet, three times what came
            # from there. More is about to come.
            if self._handshake_complete and _NO_ROOM in str(error):
                return datagrams
            raise _broken(error) from error
        finally:
            self._left = None
            self._asked += asked

    def _may_wait(self, now: float) -> bool:
        """Whether what was received leaves nothing to send that needs haste.

        An answer may be on its way that takes the acknowledgement with it. Where there is none to send, nothing is
        under way, and what there may be to say is that a stream has ended and the peer may begin another one.
        """
        core = self._core
        assert core is not None
        lost = core.loss_total + core.pto_total
        if lost != self._lost:
            self._lost = lost
            self._hasty = _CAUTIOUS
        elif self._hasty:
            self._hasty -= 1
        elif not self._waiting and (timer := core.get_timer()) is not None and core.get_send_buffer_size() == 0:
            if timer[0] == "idle":
                self._late = min(self._late, now + _NEWS_WAIT)
            elif timer[0] == "ack_application":
                self._late = min(self._late, now + _ACK_WAIT)
            else:
                return False
            return now < self._late
        return False

    def may_take_several(self) -> bool:
        """Whether nothing waits that could become needless by what is to be received.

        That is a repetition on a stream that ends: it breaks qh3. So nothing may be under way but what is on the
        control stream, which never ends, as at the receiving end of a transfer.
        """
        core = self._core
        if core is None:
            return False
        losses = core.loss_total + core.pto_total
        if losses != self._losses:  # what is to be repeated is neither under way nor waiting to be sent first
            self._losses = losses
            self._may_end = True
            self._cautious = _CAUTIOUS
        elif self._cautious:
            self._cautious -= 1
        elif self._may_end and core.bytes_in_flight == 0 and self.get_send_buffer_size(None) == 0:
            self._may_end = False
        return not self._may_end

    def stop_stream(self, stream_id: int, error_code: int) -> None:
        self._may_end = True
        super().stop_stream(stream_id, error_code)

    def get_send_buffer_size(self, stream_id: int | None = None) -> int:
        before = self._settled, self._heard
        size: int = super().get_send_buffer_size(stream_id)
        self._settled, self._heard = before
        if stream_id is None:
            return size + sum(len(piece) for pieces in self._waiting.values() for piece in pieces)
        waiting = self._waiting.get(stream_id)
        return size if waiting is None else size + sum(map(len, waiting))

    def reset_stream(self, stream_id: int, error_code: int) -> None:
        self._may_end = True
        self._drop(stream_id)
        super().reset_stream(stream_id, error_code)

    def _room(self) -> int:
        """Bytes that may be handed over now."""
        core = self._core
        assert core is not None
        window, under_way = core.congestion_window, core.bytes_in_flight
        if not under_way and self._asked:
            self._rest(window)
        queued = core.get_send_buffer_size()
        room = int(window * _SHARE) - under_way - queued
        if self._held:
            return min(room, self._held - _HEADERS - _FRAME - queued)
        return room

    def _rest(self, window: int) -> None:
        """Let time pass for the pacer. Nothing is under way: no round trip becomes longer by it, and no timer runs."""
        core = self._core
        assert core is not None
        spent = self._asked * self._configuration.max_datagram_size
        self._asked = 0
        self._ahead += (core.smoothed_rtt or 0.0) * min(1.0, spent / window)

    def _feed(self) -> bool:
        """Hand over what fits, a piece of each stream in turn; whether that is anything."""
        core, waiting = self._core, self._waiting
        assert core is not None
        room = self._room()
        fed = room > 0
        while room > 0 and waiting:
            stream_id, pieces = waiting.popitem(last=False)
            size = min(room, _PIECE if waiting else _ALONE)
            piece = pieces.popleft()
            if len(piece) > size:
                pieces.appendleft(piece[size:])
                piece = piece[:size]
            room -= len(piece)
            if self._held:
                room -= _FRAME
            last = not pieces and stream_id in self._ends
            if pieces:
                waiting[stream_id] = pieces  # behind the others
            else:
                self._ends.discard(stream_id)
            try:
                core.send_stream(stream_id, piece, last)
            except (ValueError, AssertionError):
                self._drop(stream_id)  # its event is still to come
        return fed

    def _drop(self, stream_id: int) -> None:
        self._waiting.pop(stream_id, None)
        self._ends.discard(stream_id)

    # Receiving

    def receive_datagram(self, data: bytes, addr: Any, now: float) -> None:
        self._now = now = now + self._ahead
        if not data:
            return
        self._peer, addr = addr, self._home or addr
        if not self._handshake_complete or data[0] & 0x80:
            super().receive_datagram(data, addr, now)
            return
        # Nothing but packets with a short header, of which a datagram has one: what qh3 looks for before is not there.
        core = self._core
        assert core is not None
        self._heard = (self._heard or self._settled) and len(data) < BASE
        self._settled = False
        try:
            core.receive_datagram(data, addr, now, len(data))
        except RuntimeError as error:
            raise _broken(error) from error
        self._drain_core()

    def receive_many_datagrams(self, datagrams: list[bytes], addr: Any, now: float) -> None:
        self._peer, addr = addr, self._home or addr
        super().receive_many_datagrams(datagrams, addr, now + self._ahead)

    def _to_peer(self, datagrams: list[tuple[bytes, Any]]) -> list[tuple[bytes, Any]]:
        home = self._home[:2]
        return [(data, self._peer if address[:2] == home else address) for data, address in datagrams]

    def connect(self, addr: Any, now: float) -> None:
        self._now = now
        super().connect(addr, now)

    def get_timer(self) -> float | None:
        at: float | None = super().get_timer() if self._late == inf else self._late
        return at if at is None or not self._ahead else at - self._ahead + _ROUNDED

    def handle_timer(self, now: float) -> None:
        self._now = now = now + self._ahead
        heard = self._heard
        super().handle_timer(now)
        core = self._core
        self._heard = heard and core is not None and core.loss_total + core.pto_total == self._lost
        if not self._held or self._handshake_complete or core is None or not core.pto_total:
            return
        # A busy machine, or packets of 1280 bytes on a path that carries less: they have as many where they may, and
        # IPv6's narrowest path carries 1232.
        if self._is_client and not core.received_authenticated_packet:
            # The second time-out is three seconds after the first packet: where one second passes there and back, what
            # is begun anew at the first would never be answered.
            if not self._begun_anew and core.pto_total < _UNANSWERED:
                return
            if self._begun_anew:
                self._configuration.max_datagram_size = BASE
                self._held = 0
            self._begin_anew(now)
        elif core.pto_total > 1:
            self.use_datagram_size(BASE)

    def _begin_anew(self, now: float) -> None:
        """Forget the handshake that nobody has answered: to repeat it in smaller pieces is beyond qh3."""
        before = self._original_destination_connection_id or b""
        # The first byte leads to the process of the server that is meant.
        self._original_destination_connection_id = before[:1] + os.urandom(len(before) - 1)
        self._retry_source_connection_id = None
        self._retry_count = 0
        self._transport_parameters_applied = False
        self._begun_anew = True
        self._early.clear()
        self._core = None
        self._tls = None
        self._create_core(self._remote_addr, self._original_destination_connection_id, now)
        self._create_tls(remote_source_cid=None).start()
        self._drain_tls()

    @property
    def latest_round_trip(self) -> float | None:
        """Seconds, of the last packet that was acknowledged; None before the first."""
        return None if self._core is None else self._core.latest_rtt

    # Datagrams' size

    may_grow = False

    def expect_datagrams(self, size: int) -> None:
        """Be ready for datagrams of up to ``size`` bytes: said before anything is sent or received."""
        size = min(size, LARGEST)
        if not self._is_client and size < LARGEST:
            # A server whose size has had to fall breaks at a client's other address: qh3 forgets to lower it for paths
            # to come. Only the loopback is known to carry what it says, and who has its addresses: there the other
            # address is passed off as the one before.
            return
        if size > BASE and self._core is None:
            self._configuration = copy.copy(self._configuration)
            self._configuration.max_datagram_size = size
            self._configuration.probe_datagram_size = False
            self._held = BASE

    @property
    def datagram_limit(self) -> int:
        """Bytes of the largest datagram that may ever be sent."""
        if self._core is None:
            return BASE
        size: int = self._core.active_path[5]
        return size

    @property
    def datagram_size(self) -> int:
        """Bytes of the largest datagram that is sent, probes left out."""
        return self._held or self.datagram_limit

    def hold_datagram_size(self, size: int) -> None:
        """Send datagrams of up to ``size`` bytes until it is known how large they may be."""
        self._held = size if size < self.datagram_limit else 0

    def use_datagram_size(self, size: int) -> None:
        """Send datagrams of up to ``size`` bytes from now on, and never larger ones again."""
        self._held = 0
        if self._core is not None and size < self.datagram_limit:
            if not self._is_client and self._home is None:
                self._home = self._peer
            told = None if self._tls is None else self._tls.remote_transport_parameters
            known = QuicTransportParameters() if told is None else told
            self._call_core(
                self._core.apply_peer_transport_parameters,
                known.initial_max_data or 0,
                known.initial_max_stream_data_bidi_local or 0,
                known.initial_max_stream_data_bidi_remote or 0,
                known.initial_max_stream_data_uni or 0,
                known.initial_max_streams_bidi or 0,
                known.initial_max_streams_uni or 0,
                3 if known.ack_delay_exponent is None else known.ack_delay_exponent,
                0.025 if known.max_ack_delay is None else known.max_ack_delay / 1000,
                None if not known.max_idle_timeout else known.max_idle_timeout / 1000,
                known.max_datagram_frame_size,
                None,
                known.active_connection_id_limit or 2,
                bool(known.disable_active_migration),
                size,
            )

    def loses_large(self) -> bool:
        """Whether datagrams larger than BASE seem not to arrive any more."""
        core = self._core
        return core is not None and not self._held and core.pto_count >= _TIMED_OUT and self.datagram_limit > BASE

    @property
    def losses(self) -> int:
        """Packets that were lost so far, of any size."""
        return 0 if self._core is None else self._core.loss_total

    def probe_datagram_size(self, size: int) -> None:
        """Send a datagram of ``size`` bytes which nothing is lost with."""
        self._probes.append(size)

    def _probe(self, now: float, datagrams: list[tuple[bytes, Any]]) -> None:
        """Pad pings: with a packet before each that nobody can read (RFC 9000 section 14.4.1)."""
        core = self._core
        assert core is not None
        probes, self._probes = self._probes, []
        for size in probes:
            if size > self.datagram_limit:
                continue
            self._probe_count += 1
            uid = PROBE_UIDS + self._probe_count
            core.send_ping(uid)
            transmit = core.poll_transmit(now)
            if transmit is None:
                continue  # it goes later, and proves nothing
            ping, address = transmit[0], transmit[1]
            padding = self._padding(ping, size - len(ping))
            if padding:
                self.probed[uid] = size
            datagrams.append((padding + ping, address))

    def _padding(self, ping: bytes, size: int) -> bytes:
        """A Handshake packet of so many bytes, whose keys are gone by now, for whom ``ping`` is for."""
        assert self._tls is not None
        to = ping[1 : 1 + len(self._tls.remote_initial_source_connection_id or b"")]
        header = b"\xe3\0\0\0\1" + bytes((len(to),)) + to + bytes((len(self.host_cid),)) + self.host_cid
        payload = size - len(header) - 4
        if ping[0] & 0x80 or payload < 20:
            return b""
        return header + (payload | 0x8000_0000).to_bytes(4, "big") + bytes(payload)

    # The handshake

    def _call_core(self, operation: Any, *args: Any) -> Any:
        self._settled = self._heard = False
        if self._held and not self._handshake_complete and operation.__name__ == "send_crypto":
            epoch, offset, data = args
            for start in range(0, len(data), _CRYPTO):
                super()._call_core(operation, epoch, offset + start, data[start : start + _CRYPTO])
                self._send_early()
            return None
        return super()._call_core(operation, *args)

    def _send_early(self) -> None:
        core = self._core
        assert core is not None
        while (transmit := super()._call_core(core.poll_transmit, self._now)) is not None:
            self._early.append((transmit[0], transmit[1]))

    def _create_tls(self, remote_source_cid: bytes | None) -> Any:
        bridge = super()._create_tls(remote_source_cid)
        bridge.tls.handshake_extensions = [
            (kind, data.replace(_SAYS, _MEANS) if data.count(_SAYS) == 1 else data)
            for kind, data in bridge.tls.handshake_extensions
        ]
        return bridge


def _broken(error: RuntimeError) -> QuicConnectionError:
    return QuicConnectionError(QuicErrorCode.INTERNAL_ERROR, None, str(error))
