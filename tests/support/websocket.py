"""WebSocket by its bytes (RFC 6455): frames as a test wants them, a client that records, and a real server."""

import asyncio
import socket
import struct
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from hashlib import sha256
from itertools import count
from types import TracebackType
from typing import NamedTuple, Self
from urllib.parse import parse_qs, urlsplit

from websockets.asyncio.server import Server, ServerConnection, serve
from websockets.exceptions import ConnectionClosed
from websockets.http11 import Request, Response
from websockets.typing import Subprotocol

__all__ = [
    "BIG",
    "FIN",
    "RST",
    "Await",
    "Frames",
    "Recording",
    "Step",
    "WebSocketBackend",
    "close",
    "frame",
    "handshake",
    "record",
]

KEY = b"\x12\x34\x56\x78"
"masks every frame, so that two runs send the same bytes"
SAMPLE_KEY = "dGhlIHNhbXBsZSBub25jZQ=="
"of a handshake (RFC 6455 section 1.3)"
LIMIT = 10.0
"seconds that anything may take"
BIG = 16 * 1024 * 1024


# Bytes


def frame(
    opcode: int,
    payload: bytes = b"",
    *,
    fin: bool = True,
    rsv: int = 0,
    mask: bytes | None = KEY,
    size_bytes: int | None = None,
) -> bytes:
    """One frame (section 5.2); ``size_bytes`` of 0, 2 or 8 is how its length is written, the shortest way if None."""
    size = len(payload)
    if size_bytes is None:
        size_bytes = 0 if size < 126 else 2 if size < 65536 else 8
    masked = 0x80 if mask is not None else 0
    first = (0x80 if fin else 0) | rsv << 4 | opcode
    short = {0: size, 2: 126, 8: 127}[size_bytes]
    head = bytes((first, masked | short)) + (size.to_bytes(size_bytes, "big") if size_bytes else b"")
    if mask is None:
        return head + payload
    key = (mask * (size // 4 + 1))[:size]
    return head + mask + (int.from_bytes(payload, "big") ^ int.from_bytes(key, "big")).to_bytes(size, "big")


def close(code: int | None = 1000, reason: bytes = b"", *, mask: bytes | None = KEY) -> bytes:
    """A close frame (section 5.5.1)."""
    return frame(8, b"" if code is None else code.to_bytes(2, "big") + reason, mask=mask)


def handshake(target: str, host: str, *fields: str, key: str = SAMPLE_KEY, version: str = "13") -> bytes:
    """An opening handshake (section 4.1); an empty key or version is left out."""
    lines = [f"GET {target} HTTP/1.1", f"Host: {host}", "Connection: Upgrade", "Upgrade: websocket"]
    lines += [f"Sec-WebSocket-Key: {key}"] if key else []
    lines += [f"Sec-WebSocket-Version: {version}"] if version else []
    return "\r\n".join([*lines, *fields, "", ""]).encode()


# The client


class Await(NamedTuple):
    """Go on when these bytes have come from the server."""

    data: bytes


class Frames(NamedTuple):
    """Go on when so many frames have come from the server since the handshake."""

    count: int


FIN = "FIN"
RST = "RST"
Step = bytes | Await | Frames | str
"bytes to send, what to wait for, or a way to end the client's side"


class Recording(NamedTuple):
    """All that a connection showed to its client."""

    status: int
    fields: list[tuple[bytes, bytes]]
    "of the handshake's answer, without those of the hop"
    data: bytes
    "what followed that answer's head"
    end: str
    "how the server ended it: FIN or RST; empty if the client did"


# What each hop says for itself, or what the clock changes.
_OF_THE_HOP = {b"connection", b"date", b"via"}


def record(
    address: tuple[str, int], opening: bytes, steps: Sequence[Step], *, early: int = 0, chop: int = 0
) -> Recording:
    """Send the opening, then the steps, and read to the end of the connection.

    ``early`` steps leave in the same packet as the opening; with ``chop`` bytes leave in pieces of that size.
    """
    with socket.create_connection(address, timeout=LIMIT) as sock:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        client = _Client(sock)
        for step in steps[:early]:
            assert isinstance(step, bytes)
            opening += step
        sock.sendall(opening)
        client.until(b"\r\n\r\n")
        head, _, client.data = client.data.partition(b"\r\n\r\n")
        line, *lines = head.split(b"\r\n")
        fields = [(name.lower(), value.strip()) for name, _, value in (bytes(each).partition(b":") for each in lines)]
        status = int(line.split(b" ")[1])
        if status != 101:
            client.size(int(dict(fields)[b"content-length"]))
        else:
            for step in steps[early:]:
                client.take(step, chop)
            client.to_the_end()
    kept = [field for field in fields if field[0] not in _OF_THE_HOP]
    kept.sort(key=lambda field: field[0] != b"upgrade")  # each hop says it anew, so where it stands is the hop's
    return Recording(status, kept, bytes(client.data), client.end)


class _Client:
    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.data = bytearray()
        self.end = ""
        self._ended = False

    def take(self, step: Step, chop: int) -> None:
        if isinstance(step, Await):
            self.until(step.data)
        elif isinstance(step, Frames):
            while _whole_frames(self.data) < step.count:
                assert self._more(), f"no {step.count} frames, but {bytes(self.data[:200])!r}, then {self.end}"
        elif step == FIN:
            with suppress(OSError):  # the server was quicker
                self.sock.shutdown(socket.SHUT_WR)
        elif step == RST:
            self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self._ended = True
        elif isinstance(step, bytes):
            for start in range(0, len(step), chop or len(step)):
                self.sock.sendall(step[start : start + chop] if chop else step)

    def until(self, data: bytes) -> None:
        start = 0
        while (found := self.data.find(data, start)) < 0:
            start = max(0, len(self.data) - len(data) + 1)
            if not self._more():
                break
        assert found >= 0, f"{data[:80]!r} did not come, but {bytes(self.data[:200])!r}, then {self.end}"

    def size(self, size: int) -> None:
        while len(self.data) < size and self._more():
            pass

    def to_the_end(self) -> None:
        while self._more():
            pass

    def _more(self) -> bool:
        if self._ended:
            return False
        try:
            data = self.sock.recv(1 << 20)
        except ConnectionResetError:
            data, self.end, self._ended = b"", RST, True
        else:
            if not data:
                self.end, self._ended = FIN, True
        self.data += data
        return not self._ended


def _whole_frames(data: bytearray) -> int:
    """How many frames of a server, which have no mask, these bytes hold."""
    found = position = 0
    while len(data) >= position + 2:
        size = data[position + 1]
        extra = {126: 2, 127: 8}.get(size, 0)
        if extra:
            size = int.from_bytes(data[position + 2 : position + 2 + extra], "big")
        position += 2 + extra + size
        found += len(data) >= position
    return found


# The server


class WebSocketBackend:
    """A server of the ``websockets`` library that does as a target says, and notes what it has seen.

    ``/echo`` sends each message back; ``/close?code=C&reason=R`` closes; ``/hello`` speaks first, then echoes;
    ``/ping`` pings, waits for its pong, then echoes; ``/big`` sends 16 MB; ``/fin`` and ``/rst`` wait for a message and
    end the connection without a word; ``/status?code=C`` refuses the handshake with a body.
    """

    def __init__(self) -> None:
        self.port = 0
        self.seen: dict[str, list[object]] = {}
        "by the target: the messages, then the code and the reason of the end"
        self._numbers = count()
        self._ready = threading.Event()
        self._stop: asyncio.Event | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()), daemon=True, name="websockets")

    @property
    def target(self) -> str:
        """The BACKEND argument for it."""
        return f"http://127.0.0.1:{self.port}"

    def __enter__(self) -> Self:
        self._thread.start()
        assert self._ready.wait(LIMIT)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        assert self._loop is not None and self._stop is not None
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(LIMIT)

    def unique(self, target: str) -> str:
        """The target in a form that no other connection has."""
        return f"{target}{'&' if '?' in target else '?'}n={next(self._numbers)}"

    def saw(self, target: str) -> list[object]:
        """What the connection of a unique target was like here, once it is over."""
        deadline = time.monotonic() + LIMIT
        while target not in self.seen:
            assert time.monotonic() < deadline, f"{target} is not over at the server"
            time.sleep(0.002)
        return self.seen[target]

    async def _run(self) -> None:
        self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
        async with serve(
            self._handle,
            "127.0.0.1",
            0,
            select_subprotocol=_choose,
            process_request=self._refuse,
            ping_interval=None,
            max_size=2 * BIG,
        ) as server:
            self._note_port(server)
            await self._stop.wait()

    def _note_port(self, server: Server) -> None:
        self.port = next(iter(server.sockets)).getsockname()[1]
        self._ready.set()

    def _refuse(self, connection: ServerConnection, request: Request) -> Response | None:
        parts = urlsplit(request.path)
        if parts.path != "/status":
            return None
        status = int(parse_qs(parts.query)["code"][0])
        return connection.respond(status, f"no WebSocket here: {status}\n")

    async def _handle(self, connection: ServerConnection) -> None:
        assert connection.request is not None
        target = connection.request.path
        parts = urlsplit(target)
        messages: list[object] = []
        with suppress(ConnectionClosed):
            await self._talk(connection, parts.path, parse_qs(parts.query), messages)
        await connection.wait_closed()
        self.seen[target] = [*messages, connection.close_code, connection.close_reason]

    async def _talk(
        self, connection: ServerConnection, path: str, query: dict[str, list[str]], messages: list[object]
    ) -> None:
        if path == "/close":
            await connection.close(int(query["code"][0]), query.get("reason", [""])[0])
        elif path == "/hello":
            for word in ("one", b"two", ""):
                await connection.send(word)
        elif path == "/ping":
            await (await connection.ping(b"are you there"))
        elif path == "/big":
            await connection.send(bytes(BIG))
        async for message in connection:
            messages.append(_note(message))
            if path in ("/fin", "/rst"):
                if path == "/rst":
                    sock = connection.transport.get_extra_info("socket")
                    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                connection.transport.abort()
            else:
                await connection.send(message)


def _choose(connection: ServerConnection, offered: Sequence[Subprotocol]) -> Subprotocol | None:
    # Left to itself, the library refuses a client that offers none.
    known = [Subprotocol(name) for name in ("chat.v2", "chat.v1") if name in offered]
    return known[0] if known else None


def _note(message: str | bytes) -> tuple[str, int, str]:
    data = message.encode() if isinstance(message, str) else message
    return type(message).__name__, len(data), sha256(data).hexdigest()[:16]
