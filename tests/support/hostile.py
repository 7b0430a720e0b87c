"""Ends that keep to no rule: QUIC by the library, everything above it by the test."""

import asyncio
import socket
import time
from collections.abc import Callable
from typing import Any

from quictunnel.quic.engine import ClientTrust, select_engine
from quictunnel.quic.link import Link, LinkOwner
from quictunnel.quic.listen import LinkListener
from quictunnel.quic.sockets import DatagramSocket
from quictunnel.wire.codec import FrameType, push_varint
from quictunnel.wire.control import ControlDecoder, ControlMessage, Credit, Hello, Strange, Welcome, encode_control
from quictunnel.wire.credit import WindowBudget
from tests.support.ends import Ends
from tests.support.memory import identity

__all__ = ["HostileClient", "HostileServer", "Workers", "control", "frame"]


def frame(kind: int, payload: bytes) -> bytes:
    """A frame of any type."""
    return push_varint(kind) + push_varint(len(payload)) + payload


class HostileClient:
    """A client on the network of ``Ends`` that says and sends what the test wants.

    With ``deaf`` it allows the server not one byte of stream data beyond what it has allowed at first.
    """

    def __init__(self, ends: Ends, engine: str, *, deaf: int | None = None) -> None:
        self._ends = ends
        self._loop = ends.loop
        self.engine = select_engine(engine)
        self.connection: Any = self.engine.dial(ClientTrust("127.0.0.1", identity()[1]), 1200)
        if deaf is not None:  # aioquic's client only: the other one's windows are its own
            connection = self.connection
            connection._local_max_stream_data_bidi_local = connection._local_max_stream_data_bidi_remote = deaf
            connection._write_stream_limits = lambda **options: None
        self.ready = False
        self.closed: tuple[int, str] | None = None
        self.streams: dict[int, bytearray] = {}
        self.ended: set[int] = set()
        self.cut: dict[int, int] = {}
        self.messages: list[ControlMessage | Credit | Strange] = []
        self._control = ControlDecoder()
        self._timer: asyncio.TimerHandle | None = None
        self._socket: DatagramSocket

    async def connect(self) -> "HostileClient":
        """Shake hands."""
        sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        sock.connect(self._ends.quic_address)
        self._socket = DatagramSocket(sock, self._received)
        self.connection.connect(self._ends.quic_address, now=self._loop.time())
        self.pump()
        await self._ends.until(lambda: self.ready)
        self._stay()
        return self

    def _stay(self) -> None:
        if self.closed is None and not self._socket.closed:
            self.connection.send_ping(1)
            self.pump()
            self._loop.call_later(10, self._stay)

    async def hello(self, **values: Any) -> ControlMessage:
        """Say hello, with ``values`` in place of true ones; the answer."""
        said = {"version": 1, "tunnel": "app", "session": "s" * 32, "token": self._ends.token.secret, **values}
        before = len(self.messages)
        self.say(Hello(**said))
        await self._ends.until(lambda: len(self.messages) > before or self.closed)
        message = self.messages[before]
        assert not isinstance(message, Credit | Strange)
        return message

    async def serving(self, **values: Any) -> "HostileClient":
        """Shake hands and be welcomed."""
        await self.connect()
        assert isinstance(await self.hello(**values), Welcome)
        return self

    def say(self, *messages: ControlMessage | bytes) -> None:
        """Write to the control stream: messages, or any bytes."""
        self.send(0, b"".join(each if isinstance(each, bytes) else encode_control(each) for each in messages))

    def send(self, stream: int, data: bytes, fin: bool = False) -> None:
        """Write to a stream, its own or not."""
        self.connection.send_stream_data(stream, data, fin)
        self.pump()

    def send_at(self, stream: int, offset: int, data: bytes) -> None:
        """Write far ahead on a stream, with nothing before (aioquic's client only)."""
        sender = self.connection._get_or_create_stream_for_send(stream).sender
        sender._buffer_start = sender._buffer_stop = offset
        self.send(stream, data)

    async def asked(self, count: int = 1) -> list[int]:
        """Wait until so many requests are there; their streams."""
        await self._ends.until(lambda: len(self.requests) >= count)
        return self.requests

    @property
    def requests(self) -> list[int]:
        return [stream for stream in self.streams if stream & 3 == 1]

    def _received(self, datagrams: list[bytes], address: Any) -> None:
        for data in datagrams:
            self.connection.receive_datagram(data, address, now=self._loop.time())
        self._events()
        self.pump()

    def pump(self) -> None:
        """Send what there is to send."""
        now = self._loop.time()
        for data, _ in self.connection.datagrams_to_send(now=now):
            self._socket.send(data, None)
        if self._timer is not None:
            self._timer.cancel()
        at = self.connection.get_timer()
        self._timer = None if at is None or self.closed else self._loop.call_at(max(at, now + 0.001), self._late)

    def _late(self) -> None:
        self.connection.handle_timer(now=self._loop.time())
        self._events()
        self.pump()

    def _events(self) -> None:
        while (event := self.connection.next_event()) is not None:
            kind = type(event).__name__
            if kind == "StreamDataReceived":
                self.streams.setdefault(event.stream_id, bytearray()).extend(event.data)
                if event.stream_id == 0:
                    self.messages += self._control.feed(event.data)
                if event.end_stream:
                    self.ended.add(event.stream_id)
            elif kind in ("StreamReset", "StopSendingReceived"):
                self.cut[event.stream_id] = event.error_code
            elif kind == "HandshakeCompleted":
                self.ready = True
            elif kind == "ConnectionTerminated":
                self.closed = (event.error_code, event.reason_phrase)
                self._socket.close()


class HostileServer(LinkOwner):
    """A server that clients of ``Ends`` believe and should not: ``on_hello`` is what it does to each link."""

    def __init__(self, ends: Ends, engine: str) -> None:
        files, _ = identity()
        self._ends = ends
        self.listener = LinkListener(select_engine(engine), files, self, WindowBudget(1 << 24), retry="never")
        self.hellos: list[Hello] = []
        self.links: list[Link] = []
        self.messages: list[ControlMessage] = []
        self.on_hello: Callable[[Link, Hello], None] = lambda link, hello: link.send_control(Welcome("app"))

    async def start(self) -> "HostileServer":
        self._ends._port = (await self.listener.start("127.0.0.1", 0))[1]
        return self

    def link_control(self, link: Link, message: ControlMessage) -> None:
        self.messages.append(message)
        if isinstance(message, Hello):
            self.hellos.append(message)
            self.links.append(link)
            self.listener.accepted(link)
            self.on_hello(link, message)

    @staticmethod
    def write(link: Link, stream: int, data: bytes, fin: bool = False) -> None:
        """Put any bytes on a stream; -1 is a new one."""
        connection = link._connection
        connection.send_stream_data(connection.get_next_available_stream_id() if stream < 0 else stream, data, fin)
        link.schedule()


class Workers:
    """Processes of one server on one port, each a HostileServer that welcomes and says which one it is.

    A packet of no known connection goes to the process that the first byte of its destination says, or, if the server
    ``steers`` none, to one that its sender's port says. ``lost`` are processes that nothing reaches.
    """

    def __init__(self, ends: Ends, engine: str, count: int, *, steers: bool = True) -> None:
        self._ends = ends
        self._steers = steers
        self.lost: set[int] = set()
        self.servers = [HostileServer(ends, engine) for _ in range(count)]
        self._retries: dict[bytes, int] = {}
        for number, server in enumerate(self.servers):
            server.on_hello = self._welcomes(number)

    def _welcomes(self, number: int) -> Callable[[Link, Hello], None]:
        """As a real one does it: the link that a new one replaces is closed."""
        server = self.servers[number]

        def welcome(link: Link, hello: Hello) -> None:
            for other, said in zip(server.links, server.hellos, strict=True):
                if other is not link and said.link == hello.link:
                    other.close()
            link.send_control(Welcome("app", worker=number, workers=len(self.servers)))

        return welcome

    async def start(self) -> "Workers":
        """In the place of whatever was there."""
        sock = self._bound()
        self._ends._port = sock.getsockname()[1]
        self._socket = DatagramSocket(sock, self._received)
        for number, server in enumerate(self.servers):
            server.listener._socket = _OfWorker(self, self._socket, number)  # type: ignore[assignment]
        return self

    def _bound(self) -> socket.socket:
        """At the port of whatever was there, which a test in another process may have been given for a moment."""
        until = time.monotonic() + 20
        while True:
            sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
            try:
                sock.bind(("127.0.0.1", self._ends._port))
            except OSError:
                sock.close()
                if time.monotonic() > until:
                    raise
                time.sleep(0.05)
            else:
                return sock

    def stop(self) -> None:
        """It is gone and has told nobody."""
        self._socket.close()

    @property
    def numbers(self) -> list[list[int]]:
        """Of the links of each process that are not closed."""
        return [
            sorted(hello.link for link, hello in zip(each.links, each.hellos, strict=True) if link.closed is None)
            for each in self.servers
        ]

    def _received(self, datagrams: list[bytes], addr: Any) -> None:
        for data in datagrams:
            self._steer(data, addr)

    def _steer(self, data: bytes, addr: Any) -> None:
        cid = data[6 : 6 + data[5]] if data[0] & 0x80 else data[1:9]
        known = [number for number, each in enumerate(self.servers) if cid in each.listener._links]
        by_chance = cid[0] if self._steers else addr[1]
        number = known[0] if known else self._retries.get(cid, by_chance % len(self.servers))
        if number not in self.lost:
            self.servers[number].listener.datagram_received(data, addr)

    def sent(self, data: bytes, number: int) -> None:
        if data[0] & 0xF0 == 0xF0:  # a Retry: its source is what the client sends to next
            start = 6 + data[5]
            self._retries[data[start + 1 : start + 1 + data[start]]] = number


class _OfWorker:
    """A process's share of the socket."""

    def __init__(self, workers: Workers, sock: DatagramSocket, number: int) -> None:
        self._workers = workers
        self._socket = sock
        self._number = number

    def send(self, data: bytes, address: Any) -> None:
        self._workers.sent(data, self._number)
        if self._number not in self._workers.lost:
            self._socket.send(data, address)

    def send_all(self, datagrams: list[tuple[bytes, Any]]) -> None:
        for data, address in datagrams:
            self.send(data, address)

    def close(self) -> None:
        pass


def control(payload: bytes) -> bytes:
    """A CONTROL frame of any payload."""
    return frame(FrameType.CONTROL, payload)
