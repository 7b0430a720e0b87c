"""What a listener reads and answers before there is a connection. aioquic's parser serves both engines."""

from dataclasses import dataclass
from typing import Any

from aioquic.buffer import Buffer  # type: ignore[attr-defined]  # it re-exports it without saying so
from aioquic.quic.packet import (
    QuicPacketType,
    encode_quic_retry,
    encode_quic_version_negotiation,
    pull_quic_header,
)
from aioquic.quic.retry import QuicRetryTokenHandler

from quictunnel.quic.engine import CONNECTION_ID_LENGTH

__all__ = ["InitialHeader", "RetryTokens", "parse_long_header", "retry_packet", "version_negotiation_packet"]


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
