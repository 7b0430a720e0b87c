"""A server that stops: what visitors with connections of their own notice of it."""

import asyncio
import time
from pathlib import Path

import pytest

from tests.support.both_ends import both_ends
from tests.support.crowd import crowd_backend, fetch, opened, read_head, until

pytestmark = pytest.mark.either


async def answered(reader: asyncio.StreamReader) -> tuple[bytes, bytes]:
    """A head in lower case, and its body."""
    head = (await read_head(reader)).lower()
    size = int(head.partition(b"content-length: ")[2].partition(b"\r\n")[0])
    return head, await reader.readexactly(size)


async def test_a_kept_connection_gets_one_more_answer_through_the_tunnel(
    engines: tuple[str, str], tmp_path: Path
) -> None:
    async with crowd_backend() as backend, both_ends(engines, tmp_path, backend.port) as ends:
        address = ends.server.http_address
        reader, writer = await opened(address, "/first")
        head, body = await answered(reader)
        assert (b"connection: close" in head, body) == (False, b"/first")
        slow, slow_writer = await opened(address, "/slow?300")
        await until(lambda: backend.busy == 1)
        stopping = asyncio.get_running_loop().create_task(ends.server.stop(20.0))
        await until(lambda: ends.server.draining)
        with pytest.raises(OSError):
            await fetch(address, "/late")
        # Its client has been told, and takes what comes on the old link all the same.
        await until(lambda: any(link.draining for link in ends.agent.links))
        writer.write(b"GET /second HTTP/1.1\r\nHost: app.localhost\r\n\r\n")
        head, body = await answered(reader)
        assert (head[:13], b"connection: close" in head, body) == (b"http/1.1 200 ", True, b"/second")
        assert await reader.read() == b""
        head, body = await answered(slow)
        assert (b"connection: close" in head, body) == (True, b"ok")
        began = time.monotonic()
        await stopping
        assert time.monotonic() - began < 10
        for each in (writer, slow_writer):
            each.close()


async def test_idle_connections_are_waited_for_no_longer_than_the_grace(
    engines: tuple[str, str], tmp_path: Path
) -> None:
    async with crowd_backend() as backend, both_ends(engines, tmp_path, backend.port) as ends:
        reader, writer = await opened(ends.server.http_address, "/first")
        await answered(reader)
        began = time.monotonic()
        await ends.server.stop(0.2)
        assert time.monotonic() - began < 1.9, "an idle connection alone is kept for two seconds"
        assert await reader.read() == b""
        writer.close()
