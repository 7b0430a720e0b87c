"""The door: a visitor's bytes become requests here, or are refused.

llhttp reads the fields and the chunks and refuses most of what is wrong. What it lets through, found by experiment
with its request parser, is checked here, with the section of RFC 9112 or 9110 beside each check: bare LF and empty
lines before a request, several spaces in the request line, other protocols and versions (HTTP/0.9, HTTP/2.0, RTSP,
ICE), fragments and most characters in a target, transfer codings before ``chunked`` and in HTTP/1.0, white space
after values, Hosts of any number and form, and heads, trailers and chunk extensions of any size.

Two things make that simple. A head is collected whole before llhttp sees it, behind a request line of our own: so the
methods and targets that may pass are for the grammar below to say. And each message is fed to its exact end, so what
follows it is never read as part of it.

Nothing of one ``feed`` is handed over before all of it has been found right.
"""

import re
from functools import lru_cache
from typing import Final, NamedTuple, cast

from httptools import HttpParserError, HttpParserUpgrade, HttpRequestParser

from quictunnel.http.limits import VisitorLimits
from quictunnel.wire.errors import ErrorCode, TunnelError
from quictunnel.wire.fields import (
    TUNNEL_HEADER,
    content_length,
    forward_once,
    parse_host,
    trailer_fields,
    upgrade_protocols,
)
from quictunnel.wire.frames import CONNECT, Fields

__all__ = ["DoorParser", "Request", "count_forward", "malformed", "read_address"]

_CRLF: Final = b"\r\n"
_END_OF_HEAD: Final = b"\r\n\r\n"

# RFC 9112 section 3: exactly one space, and nothing but visible ASCII in a target (RFC 3986 allows still less,
# browsers send more).
_REQUEST_LINE: Final = re.compile(rb"([!#$%&'*+\-.^_`|~0-9A-Za-z]+) ([\x21-\x7e]+) HTTP/1\.([01])\r\n")
# RFC 9112 section 3.2.2; userinfo is refused with every other malformed host (RFC 9110 section 4.2.4).
_ABSOLUTE_FORM: Final = re.compile(rb"https?://([^/?]*)([/?].*)?", re.IGNORECASE)
# RFC 9112 section 3.2.3
_AUTHORITY_FORM: Final = re.compile(rb"[^:\[\]@/?#]+:[0-9]+|\[[^\[\]@/?#]+\]:[0-9]+")
_TOKEN_START: Final = re.compile(rb"[!#$%&'*+\-.^_`|~0-9A-Za-z]")

# What llhttp gets for a request line, whatever the visitor's was.
_NEUTRAL_LINE: Final = b"POST / HTTP/1.1\r\n"
# A request line's bytes beyond its target: the method, the version and the spaces.
_LINE_OVERHEAD: Final = 64
# RFC 9112 section 2.2 asks for one empty line before a request line to be ignored; clients of old sent one after a
# body.
_EMPTY_LINES: Final = 2
# Chunk headers may be this many times the content's size: one-byte chunks are 5 times, extensions without end are an
# attack.
_CHUNK_OVERHEAD: Final = 16

_READ_HERE: Final = frozenset(
    {b"connection", b"content-length", b"host", b"transfer-encoding", b"upgrade", TUNNEL_HEADER}
)
# RFC 9110 section 7.6.2
_COUNTED: Final = frozenset({b"OPTIONS", b"TRACE"})
_HEAD, _LENGTH, _CHUNKED = range(3)


class Request(NamedTuple):
    """A request's head as the visitor sent it, checked."""

    method: bytes
    target: bytes
    "in origin-form or ``*`` (RFC 9112 section 3.2), in authority-form for CONNECT"

    authority: bytes
    "byte-exact from an absolute-form target or from Host; empty for an HTTP/1.0 visitor who gave none"

    host: str
    "of the authority: in lower case, without final dot and port"

    version: bytes
    "``1.0`` or ``1.1``"

    fields: Fields
    "names in lower case, Host and hop-by-hop ones too; Max-Forwards counted down, and no Expect in HTTP/1.0"

    body: bool
    keep_alive: bool
    "whether the visitor lets the connection live on (RFC 9112 section 9.3)"

    protocol: bytes
    "what Upgrade asks for and may have (``upgrade_protocols``), ``connect`` for CONNECT; empty for none"

    tunnel: bytes
    "the value of X-Tunnel-Session, empty for none"


class DoorParser:
    """The requests of one connection, one after another. No socket, clock or log in it."""

    __slots__ = (
        "_body_size",
        "_buffer",
        "_checked",
        "_done",
        "_empty_lines",
        "_fields",
        "_left",
        "_limits",
        "_llhttp",
        "_overhead",
        "_parts",
        "_quiet",
        "_stage",
        "_tail",
        "complete",
        "request",
        "secure",
        "trailers",
    )

    complete: bool
    "the last request has been read to its end, and nothing of the next one has come"
    request: Request | None
    "the head that the last ``feed`` completed, if it did"
    secure: bool
    "an https URL may be asked for: the connection has TLS, or belongs to a proxy that had it"
    trailers: Fields
    "the trailer fields of a complete request"

    def __init__(self, limits: VisitorLimits) -> None:
        self._limits = limits
        self._stage = _HEAD
        self._llhttp = self._new_llhttp()
        self.complete = True
        self.secure = False
        self.request = None
        self.trailers = []

        # of the head under way
        self._buffer = b""
        self._checked = 0  # bytes of it that were looked at
        self._empty_lines = 0

        # of the body under way
        self._left = 0
        self._tail = b""
        self._body_size = 0
        self._overhead = 0
        self._quiet = 0

        # what llhttp said in this feed
        self._fields: Fields = []
        self._parts: list[bytes] = []
        self._done = False

    def feed(self, data: bytes) -> bytes:
        """Read on to the end of a request at most; what comes after it is returned, to be fed when the time has come.

        ``request``, ``take_body()``, ``complete`` and ``trailers`` then tell what came. Raises TunnelError with the
        answer's status; feed nothing more after it.
        """
        self.request = None
        self.complete = False
        if self._stage == _HEAD:
            data = self._feed_head(data)
            if self._stage == _HEAD or not data:
                return data
        if self._stage == _LENGTH:
            return self._feed_length(data)
        return self._feed_chunks(data)

    def take_body(self) -> bytes:
        """The content that the last ``feed`` brought."""
        parts = self._parts
        if not parts:
            return b""
        self._parts = []
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def _new_llhttp(self) -> HttpRequestParser:
        parser = HttpRequestParser(self)
        # Whether another request may follow is for ``_check`` to say: llhttp believes Proxy-Connection too.
        parser.set_dangerous_leniencies(lenient_keep_alive=True)
        return parser

    def close(self) -> None:
        """Let go of llhttp, which refers back; nothing may be fed any more."""
        self._llhttp = cast(HttpRequestParser, None)

    @property
    def in_head(self) -> bool:
        """Whether the bytes so far end within a head."""
        return self._stage == _HEAD and not self.complete

    # Heads

    def _feed_head(self, data: bytes) -> bytes:
        if self._buffer:
            data = self._buffer + data
        if data[:2] == _CRLF:
            data = self._skip_empty_lines(data)
        end = data.find(_END_OF_HEAD, max(0, self._checked - 3))
        size = len(data) if end < 0 else end + len(_END_OF_HEAD)
        if size > self._limits.head_size:
            raise self._too_large(data)
        if end < 0:
            self._check_beginning(data)
            self._buffer = data
            self._checked = size
            return b""
        self._buffer = b""
        self._checked = self._empty_lines = 0
        if size == len(data):
            self._read_head(data)
            return b""
        self._read_head(data[:size])
        return data[size:]

    def _skip_empty_lines(self, data: bytes) -> bytes:
        while data[:2] == _CRLF:
            self._empty_lines += 1
            if self._empty_lines > _EMPTY_LINES:
                raise malformed("it begins with empty lines")
            data = data[2:]
        self._checked = 0
        return data

    def _check_beginning(self, data: bytes) -> None:
        """Refuse at once what can never become a head, so that nobody waits for the rest of it."""
        seen = self._checked
        start = max(0, seen - 1)
        line_ends = data.count(_CRLF, start)
        # The last byte may be the CR of a LF to come.
        if data.count(b"\n", seen) != line_ends or data.count(b"\r", start, -1) != line_ends:
            raise malformed("a line does not end with CR LF")
        if data and data != b"\r" and _TOKEN_START.match(data) is None:
            raise malformed("it does not begin with a method")
        line_end = data.find(_CRLF, 0, self._limits.target_length + _LINE_OVERHEAD)
        if line_end >= 0:
            if line_end + 2 > seen:
                self._read_line(data)
        elif len(data) > self._limits.target_length + _LINE_OVERHEAD:
            raise self._too_large(data)

    def _too_large(self, data: bytes) -> TunnelError:
        if data.find(_CRLF, 0, self._limits.target_length + _LINE_OVERHEAD) < 0:
            return TunnelError(ErrorCode.TARGET_TOO_LONG)
        return TunnelError(ErrorCode.HEAD_TOO_LARGE)

    def _read_line(self, head: bytes) -> re.Match[bytes]:
        line = _REQUEST_LINE.match(head)
        if line is None:
            raise malformed("its request line is not one of HTTP/1.1")
        if len(line[2]) > self._limits.target_length:
            raise TunnelError(ErrorCode.TARGET_TOO_LONG)
        return line

    def _read_head(self, head: bytes) -> None:
        line = self._read_line(head)
        fields: Fields = []
        self._fields = fields
        self._done = False
        try:
            self._llhttp.feed_data(_NEUTRAL_LINE + head[line.end() :])
        except HttpParserUpgrade:
            pass  # llhttp skips the body of a request that asks for an upgrade
        except HttpParserError as error:
            raise _refusal(error) from None
        self.request, length = _check(line, fields, secure=self.secure)
        self._fields = []
        if length == 0:
            if not self._done:
                raise malformed("whether it has a body is in doubt")
            self._complete([])
            return
        if length is None:
            self._stage = _CHUNKED
            self._body_size = self._overhead = self._quiet = 0
        else:
            self._stage = _LENGTH
            self._left = length
        if self._done:
            self._expect_body()

    def _expect_body(self) -> None:
        """Have llhttp read the body it skipped: a server may ignore an upgrade (RFC 9110 section 7.8), never a body."""
        self._llhttp = self._new_llhttp()
        framing = b"Content-Length: %d" % self._left if self._stage == _LENGTH else b"Transfer-Encoding: chunked"
        self._llhttp.feed_data(b"%b%b\r\n\r\n" % (_NEUTRAL_LINE, framing))
        self._fields = []
        self._done = False

    # Bodies

    def _feed_length(self, data: bytes) -> bytes:
        left = self._left
        rest = data[left:]
        if rest:
            data = data[:left]
        self._feed_llhttp(data)
        self._left = left - len(data)
        if not self._left:
            self._complete([])
        return rest

    def _feed_chunks(self, data: bytes) -> bytes:
        """Feed up to each CRLF CRLF: only that can be the end of a chunked body (RFC 9112 section 7.1)."""
        window = self._tail + data
        position = len(self._tail)
        size = len(window)
        while position < size and not self._done:
            # An end past ``position`` began at most three bytes before it.
            found = window.find(_END_OF_HEAD, max(0, position - 3))
            end = size if found < 0 else found + len(_END_OF_HEAD)
            self._feed_llhttp(window[position:end])
            position = end
        self._weigh(len(data))
        if not self._done:
            self._tail = window[-3:]
            return b""
        self._complete(trailer_fields(self._fields))
        return window[position:]

    def _weigh(self, size: int) -> None:
        """Bound what comes between the content: extensions, and trailers, which llhttp collects."""
        content = sum(map(len, self._parts))
        self._body_size += content
        self._overhead += size - content
        self._quiet = 0 if content else self._quiet + size
        if self._quiet > self._limits.head_size:
            raise TunnelError(ErrorCode.HEAD_TOO_LARGE, "The request's trailer section is too large.")
        if self._overhead > self._limits.head_size + _CHUNK_OVERHEAD * self._body_size:
            raise malformed("its chunks hold next to nothing")

    def _feed_llhttp(self, data: bytes) -> None:
        try:
            self._llhttp.feed_data(data)
        except HttpParserError as error:
            raise _refusal(error) from None

    def _complete(self, trailers: Fields) -> None:
        self._stage = _HEAD
        self._fields = []
        self._tail = b""
        self.trailers = trailers
        self.complete = True

    # What llhttp calls

    def on_header(self, name: bytes, value: bytes) -> None:
        # llhttp leaves the white space after a value (RFC 9112 section 5.1).
        self._fields.append((name.lower(), value.rstrip(b" \t")))
        if len(self._fields) > self._limits.head_fields:
            # At once: a read of 256 KB can hold 40,000 of them.
            raise TunnelError(ErrorCode.HEAD_TOO_LARGE, "The request has too many fields.")

    def on_body(self, data: bytes) -> None:
        self._parts.append(data)

    def on_message_complete(self) -> None:
        self._done = True


# The rules of a head


def _check(line: re.Match[bytes], fields: Fields, *, secure: bool) -> tuple[Request, int | None]:
    """The request, and the length of its body: 0 for none, None for a chunked one."""
    method, target, minor = line.groups()
    hosts: list[bytes] = []
    codings: list[bytes] = []
    tunnels: list[bytes] = []
    options = upgrade = b""
    announced = False
    for name, value in fields:
        if name not in _READ_HERE:
            continue
        if name == b"host":
            hosts.append(value)
        elif name == b"connection":
            options = options + b"," + value.lower() if options else value.lower()
        elif name == b"content-length":
            announced = True
        elif name == b"transfer-encoding":
            codings.append(value.lower())
        elif name == b"upgrade":
            upgrade = upgrade + b"," + value if upgrade else value
        else:
            tunnels.append(value)
    length = _body_length(fields, codings, minor) if announced or codings else 0
    target, authority, host = read_address(method, target, hosts, minor, secure=secure)
    if len(tunnels) > 1:
        raise malformed("it names two tunnels")
    fields = count_forward(method, fields)
    if minor == b"0":
        # RFC 9110 section 10.1.1
        fields = [field for field in fields if field[0] != b"expect"]
    wanted = _options(options)
    protocol = b""
    if upgrade and b"upgrade" in wanted and minor == b"1" and length == 0:
        protocol = b", ".join(upgrade_protocols(upgrade))
    keep_alive = b"close" not in wanted if minor == b"1" else b"keep-alive" in wanted and b"close" not in wanted
    if method == b"CONNECT":
        if length != 0 or announced:
            raise malformed("a CONNECT has no body")
        # What follows a CONNECT may be meant for its far end already: after a refusal it must not be read as a request.
        protocol, keep_alive = CONNECT, False
    return (
        Request(
            method=method,
            target=target,
            authority=authority,
            host=host,
            version=b"1.1" if minor == b"1" else b"1.0",
            fields=fields,
            body=length != 0,
            keep_alive=keep_alive,
            protocol=protocol,
            tunnel=tunnels[0] if tunnels else b"",
        ),
        length,
    )


def _body_length(fields: Fields, codings: list[bytes], minor: bytes) -> int | None:
    """RFC 9112 section 6.3 without its leniency: who disagrees on a length can be made to see another request."""
    try:
        length = content_length(fields)
    except ValueError as error:
        raise malformed(str(error)) from None
    if not codings:
        return length
    if length is not None:
        raise malformed("it has both a Content-Length and a Transfer-Encoding")
    if codings != [b"chunked"] or minor == b"0":
        raise malformed("its Transfer-Encoding is not a lone chunked of HTTP/1.1")
    return None


def read_address(
    method: bytes, target: bytes, hosts: list[bytes], minor: bytes, *, secure: bool
) -> tuple[bytes, bytes, str]:
    """The target to pass on, the authority and the host (RFC 9112 sections 3.2 and 3.3). Raises TunnelError."""
    if len(hosts) != 1 and (hosts or minor == b"1"):
        raise malformed("it needs exactly one Host")
    if b"#" in target:
        raise malformed("its target has a fragment")
    authority = hosts[0] if hosts else b""
    address = _host(authority) if hosts else ("", None)
    if method == b"CONNECT":
        if _AUTHORITY_FORM.fullmatch(target) is None:
            raise malformed("the target of a CONNECT is a host and a port")
        host, port = _host(target)
        if hosts and (host != address[0] or address[1] not in (None, port)):
            raise malformed("its target and its Host disagree")
        return target, target, host
    if target[:1] == b"/":
        return target, authority, address[0]
    if target == b"*":
        if method != b"OPTIONS":
            raise malformed("only OPTIONS has the target *")
        return target, authority, address[0]
    absolute = _ABSOLUTE_FORM.fullmatch(target)
    if absolute is None:
        raise malformed("its target is neither a path nor an http URL")
    named = _host(absolute[1])
    if hosts and named != address:
        raise malformed("its target and its Host disagree")
    if not secure and target[:5].lower() == b"https":
        # RFC 9110 section 7.4: an https resource is to be had over TLS alone.
        raise TunnelError(ErrorCode.MISDIRECTED, "An https URL cannot be asked for without TLS.")
    return _origin_form(method, absolute[2] or b""), absolute[1], named[0]


def count_forward(method: bytes, fields: Fields) -> Fields:
    """The fields with Max-Forwards counted down, where it means anything (RFC 9110 section 7.6.2).

    Raises TunnelError for a count that is none, or that ends here.
    """
    if method not in _COUNTED:
        return fields
    try:
        forwarded = forward_once(fields)
    except ValueError as error:
        raise malformed(str(error)) from None
    if forwarded is None:
        name = method.decode("ascii")
        raise TunnelError(ErrorCode.NOT_IMPLEMENTED, f"Max-Forwards ends the {name} here, where it has no answer.")
    return forwarded


def _origin_form(method: bytes, target: bytes) -> bytes:
    if not target:
        return b"*" if method == b"OPTIONS" else b"/"
    return target if target[:1] == b"/" else b"/" + target


@lru_cache(maxsize=1024)  # a server has few names; a head's limit bounds what each costs
def _host(authority: bytes) -> tuple[str, int | None]:
    try:
        return parse_host(authority)
    except ValueError as error:
        raise malformed(str(error)) from None


def _options(value: bytes) -> list[bytes]:
    if b"," not in value:
        return [value]
    return [option.strip(b" \t") for option in value.split(b",")]


def _refusal(error: HttpParserError) -> TunnelError:
    """What llhttp says is wrong, or what one of our callbacks said through it."""
    cause = error.__context__
    return cause if isinstance(cause, TunnelError) else malformed(str(error))


def malformed(what: str) -> TunnelError:
    """What a visitor is told of a request that breaks the grammar of HTTP."""
    return TunnelError(ErrorCode.BAD_REQUEST, f"The request is malformed: {what}.")
