"""The only file that knows there are two QUIC libraries.

aioquic and its fork qh3 have the same shape (feed a datagram, take events, take datagrams, ask for a timer),
different classes, and a few habits that differ. ``Engine`` is what both are to the rest of this package. Only public
names are used, with two exceptions that give their reasons: ``Engine.streams_allowed`` and ``_Aioquic``.
"""

import ssl
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from typing import Any, Final, Protocol

import certifi
from aioquic.buffer import Buffer  # type: ignore[attr-defined]  # it re-exports it without saying so
from aioquic.quic.connection import QuicConnection, QuicConnectionError
from aioquic.quic.packet import (
    QuicErrorCode,
    QuicPacketType,
    encode_quic_retry,
    encode_quic_version_negotiation,
    pull_quic_header,
)
from aioquic.quic.retry import QuicRetryTokenHandler

__all__ = [
    "ALPN",
    "ENGINES",
    "STREAM_OVER",
    "ClientTrust",
    "Connection",
    "Engine",
    "InitialHeader",
    "RetryTokens",
    "ServerIdentity",
    "parse_long_header",
    "retry_packet",
    "select_engine",
    "version_negotiation_packet",
]

ALPN: Final = "quictunnel/1"
ENGINES: Final = ("auto", "aioquic", "qh3")

CONNECTION_ID_LENGTH: Final = 8
IDLE_TIMEOUT: Final = 30.0
"seconds; cloudflared's 5 s are the cause of a family of its drop-outs, so liveness is judged by pings long before"

# Credit of our own decides (wire/credit.py); these only have to be larger, and bound what a hostile peer may leave
# out of order.
_STREAM_WINDOW: Final = 16 * 1024 * 1024
_CONNECTION_WINDOW: Final = 256 * 1024 * 1024


class Connection(Protocol):
    """What aioquic's and qh3's QuicConnection have in common, and all that is used of them."""

    host_cid: bytes

    def connect(self, addr: Any, now: float) -> None: ...
    def receive_datagram(self, data: bytes, addr: Any, now: float) -> None: ...
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

    def get_send_buffer_size(self, stream_id: int) -> int:
        """Bytes written to a stream that have never been sent."""


# What may be missing before the bytes that a peer has sent out of order, on one stream and on all of a connection.
# On one stream it is what a path loses of a burst; a control stream never has more under way. On all streams it is the
# flight of a very fast path, not what a peer was given credit for.
_HOLE_LIMIT: Final = 256 * 1024
_HOLES_LIMIT: Final = 32 * 1024 * 1024

# A lost packet makes one hole at most; every further packet is compared with each of them.
_FRAGMENTS_LIMIT: Final = 1024


class _Aioquic(QuicConnection):
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

    def get_send_buffer_size(self, stream_id: int) -> int:
        """What qh3 has by the same name."""
        stream = self._streams.get(stream_id)
        if stream is None or stream.sender._reset_error_code is not None:
            return 0
        return stream.sender._buffer_stop - stream.sender.highest_offset


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

    connection: Callable[..., Connection]
    configuration: Callable[..., Any]
    connection_error: type[Exception]
    "what a connection that its peer has closed raises"

    events: Any
    "the module of event classes: StreamDataReceived, StreamReset, StopSendingReceived, PingAcknowledged, …"

    def server_configuration(self, identity: ServerIdentity, datagram_size: int) -> Any:
        """What every connection of a listener shares. Raises OSError and ValueError for files that cannot be used."""
        configuration = self._configuration(is_client=False, max_datagram_size=datagram_size)
        try:
            configuration.load_cert_chain(identity.certificate, identity.key)
        except IndexError:
            raise ValueError(f"there is no certificate in {identity.certificate}") from None  # qh3's way to say so
        return configuration

    def accept(self, configuration: Any, original_cid: bytes, retry_cid: bytes | None) -> Connection:
        """The server side of a new connection."""
        return self.connection(
            configuration=configuration,
            original_destination_connection_id=original_cid,
            retry_source_connection_id=retry_cid,
        )

    def dial(self, trust: ClientTrust, datagram_size: int) -> Connection:
        """The client side of a new connection, not yet connected."""
        configuration = self._configuration(
            is_client=True,
            max_datagram_size=datagram_size,
            server_name=trust.server_name,
            verify_mode=ssl.CERT_REQUIRED if trust.verify else ssl.CERT_NONE,
        )
        if trust.authority is not None:
            configuration.load_verify_locations(cadata=trust.authority)
        else:
            configuration.load_verify_locations(cafile=ssl.get_default_verify_paths().cafile or certifi.where())
        return self.connection(configuration=configuration)

    def streams_allowed(self, connection: Connection) -> int:
        """How many streams of ours the peer allows, counted from the connection's beginning.

        qh3 breaks when asked for more. aioquic queues what is too much, and then sends RESET_STREAM and STOP_SENDING
        for a queued stream that is given up, which makes its peer end the connection; what it knows of the limit is
        behind the one private name that this package uses. tests/quic watches over it.
        """
        name = "max_concurrent_bidi_streams" if self.name == "qh3" else "_remote_max_streams_bidi"
        allowed: int = getattr(connection, name)
        return allowed

    def _configuration(self, **options: Any) -> Any:
        return self.configuration(
            alpn_protocols=[ALPN],
            supported_versions=[1],
            idle_timeout=IDLE_TIMEOUT,
            max_data=_CONNECTION_WINDOW,
            max_stream_data=_STREAM_WINDOW,
            connection_id_length=CONNECTION_ID_LENGTH,
            **options,
        )


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
    return Engine(
        name=name,
        # qh3 2.1 counts what it received from an unvalidated address too low, and fails in its first flight to a
        # client whose first flight is one datagram, as aioquic's is. After a Retry the address is validated.
        # tests/quic shows it.
        needs_retry=name == "qh3",
        connection=_Aioquic if name == "aioquic" else connection.QuicConnection,
        connection_error=connection.QuicConnectionError,
        configuration=import_module(f"{name}.quic.configuration").QuicConfiguration,
        events=import_module(f"{name}.quic.events"),
    )


# What a listener reads of a packet before there is a connection. aioquic's parser serves both engines: it is always
# installed.


@dataclass(frozen=True, slots=True)
class InitialHeader:
    """The header of a long-header packet (RFC 9000 section 17.2)."""

    version: int | None
    is_initial: bool
    is_version_negotiation: bool
    destination_cid: bytes
    source_cid: bytes
    token: bytes


def parse_long_header(data: bytes) -> InitialHeader | None:
    """The first packet's header, or None for garbage."""
    try:
        header = pull_quic_header(Buffer(data=data), host_cid_length=CONNECTION_ID_LENGTH)
    except ValueError:
        return None
    return InitialHeader(
        header.version,
        header.packet_type == QuicPacketType.INITIAL,
        header.packet_type == QuicPacketType.VERSION_NEGOTIATION,
        header.destination_cid,
        header.source_cid,
        header.token,
    )


class RetryTokens:
    """Address validation tokens (RFC 9000 section 8.1.2), sealed with a key that lives as long as this process."""

    def __init__(self) -> None:
        self._handler = QuicRetryTokenHandler()

    def create(self, address: Any, header: InitialHeader, new_cid: bytes, now: float) -> bytes:
        """A token for a client at ``address``."""
        return self._handler.create_token(
            address=address,
            original_destination_connection_id=header.destination_cid,
            retry_source_connection_id=new_cid,
            now=now,
        )

    def original_cid(self, address: Any, header: InitialHeader, now: float) -> bytes:
        """The connection id of the client's very first packet; raises ValueError for a token that isn't good."""
        return self._handler.validate_token(
            address=address, destination_cid=header.destination_cid, token=header.token, now=now
        )


def retry_packet(header: InitialHeader, new_cid: bytes, token: bytes) -> bytes:
    """A Retry (RFC 9000 section 17.2.5)."""
    assert header.version is not None
    return encode_quic_retry(
        version=header.version,
        source_cid=new_cid,
        destination_cid=header.source_cid,
        original_destination_cid=header.destination_cid,
        retry_token=token,
    )


def version_negotiation_packet(header: InitialHeader) -> bytes:
    """A Version Negotiation that offers QUIC version 1 (RFC 9000 section 17.2.1)."""
    return encode_quic_version_negotiation(
        source_cid=header.destination_cid, destination_cid=header.source_cid, supported_versions=[1]
    )
