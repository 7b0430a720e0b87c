"""A request's bytes as a backend gets them (RFC 9112 section 3), made anew and checked as if a stranger had sent them.

A client takes its heads from a server that it need not trust, and whoever can put a line end into a field can put a
request into somebody else's connection. So nothing leaves that does not match the grammar.
"""

import re
from typing import Final

from quictunnel.wire.errors import ErrorCode, TunnelError
from quictunnel.wire.fields import (
    check_fields,
    content_length,
    end_to_end,
    field_lines,
    members,
    upgrade_protocols,
)
from quictunnel.wire.frames import Fields, RequestHead

__all__ = [
    "announced_length",
    "check_request",
    "encode_request",
    "encode_request_trailers",
]

# RFC 9112 section 3: a method is a token, a target has no white space. HTTP/1.1 needs Host, be it empty (section 3.2).
_START: Final = re.compile(
    rb"[!#$%&'*+\-.^_`|~0-9A-Za-z]+ [\x21-\x7e\x80-\xff]+ HTTP/1\.1\r\nHost: [\x21-\x7e\x80-\xff]*\r\n"
)

# Fields that would change the message they trail (RFC 9110 section 6.5.1).
_NOT_IN_TRAILERS: Final = frozenset(
    {b"content-encoding", b"content-length", b"content-range", b"content-type", b"host", b"trailer"}
)


def announced_length(head: RequestHead) -> int | None:
    """The bytes of body that follow ``head``, None when only its end will tell. Raises TunnelError (BAD_REQUEST)."""
    try:
        length = content_length(head.fields)
    except ValueError as error:
        raise _malformed(str(error)) from None
    if head.body:
        return length
    if length:
        raise _malformed("it announces a body and has none")
    return 0


def check_request(head: RequestHead) -> None:
    """What ``encode_request`` checks, for those who write it down in another way. Raises TunnelError (BAD_REQUEST)."""
    if _START.fullmatch(_start(head, b"")) is None:
        raise _malformed("its method, target or host is not what HTTP allows")
    try:
        check_fields(head.fields)
    except ValueError as error:
        raise _malformed(str(error)) from None
    if any(name == b"host" for name, _ in head.fields):
        raise _malformed("it has two hosts")


def encode_request(head: RequestHead, host: bytes, length: int | None) -> bytes:
    """The request line and the header section for a body of ``length`` bytes.

    With a length of None the body is chunked, or opaque if a protocol is asked for. ``host`` is the Host where the head
    names none. Raises TunnelError (BAD_REQUEST) for what no request may hold.
    """
    start = _start(head, host)
    if _START.fullmatch(start) is None:
        raise _malformed("its method, target or host is not what HTTP/1.1 allows")
    fields = end_to_end(head.fields)
    try:
        lines = field_lines(fields)
    except ValueError as error:
        raise _malformed(str(error)) from None
    names = {name for name, _ in fields}
    if b"host" in names:
        raise _malformed("it has two hosts")
    ours = b"Transfer-Encoding: chunked\r\n" if length is None and not head.protocol else b""
    # A CONNECT is all there is to its switch.
    protocol = b"" if head.method == b"CONNECT" else head.protocol
    if protocol or b"te" in names:
        ours += _connection(protocol, b"te" in names)
    return b"%b%b%b\r\n" % (start, lines, ours)


def encode_request_trailers(trailers: Fields) -> bytes:
    """The last chunk and the trailer section (RFC 9112 section 7.1). Raises TunnelError (BAD_REQUEST)."""
    if not trailers:
        return b"0\r\n\r\n"
    kept = [field for field in end_to_end(trailers) if field[0] not in _NOT_IN_TRAILERS]
    try:
        return b"0\r\n%b\r\n" % field_lines(kept)
    except ValueError as error:
        raise _malformed(str(error)) from None


def _start(head: RequestHead, host: bytes) -> bytes:
    return b"%b %b HTTP/1.1\r\nHost: %b\r\n" % (head.method, head.target, head.authority or host)


def _connection(protocol: bytes, te: bool) -> bytes:
    # Both speak of this connection alone and must be named by Connection (RFC 9110 sections 7.8 and 10.1.4).
    if not protocol:
        return b"Connection: TE\r\n"
    asked = upgrade_protocols(protocol)
    if not asked or asked != members([(b"upgrade", protocol)], b"upgrade"):
        raise _malformed("the protocol it asks for is not one that it may ask for")
    return b"Connection: %b\r\nUpgrade: %b\r\n" % (b"Upgrade, TE" if te else b"Upgrade", protocol)


def _malformed(what: str) -> TunnelError:
    return TunnelError(ErrorCode.BAD_REQUEST, f"the request is malformed: {what}")
