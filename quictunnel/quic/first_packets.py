"""What a listener reads and answers before there is a connection. aioquic's parser serves both engines."""

import ipaddress
import os
from dataclasses import dataclass
from struct import Struct
from typing import Any, Final

from aioquic.buffer import Buffer  # type: ignore[attr-defined]  # it re-exports it without saying so
from aioquic.quic.packet import (
    QuicPacketType,
    encode_quic_retry,
    encode_quic_version_negotiation,
    pull_quic_header,
)
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from quictunnel.quic.engine import CONNECTION_ID_LENGTH

__all__ = ["InitialHeader", "RetryTokens", "parse_long_header", "retry_packet", "version_negotiation_packet"]

_NONCE_LENGTH: Final = 12
_TOKEN_LIFETIME: Final = 30.0
"seconds: clients answer a Retry at once"

_ISSUED: Final = Struct("!d")
_PORT: Final = Struct("!H")


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
    """Address validation tokens (RFC 9000 section 8.1.2), sealed with a key that lives as long as this process.

    aioquic's own would do, but to load them is to load all of aioquic, a third of what a server with the other engine
    loads.
    """

    def __init__(self) -> None:
        self._aead = AESGCM(AESGCM.generate_key(128))

    def create(self, address: Any, header: InitialHeader, new_cid: bytes, now: float) -> bytes:
        """A token for a client at ``address``."""
        nonce = os.urandom(_NONCE_LENGTH)
        text = _ISSUED.pack(now) + header.destination_cid
        return nonce + self._aead.encrypt(nonce, text, _bound_to(address, new_cid))

    def original_cid(self, address: Any, header: InitialHeader, now: float) -> bytes:
        """The connection id of the client's very first packet; raises ValueError for a token that isn't good."""
        nonce, sealed = header.token[:_NONCE_LENGTH], header.token[_NONCE_LENGTH:]
        if len(nonce) < _NONCE_LENGTH:
            raise ValueError("no token of ours")
        try:
            text = self._aead.decrypt(nonce, sealed, _bound_to(address, header.destination_cid))
        except InvalidTag:
            raise ValueError("no token of ours for this address and connection id") from None
        if now - _ISSUED.unpack_from(text)[0] > _TOKEN_LIFETIME:
            raise ValueError("the token has expired")
        return text[_ISSUED.size :]


def _bound_to(address: Any, cid: bytes) -> bytes:
    """What a token is good for: whoever answers a Retry does so from its address, to the connection id in it."""
    return ipaddress.ip_address(address[0]).packed + _PORT.pack(address[1]) + cid


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
