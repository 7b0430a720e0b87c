"""The server's UDP socket: packets to their links, links for new clients, an address check when many knock at once."""

import asyncio
import socket
from typing import Any, Final

from loguru import logger

from quictunnel.quic.attention import Attention
from quictunnel.quic.engine import CONNECTION_ID_LENGTH, Connection, Engine, ServerIdentity
from quictunnel.quic.first_packets import (
    InitialHeader,
    RetryTokens,
    parse_long_header,
    retry_packet,
    version_negotiation_packet,
)
from quictunnel.quic.link import Link, LinkClosed, LinkOwner
from quictunnel.quic.path_mtu import BASE, forbid_fragments, route_limit_to
from quictunnel.quic.sockets import DatagramSocket, Refusal, enlarge_buffers
from quictunnel.quic.steering import Steering
from quictunnel.quic.succession import Predecessor, Successor
from quictunnel.quic.tickets import Tickets
from quictunnel.wire.credit import WindowBudget
from quictunnel.wire.errors import ErrorCode

__all__ = ["RETRY_MODES", "LinkListener"]

RETRY_MODES: Final = ("auto", "always", "never")

# With ``auto``, so many handshakes may be under way before a client has to prove its address first: facts of
# aioquic's door are 88 kB of memory and three times the bytes back for each unproved one.
_HALF_OPEN_BEFORE_RETRY: Final = 64

# Whatever the mode, so many at most: some 100 MB. A flood from addresses that are not proved, or from a host that
# proves its own again and again, makes the oldest go first: a client that is quick still gets in.
_HALF_OPEN_LIMIT: Final = 1024

_ALONE: Final = Steering()

_LONG_HEADER: Final = b"\x80"
"the first byte of packets with one, or less than it (RFC 9000 section 17.2)"

_SMALLEST_INITIAL: Final = 1200
"bytes (RFC 9000 section 14.1)"

HANDSHAKE_TIME: Final = 10.0
"seconds that a handshake and the hello after it may take"


_QUIET_TIME: Final = 2.5
"seconds of silence after which a link is asked for a sign of life: a client's pings come more often"

_REFUSED_TIME: Final = 1.0
"seconds for which a client's port is said to be closed before its link is given up"


class LinkListener:
    """Accepts links on one UDP socket."""

    def __init__(
        self,
        engine: Engine,
        identity: ServerIdentity,
        owner: LinkOwner,
        budget: WindowBudget,
        *,
        retry: str = "auto",
        steering: Steering = _ALONE,
    ) -> None:
        """``steering`` says which connection ids lead here, if there are other processes at the same port.

        Raises OSError and ValueError for an identity that cannot be used."""
        if retry not in RETRY_MODES:
            raise ValueError(f"there is no retry mode {retry!r}: choose one of {', '.join(RETRY_MODES)}")
        self.engine = engine
        self.owner = owner
        self.budget = budget
        self.retry = retry
        self._steering = steering
        self._tokens = RetryTokens()
        self._tickets = Tickets()
        self._configuration = engine.server_configuration(identity, BASE)
        self._loop = asyncio.get_running_loop()
        self._socket: DatagramSocket | None = None
        self._whole = False  # datagrams leave in one piece or not at all
        self._links: dict[bytes, Link] = {}  # by each connection id
        self._ids: dict[Link, set[bytes]] = {}
        self._at: dict[Any, dict[Link, None]] = {}  # by where the client's last datagram came from
        self._half_open: dict[Link, float] = {}  # since when
        self._sweeper: asyncio.TimerHandle | None = None
        self._attention = Attention()
        self.predecessor: Predecessor | None = None  # whose links' datagrams come here
        self.successor: Successor | None = None

    async def start(
        self, host: str, port: int, *, reuse_port: bool = False, sock: socket.socket | None = None
    ) -> tuple[str, int]:
        """Bind, or take over ``sock``, which is bound already; returns the address bound. Raises OSError."""
        if sock is None:
            sock = await self._bind(host, port, reuse_port)
        enlarge_buffers(sock)
        self._whole = forbid_fragments(sock)
        self._socket = self._attention.socket = DatagramSocket(
            sock, self.datagrams_received, self._failed, self._refused
        )
        self._attention.start()
        self._sweep()
        bound = sock.getsockname()
        return bound[0], bound[1]

    async def _bind(self, host: str, port: int, reuse_port: bool) -> socket.socket:
        found = await self._loop.getaddrinfo(host, port, type=socket.SOCK_DGRAM, flags=socket.AI_PASSIVE)
        family, _, _, _, address = found[0]
        sock = socket.socket(family, socket.SOCK_DGRAM)
        try:
            if reuse_port:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            sock.bind(address)
        except BaseException:
            sock.close()
            raise
        return sock

    # Another process takes over the socket

    def let_go(self, sock: socket.socket) -> list[bytes]:
        """Leave the socket to another process, and go on with the links there are by what that passes on.

        ``sock`` is this end of the channel for that. The connection ids of handshakes that are under way.
        """
        assert self._socket is not None
        self._socket.pause()
        self.successor = Successor(sock, self.datagram_received)
        return [cid for link in self._half_open for cid in self._ids.get(link, ())]

    def take_back(self) -> None:
        """The other process is not going to: read the socket again."""
        if self.successor is not None:
            self.successor.close()
            self.successor = None
        if self._socket is not None:
            self._socket.resume()

    # What others ask

    @property
    def socket(self) -> DatagramSocket | None:
        """Where datagrams come and go; None before the start."""
        return self._socket

    @property
    def links(self) -> list[Link]:
        """Every link there is, whatever its state."""
        return list(self._ids)

    def replace_identity(self, identity: ServerIdentity) -> None:
        """Show another certificate to new links. Raises OSError and ValueError, and then changes nothing."""
        self._configuration = self.engine.server_configuration(identity, BASE)
        self._tickets.clear()  # what is to be shown now is to be checked by everyone

    def close(self) -> None:
        """Close every link and the socket. A QUIC peer that misses the goodbye learns from its pings."""
        for link in self.links:
            link.close(ErrorCode.NO_ERROR, "the server stops")
        if self._sweeper is not None:
            self._sweeper.cancel()
            self._sweeper = None
        self._attention.close()
        if self._socket is not None:
            self._socket.close()
        if self.successor is not None:
            self.successor.close()
        if self.predecessor is not None:
            self.predecessor.close()
        for link in self.links:
            link.abandon(link.closed)  # type: ignore[arg-type]

    # What the socket tells

    def _failed(self, error: OSError) -> None:
        logger.debug("= QUIC socket: {!r}", error)

    def _refused(self, refusals: list[Refusal]) -> None:
        """Clients' hosts say that nobody listens there any more; a link believes what is proved to be its own."""
        for quoted, address in refusals:
            for link in self._at.get(address[:2], ()):
                if (number := link.number_of(quoted)) is not None:
                    link.unreachable(number)
                    break

    def datagrams_received(self, datagrams: list[bytes], address: Any) -> None:
        """Take what came in one go from one address: what is for one link is handed to it together."""
        links = self._links
        of_links: dict[Link, list[bytes]] = {}
        for data in datagrams:
            link = None if data[:1] >= _LONG_HEADER else links.get(data[1 : 1 + CONNECTION_ID_LENGTH])
            if link is None:
                self.datagram_received(data, address)
            elif link in of_links:
                of_links[link].append(data)
            else:
                of_links[link] = [data]
        for link, its_own in of_links.items():
            link.datagrams_received(its_own, address)

    def datagram_received(self, data: bytes, address: Any) -> None:
        """Take a datagram from anyone."""
        if not data:
            return
        if data[0] & 0x80:
            self._long_header(data, address)
            return
        # A short header is its connection id's place (RFC 9000 section 17.3.1); this is every packet but the first few.
        link = self._links.get(data[1 : 1 + CONNECTION_ID_LENGTH])
        if link is not None:
            link.datagram_received(data, address)
        elif self.predecessor is not None:
            self.predecessor.pass_on(data, address)

    # A client's first packets

    def _long_header(self, data: bytes, address: Any) -> None:
        header = parse_long_header(data)
        if header is None:
            return
        link = self._links.get(header.destination_cid)
        if link is not None:
            link.datagram_received(data, address)
            return
        if header.version != 1:
            # A Version Negotiation packet is never answered, or two servers could be set upon each other; and only a
            # datagram that could have begun a connection is (RFC 9000 section 6.1).
            if not header.is_version_negotiation and len(data) >= _SMALLEST_INITIAL:
                self._send(version_negotiation_packet(header), address)
            return
        before = self.predecessor
        if before is not None and (not header.is_initial or header.destination_cid in before.handshakes):
            before.pass_on(data, address)
            return
        if header.is_initial and len(data) >= _SMALLEST_INITIAL and len(header.destination_cid) >= 8:
            self._first_initial(data, header, address)

    def _first_initial(self, data: bytes, header: InitialHeader, address: Any) -> None:
        assert self._socket is not None
        now = self._loop.time()
        original_cid, retry_cid = header.destination_cid, None
        if not header.token and self._must_prove_address():
            new_cid = self._steering.new_id()
            token = self._tokens.create(address, header, new_cid, now)
            self._send(retry_packet(self.engine, header, new_cid, token), address)
            return
        if header.token:
            try:
                original_cid = self._tokens.original_cid(address, header, now)
            except ValueError:
                # The process before this one may have asked for it. It will send the client here, at the hello.
                if self.predecessor is not None:
                    self.predecessor.pass_on(data, address)
                return
            retry_cid = header.destination_cid
        if len(self._half_open) >= _HALF_OPEN_LIMIT:
            self._drop(next(iter(self._half_open)), "too many handshakes are under way")
        link = Link(
            self.engine,
            self._accept(original_cid, retry_cid),
            self._socket.send_all,
            self.owner,
            self.budget,
            is_client=False,
            datagram_limit=self._datagram_limit,
            attention=self._attention,
        )
        link.on_connection_id = self._connection_id
        link.on_address = self._address
        link.on_terminated = self._terminated
        self._half_open[link] = now
        self._ids[link] = set()
        self._connection_id(link, header.destination_cid, True)
        self._connection_id(link, link.connection_id, True)
        link.datagram_received(data, address)

    def _datagram_limit(self, address: Any) -> int:
        """Bytes of the largest datagram that can leave for a client."""
        return route_limit_to(address) if self._whole else BASE

    def _accept(self, original_cid: bytes, retry_cid: bytes | None) -> Connection:
        """The server's side of a connection whose id leads here."""
        while True:
            # The libraries draw the id themselves: as often as there are workers on average, 80 us each time with
            # aioquic and 5 with qh3, beside some milliseconds for the handshake.
            connection = self.engine.accept(self._configuration, original_cid, retry_cid, self._tickets)
            if self._steering.fits(connection.host_cid):
                return connection

    def _must_prove_address(self) -> bool:
        if self.retry == "always" or self.engine.needs_retry:
            return True
        return self.retry == "auto" and len(self._half_open) >= _HALF_OPEN_BEFORE_RETRY

    def _connection_id(self, link: Link, cid: bytes, issued: bool) -> None:
        ids = self._ids.get(link)
        if ids is None:
            return
        if issued:
            ids.add(cid)
            self._links[cid] = link
        else:
            ids.discard(cid)
            self._links.pop(cid, None)

    def _address(self, link: Link, before: Any) -> None:
        self._leave(link, before)
        self._at.setdefault(link.address[:2], {})[link] = None

    def _leave(self, link: Link, address: Any) -> None:
        if address is not None and (there := self._at.get(address[:2])) is not None:
            there.pop(link, None)
            if not there:
                del self._at[address[:2]]

    def accepted(self, link: Link) -> None:
        """The link's client has proved itself: its handshake is no longer on the clock."""
        self._half_open.pop(link, None)

    def _terminated(self, link: Link) -> None:
        self._half_open.pop(link, None)
        self._leave(link, link.address)
        for cid in self._ids.pop(link, ()):
            self._links.pop(cid, None)

    def _sweep(self) -> None:
        self._sweeper = self._loop.call_later(1.0, self._sweep)
        for link in self.links:
            link.end_stalled()
            if link.refused:
                self._end_refused(link)
            elif link.silent_for() > _QUIET_TIME:
                link.ping()  # a client that was killed is found out by what is sent to it
        late = self._loop.time() - HANDSHAKE_TIME
        for link, since in list(self._half_open.items()):
            if since > late:
                break
            self._drop(link, "no hello came in time")

    def _end_refused(self, link: Link) -> None:
        if link.refused_for() >= _REFUSED_TIME:
            link.abandon(LinkClosed(ErrorCode.CONNECTION_TERMINATED, "nobody listens at the client's port any more"))
        else:
            link.ping()  # is it still so?

    def _drop(self, link: Link, why: str) -> None:
        """Give up a link that has not proved itself."""
        if link.ready:
            link.close(ErrorCode.REQUEST_TIMEOUT, why)
        # In silence where the address isn't proved: a goodbye could be more than may be sent there (RFC 9000 section
        # 8.1). And at once: what is left of a connection that says goodbye is as large as a live one.
        link.abandon(LinkClosed(ErrorCode.REQUEST_TIMEOUT, why))
        self._half_open.pop(link, None)

    def _send(self, data: bytes, address: Any) -> None:
        if self._socket is not None:
            self._socket.send(data, address)
