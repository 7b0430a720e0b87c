"""Frames to bytes and back: one stream of an exchange.

The layout is HTTP/3's (RFC 9114 section 7.1): type varint, length varint, payload. HEADERS carries a QPACK field
section (RFC 9204) that uses the static table only, so no stream ever waits for another; DATA carries body bytes; a
second HEADERS after the body is the trailers; FIN ends the direction. Frames of unknown types are skipped (RFC 9114
section 9).

Whether a request has a body is said, never guessed: HEADERS that FIN follows has none, HEADERS that DATA follows has
one, be that DATA empty. The sender puts one or the other into the same flight as HEADERS, so the receiver loses
nothing by waiting for it.

Which frame may follow which, as a table of (state, frame):

    state      HEADERS                       DATA        FIN
    HEAD       1xx: HEAD, final: BODY        error       error
    BODY       END (they are the trailers)   BODY        END
    END        error                         error       END
"""

import re
from enum import IntEnum
from typing import Final

import pylsqpack

from quictunnel.wire.errors import ProtocolError
from quictunnel.wire.frames import CONNECT, PROBE, Data, End, Fields, Frame, RequestHead, ResponseHead

__all__ = ["FrameType", "StreamDecoder", "encode_data", "encode_head", "encode_trailers", "pull_varint", "push_varint"]


class FrameType(IntEnum):
    """Frame types on a stream of an exchange; CONTROL and CREDIT live on the control stream only."""

    DATA = 0x00
    HEADERS = 0x01
    CONTROL = 0x32
    CREDIT = 0x33


# RFC 9112 section 3.2.3
_AUTHORITY_FORM: Final = re.compile(rb"[^/?#@\s]+:[0-9]+")
_DATA: Final = int(FrameType.DATA)
_HEADERS: Final = int(FrameType.HEADERS)
# What a frame of an unknown type, or a control frame on an exchange's stream, may announce before it is an attack.
_SKIP_LIMIT: Final = 1 << 20

# A field section that is no larger cannot become more than some 400 kB: an index of one byte stands for 100 at most.
_SMALL_SECTION: Final = 4096

EMPTY_DATA: Final = b"\x00\x00"

# Each section is complete in itself (dynamic table capacity 0), so one encoder and one decoder serve every stream.
_encoder = pylsqpack.Encoder()
_decoder = pylsqpack.Decoder(0, 0)


# Variable-length integers (RFC 9000 section 16)


def push_varint(value: int) -> bytes:
    """Encode ``value``; raises ValueError when it is negative or over 2**62 - 1."""
    if 0 <= value < 0x40:
        return value.to_bytes(1, "big")
    if 0 <= value < 0x4000:
        return (value | 0x4000).to_bytes(2, "big")
    if 0 <= value < 0x40000000:
        return (value | 0x80000000).to_bytes(4, "big")
    if 0 <= value < 0x4000000000000000:
        return (value | 0xC000000000000000).to_bytes(8, "big")
    raise ValueError(f"{value} does not fit a variable-length integer")


def pull_varint(data: bytes, position: int) -> tuple[int, int]:
    """The integer at ``position`` and where it ends; an end of -1 when bytes are missing."""
    if position >= len(data):
        return 0, -1
    first = data[position]
    if first < 0x40:
        return first, position + 1
    length = 1 << (first >> 6)
    end = position + length
    if end > len(data):
        return 0, -1
    return int.from_bytes(data[position:end], "big") & ((1 << (8 * length - 2)) - 1), end


# Encoding


def _section(fields: Fields) -> bytes:
    # The encoder-stream bytes of a static-only encoder are always empty.
    payload = _encoder.encode(0, fields)[1]
    return b"\x01" + push_varint(len(payload)) + payload


def encode_head(head: RequestHead | ResponseHead) -> bytes:
    """The HEADERS frame of a head (RFC 9114 section 4.3); without a request's FIN or DATA."""
    if type(head) is ResponseHead:
        return _section([(b":status", b"%d" % head.status), *head.fields])
    assert type(head) is RequestHead
    pseudo = [
        (b":method", head.method),
        (b":scheme", head.scheme),
        (b":authority", head.authority),
        (b":path", head.target),
    ]
    if head.protocol:
        pseudo.append((b":protocol", head.protocol))
    return _section(pseudo + head.fields)


def encode_trailers(trailers: Fields) -> bytes:
    """The HEADERS frame of a trailer section."""
    return _section(trailers)


def encode_data(data: bytes | memoryview) -> bytes:
    """The type and length of a DATA frame; the payload follows it, uncopied."""
    return b"\x00" + push_varint(len(data))


# Decoding


class _State(IntEnum):
    HEAD = 0
    BODY = 1
    END = 2


class StreamDecoder:
    """One direction of one stream: bytes in, frames out, and for any garbage a ProtocolError."""

    __slots__ = (
        "_buffer",
        "_held",
        "_is_request",
        "_left",
        "_limit",
        "_room",
        "_skip",
        "_state",
        "_trailers",
        "_wanted",
    )

    def __init__(self, *, is_request: bool, head_limit: int) -> None:
        """``head_limit`` bounds an encoded field section, in bytes: nothing larger is ever collected.

        It also bounds what a section is when it is decoded, and all heads of a response together: no credit holds
        those back.
        """
        self._is_request = is_request
        self._limit = head_limit
        self._room = head_limit  # for heads
        self._buffer = bytearray()
        self._wanted = 0  # how much the buffer must hold before it is worth another look
        self._state = _State.HEAD
        self._left = 0  # bytes missing of the DATA frame under way
        self._skip = 0  # bytes missing of an unknown frame under way
        self._held: RequestHead | None = None  # until it is known whether a body follows
        self._trailers: Fields | None = None

    def feed(self, data: bytes, fin: bool) -> list[Frame]:
        """The frames that ``data`` completes. Raises ProtocolError; feed nothing more after it."""
        frames: list[Frame] = []
        if self._buffer:
            self._buffer += data
            if len(self._buffer) < self._wanted:
                if fin:
                    self._finish(frames)
                return frames
            data = bytes(self._buffer)
            self._buffer.clear()
        position = 0
        size = len(data)
        while position < size:
            if self._left:
                chunk = data[position : position + self._left] if position or self._left < size else data
                position += len(chunk)
                self._left -= len(chunk)
                frames.append(Data(chunk))
                continue
            if self._skip:
                step = min(self._skip, size - position)
                self._skip -= step
                position += step
                continue
            kind, after = pull_varint(data, position)
            length, start = pull_varint(data, after) if after >= 0 else (0, -1)
            if start < 0:
                self._buffer += data[position:]
                self._wanted = 0
                break
            if kind == _HEADERS:
                if length > self._limit:
                    raise ProtocolError(f"a field section of {length} bytes is over the limit of {self._limit}")
                end = start + length
                if end > size:
                    self._buffer += data[position:]
                    self._wanted = end - position
                    break
                self._headers(data[start:end], frames)
                position = end
            elif kind == _DATA:
                self._body(length, frames)
                position = start
            else:
                if length > _SKIP_LIMIT:
                    raise ProtocolError(f"a frame of unknown type {kind:#x} announces {length} bytes")
                self._skip = length
                position = start
        if fin:
            self._finish(frames)
        return frames

    def _headers(self, payload: bytes, frames: list[Frame]) -> None:
        try:
            fields = _decoder.feed_header(0, payload)[1]
        except pylsqpack.StreamBlocked:
            # The decoder remembers a blocked section under its stream id; with a dynamic table of 0 it can never be
            # completed.
            _reset_decoder()
            raise ProtocolError("a field section refers to a dynamic table") from None
        except (pylsqpack.DecompressionFailed, ValueError) as error:
            raise ProtocolError(f"a field section cannot be decoded: {error}") from None
        if len(payload) > _SMALL_SECTION:
            decoded = sum(len(name) + len(value) for name, value in fields)
            if decoded > self._limit:
                raise ProtocolError(f"a field section of {decoded} bytes is over the limit of {self._limit}")
        if self._state is _State.HEAD:
            if self._is_request:
                self._held = _request_head(fields)
                self._state = _State.BODY
            else:
                response = _response_head(fields)
                if response.status >= 200 or response.status == 101:
                    self._state = _State.BODY
                else:
                    self._room -= len(payload)
                    if self._room < 0:
                        raise ProtocolError("the informational heads are over the limit")
                frames.append(response)
        elif self._state is _State.BODY and self._trailers is None:
            if any(name[:1] == b":" for name, _ in fields):
                raise ProtocolError("a trailer section holds a pseudo-header field")
            self._release(frames)
            self._trailers = fields
        else:
            raise ProtocolError("HEADERS after the trailers")

    def _body(self, length: int, frames: list[Frame]) -> None:
        if self._state is not _State.BODY or self._trailers is not None:
            raise ProtocolError("DATA where none may be")
        self._release(frames)
        self._left = length

    def _release(self, frames: list[Frame]) -> None:
        if self._held is not None:
            frames.append(self._held._replace(body=True))
            self._held = None

    def _finish(self, frames: list[Frame]) -> None:
        if self._buffer or self._left or self._skip:
            raise ProtocolError("the stream ends within a frame")
        if self._state is _State.HEAD:
            raise ProtocolError("the stream ends before its head")
        if self._state is _State.END:
            return
        self._state = _State.END
        if self._held is not None:
            frames.append(self._held)
            self._held = None
        frames.append(End(self._trailers) if self._trailers else _END)


_END: Final = End()


def _reset_decoder() -> None:
    global _decoder
    _decoder = pylsqpack.Decoder(0, 0)


_PROBE_FIELDS: Final = [
    (b":method", PROBE.method),
    (b":scheme", PROBE.scheme),
    (b":authority", PROBE.authority),
    (b":path", PROBE.target),
]


def _request_head(fields: Fields) -> RequestHead:
    # The shape that encode_head makes, which is every well-behaved peer's: checked by position, without a loop.
    if len(fields) >= 4:
        (n0, method), (n1, scheme), (n2, authority), (n3, target) = fields[:4]
        if n0 == b":method" and n1 == b":scheme" and n2 == b":authority" and n3 == b":path":
            rest = fields[4:]
            protocol = b""
            if rest and rest[0][0] == b":protocol":
                protocol = rest[0][1]
                del rest[0]
            if scheme not in (b"http", b"https"):
                if fields == _PROBE_FIELDS:
                    return PROBE
                raise ProtocolError("a request's :scheme is neither http nor https")
            # In absolute-form a backend that is also a proxy would go elsewhere.
            if method and (target[:1] == b"/" or target == b"*" or _is_connect(method, target, protocol)):
                _check_names(rest)
                return RequestHead(method, scheme, authority, target, rest, False, protocol)
    raise ProtocolError("a request needs :method, :scheme, :authority and an absolute :path or *, in this order")


def _is_connect(method: bytes, target: bytes, protocol: bytes) -> bool:
    # Anything else that is not a path would make a backend that is a proxy go where the server says.
    return method == b"CONNECT" and protocol == CONNECT and _AUTHORITY_FORM.fullmatch(target) is not None


def _response_head(fields: Fields) -> ResponseHead:
    if not fields or fields[0][0] != b":status":
        raise ProtocolError("a response needs :status first")
    word = fields[0][1]
    if len(word) != 3 or not word.isdigit() or not 100 <= int(word) <= 999:
        raise ProtocolError(f"a response's :status is {word[:16]!r}")
    rest = fields[1:]
    _check_names(rest)
    return ResponseHead(int(word), rest)


def _check_names(fields: Fields) -> None:
    for name, _ in fields:
        if not name or name[0] == 0x3A:
            raise ProtocolError(f"a pseudo-header field {name[:32]!r} where none may be")
