"""An answer's bytes as a visitor gets them: framing made anew, fields checked as if a stranger had sent them.

The server takes its answers from clients that it need not trust, and whoever can put a line end into a field can
split an answer in two.

How a final answer's body ends (RFC 9112 section 6.3), by the first line that fits:

    to HEAD, 204, 304            NONE     there is no body, whatever Content-Length says
    205                          LENGTH   of 0 (RFC 9110 section 15.3.6)
    with a Content-Length        LENGTH
    to an HTTP/1.1 visitor       CHUNKED
    to an HTTP/1.0 visitor       CLOSE    with the connection
"""

from enum import IntEnum
from http import HTTPStatus
from typing import Final, NamedTuple

from quictunnel.wire.fields import content_length, end_to_end, field_lines, members, trailer_fields
from quictunnel.wire.frames import Fields, ResponseHead

__all__ = [
    "Framing",
    "ReplyHead",
    "encode_interim",
    "encode_reply",
    "encode_switch",
    "encode_trailers",
    "plan_reply",
    "status_line",
]


class Framing(IntEnum):
    """How the end of an answer's body is told."""

    NONE = 0
    LENGTH = 1
    CHUNKED = 2
    CLOSE = 3


class ReplyHead(NamedTuple):
    """A final answer's head."""

    data: bytes
    framing: Framing
    length: int
    "bytes of body to come if ``framing`` is LENGTH"

    keep_alive: bool


_STATUS_LINES: Final = {status.value: b"HTTP/1.1 %d %b\r\n" % (status, status.phrase.encode()) for status in HTTPStatus}


def status_line(status: int) -> bytes:
    """``HTTP/1.1 200 OK`` and its line end; the phrase of an unknown status is empty (RFC 9112 section 4)."""
    return _STATUS_LINES.get(status) or b"HTTP/1.1 %d \r\n" % status


def encode_interim(head: ResponseHead) -> bytes:
    """An answer of 1xx other than 101. Raises ValueError for fields that cannot be sent."""
    # RFC 9110 section 8.6: no Content-Length in it
    fields = [field for field in end_to_end(head.fields) if field[0] != b"content-length"]
    return b"%b%b\r\n" % (status_line(head.status), field_lines(fields))


def encode_switch(head: ResponseHead, method: bytes, protocol: bytes) -> bytes:
    """The head of a 101 to a request that asked for ``protocol`` (RFC 9110 section 7.8), of a 200 to a CONNECT.

    Raises ValueError if it switches to anything else, or for fields that cannot be sent.
    """
    offered = [name.lower() for name in members([(b"upgrade", protocol)], b"upgrade")]
    agreed = members(head.fields, b"upgrade")
    if not agreed or any(name.lower() not in offered for name in agreed):
        raise ValueError("it switches to a protocol that was not asked for")
    fields = [field for field in end_to_end(head.fields) if field[0] != b"content-length"]
    if method == b"CONNECT":
        # RFC 9110 section 9.3.6: any 2xx, and no framing.
        return b"HTTP/1.1 200 Connection Established\r\n%b\r\n" % field_lines(fields)
    fields += [(b"connection", b"Upgrade"), (b"upgrade", b", ".join(agreed))]
    return b"%b%b\r\n" % (status_line(101), field_lines(fields))


def plan_reply(head: ResponseHead, method: bytes) -> tuple[Fields, Framing, int]:
    """A final answer's fields in every version of HTTP, how its body's end is told, and its length if that is LENGTH.

    CHUNKED stands for whatever a version has for bodies of unknown length. Raises ValueError for two lengths.
    """
    status = head.status
    fields = end_to_end(head.fields)
    length = content_length(fields)
    if status in (204, 205):
        # RFC 9110 sections 8.6 and 15.3.6
        fields = [field for field in fields if field[0] != b"content-length"]
        if status == 205:
            fields.append((b"content-length", b"0"))
            return fields, Framing.LENGTH, 0
        return fields, Framing.NONE, 0
    if method == b"HEAD" or status == 304:
        return fields, Framing.NONE, 0
    if length is not None:
        return fields, Framing.LENGTH, length
    return fields, Framing.CHUNKED, 0


def encode_reply(head: ResponseHead, method: bytes, version: bytes, date: bytes, *, keep_alive: bool) -> ReplyHead:
    """A final answer's head to a ``method`` request of HTTP ``version`` ``1.0`` or ``1.1``.

    ``date`` is for an answer that has none (RFC 9110 section 6.6.1). Raises ValueError for two lengths and for fields
    that cannot be sent.
    """
    fields, framing, length = plan_reply(head, method)
    extra = b""
    if head.status == 426 and (offered := members(head.fields, b"upgrade")):
        # RFC 9110 section 15.5.22: it must say to what, and each hop says it anew (section 7.8).
        fields += [(b"connection", b"Upgrade"), (b"upgrade", b", ".join(offered))]
    if framing is Framing.CHUNKED:
        if version == b"1.1":
            extra = b"transfer-encoding: chunked\r\n"
        else:
            framing = Framing.CLOSE
            keep_alive = False
    # RFC 9112 section 9.3: each version has the other's default.
    if not keep_alive:
        extra += b"connection: close\r\n"
    elif version == b"1.0":
        extra += b"connection: keep-alive\r\n"
    if b"date" not in dict(fields):
        extra += b"date: %b\r\n" % date
    return ReplyHead(
        b"%b%b%b\r\n" % (status_line(head.status), field_lines(fields), extra), framing, length, keep_alive
    )


def encode_trailers(trailers: Fields) -> bytes:
    """The last chunk and the trailers (RFC 9112 section 7.1). Raises ValueError for fields that cannot be sent."""
    return b"0\r\n%b\r\n" % field_lines(trailer_fields(trailers)) if trailers else b"0\r\n\r\n"
