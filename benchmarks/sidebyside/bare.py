"""A tunnel that is nothing but its way: what Python and a QUIC library leave to a product, on the machine at hand.

    python -m benchmarks.sidebyside.bare server|client ENGINE QUIC-PORT HTTP-PORT CERTIFICATE KEY

One connection, GET without a body, answers that are complete before they are passed on. Nothing is checked, bounded,
counted, logged or retried, nobody is asked who he is, and all breaks when anything does. HTTP-PORT is where visitors
come, or the backend is.
"""

import asyncio
import gc
import socket
import sys
from typing import Any

import httptools
import pylsqpack
import uvloop

from quictunnel.quic.engine import ClientTrust, ServerIdentity, select_engine

SIZE = 16_000
"bytes of a datagram: all the way is loopback"

encoder = pylsqpack.Encoder()
decoder = pylsqpack.Decoder(0, 0)


def message(fields: list[tuple[bytes, bytes]], body: bytes = b"") -> bytes:
    head = encoder.encode(0, fields)[1]
    return len(head).to_bytes(4) + head + body


def parse(data: bytes) -> tuple[list[tuple[bytes, bytes]], bytes]:
    end = 4 + int.from_bytes(data[:4])
    return decoder.feed_header(0, data[4:end])[1], data[end:]


def written(start: bytes, fields: list[tuple[bytes, bytes]], body: bytes = b"") -> bytes:
    parts = [start]
    for name, value in fields:
        parts += [name, b": ", value, b"\r\n"]
    return b"".join([*parts, b"\r\n", body])


class End:
    """One end of the connection: what has come is acted upon at once, and what is to leave does at the turn's end."""

    connection: Any = None
    ahead = 0.0
    "what the connection was told that the time is"

    def __init__(self, engine: str, sock: socket.socket) -> None:
        self.engine = select_engine(engine)
        self.loop = asyncio.get_running_loop()
        sock.setblocking(False)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4 << 20)
        self.sock = sock
        self.streams: dict[int, bytearray] = {}
        self.scheduled = False
        self.ready = self.loop.create_future()
        self.timer: asyncio.TimerHandle | None = None
        self.at = 0.0  # when the timer is due; uvloop's fire up to half a millisecond too early
        self.loop.add_reader(sock.fileno(), self.readable)

    def accept(self, data: bytes) -> Any:
        raise NotImplementedError

    def complete(self, stream: int, data: bytes) -> None:
        raise NotImplementedError

    def wake(self) -> None:
        if not self.scheduled:
            self.scheduled = True
            self.loop.call_soon(self.flush)

    def flush(self) -> None:
        self.scheduled = False
        for data, address in self.connection.datagrams_to_send(now=self.now()):
            self.sock.sendto(data, address)
        at = self.connection.get_timer()
        if at is not None and (self.timer is None or at < self.at):
            if self.timer is not None:
                self.timer.cancel()
            self.at = at
            self.timer = self.loop.call_at(at, self.fired)

    def fired(self) -> None:
        self.timer = None
        self.ahead = max(self.now(), self.at)
        self.connection.handle_timer(now=self.ahead)
        self.events()
        self.wake()

    def now(self) -> float:
        return max(self.loop.time(), self.ahead)

    def readable(self) -> None:
        for _ in range(32):
            try:
                data, address = self.sock.recvfrom(65535)
            except BlockingIOError:
                break
            if self.connection is None:
                self.connection = self.accept(data)
            self.connection.receive_datagram(data, address, now=self.now())
            if self.engine.sends_before_events and self.ready.done():
                self.flush()
            self.events()
        self.received()
        self.wake()

    def received(self) -> None:
        """Everything that has come was acted upon."""

    def events(self) -> None:
        kinds = self.engine.events
        while (event := self.connection.next_event()) is not None:
            if type(event) is kinds.StreamDataReceived:
                data = self.streams.setdefault(event.stream_id, bytearray())
                data += event.data
                if event.end_stream:
                    del self.streams[event.stream_id]
                    self.complete(event.stream_id, bytes(data))
            elif type(event) is kinds.HandshakeCompleted:
                self.ready.set_result(None)


class Server(End):
    def __init__(self, engine: str, sock: socket.socket, identity: ServerIdentity) -> None:
        super().__init__(engine, sock)
        self.configuration = self.engine.server_configuration(identity, SIZE)
        self.visitors: dict[int, Visitor] = {}
        self.waiting: list[tuple[Visitor, bytes]] = []
        self.opened = 0

    def accept(self, data: bytes) -> Any:
        connection = self.engine.accept(self.configuration, data[6 : 6 + data[5]], None)
        connection.expect_datagrams(SIZE)
        return connection

    def ask(self, visitor: "Visitor", request: bytes) -> None:
        self.waiting.append((visitor, request))
        self.received()

    def received(self) -> None:
        if not self.ready.done():
            return
        waiting, connection = self.waiting, self.connection
        while waiting and self.opened < self.engine.streams_allowed(connection):
            visitor, request = waiting.pop(0)
            self.opened += 1
            stream = connection.get_next_available_stream_id()
            self.visitors[stream] = visitor
            connection.send_stream_data(stream, request, True)
        if waiting:
            connection.send_ping(1)  # the peer raises its limit in a packet that it has to send
        self.wake()

    def complete(self, stream: int, data: bytes) -> None:
        fields, body = parse(data)
        transport = self.visitors.pop(stream).transport
        if not transport.is_closing():
            transport.write(written(b"HTTP/1.1 " + fields[0][1] + b" \r\n", fields[1:], body))


class Visitor(asyncio.Protocol):
    transport: Any

    def __init__(self, server: Server) -> None:
        self.server = server
        self.parser = httptools.HttpRequestParser(self)
        self.fields: list[tuple[bytes, bytes]] = []

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        self.parser.feed_data(data)

    def on_url(self, url: bytes) -> None:
        self.fields = [(b":path", url)]

    def on_header(self, name: bytes, value: bytes) -> None:
        self.fields.append((name.lower(), value))

    def on_message_complete(self) -> None:
        self.server.ask(self, message(self.fields))


class Client(End):
    def __init__(self, engine: str, sock: socket.socket, backend: int) -> None:
        super().__init__(engine, sock)
        self.backend = backend
        self.kept: list[Origin] = []
        self.tasks: set[asyncio.Task[None]] = set()
        self.connection = self.engine.dial(ClientTrust("localhost", verify=False), SIZE)
        self.connection.expect_datagrams(SIZE)

    def complete(self, stream: int, data: bytes) -> None:
        fields, _ = parse(data)
        request = written(b"GET " + fields[0][1] + b" HTTP/1.1\r\n", fields[1:])
        if self.kept:
            self.kept.pop().ask(stream, request)
        else:
            task = self.loop.create_task(self.dial(stream, request))
            self.tasks.add(task)
            task.add_done_callback(self.tasks.discard)

    async def dial(self, stream: int, request: bytes) -> None:
        _, origin = await self.loop.create_connection(lambda: Origin(self), "127.0.0.1", self.backend)
        origin.ask(stream, request)


class Origin(asyncio.Protocol):
    transport: Any

    def __init__(self, client: Client) -> None:
        self.client = client
        self.parser = httptools.HttpResponseParser(self)
        self.stream = -1
        self.fields: list[tuple[bytes, bytes]] = []
        self.body: list[bytes] = []

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport

    def ask(self, stream: int, request: bytes) -> None:
        self.stream, self.fields, self.body = stream, [], []
        self.transport.write(request)

    def data_received(self, data: bytes) -> None:
        self.parser.feed_data(data)

    def on_header(self, name: bytes, value: bytes) -> None:
        self.fields.append((name.lower(), value))

    def on_body(self, data: bytes) -> None:
        self.body.append(data)

    def on_message_complete(self) -> None:
        status = (b":status", b"%d" % self.parser.get_status_code())
        self.client.connection.send_stream_data(self.stream, message([status, *self.fields], b"".join(self.body)), True)
        self.client.wake()
        self.client.kept.append(self)


async def main(role: str, engine: str, quic: int, http: int, certificate: str, key: str) -> None:
    gc.freeze()
    gc.set_threshold(10_000, 50, 1_000)
    loop = asyncio.get_running_loop()
    sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    if role == "server":
        sock.bind(("127.0.0.1", quic))
        server = Server(engine, sock, ServerIdentity(certificate, key))
        await loop.create_server(lambda: Visitor(server), "127.0.0.1", http)
    else:
        client = Client(engine, sock, http)
        client.connection.connect(("127.0.0.1", quic), now=loop.time())
        client.flush()
        await client.ready
    print("ready", flush=True)
    await asyncio.Event().wait()


if __name__ == "__main__":
    uvloop.run(main(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]), *sys.argv[5:7]))
