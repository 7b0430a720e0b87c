"""Handshakes of visitors over real sockets: bounded in number and in time, and nobody's news when they fail."""

import asyncio
import errno
import os
import socket
from collections.abc import Callable
from datetime import UTC, datetime

import pytest

from quictunnel.http import handshakes
from quictunnel.http.handshakes import TlsListener
from quictunnel.http.tls import VisitorTls
from quictunnel.trust.certificates import Ensured, ensure_server_certificate
from tests.support.tls import LOOPS, client_context, client_hello, run, tls_port

pytestmark = pytest.mark.parametrize("make", LOOPS)

Make = Callable[[], asyncio.AbstractEventLoop]


@pytest.fixture(scope="module")
def ensured(tmp_path_factory: pytest.TempPathFactory) -> Ensured:
    return ensure_server_certificate(tmp_path_factory.mktemp("state"), ["localhost"], datetime.now(UTC))


async def closed(reader: asyncio.StreamReader) -> bytes:
    """What came until the other side was done, by an end or a reset."""
    try:
        async with asyncio.timeout(10):
            return await reader.read()
    except ConnectionError:
        return b""


def test_a_handshake_that_never_ends_is_ended(make: Make, ensured: Ensured) -> None:
    async def work() -> None:
        async with tls_port(ensured, head_time=0.2) as door:
            for first in (b"", client_hello("localhost")[:40], client_hello("localhost")):
                reader, writer = await door.connect()
                writer.write(first)
                await door.until(lambda: len(door.listener) == 1)
                assert not door.edge.listener, "no connection before its handshake is done"
                await closed(reader)
                await door.until(lambda: not door.listener)
                writer.close()

    run(make, work())


def test_a_flood_of_handshakes_takes_the_time_of_its_own_alone(
    make: Make, ensured: Ensured, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(handshakes, "HANDSHAKES", 32)

    async def work() -> None:
        async with tls_port(ensured, head_time=60) as door:
            flood = [await door.connect() for _ in range(200)]
            await door.until(lambda: len(door.listener) == 32)
            assert await door.visit() == b"200"
            # The oldest made way; of the latest none did.
            assert [await closed(reader) for reader, _ in flood[:160]] == [b""] * 160
            assert not any(reader.at_eof() for reader, _ in flood[-31:])
            assert len(door.listener) <= 32
            for _, writer in flood:
                writer.close()
            await door.until(lambda: not door.listener)

    run(make, work())


@pytest.mark.parametrize(
    "garbage",
    [
        b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"\0" * 100,
        b"\x16\x03\x01\xff\xff" + b"\xff" * 100,
        client_hello("localhost")[:-1] + b"\xff" * 500,
        client_hello("localhost") + b"\x16\x03\x03\x00\x02\xff\xff",
        b"\x80\x2e\x01\x00\x02" + b"\0" * 40,
    ],
    ids=["http", "http2", "zeros", "record", "hello", "after-hello", "ssl2"],
)
def test_what_is_not_tls_is_closed_without_a_word_in_the_log(
    make: Make, ensured: Ensured, garbage: bytes, log_lines: list[str], capfd: pytest.CaptureFixture[str]
) -> None:
    async def work() -> None:
        async with tls_port(ensured, head_time=5) as door:
            reader, writer = await door.connect()
            writer.write(garbage)
            if garbage[:1] in b"\x16\x80":
                writer.write_eof()
            said = await closed(reader)
            assert b"HTTP" not in said
            await door.until(lambda: not door.listener)
            writer.close()
            assert not door.edge.listener and not door.edge.done
            assert await door.visit() == b"200"

    run(make, work())
    assert [line for line in log_lines if not line.startswith("DEBUG")] == []
    assert capfd.readouterr() == ("", "")


def test_random_bytes_after_the_handshake_end_the_connection_alone(make: Make, ensured: Ensured) -> None:
    async def work() -> None:
        loop = asyncio.get_running_loop()
        async with tls_port(ensured, head_time=5) as door:
            raw = socket.create_connection(("127.0.0.1", door.port))
            sock = await loop.run_in_executor(None, lambda: door.context.wrap_socket(raw, server_hostname="localhost"))
            await door.until(lambda: len(door.edge.listener) == 1)
            os.write(sock.fileno(), bytes(range(256)))
            await door.until(lambda: not door.edge.listener)
            sock.close()
            assert await door.visit() == b"200"

    run(make, work())


def test_a_visitor_that_leaves_within_its_handshake_is_forgotten(make: Make, ensured: Ensured) -> None:
    async def work() -> None:
        async with tls_port(ensured, head_time=60) as door:
            for way_out in ("end", "reset"):
                _, writer = await door.connect()
                writer.write(client_hello("localhost"))
                await door.until(lambda: len(door.listener) == 1)
                if way_out == "reset":
                    writer.transport.abort()
                else:
                    writer.close()
                await door.until(lambda: not door.listener)

    run(make, work())


def test_beyond_the_limit_of_connections_some_are_told_and_the_rest_get_no_handshake(
    make: Make, ensured: Ensured, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def work() -> None:
        async with tls_port(ensured, connections=1) as door:
            _, held = await asyncio.open_connection(
                "127.0.0.1", door.port, ssl=door.context, server_hostname="localhost"
            )
            await door.until(lambda: len(door.edge.listener) == 1)
            assert await door.visit() == b"503"
            await door.until(lambda: len(door.edge.listener) == 1)
            monkeypatch.setattr("quictunnel.http.visitor._TOLD", 0)
            with pytest.raises(OSError):
                await door.visit()
            held.transport.abort()
            await door.until(lambda: not door.edge.listener)
            assert await door.visit() == b"200"

    run(make, work())


def test_a_handshake_that_is_under_way_when_the_server_stops_gets_its_request_answered(
    make: Make, ensured: Ensured
) -> None:
    async def work() -> None:
        async with tls_port(ensured) as door:
            late = socket.create_connection(("127.0.0.1", door.port))
            await door.until(lambda: len(door.listener) == 1)
            door.edge.listener.drain()
            waiting = asyncio.get_running_loop().create_task(door.edge.listener.wait_idle(10.0))
            with pytest.raises(OSError):
                await door.connect()

            def ask() -> bytes:
                late.settimeout(10)
                with client_context(ensured.authority, "http/1.1").wrap_socket(
                    late, server_hostname="localhost"
                ) as tls:
                    tls.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
                    data = b""
                    while piece := tls.recv(65536):
                        data += piece
                    return data

            got = await asyncio.to_thread(ask)
            assert got.startswith(b"HTTP/1.1 200 ")
            assert b"connection: close" in got
            assert await waiting

    run(make, work())


def test_closing_gives_up_handshakes_and_leaves_the_port_free(make: Make, ensured: Ensured) -> None:
    async def work() -> None:
        async with tls_port(ensured) as door:
            reader, writer = await door.connect()
            await door.until(lambda: len(door.listener) == 1)
            # One more that has been accepted, and whose task has not begun.
            raw = socket.create_connection(("127.0.0.1", door.port))
            door.listener._accept(door.listener._sockets[0])
            assert len(door.listener) == 2
            door.edge.listener.close()
            assert await closed(reader) == b""
            raw.settimeout(10)
            assert await asyncio.get_running_loop().run_in_executor(None, raw.recv, 1) == b""
            raw.close()
            writer.close()
            with pytest.raises(OSError):
                await door.connect()
            again = TlsListener(
                VisitorTls(str(ensured.certificate), str(ensured.key)),
                asyncio.Protocol,
                handshake_time=1,
                shutdown_time=1,
                is_full=lambda: False,
            )
            assert await again.start("127.0.0.1", door.port) == [("127.0.0.1", door.port)]
            again.close()

    run(make, work())


def test_a_port_that_is_taken_is_an_error_and_leaves_no_socket(make: Make, ensured: Ensured) -> None:
    async def work() -> None:
        async with tls_port(ensured) as door:
            tls = VisitorTls(str(ensured.certificate), str(ensured.key))
            with pytest.raises(OSError) as caught:
                await door.edge.listener.start("127.0.0.1", door.port, tls=tls)
            assert caught.value.errno == errno.EADDRINUSE
            assert await door.visit() == b"200"

    run(make, work())


def test_every_address_of_a_host_is_listened_to(make: Make, ensured: Ensured) -> None:
    async def work() -> None:
        async with tls_port(ensured) as door:
            tls = VisitorTls(str(ensured.certificate), str(ensured.key))
            bound = await door.edge.listener.start("", 0, tls=tls)
            assert "0.0.0.0" in dict(bound)
            for host, number in bound:
                door.port = number
                assert await door.visit("::1" if host == "::" else "127.0.0.1") == b"200"

    run(make, work())


def test_without_file_descriptors_nobody_is_accepted_for_a_while(
    make: Make, ensured: Ensured, monkeypatch: pytest.MonkeyPatch, log_lines: list[str]
) -> None:
    monkeypatch.setattr(handshakes, "_RETRY_AFTER", 0.05)

    class Exhausted(socket.socket):
        failures = 2

        def accept(self) -> tuple[socket.socket, object]:
            if Exhausted.failures:
                Exhausted.failures -= 1
                raise OSError(errno.EMFILE, "Too many open files")
            return super().accept()

    monkeypatch.setattr(handshakes.socket, "socket", Exhausted)

    async def work() -> None:
        async with tls_port(ensured) as door:
            assert await door.visit() == b"200"

    run(make, work())
    assert log_lines.count("ERROR cannot accept a visitor: Too many open files") == 2
