"""Many requests at once through one client: none waits for another, none is lost, nothing is left behind."""

import asyncio
import socket
import statistics
import struct
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from tests.support.both_ends import both_ends
from tests.support.crowd import CrowdBackend, crowd_backend, fetch, opened, read_head, until
from tests.support.processes import Processes, Tunnel

pytestmark = pytest.mark.either

MANY = 300
"more than a connection has slots"


@pytest.fixture
def processes(tmp_path: Path) -> Iterator[Processes]:
    with Processes(tmp_path / "processes") as processes:
        yield processes


@asynccontextmanager
async def tunnel_to(
    backend: CrowdBackend, processes: Processes, engines: tuple[str, str], *, serve: tuple[str, ...] = ()
) -> AsyncIterator[Tunnel]:
    """A tunnel in processes of its own; starting it must not stop the backend's loop."""
    yield await asyncio.to_thread(lambda: processes.tunnel(backend.target, engines, serve=serve))


async def test_slow_requests_at_once_all_finish(engines: tuple[str, str], processes: Processes) -> None:
    async with crowd_backend() as backend, tunnel_to(backend, processes, engines) as tunnel:
        results = await asyncio.gather(*(fetch(tunnel.address, "/slow?500") for _ in range(MANY)))
        assert [(status, body) for status, body, _ in results] == [(200, b"ok")] * MANY
        # One after the other they would take 150 s.
        assert max(seconds for _, _, seconds in results) < 10
        assert backend.requests == MANY


async def test_burst_again_after_a_burst_finds_the_links_there(engine: str, processes: Processes) -> None:
    async with crowd_backend() as backend, tunnel_to(backend, processes, (engine, engine)) as tunnel:
        for _ in range(3):
            results = await asyncio.gather(*(fetch(tunnel.address, "/slow?100") for _ in range(MANY)))
            assert [status for status, _, _ in results] == [200] * MANY
        assert statistics.median(seconds for _, _, seconds in results) < 3


@pytest.mark.slow
async def test_uploads_and_downloads_at_once_are_all_intact(engines: tuple[str, str], processes: Processes) -> None:
    size = 2 * 1024 * 1024 + 77
    whole = b"%d intact" % size
    async with crowd_backend() as backend, tunnel_to(backend, processes, engines) as tunnel:
        results = await asyncio.gather(
            *(fetch(tunnel.address, f"/down?{size}") for _ in range(6)),
            *(fetch(tunnel.address, "/up", upload=size) for _ in range(6)),
            *(fetch(tunnel.address, f"/{number}") for number in range(60)),
        )
        assert [(status, body) for status, body, _ in results[:12]] == [(200, whole)] * 12
        assert [body for _, body, _ in results[12:]] == [b"/%d" % number for number in range(60)]


async def test_quick_requests_pass_slow_ones(engine: str, processes: Processes) -> None:
    async with crowd_backend() as backend, tunnel_to(backend, processes, (engine, engine)) as tunnel:
        slow = [asyncio.ensure_future(fetch(tunnel.address, "/slow?1500")) for _ in range(150)]
        await until(lambda: backend.busy == 150)
        quick = [await fetch(tunnel.address, "/quick") for _ in range(40)]
        assert [status for status, _, _ in quick] == [200] * 40
        assert statistics.median(seconds for _, _, seconds in quick) < 0.2
        assert backend.busy == 150, "the slow ones are still under way"
        assert [status for status, _, _ in await asyncio.gather(*slow)] == [200] * 150


# Both ends in this process, so that their counts can be looked at.


def leave(writer: asyncio.StreamWriter, *, reset: bool) -> None:
    """Go away, with RST or with FIN.

    FIN may mean that a visitor still reads: to one that waits within a body of known length nothing can be sent that
    would tell.
    """
    if reset:
        sock = writer.get_extra_info("socket")
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()


@pytest.mark.slow
@pytest.mark.parametrize("phase", ["waiting", "half an answer", "much to read", "half an upload"])
async def test_visitors_who_abort_leave_nothing_behind(engine: str, tmp_path: Path, phase: str) -> None:
    targets = {"waiting": "/slow?9000", "half an answer": "/hang", "much to read": "/down?99000000"}
    async with crowd_backend() as backend, both_ends((engine, engine), tmp_path, backend.port) as ends:
        assert (await fetch(ends.server.http_address, "/"))[0] == 200
        visitors = []
        for _ in range(200):
            if phase == "half an upload":
                pair = await opened(ends.server.http_address, "/up", "Content-Length: 1000000", method="POST")
                pair[1].write(b"x" * 1000)
            else:
                pair = await opened(ends.server.http_address, targets[phase])
            visitors.append(pair)
        await until(lambda: backend.busy == 200, 20)
        if phase in ("half an answer", "much to read"):
            await asyncio.gather(*(read_head(reader) for reader, _ in visitors))
        for _, writer in visitors:
            leave(writer, reset=phase == "half an answer")
        await ends.left()
        if phase != "waiting":  # asyncio's streams do not tell a sleeping handler that its connection is gone
            await until(lambda: backend.busy == 0)
        results = await asyncio.gather(*(fetch(ends.server.http_address, f"/{number}") for number in range(150)))
        assert [status for status, _, _ in results] == [200] * 150
        await ends.left()


async def test_visitors_who_abort_under_load_leave_nothing_behind(engine: str, tmp_path: Path) -> None:
    async with crowd_backend() as backend, both_ends((engine, engine), tmp_path, backend.port) as ends:

        async def impatient(number: int) -> None:
            _, writer = await opened(ends.server.http_address, f"/slow?{number % 50}")
            await asyncio.sleep(number % 37 / 1000)
            writer.transport.abort()

        for _ in range(3):
            others = [fetch(ends.server.http_address, f"/slow?{number % 60}") for number in range(100)]
            results, *_ = await asyncio.gather(asyncio.gather(*others), *(impatient(number) for number in range(200)))
            assert [status for status, _, _ in results] == [200] * 100
        await ends.left()
        await until(lambda: len(ends.server.visitors) == 0)
