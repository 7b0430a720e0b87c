"""What is fuzzed: each target takes any bytes, and raises only for a bug.

A target does more than not to crash. Wherever bytes are read piece by piece, any split must give the same outcome; and
what is let in is written out for the next hop and read again, because a proxy is fooled by what two readers of the same
bytes disagree on.
"""

import contextlib
from collections.abc import Callable
from typing import Any, Final

from quictunnel.http.door import DoorParser
from quictunnel.http.http2 import Http2Error, Http2Session, Http2Stream
from quictunnel.http.http2_door import read_request, read_response, read_trailers
from quictunnel.http.http2_frames import PREFACE
from quictunnel.http.limits import VisitorLimits
from quictunnel.http.origin_answer import AnswerParser
from quictunnel.http.origin_request import announced_length, encode_request
from quictunnel.http.reply import encode_reply
from quictunnel.quic.first_packets import parse_long_header
from quictunnel.trust.join import JoinString
from quictunnel.wire.codec import StreamDecoder, encode_head
from quictunnel.wire.control import ControlDecoder
from quictunnel.wire.credit import WindowBudget
from quictunnel.wire.errors import ProtocolError, TunnelError
from quictunnel.wire.fields import Forwarding, check_fields, end_to_end, trailer_fields
from quictunnel.wire.frames import Data, End, Fields, RequestHead, ResponseHead

__all__ = ["SEEDS", "TARGETS"]

_LIMITS: Final = VisitorLimits(head_size=2048, head_fields=24, target_length=256)
_FORWARDING: Final = Forwarding("192.0.2.7", b"http", trusted=False)


def _split(data: bytes) -> tuple[list[bytes], bytes]:
    """A way to cut the rest, told by the first bytes: so the fuzzer chooses both."""
    if len(data) < 3:
        return [data], data
    at, step, body = data[0], 1 + data[1] % 16, data[2:]
    pieces, position = [], 0
    while position < len(body):
        size = 1 + (at * step + position) % 23
        pieces.append(body[position : position + size])
        position += size
    return pieces, body


# The frames of quictunnel/1


def stream(data: bytes) -> None:
    """A stream of an exchange, as a request and as a response."""
    pieces, body = _split(data)
    for is_request in (True, False):
        whole = _frames([body], is_request)
        parts = _frames(pieces, is_request)
        assert whole == parts or whole[0] == parts[0] == "refused", (whole, parts)


def _frames(pieces: list[bytes], is_request: bool) -> tuple[object, ...]:
    decoder = StreamDecoder(is_request=is_request, head_limit=4096)
    heads: list[object] = []
    content = b""
    try:
        for index, piece in enumerate(pieces):
            for frame in decoder.feed(piece, index == len(pieces) - 1):
                if type(frame) is Data:
                    content += frame.data
                    continue
                heads.append(frame)
                if type(frame) is RequestHead or type(frame) is ResponseHead:
                    encode_head(frame)
    except ProtocolError:
        return ("refused",)
    return ("read", tuple(map(repr, heads)), content)


def control(data: bytes) -> None:
    """A control stream."""
    pieces, body = _split(data)
    whole, parts = _messages([body]), _messages(pieces)
    assert whole == parts or "refused" in (whole[0], parts[0]), (whole, parts)


def _messages(pieces: list[bytes]) -> tuple[object, ...]:
    decoder = ControlDecoder()
    messages: list[str] = []
    try:
        for piece in pieces:
            messages += map(repr, decoder.feed(piece))
    except ProtocolError:
        return ("refused",)
    return ("read", *messages)


# HTTP/1.1


def door(data: bytes) -> None:
    """A visitor's bytes."""
    pieces, body = _split(data)
    whole, parts = _requests([body]), _requests(pieces)
    # A feed is handed over whole or not at all, so a split may show more of what comes before an error; never less.
    assert parts[: len(whole) - 1] == whole[:-1], (whole, parts)
    assert (whole[-1] == "refused") == (parts[-1] == "refused"), (whole, parts)


def _requests(pieces: list[bytes]) -> list[object]:
    """Each request with its body, then ``refused`` or ``more``."""
    parser = DoorParser(_LIMITS)
    found: list[object] = []
    content = b""
    request = None
    try:
        for piece in pieces:
            rest = piece
            while rest:
                rest = parser.feed(rest)
                if parser.request is not None:
                    request, content = parser.request, b""
                    _forward(request)
                content += parser.take_body()
                if parser.complete and request is not None:
                    found.append((request, content, tuple(parser.trailers)))
                    check_fields(parser.trailers)
                    request = None
    except TunnelError as error:
        assert 400 <= error.fault.status < 600
        return [*found, "refused"]
    return [*found, "more"]


def _forward(request: Any) -> None:
    """Whatever is let in can be written to a backend, and is read there as the same request."""
    fields = _FORWARDING.apply(end_to_end(request.fields), request.authority, request.version)
    protocol = request.protocol
    if protocol:
        fields = [field for field in fields if field[0] != b"content-length"]
    head = RequestHead(
        request.method, b"http", request.authority, request.target, fields, request.body or bool(protocol), protocol
    )
    length = announced_length(head)
    written = encode_request(head, b"backend", length)
    again = DoorParser(VisitorLimits())
    again.feed(written)
    assert again.request is not None, written
    assert (again.request.method, again.request.target) == (request.method, request.target), written
    assert again.request.authority == (request.authority or b"backend"), written
    assert again.request.protocol == protocol, written
    assert {name for name, _ in again.request.fields}.isdisjoint((b"proxy", b"http2-settings", b"x-tunnel-session"))


def answer(data: bytes) -> None:
    """A backend's bytes, after requests of several kinds."""
    pieces, body = _split(data)
    for method, protocol in ((b"GET", b""), (b"HEAD", b""), (b"GET", b"websocket")):
        whole, parts = _answers([body], method, protocol), _answers(pieces, method, protocol)
        if whole[-1] not in ("refused", "cut") and parts[-1] not in ("refused", "cut"):
            assert whole == parts, (whole, parts)


def _answers(pieces: list[bytes], method: bytes, protocol: bytes) -> list[object]:
    parser = AnswerParser(size_limit=2048, fields_limit=24)
    parser.expect(method, protocol)
    found: list[object] = []
    content = b""
    try:
        for piece in pieces:
            for frame in parser.feed(piece):
                if type(frame) is Data:
                    content += frame.data
                elif type(frame) is ResponseHead:
                    found.append((frame.status, tuple(frame.fields)))
                    if frame.status >= 200:
                        encode_reply(frame, method, b"1.1", b"now", keep_alive=True)
                    elif frame.status == 101:
                        return [*found, "switched"]
                elif type(frame) is End:
                    check_fields(trailer_fields(frame.trailers))
                    return [*found, content, "complete"]
        parser.end()
    except TunnelError as error:
        assert error.fault.status in (502, 504)
        return [*found, "refused"]
    except ValueError:
        return [*found, "refused"]  # two lengths, found by whoever writes the answer
    return [*found, content, "complete"]


# HTTP/2


class _Owner:
    """Takes whatever a session hands over, and reads all heads."""

    def __init__(self) -> None:
        self.streams: list[Http2Stream] = []

    def wake(self) -> None:
        pass

    def session_request(self, stream: Http2Stream, fields: Fields, ended: bool) -> None:
        self.streams.append(stream)
        stream.user = _User(stream)
        try:
            read_request(fields, _LIMITS, ended=ended)
        except TunnelError:
            stream.reset(1)
            return
        stream.send_head([(b":status", b"200")], end=False)
        stream.send_data(b"x" * 70_000)
        if ended:
            stream.send_end([])

    def session_goaway(self, last_stream_id: int, code: int) -> None:
        pass

    def session_room(self) -> None:
        pass


class _User:
    def __init__(self, stream: Http2Stream) -> None:
        from quictunnel.exchange import VOID

        self.peer = VOID
        self._stream = stream

    def stream_head(self, fields: Fields, ended: bool) -> None:
        try:
            read_response(fields, fields_limit=24, size_limit=2048)
        except ValueError:
            self._stream.reset(1)

    def stream_interim(self, fields: Fields) -> None:
        self.stream_head(fields, False)

    def stream_data(self, data: bytes) -> None:
        assert data

    def stream_end(self, trailers: Fields) -> None:
        try:
            read_trailers(trailers, fields_limit=24, size_limit=2048)
        except ValueError:
            self._stream.reset(1)

    def stream_reset(self, code: int) -> None:
        pass

    def stream_sent(self) -> None:
        self._stream.leave()


def http2(data: bytes) -> None:
    """A session of either role, after an honest beginning."""
    pieces, _ = _split(data)
    for is_client in (False, True):
        owner = _Owner()
        clock = [0.0]
        session = Http2Session(
            owner, is_client=is_client, head_limit=2048, budget=WindowBudget(0), clock=lambda now=clock: now[0]
        )
        session.take()
        try:
            session.feed((b"" if is_client else PREFACE) + bytes.fromhex("000000040000000000"))
            if is_client:
                for _ in range(3):
                    stream = session.open_stream(None)  # type: ignore[arg-type]
                    stream.user = _User(stream)
                    stream.send_head(
                        [(b":method", b"GET"), (b":scheme", b"http"), (b":authority", b"a"), (b":path", b"/")],
                        end=False,
                    )
            for piece in pieces:
                clock[0] += 0.01
                session.feed(piece)
                session.take()
        except Http2Error as error:
            session.terminate(error)
            session.take()
        session.close()
        assert not session.streams


def sections(data: bytes) -> None:
    """Field sections of HTTP/2, without the compression that would hide them from the fuzzer."""
    section = []
    for line in data.split(b"\n"):
        name, _, value = line.partition(b"=")
        section.append((name, value))
    try:
        request = read_request(section, _LIMITS, ended=bool(len(data) % 2))
    except TunnelError as error:
        assert 400 <= error.fault.status < 600
    else:
        _forward(request)
    for read in (read_response, read_trailers):
        with contextlib.suppress(ValueError):
            read(section, fields_limit=24, size_limit=2048)


# What else comes from outside


def datagram(data: bytes) -> None:
    """A packet from nobody."""
    parse_long_header(data)


def join(data: bytes) -> None:
    """A join string, pasted by a person."""
    with contextlib.suppress(ValueError):
        JoinString.parse(data.decode("utf-8", "surrogateescape"))


TARGETS: Final[dict[str, Callable[[bytes], None]]] = {
    "stream": stream,
    "control": control,
    "door": door,
    "answer": answer,
    "http2": http2,
    "sections": sections,
    "datagram": datagram,
    "join": join,
}

_HEAD: Final = encode_head(
    RequestHead(b"POST", b"http", b"a.example", b"/x?y", [(b"a", b"b"), (b"content-length", b"3")])
)
_ANSWER: Final = encode_head(ResponseHead(200, [(b"content-type", b"text/plain")]))

SEEDS: Final[dict[str, list[bytes]]] = {
    "stream": [b"\x01\x02" + _HEAD + b"\x00\x03abc", b"\x03\x05" + _ANSWER + b"\x00\x05hello" + b"\x01\x02\x00\x00"],
    "control": [
        b'\x01\x02\x40\x32\x40\x57{"type":"hello","version":1,"tunnel":"app","session":"0123456789abcdef","token":"qtk_x"}',
        b"\x01\x02\x33\x03\x01\x40\xff",
        b'\x01\x01\x32\x1d{"type":"grow","links":3}    ',
    ],
    "door": [
        b"\x01\x02GET /a?b HTTP/1.1\r\nHost: a.example\r\nX-A: 1\r\n\r\n",
        b"\x07\x03POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\n\r\nhelloGET / HTTP/1.1\r\nHost: a\r\n\r\n",
        b"\x09\x04PUT / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\nTrailer: x\r\n\r\n"
        b"5;a=b\r\nhello\r\n0\r\nX: y\r\n\r\n",
        b"\x01\x01GET / HTTP/1.1\r\nHost: a\r\nConnection: Upgrade, x\r\nUpgrade: websocket\r\nX: 1\r\n\r\n",
        b"\x01\x01GET http://a.example/ HTTP/1.0\r\n\r\n",
        b"\x01\x01OPTIONS * HTTP/1.1\r\nHost: [::1]:80\r\nExpect: 100-continue\r\nTE: trailers\r\n\r\n",
    ],
    "answer": [
        b"\x01\x02HTTP/1.1 200 OK\r\nContent-Length: 5\r\nSet-Cookie: a\r\n\r\nhello",
        b"\x01\x02HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\nX: y\r\n\r\n",
        b"\x01\x02HTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\nHTTP/1.0 200 OK\r\n\r\nuntil the end",
        b"\x01\x02HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n\x81\x00",
        b"\x01\x02HTTP/1.1 204 No Content\r\n\r\n",
    ],
    "http2": [
        b"\x07\x05"
        + bytes.fromhex("00000a0105000000018286410161844287")
        + bytes.fromhex("0000000401000000 00".replace(" ", "")),
        b"\x07\x05" + bytes.fromhex("000003010400000001828684000005000100000001") + b"hello",
        b"\x02\x05" + bytes.fromhex("000001010500000001 88".replace(" ", "")),
        b"\x02\x05" + bytes.fromhex("00000408000000000100000fff000008060000000000") + b"\0" * 7,
        b"\x02\x05" + bytes.fromhex("0000080700000000000000000100000000"),
    ],
    "sections": [
        b":method=GET\n:scheme=http\n:authority=a.example\n:path=/x?y\nx-a=b\ncookie=a=1\ncookie=b=2",
        b":method=POST\n:scheme=https\n:path=/\nhost=a\ncontent-length=5\nte=trailers",
        b":status=200\ncontent-type=text/plain",
        b"grpc-status=0\ngrpc-message=ok",
    ],
    "datagram": [bytes.fromhex("c300000001088394c8f03e5157080000449e") + b"\0" * 64],
    "join": [JoinString("a.example:4433", b"\1" * 32, "qtk_abc_def").encode().encode()],
}
