"""The join string: all that a client needs to know of a server, in one word that can be pasted.

    qt1_ base64url( size:2  checksum:4  address size:1  address  CA pin:32  token )

``size`` counts the bytes behind it, so that a paste that lost its end is told from one that has a wrong character; the
checksum is the first four bytes of the SHA-256 of the prefix and of what follows. It guards against accidents, not
against people: who can change the string can choose the server anyway.
"""

import base64
import hashlib
import ipaddress
import re
from dataclasses import dataclass, field
from typing import Final

from quictunnel.wire.names import normalise_host

__all__ = ["LOCAL_JOIN", "TEXT_LIMIT", "JoinString", "split_address"]

LOCAL_JOIN: Final = "local.join"
"the file in a server's state directory with the join string of clients on its own machine; as private as the CA's key"

PREFIX: Final = "qt1_"
PIN_SIZE: Final = 32
TOKEN_LIMIT: Final = 512
"characters"

TEXT_LIMIT: Final = 4096
"characters of a pasted text worth looking at"

_CHECKSUM_SIZE: Final = 4
_NOISE: Final = re.compile(r"[\s\"'`\u2018\u2019\u201c\u201d\u200b\ufeff]+")
"white space, the line breaks of a narrow terminal, and the quotes that chat programs add or bend"


@dataclass(frozen=True, slots=True)
class JoinString:
    """Where the server is, which CA must have signed its certificate, and the token to show it."""

    address: str
    "HOST:PORT or [IPV6]:PORT of the server's UDP port"

    ca_pin: bytes
    "SHA-256 of the CA certificate's DER"

    token: str = field(repr=False)

    def __post_init__(self) -> None:
        """Raises ValueError."""
        host, port = split_address(self.address)
        object.__setattr__(self, "address", f"[{host}]:{port}" if ":" in host else f"{host}:{port}")
        if len(self.ca_pin) != PIN_SIZE:
            raise ValueError(f"a CA pin has {PIN_SIZE} bytes, not {len(self.ca_pin)}")
        if not (self.token.isascii() and self.token.isprintable() and 0 < len(self.token) <= TOKEN_LIMIT):
            raise ValueError(f"a token is 1 to {TOKEN_LIMIT} printable ASCII characters")

    @property
    def host(self) -> str:
        """The name or IP address to dial, without brackets: what the server's certificate must be for."""
        return split_address(self.address)[0]

    @property
    def port(self) -> int:
        """The UDP port, 1 to 65535."""
        return split_address(self.address)[1]

    def encode(self) -> str:
        """The string to paste: ``qt1_`` and base64url without padding. It holds the token: never log it."""
        address = self.address.encode()
        body = bytes([len(address)]) + address + self.ca_pin + self.token.encode()
        body = _checksum(body) + body
        return PREFIX + base64.urlsafe_b64encode(len(body).to_bytes(2) + body).rstrip(b"=").decode()

    @classmethod
    def parse(cls, text: str) -> "JoinString":
        """Read a pasted string, whatever white space, quotes and line breaks it went through.

        Raises ValueError with a sentence that never repeats the text: it may hold a token.
        """
        if len(text) > TEXT_LIMIT:
            raise ValueError("this is too long to be a join string")
        word = _NOISE.sub("", text)
        if not word.startswith(PREFIX):
            raise ValueError(_why_not(word))
        return cls._from_body(_checked_body(_decode(word[len(PREFIX) :])))

    @classmethod
    def _from_body(cls, body: bytes) -> "JoinString":
        pin_at = 1 + body[0] if body else 0
        token_at = pin_at + PIN_SIZE
        try:
            return cls(body[1:pin_at].decode("ascii"), body[pin_at:token_at], body[token_at:].decode("ascii"))
        except ValueError:
            # The checksum was right, so it is no accident of pasting, and its parts may be the token: say no more.
            raise ValueError("the join string was not made by quictunnel") from None


def split_address(address: str) -> tuple[str, int]:
    """``HOST:PORT`` in two: a host name in its one form or a plain IP address, and a port of 1 to 65535.

    Raises ValueError.
    """
    host, colon, port = address.rpartition(":")
    if not colon or not (port.isascii() and port.isdigit() and len(port) <= 5 and 0 < int(port) < 65536):
        raise ValueError(f"{address[:300]!a} is not HOST:PORT with a port of 1 to 65535")
    bracketed = host.startswith("[") and host.endswith("]")
    try:
        ip = ipaddress.ip_address(host[1:-1] if bracketed else host)
    except ValueError:
        if bracketed:
            raise ValueError(f"{host[:300]!a} is not an IPv6 address") from None
        return normalise_host(host), int(port)
    if "%" in host:
        raise ValueError(f"{host[:300]!a} names a network interface, which means nothing on another machine")
    if bracketed != (ip.version == 6):
        raise ValueError(f"{address[:300]!a}: an IPv6 address, and only that, is written in brackets before its port")
    return str(ip), int(port)


def _why_not(word: str) -> str:
    if re.match(r"qt[0-9]+_", word):
        return "this join string is of another version of quictunnel: use the same version on both machines"
    if word.startswith("qtk_"):
        return "this is a token, not a join string: give it as the token, together with the server's address and its CA"
    if PREFIX.startswith(word):
        return "the join string is incomplete: copy all of it"
    return f"this is not a join string: it does not begin with {PREFIX}"


def _decode(word: str) -> bytes:
    bad = re.search(r"[^A-Za-z0-9_-]", word)
    if bad:
        position = len(PREFIX) + bad.start() + 1
        raise ValueError(f"the join string has a character that is not part of it, at position {position}")
    if len(word) % 4 == 1:
        # Six bits that make no byte: the end is missing, which its size will tell.
        word = word[:-1]
    return base64.urlsafe_b64decode(word + "=" * (-len(word) % 4))


def _checked_body(data: bytes) -> bytes:
    size = int.from_bytes(data[:2])
    if len(data) < 2 or len(data) - 2 < size:
        raise ValueError("the join string is incomplete: copy all of it")
    if len(data) - 2 > size:
        raise ValueError("the join string has something behind its end: copy it alone")
    checksum, body = data[2 : 2 + _CHECKSUM_SIZE], data[2 + _CHECKSUM_SIZE :]
    if checksum != _checksum(body):
        raise ValueError("the join string is damaged: a character is wrong or missing")
    return body


def _checksum(body: bytes) -> bytes:
    return hashlib.sha256(PREFIX.encode() + body).digest()[:_CHECKSUM_SIZE]
