"""One server takes over from another, both in the test's process: what each says, and what goes wrong on the way."""

import asyncio
import gc
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from quictunnel.app.takeover import Addresses, Inherited, take_over
from quictunnel.options import CommandError
from quictunnel.server import handover as module
from quictunnel.server.admin import Admin, Conversation, Line
from quictunnel.server.handover import Handover
from quictunnel.server.server import Server
from quictunnel.server.status import Status
from tests.support.both_ends import BothEnds, both_ends
from tests.support.crowd import CrowdBackend, crowd_backend, fetch, until

pytestmark = pytest.mark.either

ANYWHERE = Addresses(("127.0.0.1", 0), None, ("127.0.0.1", 0))
FACTS: dict[str, Any] = {
    "worker": 0, "workers": 1, "version": "1", "engine": "qh3", "domain": "localhost",
    "listens": {"http": "127.0.0.1:0", "https": None, "quic": "127.0.0.1:0"},
}  # fmt: skip


class Place:
    """A running server with its door, a client of it, and a backend."""

    def __init__(self, ends: BothEnds, backend: CrowdBackend, directory: Path) -> None:
        self.ends = ends
        self.backend = backend
        self.directory = directory
        self.address = ends.server.http_address
        self.servers: list[Server] = []
        self.doors: list[Admin] = []
        self.over: list[asyncio.Event] = []
        self.open_door(ends.server)

    def open_door(self, server: Server, **facts: Any) -> None:
        over = asyncio.Event()
        status = Status(server, FACTS | facts)
        admin = Admin(
            self.directory,
            {"about": status.answer_about, "status": status.answer, "takeover": Handover(server, over.set).answer},
        )
        admin.start()
        self.servers.append(server)
        self.doors.append(admin)
        self.over.append(over)

    async def inherit(self, addresses: Addresses = ANYWHERE, workers: int = 1) -> Inherited:
        [inherited] = await asyncio.to_thread(take_over, self.directory, addresses, workers)
        return inherited

    async def succeed(self) -> Server:
        """A new server that has taken over."""
        inherited = await self.inherit()
        server = self.ends.make_server()
        await inherited.begin(server)
        self.open_door(server)
        return server

    async def serves(self) -> bool:
        status, body, _ = await fetch(self.address, "/x", limit=10)
        return (status, body) == (200, b"/x")

    def close(self) -> None:
        for door in self.doors:
            door.close()
        for server in self.servers[1:]:
            server.close()


@asynccontextmanager
async def place(engines: tuple[str, str], directory: Path) -> AsyncIterator[Place]:
    async with crowd_backend() as backend, both_ends(engines, directory, backend.port) as ends:
        it = Place(ends, backend, directory)
        try:
            yield it
        finally:
            it.close()
    gc.collect()  # what was not closed is a warning, and so an error, here


async def test_visitors_come_to_the_new_server_when_its_clients_are_there(
    engines: tuple[str, str], tmp_path: Path
) -> None:
    async with place(engines, tmp_path) as it:
        old = it.ends.server
        slow = asyncio.get_running_loop().create_task(fetch(it.address, "/slow?700"))
        await until(lambda: it.backend.busy == 1)
        new = await it.succeed()
        assert (new.http_address, new.quic_address) == (old.http_address, old.quic_address)
        assert [session.key for session in new.registry.sessions()] == [each.key for each in old.registry.sessions()]
        assert it.over[0].is_set()
        stopping = asyncio.get_running_loop().create_task(old.stop(20.0))
        assert await it.serves()
        assert new.registry.sessions()[0].served == 1
        assert not stopping.done()
        assert (await slow)[:2] == (200, b"ok")
        await stopping
        before = new.links.predecessor
        assert before is not None
        await until(before.gone.is_set)
        assert await it.serves()
        assert it.ends.agent.serving


async def test_a_request_on_an_old_link_ends_after_the_client_has_moved(
    engines: tuple[str, str], tmp_path: Path
) -> None:
    """A long answer whose acknowledgements come to the new server, and are passed on."""
    async with place(engines, tmp_path) as it:
        size = 3_000_000
        download = asyncio.get_running_loop().create_task(fetch(it.address, f"/down?{size}"))
        await until(lambda: it.backend.sent > 100_000)
        await it.succeed()
        await it.ends.server.stop(20.0)
        assert (await download)[:2] == (200, b"%d intact" % size)


async def test_takeovers_one_after_the_other_while_the_first_still_drains(
    engines: tuple[str, str], tmp_path: Path
) -> None:
    async with place(engines, tmp_path) as it:
        slow = asyncio.get_running_loop().create_task(fetch(it.address, "/slow?1500"))
        await until(lambda: it.backend.busy == 1)
        loop = asyncio.get_running_loop()
        second = await it.succeed()
        stopping = [loop.create_task(it.ends.server.stop(20.0))]
        third = await it.succeed()
        stopping.append(loop.create_task(second.stop(20.0)))
        assert await it.serves()
        assert third.registry.sessions()[0].served == 1
        assert not any(task.done() for task in stopping), "the second waits for the first: it passes datagrams on"
        assert (await slow)[:2] == (200, b"ok")
        await asyncio.gather(*stopping)
        assert await it.serves()


@pytest.mark.parametrize("step", ["asked", "its clients have come"])
async def test_a_new_server_that_dies_before_it_serves_changes_nothing(
    engines: tuple[str, str], tmp_path: Path, step: str, log_lines: list[str]
) -> None:
    async with place(engines, tmp_path) as it:
        inherited = await it.inherit()
        server = it.ends.make_server()
        if step != "asked":
            # Killed while it waits for clients.
            with_clients = asyncio.get_running_loop().create_task(inherited.begin(server))
            await until(lambda: it.ends.server.links.successor is not None)
            with_clients.cancel()
            await asyncio.gather(with_clients, return_exceptions=True)
        server.close()
        inherited.close()
        await until(lambda: it.ends.server.links.successor is None)
        assert await it.serves()
        assert not it.over[0].is_set()
        if step != "asked":
            await until(lambda: any("has gone before it served" in line for line in log_lines))
        # And the next one is welcome.
        await it.succeed()
        assert await it.serves()


async def test_a_server_that_stops_is_not_taken_over(engines: tuple[str, str], tmp_path: Path) -> None:
    async with place(engines, tmp_path) as it:
        slow = asyncio.get_running_loop().create_task(fetch(it.address, "/slow?500"))
        await until(lambda: it.backend.busy == 1)
        stopping = asyncio.get_running_loop().create_task(it.ends.server.stop(20.0))
        await until(lambda: it.ends.server.draining)
        with pytest.raises(CommandError, match=r"the running server \(process \d+\) is stopping: start when it has"):
            await it.inherit()
        assert (await slow)[0] == 200
        await stopping


OTHERS = [
    (ANYWHERE._replace(http=("127.0.0.1", 1)), 1, r"--http is 127\.0\.0\.1:1, and that of the running server"),
    (ANYWHERE._replace(http=("0.0.0.0", 0)), 1, r"--http is 0\.0\.0\.0:0, and that of the running server"),
    (ANYWHERE._replace(https=("127.0.0.1", 0)), 1, r"--https is 127\.0\.0\.1:0, and that .* is nowhere: a takeover"),
    (ANYWHERE._replace(quic=("::1", 0)), 1, r"--quic is \[::1\]:0, and that .* is 127\.0\.0\.1:0: a takeover needs"),
    (ANYWHERE, 2, "the running server has 1 worker, and this one is to have 2 workers"),
]
"addresses, workers, and what is said of them"


async def test_what_is_not_the_same_server_is_refused_and_both_are_named(
    engines: tuple[str, str], tmp_path: Path
) -> None:
    async with place(engines, tmp_path) as it:
        for addresses, workers, said in OTHERS:
            with pytest.raises(CommandError, match=said):
                await it.inherit(addresses, workers)
        exactly = Addresses(it.address, None, it.ends.server.quic_address)
        first = await it.inherit(exactly)
        with pytest.raises(CommandError, match="does not hand over: another process is taking over from it just now"):
            await it.inherit()
        first.close()
        await until(lambda: not it.doors[0]._tasks)
        (await it.inherit()).close()
        assert await it.serves()


async def test_a_server_of_a_version_that_cannot_is_refused(tmp_path: Path) -> None:
    async def about(conversation: Conversation, question: Line) -> None:
        await conversation.send({"pid": 1, "draining": False, "http": "127.0.0.1:1", "quic": "127.0.0.1:2", **FACTS})

    for verbs, said in (
        ({}, r"is of a version that cannot hand over: unknown question: about"),
        ({"about": about}, r"process 1\) does not hand over: unknown question: takeover"),
    ):
        admin = Admin(tmp_path, verbs)
        admin.start()
        with pytest.raises(CommandError, match=said):
            await asyncio.to_thread(take_over, tmp_path, ANYWHERE)
        admin.close()


def test_where_no_server_runs_there_is_nothing_to_inherit(tmp_path: Path) -> None:
    assert take_over(tmp_path, ANYWHERE) == []


async def test_a_successor_that_takes_too_long_is_given_up(
    engines: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_STEP_TIME", 0.2)
    async with place(engines, tmp_path) as it:
        inherited = await it.inherit()
        await until(lambda: not it.doors[0]._tasks)
        server = it.ends.make_server()
        with pytest.raises(CommandError, match="goes on by itself"):
            await inherited.begin(server)
        server.close()
        inherited.close()
        assert await it.serves()


async def test_a_predecessor_that_is_killed_on_the_way_leaves_all_to_the_new_server(
    engines: tuple[str, str], tmp_path: Path
) -> None:
    async with place(engines, tmp_path) as it:
        inherited = await it.inherit()
        old = it.ends.server
        it.doors[0].close()
        old.visitors.close()
        old.links.close()
        server = it.ends.make_server()
        await inherited.begin(server)
        it.open_door(server)
        await until(lambda: server.registry.sessions())
        assert await it.serves()
