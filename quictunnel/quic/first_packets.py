"""What a listener reads and answers before there is a connection (RFC 9000 section 17.2)."""

import hashlib
import hmac
import ipaddress
import os
from dataclasses import dataclass
from struct import Struct
from typing import Any, Final

from quictunnel.quic.engine import Engine
from quictunnel.wire.codec import pull_varint

__all__ = ["InitialHeader", "RetryTokens", "parse_long_header", "retry_packet", "version_negotiation_packet"]

_TAG_LENGTH: Final = 16
"bytes, of a token's seal and of a Retry's"

_TOKEN_LIFETIME: Final = 30.0
"seconds: clients answer a Retry at once"

_LONGEST_ID: Final = 20
"bytes of a connection id"

_ISSUED: Final = Struct("!d")
_PORT: Final = Struct("!H")

_INITIAL: Final = 0
_RETRY: Final = 3


@dataclass(frozen=True, slots=True)
class InitialHeader:
    """The header of a long-header packet."""

    version: int
    is_initial: bool
    is_version_negotiation: bool
    destination_cid: bytes
    source_cid: bytes
    token: bytes
    "of an Initial or a Retry of version 1"


def parse_long_header(data: bytes) -> InitialHeader | None:
    """The first packet's header, or None for garbage. Of another version than 1 only what all have in common."""
    if len(data) < 7 or not data[0] & 0x80:
        return None
    version = int.from_bytes(data[1:5], "big")
    destination, position = _connection_id(data, 5)
    source, position = _connection_id(data, position)
    if position < 0:
        return None
    if version != 1:
        return InitialHeader(version, False, version == 0, destination, source, b"")
    kind, token = data[0] >> 4 & 3, b""
    if not data[0] & 0x40:
        return None
    if kind == _RETRY:
        if len(data) - position < _TAG_LENGTH:
            return None
        return InitialHeader(version, False, False, destination, source, data[position:-_TAG_LENGTH])
    if kind == _INITIAL:
        length, position = pull_varint(data, position)
        if position < 0 or position + length > len(data):
            return None
        token, position = data[position : position + length], position + length
    length, position = pull_varint(data, position)
    if position < 0 or position + length > len(data):
        return None
    return InitialHeader(version, kind == _INITIAL, False, destination, source, token)


def _connection_id(data: bytes, position: int) -> tuple[bytes, int]:
    """A connection id behind its length, and where it ends; an end of -1 when there is none."""
    if not 0 <= position < len(data):
        return b"", -1
    end = position + 1 + data[position]
    if data[position] > _LONGEST_ID or end > len(data):
        return b"", -1
    return data[position + 1 : end], end


class RetryTokens:
    """Address validation tokens (RFC 9000 section 8.1.2), sealed with a key that lives as long as this process.

    What is in them is no secret to who gets one: its own connection id, and when the token was made.
    """

    def __init__(self) -> None:
        self._key = os.urandom(32)

    def create(self, address: Any, header: InitialHeader, new_cid: bytes, now: float) -> bytes:
        """A token for a client at ``address``."""
        text = _ISSUED.pack(now) + header.destination_cid
        return self._seal(text, address, new_cid) + text

    def original_cid(self, address: Any, header: InitialHeader, now: float) -> bytes:
        """The connection id of the client's very first packet; raises ValueError for a token that isn't good."""
        seal, text = header.token[:_TAG_LENGTH], header.token[_TAG_LENGTH:]
        if len(text) < _ISSUED.size:
            raise ValueError("no token of ours")
        if not hmac.compare_digest(seal, self._seal(text, address, header.destination_cid)):
            raise ValueError("no token of ours for this address and connection id")
        if now - _ISSUED.unpack_from(text)[0] > _TOKEN_LIFETIME:
            raise ValueError("the token has expired")
        return text[_ISSUED.size :]

    def _seal(self, text: bytes, address: Any, cid: bytes) -> bytes:
        # Whoever answers a Retry does so from its address, to the connection id in it. Each part's length is known
        # from what stands before it.
        host = ipaddress.ip_address(address[0]).packed
        bound = bytes((len(host), len(cid))) + host + _PORT.pack(address[1]) + cid
        return hmac.digest(self._key, bound + text, hashlib.sha256)[:_TAG_LENGTH]


def retry_packet(engine: Engine, header: InitialHeader, new_cid: bytes, token: bytes) -> bytes:
    """A Retry (RFC 9000 section 17.2.5)."""
    packet: bytes = engine.packets.encode_quic_retry(
        version=header.version,
        source_cid=new_cid,
        destination_cid=header.source_cid,
        original_destination_cid=header.destination_cid,
        retry_token=token,
    )
    return packet


def version_negotiation_packet(header: InitialHeader) -> bytes:
    """A Version Negotiation that offers QUIC version 1 (RFC 9000 section 17.2.1)."""
    first = bytes((os.urandom(1)[0] | 0xC0,))
    ids = (header.source_cid, header.destination_cid)
    return first + bytes(4) + b"".join(bytes((len(cid),)) + cid for cid in ids) + (1).to_bytes(4, "big")
