"""A client whose own address changes: what becomes of its link and of what is under way on it, on real sockets."""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from quictunnel.backends.asgi import AsgiBackend
from quictunnel.quic.link import LinkClosed
from tests.support.both_ends import BothEnds, both_ends
from tests.support.crowd import until
from tests.support.namespaces import Namespace

pytestmark = pytest.mark.either

CHUNK = bytes(range(256)) * 16


class Stream:
    """An answer that comes in ``count`` pieces, one every ``pause`` seconds."""

    def __init__(self, count: int, pause: float) -> None:
        self.count = count
        self.pause = pause

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return
        await send({"type": "http.response.start", "status": 200, "headers": []})
        for _ in range(self.count):
            await send({"type": "http.response.body", "body": CHUNK, "more_body": True})
            await asyncio.sleep(self.pause)
        await send({"type": "http.response.body", "body": b""})


class Visitor:
    """Reads an answer, and remembers the longest time in which nothing came of it."""

    def __init__(self, address: tuple[str, int]) -> None:
        self.size = 0
        self.gap = 0.0
        self._address = address
        self._task = asyncio.ensure_future(self._read())

    async def _read(self) -> bytes:
        reader, writer = await asyncio.open_connection(*self._address)
        writer.write(b"GET / HTTP/1.0\r\nHost: app.localhost\r\n\r\n")
        whole = bytearray()
        at = time.monotonic()
        while data := await reader.read(65536):
            whole += data
            self.size = len(whole)
            self.gap = max(self.gap, time.monotonic() - at)
            at = time.monotonic()
        writer.close()
        return bytes(whole)

    async def body(self, limit: float = 40.0) -> bytes:
        """The whole of it."""
        async with asyncio.timeout(limit):
            return (await self._task).partition(b"\r\n\r\n")[2]


async def test_answer_goes_on_over_one_socket_after_another(engines: tuple[str, str], tmp_path: Path) -> None:
    async with both_ends(engines, tmp_path, AsgiBackend(Stream(100, 0.005))) as ends:
        (link,) = ends.agent.links
        visitor = Visitor(ends.server.http_address)
        await until(lambda: visitor.size)
        ports = {ends.server.links.links[0].address}
        for _ in range(3):
            ends.agent._keepers[link].way.move()
            await until(lambda: ends.server.links.links[0].address not in ports)
            ports.add(ends.server.links.links[0].address)
        assert await visitor.body() == CHUNK * 100
        assert len(ports) == 4
        # A server on qh3 asks for another link after the second change, and this one ends with its answer.
        await until(lambda: len(ends.agent.links) == 1)
        (last,) = ends.agent.links
        assert (last is link) == (engines[0] == "aioquic")
        await until(lambda: ends.agent._keepers[last].way.sockets == 1)


# With addresses that really change


@asynccontextmanager
async def over(
    cable: tuple[Namespace, Namespace], engines: tuple[str, str], directory: Path
) -> AsyncIterator[tuple[BothEnds, Visitor]]:
    """Both ends on the cable, and a visitor whose answer takes six seconds."""
    here, _ = cable
    backend = AsgiBackend(Stream(120, 0.05))
    async with both_ends(engines, directory, backend, links_at=here.address, links_in=here.entered()) as ends:
        visitor = Visitor(ends.server.http_address)
        await until(lambda: visitor.size)
        yield ends, visitor


@pytest.mark.slow
async def test_answer_goes_on_when_the_client_has_another_address(
    engines: tuple[str, str], tmp_path: Path, cable: tuple[Namespace, Namespace]
) -> None:
    async with over(cable, engines, tmp_path) as (ends, visitor):
        links = ends.agent.links
        for _ in range(3):
            cable[1].change_address()
            await asyncio.sleep(1.5)
        assert await visitor.body() == CHUNK * 120
        assert engines[0] == "qh3" or ends.agent.links == links
        assert ends.server.links.links[0].address[0] == cable[1].address
        print(f"the longest gap in the answer: {visitor.gap:.2f} s")
        assert visitor.gap < 4


@pytest.mark.slow
@pytest.mark.parametrize("seconds", [1.0, 3.0])
async def test_answer_goes_on_when_the_clients_network_was_gone(
    engines: tuple[str, str], tmp_path: Path, cable: tuple[Namespace, Namespace], seconds: float
) -> None:
    async with over(cable, engines, tmp_path) as (ends, visitor):
        cable[1].run("link", "set", "cable", "down")
        await asyncio.sleep(seconds)
        cable[1].run("link", "set", "cable", "up")
        assert await visitor.body() == CHUNK * 120
        print(f"the longest gap in the answer: {visitor.gap:.2f} s of {seconds} s")
        assert visitor.gap < seconds + 4
        assert ends.agent.serving


@pytest.mark.slow
async def test_client_without_a_network_serves_as_soon_as_it_has_one(
    engines: tuple[str, str], tmp_path: Path, cable: tuple[Namespace, Namespace]
) -> None:
    async with over(cable, engines, tmp_path) as (ends, visitor):
        cable[1].run("link", "set", "cable", "down")
        for link in ends.agent.links:
            link.abandon(LinkClosed(0, "as if it had been silent for too long"))
        await asyncio.sleep(3)
        assert not ends.agent.serving
        cable[1].run("link", "set", "cable", "up")
        began = time.monotonic()
        await until(lambda: ends.agent.serving)
        print(f"served {time.monotonic() - began:.2f} s after the network was there")
        visitor._task.cancel()
