"""How TLS connections of visitors end: a goodbye follows whole answers alone, and nobody waits for the other's."""

import asyncio
import contextlib
import socket
import struct
import time
from collections.abc import Callable
from datetime import UTC, datetime

import pytest

from quictunnel.trust.certificates import Ensured, ensure_server_certificate
from quictunnel.wire.errors import ErrorCode, TunnelError
from quictunnel.wire.frames import Data, End, Fields, ResponseHead
from tests.support.processes import poll
from tests.support.tls import LOOPS, TlsPort, TlsVisitor, run, tls_port
from tests.support.visitors import Peer

pytestmark = pytest.mark.parametrize("make", LOOPS)

Make = Callable[[], asyncio.AbstractEventLoop]
GET = b"GET / HTTP/1.%d\r\nHost: localhost\r\n\r\n"
PUT = b"PUT / HTTP/1.1\r\nHost: localhost\r\n%b\r\n\r\n"
BODY = b"x" * 1000
SMALL = (socket.SOL_SOCKET, socket.SO_SNDBUF, 16384)
RESET = (socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
LENGTH: Fields = [(b"content-length", b"1001")]


@pytest.fixture(scope="module")
def ensured(tmp_path_factory: pytest.TempPathFactory) -> Ensured:
    return ensure_server_certificate(tmp_path_factory.mktemp("state"), ["localhost"], datetime.now(UTC))


def visitor(door: TlsPort, **options: int) -> TlsVisitor:
    return TlsVisitor(door.port, door.context, **options)


def begin(peer: Peer, fields: Fields | None = None) -> None:
    """All but the end of an answer."""
    peer.peer.receive(ResponseHead(200, fields or []))
    peer.peer.receive(Data(BODY))


def cut(peer: Peer) -> None:
    peer.peer.abort(TunnelError(ErrorCode.CONNECTION_TERMINATED))


# Answers


@pytest.mark.parametrize(
    ("minor", "fields"), [(0, []), (1, []), (1, LENGTH)], ids=["close-delimited", "chunked", "length"]
)
def test_an_answer_that_is_cut_has_no_goodbye(make: Make, ensured: Ensured, minor: int, fields: Fields) -> None:
    async def work() -> None:
        async with tls_port(ensured) as door:
            door.edge.on_open = lambda peer: begin(peer, fields)

            def visit() -> tuple[bytes, bool]:
                with visitor(door) as made:
                    made.send(GET % minor)
                    assert BODY in made.read()
                    loop.call_soon_threadsafe(cut, door.edge.peer)
                    return made.read_all()

            loop = asyncio.get_running_loop()
            rest, goodbye = await asyncio.to_thread(visit)
            assert not goodbye
            assert b"0\r\n\r\n" not in rest

    run(make, work())


def test_a_large_answer_that_is_cut_has_no_goodbye(make: Make, ensured: Ensured) -> None:
    """What the visitor had not taken yet is waiting in several buffers."""

    async def work() -> None:
        async with tls_port(ensured) as door:

            def answer(peer: Peer) -> None:
                peer.peer.receive(ResponseHead(200, []))
                for _ in range(200):
                    peer.peer.receive(Data(bytes(65536)))
                asyncio.get_running_loop().call_later(0.05, cut, peer)

            door.edge.on_open = answer

            def visit() -> tuple[bytes, bool]:
                with visitor(door, buffer=65536) as made:
                    made.send(GET % 0)
                    made.read(1)
                    time.sleep(0.1)
                    return made.read_all()

            got, goodbye = await asyncio.to_thread(visit)
            assert not goodbye
            assert len(got) < 200 * 65536

    run(make, work())


def test_a_whole_answer_that_ends_with_its_connection_has_a_goodbye(make: Make, ensured: Ensured) -> None:
    async def work() -> None:
        async with tls_port(ensured) as door:
            door.edge.on_open = lambda peer: peer.answer(ResponseHead(200, []), Data(bytes(3_000_000)), End())

            def visit() -> tuple[bytes, bool]:
                with visitor(door) as made:
                    made.send(GET % 0)
                    return made.read_all()

            got, goodbye = await asyncio.to_thread(visit)
            assert goodbye
            assert got.endswith(bytes(3_000_000))

    run(make, work())


@pytest.mark.parametrize("minor", [0, 1])
def test_a_visitor_that_says_goodbye_within_an_answer_hears_none(make: Make, ensured: Ensured, minor: int) -> None:
    """It may still read: what it has got must not look whole."""

    async def work() -> None:
        async with tls_port(ensured) as door:
            door.edge.on_open = begin

            def visit() -> bool:
                with visitor(door) as made:
                    made.send(GET % minor)
                    assert BODY in made.read()
                    return made.say_goodbye()

            assert not await asyncio.to_thread(visit)
            [error] = door.edge.peer.errors
            assert error.code is ErrorCode.CANCELLED

    run(make, work())


def test_a_goodbye_between_requests_is_answered(make: Make, ensured: Ensured) -> None:
    async def work() -> None:
        async with tls_port(ensured) as door:

            def visit() -> bool:
                with visitor(door) as made:
                    made.send(GET % 1)
                    assert made.read().endswith(b"ok")
                    return made.say_goodbye()

            assert await asyncio.to_thread(visit)
            await door.until(lambda: not door.edge.listener)

    run(make, work())


# Uploads


@pytest.mark.parametrize("way_out", ["goodbye", "end", "reset"])
@pytest.mark.parametrize(
    "upload",
    [
        PUT % b"Content-Length: 100" + b"hello",
        PUT % b"Content-Length: 6" + b"hello",
        PUT % b"Transfer-Encoding: chunked" + b"5\r\nhello\r\n",
        PUT % b"Transfer-Encoding: chunked" + b"5\r\nhello\r\n0\r\n",
    ],
    ids=["length", "last-byte", "chunks", "last-chunk"],
)
def test_an_upload_that_ends_early_is_never_whole(make: Make, ensured: Ensured, upload: bytes, way_out: str) -> None:
    async def work() -> None:
        async with tls_port(ensured) as door:

            def visit() -> None:
                with visitor(door) as made:
                    made.send(upload)
                    poll(lambda: door.edge.peers and door.edge.peer.body == b"hello")
                    if way_out == "goodbye":
                        assert made.say_goodbye() is False
                    elif way_out == "reset":
                        made.sock.setsockopt(*RESET)

            await asyncio.to_thread(visit)
            await door.until(lambda: not door.edge.listener)
            assert not door.edge.peer.ended
            assert [error.code for error in door.edge.peer.errors] == [ErrorCode.CANCELLED]

    run(make, work())


def test_an_answer_to_an_unfinished_upload_is_read_by_whoever_stops_sending(
    make: Make, ensured: Ensured, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some of the upload comes after the answer has gone out, as on the open net it always does."""
    monkeypatch.setattr("quictunnel.http.visitor_connection._LINGER_TIME", 0.3)

    async def work() -> None:
        async with tls_port(ensured, idle_time=0.2) as door:  # looks twenty times a second
            door.edge.on_open = lambda peer: peer.reply(413, b"too large")

            def visit() -> tuple[bytes, bool]:
                with visitor(door) as made:
                    made.send(PUT % b"Content-Length: 50000000")
                    poll(lambda: door.edge.done)
                    for _ in range(8):
                        made.send(bytes(65536))
                        time.sleep(0.01)
                    return made.read_all()

            got, goodbye = await asyncio.to_thread(visit)
            assert got.endswith(b"too large")
            assert goodbye

    run(make, work())


def test_who_goes_on_with_a_refused_upload_is_cut(make: Make, ensured: Ensured) -> None:
    async def work() -> None:
        async with tls_port(ensured) as door:
            door.edge.on_open = lambda peer: peer.reply(413, b"too large")

            def visit() -> int:
                sent = 0
                with visitor(door) as made, contextlib.suppress(OSError):
                    made.send(PUT % b"Content-Length: 50000000")
                    poll(lambda: door.edge.done)
                    while sent < 40_000_000:
                        made.send(bytes(65536))
                        sent += 65536
                return sent

            # What is thrown away, and what the buffers of two kernels hold.
            assert await asyncio.to_thread(visit) < 40_000_000
            await door.until(lambda: not door.edge.listener)

    run(make, work())


# Visitors that do not say goodbye themselves


def test_nobody_waits_for_the_goodbye_of_an_idle_visitor(make: Make, ensured: Ensured) -> None:
    """A client's pool of connections does not look at them before it needs one: a restart must not wait for that."""

    async def work() -> None:
        async with tls_port(ensured, body_idle_time=0.2, idle_time=0.5) as door:  # looks twenty times a second
            made = await asyncio.to_thread(visitor, door)
            with made:
                await asyncio.to_thread(made.send, GET % 1)
                assert (await asyncio.to_thread(made.read)).endswith(b"ok")
                door.edge.listener.drain()
                assert await door.edge.listener.wait_idle(5.0)
                assert await asyncio.to_thread(made.read_all) == (b"", True)

    run(make, work())


def test_slow_readers_get_all_of_an_answer_whose_connection_is_closed(make: Make, ensured: Ensured) -> None:
    """The looks at deadlines see buffers that are empty; of some visitors only those that no transport counts are not.

    What the kernels hold is not known beforehand, so there is a visitor for every size around it.
    """
    sizes = range(0, 600_000, 25_000)

    async def work() -> None:
        async with tls_port(ensured, idle_time=0.2) as door:  # looks twenty times a second

            def answer(frame: object) -> None:
                if isinstance(frame, End):
                    peer = door.edge.peer
                    [connection] = [each for each in door.edge.listener._connections if each._leg is peer.peer]
                    connection._transport.get_extra_info("socket").setsockopt(*SMALL)
                    peer.answer(ResponseHead(200, []), Data(bytes(int(peer.head.target[1:]))), End())

            def on_open(peer: Peer) -> None:
                peer.on_frame = answer

            door.edge.on_open = on_open
            visitors = [await asyncio.to_thread(visitor, door, buffer=16384) for _ in sizes]
            for made, size in zip(visitors, sizes, strict=True):
                await asyncio.to_thread(made.send, b"GET /%d HTTP/1.0\r\nHost: localhost\r\n\r\n" % size)
            await door.until(lambda: len(door.edge.done) == len(sizes))
            looks = asyncio.get_running_loop().time() + 0.3
            await door.until(lambda: asyncio.get_running_loop().time() > looks)
            for made, size in zip(visitors, sizes, strict=True):
                got, goodbye = await asyncio.to_thread(made.read_all)
                made.sock.close()
                assert goodbye, f"{len(got)} of {size} bytes"
                assert got.endswith(b"\r\n\r\n" + bytes(size))
            await door.until(lambda: not door.edge.listener)

    run(make, work())


def test_a_visitor_that_never_reads_is_bounded_in_time(make: Make, ensured: Ensured) -> None:
    async def work() -> None:
        async with tls_port(ensured, write_idle_time=0.4) as door:
            door.edge.on_open = lambda peer: peer.answer(ResponseHead(200, []), Data(bytes(20_000_000)), End())
            made = await asyncio.to_thread(visitor, door, buffer=16384)
            with made:
                await asyncio.to_thread(made.send, GET % 0)
                await door.until(lambda: door.edge.done)
                await door.until(lambda: not door.edge.listener)

    run(make, work())


def test_a_visitor_that_does_not_read_makes_the_backend_wait(make: Make, ensured: Ensured) -> None:
    async def work() -> None:
        async with tls_port(ensured) as door:
            sent = 0

            def offer(peer: Peer) -> None:
                nonlocal sent
                if not peer.paused and sent < 100_000_000:
                    peer.peer.receive(Data(bytes(16384)))
                    sent += 16384
                    asyncio.get_running_loop().call_soon(offer, peer)

            def answer(peer: Peer) -> None:
                peer.peer.receive(ResponseHead(200, []))
                offer(peer)

            door.edge.on_open = answer
            made = await asyncio.to_thread(visitor, door, buffer=65536)
            with made:
                await asyncio.to_thread(made.send, GET % 1)
                await door.until(lambda: door.edge.peers and door.edge.peer.paused)
                [connection] = door.edge.listener._connections
                assert connection._transport.get_write_buffer_size() < 2 * 65536

    run(make, work())
