"""A client's way to its server: a UDP socket and the link on it, and another socket when the first leads nowhere."""

import asyncio
import errno
import socket
from collections.abc import Callable
from functools import partial
from typing import Any, Final, NamedTuple

from loguru import logger

from quictunnel.quic.attention import Attention
from quictunnel.quic.engine import ClientTrust, Engine
from quictunnel.quic.link import Link, LinkClosed, LinkOwner
from quictunnel.quic.path_mtu import BASE, forbid_fragments, route_limit
from quictunnel.quic.sockets import DatagramSocket, enlarge_buffers
from quictunnel.quic.tickets import Tickets
from quictunnel.wire.credit import WindowBudget
from quictunnel.wire.errors import ErrorCode
from quictunnel.wire.names import host_and_port

__all__ = ["DialError", "Endpoint", "Way", "dial", "resolve"]

ADDRESSES: Final = 4
"of one host, at most, that are tried"

OLD_SOCKETS: Final = 3
"of a way that are open beside its present one: as many as the other addresses that qh3's server follows a client to"

OLD_SOCKET_TIME: Final = 4.0
"""seconds that they stay open once something has come by the present one: some round trips, and a repetition or two of
what was sent there"""

# TLS alerts as QUIC errors (RFC 9001 section 4.8, RFC 8446 section 6.2).
_CRYPTO_ERROR: Final = 0x100
_CERTIFICATE_ALERTS: Final = {42, 43, 44, 45, 46, 48, 49}

# What a socket says when this machine's own addresses or routes have changed under it: what was sent has not left.
_NO_ROUTE: Final = {
    errno.ENETUNREACH,
    errno.EHOSTUNREACH,
    errno.ENETDOWN,
    errno.EADDRNOTAVAIL,
    errno.EINVAL,
    errno.ENODEV,
}


class DialError(Exception):
    """The server could not be reached, or is not the one that is trusted: then ``untrusted`` is True."""

    def __init__(self, text: str, *, untrusted: bool = False) -> None:
        self.untrusted = untrusted
        super().__init__(text)


class Endpoint(NamedTuple):
    """One address of a server."""

    family: int
    address: Any

    def __str__(self) -> str:
        return host_and_port(*self.address[:2])


async def resolve(host: str, port: int, timeout: float) -> list[Endpoint]:
    """The addresses of a server, one at least. Raises DialError."""
    loop = asyncio.get_running_loop()
    try:
        async with asyncio.timeout(timeout):
            infos = await loop.getaddrinfo(host, port, type=socket.SOCK_DGRAM)
    except TimeoutError:
        raise DialError(f"resolving {host} took longer than {timeout:g} s") from None
    except OSError as error:
        raise DialError(f"cannot resolve {host}: {error.strerror or error}") from None
    if not infos:
        raise DialError(f"{host} has no address")
    return [Endpoint(family, address) for family, _, _, _, address in infos[:ADDRESSES]]


class Way:
    """A link and the UDP socket that it goes over.

    A connected socket is bound to one address of this machine and one route, and a NAT on the way to one mapping of it.
    When any of them goes, ``move`` opens another: the link goes on over it with all its streams, because a QUIC
    connection is told by its connection ids and not by where its packets come from (RFC 9000 section 9). The id that
    packets are sent to stays the same: it is what a server of several processes steers them by.

    The sockets before it stay open for a while, for a server that was only held up: it reads what was sent from each
    of them in turn, and answers there. Were one closed, ICMP would tell the server that nobody listens; and qh3's
    server falls silent for good when an address that it asks for a sign of life (PATH_CHALLENGE, RFC 9000 section 8.2)
    gives none.
    """

    def __init__(self, endpoint: Endpoint) -> None:
        self.endpoint = endpoint
        self.link: Link  # whoever makes the way sets it at once
        self.heard = False
        "whether anything at all has come from there"

        self.on_trouble: Callable[[], None] = lambda: None
        "called when what was sent cannot have left this machine"

        self._socket: DatagramSocket | None = None
        self._whole = False  # datagrams leave in one piece or not at all
        self._old: list[DatagramSocket] = []  # the newest last
        self._closer: asyncio.TimerHandle | None = None  # of those

    @property
    def sockets(self) -> int:
        """How many are open."""
        return (self._socket is not None) + len(self._old)

    def open(self) -> None:
        """Open a socket to the endpoint. Raises DialError."""
        sock = socket.socket(self.endpoint.family, socket.SOCK_DGRAM)
        try:
            enlarge_buffers(sock)
            self._whole = forbid_fragments(sock)
            sock.connect(self.endpoint.address)
        except OSError as error:
            sock.close()
            raise DialError(f"cannot send there: {error.strerror or error}") from None
        opened = DatagramSocket(
            sock, lambda datagrams, _: self._received(datagrams, opened), lambda error: self._failed(error, opened)
        )
        if self._socket is not None:
            self._old.append(self._socket)
        self._socket = opened
        self._keep(OLD_SOCKETS)

    def move(self) -> None:
        """Go on over another socket. Raises DialError, and goes on over the old one."""
        if self.link.terminated:
            return
        self.open()
        logger.debug("= {!r} goes on over another socket to {}", self.link, self.endpoint)
        self.link.path_changed()

    def _received(self, datagrams: list[bytes], by: DatagramSocket) -> None:
        self.heard = True
        if self._old and by is self._socket and self._closer is None:
            self._closer = asyncio.get_running_loop().call_later(OLD_SOCKET_TIME, self._keep, 0)
        self.link.datagrams_received(datagrams, self.endpoint.address)

    def _failed(self, error: OSError, by: DatagramSocket) -> None:
        logger.debug("= QUIC socket to {}: {!r}", self.endpoint, error)
        if by is not self._socket:
            return
        if isinstance(error, ConnectionRefusedError):
            # ICMP says that nobody listens there: a hint that comes long before any time-out. It may be forged, so it
            # only makes suspect.
            self.link.refused = True
            self.link.owner.link_refused(self.link)
        elif error.errno in _NO_ROUTE:
            self.on_trouble()

    def datagram_limit(self, address: Any) -> int:
        """Bytes of the largest datagram that can leave by the present socket."""
        return route_limit(self._socket.sock) if self._whole and self._socket is not None else BASE

    def send_all(self, datagrams: list[tuple[bytes, Any]]) -> None:
        if self._socket is not None:
            self._socket.send_all(datagrams)

    def terminated(self, link: Link) -> None:
        self._keep(0)
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    def _keep(self, count: int) -> None:
        """Close all old sockets but so many."""
        if self._closer is not None:
            self._closer.cancel()
            self._closer = None
        while len(self._old) > count:
            self._old.pop(0).close()

    def drop(self) -> None:
        """Say goodbye, and be done with the link without waiting for an answer."""
        self.link.close(ErrorCode.NO_ERROR, "")
        self.link.abandon(LinkClosed(0, ""))


class _Waiter(LinkOwner):
    """Owns a link until its handshake is done."""

    def __init__(self, future: asyncio.Future[None]) -> None:
        self.future = future

    def link_ready(self, link: Link) -> None:
        if not self.future.done():
            self.future.set_result(None)

    def link_refused(self, link: Link) -> None:
        self.fail(DialError("nobody listens there (UDP)"))

    def link_closed(self, link: Link, why: LinkClosed) -> None:
        self.fail(why)

    def fail(self, error: Exception) -> None:
        if not self.future.done():
            self.future.set_exception(error)


async def dial(
    engine: Engine,
    endpoint: Endpoint,
    trust: ClientTrust,
    owner: LinkOwner,
    budget: WindowBudget,
    *,
    timeout: float,
    worker: tuple[int, int] | None = None,
    tickets: Tickets | None = None,
    attention: Attention | None = None,
    on_way: Callable[[Way], None] = lambda way: None,
) -> Way:
    """Open a link to a server's address and verify it, within ``timeout`` seconds. Raises DialError.

    ``worker`` is which of how many processes of the server is meant, None for any; ``tickets`` make further handshakes
    with it cheap; ``attention`` is the link's. ``on_way`` is called with the way as soon as it is begun on.
    """
    loop = asyncio.get_running_loop()
    way = Way(endpoint)
    done: asyncio.Future[None] = loop.create_future()
    waiter = _Waiter(done)
    if tickets is None or not trust.verify:
        connection = engine.dial(trust, BASE, worker)
    else:
        # Good only where it was given, and never under another trust than the one that it was got under.
        key = (endpoint, worker, trust)
        keep = partial(tickets.keep, key)
        connection = engine.dial(trust, BASE, worker, ticket=tickets.find(key), on_ticket=keep)
    try:
        way.open()
    except DialError as error:
        raise DialError(f"{endpoint}: {error}") from None
    link = way.link = Link(
        engine,
        connection,
        way.send_all,
        waiter,
        budget,
        is_client=True,
        datagram_limit=way.datagram_limit,
        attention=attention,
    )
    link.on_terminated = way.terminated
    way.on_trouble = lambda: waiter.fail(DialError("there is no route to it"))
    try:
        on_way(way)
        link.connect(endpoint.address)
        async with asyncio.timeout(timeout):
            await done
        link.owner = owner
        way.on_trouble = lambda: None
        return way
    except TimeoutError:
        raise DialError(f"{endpoint}: no answer within {timeout:.1f} s (is UDP let through?)") from None
    except DialError as error:
        raise DialError(f"{endpoint}: {error}") from None
    except LinkClosed as why:
        alert = why.code - _CRYPTO_ERROR
        raise DialError(f"{endpoint}: {_explain(why)}", untrusted=alert in _CERTIFICATE_ALERTS) from None
    finally:
        if link.owner is not owner:
            if not done.cancel() and not done.cancelled():
                done.exception()  # it failed while something else ended the attempt
            way.drop()


def _explain(why: LinkClosed) -> str:
    if _CRYPTO_ERROR <= why.code < 2 * _CRYPTO_ERROR:
        return f"TLS failed: {why.reason or f'alert {why.code - _CRYPTO_ERROR}'}"
    return str(why)
