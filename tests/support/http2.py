"""HTTP/2 as bytes: frames of a test's own making, well-formed or not, and what the other side says read back."""

from collections.abc import Mapping
from typing import NamedTuple

from hpack import Decoder, Encoder, NeverIndexedHeaderTuple

from quictunnel.http.http2_frames import PREFACE
from quictunnel.wire.frames import Fields

__all__ = ["Seen", "Wire", "block", "frame", "settings_frame"]

DATA, HEADERS, PRIORITY, RST_STREAM, SETTINGS, PUSH_PROMISE, PING, GOAWAY, WINDOW_UPDATE, CONTINUATION = range(10)
END_STREAM, END_HEADERS, PADDED, ACK = 0x1, 0x4, 0x8, 0x1


def frame(kind: int, flags: int = 0, stream_id: int = 0, payload: bytes = b"") -> bytes:
    """A frame (RFC 9113 section 4.1)."""
    return len(payload).to_bytes(3, "big") + bytes((kind, flags)) + stream_id.to_bytes(4, "big") + payload


def settings_frame(values: Mapping[int, int]) -> bytes:
    """A SETTINGS frame."""
    return frame(
        SETTINGS, 0, 0, b"".join(code.to_bytes(2, "big") + value.to_bytes(4, "big") for code, value in values.items())
    )


def block(fields: Fields) -> bytes:
    """A field section that leaves no trace in the other side's table, whatever is in it."""
    return Encoder().encode([NeverIndexedHeaderTuple(name, value) for name, value in fields], huffman=False)


class Seen(NamedTuple):
    """A frame that the other side sent."""

    kind: int
    flags: int
    stream_id: int
    payload: bytes

    @property
    def code(self) -> int:
        """The error of a RST_STREAM or GOAWAY."""
        return int.from_bytes(self.payload[4:8] if self.kind == GOAWAY else self.payload, "big")

    @property
    def ends(self) -> bool:
        return self.kind in (DATA, HEADERS) and bool(self.flags & END_STREAM)


class Wire:
    """One end of a connection of HTTP/2 that does nothing by itself: it makes bytes, and notes what it is told."""

    def __init__(self, *, is_client: bool = True) -> None:
        self.is_client = is_client
        self.frames: list[Seen] = []
        self.heads: dict[int, list[Fields]] = {}
        "field sections by stream, in order"
        self._buffer = b""
        self._decoder = Decoder()
        self._decoder.max_header_list_size = 1 << 24
        self._block = b""
        self._next = 1
        self._answered = 0

    def hello(self, values: Mapping[int, int] | None = None) -> bytes:
        """What a connection begins with."""
        self._decoder.max_allowed_table_size = (values or {}).get(1, 4096)
        return (PREFACE if self.is_client else b"") + settings_frame(values or {})

    def head(self, fields: Fields, *, end: bool = True, stream_id: int = 0) -> bytes:
        """A HEADERS on ``stream_id``, or on a new stream."""
        if not stream_id:
            stream_id, self._next = self._next, self._next + 2
        return frame(HEADERS, END_HEADERS | (END_STREAM if end else 0), stream_id, block(fields))

    def get(
        self,
        path: bytes = b"/",
        *extra: tuple[bytes, bytes],
        method: bytes = b"GET",
        end: bool = True,
        authority: bytes = b"app.localhost",
    ) -> bytes:
        """A request's HEADERS on a new stream."""
        return self.head(
            [(b":method", method), (b":scheme", b"http"), (b":authority", authority), (b":path", path), *extra], end=end
        )

    @property
    def last(self) -> int:
        """The stream that was opened last."""
        return self._next - 2

    def takes(self, data: bytes) -> list[Seen]:
        """Read what the other side sent; the frames that it completes."""
        self._buffer += data
        new: list[Seen] = []
        while len(self._buffer) >= 9:
            size = int.from_bytes(self._buffer[:3], "big")
            if len(self._buffer) < 9 + size:
                break
            raw, self._buffer = self._buffer[: 9 + size], self._buffer[9 + size :]
            seen = Seen(raw[3], raw[4], int.from_bytes(raw[5:9], "big"), raw[9:])
            new.append(seen)
            self._note(seen)
        self.frames += new
        return new

    def _note(self, seen: Seen) -> None:
        if seen.kind not in (HEADERS, CONTINUATION):
            return
        self._block += seen.payload
        if seen.flags & END_HEADERS:
            fields = [(bytes(name), bytes(value)) for name, value in self._decoder.decode(self._block, raw=True)]
            self._block = b""
            self.heads.setdefault(seen.stream_id, []).append(fields)

    # What came, by stream

    def of(self, stream_id: int) -> list[Seen]:
        return [seen for seen in self.frames if seen.stream_id == stream_id]

    def kinds(self, stream_id: int) -> list[int]:
        return [seen.kind for seen in self.of(stream_id)]

    def status(self, stream_id: int) -> int:
        """Of the last head; 0 for none."""
        heads = [dict(fields) for fields in self.heads.get(stream_id, []) if fields and fields[0][0] == b":status"]
        return int(heads[-1][b":status"]) if heads else 0

    def body(self, stream_id: int) -> bytes:
        return b"".join(seen.payload for seen in self.of(stream_id) if seen.kind == DATA)

    def ended(self, stream_id: int) -> bool:
        return any(seen.ends for seen in self.of(stream_id))

    def reset(self, stream_id: int) -> int | None:
        """The code that the stream was reset with."""
        codes = [seen.code for seen in self.of(stream_id) if seen.kind == RST_STREAM]
        return codes[0] if codes else None

    def pongs(self) -> bytes:
        """Answers to the PINGs that came since the last call."""
        pings = [seen for seen in self.frames if seen.kind == PING and not seen.flags & ACK]
        new, self._answered = pings[self._answered :], len(pings)
        return b"".join(frame(PING, ACK, 0, seen.payload) for seen in new)

    @property
    def goaways(self) -> list[tuple[int, int]]:
        """The last stream and the code of each GOAWAY."""
        return [(int.from_bytes(seen.payload[:4], "big"), seen.code) for seen in self.frames if seen.kind == GOAWAY]
