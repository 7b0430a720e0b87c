"""A backend's answers: bytes in, checked frames out. No socket, clock or log in it.

llhttp does the reading and refuses most of what is wrong. What its response parser lets through, found by experiment,
is checked here: empty lines or another protocol's name before a status line, HTTP/0.9 and 2.0, a status under 100,
control bytes in the reason phrase, transfer codings other than one ``chunked``, any of them in an HTTP/1.0 answer, a
101 that nobody asked for, interim answers without end, white space after a field's value, bytes after the end, heads
and trailers of any size.

The frames of one ``feed`` are handed over together or not at all: what is wrong at the end of a read spoils all of it.
"""

import re
from typing import Final, NoReturn

from httptools import HttpParserError, HttpParserUpgrade, HttpResponseParser

from quictunnel.wire.errors import ErrorCode, TunnelError
from quictunnel.wire.fields import content_length, end_to_end, members
from quictunnel.wire.frames import CONNECT, Data, End, Fields, Frame, ResponseHead

__all__ = ["AnswerParser"]

_OPENING: Final = b"HTTP/1."
_END_OF_HEAD: Final = b"\r\n\r\n"
_CONTROL: Final = re.compile(rb"[\x00-\x08\x0a-\x1f\x7f]")
_END: Final = End()
_NO_FRAMES: Final[list[Frame]] = []
# Enough to tell an empty line from two: bytes of the end of what came before that are remembered.
_TAIL: Final = 6
# Trailers must not change the message they follow (RFC 9110 section 6.5.1).
_NOT_IN_TRAILERS: Final = frozenset(
    {b"content-encoding", b"content-length", b"content-range", b"content-type", b"host", b"trailer"}
)


class AnswerParser:
    """The answers of one connection, one after another: ``expect`` each, then ``feed`` until it is ``complete``."""

    __slots__ = (
        "_bodiless",
        "_chunked",
        "_collected",
        "_fields",
        "_fields_limit",
        "_frames",
        "_head_method",
        "_interim_size",
        "_is_connect",
        "_opening",
        "_parser",
        "_parts",
        "_protocol",
        "_size_limit",
        "_switched",
        "_tail",
        "_until_end",
        "complete",
        "head_seen",
        "keep_alive",
        "started",
    )

    complete: bool
    "the final answer has been read to its end"
    head_seen: bool
    "the final head has been read"
    keep_alive: bool
    "whether the connection may carry another exchange; meaningful once complete"
    started: bool
    "any byte of an answer has come"

    def __init__(self, *, size_limit: int, fields_limit: int) -> None:
        """``size_limit`` bounds a head or a trailer section in bytes, ``fields_limit`` the number of its fields.

        All interim answers to one request have ``size_limit`` together.
        """
        self._size_limit = size_limit
        self._fields_limit = fields_limit
        self._parser = HttpResponseParser(self)
        self._fields: Fields = []
        self._frames: list[Frame] = []
        self._parts: list[bytes] = []
        self.expect(b"", b"")
        self.complete = True

    # What the connection calls

    def expect(self, method: bytes, protocol: bytes) -> None:
        """Get ready for the answer to a ``method`` request that asked for ``protocol`` by Upgrade, empty for none.

        A 2xx answer to CONNECT comes as a 101, and what follows it as opaque bytes.
        """
        self._is_connect = method == b"CONNECT"
        self._head_method = method == b"HEAD"
        self._protocol = protocol
        self._collected = 0
        self._interim_size = 0
        self._opening = b""
        self._tail = b""
        self._bodiless = False
        self._chunked = False
        self._switched = False
        self._until_end = False
        self.started = False
        self.head_seen = False
        self.complete = False
        self.keep_alive = False

    def feed(self, data: bytes) -> list[Frame]:
        """The frames that ``data`` completes; after a ResponseHead of 101 it holds the opaque bytes that came with it.

        Raises TunnelError (HTTP_PROTOCOL_ERROR); feed nothing more after it.
        """
        frames: list[Frame] = []
        self._frames = frames
        # Of a status line that begins as it must, the tenth byte is the status's first.
        if not self.head_seen and (self.started or self._is_connect or data[9:10] in (b"", b"1")):
            data = self._feed_heads(data)
            if self._switched:
                if data:
                    frames.append(Data(data))
                data = b""
        self.started = True
        if data:
            self._feed(data)
        # Let go of them: a connection that waits must not keep up to 256 KB of a body that has long gone out.
        self._frames = _NO_FRAMES
        return frames

    def end(self) -> list[Frame]:
        """The backend closed its side in good order: what that completes (RFC 9112 section 6.3, rule 8).

        Raises TunnelError (CONNECTION_TERMINATED) for an answer that lacks its rest.
        """
        if self._until_end:
            self.complete = True
            return [_END]
        if not self.started:
            what = "the backend closed the connection before it answered"
        elif not self.head_seen:
            what = "the backend closed the connection within its answer's head"
        else:
            what = "the backend closed the connection within its answer's body"
        raise TunnelError(ErrorCode.CONNECTION_TERMINATED, what)

    # What llhttp calls

    def on_message_begin(self) -> None:
        if self.complete:
            raise _wrong("bytes follow the end of its answer")

    def on_status(self, reason: bytes) -> None:
        # RFC 9112 section 4
        if _CONTROL.search(reason) is not None:
            raise _wrong("control bytes in its status line")

    def on_header(self, name: bytes, value: bytes) -> None:
        # llhttp leaves white space after the value (RFC 9112 section 5.1).
        self._fields.append((name.lower(), value.rstrip(b" \t")))
        if len(self._fields) > self._fields_limit:
            # At once: a read of 256 KB can hold 40,000 of them.
            raise _wrong("a head or trailer section of its answer is too large")

    def on_headers_complete(self) -> None:
        status = self._parser.get_status_code()
        fields = self._fields
        self._fields = []
        if status < 200:
            # Credit is for bodies: nothing else bounds what a backend says before its answer.
            self._interim_size += self._collected
            if self._interim_size > self._size_limit:
                raise _wrong("its interim answers have no end")
        if self._collected > self._size_limit and _size(fields) > self._size_limit:
            raise _wrong("the head of its answer is too large")
        self._collected = 0
        if status < 200:
            self._interim(status, fields)
        else:
            self._final(status, fields)

    def on_body(self, data: bytes) -> None:
        if not self.complete:
            self._parts.append(data)

    def on_message_complete(self) -> None:
        if not self.head_seen:
            return  # an interim answer
        if not self.complete:
            self.complete = True
            self.keep_alive = self._parser.should_keep_alive()
        elif self._chunked:
            self.keep_alive = False  # chunks after the head of an answer to HEAD

    # What is fed to it

    def _feed_heads(self, data: bytes) -> bytes:
        """Feed heads one by one, up to the final one: each is looked at from its beginning. What is left after it."""
        self.started = True
        while data and not self.head_seen:
            tail = self._tail[-3:]
            found = (tail + data).find(_END_OF_HEAD)
            end = len(data) if found < 0 else found + len(_END_OF_HEAD) - len(tail)
            self._feed(data[:end])
            if found >= 0 and not self.head_seen:
                self._opening = self._tail = b""
            data = data[end:]
        if data and self.complete and not self._switched:
            # It had no body, or could not have one.
            if not self._bodiless:
                raise _wrong("bytes follow the end of its answer")
            self.keep_alive = False
            return b""
        return data

    def _feed(self, data: bytes) -> None:
        if len(self._opening) < len(_OPENING):
            self._check_opening(data)
        self._collected += len(data)
        try:
            self._parser.feed_data(data)
        except HttpParserUpgrade:
            self._switched = True
            return
        except HttpParserError as error:
            # Bytes after an answer that cannot have a body were never part of it (RFC 9112 section 6.3, rule 1).
            if not (self.complete and self._bodiless):
                self._refuse(error)
            self.keep_alive = False
        self._collect(data)

    # Heads

    def _check_opening(self, data: bytes) -> None:
        # llhttp skips empty lines before a status line, and knows RTSP and ICE (RFC 9112 section 2.1).
        self._opening += data[: len(_OPENING) - len(self._opening)]
        if not _OPENING.startswith(self._opening):
            raise _wrong("its answer does not begin with an HTTP/1.1 status line")

    def _interim(self, status: int, fields: Fields) -> None:
        if status < 100 or self._parser.get_http_version() != "1.1":
            raise _wrong("its status line is malformed")
        # Neither may be in an interim answer, and neither means anything there (RFC 9110 sections 8.6 and 15.2).
        plain = _unframed(end_to_end(fields))
        if status == 101:
            plain.append((b"upgrade", self._agreed_protocol(fields)))
            self.head_seen = True
        self._frames.append(ResponseHead(status, plain))

    def _agreed_protocol(self, fields: Fields) -> bytes:
        # Only to what was asked for, and only when asked (RFC 9110 section 7.8).
        offered = members([(b"upgrade", self._protocol.lower())], b"upgrade")
        agreed = members(fields, b"upgrade")
        if not agreed or any(name.lower() not in offered for name in agreed):
            raise _wrong("it switches to a protocol that was not asked for")
        return b", ".join(agreed)

    def _final(self, status: int, fields: Fields) -> None:
        version = self._parser.get_http_version()
        if version != "1.1" and version != "1.0":
            raise _wrong("the version of its answer is neither HTTP/1.1 nor HTTP/1.0")
        self.head_seen = True
        if self._is_connect and status < 300:
            # RFC 9110 section 9.3.6: whatever framing it has means nothing.
            self._switched = True
            self._frames.append(ResponseHead(101, [*_unframed(end_to_end(fields)), (b"upgrade", CONNECT)]))
            return
        self._bodiless = self._head_method or status == 204 or status == 304
        index = dict(fields)
        if b"transfer-encoding" in index:
            self._check_coding(fields, version)
        elif b"content-length" in index:
            _check_length(fields)
        elif not self._bodiless:
            self._until_end = True
        kept = end_to_end(fields)
        if status == 204:
            # RFC 9110 section 8.6
            kept = _unframed(kept)
        elif status == 426:
            # RFC 9110 section 15.5.22: it must say to what.
            kept += [field for field in fields if field[0] == b"upgrade"]
        self._frames.append(ResponseHead(status, kept))
        if self._head_method:
            # llhttp cannot be told of HEAD and would wait for the body that the fields announce.
            self.complete = True
            closing = version == "1.0" or b"close" in members(_lower(fields), b"connection")
            self.keep_alive = not closing

    def _check_coding(self, fields: Fields, version: str) -> None:
        # RFC 9112 section 6.1: a lone chunked is all that this connection can take apart, and HTTP/1.0 has no codings.
        codings = [value.lower() for name, value in fields if name == b"transfer-encoding"]
        if codings != [b"chunked"] or version != "1.1":
            raise _wrong("the transfer coding of its answer is not a lone chunked")
        self._chunked = True

    # The end of each feed

    def _collect(self, data: bytes) -> None:
        parts = self._parts
        if parts:
            self._parts = []
            self._frames.append(Data(parts[0] if len(parts) == 1 else b"".join(parts)))
        if self.complete:
            self._finish(data, parts)
            return
        self._tail = (self._tail + data[-_TAIL:])[-_TAIL:]
        # Only heads, trailers and chunk headers give no body bytes: nothing of theirs may grow without end.
        if parts:
            self._collected = 0
        elif self._collected > self._size_limit:
            raise _wrong("a head or trailer section of its answer is too large")

    def _finish(self, data: bytes, parts: list[bytes]) -> None:
        if not self._ends_exactly(data, parts):
            if not self._bodiless:
                raise _wrong("bytes follow the end of its answer")
            self.keep_alive = False
        if self._head_method:
            self._parser = HttpResponseParser(self)
        self._frames.append(End(self._trailers()) if self._fields else _END)

    def _ends_exactly(self, data: bytes, parts: list[bytes]) -> bool:
        # llhttp skips line ends between messages without a word.
        if parts and not self._chunked:
            return data.endswith(parts[-1])
        tail = data if len(data) >= _TAIL else self._tail + data
        return tail.endswith(b"\r\n\r\n") and not tail.endswith(b"\r\n\r\n\r\n")

    def _trailers(self) -> Fields:
        fields = self._fields
        self._fields = []
        return [field for field in end_to_end(fields) if field[0] not in _NOT_IN_TRAILERS]

    def _refuse(self, error: HttpParserError) -> NoReturn:
        cause = error.__context__
        if isinstance(cause, TunnelError):
            raise cause
        if self.complete:
            raise _wrong("bytes follow the end of its answer") from None
        raise _wrong(str(error)) from None


def _check_length(fields: Fields) -> None:
    try:
        content_length(fields)
    except ValueError as error:
        raise _wrong(str(error)) from None


def _unframed(fields: Fields) -> Fields:
    return [field for field in fields if field[0] != b"content-length"]


def _lower(fields: Fields) -> Fields:
    return [(name, value.lower()) for name, value in fields]


def _size(fields: Fields) -> int:
    return sum(len(name) + len(value) + len(b": \r\n") for name, value in fields)


def _wrong(what: str) -> TunnelError:
    return TunnelError(ErrorCode.HTTP_PROTOCOL_ERROR, f"the backend broke HTTP/1.1: {what}")
