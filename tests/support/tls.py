"""TLS clients and servers in memory and on sockets: a CA of one's own, and handshakes that are shown step by step."""

import asyncio
import importlib.util
import socket
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from types import TracebackType
from typing import TypeVar

import pytest

from quictunnel.http.handshakes import TlsListener
from quictunnel.http.tls import VisitorTls
from quictunnel.trust.certificates import Ensured
from tests.support.visitors import Edge, Peer

__all__ = ["LOOPS", "TlsPort", "TlsVisitor", "client_context", "client_hello", "handshake", "run", "tls_port"]

T = TypeVar("T")


def _loops() -> dict[str, Callable[[], asyncio.AbstractEventLoop]]:
    if importlib.util.find_spec("uvloop") is None:
        return {"asyncio": asyncio.SelectorEventLoop}
    import uvloop

    return {"asyncio": asyncio.SelectorEventLoop, "uvloop": uvloop.new_event_loop}


LOOPS = [pytest.param(make, id=name) for name, make in _loops().items()]
"ways to make an event loop, as parameters of a test"


def client_context(authority: Path | str, *alpn: str) -> ssl.SSLContext:
    """A client that trusts that CA's file alone, and checks names."""
    context = ssl.create_default_context(cafile=str(authority))
    if alpn:
        context.set_alpn_protocols(list(alpn))
    return context


def handshake(
    server_side: ssl.SSLContext, client_side: ssl.SSLContext, name: str | None
) -> tuple[ssl.SSLObject, ssl.SSLObject]:
    """Shake hands in memory: the server's object and the client's. Raises ssl.SSLError for either."""
    upward, downward = ssl.MemoryBIO(), ssl.MemoryBIO()
    server = server_side.wrap_bio(upward, downward, server_side=True)
    client = client_side.wrap_bio(downward, upward, server_hostname=name)
    left = [client, server]
    while left:
        for each in list(left):
            try:
                each.do_handshake()
                left.remove(each)
            except ssl.SSLWantReadError:
                pass
    return server, client


def client_hello(name: str) -> bytes:
    """The first bytes of a client that asks for that name."""
    upward = ssl.MemoryBIO()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    with pytest.raises(ssl.SSLWantReadError):
        context.wrap_bio(ssl.MemoryBIO(), upward, server_hostname=name).do_handshake()
    return upward.read()


class TlsPort:
    """A port of TLS whose visitors are all answered ``ok``."""

    def __init__(self, edge: Edge, port: int, context: ssl.SSLContext) -> None:
        self.edge = edge
        self.port = port
        self.context = context
        [self.listener] = [each for each in edge.listener._servers if isinstance(each, TlsListener)]
        self.complaints: list[str] = []
        asyncio.get_running_loop().set_exception_handler(lambda loop, told: self.complaints.append(str(told)))

    async def connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """A connection of one that says nothing yet."""
        return await asyncio.open_connection("127.0.0.1", self.port)

    async def visit(self, host: str = "127.0.0.1") -> bytes:
        """Shake hands and ask; the status line's code."""
        reader, writer = await asyncio.open_connection(host, self.port, ssl=self.context, server_hostname="localhost")
        writer.write(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
        line = await reader.readline()
        writer.close()
        await writer.wait_closed()
        return line.split()[1]

    async def until(self, question: Callable[[], object]) -> None:
        """Wait until the answer is true."""
        async with asyncio.timeout(10):
            while not question():  # noqa: ASYNC110
                await asyncio.sleep(0.005)


@asynccontextmanager
async def tls_port(ensured: Ensured, **limits: float) -> AsyncIterator[TlsPort]:
    """A port whose loop has nothing to complain of, and of which nothing is left."""
    edge = Edge(**limits)

    def answer(peer: Peer) -> None:
        peer.on_frame = lambda frame: peer.reply() if peer.ended else None

    edge.on_open = answer  # a test may have another
    tls = VisitorTls(str(ensured.certificate), str(ensured.key))
    [(_, number)] = await edge.listener.start("127.0.0.1", 0, tls=tls)
    made = TlsPort(edge, number, client_context(ensured.authority))
    try:
        yield made
        assert made.complaints == []
    finally:
        edge.listener.close()
        await asyncio.sleep(0.01)
    assert not made.listener
    assert made.complaints == []


def run(make: Callable[[], asyncio.AbstractEventLoop], work: Awaitable[None]) -> None:
    """Do the work on an event loop of that kind."""

    async def whole() -> None:
        await work

    with asyncio.Runner(loop_factory=make) as runner:
        runner.run(whole())


class TlsVisitor:
    """A blocking client of which every record is its own decision: it answers no goodbye unasked."""

    def __init__(self, port: int, context: ssl.SSLContext, name: str = "localhost", *, buffer: int = 0) -> None:
        self.sock = socket.socket()
        if buffer:
            self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)
        self.sock.settimeout(10)
        self.sock.connect(("127.0.0.1", port))
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self.tls = context.wrap_bio(self._incoming, self._outgoing, server_hostname=name)
        try:
            self._do(self.tls.do_handshake)
        except BaseException:
            self.sock.close()
            raise

    def __enter__(self) -> "TlsVisitor":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.sock.close()

    def send(self, data: bytes) -> None:
        self._do(lambda: self.tls.write(data))

    def read(self, size: int = 65536) -> bytes:
        """Some bytes; none after the server's goodbye. Raises SSLError or OSError for an end without one."""
        return self._do(lambda: self.tls.read(size))

    def read_all(self) -> tuple[bytes, bool]:
        """The bytes up to the end, and whether that was a goodbye."""
        got = b""
        try:
            while data := self.read():
                got += data
        except OSError as error:
            assert not isinstance(error, TimeoutError), f"neither an end nor more after {len(got)} bytes"
            return got, False
        return got, True

    def say_goodbye(self) -> bool:
        """Say it without waiting; then whether the server says it too."""
        try:
            self._do(self.tls.unwrap)
        except OSError as error:
            assert not isinstance(error, TimeoutError)
            return False
        return True

    def _do(self, verb: Callable[[], T]) -> T:
        while True:
            try:
                result = verb()
            except ssl.SSLWantReadError:
                self._flush()
                if data := self.sock.recv(65536):
                    self._incoming.write(data)
                else:
                    self._incoming.write_eof()
                continue
            self._flush()
            return result

    def _flush(self) -> None:
        if data := self._outgoing.read():
            self.sock.sendall(data)
