"""UDP sockets as both ends of a link need them."""

import asyncio
import errno
import functools
import socket
import struct
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Final, NamedTuple

from loguru import logger

__all__ = ["QUOTED", "DatagramSocket", "Refusal", "enlarge_buffers", "settle"]

# A burst of a whole congestion window arrives faster than Python reads it; what does not fit is lost and halves the
# window.
_BUFFER_SIZE: Final = 4 * 1024 * 1024

# SO_RCVBUFFORCE and SO_SNDBUFFORCE of Linux: beyond the limits, for root. The socket module does not name them.
_FORCED: Final = {"SO_RCVBUF": 33, "SO_SNDBUF": 32} if sys.platform == "linux" else {}

_LARGEST: Final = 65535
"bytes of a datagram that are read; room that is not used costs nothing"

_AT_ONCE: Final = 32
_BYTES_AT_ONCE: Final = 128 * 1024
"""datagrams, or bytes of them, after which others get their turn on the event loop: a millisecond, of a transfer. What
the kernel hands over in one piece is not torn."""

_BURST: Final = 8
"datagrams of one size in a whole turn, from which on trains are asked for"

_TRIES: Final = 4
"calls for one datagram, when errors that are not its own come in between"

QUOTED: Final = 24
"""bytes of a refused datagram that prove that it was one: in a packet with a short header, a connection id and 15 that
are encrypted. Hosts quote hundreds (RFC 1812 section 4.3.2.3); those that quote only UDP's header prove nothing."""

_ROOM_EACH: Final = 512
"bytes at least that a kernel counts for a datagram that waits, beside its own"

_REFUSALS_AT_ONCE: Final = 64
"refusals that are read before others get their turn; the kernel keeps the rest, within the receive buffer"

# <linux/udp.h>: Python has no names for these. With UDP_SEGMENT the kernel makes datagrams of one size from what it is
# given in one call (GSO), with UDP_GRO it hands such a train over in one call and tells their size.
_UDP_SEGMENT: Final = 103
_UDP_GRO: Final = 104
_SEGMENT_SIZE: Final = struct.Struct("=H")
_GRO_SIZE: Final = struct.Struct("=i")

_FEWEST_SEGMENTS: Final = 4
"that are worth it: two cost more in one call than in two calls, three the same (benchmarks/datagrams.py)"

_MOST_SEGMENTS: Final = 64
"that every kernel makes of one call: UDP_MAX_SEGMENTS was 64 before Linux 6.9"

_MOST_BYTES: Final = 65507
"of one call: what a datagram over IPv4 may have"

_TOLD_SIZE: Final = 64
"bytes of ancillary data: more than the size of a train takes"

_SIZES_OF_TRAIN: Final = 2
"of datagrams in a burst: that of all, and a smaller one of the last"

_NO_SEGMENTS: Final = {errno.EIO, errno.ENOPROTOOPT, errno.EOPNOTSUPP}
"what a kernel or a network device says that cannot do it, now or later"

_NOT_THESE: Final = {errno.EAGAIN, errno.ENOBUFS, errno.EINVAL, errno.EMSGSIZE}
"what is said of this burst alone: there is no room for it, or its datagrams are larger than the path takes"

# <linux/errqueue.h> and <linux/in.h>: Python has no names for these.
_IP_RECVERR: Final = 11
_IPV6_RECVERR: Final = 25
_TOLD_BY: Final = {(socket.IPPROTO_IP, _IP_RECVERR), (socket.IPPROTO_IPV6, _IPV6_RECVERR)}
_EXTENDED_ERROR: Final = struct.Struct("=IBBBBII")  # sock_extended_err: errno, origin, type, code, pad, info, data
_BY_ICMP: Final = (2, 3)  # its origin: SO_EE_ORIGIN_ICMP, SO_EE_ORIGIN_ICMP6


async def settle() -> None:
    """Let sockets that were closed just now be closed: event loops do it in the turn after, and uvloop in the next."""
    for _ in range(3):
        await asyncio.sleep(0)


def enlarge_buffers(sock: socket.socket) -> None:
    """Ask for large kernel buffers; says once how to allow them when the kernel gives much smaller ones."""
    small: list[str] = []
    least = _BUFFER_SIZE
    for option, limit in (("SO_RCVBUF", "net.core.rmem_max"), ("SO_SNDBUF", "net.core.wmem_max")):
        force = _FORCED.get(option)
        try:
            if force is None:
                raise PermissionError
            sock.setsockopt(socket.SOL_SOCKET, force, _BUFFER_SIZE)
        except OSError:
            with suppress(OSError):  # macOS gives nothing to who asks for too much
                sock.setsockopt(socket.SOL_SOCKET, getattr(socket, option), _BUFFER_SIZE)
        granted = sock.getsockopt(socket.SOL_SOCKET, getattr(socket, option))
        if sys.platform == "linux":
            granted //= 2  # the kernel doubles what it is asked for, for its own bookkeeping
        if granted < _BUFFER_SIZE // 2:
            small.append(f"{limit}={_BUFFER_SIZE}")
            least = min(least, granted)
    if small:
        _tell_small(least, " ".join(small))


@functools.cache
def _tell_small(granted: int, limits: str) -> None:
    remedy = f"; sysctl -w {limits} allows it" if sys.platform == "linux" else ""
    logger.warning(
        "bursts of packets may be lost: the kernel gives a UDP socket {} KiB of buffer where {} KiB are asked for{}",
        granted // 1024, _BUFFER_SIZE // 1024, remedy,
    )  # fmt: skip


class Refusal(NamedTuple):
    """A datagram that came to a closed port, as ICMP tells it. Anybody may have forged that, save for the quotation."""

    quoted: bytes
    "how the datagram began: QUOTED bytes, or as many as are quoted"

    address: Any
    "where it was sent"


def _ask_for_refusals(sock: socket.socket) -> bool:
    """Have the kernel keep what ICMP says of each datagram (ip(7), IP_RECVERR); whether it will."""
    if sys.platform != "linux":
        return False
    try:
        # Both for an IPv6 socket: it may have IPv4 peers as ::ffff:a.b.c.d.
        sock.setsockopt(socket.IPPROTO_IP, _IP_RECVERR, 1)
        if sock.family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, _IPV6_RECVERR, 1)
    except OSError as error:
        logger.debug("= closed ports are not told: {!r}", error)
        return False
    return True


def _is_refusal(told: list[tuple[int, int, bytes]]) -> bool:
    """Whether ancillary data of the error queue says that a port is closed."""
    for level, kind, data in told:
        if (level, kind) in _TOLD_BY and len(data) >= _EXTENDED_ERROR.size:
            number, origin, *_ = _EXTENDED_ERROR.unpack_from(data)
            return number == errno.ECONNREFUSED and origin in _BY_ICMP
    return False


def _can_segment(sock: socket.socket) -> bool:
    """Whether the kernel cuts datagrams from what it is given; one before Linux 4.18 would send all of it as one."""
    if sys.platform != "linux":
        return False
    try:
        sock.getsockopt(socket.IPPROTO_UDP, _UDP_SEGMENT)
    except OSError:
        return False
    return True


def _size_in_train(told: list[tuple[int, int, bytes]]) -> int:
    """How large the datagrams of a train are, the last one left out; 0 if it is none."""
    for level, kind, data in told:
        if level == socket.IPPROTO_UDP and kind == _UDP_GRO and len(data) >= _GRO_SIZE.size:
            size: int = _GRO_SIZE.unpack_from(data)[0]
            return size
    return 0


def _gets_trains(sock: socket.socket) -> bool:
    """Whether datagrams may come in trains: whoever had the socket before may have asked for it."""
    if sys.platform != "linux":
        return False
    try:
        return sock.getsockopt(socket.IPPROTO_UDP, _UDP_GRO) == 1
    except OSError:
        return False


class DatagramSocket:
    """A UDP socket on the event loop: datagrams come by a call and go at once.

    No transport of asyncio's or uvloop's: those cannot be paused, keep without a bound what the kernel has no room for,
    and hide what Linux tells of single datagrams.

    Where the kernel can, datagrams of one size leave in one call, and a burst comes in few.
    """

    def __init__(
        self,
        sock: socket.socket,
        received: Callable[[list[bytes], Any], None],
        failed: Callable[[OSError], None] | None = None,
        refused: Callable[[list[Refusal]], None] | None = None,
    ) -> None:
        """Take over ``sock``, bound or connected, and read from it.

        ``received`` is handed what came in one go from one address, in its order; an empty datagram is one too.
        ``failed`` is told of errors in the loop's next turn, of one at most. ``refused`` is told which datagrams
        came to a closed port, where the kernel can say so (Linux): an unconnected socket learns it in no other way.
        """
        self._loop = asyncio.get_running_loop()
        sock.setblocking(False)
        self._sock = sock
        self._fd = sock.fileno()  # uvloop counts references of socket objects, and keeps them open by it
        self._received = received
        self._failed = failed
        self._refused = refused if refused is not None and _ask_for_refusals(sock) else None
        try:
            peer = sock.getpeername()
        except OSError:
            peer = None
        self._receive: Callable[[int], tuple[bytes, Any]] = sock.recvfrom
        self._put: Callable[[bytes, Any], object] = sock.sendto
        self._put_together: Callable[[list[bytes], int, Any], object] = self._segmented
        if peer is not None:
            # Address tuples need not be made and read again for each datagram.
            self._receive = lambda size: (sock.recv(size), peer)
            self._put = lambda data, address: sock.send(data)
            self._put_together = lambda parts, size, address: self._segmented(parts, size)
        self._segments = _can_segment(sock)
        self._trains = False  # the kernel may hand over several datagrams in one piece
        self._error: OSError | None = None  # not told yet
        self._shaken = False  # there was an error since the last wake-up
        # Once a wake-up has left something unread: up to when all that came has been read, and since when all that came
        # before a later moment has to be read, of so many bytes at most.
        self._read_until: float | None = None
        self._marked_at = 0.0
        self._read_since = 0
        self._may_wait = sock.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF)
        self.closed = False
        self.reading = False
        self.dropped = 0
        "datagrams that could not be sent: QUIC repeats what was in them"
        self.resume()

    def __repr__(self) -> str:
        state = "closed" if self.closed else "reading" if self.reading else "paused"
        return f"<DatagramSocket {state} dropped={self.dropped}>"

    @property
    def sock(self) -> socket.socket:
        """For options, addresses, and to hand it to another process; reading and writing is done here."""
        return self._sock

    def pause(self) -> None:
        """Leave what comes to the kernel, or to another process that reads from the same socket; sending goes on."""
        if self.reading:
            self.reading = False
            self._loop.remove_reader(self._fd)
        self._read_until = None  # what waits now is another's

    def resume(self) -> None:
        """Read again."""
        if not self.reading and not self.closed:
            self.reading = True
            self._trains = _gets_trains(self._sock)
            self._loop.add_reader(self._fd, self._readable)

    def close(self) -> None:
        """Close the socket; what is sent afterwards is dropped."""
        self.pause()
        self.closed = True
        self._sock.close()

    # Sending

    def send(self, data: bytes, address: Any) -> None:
        """Send at once or never; the address of a connected socket is its peer's.

        What the kernel has no room for is dropped, as a full queue does anywhere on the path: the sender slows down,
        where a queue of ours would only make everything behind it late. So is what is larger than the first hop
        carries, as it would be on any other hop: the link finds out (``path_mtu``).
        """
        try:
            self._put(data, address)
        except OSError as error:
            self._not_sent(error, data, address)

    def send_all(self, datagrams: list[tuple[bytes, Any]]) -> None:
        """Send each datagram to its address, as ``send`` does, in as few calls as the kernel allows."""
        count = len(datagrams)
        start = 0
        while start < count:
            data, address = datagrams[start]
            end = start + 1
            if count - start >= _FEWEST_SEGMENTS and self._segments and data:
                size = len(data)
                most = min(count, start + min(_MOST_SEGMENTS, _MOST_BYTES // size))
                while end < most:
                    following, place = datagrams[end]
                    if len(following) > size or not following or place != address:
                        break
                    end += 1
                    if len(following) < size:
                        break  # a shorter one is the last that fits
            if end - start >= _FEWEST_SEGMENTS:
                self._send_together([each for each, _ in datagrams[start:end]], address)
            else:
                for each, _ in datagrams[start:end]:
                    self.send(each, address)
            start = end

    def _segmented(self, parts: list[bytes], size: int, *address: Any) -> None:
        told = ((socket.IPPROTO_UDP, _UDP_SEGMENT, _SEGMENT_SIZE.pack(size)),)
        self._sock.sendmsg(parts, told, 0, *address)

    def _send_together(self, parts: list[bytes], address: Any) -> None:
        try:
            self._put_together(parts, len(parts[0]), address)
        except OSError as error:
            if self.closed:
                return
            if error.errno in _NO_SEGMENTS:
                self._segments = False
                logger.debug("= {!r} sends datagrams one by one: {!r}", self, error)
            elif error.errno not in _NOT_THESE:
                self._note(error)
            # All of them or none is sent by such a call. One by one each gets its chance, and its own error.
            for data in parts:
                self.send(data, address)

    def _not_sent(self, error: OSError, data: bytes, address: Any) -> None:
        if self.closed:
            return
        if isinstance(error, BlockingIOError) or error.errno in (errno.ENOBUFS, errno.EMSGSIZE):
            self.dropped += 1
            return
        # What ICMP said of an earlier datagram is reported by whatever call comes next, and that datagram, perhaps
        # another link's, is not sent.
        self._note(error)
        for _ in range(_TRIES - 1):
            try:
                self._put(data, address)
            except BlockingIOError:
                break
            except OSError:
                continue
            return
        self.dropped += 1

    # Receiving

    def _readable(self) -> None:
        bursts: list[tuple[list[bytes], Any]] = []
        burst: list[bytes] = []
        source: Any = None
        room = _AT_ONCE
        bytes_room = _BYTES_AT_ONCE
        receive = self._receive
        trains = self._trains
        told: list[tuple[int, int, bytes]] = []
        whole = True
        try:
            while room > 0 and bytes_room > 0:
                try:
                    if trains:
                        data, told, _, address = self._sock.recvmsg(_LARGEST, _TOLD_SIZE)
                    else:
                        data, address = receive(_LARGEST)
                except BlockingIOError:
                    break
                except OSError as error:
                    self._note(error)
                    room -= 1
                    continue
                if address != source or not bursts:
                    burst, source = [], address
                    bursts.append((burst, address))
                bytes_room -= len(data)
                size = _size_in_train(told) if told else 0
                if 0 < size < len(data):
                    burst += [data[start : start + size] for start in range(0, len(data), size)]
                    room -= -(-len(data) // size)
                else:
                    burst.append(data)
                    room -= 1
            if not trains and (room <= 0 or bytes_room <= 0):
                self._ask_for_trains(burst)
            whole = self._has_read_all(room, bursts)
            for burst, address in bursts:
                if self.closed:
                    break
                self._received(burst, address)
        finally:
            if self._shaken or not bursts:
                if whole:
                    self._read_refusals()  # after what has come: whoever sent that and is gone is refused
                self._rearm()
                self._shaken = not whole

    def read_until(self, now: float) -> float:
        """Up to when everything that came has been handed over: ``now`` unless something waits that came before."""
        return now if self._read_until is None else self._read_until

    def _has_read_all(self, room: int, bursts: list[tuple[list[bytes], Any]]) -> bool:
        """Whether all is read that waited some while ago: a queue that never gets empty has an end all the same."""
        if room > 0:
            self._read_until = None
            return True
        now = self._loop.time()
        if self._read_until is None:
            self._read_until = self._marked_at = now
            self._read_since = 0
        self._read_since += sum(len(data) + _ROOM_EACH for burst, _ in bursts for data in burst)
        if self._read_since < self._may_wait:
            return False
        self._read_until, self._marked_at, self._read_since = self._marked_at, now, 0
        return True

    def _ask_for_trains(self, burst: list[bytes]) -> None:
        """Have bursts handed over in one piece, once there are any: a lone datagram costs more to read then."""
        if sys.platform == "linux" and len(burst) >= _BURST and len(set(map(len, burst))) <= _SIZES_OF_TRAIN:
            with suppress(OSError):  # older than Linux 5.0
                self._sock.setsockopt(socket.IPPROTO_UDP, _UDP_GRO, 1)
            self._trains = _gets_trains(self._sock)

    def _read_refusals(self) -> None:
        if self._refused is None or self.closed:
            return
        refusals: list[Refusal] = []
        for _ in range(_REFUSALS_AT_ONCE):
            try:
                quoted, told, _, address = self._sock.recvmsg(QUOTED, 256, socket.MSG_ERRQUEUE)
            except OSError:
                break
            if _is_refusal(told):
                refusals.append(Refusal(quoted, address))
        if refusals:
            self._refused(refusals)

    def _rearm(self) -> None:
        # uvloop stops watching a socket that has an error pending, though it may have been taken by a send since: it is
        # seen here as a wake-up with nothing to read.
        self._shaken = False
        if self.reading:
            self._loop.remove_reader(self._fd)
            self._loop.add_reader(self._fd, self._readable)

    # Errors

    def _note(self, error: OSError) -> None:
        self._shaken = True
        if self._error is None and self._failed is not None:
            self._error = error
            self._loop.call_soon(self._tell)

    def _tell(self) -> None:
        error, self._error = self._error, None
        if error is not None and self._failed is not None and not self.closed:
            self._failed(error)
