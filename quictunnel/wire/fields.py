"""Field rules: what a field may look like, which fields cross the tunnel, and what the tunnel says about the visitor.

Names are in lower case throughout, as in ``wire.frames``. Everything that is wrong with a field is a ValueError with
a sentence fit for a header: whoever calls knows whether a visitor or a backend is to blame.
"""

import ipaddress
import re
from collections.abc import Iterable
from itertools import product
from typing import Final

from quictunnel.wire.errors import ErrorCode, TunnelError
from quictunnel.wire.frames import Fields, RequestHead

__all__ = [
    "HOP_BY_HOP",
    "TUNNEL_HEADER",
    "Forwarding",
    "check_fields",
    "content_length",
    "end_to_end",
    "field_lines",
    "forward_once",
    "is_token",
    "members",
    "parse_host",
    "trailer_fields",
    "tunnel_name",
    "upgrade_protocols",
    "without_upgrade",
]

TUNNEL_HEADER: Final = b"x-tunnel-session"
"the field by which a visitor may name the tunnel; it goes no further than the server"

# Connection itself and what RFC 9110 section 7.6.1 lists; the two proxy fields are for the hop that reads them
# (section 11.7); the settings of an h2c upgrade (RFC 7540 section 3.2.1) mean nothing behind a gateway that never
# does it; and ``proxy`` becomes HTTP_PROXY in a CGI environment (CVE-2016-5385).
HOP_BY_HOP: Final = frozenset(
    {
        b"connection",
        b"http2-settings",
        b"keep-alive",
        b"proxy",
        b"proxy-authenticate",
        b"proxy-authorization",
        b"proxy-connection",
        b"te",
        b"transfer-encoding",
        b"upgrade",
    }
)

# What a Connection field can't take away: the message's framing and its address.
_NOT_NOMINATED: Final = frozenset({b"content-length", b"host"})

# What the tunnel says itself, or what others say in front of applications: from a visitor it would be a claim that
# nobody checked. So is all that begins like X-Forwarded: proxies vouch for users and certificates in such fields.
_CLAIMS: Final = frozenset({b"forwarded", b"proxy-status", b"via", b"x-real-ip"})
_CLAIM_STARTS: Final = (b"x-forwarded", b"x_forwarded")

# Fields that say how a message is to be framed, routed, authorised or understood: too late in a trailer (RFC 9110
# section 6.5.1).
_NOT_IN_TRAILERS: Final = frozenset(
    {
        b"authorization",
        b"cache-control",
        b"content-encoding",
        b"content-length",
        b"content-range",
        b"content-type",
        b"cookie",
        b"expect",
        b"host",
        b"max-forwards",
        b"range",
        b"set-cookie",
        b"trailer",
    }
)

# RFC 9110 section 7.8
_PROTOCOL: Final = re.compile(rb"[!#$%&'*+\-.^_`|~0-9A-Za-z]+(?:/[!#$%&'*+\-.^_`|~0-9A-Za-z]+)?")
# RFC 7540 section 3.1
_HTTP_2: Final = (b"h2", b"h2c")

_TOKEN_BYTES: Final = b"!#$%&'*+-.^_`|~0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
# RFC 9114 section 4.2: an upper-case name is malformed. It would also slip past every rule above.
_NAME_BYTES: Final = bytes(byte for byte in _TOKEN_BYTES if not 0x41 <= byte <= 0x5A)
_VALUE_BYTES: Final = b"\t" + bytes(range(0x20, 0x7F)) + bytes(range(0x80, 0x100))

_NAME: Final = re.compile(rb"[a-z0-9_](?:[a-z0-9_-]*[a-z0-9_])?(?:\.[a-z0-9_](?:[a-z0-9_-]*[a-z0-9_])?)*", re.I)
_NAME_LIMIT: Final = 253
"characters of a DNS name (RFC 1035 section 2.3.4)"

_PORT: Final = re.compile(rb"[0-9]{0,5}")
_LENGTH_DIGITS: Final = 18
"decimal digits of a length: below 2**63, and an exabyte is enough"


def _with_underscores(names: Iterable[bytes]) -> frozenset[bytes]:
    """Every way to write the names with some dash as an underscore: CGI and WSGI take each for the name itself."""
    found = set()
    for name in names:
        parts = name.split(b"-")
        for dashes in product((b"-", b"_"), repeat=len(parts) - 1):
            found.add(b"".join(part + dash for part, dash in zip(parts, (*dashes, b""), strict=True)))
    return frozenset(found - set(names))


_SHADOWS: Final = _with_underscores(_CLAIMS | HOP_BY_HOP | {TUNNEL_HEADER, b"content-length"})
# The host is a request's authority, not one of its fields.
_NEVER_FROM_TRUSTED: Final = _SHADOWS | {TUNNEL_HEADER, b"host"}
_NEVER_FROM_ANYONE_ELSE: Final = _CLAIMS | _NEVER_FROM_TRUSTED
_NEVER_IN_TRAILERS: Final = _NEVER_FROM_ANYONE_ELSE | HOP_BY_HOP | _NOT_IN_TRAILERS


def is_token(name: bytes) -> bool:
    """Whether these bytes are a token (RFC 9110 section 5.6.2)."""
    return bool(name) and not name.translate(None, _TOKEN_BYTES)


def members(fields: Fields, name: bytes) -> list[bytes]:
    """The members of a list-based field over all its lines, without empty ones (RFC 9110 section 5.6.1)."""
    lines = [value for key, value in fields if key == name]
    return [member for line in lines for part in line.split(b",") if (member := part.strip(b" \t"))]


def check_fields(fields: Fields) -> None:
    """Raises ValueError for a name that is not a lower-case token, and for a value with a control byte other than HTAB.

    RFC 9110 section 5.5: with CR or LF in it, a field could say where the next message of HTTP/1.1 begins.
    """
    if not fields:
        return
    names, values = zip(*fields, strict=True)
    if b"".join(names).translate(None, _NAME_BYTES) or b"" in names:
        raise ValueError("a field name is not a lower-case token")
    if b"".join(values).translate(None, _VALUE_BYTES):
        raise ValueError("a field value has control bytes")


def field_lines(fields: Fields) -> bytes:
    """The fields as lines of HTTP/1.1, without the empty line after them (RFC 9112 section 5).

    Raises ValueError as ``check_fields`` does.
    """
    check_fields(fields)
    return b"".join([part for name, value in fields for part in (name, b": ", value, b"\r\n")])


def end_to_end(fields: Fields) -> Fields:
    """The fields that go on to the next hop, in their order (RFC 9110 section 7.6.1).

    Left out are ``HOP_BY_HOP`` and every name that Connection holds; ``te: trailers`` stays, as it is all that TE can
    say end to end.
    """
    drop = HOP_BY_HOP
    nominated: set[bytes] | None = None
    trailers = False
    for name, value in fields:
        if name == b"connection":
            # Nearly every Connection field there is; they nominate nothing that isn't left out already.
            if (option := value.lower()) not in (b"keep-alive", b"close", b"upgrade"):
                nominated = nominated or set()
                nominated.update(part.strip(b" \t") for part in option.split(b","))
        elif name == b"te":
            trailers = trailers or b"trailers" in [part.strip(b" \t") for part in value.lower().split(b",")]
    if nominated:
        drop = drop | (nominated - _NOT_NOMINATED)
    kept = [field for field in fields if field[0] not in drop]
    if trailers:
        kept.append((b"te", b"trailers"))
    return kept


def trailer_fields(fields: Fields) -> Fields:
    """The trailer fields that go on: what only a head may say, and what a visitor may not claim, is left out."""
    return [field for field in fields if field[0] not in _NEVER_IN_TRAILERS and not field[0].startswith(_CLAIM_STARTS)]


def upgrade_protocols(value: bytes) -> list[bytes]:
    """The protocols that an Upgrade field of this value may ask for here, in order (RFC 9110 section 7.8).

    Left out are HTTP/2, because requests inside such a connection would pass every rule unseen, and what is malformed.
    """
    asked = members([(b"upgrade", value)], b"upgrade")
    return [each for each in asked if _PROTOCOL.fullmatch(each) and each.partition(b"/")[0].lower() not in _HTTP_2]


def without_upgrade(head: RequestHead, name: str) -> RequestHead:
    """The request as ``name`` gets it, which switches to no other protocol. Raises TunnelError (NOT_IMPLEMENTED)."""
    if head.method == b"CONNECT":
        raise TunnelError(ErrorCode.NOT_IMPLEMENTED, f"{name} takes no CONNECT")
    if not head.protocol:
        return head
    if b"websocket" in head.protocol.lower():
        # Any other protocol may be ignored (RFC 9110 section 7.8), but a handshake is of no use without its own.
        raise TunnelError(ErrorCode.NOT_IMPLEMENTED, f"{name} serves no WebSockets through the tunnel")
    return head._replace(body=False, protocol=b"")


def forward_once(fields: Fields) -> Fields | None:
    """The fields of a TRACE or OPTIONS with one less in Max-Forwards, None if it may go no further (RFC 9110 section
    7.6.2).

    Raises ValueError for a Max-Forwards that is not one number.
    """
    values = [value for name, value in fields if name == b"max-forwards"]
    if not values:
        return fields
    if len(values) > 1 or not values[0].isdigit() or len(values[0]) > _LENGTH_DIGITS:
        raise ValueError("the Max-Forwards is not a number")
    left = int(values[0]) - 1
    if left < 0:
        return None
    return [(name, b"%d" % left if name == b"max-forwards" else value) for name, value in fields]


def content_length(fields: Fields) -> int | None:
    """The announced length in bytes, None for none.

    Raises ValueError if there is more than one, equal or not, or one that is not plain digits (RFC 9110 section 8.6,
    RFC 9112 section 6.3).
    """
    values = [value for name, value in fields if name == b"content-length"]
    if not values:
        return None
    if len(values) > 1:
        raise ValueError("there is more than one Content-Length")
    value = values[0]
    if not value.isdigit() or len(value) > _LENGTH_DIGITS:
        raise ValueError("the Content-Length is not a length")
    return int(value)


def parse_host(value: bytes) -> tuple[str, int | None]:
    """The host, in lower case and without a final dot, and the port of a Host field (RFC 9110 section 7.2, RFC 3986
    section 3.2).

    An IPv6 address keeps its brackets and comes in its short form (RFC 5952). Of registered names only those that DNS
    could know are taken, underscores included. Raises ValueError for anything else, an empty host too.
    """
    if value.startswith(b"["):
        address, bracket, rest = value[1:].partition(b"]")
        if not bracket or (rest and rest[:1] != b":"):
            raise ValueError("the host is malformed")
        return f"[{_ipv6(address)}]", _port(rest[1:])
    name, _, port = value.partition(b":")
    name = name.removesuffix(b".")
    if len(name) > _NAME_LIMIT or not _NAME.fullmatch(name):
        raise ValueError("the host is malformed")
    return name.decode("ascii").lower(), _port(port)


def tunnel_name(host: str, domain: str) -> str | None:
    """The NAME of a host ``NAME.<domain>``, both in the form that ``parse_host`` gives; None for every other host.

    A deeper host has a name with dots, which is no tunnel's: it must not be taken for somebody else's host.
    """
    end = len(host) - len(domain) - 1
    return host[:end] if end > 0 and host[end] == "." and host.endswith(domain) else None


def _ipv6(address: bytes) -> str:
    # A zone (RFC 6874) is the sender's own affair.
    if b"%" in address or not address.isascii():
        raise ValueError("the host is malformed")
    try:
        return ipaddress.IPv6Address(address.decode("ascii")).compressed
    except ValueError:
        raise ValueError("the host is malformed") from None


def _port(digits: bytes) -> int | None:
    if not _PORT.fullmatch(digits) or int(digits or b"0") > 65535:
        raise ValueError("the port is malformed")
    return int(digits) if digits else None


class Forwarding:
    """What the backend is told of the visitor's connection: made once for it, applied to each of its requests.

    ``X-Forwarded-For``, ``-Proto``, ``-Host``, ``Forwarded`` (RFC 7239) and ``Via`` (RFC 9110 section 7.6.3). A
    trusted visitor is a proxy of the operator's: what it says stands, and its own address is added. Anyone else's
    claims are left out.
    """

    __slots__ = ("_authority", "_client", "_node", "_own", "_scheme", "client", "trusted")

    trusted: bool
    "the visitor is a proxy of the operator's"

    def __init__(self, client: str, scheme: bytes, *, trusted: bool) -> None:
        """``client`` is an IP address, or anything else for an unknown one; ``scheme`` is ``http`` or ``https``."""
        self.client, self._node = _client(client)
        self._client = self.client.encode("ascii")
        self._scheme = scheme
        self.trusted = trusted
        self._authority: bytes | None = None
        self._own: Fields = []

    def apply(self, fields: Fields, authority: bytes, version: bytes = b"1.1") -> Fields:
        """The fields (of ``end_to_end``) without Host, with the tunnel's own at their end.

        ``authority`` was checked by ``parse_host``; ``version`` is the HTTP version that the visitor spoke. Names
        with underscores that an application could take for a field that the tunnel sets or relies on are left out.
        """
        if self.trusted:
            return self._append(fields, authority, version)
        kept = [
            field
            for field in fields
            if field[0] not in _NEVER_FROM_ANYONE_ELSE and not field[0].startswith(_CLAIM_STARTS)
        ]
        # Nearly always the authority of the request before.
        if authority != self._authority:
            self._authority = authority
            self._own = [*self._forwarded(authority), (b"forwarded", self._element(authority))]
        kept += self._own
        kept.append((b"via", _VIA[version]))
        return kept

    def _forwarded(self, authority: bytes) -> Fields:
        host = [(b"x-forwarded-host", authority)] if authority else []
        return [(b"x-forwarded-for", self._client), (b"x-forwarded-proto", self._scheme), *host]

    def _element(self, authority: bytes) -> bytes:
        host = b';host="%b"' % authority if authority else b""
        return b"for=%b%b;proto=%b" % (self._node, host, self._scheme)

    def _append(self, fields: Fields, authority: bytes, version: bytes) -> Fields:
        kept = [field for field in fields if field[0] not in _NEVER_FROM_TRUSTED and not _is_shadow(field[0])]
        names = {name for name, _ in kept}
        _append(kept, b"x-forwarded-for", self._client)
        kept += [field for field in self._forwarded(authority)[1:] if field[0] not in names]
        _append(kept, b"forwarded", self._element(authority))
        _append(kept, b"via", _VIA[version])
        return kept


def _is_shadow(name: bytes) -> bool:
    return name.startswith(_CLAIM_STARTS) and b"_" in name


_VIA: Final = {version: version + b" quictunnel" for version in (b"1.0", b"1.1", b"2.0")}


def _client(address: str) -> tuple[str, bytes]:
    """An address as a person knows it, and as a node of RFC 7239 section 6."""
    try:
        # A dual-stack socket shows an IPv4 visitor as ::ffff:192.0.2.1, and a link-local one with its zone.
        ip = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return "unknown", b"unknown"
    if isinstance(ip, ipaddress.IPv6Address):
        if ip.ipv4_mapped is None:
            return ip.compressed, b'"[%b]"' % ip.compressed.encode("ascii")
        ip = ip.ipv4_mapped
    return ip.compressed, ip.compressed.encode("ascii")


def _append(fields: Fields, name: bytes, value: bytes) -> None:
    """Add a member to a list-based field; several lines of it become one, where the last one was."""
    values = [old for key, old in fields if key == name and old]
    fields[:] = [field for field in fields if field[0] != name]
    fields.append((name, b", ".join([*values, value])))
