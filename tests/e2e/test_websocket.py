"""WebSockets and other upgrades: the same bytes and the same ends through the tunnel as without it."""

import json
import random
import shutil
import socket
import subprocess
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from websockets.extensions.permessage_deflate import ServerPerMessageDeflateFactory
from websockets.frames import Frame
from websockets.http11 import Request
from websockets.protocol import State
from websockets.server import ServerProtocol
from websockets.typing import Subprotocol

from tests.support.backends import Connection, RawBackend, echo
from tests.support.processes import Processes, Server, Tunnel, poll
from tests.support.visits import RawVisitor
from tests.support.websocket import (
    BIG,
    FIN,
    RST,
    Await,
    Frames,
    Recording,
    Step,
    WebSocketBackend,
    close,
    frame,
    handshake,
    record,
)

pytestmark = pytest.mark.either

TEXT, BINARY, CLOSE, PING, PONG = 1, 2, 8, 9, 10


@pytest.fixture(scope="module")
def websockets() -> Iterator[WebSocketBackend]:
    with WebSocketBackend() as backend:
        yield backend


# Small enough to pass within a test; what an upgraded connection is not to be cut by.
SERVER_LIMITS = ("--keep-alive", "1s", "--body-idle", "1s", "--head-time", "1s")
CLIENT_LIMITS = ("--backend-keep-alive", "1s", "--backend-head-time", "1s")


@pytest.fixture(scope="module")
def tunnels(processes: Processes) -> Callable[[str, RawBackend | WebSocketBackend], Tunnel]:
    """A tunnel of an engine to one of the backends; the tests of this file share them."""
    servers: dict[str, Server] = {}
    made: dict[tuple[str, str], Tunnel] = {}

    def tunnel(engine: str, backend: RawBackend | WebSocketBackend) -> Tunnel:
        if engine not in servers:
            servers[engine] = processes.server(*SERVER_LIMITS, engine=engine)
        key = (engine, backend.target)
        if key not in made:
            name = type(backend).__name__.lower()
            client = processes.client(servers[engine], backend.target, *CLIENT_LIMITS, tunnel=name, engine=engine)
            made[key] = Tunnel(servers[engine], client, name)
        return made[key]

    return tunnel


# The case list, after the Autobahn test-suite's. A step that waits for an answer stands wherever the order of the
# server's answers would otherwise hang on how bytes were cut into packets.


class Case(NamedTuple):
    """What a client does after the opening handshake."""

    steps: tuple[Step, ...]
    target: str = "/echo"
    fields: tuple[str, ...] = ()
    early: int = 0
    "steps that leave in the packet of the handshake"
    chop: int = 0
    "bytes a packet"


def echoed(opcode: int, payload: bytes, *sent: bytes, chop: int = 0, early: int = 0) -> Case:
    """A message, sent as these frames, that comes back as one; then the end."""
    frames = sent or (frame(opcode, payload),)
    return Case((*frames, Await(frame(opcode, payload, mask=None)), close()), chop=chop, early=early)


def refused(*sent: bytes, chop: int = 0) -> Case:
    """Bytes that end the connection, after a message that is answered."""
    return Case((frame(TEXT, b"before"), Await(frame(TEXT, b"before", mask=None)), *sent), chop=chop)


def pinged(*payloads: bytes, chop: int = 0) -> Case:
    sent = b"".join(frame(PING, payload) for payload in payloads)
    return Case((sent, Await(b"".join(frame(PONG, each, mask=None) for each in payloads)), close()), chop=chop)


def text(*parts: bytes) -> tuple[bytes, ...]:
    """A text message in fragments."""
    last = len(parts) - 1
    return tuple(frame(0 if number else TEXT, part, fin=number == last) for number, part in enumerate(parts))


def compressed(*messages: bytes, offer: str = "permessage-deflate", takeover: bool = True, bits: int = 15) -> Case:
    """Compressed messages, each after the answer to the one before; what the server compresses is for it to choose."""
    steps: list[Step] = []
    packer = zlib.compressobj(wbits=-bits)
    for number, message in enumerate(messages, 1):
        if not takeover:
            packer = zlib.compressobj(wbits=-bits)
        packed = packer.compress(message) + packer.flush(zlib.Z_SYNC_FLUSH)
        steps += [frame(TEXT, packed.removesuffix(b"\x00\x00\xff\xff"), rsv=4), Frames(number)]
    return Case((*steps, close()), fields=(f"Sec-WebSocket-Extensions: {offer}",))


SIZES = (0, 1, 125, 126, 127, 128, 65535, 65536)
HELLO = "Hello-µ@ßöäüàá-UTF-8!!".encode()
KOSME = "κόσμε".encode()
PIECES = [bytes([65 + number]) * 3 for number in range(10)]
WORDS = tuple(b"the same words come again and again, number %d" % number for number in range(4))
NOISE = random.Random(7).randbytes(70_000)

CASES: dict[str, Case] = {
    # framing
    **{f"text of {size}": echoed(TEXT, b"*" * size) for size in SIZES},
    **{f"binary of {size}": echoed(BINARY, NOISE[:size]) for size in SIZES},
    "text of 125 byte by byte": echoed(TEXT, b"*" * 125, chop=1),
    "binary of 65536 in pieces of 997": echoed(BINARY, NOISE[:65536], chop=997),
    "length in more bytes than it needs, 2": echoed(TEXT, b"short", frame(TEXT, b"short", size_bytes=2)),
    "length in more bytes than it needs, 8": echoed(TEXT, b"short", frame(TEXT, b"short", size_bytes=8)),
    "length with its highest bit set": refused(b"\x82\xff" + b"\xff" * 8 + b"mask"),
    "frame beyond the server's limit": refused(b"\x82\xff" + (4 * BIG).to_bytes(8, "big") + b"mask"),
    "frame without a mask": refused(frame(TEXT, b"bare", mask=None)),
    "ping without a mask": refused(frame(PING, b"bare", mask=None)),
    # pings and pongs
    "ping, empty": pinged(b""),
    "ping with text": pinged(b"Hello, world!"),
    "ping with binary": pinged(b"\x00\xff\xfe\xfd\xfc\xfb\x00\xff"),
    "ping of 125": pinged(b"\xfe" * 125),
    "ping of 125 byte by byte": pinged(b"\xfe" * 125, chop=1),
    "ping of 126": refused(frame(PING, b"\xfe" * 126)),
    "ping in fragments": refused(frame(PING, b"a", fin=False), frame(0, b"b")),
    "ten pings": pinged(*(b"payload-%d" % number for number in range(10))),
    "ten pings byte by byte": pinged(*(b"payload-%d" % number for number in range(10)), chop=1),
    "pong unasked": Case((frame(PONG), frame(PING, b"x"), Await(frame(PONG, b"x", mask=None)), close())),
    "pong unasked with payload": Case((frame(PONG, b"p"), frame(PING), Await(frame(PONG, mask=None)), close())),
    "pong of 126": refused(frame(PONG, b"\xfe" * 126)),
    "ping of the server": Case(
        (
            Await(frame(PING, b"are you there", mask=None)),
            frame(PONG, b"are you there"),
            frame(TEXT, b"yes"),
            Await(frame(TEXT, b"yes", mask=None)),
            close(),
        ),
        "/ping",
    ),
    # reserved bits and opcodes
    **{f"reserved bits {rsv:03b}": refused(frame(TEXT, b"*", rsv=rsv)) for rsv in range(1, 8)},
    "reserved bit in a ping": refused(frame(PING, b"*", rsv=1)),
    "reserved bit in a close": refused(frame(CLOSE, b"\x03\xe8", rsv=4)),
    **{f"opcode {opcode}": refused(frame(opcode, b"*")) for opcode in (3, 4, 5, 6, 7, 11, 12, 13, 14, 15)},
    # fragments
    "two fragments": echoed(TEXT, b"fragment1fragment2", *text(b"fragment1", b"fragment2")),
    "two fragments byte by byte": echoed(TEXT, b"fragment1fragment2", *text(b"fragment1", b"fragment2"), chop=1),
    "fragments, all empty": echoed(TEXT, b"", *text(b"", b"", b"")),
    "fragments, the middle one not empty": echoed(TEXT, b"middle", *text(b"", b"middle", b"")),
    "binary in ten fragments": echoed(
        BINARY,
        b"".join(PIECES),
        *(frame(BINARY if not number else 0, piece, fin=number == 9) for number, piece in enumerate(PIECES)),
    ),
    "ping between fragments": Case(
        (
            b"".join((text(b"a", b"b")[0], frame(PING, b"between"), text(b"a", b"b")[1])),
            Await(frame(PONG, b"between", mask=None) + frame(TEXT, b"ab", mask=None)),
            close(),
        )
    ),
    "pings between fragments, byte by byte": Case(
        (
            b"".join((frame(TEXT, b"1", fin=False), frame(PING, b"a"), frame(0, b"2", fin=False), frame(PING, b"b"))),
            Await(frame(PONG, b"a", mask=None) + frame(PONG, b"b", mask=None)),
            frame(0, b"3"),
            Await(frame(TEXT, b"123", mask=None)),
            close(),
        ),
        chop=1,
    ),
    "pong between fragments": echoed(
        TEXT, b"ab", frame(TEXT, b"a", fin=False), frame(PONG, b"unasked"), frame(0, b"b")
    ),
    "continuation of nothing": refused(frame(0, b"*")),
    "continuation of nothing, not final": refused(frame(0, b"*", fin=False)),
    "message within a fragmented one": refused(frame(TEXT, b"a", fin=False), frame(TEXT, b"b")),
    "close between fragments": refused(frame(TEXT, b"a", fin=False), close(1000, b"enough")),
    # UTF-8
    "text in many languages": echoed(TEXT, HELLO),
    "text in fragments between code points": echoed(TEXT, HELLO, *text(HELLO[:7], HELLO[7:])),
    "text in fragments within code points": echoed(
        TEXT, KOSME, *text(*(bytes([byte]) for byte in KOSME[:-1]), KOSME[-1:])
    ),
    "text with the first and the last code points": echoed(
        TEXT, "\x00\x7f\x80\u07ff\u0800\uffff\U00010000\U0010ffff".encode()
    ),
    "text with noncharacters": echoed(TEXT, "\ufffe\uffff\U0001fffe".encode()),
    "text byte by byte": echoed(TEXT, KOSME * 20, chop=1),
    **{
        f"text that is not UTF-8: {name}": refused(frame(TEXT, b"ok " + data))
        for name, data in {
            "lone continuation": b"\x80",
            "impossible byte": b"\xfe",
            "truncated": KOSME[:-1],
            "overlong": b"\xc0\xaf",
            "overlong of 4": b"\xf0\x80\x80\xaf",
            "surrogate": b"\xed\xa0\x80",
            "beyond the last": b"\xf4\x90\x80\x80",
            "five bytes": b"\xf8\x88\x80\x80\x80",
        }.items()
    },
    "text that is not UTF-8 only at its end": refused(*text(KOSME, b"fine", b"\xce")),
    "text that is not UTF-8 in its first fragment": Case(
        # Whether the server fails now or at the end of the message is its affair, but the same both ways.
        (frame(TEXT, KOSME + b"\xf4\x90", fin=False), frame(PING, b"now?"), frame(0, b"\x80\x80edited"), FIN)
    ),
    # closing
    "close, empty": Case((close(None),)),
    "close of one byte": refused(frame(CLOSE, b"\x03")),
    **{
        f"close with {code}": Case((close(code, b"why not"),))
        for code in (1000, 1001, 1002, 1003, 1007, 1008, 1009, 1010, 1011, 1012, 1013, 1014, 3000, 3999, 4000, 4999)
    },
    **{
        f"close with {code}, which is no code to send": Case((close(code),))
        for code in (0, 999, 1004, 1005, 1006, 1015, 1016, 1100, 2000, 2999, 5000, 65535)
    },
    "close with a reason of 123": Case((close(1000, b"*" * 123),)),
    "close with a reason of 124": Case((close(1000, b"*" * 124),)),
    "close with a reason in many languages": Case((close(1000, HELLO),)),
    "close with a reason that is not UTF-8": Case((close(1000, b"\xce\xba\xed\xa0\x80"),)),
    "close in fragments": Case((frame(CLOSE, b"\x03\xe8", fin=False), frame(0, b"why"))),
    "close byte by byte": Case((close(1000, b"slowly"),), chop=1),
    "close twice": Case((close() + close(),)),
    "message after the close": Case((close() + frame(TEXT, b"late"),)),
    "ping after the close": Case((close() + frame(PING, b"late"),)),
    "junk after the close": Case((close() + NOISE[:5000],)),
    **{
        f"close of the server with {code}": Case(
            (Await(close(code, b"bye", mask=None)), close(code, b"bye")), f"/close?code={code}&reason=bye"
        )
        for code in (1000, 1001, 1011, 3000, 4999)
    },
    "close of the server that is not answered": Case((Await(close(1000, mask=None)), FIN), "/close?code=1000"),
    "close of the server that crosses a message": Case(
        (Await(close(1000, mask=None)), frame(TEXT, b"late"), close()), "/close?code=1000"
    ),
    # ends without a close
    "end of the client": Case((frame(TEXT, b"a"), Await(frame(TEXT, b"a", mask=None)), FIN)),
    "end of the client within a frame": Case((frame(TEXT, b"abcdef")[:-3], FIN)),
    "reset of the client": Case((frame(TEXT, b"a"), Await(frame(TEXT, b"a", mask=None)), RST)),
    "end of the server": Case((frame(TEXT, b"a"),), "/fin"),
    "reset of the server": Case((frame(TEXT, b"a"),), "/rst"),
    # bytes beside the handshake (the server's own library loses a close that comes there)
    "server speaks first": Case((Frames(3), close()), "/hello"),
    "message in the packet of the handshake": echoed(TEXT, b"early", early=1),
    "fragments in the packet of the handshake": echoed(TEXT, b"early", *text(b"ea", b"rly"), early=1),
    "64 KB in the packet of the handshake": echoed(BINARY, NOISE[:60_000], early=1),
    # compression
    "deflate": compressed(*WORDS),
    "deflate with a large message": compressed(b"*" * 200_000, NOISE),
    "deflate with empty messages": compressed(b"", b"a", b""),
    "deflate without context takeover of the server": compressed(
        *WORDS, offer="permessage-deflate; server_no_context_takeover"
    ),
    "deflate without context takeover of the client": compressed(
        *WORDS, offer="permessage-deflate; client_no_context_takeover", takeover=False
    ),
    "deflate without any context takeover": compressed(
        *WORDS,
        offer="permessage-deflate; server_no_context_takeover; client_no_context_takeover",
        takeover=False,
    ),
    "deflate with small windows": compressed(
        *WORDS, offer="permessage-deflate; server_max_window_bits=9; client_max_window_bits=9", bits=9
    ),
    "deflate, second offer": compressed(
        *WORDS, offer="permessage-deflate; server_max_window_bits=99, permessage-deflate; client_max_window_bits"
    ),
    "deflate in an offer that nobody knows": Case(
        (frame(TEXT, b"plain"), Await(frame(TEXT, b"plain", mask=None)), close()),
        fields=("Sec-WebSocket-Extensions: permessage-unknown; a=1, x-other",),
    ),
    "deflate, a plain message": Case(
        (frame(TEXT, b"plain"), Frames(1), close()), fields=("Sec-WebSocket-Extensions: permessage-deflate",)
    ),
    "deflate of what is no deflate": Case(
        (frame(TEXT, b"\xff\xff\xff\xff", rsv=4),), fields=("Sec-WebSocket-Extensions: permessage-deflate",)
    ),
    "deflate bit in a continuation": Case(
        (frame(TEXT, b"a", fin=False, rsv=4), frame(0, b"b", rsv=4)),
        fields=("Sec-WebSocket-Extensions: permessage-deflate",),
    ),
    # subprotocols
    "subprotocol": Case((close(),), fields=("Sec-WebSocket-Protocol: chat.v1",)),
    "subprotocols, the server's choice": Case((close(),), fields=("Sec-WebSocket-Protocol: other, chat.v1, chat.v2",)),
    "subprotocols in two fields": Case(
        (close(),), fields=("Sec-WebSocket-Protocol: chat.v1", "Sec-WebSocket-Protocol: chat.v2")
    ),
    "cookies and an origin": Case((close(),), fields=("Cookie: a=1; b=2", "Origin: http://app.localhost")),
}

EIGHTS = [frame(0, bytes(8192), fin=False)] * (BIG // 8192)

LARGE: dict[str, Case] = {
    "binary of 16 MB": echoed(BINARY, bytes(BIG)),
    "16 MB in fragments": echoed(TEXT, b"*" * BIG, *text(*[b"*" * (BIG // 16)] * 15, b"*" * (BIG - BIG // 16 * 15))),
    "16 MB in fragments of 8 KB": echoed(BINARY, bytes(BIG), frame(BINARY, fin=False), *EIGHTS, frame(0)),
    "16 MB of the server": Case((Await(frame(BINARY, bytes(BIG), mask=None)), close()), "/big"),
}


def both_ways(
    case: Case, tunnel: Tunnel, backend: WebSocketBackend
) -> tuple[tuple[Recording, list[object]], tuple[Recording, list[object]]]:
    """The case's recording and what the server saw, without and with the tunnel."""

    def run(address: tuple[str, int]) -> tuple[Recording, list[object]]:
        target = backend.unique(case.target)
        opening = handshake(target, tunnel.host, *case.fields)
        recording = record(address, opening, case.steps, early=case.early, chop=case.chop)
        assert recording.status == 101, recording
        return recording, backend.saw(target)

    return run(("127.0.0.1", backend.port)), run(tunnel.address)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_websocket_is_the_same_as_without_the_tunnel(
    engine: str, tunnels: Callable[..., Tunnel], websockets: WebSocketBackend, case: Case
) -> None:
    direct, through = both_ways(case, tunnels(engine, websockets), websockets)
    assert through == direct


@pytest.mark.slow
@pytest.mark.parametrize("case", LARGE.values(), ids=LARGE.keys())
def test_websocket_with_large_messages_is_the_same_as_without_the_tunnel(
    engine: str, tunnels: Callable[..., Tunnel], websockets: WebSocketBackend, case: Case
) -> None:
    direct, through = both_ways(case, tunnels(engine, websockets), websockets)
    assert len(direct[0].data) > BIG
    assert through == direct


# Handshakes that come to nothing.

REFUSALS: dict[str, tuple[int, str, tuple[str, ...], dict[str, str]]] = {
    "400 of the application": (400, "/status?code=400", (), {}),
    "401 of the application": (401, "/status?code=401", (), {}),
    "403 of the application": (403, "/status?code=403", (), {}),
    "503 of the application": (503, "/status?code=503", (), {}),
    "200 of the application": (200, "/status?code=200", (), {}),
    "no key": (400, "/echo", (), {"key": ""}),
    "a key that is none": (400, "/echo", (), {"key": "short"}),
    "two keys": (400, "/echo", ("Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==",), {}),
    "no version": (400, "/echo", (), {"version": ""}),
    "an old version": (400, "/echo", (), {"version": "8"}),
}


@pytest.mark.parametrize("case", REFUSALS.values(), ids=REFUSALS.keys())
def test_refused_handshake_is_the_same_as_without_the_tunnel(
    engine: str,
    tunnels: Callable[..., Tunnel],
    websockets: WebSocketBackend,
    case: tuple[int, str, tuple[str, ...], dict[str, str]],
) -> None:
    status, target, fields, changes = case
    tunnel = tunnels(engine, websockets)
    opening = handshake(target, tunnel.host, *fields, **changes)
    direct = record(("127.0.0.1", websockets.port), opening, ())
    through = record(tunnel.address, opening, ())
    assert direct.status == status
    assert through == direct
    assert through.data.endswith(b"\n")


def test_request_without_upgrade_is_told_so_by_the_server(
    engine: str, tunnels: Callable[..., Tunnel], websockets: WebSocketBackend
) -> None:
    """426 passes with the field that it must have (RFC 9110 section 15.5.22)."""
    tunnel = tunnels(engine, websockets)
    with RawVisitor(tunnel.address) as visitor:
        for _ in range(2):
            visitor.get("/echo", host=tunnel.host)
            got = visitor.read_answer()
            assert (got.status, got["upgrade"]) == (426, "websocket")
            assert b"You need a WebSocket client" in got.body


# Any other protocol.


def request(tunnel: Tunnel, protocol: str, *fields: str, method: str = "GET", target: str = "/") -> bytes:
    """A request that asks for an upgrade."""
    lines = [f"{method} {target} HTTP/1.1", f"Host: {tunnel.host}", "Connection: Upgrade", f"Upgrade: {protocol}"]
    return "\r\n".join([*lines, *fields, "", ""]).encode()


def switch(protocol: bytes) -> bytes:
    return b"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: %b\r\nX-Word: 1\r\n\r\n" % protocol


def read_head(visitor: RawVisitor) -> bytes:
    lines = []
    while (line := visitor.read_line()) != b"\r\n":
        assert line, "the connection ended within a head"
        lines.append(line)
    return b"".join(lines).lower()


@pytest.fixture
def raw_tunnel(engine: str, tunnels: Callable[..., Tunnel], raw: RawBackend) -> Iterator[Tunnel]:
    """A tunnel to ``raw``, on each engine, with limits of one second."""
    raw.requests.clear()
    yield tunnels(engine, raw)
    raw.handler = echo


def test_invented_protocol_passes_as_opaque_bytes(raw_tunnel: Tunnel, raw: RawBackend) -> None:
    """Whatever looks like HTTP, like a frame or like nothing: not a byte is touched, either way, in any piece."""
    words = (
        bytes(range(256)),
        b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
        b"0\r\n\r\n",
        b"\r\n",
        NOISE * 7,
    )

    def handle(connection: Connection) -> None:
        connection.head()
        connection.send(switch(b"invented/1"))
        for word in words:
            assert connection.read(len(word)) == word
            connection.send(word[::-1])

    raw.handler = handle
    with RawVisitor(raw_tunnel.address) as visitor:
        visitor.send(request(raw_tunnel, "invented/1", "X-Word: 2"))
        head = read_head(visitor)
        assert head.startswith(b"http/1.1 101 ")
        assert b"upgrade: invented/1\r\n" in head
        assert b"connection: upgrade\r\n" in head
        assert b"x-word: 1\r\n" in head
        for word in words:
            visitor.send(word)
            assert visitor.read(len(word)) == word[::-1]
        assert visitor.read_all() == b""
    seen = raw.requests[-1].lower()
    assert b"upgrade: invented/1\r\n" in seen
    assert b"connection: upgrade\r\n" in seen
    assert b"x-word: 2\r\n" in seen
    assert b"content-length" not in seen
    assert b"transfer-encoding" not in seen


def test_bytes_in_the_packets_of_request_and_101_arrive(raw_tunnel: Tunnel, raw: RawBackend) -> None:
    def handle(connection: Connection) -> None:
        connection.head()
        connection.send(switch(b"early") + b"from the server")
        connection.send(b" got " + connection.read(16))

    raw.handler = handle
    with RawVisitor(raw_tunnel.address) as visitor:
        visitor.send(request(raw_tunnel, "early") + b"from the visitor")
        read_head(visitor)
        assert visitor.read_all() == b"from the server got from the visitor"


def test_early_bytes_wait_until_the_backend_has_agreed(raw_tunnel: Tunnel, raw: RawBackend) -> None:
    """The backend may still take them for a request: it gets none of them before its 101."""
    agree, early = threading.Event(), []

    def handle(connection: Connection) -> None:
        connection.head()
        connection.sock.settimeout(0.3)
        try:
            early.append(connection.sock.recv(100))
        except TimeoutError:
            agree.set()
        connection.sock.settimeout(10)
        connection.send(switch(b"early"))
        connection.send(connection.read(11))

    raw.handler = handle
    with RawVisitor(raw_tunnel.address) as visitor:
        visitor.send(request(raw_tunnel, "early") + b"hello early")
        read_head(visitor)
        assert visitor.read_all() == b"hello early"
    assert agree.is_set() and not early


def test_end_of_the_visitor_leaves_the_backend_its_say(raw_tunnel: Tunnel, raw: RawBackend) -> None:
    def handle(connection: Connection) -> None:
        connection.head()
        connection.send(switch(b"halves"))
        connection.gone()  # all that the visitor had to say
        for number in range(100):
            connection.send(b"%03d " % number)

    raw.handler = handle
    with RawVisitor(raw_tunnel.address) as visitor:
        visitor.send(request(raw_tunnel, "halves"))
        read_head(visitor)
        visitor.send(b"all")
        visitor.sock.shutdown(socket.SHUT_WR)
        assert visitor.read_all() == b"".join(b"%03d " % number for number in range(100))


def test_end_of_the_backend_leaves_the_visitor_its_say(raw_tunnel: Tunnel, raw: RawBackend) -> None:
    said: list[bytes] = []
    over = threading.Event()

    def handle(connection: Connection) -> None:
        connection.head()
        connection.send(switch(b"halves") + b"that is all")
        connection.sock.shutdown(socket.SHUT_WR)
        while data := connection.sock.recv(65536):
            said.append(data)
        over.set()

    raw.handler = handle
    with RawVisitor(raw_tunnel.address) as visitor:
        visitor.send(request(raw_tunnel, "halves"))
        read_head(visitor)
        assert visitor.read_all() == b"that is all"
        for number in range(100):
            visitor.send(b"%03d " % number)
        visitor.sock.shutdown(socket.SHUT_WR)
        assert over.wait(10)
    assert b"".join(said) == b"".join(b"%03d " % number for number in range(100))


def test_silence_does_not_cut_an_upgraded_connection(raw_tunnel: Tunnel, raw: RawBackend) -> None:
    """Every limit of both sides is one second here, and an idle connection beside it feels that."""

    def handle(connection: Connection) -> None:
        connection.head()
        connection.send(switch(b"patient"))
        connection.send(connection.read(5))
        time.sleep(1.6)
        connection.send(b"awake")

    raw.handler = handle
    with RawVisitor(raw_tunnel.address) as visitor, RawVisitor(raw_tunnel.address) as idle:
        visitor.send(request(raw_tunnel, "patient"))
        read_head(visitor)
        raw.handler = echo
        idle.get(host=raw_tunnel.host)
        idle.read_answer()
        assert idle.closed_after() > 0.5
        time.sleep(0.6)
        visitor.send(b"still")
        assert visitor.read_all() == b"stillawake"


def test_upgrade_that_is_refused_leaves_an_ordinary_connection(raw_tunnel: Tunnel, raw: RawBackend) -> None:
    """Answers with bodies, of known length and in chunks, on one connection of the visitor and one of the backend."""
    upgrade = b"Upgrade: other\r\nConnection: Upgrade\r\n"
    answers = {
        "/404": b"HTTP/1.1 404 Not Found\r\nContent-Length: 7\r\n\r\nnothing",
        "/200": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n7\r\nordinar\r\n1\r\ny\r\n0\r\n\r\n",
        "/426": b"HTTP/1.1 426 Upgrade Required\r\n%bContent-Length: 5\r\n\r\nother" % upgrade,
        "/204": b"HTTP/1.1 204 No Content\r\n\r\n",
    }
    bodies = {"/404": b"nothing", "/200": b"ordinary", "/426": b"other", "/204": b""}

    def handle(connection: Connection) -> None:
        while head := connection.head():
            target = head.split(b" ")[1].decode()
            body = connection.body(head)
            connection.send(
                answers.get(target) or b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body)
            )

    raw.handler = handle
    with RawVisitor(raw_tunnel.address) as visitor:
        visitor.get(host=raw_tunnel.host)
        visitor.read_answer()
        before = raw.connections
        for target, body in bodies.items():
            visitor.send(request(raw_tunnel, "invented", target=target))
            got = visitor.read_answer()
            assert (got.status, got.body) == (int(target[1:]), body)
            visitor.send(f"POST /x HTTP/1.1\r\nHost: {raw_tunnel.host}\r\nContent-Length: 4\r\n\r\nbody".encode())
            assert visitor.read_answer().body == b"body"
        assert raw.connections == before


def test_request_behind_a_refused_upgrade_is_served(raw_tunnel: Tunnel, raw: RawBackend) -> None:
    """What follows the handshake in its packet is for the protocol if there is one, and else a request."""
    with RawVisitor(raw_tunnel.address) as visitor:
        visitor.send(request(raw_tunnel, "invented", target="/one") + request(raw_tunnel, "invented", target="/two"))
        for target in (b"/one", b"/two"):
            got = visitor.read_answer()
            assert (got.status, got.body.split(b" ")[1]) == (200, target)


@pytest.mark.parametrize("agreed", [b"other", b"websocket, other", b""], ids=["other", "one too many", "none"])
def test_switch_to_what_was_not_asked_for_is_502(raw_tunnel: Tunnel, raw: RawBackend, agreed: bytes) -> None:
    gone = threading.Event()

    def handle(connection: Connection) -> None:
        connection.head()
        connection.send(switch(agreed) + b"secret")
        connection.gone()
        gone.set()

    raw.handler = handle
    with RawVisitor(raw_tunnel.address) as visitor:
        visitor.send(request(raw_tunnel, "websocket"))
        got = visitor.read_answer()
        assert (got.status, got.error) == (502, "http_protocol_error")
        assert b"secret" not in got.body
    assert gone.wait(10)


def test_first_of_several_protocols_may_be_chosen(raw_tunnel: Tunnel, raw: RawBackend) -> None:
    def handle(connection: Connection) -> None:
        connection.head()
        connection.send(switch(b"two") + b"chosen")

    raw.handler = handle
    with RawVisitor(raw_tunnel.address) as visitor:
        visitor.send(request(raw_tunnel, "one/1, two"))
        assert b"upgrade: two\r\n" in read_head(visitor)
        assert visitor.read_all() == b"chosen"
    assert b"upgrade: one/1, two\r\n" in raw.requests[-1].lower()


@pytest.mark.parametrize("framing", ["length", "chunks"])
def test_upload_with_an_upgrade_is_an_ordinary_upload(raw_tunnel: Tunnel, raw: RawBackend, framing: str) -> None:
    """A server may ignore an upgrade, but never a body (RFC 9110 section 7.8)."""
    data = b"upload " * 20_000
    how = f"Content-Length: {len(data)}" if framing == "length" else "Transfer-Encoding: chunked"
    body = data if framing == "length" else b"%x\r\n%b\r\n0\r\n\r\n" % (len(data), data)
    with RawVisitor(raw_tunnel.address) as visitor:
        for _ in range(2):
            visitor.send(request(raw_tunnel, "websocket", how, method="POST") + body)
            got = visitor.read_answer()
            assert got.status == 200
            assert got.body.partition(b"\r\n\r\n")[2] == data
    assert b"\r\nupgrade:" not in raw.requests[-1].lower()


@pytest.mark.parametrize("protocol", ["h2c", "H2C", "h2", "h2c, websocket", "websocket , h2c"])
def test_h2c_never_reaches_the_backend(raw_tunnel: Tunnel, raw: RawBackend, protocol: str) -> None:
    """The requests in such a connection would pass every rule of the tunnel unseen."""
    opening = request(raw_tunnel, protocol, "HTTP2-Settings: AAMAAABkAARAAAAAAAIAAAAA")
    opening = opening.replace(b"Connection: Upgrade", b"Connection: Upgrade, HTTP2-Settings")
    with RawVisitor(raw_tunnel.address) as visitor:
        for _ in range(2):
            visitor.send(opening)
            assert visitor.read_answer().status == 200
    seen = raw.requests[-1].lower()
    assert b"h2c" not in seen
    assert b"http2-settings" not in seen
    assert b"upgrade: h2" not in seen
    assert (b"upgrade: websocket\r\n" in seen) == ("websocket" in protocol)


@pytest.mark.parametrize("phase", ["before the 101", "after it"])
def test_visitor_that_leaves_is_known_at_the_backend(raw_tunnel: Tunnel, raw: RawBackend, phase: str) -> None:
    asked, gone = threading.Event(), threading.Event()

    def handle(connection: Connection) -> None:
        connection.head()
        if phase == "after it":
            connection.send(switch(b"x"))
        asked.set()
        connection.gone()
        gone.set()

    raw.handler = handle
    with RawVisitor(raw_tunnel.address) as visitor:
        visitor.send(request(raw_tunnel, "x"))
        assert asked.wait(10)
        if phase == "after it":
            read_head(visitor)
        visitor.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\0\0\0\0\0\0\0")
    assert gone.wait(10)


# A browser.

PAGE = b"""<!doctype html><title>test</title><script>
const bytes = Uint8Array.from({length: 70000}, (_, i) => i % 251);
async function sockets() {
  const socket = new WebSocket(`ws://${location.host}/socket`, ["chat.v1"]);
  socket.binaryType = "arraybuffer";
  await new Promise((resolve, reject) => { socket.onopen = resolve; socket.onerror = () => reject("no WebSocket"); });
  const ask = what => new Promise(resolve => { socket.onmessage = event => resolve(event.data); socket.send(what); });
  const text = await ask("hello \\u00e4\\u{1f600}");
  const same = new Uint8Array(await ask(bytes)).every((byte, i) => byte === bytes[i]);
  const large = (await ask("x".repeat(1000000))).length;
  const closed = new Promise(resolve => {
    socket.onclose = event => resolve([event.code, event.reason, event.wasClean]);
    socket.close(4001, "enough");
  });
  return {text, same, large, protocol: socket.protocol, extensions: socket.extensions, closed: await closed};
}
function events() {
  return new Promise((resolve, reject) => {
    const source = new EventSource("/events"), seen = [];
    source.addEventListener("tick", event => {
      seen.push([event.lastEventId, event.data]);
      if (seen.length === 5) { source.close(); resolve(seen); }
    });
    source.onerror = () => reject("no events");
  });
}
Promise.all([sockets(), events()]).then(
  ([sockets, events]) => ({sockets, events}), error => ({error: String(error)})
).then(result => fetch("/result", {method: "POST", body: JSON.stringify(result)}));
</script>"""


class Site:
    """What the browser visits: a page, its WebSocket, its events, and where it brings what it found."""

    def __init__(self) -> None:
        self.result: dict[str, object] = {}

    def handle(self, connection: Connection) -> None:
        while head := connection.head():
            target = head.split(b" ")[1]
            if target == b"/socket":
                self._socket(connection, head)
                return
            if target == b"/events":
                connection.send(
                    b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
                )
                for number in range(5):
                    event = b"event: tick\nid: %d\ndata: number %d\n\n" % (number, number)
                    connection.send(b"%x\r\n%b\r\n" % (len(event), event))
                connection.gone()  # the page closes it
                return
            if target == b"/result":
                self.result = json.loads(connection.body(head))
                connection.answer(204)
                connection.sock.close()
                return
            connection.answer(
                200 if target == b"/" else 404, PAGE if target == b"/" else b"", b"Content-Type: text/html"
            )

    def _socket(self, connection: Connection, head: bytes) -> None:
        protocol = ServerProtocol(
            subprotocols=[Subprotocol("chat.v1")], extensions=[ServerPerMessageDeflateFactory()], max_size=BIG
        )
        protocol.receive_data(head)
        opcode, parts = 0, b""
        while True:
            for event in protocol.events_received():
                if isinstance(event, Request):
                    protocol.send_response(protocol.accept(event))
                elif isinstance(event, Frame) and event.opcode in (0, TEXT, BINARY):
                    opcode, parts = event.opcode or opcode, parts + event.data
                    if event.fin:
                        (protocol.send_text if opcode == TEXT else protocol.send_binary)(parts)
                        parts = b""
            connection.send(*filter(None, protocol.data_to_send()))
            if protocol.state is not State.OPEN:
                break
            protocol.receive_data(connection.sock.recv(65536))
        connection.gone()


BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="there is no Chromium (on Debian: apt install chromium)")
def test_browser_speaks_websocket_and_gets_events(
    engine: str, tunnels: Callable[..., Tunnel], raw: RawBackend, tmp_path: Path
) -> None:
    assert BROWSER is not None
    site = Site()
    raw.handler = site.handle
    tunnel = tunnels(engine, raw)
    command = [BROWSER, *FLAGS, f"--user-data-dir={tmp_path / 'profile'}", "--remote-debugging-port=0"]
    url = f"http://{tunnel.host}:{tunnel.address[1]}/"
    with (tmp_path / "log").open("wb") as log, subprocess.Popen([*command, url], stdout=log, stderr=log) as browser:
        try:
            result = poll(lambda: site.result, 40, "the page's result")
        finally:
            browser.terminate()
            browser.wait(10)
    raw.handler = echo
    assert result == {
        "sockets": {
            "text": "hello ä😀",
            "same": True,
            "large": 1_000_000,
            "protocol": "chat.v1",
            "extensions": "permessage-deflate",
            "closed": [4001, "enough", True],
        },
        "events": [[str(number), f"number {number}"] for number in range(5)],
    }
