"""What HTTP/2 field sections must look like before they become heads (RFC 9113 sections 8.2 and 8.3).

``h2`` decodes them and checks none of this for us: what is malformed in one request is that request's affair, while it
would end the connection. Both directions: a visitor's request, a backend's answer, and trailers of either.
"""

import re
from typing import Final

from quictunnel.http.door import Request, count_forward, malformed, read_address
from quictunnel.http.limits import VisitorLimits
from quictunnel.wire.errors import ErrorCode, TunnelError
from quictunnel.wire.fields import TUNNEL_HEADER, check_fields, content_length, is_token, parse_host
from quictunnel.wire.frames import Fields, ResponseHead

__all__ = ["field_section_size", "read_request", "read_response", "read_trailers"]

# RFC 9113 section 8.2.2: these speak of a connection of HTTP/1.1.
_CONNECTION_FIELDS: Final = frozenset(
    {b"connection", b"keep-alive", b"proxy-connection", b"transfer-encoding", b"upgrade"}
)
_PSEUDO: Final = frozenset({b":method", b":scheme", b":authority", b":path"})
_TARGET: Final = re.compile(rb"/[\x21-\x7e]*")
_STATUS: Final = re.compile(rb"[1-9][0-9][0-9]")
# RFC 9113 section 6.5.2
_FIELD_OVERHEAD: Final = 32


def read_request(section: Fields, limits: VisitorLimits, *, ended: bool) -> Request:
    """A request's head; ``ended`` is whether nothing follows it. Raises TunnelError with the answer's status."""
    if field_section_size(section) > limits.head_size:
        raise TunnelError(ErrorCode.HEAD_TOO_LARGE)
    try:
        return _read_request(section, limits, ended)
    except ValueError as error:
        raise malformed(str(error)) from None


def read_response(section: Fields, *, fields_limit: int, size_limit: int) -> ResponseHead:
    """A response's head, an interim one too. Raises ValueError."""
    pseudo, fields = _split(section)
    _check_size(section, size_limit)
    status = pseudo.get(b":status", b"")
    # RFC 9113 section 8.6: there is no 101
    if len(pseudo) != 1 or _STATUS.fullmatch(status) is None or status == b"101":
        raise ValueError("its pseudo-header fields are not one :status of a response")
    _check(fields, fields_limit)
    return ResponseHead(int(status), fields)


def read_trailers(section: Fields, *, fields_limit: int, size_limit: int) -> Fields:
    """A trailer section. Raises ValueError."""
    pseudo, fields = _split(section)
    _check_size(section, size_limit)
    if pseudo:
        raise ValueError("its trailer section has a pseudo-header field")
    _check(fields, fields_limit)
    return fields


def field_section_size(section: Fields) -> int:
    """Its size as SETTINGS_MAX_HEADER_LIST_SIZE counts it, in bytes."""
    return sum(len(name) + len(value) + _FIELD_OVERHEAD for name, value in section)


def _read_request(section: Fields, limits: VisitorLimits, ended: bool) -> Request:
    pseudo, fields = _split(section)
    if len(fields) > limits.head_fields:
        raise TunnelError(ErrorCode.HEAD_TOO_LARGE, "The request has too many header fields.")
    if pseudo.keys() - _PSEUDO:
        raise ValueError("it has an unknown pseudo-header field")
    method, target = pseudo.get(b":method", b""), pseudo.get(b":path", b"")
    if not is_token(method):
        raise ValueError("its :method is not a token")
    if len(target) > limits.target_length:
        raise TunnelError(ErrorCode.TARGET_TOO_LONG)
    if method == b"CONNECT":
        raise TunnelError(ErrorCode.NOT_IMPLEMENTED, "CONNECT is not offered over HTTP/2.")
    if pseudo.get(b":scheme") not in (b"http", b"https"):
        raise ValueError("its :scheme is neither http nor https")
    # RFC 9113 section 8.3.1; a proxy's absolute form has no place here, and would be a second authority.
    if target != b"*" and _TARGET.fullmatch(target) is None:
        raise ValueError("its :path is not a path")
    _check(fields, limits.head_fields)
    target, authority, host = read_address(method, target, _hosts(pseudo, fields), b"1", secure=True)
    tunnels = [value for name, value in fields if name == TUNNEL_HEADER]
    if len(tunnels) > 1:
        raise ValueError("it names two tunnels")
    if content_length(fields) and ended:
        raise ValueError("it announces a body and has none")
    return Request(
        method=method,
        target=target,
        authority=authority,
        host=host,
        version=b"2.0",
        fields=_one_cookie(count_forward(method, fields)),
        body=not ended,
        keep_alive=True,
        protocol=b"",
        tunnel=tunnels[0] if tunnels else b"",
    )


def _hosts(pseudo: dict[bytes, bytes], fields: Fields) -> list[bytes]:
    """The hosts that a request names; two that differ would let each reader believe another one (section 8.3.1)."""
    hosts = [value for name, value in fields if name == b"host"]
    authority = pseudo.get(b":authority", b"")
    if not authority:
        return hosts
    if any(parse_host(host) != parse_host(authority) for host in hosts):
        raise ValueError("its :authority and its Host disagree")
    return [authority, *hosts[1:]]


def _split(section: Fields) -> tuple[dict[bytes, bytes], Fields]:
    """The pseudo-header fields, which come first and once each, and the others (RFC 9113 section 8.3)."""
    pseudo: dict[bytes, bytes] = {}
    fields: Fields = []
    for name, value in section:
        if name[:1] != b":":
            fields.append((name, value))
        elif fields or name in pseudo:
            raise ValueError("a pseudo-header field comes twice or too late")
        else:
            pseudo[name] = value
    return pseudo, fields


def _check_size(section: Fields, limit: int) -> None:
    if field_section_size(section) > limit:
        raise ValueError("a field section is too large")


def _check(fields: Fields, limit: int) -> None:
    if len(fields) > limit:
        raise ValueError("it has too many fields")
    check_fields(fields)
    for name, value in fields:
        if name in _CONNECTION_FIELDS or (name == b"te" and value.lower() != b"trailers"):
            raise ValueError("it has a field of HTTP/1.1 connections")
        # RFC 9113 section 8.2.1
        if value[:1] in (b" ", b"\t") or value[-1:] in (b" ", b"\t"):
            raise ValueError("white space surrounds a field value")


def _one_cookie(fields: Fields) -> Fields:
    """RFC 9113 section 8.2.3: cookies may come in pieces, and others know of one field only."""
    pieces = [value for name, value in fields if name == b"cookie"]
    if len(pieces) < 2:
        return fields
    first = next(index for index, field in enumerate(fields) if field[0] == b"cookie")
    kept = [field for field in fields if field[0] != b"cookie"]
    kept.insert(first, (b"cookie", b"; ".join(pieces)))
    return kept
