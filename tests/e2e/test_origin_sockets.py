"""The HTTP/1.1 backend on real sockets, on both event loops: servers that behave and servers that do not."""

import asyncio
import functools
import select
import socket
import ssl
import struct
from collections.abc import Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from quictunnel.client.choose import open_backend
from quictunnel.http.origin import Origin, OriginLimits
from quictunnel.wire.errors import ErrorCode, TunnelError
from quictunnel.wire.frames import Data, ResponseHead
from tests.support.backend import END, Visitor, request
from tests.support.memory import identity

try:
    import uvloop
except ImportError:
    uvloop = None  # type: ignore[assignment]

Handler = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]

OK = b"HTTP/1.1 200 OK\r\n"
HELLO = OK + b"Content-Length: 5\r\n\r\nhello"
CHUNKED = OK + b"Transfer-Encoding: chunked\r\n\r\n"
SWITCH = b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: echo\r\nConnection: Upgrade\r\n\r\n"
UPLOAD = request(b"POST", body=True)
LIMITS = OriginLimits(connect_time=5, head_time=5)

LOOPS = ["asyncio", pytest.param("uvloop", marks=pytest.mark.skipif(uvloop is None, reason="uvloop is not installed"))]


@pytest.fixture(params=LOOPS)
def run(request: pytest.FixtureRequest) -> Any:
    """Runs a test's coroutine on each event loop, and fails it for any task that it leaves."""
    factory = uvloop.new_event_loop if request.param == "uvloop" else asyncio.SelectorEventLoop

    async def watched(work: Awaitable[None]) -> None:
        async with asyncio.timeout(30):
            await work
        for _ in range(10):
            await asyncio.sleep(0)
        left = asyncio.all_tasks() - {asyncio.current_task()}
        assert not left, f"tasks left behind: {left}"

    def runner(work: Awaitable[None]) -> None:
        with asyncio.Runner(loop_factory=factory) as loop:
            loop.run(watched(work))

    return runner


class Backend:
    """A server whose every connection is one call of ``handler``."""

    def __init__(self, handler: Handler) -> None:
        self._handler = handler
        self.accepted = 0
        self.open = 0
        self.port = 0
        self._tasks: set[asyncio.Task[None]] = set()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        self.accepted += 1
        self.open += 1
        try:
            await self._handler(reader, writer)
        except (OSError, asyncio.IncompleteReadError, asyncio.CancelledError):
            pass
        finally:
            self.open -= 1
            self._tasks.discard(task)
            writer.close()

    async def stop(self) -> None:
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)


@asynccontextmanager
async def backend(handler: Handler, *, host: str = "127.0.0.1", path: Path | None = None, **options: Any) -> Any:
    made = Backend(handler)
    if path is not None:
        server = await asyncio.start_unix_server(made.serve, path)
    else:
        server = await asyncio.start_server(made.serve, host, 0, **options)
        made.port = server.sockets[0].getsockname()[1]
    try:
        yield made
    finally:
        server.close()
        await made.stop()


@asynccontextmanager
async def origin(port: int, host: str = "127.0.0.1", **options: Any) -> Any:
    made = Origin(host, port, **{"limits": LIMITS, **options})
    try:
        yield made
    finally:
        await made.aclose()
        assert (made.in_flight, made.connections, made.kept, made.dials) == (0, 0, 0, 0)


def reset(writer: asyncio.StreamWriter) -> None:
    writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()


async def head_of(reader: asyncio.StreamReader) -> bytes:
    return await reader.readuntil(b"\r\n\r\n")


def saying(answer: bytes, how: str = "stay") -> Handler:
    """Answer each request so, then stay, close or reset."""

    async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            await head_of(reader)
            writer.write(answer)
            await writer.drain()
            if how == "FIN":
                return
            if how == "RST":
                await asyncio.sleep(0.02)  # a reset would overtake the bytes before it
                reset(writer)
                return

    return handler


async def ask(made: Origin, *rest: Any, head: Any = None) -> Visitor:
    return await Visitor().ask(made.open(), head or request(), *rest).over()


# Connections


def test_connection_is_used_again(run: Any) -> None:
    async def work() -> None:
        async with backend(saying(HELLO)) as server, origin(server.port) as made:
            for _ in range(20):
                assert (await ask(made)).body == b"hello"
            assert server.accepted == 1

    run(work())


def test_slow_requests_at_once_all_finish(run: Any) -> None:
    async def slow(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            await head_of(reader)
            await asyncio.sleep(0.1)
            writer.write(HELLO)

    async def work() -> None:
        async with backend(slow, backlog=512) as server, origin(server.port) as made:
            for _ in range(2):
                visitors = await asyncio.gather(*(ask(made) for _ in range(200)))
                assert all(visitor.body == b"hello" for visitor in visitors)
            assert server.accepted == 200
            assert made.kept == 200

    run(work())


def test_backend_that_closes_after_each_answer_without_saying_so(run: Any) -> None:
    async def work() -> None:
        async with backend(saying(HELLO, "FIN")) as server, origin(server.port) as made:
            for _ in range(50):
                assert (await ask(made)).body == b"hello"
            assert server.accepted == 50

    run(work())


def test_backend_that_restarts_between_requests(run: Any) -> None:
    async def work() -> None:
        async with backend(saying(HELLO)) as server:
            made = Origin("127.0.0.1", server.port, limits=LIMITS)
            await ask(made)
        assert (await ask(made)).code is ErrorCode.CONNECTION_REFUSED
        again = Backend(saying(HELLO))
        listening = await asyncio.start_server(again.serve, "127.0.0.1", server.port)
        assert (await ask(made)).body == b"hello"
        await made.aclose()
        listening.close()
        await again.stop()

    run(work())


@pytest.mark.parametrize("listening", ["127.0.0.1", "::1"])
def test_localhost_means_both_loopbacks(run: Any, listening: str) -> None:
    async def work() -> None:
        async with backend(saying(HELLO), host=listening) as server, origin(server.port, "localhost") as made:
            assert (await ask(made)).body == b"hello"

    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        pytest.skip("this machine has no IPv6")
    run(work())


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_closed_port_is_refused(run: Any, host: str) -> None:
    async def work() -> None:
        with socket.create_server(("127.0.0.1", 0)) as listening:
            port = listening.getsockname()[1]
        async with origin(port, host) as made:
            visitor = await ask(made)
            assert visitor.error is not None
            assert visitor.error.code is ErrorCode.CONNECTION_REFUSED
            assert visitor.error.fault.status == 502

    run(work())


def test_unix_socket(run: Any, tmp_path: Path) -> None:
    async def work() -> None:
        path = tmp_path / "app.sock"
        made = await open_backend(f"unix:{path}")
        assert (await ask(made)).code is ErrorCode.CONNECTION_REFUSED
        async with backend(saying(HELLO), path=path):
            assert (await ask(made)).body == b"hello"
        await made.aclose()

    run(work())


# Endings

WHERE = {
    "before the head": (b"", b""),
    "within the head": (OK + b"Content-Le", b""),
    "after the head, length": (OK + b"Content-Length: 5\r\n\r\n", b""),
    "after a byte, length": (OK + b"Content-Length: 5\r\n\r\n", b"h"),
    "a byte before the end, length": (OK + b"Content-Length: 5\r\n\r\n", b"hell"),
    "after the head, chunked": (CHUNKED, b""),
    "after a byte, chunked": (CHUNKED, b"5\r\nh"),
    "after the body, chunked": (CHUNKED, b"5\r\nhello\r\n"),
    "a byte before the end, chunked": (CHUNKED, b"5\r\nhello\r\n0\r\n\r"),
}


@pytest.mark.parametrize("how", ["FIN", "RST"])
@pytest.mark.parametrize("where", WHERE)
def test_cut_answer_is_never_complete(run: Any, where: str, how: str) -> None:
    async def work() -> None:
        async with backend(saying(b"".join(WHERE[where]), how)) as server, origin(server.port) as made:
            visitor = await ask(made)
            assert visitor.code is ErrorCode.CONNECTION_TERMINATED
            assert not visitor.ended
            assert visitor.statuses == ([] if "head" in where and "after" not in where else [200])

    run(work())


@pytest.mark.parametrize(("how", "complete"), [("FIN", True), ("RST", False)])
def test_answer_that_ends_with_its_connection(run: Any, how: str, complete: bool) -> None:
    async def work() -> None:
        async with backend(saying(OK + b"\r\nhello", how)) as server, origin(server.port) as made:
            visitor = await ask(made)
            assert visitor.body == b"hello"
            assert visitor.ended is complete
            assert (visitor.error is None) is complete

    run(work())


@pytest.mark.parametrize(
    "answer",
    [
        b"\x15\x03\x01\x00\x02",
        b"220 mail.example ESMTP\r\n",
        OK + b"A: b\x00\r\n\r\n",
        HELLO + b"more",
        b"\r\n" + HELLO,
    ],
    ids=["TLS alert", "SMTP", "NUL", "too long", "empty line"],
)
def test_garbage_is_a_502_and_its_connection_is_gone(run: Any, answer: bytes) -> None:
    async def work() -> None:
        async with backend(saying(answer)) as server, origin(server.port) as made:
            for count in (1, 2):
                visitor = await ask(made)
                assert visitor.code is ErrorCode.HTTP_PROTOCOL_ERROR
                assert server.accepted == count

    run(work())


def test_silent_backend_is_a_504(run: Any) -> None:
    async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()

    async def work() -> None:
        limits = OriginLimits(head_time=0.2)
        async with backend(silent) as server, origin(server.port, limits=limits) as made:
            visitor = await ask(made)
            assert visitor.error is not None
            assert visitor.error.fault.status == 504

    run(work())


def test_answer_before_the_end_of_an_upload(run: Any) -> None:
    async def early(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await head_of(reader)
        writer.write(b"HTTP/1.1 413 Too Large\r\nContent-Length: 2\r\n\r\nno")
        await reader.read()

    async def work() -> None:
        async with backend(early) as server, origin(server.port) as made:
            visitor = Visitor().ask(made.open(), UPLOAD, Data(b"a"))
            await visitor.over()
            assert visitor.statuses == [413]
            assert visitor.ended
            assert made.kept == 0

    run(work())


@pytest.mark.parametrize("phase", ["waiting", "streaming", "uploading", "upgraded"])
def test_visitor_that_leaves_is_known_at_the_backend_at_once(run: Any, phase: str) -> None:
    async def work() -> None:
        loop = asyncio.get_running_loop()
        left: asyncio.Future[float] = loop.create_future()
        started = asyncio.Event()

        async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await head_of(reader)
            writer.write({"waiting": b"", "streaming": CHUNKED, "upgraded": SWITCH}.get(phase, b""))
            started.set()
            try:
                while await reader.read(1000):
                    pass
            finally:
                left.set_result(loop.time())

        head = {"uploading": UPLOAD, "upgraded": request(protocol=b"echo", body=True)}.get(phase, request())
        rest = [Data(b"a")] if phase == "uploading" else []
        async with backend(handler) as server, origin(server.port) as made:
            visitor = Visitor().ask(made.open(), head, *rest)
            await started.wait()
            if phase in ("streaming", "upgraded"):
                await visitor.until(lambda: visitor.frames)
            begun = loop.time()
            visitor.peer.abort(TunnelError(ErrorCode.CANCELLED))
            assert await left - begun < 0.1
            assert made.in_flight == 0

    run(work())


def test_backend_that_reads_nothing_learns_at_once_that_its_upload_is_cut(run: Any) -> None:
    """A FIN would wait behind the megabytes that it has not read; a reset does not."""

    async def work() -> None:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            listener.setblocking(False)
            async with origin(listener.getsockname()[1]) as made:
                visitor = Visitor().ask(made.open(), UPLOAD, Data(b"x" * 65536))
                sock, _ = await asyncio.get_running_loop().sock_accept(listener)
                with sock:
                    await visitor.until(lambda: not visitor.paused)
                    while not visitor.paused:
                        visitor.peer.receive(Data(b"x" * 65536))
                        await asyncio.sleep(0)
                    poll = select.poll()
                    poll.register(sock, 0)
                    assert poll.poll(0) == []
                    visitor.peer.abort(TunnelError(ErrorCode.CANCELLED))
                    for _ in range(3):
                        await asyncio.sleep(0)
                    assert poll.poll(1000) == [(sock.fileno(), select.POLLERR | select.POLLHUP)]

    run(work())


# Bodies


def test_megabytes_both_ways(run: Any) -> None:
    size = 8 << 20

    async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await head_of(reader)
        writer.write(OK + b"Content-Length: %d\r\n\r\n" % size)
        left = size
        while left:
            data = await reader.read(65536)
            left -= len(data)
            writer.write(data)
            await writer.drain()

    async def work() -> None:
        async with backend(echo) as server, origin(server.port) as made:
            head = request(b"POST", [(b"content-length", b"%d" % size)], body=True)
            visitor = Visitor().ask(made.open(), head, Data(b"x"))
            sent = 1
            while sent < size:
                await visitor.until(lambda: not visitor.paused)
                piece = min(50_000, size - sent)
                visitor.peer.receive(Data(b"x" * piece))
                sent += piece
                await asyncio.sleep(0)
            visitor.peer.receive(END)
            await visitor.over()
            assert len(visitor.body) == size
            assert visitor.ended
            assert made.kept == 1

    run(work())


def test_visitor_that_does_not_read_holds_the_backend_back(run: Any) -> None:
    pushed = 0

    async def endless(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal pushed
        writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 65536)
        await head_of(reader)
        writer.write(OK + b"\r\n")
        while True:
            writer.write(b"x" * 65536)
            await writer.drain()
            pushed += 65536

    class Full(Visitor):
        def receive(self, frame: Any) -> None:
            super().receive(frame)
            if len(self.body) > 100_000 and not self.paused:
                self.paused = True
                self.peer.pause()

    async def work() -> None:
        async with backend(endless) as server, origin(server.port) as made:
            visitor = Full().ask(made.open(), request())
            await visitor.until(lambda: visitor.paused)
            before, received = -1, len(visitor.body)
            while before != pushed:  # until the sockets between are full
                before = pushed
                await asyncio.sleep(0.05)
            assert len(visitor.body) - received <= 262_144
            assert pushed < 16 << 20
            visitor.peer.abort(TunnelError(ErrorCode.CANCELLED))

    run(work())


def test_backend_that_does_not_read_holds_the_visitor_back(run: Any) -> None:
    async def deaf(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await asyncio.Event().wait()

    async def work() -> None:
        async with backend(deaf) as server, origin(server.port) as made:
            visitor = Visitor().ask(made.open(), UPLOAD, Data(b"x" * 65536))
            await visitor.until(lambda: made.connections == 1 and not visitor.paused)
            sent = 0
            while not visitor.paused:
                visitor.peer.receive(Data(b"x" * 65536))
                sent += 65536
                assert sent < 64 << 20
                await asyncio.sleep(0)
            visitor.peer.abort(TunnelError(ErrorCode.CANCELLED))

    run(work())


def test_chunks_arrive_one_by_one(run: Any) -> None:
    async def work() -> None:
        go = asyncio.Event()

        async def events(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await head_of(reader)
            writer.write(CHUNKED)
            for number in range(5):
                writer.write(b"7\r\nevent %d\r\n" % number)
                await go.wait()
                go.clear()
            writer.write(b"0\r\n\r\n")

        async with backend(events) as server, origin(server.port) as made:
            visitor = Visitor().ask(made.open(), request())
            for number in range(5):
                await visitor.until(lambda count=number: visitor.body.endswith(b"event %d" % count))
                go.set()
            await visitor.over()
            assert visitor.ended

    run(work())


# Upgrade


def test_upgraded_connection_passes_bytes_and_half_closes(run: Any) -> None:
    async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await head_of(reader)
        assert b"Connection: Upgrade\r\nUpgrade: echo\r\n" in head
        writer.write(SWITCH + b"early ")
        while data := await reader.read(1000):
            writer.write(data)
        writer.write(b" bye")

    async def work() -> None:
        async with backend(echo) as server, origin(server.port) as made:
            visitor = Visitor().ask(made.open(), request(protocol=b"echo", body=True), Data(b"one "))
            await visitor.until(lambda: visitor.body == b"early one ")
            visitor.peer.receive(Data(b"two"))
            visitor.peer.receive(END)
            await visitor.over()
            assert visitor.frames[0] == ResponseHead(101, [(b"upgrade", b"echo")])
            assert visitor.body == b"early one two bye"
            assert visitor.error is None
            assert made.in_flight == 0

    run(work())


# TLS


@functools.cache
def server_context() -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(identity()[0].certificate, identity()[0].key)
    return context


@pytest.fixture
def authority(tmp_path: Path) -> Path:
    """A file with the CA of ``server_context``."""
    path = tmp_path / "ca.pem"
    path.write_bytes(identity()[1])
    return path


def ragged(answer: bytes) -> Handler:
    """Answer, then close the TCP connection without a word of TLS, as one who cuts the wire would."""

    async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await head_of(reader)
        writer.write(answer)
        await writer.drain()
        await asyncio.sleep(0.02)
        with socket.socket(fileno=socket.dup(writer.get_extra_info("socket").fileno())) as wire:
            wire.shutdown(socket.SHUT_WR)
        await reader.read()

    return handler


def test_tls_backend_is_verified_by_its_authority(run: Any, authority: Path) -> None:
    async def work() -> None:
        async with backend(saying(HELLO), ssl=server_context()) as server:
            for host in ("localhost", "127.0.0.1"):
                made = await open_backend(f"https://{host}:{server.port}", ca=authority)
                for _ in range(3):
                    assert (await ask(made)).body == b"hello"
                await made.aclose()
            assert server.accepted == 2

    run(work())


def test_untrusted_backend_is_refused_unless_anything_is_taken(run: Any) -> None:
    async def work() -> None:
        async with backend(saying(HELLO), ssl=server_context()) as server:
            url = f"https://localhost:{server.port}"
            made = await open_backend(url)
            assert (await ask(made)).code is ErrorCode.TLS_CERTIFICATE_ERROR
            await made.aclose()
            made = await open_backend(url, insecure=True)
            assert (await ask(made)).body == b"hello"
            await made.aclose()

    run(work())


def test_certificate_of_another_name_is_refused(run: Any, authority: Path) -> None:
    async def work() -> None:
        context = ssl.create_default_context(cafile=authority)
        async with (
            backend(saying(HELLO), ssl=server_context()) as server,
            origin(server.port, tls=context, server_hostname="other.example") as made,
        ):
            assert (await ask(made)).code is ErrorCode.TLS_CERTIFICATE_ERROR

    run(work())


def test_tls_to_a_port_without_it_fails(run: Any, authority: Path) -> None:
    async def plain(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(1)
        writer.write(b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n")
        await writer.drain()

    async def work() -> None:
        async with backend(plain) as server:
            made = await open_backend(f"https://localhost:{server.port}", ca=authority)
            assert (await ask(made)).code is ErrorCode.TLS_ERROR
            await made.aclose()
            assert (made.in_flight, made.connections, made.kept, made.dials) == (0, 0, 0, 0)

    run(work())


@pytest.mark.parametrize("framing", ["close", "length"])
@pytest.mark.parametrize("polite", [True, False], ids=["close_notify", "FIN alone"])
def test_end_without_close_notify_completes_nothing(run: Any, authority: Path, framing: str, polite: bool) -> None:
    answer = OK + b"\r\nhello" if framing == "close" else HELLO
    handler = saying(answer, "FIN") if polite else ragged(answer)

    async def work() -> None:
        async with backend(handler, ssl=server_context()) as server:
            made = await open_backend(f"https://localhost:{server.port}", ca=authority)
            visitor = await ask(made)
            assert visitor.body == b"hello"
            assert visitor.ended is (polite or framing == "length")
            assert (visitor.error is None) is visitor.ended
            await made.aclose()

    run(work())


def test_upgraded_tls_connection_ends_with_the_backend(run: Any, authority: Path) -> None:
    async def brief(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await head_of(reader)
        writer.write(SWITCH)
        writer.write(await reader.read(1000))

    async def work() -> None:
        async with backend(brief, ssl=server_context()) as server:
            made = await open_backend(f"https://localhost:{server.port}", ca=authority)
            visitor = Visitor().ask(made.open(), request(protocol=b"echo", body=True), Data(b"hello"))
            await visitor.over()
            assert visitor.statuses == [101]
            assert visitor.body == b"hello"
            assert visitor.error is None
            visitor.peer.receive(END)
            await made.aclose(grace=5)
            assert (made.in_flight, made.connections, made.kept, made.dials) == (0, 0, 0, 0)

    run(work())


def test_closing_lets_a_slow_answer_finish(run: Any) -> None:
    async def slow(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await head_of(reader)
        await asyncio.sleep(0.1)
        writer.write(HELLO)
        await reader.read()

    async def work() -> None:
        async with backend(slow) as server:
            made = Origin("127.0.0.1", server.port, limits=LIMITS)
            visitor = Visitor().ask(made.open(), request())
            await asyncio.sleep(0)
            await made.aclose(grace=5)
            assert visitor.body == b"hello"
            assert (made.in_flight, made.connections, made.kept, made.dials) == (0, 0, 0, 0)

    run(work())
