"""A visitor's connection in memory: a transport that writes down, and a peer leg that records and answers."""

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from ipaddress import ip_network
from typing import Any

from quictunnel.exchange import Leg, join
from quictunnel.http.tls import VisitorSocket
from quictunnel.http.visitor import VisitorLeg, VisitorLimits, VisitorListener
from quictunnel.http.visitor_connection import VisitorConnection
from quictunnel.http.visitor_output import VisitorOutput
from quictunnel.wire.errors import TunnelError
from quictunnel.wire.frames import Data, End, Frame, RequestHead, ResponseHead

DATE = (b"date", b"Thu, 01 Jan 2026 00:00:00 GMT")


class FakeSocket:
    """As much of a socket as the connection asks for."""

    def __init__(self) -> None:
        self.error = 0
        self.options: list[object] = []

    def fileno(self) -> int:
        return -1

    def getsockopt(self, level: int, option: int) -> int:
        return self.error

    def setsockopt(self, level: int, option: int, value: object) -> None:
        self.options.append(value)


class FakeTls(VisitorSocket):
    """The outcome of a handshake, without one."""

    alpn: str | None

    @classmethod
    def agreed(cls, alpn: str | None, asked: str = "") -> "FakeTls":
        """A handshake for the host ``asked`` that agreed on ``alpn``."""
        made = cls.__new__(cls)
        made.server_name, made.alpn = asked, alpn
        return made

    def selected_alpn_protocol(self) -> str | None:
        return self.alpn


class FakeTransport(asyncio.Transport):
    """A transport that keeps what is written; ``taken`` False leaves it in the buffer."""

    def __init__(
        self, peer: object = ("192.0.2.7", 5555), *, tls: bool = False, asked: str = "", alpn: str | None = "http/1.1"
    ) -> None:
        extra: dict[str, object] = {"peername": peer, "socket": FakeSocket()}
        if tls:
            extra |= {"sslcontext": object(), "ssl_object": FakeTls.agreed(alpn, asked)}
        super().__init__(extra)
        self.tls = tls
        self.protocol: VisitorOutput | None = None
        self.writes: list[bytes] = []
        self.reading = True
        self.eof = self.closed = self.aborted = self.lost = False
        self.buffered = 0
        self.reset = False
        "a reset has come that the event loop has not read yet"

    @property
    def socket(self) -> FakeSocket:
        sock = self.get_extra_info("socket")
        assert isinstance(sock, FakeSocket)
        return sock

    @property
    def written(self) -> bytes:
        return b"".join(self.writes)

    def write(self, data: Any) -> None:
        assert not self.closed, "a write after the close"
        assert not self.eof, "a write after the half-close"
        assert data, "an empty write"
        self.writes.append(bytes(data))

    def set_protocol(self, protocol: asyncio.BaseProtocol) -> None:
        assert isinstance(protocol, VisitorOutput)
        self.protocol = protocol

    def can_write_eof(self) -> bool:
        return not self.tls

    def write_eof(self) -> None:
        if self.reset:
            raise OSError(107, "Transport endpoint is not connected")
        self.eof = True

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        assert self.tls and high == 64 * 1024

    def get_write_buffer_size(self) -> int:
        return self.buffered

    def pause_reading(self) -> None:
        assert self.reading
        self.reading = False

    def resume_reading(self) -> None:
        assert not self.reading
        self.reading = True

    def is_closing(self) -> bool:
        return self.closed

    def close(self) -> None:
        self._lose()

    def abort(self) -> None:
        self.aborted = True
        self._lose()

    def _lose(self) -> None:
        self.closed = True
        if not self.lost and self.protocol is not None:
            self.lost = True
            asyncio.get_running_loop().call_soon(self.protocol.connection_lost, None)


class Peer(Leg):
    """The other leg of an exchange: records frames and errors, and may answer by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.frames: list[Frame] = []
        self.errors: list[TunnelError] = []
        self.paused = False
        self.on_frame: Callable[[Frame], None] = lambda frame: None

    def receive(self, frame: Frame) -> None:
        assert not self.errors, "a frame after an abort"
        self.frames.append(frame)
        self.on_frame(frame)

    def pause(self) -> None:
        self.paused = True

    def resume(self) -> None:
        self.paused = False

    def abort(self, error: TunnelError) -> None:
        self.errors.append(error)

    @property
    def head(self) -> RequestHead:
        head = self.frames[0]
        assert isinstance(head, RequestHead)
        return head

    @property
    def body(self) -> bytes:
        return b"".join(frame.data for frame in self.frames if isinstance(frame, Data))

    @property
    def ended(self) -> bool:
        return any(isinstance(frame, End) for frame in self.frames)

    def answer(self, *frames: Frame) -> None:
        """Hand these over; the final End ends the exchange."""
        for frame in frames:
            peer = self.peer
            if isinstance(frame, End) and not (isinstance(peer, VisitorLeg) and peer.status == 101):
                self.detach()
            peer.receive(frame)

    def reply(self, status: int = 200, body: bytes = b"ok") -> None:
        """A whole answer with a length."""
        length = (b"content-length", b"%d" % len(body))
        data = [Data(body)] if body else []
        self.answer(ResponseHead(status, [DATE, length]), *data, End())


class Edge:
    """A listener without sockets: connections are made, and everything that came through is kept."""

    def __init__(self, **limits: Any) -> None:
        self.peers: list[Peer] = []
        self.legs: list[VisitorLeg] = []
        self.done: list[VisitorLeg] = []
        self.refusal: TunnelError | None = None
        self.on_open: Callable[[Peer], None] = lambda peer: None
        self.listener = VisitorListener(
            self._open,
            VisitorLimits(**limits),
            [ip_network("10.0.0.0/8"), ip_network("2001:db8::/32")],
            self.done.append,
        )

    def _open(self, head: RequestHead, leg: VisitorLeg) -> None:
        self.legs.append(leg)
        if self.refusal is not None:
            leg.abort(self.refusal)
            return
        peer = Peer()
        self.peers.append(peer)
        join(leg, peer)
        self.on_open(peer)

    @property
    def peer(self) -> Peer:
        """The latest one."""
        return self.peers[-1]

    def connect(
        self,
        peer: object = ("192.0.2.7", 5555),
        *,
        tls: bool = False,
        asked: str = "",
        alpn: str | None = "http/1.1",
    ) -> tuple[VisitorConnection, FakeTransport]:
        """A new connection of a visitor, who ``asked`` for that host in its TLS handshake."""
        connection = VisitorConnection(self.listener)
        transport = FakeTransport(peer, tls=tls, asked=asked, alpn=alpn)
        transport.protocol = connection
        connection.connection_made(transport)
        return connection, transport


@contextmanager
def edge(**limits: Any) -> Iterator[Edge]:
    """An edge that leaves no timer behind."""
    made = Edge(**limits)
    try:
        yield made
    finally:
        made.listener.close()
