"""Memory, start and collector: `.venv/bin/python benchmarks/memory.py idle|streams|visitors|start|collector|log`.

idle       resident memory of serve and connect, 5 s after the first request and after 1,000; of several processes too
streams    resident memory with 10,000 requests that wait at a backend, through one client, and after they have ended
visitors   the same with kept connections that ask for nothing
start      from `serve` to ready, and from `connect` to the first answer through the tunnel; processor time of each
collector  the garbage collector's share and pauses under load, by thresholds
log        what a line of the access log costs a request

Both engines unless --engine names one. All runs on this machine, over loopback, with defaults and the log at INFO into
a file; what else a figure needed is said beside it.
"""

import argparse
import asyncio
import contextlib
import http.client
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from run import HERE, process

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
    engine: str, backend: str, serve: tuple[str, ...] = (), connect: tuple[str, ...] = (), wrapper: tuple[str, ...] = ()
) -> Iterator[Ends]:
    """A server and a client with defaults, a state directory of their own, and logs at INFO in files."""
    with tempfile.TemporaryDirectory() as name:
        common = ("--state-dir", f"{name}/state", "--engine", engine)
        start = wrapper or PYTHON
        ports = ("--http", "127.0.0.1:0", "--quic", "127.0.0.1:0", "--grace", "1s")
        server = (*start, "serve", *ports, "--log-file", f"{name}/serve.log", *common, *serve)
        client = (*start, "connect", backend, "--tunnel", "app", "--log-file", f"{name}/connect.log", "--grace", "1s")
        with process(*server, ready="ready") as one, process(*client, *common, *connect, ready="ready") as other:
            yield Ends(one["http"], int(one["pid"]), int(other["pid"]))


@contextlib.contextmanager
def backend(milliseconds: float) -> Iterator[str]:
    """The address of a backend that answers after so long."""
    with process(sys.executable, str(HERE / "backend.py"), "0", str(milliseconds), ready="ready") as found:
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
            with backend(0) as origin, tunnel(engine, origin, serve, connect) as ends:
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


def measured(
    label: str, ends: Ends, count: int, rate: float, request: bytes, until: Callable[[list[Visitor]], bool] | None
) -> None:
    """Memory before, with and after a crowd."""

    async def run() -> None:
        ask(ends.address, 100)
        await asyncio.sleep(SETTLE)
        before = {name: Memory.of(pid) for name, pid in ends.each()}
        visitors = await crowd(ends.address, count, rate, request)
        await asyncio.sleep(SETTLE)
        refused = [visitor.answer or b"closed" for visitor in visitors if visitor.answer or visitor.lost]
        during = {name: Memory.of(pid) for name, pid in ends.each()}
        for visitor in visitors:
            visitor.transport.close()
        await asyncio.sleep(2 * SETTLE)
        for name, pid in ends.each():
            each = 1024 * (during[name].resident - before[name].resident) / count
            row(label, name, count, before[name].resident, during[name].resident, each, Memory.of(pid).resident)
        if refused:
            print(f"{len(refused)} of them did not wait, the first with {refused[0][:200]!r}")

    asyncio.run(run())


WAITING = (
    b"GET /waits HTTP/1.1\r\nHost: app.localhost\r\nUser-Agent: benchmark/1\r\nAccept: */*\r\nX-A: 1234567890\r\n\r\n"
)


def streams(arguments: argparse.Namespace) -> None:
    """Requests that wait at a backend, through one client."""
    serve = ("--max-in-flight", "100000", "--max-visitors", "100000", "--slot-wait", "60s")
    connect = ("--max-links", "512", "--backend-head-time", "1h")
    print(f"serve {' '.join(serve)}; connect {' '.join(connect)}\n")
    head("engine", "process", "streams", "before MB", "with them MB", "each kB", "10 s after they left MB")
    for engine in arguments.engine.split(","):
        with backend(3_600_000) as origin, backend(0) as quick:
            del quick
            with tunnel(engine, origin, serve, connect) as ends:
                measured_streams(engine, ends, arguments)


def measured_streams(engine: str, ends: Ends, arguments: argparse.Namespace) -> None:
    """As ``measured``, without requests before: the backend answers none."""

    async def run() -> None:
        await asyncio.sleep(SETTLE)
        before = {name: Memory.of(pid) for name, pid in ends.each()}
        visitors = await crowd(ends.address, arguments.count, arguments.rate, WAITING)
        await asyncio.sleep(2 * SETTLE)
        during = {name: Memory.of(pid) for name, pid in ends.each()}
        refused = [visitor.answer or b"closed" for visitor in visitors if visitor.answer or visitor.lost]
        if arguments.hold:
            print("held", dict(ends.each()))
            await asyncio.sleep(arguments.hold)
        for visitor in visitors:
            visitor.transport.close()
        await asyncio.sleep(2 * SETTLE)
        for name, pid in ends.each():
            each = 1024 * (during[name].resident - before[name].resident) / arguments.count
            after = Memory.of(pid).resident
            row(engine, name, arguments.count, before[name].resident, during[name].resident, each, after)
        if refused:
            print(f"{len(refused)} of them did not wait, the first with {refused[0][:200]!r}")

    asyncio.run(run())


def main() -> None:
    """Run one of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    for name, run in (("idle", idle), ("streams", streams)):
        each = commands.add_parser(name)
        each.add_argument("--engine", default="aioquic,qh3")
        each.add_argument("--count", type=int, default=10_000)
        each.add_argument("--rate", type=float, default=500.0)
        each.add_argument("--hold", type=float, default=0.0)
        each.set_defaults(run=run)
    arguments = parser.parse_args()
    arguments.run(arguments)


if __name__ == "__main__":
    main()
