"""A backend for what nginx cannot be told to do: `python benchmarks/backend.py PORT [MILLISECONDS]`.

It answers 100 bytes after so many milliseconds. Some targets are answered otherwise:

/after/MILLISECONDS  after so long
/sink                how many bytes of body came with the request
/received            how many bytes of bodies have come in all
/poll                nothing until somebody asks for /release, which says how many waited
/waiting             how many wait so, and how many WebSockets there are
/socket              a WebSocket (RFC 6455) that sends back each short message
"""

import asyncio
import base64
import hashlib
import resource
import sys
from contextlib import suppress
from typing import cast

import httptools

FIELDS = b"HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nContent-Length: %d\r\n\r\n"
ANSWER = FIELDS % 100 + b"x" * 100
GUID = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"  # RFC 6455 section 1.3


class All:
    """What the connections have in common."""

    def __init__(self) -> None:
        self.received = 0
        self.polls: set[Backend] = set()
        self.sockets: set[Backend] = set()


class Backend(asyncio.Protocol):
    """Answers the requests of a connection, one at a time."""

    def __init__(self, delay: float, everything: All) -> None:
        self.delay = delay
        self.all = everything
        self.parser = httptools.HttpRequestParser(self)
        self.begin()

    def begin(self) -> None:
        self.target = b""
        self.key = b""
        self.received = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)  # uvloop's is not one by its class
        self.frames: bytearray | None = None

    def connection_lost(self, exc: Exception | None) -> None:
        self.all.polls.discard(self)
        self.all.sockets.discard(self)

    def data_received(self, data: bytes) -> None:
        if self.frames is None:
            try:
                self.parser.feed_data(data)
            except httptools.HttpParserUpgrade:
                self.upgrade()
            except httptools.HttpParserError:
                self.transport.close()
            return
        self.frames += data
        self.talk(self.frames)

    def on_url(self, url: bytes) -> None:
        self.target += url

    def on_header(self, name: bytes, value: bytes) -> None:
        if name.lower() == b"sec-websocket-key":
            self.key = value

    def on_body(self, body: bytes) -> None:
        self.received += len(body)
        self.all.received += len(body)

    def on_message_complete(self) -> None:
        loop, target, received = asyncio.get_running_loop(), self.target, self.received
        if self.key:
            return  # the parser tells of the upgrade next
        self.begin()
        match target.split(b"/")[1:]:
            case [b"sink"]:
                self.say(b"%d" % received)
            case [b"received"]:
                self.say(b"%d" % self.all.received)
            case [b"poll"]:
                self.all.polls.add(self)
            case [b"release"]:
                waiting = tuple(self.all.polls)
                self.all.polls.clear()
                for each in waiting:
                    each.answer()
                self.say(b"%d" % len(waiting))
            case [b"waiting"]:
                self.say(b"%d %d" % (len(self.all.polls), len(self.all.sockets)))
            case [b"after", milliseconds]:
                loop.call_later(int(milliseconds) / 1000, self.answer)
            case _:
                loop.call_later(self.delay, self.answer)

    def answer(self) -> None:
        if not self.transport.is_closing():
            self.transport.write(ANSWER)

    def say(self, text: bytes) -> None:
        self.transport.write(FIELDS % len(text) + text)

    def upgrade(self) -> None:
        accept = base64.b64encode(hashlib.sha1(self.key + GUID).digest())
        self.transport.write(
            b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
            b"Sec-WebSocket-Accept: %b\r\n\r\n" % accept
        )
        self.frames = bytearray()
        self.all.sockets.add(self)

    def talk(self, frames: bytearray) -> None:
        # RFC 6455 section 5.2: what a client sends is masked; nothing here is longer than 125 bytes.
        while len(frames) >= 6 and len(frames) >= 6 + (frames[1] & 0x7F):
            size = frames[1] & 0x7F
            mask, masked = frames[2:6], frames[6 : 6 + size]
            first = frames[0]
            del frames[: 6 + size]
            text = bytes(byte ^ mask[place % 4] for place, byte in enumerate(masked))
            self.transport.write(bytes((first, size)) + text)
            if first & 0x0F == 8:
                self.transport.close()


async def main(port: int, milliseconds: float) -> None:
    """Serve until the process is ended."""
    everything = All()
    server = await asyncio.get_running_loop().create_server(
        lambda: Backend(milliseconds / 1000, everything), "127.0.0.1", port, backlog=4096
    )
    print(f"ready 127.0.0.1:{server.sockets[0].getsockname()[1]}", flush=True)
    await server.serve_forever()


if __name__ == "__main__":
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    runner = asyncio.Runner()
    with suppress(ImportError):
        import uvloop

        runner = asyncio.Runner(loop_factory=uvloop.new_event_loop)
    with runner, suppress(KeyboardInterrupt):
        runner.run(main(int(sys.argv[1]), float(sys.argv[2]) if len(sys.argv) > 2 else 35.0))
