"""What one of very many costs, and ten thousand requests that stay open: `.venv/bin/python -m benchmarks.scale FIGURE`.

exchanges   a request, and a second in which nothing happens, beside so many requests that wait
links       the same by a client of so many links
sessions    the same beside so many clients, each with a tunnel of its own
clients     the same by one tunnel of so many clients
flight      a request with so many under way, 32 new ones in each turn of the event loop; and its datagrams
visitors    the same beside so many idle connections of visitors
websockets  10,000 idle WebSockets on one client: real processes, real sockets
longpolls   10,000 requests that a backend does not answer yet, likewise

The first five run both ends in one process, on a network and a clock of the benchmark's own (tests/support/ends.py),
and show CPU time: what else the machine does matters little, and growth shows in the ratio to the row before. An idle
second is one of 30 on the turned clock, with all pings, probes and sweeps in it.

Of what costs a handshake each, up to 1,000 are real. Where there are more, they are forged: sessions as the server has
them, without a client.
"""

import argparse
import asyncio
import contextlib
import gc
import random
import re
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any, NamedTuple

from loguru import logger

from quictunnel.app.loop import loop_factory
from quictunnel.app.process import calm_collector
from quictunnel.http.visitor import VisitorLimits
from quictunnel.http.visitor_connection import VisitorConnection
from quictunnel.server.registry import RegistryLimits
from quictunnel.trust.tokens import Grant
from quictunnel.wire.frames import RequestHead
from tests.support.ends import Backend, Ends, Request, Visit, VisitorTransport, play
from tests.support.held import Crowd, ask, descriptors, held_backend
from tests.support.processes import Processes

BATCH = 20
"requests at a time, fewer than make a client open another link"

TURN = 32
"requests that begin in one turn of the event loop: as many as datagrams that are read in one"

ANSWER = 100
"bytes"

IN_FLIGHT = (1, 64, 256, 1000, 4000)

COUNTS = (1, 10, 100, 1000, 10_000)


class Cost(NamedTuple):
    """CPU time in microseconds."""

    request: float
    idle: float


class Holding(Backend):
    """Answers everything at once but what is to be held."""

    def on_request(self, request: Request) -> None:
        head = request.frames[0]
        assert isinstance(head, RequestHead)
        if head.target != b"/held":
            request.answer()


async def cost(ends: Ends, requests: int, seconds: int = 30) -> Cost:
    """Of one request, and of a second in which nothing happens."""

    async def some(count: int) -> None:
        for _ in range(count // BATCH):
            visits = [ends.visit() for _ in range(BATCH)]
            await ends.until(lambda visits=visits: all(visit.status for visit in visits))
            assert all(visit.status == 200 for visit in visits), visits[0].answer
            for visit in visits:
                visit.leave()

    await some(5 * BATCH)
    await asyncio.sleep(12.0)  # what was busy counts as busy for a while
    calm_collector()  # as the commands do
    began = time.process_time()
    await asyncio.sleep(seconds)
    idle = (time.process_time() - began) / seconds
    began = time.process_time()
    turned = ends.loop.time()
    await some(requests)
    used = time.process_time() - began - idle * (ends.loop.time() - turned)
    return Cost(1e6 * used / requests, 1e6 * idle)


# What there are many of


async def exchanges(ends: Ends, count: int) -> None:
    ends.server.registry.limits = RegistryLimits(in_flight=20_000)
    await ends.connected(Holding(), max_links=256)
    for first in range(0, count, BATCH):
        for _ in range(min(BATCH, count - first)):
            ends.visit("/held")
        await asyncio.sleep(0.05)
    assert ends.session().in_flight == count


async def links(ends: Ends, count: int) -> None:
    agent = await ends.connected(Holding(), max_links=256)
    agent._grow(0, count)
    # As many as the load would want stay for a while.
    ends.session().wanted_links = count
    await ends.until(lambda: len(ends.session().links) == count)


async def sessions(ends: Ends, count: int) -> None:
    await ends.connected(Holding())
    await others(ends, count, lambda number: f"t{number}")


async def clients(ends: Ends, count: int) -> None:
    await ends.connected(Holding())
    await others(ends, count, lambda number: "app")


async def others(ends: Ends, count: int, name: Callable[[int], str]) -> None:
    """Sessions beside the first: so many in all, real ones as far as that goes."""
    registry = ends.server.registry
    registry.limits = RegistryLimits(sessions=20_000)
    real = min(count, 1000)
    for first in range(1, real, 20):
        agents = [ends.connect(Holding(), tunnel=name(number)) for number in range(first, min(first + 20, real))]
        await ends.until(lambda agents=agents: all(agent.serving for agent in agents))
    for number in range(real, count):
        grant = Grant(ends.token.id, name(number), (), None, b"")
        link: Any = Forged()
        registry.register(grant, f"forged-{number:020}", "forged", 0, link, ends.loop.time())


class Forged:
    """A link that takes nothing."""

    active = 100
    filling = False
    draining = False
    closed = None
    answered_at = 0.0
    session: Any = None

    def has_slot(self) -> bool:
        return False

    def silent_for(self) -> float:
        return 0.0

    def send_control(self, message: object) -> None:
        pass

    def close(self, code: int, reason: str) -> None:
        pass


async def visitors(ends: Ends, count: int) -> None:
    await ends.connected(Holding())
    for _ in range(count):
        idle = Visit.__new__(Visit)
        idle.transport = VisitorTransport()
        idle.connection = VisitorConnection(ends.server.visitors)
        idle.transport.protocol = idle.connection
        idle.connection.connection_made(idle.transport)
        idle.send(b"GET / HTTP/1.1\r\nHost: app.localhost\r\n\r\n")
        if len(ends.server.visitors) % BATCH == 0:
            await asyncio.sleep(0.05)
    await asyncio.sleep(1.0)
    assert ends.server.visitors.in_flight == 0


IN_MEMORY: dict[str, tuple[Callable[[Ends, int], Awaitable[None]], int]] = {
    "exchanges": (exchanges, 10_000),
    "links": (links, 256),
    "sessions": (sessions, 10_000),
    "clients": (clients, 1000),
    "visitors": (visitors, 10_000),
}
"what makes them, and how many there may be: a session has 256 links at most, a tunnel 1,024 clients"


def in_memory(figure: str, engine: str, arguments: argparse.Namespace) -> None:
    """Print the rows of one figure as they come."""
    make, most = IN_MEMORY[figure]
    print(f"| {figure} ({engine}) | us a request | to the row before | us an idle second | to the row before |")
    print(f"|{'---|' * 5}")
    before: Cost | None = None
    counts = sorted({min(count, most, arguments.most) for count in COUNTS})
    for count in (count for count in counts if count >= arguments.least):
        found: list[Cost] = []
        gc.unfreeze()  # what the row before has left
        gc.collect()

        async def scenario(ends: Ends, count: int = count, found: list[Cost] = found) -> None:
            ends.server.visitors.limits = VisitorLimits(connections=30_000, idle_time=1e6)
            await make(ends, count)
            found.append(await cost(ends, arguments.requests))

        with tempfile.TemporaryDirectory() as directory:
            play(scenario, (engine, engine), Path(directory))
        (now,) = found
        ratios = ["", ""] if before is None else [f"{a / b:.2f}" for a, b in zip(now, before, strict=True)]
        print(f"| {count:,} | {now.request:.0f} | {ratios[0]} | {now.idle:.0f} | {ratios[1]} |", flush=True)
        before = now


# So many under way, a few new ones in each turn


class Asking(VisitorTransport):
    """A visitor's connection that is kept; ``answered`` is told when it has its whole answer, of as many ``x``."""

    def __init__(self, ends: Ends, answered: Callable[["Asking"], None]) -> None:
        super().__init__()
        self.answered = answered
        self.connection = VisitorConnection(ends.server.visitors)
        self.protocol = self.connection
        self.connection.connection_made(self)

    def ask(self) -> None:
        self.left = ANSWER
        self.connection.data_received(b"GET / HTTP/1.1\r\nHost: app.localhost\r\n\r\n")

    def write(self, data: Any) -> None:
        self.left -= data.count(b"x")
        if not self.left:
            self.answered(self)


class Late(Backend):
    """Answers after ``after`` seconds, or at random between half and one and a half of that."""

    apart = False

    def on_request(self, request: Request) -> None:
        assert self.after is not None
        after = self.after * random.uniform(0.5, 1.5) if self.apart else self.after
        asyncio.get_running_loop().call_later(after, request.answer, 200, b"x" * ANSWER)


class Flight(NamedTuple):
    """CPU microseconds and datagrams of a request, both ends, and how many links there were."""

    request: float
    packets: float
    links: int


async def flight(ends: Ends, count: int, requests: int, *, apart: bool) -> Flight:
    """What a request costs with so many under way, of which ``TURN`` begin in each turn of the event loop."""
    turn = min(count, TURN)
    ends.network.delay = 0.0001
    backend = Late()
    agent = await ends.connected(backend, max_links=256)
    idle: list[Asking] = [Asking(ends, lambda each: idle.append(each)) for _ in range(2 * count)]

    async def some(number: int) -> None:
        for _ in range(number // turn):
            for _ in range(turn):
                (idle.pop() if idle else Asking(ends, lambda each: idle.append(each))).ask()
            await asyncio.sleep(0.001)

    backend.after = 0.001 * count / turn
    backend.apart = apart
    await some(6 * count)
    await asyncio.sleep(1.0)
    await some(2 * count)
    calm_collector()
    both = lambda: sum(link.sent for link in (*agent.links, *ends.server.links.links))  # noqa: E731
    sent, began = both(), time.process_time()
    await some(requests)
    used = time.process_time() - began
    return Flight(1e6 * used / requests, (both() - sent) / requests, len(agent.links))


def in_flight(engine: str, arguments: argparse.Namespace) -> None:
    """Print the rows as they come."""
    print(f"| under way ({engine}) | answers | us a request | datagrams a request | links |\n|{'---|' * 5}")
    for count in (count for count in IN_FLIGHT if arguments.least <= count <= arguments.most):
        for apart in (False, True):
            found: list[Flight] = []

            async def scenario(
                ends: Ends, count: int = count, apart: bool = apart, found: list[Flight] = found
            ) -> None:
                ends.server.visitors.limits = VisitorLimits(connections=30_000, idle_time=1e6)
                found.append(await flight(ends, count, max(arguments.requests, count), apart=apart))

            for _ in range(arguments.repeats):
                gc.unfreeze()
                gc.collect()
                with tempfile.TemporaryDirectory() as directory:
                    play(scenario, (engine, engine), Path(directory))
            cost, packets, links = (statistics.median(each) for each in zip(*found, strict=True))
            how = "apart" if apart else "together"
            print(f"| {count:,} | {how} | {cost:.0f} | {packets:.2f} | {links:.0f} |", flush=True)


# Ten thousand that stay open


class Seen(NamedTuple):
    """What the server and its client use."""

    memory: tuple[float, float]
    busy: tuple[float, float]


@contextlib.asynccontextmanager
async def held(figure: str, engine: str, count: int, seconds: float) -> AsyncIterator[dict[str, Any]]:
    """So many, measured; what it came to."""
    kind = {"websockets": "websocket", "longpolls": "poll"}[figure]
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        with Processes(directory, cold=True) as processes:
            async with held_backend() as backend:
                limit = str(count + 2000)
                serve = ("--max-in-flight", limit, "--max-visitors", limit, "--log-file", str(directory / "serve.log"))
                server = await asyncio.to_thread(processes.server, *serve, engine=engine)
                connect = ("--max-links", "128", "--log-file", str(directory / "connect.log"))
                client = await asyncio.to_thread(processes.client, server, backend.target, *connect, engine=engine)
                both = (server.process, client.process)

                def seen() -> Seen:
                    memory = tuple(each.resident() / 1e6 for each in both)
                    return Seen((memory[0], memory[1]), (both[0].busy(), both[1].busy()))

                await ask(server.http, "/")
                crowd = Crowd(server.http)
                start, began = seen(), time.monotonic()
                await crowd.come(kind, count)
                await backend.reached(kind, count, lambda: len(crowd.refused), 300.0)
                opening, opened = time.monotonic() - began, seen()
                assert not crowd.refused, crowd.refused[0].received
                await asyncio.sleep(12.0)
                idle, began = seen(), time.monotonic()
                await asyncio.sleep(seconds)
                later, took = seen(), time.monotonic() - began
                small = []
                for _ in range(200):
                    began = time.perf_counter()
                    await ask(server.http, "/")
                    small.append(1000 * (time.perf_counter() - began))
                small.sort()
                before, began = seen(), time.monotonic()
                if kind == "websocket":
                    for each in crowd.visitors:
                        each.say()
                else:
                    await ask(server.http, "/release")
                answered = await crowd.all_answered()
                answering, after = time.monotonic() - began, seen()
                if answered < count:
                    for name in ("serve.log", "connect.log"):
                        tell_troubles(directory / name)
                crowd.leave()
                await backend.reached(kind, 0)
                pair = lambda one, other, scale: " / ".join(  # noqa: E731
                    f"{scale * (b - a):.3g}" for a, b in zip(one, other, strict=True)
                )
                yield {
                    "engine": engine,
                    "open": count,
                    "answered": answered,
                    "opening s": f"{opening:.1f}",
                    "CPU us to open": pair(start.busy, opened.busy, 1e6 / count),
                    "MB": " / ".join(f"{each:.0f}" for each in later.memory),
                    "kB each": pair(start.memory, later.memory, 1000 / count),
                    "idle % of a core": pair(idle.busy, later.busy, 100 / took),
                    "CPU us a message": pair(before.busy, after.busy, 1e6 / count),
                    "all answered s": f"{answering:.1f}",
                    "small p50 / p99 ms": f"{small[100]:.1f} / {small[197]:.1f}",
                }


def tell_troubles(log: Path) -> None:
    """What a log says of why not all were answered."""
    lines = [line for line in log.read_text().splitlines() if " WARNING " in line or " ERROR " in line]
    for line in lines[:5]:
        print(f"{log.name}: {line[:300]}", file=sys.stderr)
    print(f"{log.name}: {len(lines)} warnings and errors", file=sys.stderr)
    print(f"{log.name}: {Counter(re.findall(r'error=[a-z_]+', log.read_text()))}", file=sys.stderr)


async def stay_open(figure: str, engine: str, arguments: argparse.Namespace) -> None:
    """Print one row."""
    descriptors(arguments.most + 500)
    async with held(figure, engine, arguments.most, arguments.seconds) as row:
        print(f"| {figure} | {' | '.join(row)} |\n|{'---|' * (len(row) + 1)}")
        print(f"| | {' | '.join(str(each) for each in row.values())} |", flush=True)


FIGURES = (*IN_MEMORY, "flight", "websockets", "longpolls")


def main() -> None:
    """Run one figure, or several."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("figures", nargs="+", choices=[*FIGURES, "all"], metavar="FIGURE")
    parser.add_argument("--engine", default="qh3,aioquic", help="of both sides; several with commas")
    parser.add_argument("--most", type=int, default=10_000, help="how many there are at most")
    parser.add_argument("--least", type=int, default=1, help="how many there are at least")
    parser.add_argument("--requests", type=int, default=400, help="that are measured in each row")
    parser.add_argument("--repeats", type=int, default=3, help="of flight, of which the medians are shown")
    parser.add_argument("--seconds", type=float, default=20.0, help="of idling that are measured, of what stays open")
    arguments = parser.parse_args()
    logger.remove()
    for figure in FIGURES if "all" in arguments.figures else arguments.figures:
        for engine in arguments.engine.split(","):
            print()
            if figure in IN_MEMORY:
                in_memory(figure, engine, arguments)
                continue
            if figure == "flight":
                in_flight(engine, arguments)
                continue
            with asyncio.Runner(loop_factory=loop_factory()) as runner:
                runner.run(stay_open(figure, engine, arguments))


if __name__ == "__main__":
    sys.exit(main())
