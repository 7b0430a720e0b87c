"""What happens to a server's visitors while its clients, itself or the network in between come and go.

Each function here plays one such story with real processes and a load, and returns what it came to as rows of plain
values: for `benchmarks/fleet.py` to print, and for the tests to judge. A row's ``failed`` is what failed, whoever is to
blame; what else is known of the failures is beside it.
"""

import asyncio
import random
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterable
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from tests.support.namespaces import two_namespaces
from tests.support.nonces import Ledger, Load, NonceBackend, Record, endless, figures, nonce_backend, percentile
from tests.support.processes import ROOT, Client, Processes, Server, free_udp_port
from tests.support.relay import UdpRelay

__all__ = [
    "Fleet",
    "blackhole",
    "bulk_beside",
    "clients_leave",
    "fleet",
    "lossy",
    "many_clients",
    "moving_client",
    "nonces",
    "offers",
    "play",
    "rebinding",
    "server_killed",
    "takeover",
]

T = TypeVar("T")
Row = dict[str, Any]

SETTLED = 1.0
"seconds of load before the first fault and after the last"


@cache
def offers(command: str, option: str) -> bool:
    """Whether a command has an option."""
    shown = subprocess.run(
        (sys.executable, "-m", "quictunnel", command, "--help"), cwd=ROOT, capture_output=True, text=True, check=True
    )
    return option in shown.stdout


async def off(work: Callable[..., T], *args: Any, **options: Any) -> T:
    """Do what waits for a process in a thread, so that the load goes on."""
    return await asyncio.to_thread(work, *args, **options)


def play(story: Coroutine[Any, Any, T]) -> T:
    """Play one of these stories to its end, in an event loop of its own."""
    with asyncio.Runner() as runner:
        return runner.run(story)


class Fleet:
    """A server, its clients with a backend each, and what the backends were asked."""

    def __init__(self, processes: Processes, server: Server, ledger: Ledger) -> None:
        self.processes = processes
        self.server = server
        self.ledger = ledger
        self.clients: list[Client] = []
        self.backends: list[NonceBackend] = []
        self.relay: UdpRelay | None = None

    @property
    def path(self) -> UdpRelay:
        """The network between them."""
        assert self.relay is not None
        return self.relay

    def load(self, **options: Any) -> Load:
        """Visitors of the server."""
        return Load(self.server.http, **options)

    async def served(self, limit: float = 20.0) -> None:
        """Wait until requests are answered."""
        deadline = time.monotonic() + limit
        while not all(record.ok for record in await self.load(post=0.0, limit=5.0).in_turn(2, 1)):
            assert time.monotonic() < deadline, f"nothing is served within {limit:g} s"
            await asyncio.sleep(0.05)


@asynccontextmanager
async def fleet(
    directory: Path,
    engines: tuple[str, str],
    *,
    clients: int = 1,
    serve: tuple[str, ...] = (),
    connect: tuple[str, ...] = (),
    faults: dict[str, Any] | None = None,
    names: Callable[[int], str] = lambda number: "app",
) -> AsyncIterator[Fleet]:
    """A running fleet; ``faults`` (which may be empty) puts a faulty network between server and clients.

    ``engines`` are the server's and the clients'.
    """
    ledger = Ledger()
    async with AsyncExitStack() as stack:
        processes = stack.enter_context(Processes(directory))
        server = await off(processes.server, *serve, engine=engines[0], quic_port=free_udp_port())
        all_of_it = Fleet(processes, server, ledger)
        if faults is not None:
            all_of_it.relay = stack.enter_context(UdpRelay(server.quic_port))
            connect = (*connect, "--server", all_of_it.relay.address)
        for number in range(clients):
            backend = await stack.enter_async_context(nonce_backend(ledger, f"backend-{number}"))
            all_of_it.backends.append(backend)
            client = await off(
                processes.client, server, backend.target, *connect, tunnel=names(number), engine=engines[1]
            )
            all_of_it.clients.append(client)
        if faults:
            all_of_it.path.set(**faults)
        yield all_of_it


async def under_load(load: Load, rate: float, story: Coroutine[Any, Any, T]) -> tuple[list[Record], T]:
    """Play a story while requests come at a rate, and wait for the last answer."""
    loading = asyncio.get_running_loop().create_task(load.at_rate(rate))
    try:
        await asyncio.sleep(SETTLED)
        told = await story
        await asyncio.sleep(SETTLED)
    finally:
        load.stop()
        records = await loading
    return records, told


def counted(engines: tuple[str, str], records: Iterable[Record], ledger: Ledger) -> Row:
    return {"engines": "/".join(dict.fromkeys(engines)), **figures(records, ledger).as_dict()}


# Clients and servers that come and go


async def clients_leave(
    directory: Path,
    engines: tuple[str, str],
    *,
    kill: bool,
    times: int = 10,
    rate: float = 500,
    limit: float = 60.0,
    serve: tuple[str, ...] = (),
) -> Row:
    """Two clients; one is ended, by SIGTERM or by ``kill`` -9, and started again, so many times."""
    async with fleet(directory, engines, clients=2, serve=serve) as all_of_it:

        async def story() -> None:
            client = all_of_it.clients[0]
            for _ in range(times):
                if kill:
                    await off(client.process.kill)
                else:
                    status = await off(client.process.stop)
                    assert status == 0, client.log
                await off(client.start)
                await off(client.process.ready, limit=60.0)
                await asyncio.sleep(SETTLED)

        load = all_of_it.load(wait=lambda chance: chance.randrange(20), limit=limit)
        records, _ = await under_load(load, rate, story())
        return counted(engines, records, all_of_it.ledger)


async def takeover(
    directory: Path, engines: tuple[str, str], *, times: int = 10, rate: float = 300, limit: float = 60.0
) -> Row:
    """The server is replaced so many times: by ``--takeover`` where there is such a thing, else stopped and started."""
    can = offers("serve", "--takeover")
    async with fleet(directory, engines, clients=2, serve=("--takeover",) if can else ()) as all_of_it:
        server = all_of_it.server

        async def story() -> None:
            for _ in range(times):
                if can:
                    left = await off(server.take_over)
                    status = await off(left.exited, 45.0)
                else:
                    status = await off(server.process.stop, 45.0)
                    await off(server.start)
                assert status == 0, server.log
                await asyncio.sleep(SETTLED)

        load = all_of_it.load(wait=lambda chance: chance.randrange(20), limit=limit)
        records, _ = await under_load(load, rate, story())
        return {"how": "--takeover" if can else "stop, start"} | counted(engines, records, all_of_it.ledger)


async def nonces(
    directory: Path,
    engines: tuple[str, str],
    *,
    count: int = 20_000,
    rate: float = 400,
    clients: int = 3,
    seed: int = 1,
    limit: float = 60.0,
) -> Row:
    """Requests of all sizes while clients are killed and come back at random moments."""
    chance = random.Random(seed)
    async with fleet(directory, engines, clients=clients) as all_of_it:
        killed = 0

        async def kill() -> None:
            nonlocal killed
            while True:
                await asyncio.sleep(chance.uniform(0.0, 2.0))
                client = chance.choice(all_of_it.clients)
                await off(client.process.kill)
                killed += 1
                await asyncio.sleep(chance.uniform(0.0, 1.0))
                await off(client.start)
                await off(client.process.ready, limit=60.0)

        load = all_of_it.load(
            size=lambda chance: chance.choice((0, 100, 3000, 30_000)),
            upload=lambda chance: chance.choice((0, 100, 3000, 30_000)),
            wait=lambda chance: chance.choice((0, 0, 5, 50)),
            limit=limit,
            seed=seed,
        )
        killing = asyncio.get_running_loop().create_task(kill())
        try:
            records = await load.at_rate(rate, count=count)
        finally:
            killing.cancel()
            with suppress(asyncio.CancelledError):
                await killing
        return counted(engines, records, all_of_it.ledger) | {"killed": killed}


async def server_killed(
    directory: Path, engines: tuple[str, str], *, times: int = 20, clients: int = 3, down: float = 0.0
) -> Row:
    """The server is killed and started again on its ports: seconds until every client serves again."""
    async with fleet(directory, engines, clients=clients, names=lambda number: f"app{number}") as all_of_it:
        server = all_of_it.server
        since_ready: list[float] = []
        since_kill: list[float] = []

        async def served(name: str) -> None:
            while True:
                load = all_of_it.load(host=lambda: f"{name}.localhost", post=0.0, limit=30.0)
                if (await load.in_turn(1, 1))[0].ok:
                    return
                await asyncio.sleep(0.01)

        for _ in range(times):
            began = time.monotonic()
            await off(server.process.kill)
            await asyncio.sleep(down)
            await off(server.start)
            ready = time.monotonic()
            async with asyncio.timeout(60):
                await asyncio.gather(*(served(f"app{number}") for number in range(clients)))
            since_ready.append(time.monotonic() - ready)
            since_kill.append(time.monotonic() - began)
            await asyncio.sleep(SETTLED)
        return {
            "engines": "/".join(dict.fromkeys(engines)),
            "times": times,
            "clients": clients,
            "down": down,
            "p50": percentile(since_ready, 50),
            "p95": percentile(since_ready, 95),
            "longest": max(since_ready),
            "p50_since_kill": percentile(since_kill, 50),
            "p95_since_kill": percentile(since_kill, 95),
        }


# A network that goes wrong


async def rebinding(
    directory: Path, engines: tuple[str, str], *, seconds: float = 60, every: float = 1.0, rate: float = 200
) -> Row:
    """The server sees the client's datagrams come from a new port every second."""
    async with fleet(directory, engines, faults={}) as all_of_it:
        path = all_of_it.path
        dialled = path.counts()["ways"]

        async def story() -> int:
            for _ in range(round(seconds / every)):
                await asyncio.sleep(every)
                await off(path.rebind)
            return int(path.counts()["ways"])

        load = all_of_it.load(wait=lambda chance: chance.randrange(100), size=lambda chance: chance.randrange(10_000))
        records, ways = await under_load(load, rate, story())
        return counted(engines, records, all_of_it.ledger) | {
            "rebound": path.counts()["rebound"],
            "dialled": ways - dialled,
        }


async def lossy(
    directory: Path,
    engines: tuple[str, str],
    faults: dict[str, Any],
    *,
    count: int = 1000,
    size: int = 20_000,
    visitors: int = 200,
    post: float = 0.5,
    limit: float = 300.0,
) -> Row:
    """Requests for ``size`` bytes, some of which bring as many, through a faulty network, by many visitors at once."""
    async with fleet(directory, engines, faults=faults) as all_of_it:
        load = all_of_it.load(size=lambda chance: size, upload=lambda chance: size, post=post, limit=limit)
        began = time.monotonic()
        records = await load.in_turn(count, visitors)
        took = time.monotonic() - began
        return counted(engines, records, all_of_it.ledger) | {"seconds": took, "dropped": all_of_it.path.dropped}


async def blackhole(
    directory: Path,
    engines: tuple[str, str],
    *,
    seconds: float,
    rate: float = 50,
    hold: str = "5s",
    after: float = 20.0,
    limit: float = 60.0,
) -> Row:
    """Every datagram is dropped for so long: failures, and when the first request succeeds after that."""
    serve = ("--hold", hold) if offers("serve", "--hold") else ()
    async with fleet(directory, engines, faults={}, serve=serve) as all_of_it:

        async def story() -> tuple[float, float]:
            await asyncio.sleep(SETTLED)
            all_of_it.path.drops = True
            gone = time.monotonic()
            await asyncio.sleep(seconds)
            all_of_it.path.drops = False
            back = time.monotonic()
            await asyncio.sleep(after)
            return gone, back

        load = all_of_it.load(limit=limit)
        records, (gone, back) = await under_load(load, rate, story())
        first = min((record.ended for record in records if record.ok and record.ended > back), default=float("inf"))
        fresh = min((record.ended for record in records if record.ok and record.due > back), default=float("inf"))
        return (
            {"seconds": seconds, "hold": hold if serve else "-"}
            | counted(engines, records, all_of_it.ledger)
            | {
                "failed_before": sum(not record.ok for record in records if record.due < gone),
                "failed_during": sum(not record.ok for record in records if gone <= record.due < back),
                "failed_after": sum(not record.ok for record in records if record.due >= back),
                "first_success": first - back,
                "first_fresh_success": fresh - back,
            }
        )


async def bulk_beside(
    directory: Path,
    engines: tuple[str, str],
    *,
    loss: float = 0.02,
    round_trip: float = 0.05,
    rounds: int = 3,
    each: int = 500,
    warm: float = 3.0,
) -> Row:
    """50 visitors with small GETs, alone and beside a download that never ends, in turns."""
    faults = {"loss": loss, "delay": round_trip / 2}
    async with fleet(directory, engines, faults=faults) as all_of_it:
        alone: list[Record] = []
        beside: list[Record] = []
        moved, moving = 0, 0.0

        async def download() -> None:
            nonlocal moved
            stream = endless(all_of_it.server.http)
            try:
                async for size in stream:
                    moved += size
            finally:
                await stream.aclose()

        async def small() -> list[Record]:
            return await all_of_it.load(post=0.0, size=lambda chance: 100).in_turn(each, 50)

        await small()
        for _ in range(rounds):
            alone += await small()
            began = time.monotonic()
            downloading = asyncio.get_running_loop().create_task(download())
            try:
                await asyncio.sleep(warm)
                beside += await small()
                assert not downloading.done(), "the download ended before what it was to be measured beside"
                moving += time.monotonic() - began
            finally:
                downloading.cancel()
                with suppress(asyncio.CancelledError):
                    await downloading
            await asyncio.sleep(SETTLED)
        took = {"alone": [], "beside": []}
        for name, records in (("alone", alone), ("beside", beside)):
            took[name] = [record.ended - record.due for record in records if record.ok]
        return counted(engines, alone + beside, all_of_it.ledger) | {
            "p50_alone": percentile(took["alone"], 50),
            "p50_beside": percentile(took["beside"], 50),
            "p99_alone": percentile(took["alone"], 99),
            "p99_beside": percentile(took["beside"], 99),
            "ratio": percentile(took["beside"], 99) / (percentile(took["alone"], 99) or 1),
            "download_mb_per_s": moved / moving / 1e6,
        }


async def moving_client(directory: Path, engines: tuple[str, str], *, rate: float = 50, down: float = 3.0) -> list[Row]:
    """The client's machine gets another address, and loses its network for some seconds. Needs root."""
    rows = []
    with two_namespaces() as (here, there):
        ledger = Ledger()
        async with AsyncExitStack() as stack:
            processes = stack.enter_context(Processes(directory))
            processes.within = here.prefix
            hold = ("--hold", "5s") if offers("serve", "--hold") else ()
            server = await off(processes.server, *hold, engine=engines[0], quic_host=here.address)
            backend = await stack.enter_async_context(nonce_backend(ledger, path=directory / "backend"))
            processes.within = there.prefix
            await off(processes.client, server, backend.target, engine=engines[1])

            async def link_down() -> None:
                there.run("link", "set", there.device, "down")
                await asyncio.sleep(down)
                there.run("link", "set", there.device, "up")

            async def new_address() -> None:
                there.change_address()

            with here.entered():
                for name, fault in (("another address", new_address), (f"link down for {down:g} s", link_down)):
                    moments = []

                    async def story(fault: Callable[[], Awaitable[None]] = fault, at: list[float] = moments) -> None:
                        await fault()
                        at.append(time.monotonic())
                        await asyncio.sleep(15.0)

                    load = Load(server.http)
                    records, _ = await under_load(load, rate, story())
                    ends = [record.ended for record in records if record.ok and record.ended > moments[0]]
                    first = min(ends, default=float("inf")) - moments[0]
                    rows.append({"fault": name} | counted(engines, records, ledger) | {"first_success": first})
    return rows


# Many clients


@asynccontextmanager
async def agents(
    fleet: Fleet, count: int, engine: str, *, processes: int = 4, at_once: int = 32
) -> AsyncIterator[float]:
    """So many sessions, ``agent0`` and on, each of a tunnel of its own, in a few processes; the seconds it took."""
    token = fleet.server.token("*")
    arguments = (
        f"127.0.0.1:{fleet.server.quic_port}", str(fleet.server.state / "ca.pem"), fleet.backends[0].target, engine,
        str(at_once),
    )  # fmt: skip
    running: list[asyncio.subprocess.Process] = []
    shares = [range(first, count, processes) for first in range(min(processes, count))]
    try:
        for share in shares:
            numbers = (str(share.start), str(share.stop), str(share.step))
            each = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "tests.support.agents", *arguments, *numbers),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                cwd=ROOT,
                env=fleet.processes.env | {"QUICTUNNEL_TOKEN": token},
            )
            running.append(each)
        for each in running:
            assert await _line(each) == b"loaded\n"
        began = time.monotonic()
        for each in running:
            assert each.stdin is not None
            each.stdin.write(b"go\n")
        for each in running:
            assert await _line(each, 300.0) == b"serving\n"
        yield time.monotonic() - began
    finally:
        for each in running:
            assert each.stdin is not None
            each.stdin.close()
        for each in running:
            try:
                async with asyncio.timeout(30):
                    await each.wait()
            except TimeoutError:
                each.kill()
                await each.wait()


async def _line(process: asyncio.subprocess.Process, limit: float = 60.0) -> bytes:
    assert process.stdout is not None
    async with asyncio.timeout(limit):
        return await process.stdout.readline()


async def many_clients(
    directory: Path,
    engines: tuple[str, str],
    *,
    count: int = 1000,
    requests: int = 1000,
    processes: int = 4,
    at_once: int = 32,
) -> Row:
    """So many sessions of as many tunnels: memory, rate of registration, and a request beside one to a lone client."""
    chance = random.Random(1)
    async with AsyncExitStack() as stack:
        crowded = await stack.enter_async_context(fleet(directory / "crowded", engines, clients=0))
        lonely = await stack.enter_async_context(fleet(directory / "lonely", engines, clients=0))
        ledger = crowded.ledger
        backend = await stack.enter_async_context(nonce_backend(ledger))
        crowded.backends.append(backend)
        lonely.backends.append(backend)
        await stack.enter_async_context(agents(lonely, 1, engines[1], processes=1))
        before = crowded.server.process.resident()
        seconds = await stack.enter_async_context(
            agents(crowded, count, engines[1], processes=processes, at_once=at_once)
        )
        after = crowded.server.process.resident()
        # A tunnel's first request dials its backend too.
        names = iter([f"agent{number}.localhost" for number in range(count)])
        first = await crowded.load(post=0.0, host=lambda: next(names)).in_turn(count, 20)
        await lonely.load(post=0.0, host=lambda: "agent0.localhost").in_turn(10, 1)
        among = crowded.load(post=0.0, host=lambda: f"agent{chance.randrange(count)}.localhost")
        alone = lonely.load(post=0.0, host=lambda: "agent0.localhost")
        for _ in range(requests // 20):
            await among.in_turn(20, 1)
            await alone.in_turn(20, 1)
        busy = crowded.server.process.busy()
        await asyncio.sleep(5.0)
        idle = (crowded.server.process.busy() - busy) / 5.0
        took = {
            name: [record.ended - record.due for record in load.records if record.ok]
            for name, load in (("among", among), ("alone", alone))
        }
        return counted(engines, first + among.records + alone.records, ledger) | {
            "sessions": count,
            "kb_per_session": (after - before) / count / 1000,
            "kb_per_session_used": (crowded.server.process.resident() - before) / count / 1000,
            "registered_per_s": count / seconds,
            "p50_among": percentile(took["among"], 50),
            "p50_alone": percentile(took["alone"], 50),
            "ratio": percentile(took["among"], 50) / (percentile(took["alone"], 50) or 1),
            "idle_cpu": idle,
        }
