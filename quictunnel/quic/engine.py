"""The only file that knows there are two QUIC libraries.

aioquic and its fork qh3 have the same shape (feed a datagram, take events, take datagrams, ask for a timer),
different classes, and a few habits that differ. ``Engine`` is what both are to the rest of this package. Only public
names are used, with exceptions that give their reasons: ``Engine.streams_allowed``, ``aioquic_reins``, ``qh3_reins``.

Only the library that is used is imported, for each takes a fifth of a second and several megabytes.
"""

import ssl
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from typing import Any, Final, Protocol

from quictunnel.quic.tickets import Tickets

__all__ = [
    "ALPN",
    "ENGINES",
    "STREAM_OVER",
    "ClientTrust",
    "Connection",
    "Engine",
    "ServerIdentity",
    "select_engine",
]

ALPN: Final = "quictunnel/1"
ENGINES: Final = ("auto", "aioquic", "qh3")

CONNECTION_ID_LENGTH: Final = 8
IDLE_TIMEOUT: Final = 30.0
"seconds; cloudflared's 5 s are the cause of a family of its drop-outs, so liveness is judged by pings long before"

_TRIES_PER_WORKER: Final = 30
"for an id that is right, before any is taken: all of them are wrong once in 10^13"

# Credit of our own decides (wire/credit.py); these only have to be larger, and bound what a hostile peer may leave
# out of order.
_STREAM_WINDOW: Final = 16 * 1024 * 1024
_CONNECTION_WINDOW: Final = 256 * 1024 * 1024


class Connection(Protocol):
    """What aioquic's and qh3's QuicConnection have in common, and all that is used of them."""

    host_cid: bytes

    @property
    def original_destination_connection_id(self) -> bytes:
        """What a client's very first packet is addressed to: random, and of the client's making."""

    def connect(self, addr: Any, now: float) -> None: ...
    def receive_datagram(self, data: bytes, addr: Any, now: float) -> None: ...

    def may_take_several(self) -> bool:
        """Whether ``receive_many_datagrams`` may be called now; only asked when the handshake is complete."""

    def receive_many_datagrams(self, datagrams: list[bytes], addr: Any, now: float) -> None:
        """Take several, with nothing sent in between: one acknowledgement answers all of them."""

    def next_event(self) -> Any: ...
    def datagrams_to_send(self, now: float) -> list[tuple[bytes, Any]]: ...
    def get_timer(self) -> float | None: ...
    def handle_timer(self, now: float) -> None: ...
    def get_next_available_stream_id(self, is_unidirectional: bool = ...) -> int: ...
    def send_stream_data(self, stream_id: int, data: bytes, end_stream: bool = ...) -> None: ...
    def reset_stream(self, stream_id: int, error_code: int) -> None: ...
    def stop_stream(self, stream_id: int, error_code: int) -> None: ...
    def send_ping(self, uid: int) -> None: ...
    def close(self, error_code: int = ..., frame_type: int | None = ..., reason_phrase: str = ...) -> None: ...

    def get_send_buffer_size(self, stream_id: int | None = ...) -> int:
        """Bytes written to a stream, or to all of them, that have never been sent."""

    # What the reins add

    @property
    def latest_round_trip(self) -> float | None:
        """Seconds, of the last packet of ours that was acknowledged; None before the first."""

    may_grow: bool
    "whether datagrams that had to become smaller may become larger again"

    probed: dict[int, int]
    "the sizes of the probes that were sent, by what PingAcknowledged says of them"

    def expect_datagrams(self, size: int) -> None:
        """Be ready for datagrams of up to ``size`` bytes; said before anything is sent or received."""

    @property
    def datagram_limit(self) -> int:
        """Bytes of the largest datagram that may ever be sent: the peer takes it, and the library can make it."""

    @property
    def datagram_size(self) -> int:
        """Bytes of the largest datagram that is sent, probes left out."""

    def hold_datagram_size(self, size: int) -> None:
        """Send datagrams of up to ``size`` bytes until it is known how large they may be."""

    def use_datagram_size(self, size: int) -> None:
        """Send datagrams of up to ``size`` bytes from now on. ``datagram_limit`` may have fallen after it."""

    def probe_datagram_size(self, size: int) -> None:
        """Send a datagram of ``size`` bytes which nothing is lost with, as soon as that can be."""

    def loses_large(self) -> bool:
        """Whether datagrams larger than 1200 bytes seem not to arrive any more; asked after time-outs and pings."""

    @property
    def losses(self) -> int:
        """Packets of any size that were lost so far, where ``loses_large`` does not look at them."""


# What the libraries raise, each in its own way, for a direction of a stream that is over.
STREAM_OVER: Final = (AssertionError, ValueError, RuntimeError)


@dataclass(frozen=True, slots=True)
class ServerIdentity:
    """What a server shows of itself: paths of PEM files, the chain from the leaf up."""

    certificate: str
    key: str


@dataclass(frozen=True, slots=True)
class ClientTrust:
    """Whom a client believes: a CA's certificate in PEM, or with ``None`` the system's CAs; and the name it expects.

    ``verify`` is False on one occasion only: to fetch a CA's certificate that a pin then proves, with no secret sent.
    """

    server_name: str
    authority: bytes | None = None
    verify: bool = True


@dataclass(frozen=True)
class Engine:
    """One QUIC library."""

    name: str
    needs_retry: bool
    "whether the server side completes a handshake only with a client whose address is validated"

    address_changes: int | None
    "how often a peer's address may change before the server side takes no more of it; None: always"

    sends_before_events: bool
    "whether what may be sent has to be taken after each datagram, before the events of what came"

    burst: int
    """how many streams may have something to write before all is sent. Waiting for more in a long turn keeps the other
    end idle until all are there, and both take turns instead of working side by side; sending sooner builds more
    packets, which is what costs aioquic most. Measured: docs/performance.md"""

    connection: Callable[..., Connection]
    configuration: Callable[..., Any]
    connection_error: type[Exception]
    "what a connection that its peer has closed raises"

    congestion_control: str | None
    "the name of an algorithm, where the library has a choice"

    events: Any
    "the module of event classes: StreamDataReceived, StreamReset, StopSendingReceived, PingAcknowledged, …"

    packets: Any
    "the module with encode_quic_retry"

    def server_configuration(self, identity: ServerIdentity, datagram_size: int) -> Any:
        """What every connection of a listener shares. Raises OSError and ValueError for files that cannot be used."""
        configuration = self._configuration(is_client=False, max_datagram_size=datagram_size)
        try:
            configuration.load_cert_chain(identity.certificate, identity.key)
        except IndexError:
            raise ValueError(f"there is no certificate in {identity.certificate}") from None  # qh3's way to say so
        return configuration

    def accept(
        self, configuration: Any, original_cid: bytes, retry_cid: bytes | None, tickets: Tickets | None = None
    ) -> Connection:
        """The server side of a new connection, which may resume what one of ``tickets`` stands for."""
        return self.connection(
            configuration=configuration,
            original_destination_connection_id=original_cid,
            retry_source_connection_id=retry_cid,
            session_ticket_fetcher=None if tickets is None else tickets.find,
            session_ticket_handler=None if tickets is None else tickets.issued,
        )

    def dial(
        self,
        trust: ClientTrust,
        datagram_size: int,
        worker: tuple[int, int] | None = None,
        *,
        ticket: Any = None,
        on_ticket: Callable[[Any], None] | None = None,
    ) -> Connection:
        """The client side of a new connection, not yet connected.

        With ``worker`` its first packet is for that one of so many processes of the server, which share a port and
        have it steered by the remainder of the first byte that it is addressed to.
        ``ticket`` is one of an earlier connection to resume, ``on_ticket`` takes those that the server gives.
        """
        configuration = self._configuration(
            is_client=True,
            max_datagram_size=datagram_size,
            server_name=trust.server_name,
            verify_mode=ssl.CERT_REQUIRED if trust.verify else ssl.CERT_NONE,
            session_ticket=ticket,
        )
        if trust.authority is not None:
            configuration.load_verify_locations(cadata=trust.authority)
        else:
            configuration.load_verify_locations(cafile=ssl.get_default_verify_paths().cafile or _public_authorities())
        connection = self.connection(configuration=configuration, session_ticket_handler=on_ticket)
        if worker is not None:
            number, workers = worker
            # The id is the library's to choose, and cheap: 4 us with qh3, 80 with aioquic, where a handshake takes
            # milliseconds. So it is asked again, as often as there are processes in the mean.
            for _ in range(_TRIES_PER_WORKER * workers):
                if connection.original_destination_connection_id[0] % workers == number:
                    break
                connection = self.connection(configuration=configuration, session_ticket_handler=on_ticket)
        return connection

    def streams_allowed(self, connection: Connection) -> int:
        """How many streams of ours the peer allows, counted from the connection's beginning.

        qh3 breaks when asked for more. aioquic queues what is too much, and then sends RESET_STREAM and STOP_SENDING
        for a queued stream that is given up, which makes its peer end the connection; what it knows of the limit is
        behind the one private name that this package uses. tests/quic watches over it.
        """
        name = "max_concurrent_bidi_streams" if self.name == "qh3" else "_remote_max_streams_bidi"
        allowed: int = getattr(connection, name)
        return allowed

    def path_changed(self, connection: Connection) -> None:
        """``connection``, a client's, goes on from another address: qh3 finds its feet by itself."""
        if self.name == "aioquic":
            connection.path_changed()  # type: ignore[attr-defined]

    def _configuration(self, **options: Any) -> Any:
        if self.congestion_control is not None:
            options["congestion_control_algorithm"] = self.congestion_control
        return self.configuration(
            alpn_protocols=[ALPN],
            supported_versions=[1],
            idle_timeout=IDLE_TIMEOUT,
            max_data=_CONNECTION_WINDOW,
            max_stream_data=_STREAM_WINDOW,
            connection_id_length=CONNECTION_ID_LENGTH,
            **options,
        )


def _public_authorities() -> str:
    import certifi

    return certifi.where()


def select_engine(name: str) -> Engine:
    """The engine of that name; ``auto`` is qh3 where it is installed. Raises ValueError for one that is not there."""
    if name == "auto":
        name = "qh3" if find_spec("qh3") else "aioquic"
    if name not in ENGINES:
        raise ValueError(f"there is no QUIC engine {name!r}: choose one of {', '.join(ENGINES)}")
    if find_spec(name) is None:
        raise ValueError(
            f"the QUIC engine {name} is not installed: pip install 'quictunnel[fast]', or use --engine aioquic"
        )
    connection = import_module(f"{name}.quic.connection")
    reins = import_module(f"quictunnel.quic.{name}_reins")
    return Engine(
        name=name,
        # qh3 2.1 counts what it received from an unvalidated address too low, and fails in its first flight to a
        # client whose first flight is one datagram, as aioquic's is. After a Retry the address is validated.
        # tests/quic shows it.
        needs_retry=name == "qh3",
        burst=8 if name == "qh3" else 64,
        # qh3 2.1 forgets a stream with the acknowledgement that ends it, and breaks with "reserved stream is missing"
        # when a needless repetition of the stream's bytes still waits then. So nothing is left waiting from one
        # datagram to the next but what the congestion window holds back, and that is what still breaks it: at 8 % loss
        # and 60 transfers at once 7 of 120 links broke without this and 1 of 120 with it; at 500 requests at once
        # right after a start 2 of 10 and 0 of 17. To send before each datagram as well helps no further, and a link
        # that has failed so sends no more when it is asked again. Not within handshakes, whose flights it would tear
        # into single packets.
        # qh3 2.1 drops what comes from a fifth address. tests/quic shows it.
        address_changes=3 if name == "qh3" else None,
        sends_before_events=name == "qh3",
        connection=reins.ReinedConnection,
        congestion_control=reins.CONGESTION_CONTROL,
        connection_error=connection.QuicConnectionError,
        configuration=import_module(f"{name}.quic.configuration").QuicConfiguration,
        events=import_module(f"{name}.quic.events"),
        packets=import_module(f"{name}.quic.packet"),
    )
