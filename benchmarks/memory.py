"""Memory, start and collector: `.venv/bin/python benchmarks/memory.py idle|streams|visitors|start|collector|log`.

idle       resident memory of serve and connect, 5 s after the first request and after 1,000; of several processes too
streams    resident memory with 10,000 requests that wait at a backend, through one client, and after they have ended
visitors   the same with 1,000 kept connections that ask for nothing more
start      from `serve` to ready, and from `connect` to the first answer through the tunnel; processor time of each
collector  the garbage collector's share and pauses under load, by thresholds
log        what a line of the access log costs a request

Both engines unless --engine names one. All runs on this machine, over loopback, with defaults and the log at INFO into
a file; what else a figure needed is said beside it.
"""

import argparse
import asyncio
import contextlib
import gc
import http.client
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from ends import process

SETTLE = 5.0
"seconds before memory is looked at"

PYTHON = (sys.executable, "-m", "quictunnel")


class Memory(NamedTuple):
    """Of one process, in MB."""

    resident: float
    proportional: float
    private: float

    @classmethod
    def of(cls, pid: int) -> "Memory":
        """Now."""
        found = {"Rss": 0, "Pss": 0, "Private_Clean": 0, "Private_Dirty": 0}
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            name, _, rest = line.partition(":")
            if name in found:
                found[name] = int(rest.split()[0])
        private = found["Private_Clean"] + found["Private_Dirty"]
        return cls(found["Rss"] / 1024, found["Pss"] / 1024, private / 1024)


class Ends(NamedTuple):
    """A tunnel: where visitors go, and its processes, parents first."""

    address: str
    server: int
    client: int

    def each(self) -> Iterator[tuple[str, int]]:
        """Every process by name."""
        for name, pid in (("server", self.server), ("client", self.client)):
            yield name, pid
            for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
                yield f"{name}'s child", int(child)


def busy(pid: int) -> float:
    """Seconds of processor time that a process has used, and those of its children that have ended."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")


@contextlib.contextmanager
def tunnel(
    engine: str,
    backend: str,
    serve: tuple[str, ...] = (),
    connect: tuple[str, ...] = (),
    programs: Sequence[tuple[str, ...]] = (PYTHON, PYTHON),
) -> Iterator[Ends]:
    """A server and a client with defaults, a state directory of their own, and logs at INFO in files."""
    with tempfile.TemporaryDirectory() as name:
        common = ("--state-dir", f"{name}/state", "--engine", engine, "--grace", "1s")
        ports = ("--http", "127.0.0.1:0", "--quic", "127.0.0.1:0")
        server = (*programs[0], "serve", *ports, "--log-file", f"{name}/serve.log", *common, *serve)
        client = (*programs[1], "connect", backend, "--tunnel", "app", "--log-file", f"{name}/connect.log")
        with process(*server, ready="ready") as one, process(*client, *common, *connect, ready="ready") as other:
            yield Ends(one["http"], int(one["pid"]), int(other["pid"]))


@contextlib.contextmanager
def backend() -> Iterator[str]:
    """The address of a backend that answers at once, all but /waits."""
    with process(sys.executable, __file__, "--backend", ready="ready") as found:
        yield found["address"]


def ask(address: str, times: int = 1) -> None:
    """Requests one after another on a kept connection."""
    connection = http.client.HTTPConnection(address, timeout=30)
    for _ in range(times):
        connection.request("GET", "/")
        answer = connection.getresponse()
        answer.read()
        if answer.status != 200:
            sys.exit(f"{address}: {answer.status}")
    connection.close()


def row(*cells: object) -> None:
    """A line of the table."""
    print(
        "| " + " | ".join(f"{cell:.1f}" if isinstance(cell, float) else str(cell) for cell in cells) + " |", flush=True
    )


def head(*cells: str) -> None:
    """The first two."""
    row(*cells)
    row(*["---"] * len(cells))


# Idle


def idle(arguments: argparse.Namespace) -> None:
    """Resident memory of processes that have nothing to do."""
    head("engine", "process", "after", "RSS MB", "PSS MB", "private MB")
    for engine in arguments.engine.split(","):
        for serve, connect in (((), ()), (("--workers", "2"), ("--processes", "2"))):
            with backend() as origin, tunnel(engine, origin, serve, connect) as ends:
                for count in (1, 1000):
                    ask(ends.address, count)
                    time.sleep(SETTLE)
                    for name, pid in ends.each():
                        row(engine, " ".join((name, *(serve if "server" in name else connect))), count, *Memory.of(pid))


# Open streams and visitors


class Visitor(asyncio.Protocol):
    """A connection that asks once, or never."""

    def __init__(self, request: bytes) -> None:
        self.request = request
        self.answer = b""
        self.lost = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport
        if self.request:
            transport.write(self.request)

    def data_received(self, data: bytes) -> None:
        self.answer = self.answer or data

    def connection_lost(self, exc: Exception | None) -> None:
        self.lost = True


class Origin(asyncio.Protocol):
    """A backend that answers at once, except for /waits, which it never does."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        if b"/waits" not in data:
            self.transport.write(b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n" + b"x" * 100)


async def answer_all_but_some() -> None:
    """The backend of everything here; a process of its own."""
    server = await asyncio.get_running_loop().create_server(Origin, "127.0.0.1", 0, backlog=4096)
    print(f"ready 127.0.0.1:{server.sockets[0].getsockname()[1]}", flush=True)
    await server.serve_forever()


async def crowd(address: str, count: int, rate: float, request: bytes) -> list[Visitor]:
    """So many connections, so many of them a second."""
    host, _, port = address.rpartition(":")
    loop = asyncio.get_running_loop()
    visitors: list[Visitor] = []
    start = loop.time()
    for index in range(count):
        await asyncio.sleep(max(0.0, start + index / rate - loop.time()))
        _, visitor = await loop.create_connection(lambda: Visitor(request), host, int(port))
        visitors.append(visitor)
    return visitors


async def measured(engine: str, ends: Ends, arguments: argparse.Namespace, request: bytes) -> None:
    """Memory before, with and after a crowd."""
    ask(ends.address, 100)
    await asyncio.sleep(SETTLE)
    before = {name: Memory.of(pid) for name, pid in ends.each()}
    visitors = await crowd(ends.address, arguments.count, arguments.rate, request)
    await asyncio.sleep(2 * SETTLE)
    during = {name: Memory.of(pid) for name, pid in ends.each()}
    waits = request is WAITING
    wrong = [visitor.answer or b"closed" for visitor in visitors if bool(visitor.answer) is waits or visitor.lost]
    for visitor in visitors:
        visitor.transport.close()
    await asyncio.sleep(2 * SETTLE)
    for name, pid in ends.each():
        each = 1024 * (during[name].resident - before[name].resident) / arguments.count
        row(engine, name, arguments.count, before[name].resident, during[name].resident, each, Memory.of(pid).resident)
    if wrong:
        print(f"{len(wrong)} of them did not do as they should, the first with {wrong[0][:200]!r}")


WAITING = b"GET /waits HTTP/1.1\r\nHost: app.localhost\r\nUser-Agent: benchmark/1\r\nAccept: */*\r\n\r\n"
WAITED_FOR = ("--max-in-flight", "100000", "--max-visitors", "100000", "--slot-wait", "60s")
WAITS = ("--max-links", "512", "--backend-head-time", "1h")


def streams(arguments: argparse.Namespace) -> None:
    """Requests that wait at a backend, through one client."""
    print(f"serve {' '.join(WAITED_FOR)}; connect {' '.join(WAITS)}; {arguments.rate:g} of them come a second\n")
    head("engine", "process", "streams", "before MB", "with them MB", "each kB", "10 s after they left MB")
    for engine in arguments.engine.split(","):
        with backend() as origin, tunnel(engine, origin, WAITED_FOR, WAITS) as ends:
            asyncio.run(measured(engine, ends, arguments, WAITING))


def visitors(arguments: argparse.Namespace) -> None:
    """Kept connections of visitors that have had an answer and ask for nothing more."""
    head("engine", "process", "visitors", "before MB", "with them MB", "each kB", "10 s after they left MB")
    for engine in arguments.engine.split(","):
        with backend() as origin, tunnel(engine, origin) as ends:
            asyncio.run(measured(engine, ends, arguments, WAITING.replace(b"/waits", b"/")))


# The start


def start(arguments: argparse.Namespace) -> None:
    """Medians of starts, and of what only says something."""
    head("engine", "what", "seconds (median)", "range", "CPU seconds (median)")
    for engine in arguments.engine.split(","):
        found: dict[str, list[tuple[float, float]]] = {"serve to ready": [], "connect to the first answer": []}
        for _ in range(arguments.repeats):
            with backend() as origin, tempfile.TemporaryDirectory() as name:
                common = ("--state-dir", f"{name}/state", "--engine", engine)
                ports = ("--http", "127.0.0.1:0", "--quic", "127.0.0.1:0", "--log-file", f"{name}/serve.log")
                began = time.perf_counter()
                with process(*PYTHON, "serve", *ports, *common, ready="ready") as server:
                    found["serve to ready"].append((time.perf_counter() - began, busy(int(server["pid"]))))
                    began = time.perf_counter()
                    connect = (*PYTHON, "connect", origin, "--tunnel", "app", "--log-file", f"{name}/connect.log")
                    with process(*connect, *common, ready="ready") as client:
                        ask(server["http"])
                        spent = time.perf_counter() - began, busy(int(client["pid"]))
                        found["connect to the first answer"].append(spent)
        for what, times in found.items():
            told(engine, what, times)
    for words in (("--version",), ("--help",), ("serve", "--help")):
        times = []
        for _ in range(arguments.repeats):
            began, before = time.perf_counter(), os.times()
            subprocess.run((*PYTHON, *words), check=True, stdout=subprocess.DEVNULL)
            after = os.times()
            cpu = after.children_user + after.children_system - before.children_user - before.children_system
            times.append((time.perf_counter() - began, cpu))
        told("", " ".join(words), times)


def told(engine: str, what: str, times: list[tuple[float, float]]) -> None:
    """A row of seconds and seconds of processor time."""
    walls, cpus = ([pair[index] for pair in times] for index in (0, 1))
    row(
        engine, what, f"{statistics.median(walls):.2f}", f"{min(walls):.2f}-{max(walls):.2f}",
        f"{statistics.median(cpus):.2f}",
    )  # fmt: skip


# The collector

COLLECTORS: dict[str, Callable[[], None]] = {
    "700, 10, 10 (Python's)": lambda: None,
    "700, 10, 10, frozen": lambda: freeze(700, 10, 10),
    "10,000, 10, 10, frozen": lambda: freeze(10_000, 10, 10),
    "10,000, 50, 1,000, frozen": lambda: freeze(10_000, 50, 1000),
    "50,000, 20, 100, frozen": lambda: freeze(50_000, 20, 100),
    "off": gc.disable,
}


def freeze(*thresholds: int) -> None:
    """What ``app.process.calm_collector`` does, with other thresholds."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(*thresholds)


def run_with(name: str, file: str, words: list[str]) -> int:
    """Run quictunnel with another collector, and write down what it did."""
    import quictunnel.app.process as own
    from quictunnel.start import main as quictunnel

    seen: list[tuple[int, float]] = []
    began = 0.0

    def note(phase: str, facts: dict[str, int]) -> None:
        nonlocal began
        if phase == "start":
            began = time.thread_time()
        else:
            seen.append((facts["generation"], time.thread_time() - began))

    def set_up() -> None:
        COLLECTORS[name]()
        gc.callbacks.append(note)

    own.calm_collector = set_up
    status = quictunnel(words)
    Path(file).write_text(json.dumps(seen))
    return status


def collector(arguments: argparse.Namespace) -> None:
    """Requests by wrk, while others wait: what the collector costs them."""
    print(f"`wrk -t1 -c64 -d{arguments.seconds}`, beside {arguments.waiting} requests that wait; processor time\n")
    head("engine", "process", "thresholds", "requests", "CPU us/request", "collector us/request", "runs", "longest ms",
         "longest but full ms", "MB after")  # fmt: skip
    for engine in arguments.engine.split(","):
        for name in COLLECTORS:
            if not any(wanted in name for wanted in arguments.only.split(";")):
                continue
            with tempfile.TemporaryDirectory() as directory, backend() as origin:
                asyncio.run(collected(engine, name, directory, origin, arguments))


async def collected(engine: str, name: str, directory: str, origin: str, arguments: argparse.Namespace) -> None:
    """One collector."""
    wrappers = [(sys.executable, __file__, "--collector", name, f"{directory}/{end}") for end in ("server", "client")]
    with tunnel(engine, origin, WAITED_FOR, WAITS, wrappers) as ends:
        waiting = await crowd(ends.address, arguments.waiting, arguments.rate, WAITING)
        ask(ends.address, 100)  # which is answered when all that wait have their streams
        before = {end: busy(pid) for end, pid in ends.each()}
        wrk = await asyncio.create_subprocess_exec(
            "wrk", "-t1", "-c64", f"-d{arguments.seconds}", f"http://{ends.address}/", stdout=subprocess.PIPE
        )
        out, _ = await wrk.communicate()
        count = int(out.decode().partition(" requests in")[0].split()[-1])
        spent = {end: 1e6 * (busy(pid) - before[end]) / count for end, pid in ends.each()}
        for visitor in waiting:
            visitor.transport.close()
        await asyncio.sleep(5)
        memory = {end: Memory.of(pid).resident for end, pid in ends.each()}
    for end, cost in spent.items():
        seen = json.loads(Path(directory, end).read_text())  # noqa: ASYNC240
        share = 1e6 * sum(seconds for _, seconds in seen) / (count + len(waiting))
        longest = 1000 * max((seconds for _, seconds in seen), default=0)
        young = 1000 * max((seconds for generation, seconds in seen if generation < 2), default=0)
        row(engine, end, name, count, cost, share, len(seen), longest, young, memory[end])


# The log


def log(arguments: argparse.Namespace) -> None:
    """The access log's share of a request, by itself: noting it, and writing it with its neighbours."""
    from quictunnel import log

    head("form", "us a request (CPU, median of 7)")

    async def cost(form: log.Format, enabled: bool) -> float:
        access = log.AccessLog(form, enabled=enabled)
        began = time.process_time()
        for index in range(arguments.lines):
            if access.enabled:
                access.record("8f3a0c1d", "app", b"GET", b"/a/path?with=query", 200, 0, 612, 0.0352, "127.0.0.1", "")
            if index % 200 == 199:
                access.flush()  # at 2,000 requests a second
        access.close()
        return 1e6 * (time.process_time() - began) / arguments.lines

    with tempfile.TemporaryDirectory() as directory:
        take_down = log.set_up("info", "text", Path(directory, "log"))
        for form, enabled in (("text", True), ("json", True), ("text", False)):
            costs = [asyncio.run(cost(form, enabled)) for _ in range(7)]  # type: ignore[arg-type]
            row(form if enabled else "off", f"{statistics.median(costs):.2f}")
        take_down()


def main() -> None:
    """Run one of them."""
    if sys.argv[1:2] == ["--collector"]:
        sys.exit(run_with(sys.argv[2], sys.argv[3], sys.argv[4:]))
    if sys.argv[1:] == ["--backend"]:
        asyncio.run(answer_all_but_some())
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    for run in (idle, streams, visitors, start, collector, log):
        each = commands.add_parser(run.__name__)
        each.add_argument("--engine", default="aioquic,qh3")
        if run in (streams, visitors):
            each.add_argument("--count", type=int, default=10_000 if run is streams else 1000)
        if run in (streams, visitors, collector):
            each.add_argument("--rate", type=float, default=500.0, help="of connections a second")
        if run is start:
            each.add_argument("--repeats", type=int, default=5)
        if run is collector:
            each.add_argument("--seconds", type=int, default=5)
            each.add_argument("--waiting", type=int, default=2000)
            each.add_argument("--only", default="", help="thresholds that contain this, or one of several (A;B)")
        if run is log:
            each.add_argument("--lines", type=int, default=100_000)
        each.set_defaults(run=run)
    arguments = parser.parse_args()
    arguments.run(arguments)


if __name__ == "__main__":
    main()
