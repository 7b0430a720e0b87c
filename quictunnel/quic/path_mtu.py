"""How large a path's datagrams may be, found by probing (RFC 8899, RFC 9000 section 14.3).

Theory of operation. A link begins with ``BASE``, which every path that carries QUIC carries. What the route's first
hop carries is known to the kernel and is the upper bound; the loopback's is the whole truth. The largest size of
interest is probed by itself, and if it is not acknowledged, all others in one flight: there are few sizes that paths
have, so that one round trip finds the size where a search would take one for each step. What is acknowledged counts at
once. A probe carries nothing that would be missed, and its loss is no sign of congestion.

A path that carries less than it did (a black hole: nothing says so) shows itself as large packets that are lost while
small ones arrive, or as time-outs in a row. Then ``BASE`` counts again, and the search begins anew some time after, the
later the more often that has happened. ``PathMtu`` is the search, without a clock, a socket or a library.
"""

import socket
import sys
from contextlib import suppress
from typing import Any, Final

__all__ = ["BASE", "LARGEST", "PROBE_UIDS", "PathMtu", "forbid_fragments", "route_limit", "route_limit_to"]

BASE: Final = 1200
"bytes of UDP payload (RFC 9000 section 14)"

LARGEST: Final = 16_000
"bytes of UDP payload; aioquic writes the length of a STREAM frame in 14 bits, and larger ones gain nothing"

PROBE_UIDS: Final = 1 << 32
"from which the pings of probes are numbered, apart from those that ask for the round trip"

# What paths carry: jumbo frames; Ethernet under IPv4, under IPv6 or PPPoE, in tunnels and overlays; IPv6's least.
_LADDER: Final = (8_952, 4_052, 1_472, 1_452, 1_400, 1_352, 1_232)

_ROUNDS: Final = 3
"flights of probes before what is not acknowledged counts as too large: one alone may be lost by chance"

_SEARCH_AGAIN: Final = 600.0
"seconds until sizes that were too large are tried again (RFC 8899 section 5.1.1, PMTU_RAISE_TIMER)"

_AFTER_FALL: Final = 10.0
"seconds after a fall until the search begins again, doubled with each further one up to _SEARCH_AGAIN"

_HEADERS: Final = {socket.AF_INET: 20 + 8, socket.AF_INET6: 40 + 8}
"bytes before UDP's payload"

# <linux/in.h> and <linux/in6.h>; the socket module names them not before Python 3.14.
_IP_MTU_DISCOVER, _IP_MTU, _IP_PMTUDISC_PROBE = 10, 14, 3
_IPV6_MTU_DISCOVER, _IPV6_MTU, _IPV6_PMTUDISC_PROBE = 23, 24, 3


class PathMtu:
    """The search for the largest size that one path carries."""

    def __init__(self) -> None:
        self.size = BASE
        "bytes that were seen to arrive"

        self.due: float | None = None
        "when ``probes`` is to be asked, in seconds of the caller's clock; None: there is nothing to find"

        self._sizes: list[int] = []
        self._round = 0
        self._falls = 0

    def begin(self, limit: int, now: float) -> None:
        """Search on a path that is new, whose first hop carries ``limit`` bytes at most."""
        self._search(limit, now)
        self._falls = 0

    def _search(self, limit: int, at: float) -> None:
        limit = min(limit, LARGEST)
        self.size = BASE
        self._sizes = [limit, *(size for size in _LADDER if size < limit)] if limit > BASE else []
        self._round = 0
        self.due = at if self._sizes else None

    def probes(self, now: float, wait: float) -> list[int]:
        """The sizes to probe now; what isn't acknowledged within ``wait`` seconds counts as lost."""
        larger = [size for size in self._sizes if size > self.size]
        if not larger:
            self.due = None
            return []
        if self._round >= _ROUNDS:
            self._round = 0
            self.due = now + _SEARCH_AGAIN
            return []
        self._round += 1
        self.due = now + wait
        return larger[:1] if self._round == 1 else larger

    def acknowledged(self, size: int) -> bool:
        """A probe of ``size`` bytes has arrived; whether that is larger than any before."""
        if size <= self.size or size not in self._sizes:
            return False
        self.size = size
        if size == self._sizes[0]:
            self.due = None
        return True

    def fell(self, limit: int, now: float) -> None:
        """What is larger than ``BASE`` does not arrive any more; up to ``limit`` is tried again some time later."""
        self._search(limit, now + min(_AFTER_FALL * 2**self._falls, _SEARCH_AGAIN))
        self._falls = min(self._falls + 1, 10)


def forbid_fragments(sock: socket.socket) -> bool:
    """Have the kernel neither fragment what ``sock`` sends nor judge by ICMP how large that may be; whether it will.

    Where it will not, a probe that arrives proves nothing.
    """
    if sys.platform != "linux":
        return False
    try:
        if sock.family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, _IPV6_MTU_DISCOVER, _IPV6_PMTUDISC_PROBE)
        sock.setsockopt(socket.IPPROTO_IP, _IP_MTU_DISCOVER, _IP_PMTUDISC_PROBE)
    except OSError:
        return False
    return True


def route_limit(sock: socket.socket) -> int:
    """Bytes of UDP payload that the first hop of a connected socket's route carries; ``BASE`` where nobody knows."""
    if sys.platform != "linux":
        return BASE
    level, option = (socket.IPPROTO_IPV6, _IPV6_MTU) if sock.family == socket.AF_INET6 else (socket.IPPROTO_IP, _IP_MTU)
    with suppress(OSError):
        return max(sock.getsockopt(level, option) - _HEADERS[sock.family], BASE)
    return BASE


def route_limit_to(address: Any) -> int:
    """The same for the route to an address, which a socket is made for: some 20 us."""
    family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
    with suppress(OSError), socket.socket(family, socket.SOCK_DGRAM) as sock:
        sock.connect(address)
        return route_limit(sock)
    return BASE
