"""The gate that HTTP/2 bytes pass before anything acts on them: whole frames out, in order, and not too many idle ones.

``h2`` reads frames by itself, but takes a read as a whole: when its last frame is wrong, what the others said is lost.
And it has no opinion on how often a peer may send what costs us work and the peer nothing. So frames are cut here
(RFC 9113 section 4.1), one is handled at a time, and two allowances are kept:

    resets    streams opened and given up (CVE-2023-44487), or that had to be given up because of what the peer sent
    chores    PING, SETTINGS, PRIORITY, WINDOW_UPDATE, unknown frames, DATA that brings nothing and CONTINUATION that
              brings little (RFC 9113 section 10.5); WINDOW_UPDATE is earned back by the DATA it answers

No socket and no clock in it.
"""

from collections.abc import Iterator
from typing import Final, NamedTuple

from h2.errors import ErrorCodes

__all__ = [
    "DATA",
    "GOAWAY",
    "HEADERS",
    "PREFACE",
    "PRIORITY",
    "RST_STREAM",
    "SETTINGS",
    "SUBSTANCE",
    "Allowance",
    "FrameGate",
    "Http2Error",
    "RawFrame",
    "goaway_frame",
    "known_settings",
    "ping_frame",
    "window_frame",
]

PREFACE: Final = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
"what a client's connection begins with (RFC 9113 section 3.4)"

FRAME_SIZE: Final = 16_384
"bytes of a payload: SETTINGS_MAX_FRAME_SIZE's initial value, which is never raised (RFC 9113 section 4.2)"

DATA, HEADERS, PRIORITY, RST_STREAM, SETTINGS, PUSH_PROMISE, PING, GOAWAY, WINDOW_UPDATE, CONTINUATION = range(10)

SUBSTANCE: Final = 1024
"bytes of a payload that cost their sender more than us"

_HEADER_SIZE: Final = 9
_ACK: Final = 0x1
_END_HEADERS: Final = 0x4
_PRIORITY_SIZE: Final = 5
_GOAWAY_SIZE: Final = 8
_SETTING_SIZE: Final = 6
# RFC 9113 section 6.5.2, and ENABLE_CONNECT_PROTOCOL of RFC 8441.
_SETTINGS_KNOWN: Final = frozenset({1, 2, 3, 4, 5, 6, 8})

# nghttp2's defaults for streams that are reset; the burst of chores is Go's limit of queued control frames.
_RESETS: Final = (1000, 33.0)
_CHORES: Final = (10_000, 100.0)
# A receiver may answer each DATA frame by a WINDOW_UPDATE for its stream and one for the connection.
_EARNED: Final = 2


class Http2Error(Exception):
    """The peer broke HTTP/2, or asks for too much: the connection ends with ``code`` (RFC 9113 section 7)."""

    def __init__(self, code: int, text: str) -> None:
        self.code = code
        self.text = text
        super().__init__(code, text)

    def __str__(self) -> str:
        return self.text


class Allowance:
    """So many at once, and so many a second in the long run."""

    __slots__ = ("_burst", "_left", "_rate", "_since")

    def __init__(self, burst: float, rate: float) -> None:
        self._burst = burst
        self._rate = rate
        self._left = burst
        self._since: float | None = None

    def spend(self, now: float) -> bool:
        """Take one at ``now``, in seconds of any clock that never goes back; whether there was one."""
        since, self._since = self._since, now
        if since is not None:
            self._left = min(self._burst, self._left + (now - since) * self._rate)
        self._left -= 1
        return self._left >= 0

    def earn(self, count: int) -> None:
        """Give back ``count``, up to the burst."""
        self._left = min(self._burst, self._left + count)


class RawFrame(NamedTuple):
    """One frame as it came."""

    kind: int
    "its type; -1 for the preface"

    stream_id: int
    raw: bytes
    "header and payload"


class FrameGate:
    """Bytes of one connection in, frames out, and Http2Error for what no peer may send."""

    __slots__ = ("_block", "_block_limit", "_buffer", "_chores", "_preface", "_resets", "_started")

    def __init__(self, *, is_server: bool, block_limit: int) -> None:
        """``block_limit`` bounds one encoded field section, in bytes over all its frames."""
        self._buffer = b""
        self._preface = is_server
        self._started = False
        self._block: int | None = None  # bytes of the field section under way
        self._block_limit = block_limit
        self._resets = Allowance(*_RESETS)
        self._chores = Allowance(*_CHORES)

    @property
    def is_waiting(self) -> bool:
        """Whether the bytes so far end within the preface, a frame or a field section."""
        return self._preface or self._block is not None or bool(self._buffer)

    def feed(self, data: bytes, now: float) -> Iterator[RawFrame]:
        """The frames that ``data`` completes; ``now`` is in seconds. Raises Http2Error; feed nothing more after it.

        Each is looked at only when it is asked for: what came before a wrong one counts.
        """
        if self._buffer:
            data = self._buffer + data
            self._buffer = b""
        position = 0
        if self._preface:
            start = data[: len(PREFACE)]
            if not PREFACE.startswith(start):
                raise Http2Error(ErrorCodes.PROTOCOL_ERROR, "it does not begin with the preface of HTTP/2")
            if len(start) < len(PREFACE):
                self._buffer = data
                return
            self._preface = False
            yield RawFrame(-1, 0, start)
            position = len(PREFACE)
        size = len(data)
        while size - position >= _HEADER_SIZE:
            length = int.from_bytes(data[position : position + 3], "big")
            if length > FRAME_SIZE:
                raise Http2Error(ErrorCodes.FRAME_SIZE_ERROR, f"a frame of {length} bytes")
            end = position + _HEADER_SIZE + length
            kind, flags = data[position + 3], data[position + 4]
            if not self._started:
                # Before its payload is waited for: whatever this is, it is not HTTP/2 (RFC 9113 section 3.4).
                if kind != SETTINGS or flags & _ACK:
                    raise Http2Error(ErrorCodes.PROTOCOL_ERROR, "its first frame is not SETTINGS")
                self._started = True
            if end > size:
                break
            stream_id = int.from_bytes(data[position + 5 : position + 9], "big") & 0x7FFF_FFFF
            self._check(kind, stream_id, length)
            self._count(kind, flags, length, now)
            yield RawFrame(kind, stream_id, data[position:end])
            position = end
        if position < size:
            self._buffer = data[position:]

    def reset(self, now: float) -> None:
        """A stream was given up because of what the peer sent. Raises Http2Error when there were too many."""
        if not self._resets.spend(now):
            raise Http2Error(ErrorCodes.ENHANCE_YOUR_CALM, "too many streams were reset")

    def chore(self, now: float) -> None:
        """The peer made work for nothing. Raises Http2Error when that was too often."""
        if not self._chores.spend(now):
            raise Http2Error(ErrorCodes.ENHANCE_YOUR_CALM, "too many frames that carry nothing")

    def sent_data(self) -> None:
        """A DATA frame went out that was worth its while."""
        self._chores.earn(_EARNED)

    def _check(self, kind: int, stream_id: int, length: int) -> None:
        """What ``h2`` would have to say of the frames that it never gets (RFC 9113 sections 6.3 and 6.8)."""
        if self._block is not None and kind != CONTINUATION:
            raise Http2Error(ErrorCodes.PROTOCOL_ERROR, "a frame within a field section")  # RFC 9113 section 4.3
        if kind == PRIORITY:
            if not stream_id:
                raise Http2Error(ErrorCodes.PROTOCOL_ERROR, "a PRIORITY for no stream")
            if length != _PRIORITY_SIZE:
                raise Http2Error(ErrorCodes.FRAME_SIZE_ERROR, f"a PRIORITY of {length} bytes")
        elif kind == GOAWAY:
            if stream_id:
                raise Http2Error(ErrorCodes.PROTOCOL_ERROR, "a GOAWAY for one stream")
            if length < _GOAWAY_SIZE:
                raise Http2Error(ErrorCodes.FRAME_SIZE_ERROR, f"a GOAWAY of {length} bytes")

    def _count(self, kind: int, flags: int, length: int, now: float) -> None:
        if kind == HEADERS:
            self._block = length
        elif kind == CONTINUATION and self._block is not None:
            self._block += length
            if length < SUBSTANCE:
                self.chore(now)
        elif kind == RST_STREAM:
            self.reset(now)
        elif kind != DATA:
            self.chore(now)
        if self._block is not None and kind in (HEADERS, CONTINUATION):
            if self._block > self._block_limit:
                raise Http2Error(ErrorCodes.ENHANCE_YOUR_CALM, "a field section is too large")
            if flags & _END_HEADERS:
                self._block = None


def goaway_frame(last_stream_id: int, code: int) -> bytes:
    """A GOAWAY without debug data (RFC 9113 section 6.8)."""
    payload = last_stream_id.to_bytes(4, "big") + code.to_bytes(4, "big")
    return len(payload).to_bytes(3, "big") + bytes((GOAWAY, 0)) + bytes(4) + payload


def ping_frame(payload: bytes) -> bytes:
    """A PING with these eight bytes (RFC 9113 section 6.7)."""
    return len(payload).to_bytes(3, "big") + bytes((PING, 0)) + bytes(4) + payload


def window_frame(size: int) -> bytes:
    """A WINDOW_UPDATE for the connection (RFC 9113 section 6.9)."""
    return (4).to_bytes(3, "big") + bytes((WINDOW_UPDATE, 0)) + bytes(4) + size.to_bytes(4, "big")


def known_settings(frame: RawFrame) -> bytes:
    """A SETTINGS frame without the settings that nobody here knows, which are to be ignored (RFC 9113 section 6.5.2).

    ``h2`` keeps each of the 65,536 that there may be, and walks them all at each SETTINGS.
    """
    raw = frame.raw
    payload = raw[_HEADER_SIZE:]
    if len(payload) % _SETTING_SIZE:
        return raw
    kept = b"".join(
        payload[start : start + _SETTING_SIZE]
        for start in range(0, len(payload), _SETTING_SIZE)
        if int.from_bytes(payload[start : start + 2], "big") in _SETTINGS_KNOWN
    )
    if len(kept) == len(payload):
        return raw
    return len(kept).to_bytes(3, "big") + raw[3:_HEADER_SIZE] + kept
