"""The axes: what is asked of the peers, and how. Each stands for itself and can be run alone."""

import asyncio
import resource
import statistics
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import ClassVar

from benchmarks.sidebyside.bench import Bench, Places, Scale, costing, warm
from benchmarks.sidebyside.figures import Block, Case, View
from benchmarks.sidebyside.lines import Line
from benchmarks.sidebyside.loads import Found, h2load, lone, open_loop, wrk
from benchmarks.sidebyside.nginx import SIZES
from benchmarks.sidebyside.peers import DIRECT, Peer, Place
from benchmarks.sidebyside.processes import Memory, Process, Trouble
from benchmarks.sidebyside.visitors import Target, Visitor, answered, held, transfer

__all__ = ["AXES", "Axis"]

SMALL = ("/100B", SIZES["100B"])
SLOW = ("/after/35", 100)
"what benchmarks/backend.py answers after 35 ms"

_MANY, _COMING = 1000, 3
"connections, and seconds of a load by so many: to accept them all and to dial for each takes one"

QUIET = 0.5
"seconds in which a peer comes to rest before its memory is looked at"


class Axis(ABC):
    """One axis."""

    name: str
    title: str
    note: str
    views: ClassVar[list[View]]
    needs: tuple[str, ...] = ()
    "programs without which it cannot be"

    @abstractmethod
    def cases(self, scale: Scale) -> list[Case]:
        """What is asked."""

    @abstractmethod
    def seconds(self, scale: Scale) -> float:
        """About how long it takes for each peer, on a quiet machine."""

    @abstractmethod
    def measure(self, bench: Bench, block: Block) -> None:
        """Ask it of each peer."""

    def run(self, bench: Bench, blocks: dict[str, Block]) -> None:
        """Put the block of samples among the others; when this is interrupted, there are fewer in it."""
        block = blocks[self.name] = Block(self.name, self.title, self.note, self.views)
        bench.begin(block, self.cases(bench.scale))
        began = time.monotonic()
        try:
            self.measure(bench, block)
        except (OSError, Trouble) as error:
            # A peer's trouble is in its samples: this is the backend's.
            for peer in bench.peers:
                if not any(sample.peer == peer.name for sample in block.samples):
                    block.refuse(peer.name, f"not measured: {error}")
        finally:
            block.seconds = round(time.monotonic() - began, 1)


def size_text(name: str) -> str:
    """``100 B`` of ``100B``."""
    digits = name.rstrip("kMGB")
    return f"{digits} {name[len(digits) :]}"


class Requests(Axis):
    name, title = "requests", "Requests a second"
    note = (
        "`wrk -t1`, a closed loop: each of so many connections asks again when it has its answer, so its p99 "
        "tells nothing of requests that would have come meanwhile. A thousand connections take three seconds at "
        "least, the first of which is their coming. The backend is nginx. CPU: of server and client together."
    )
    views: ClassVar = [
        View("requests/s", ("requests_per_s",), ratio=True),
        View("p50 / p99 ms", ("p50", "p99"), 2),
        View("CPU s per 100,000 requests", ("cpu_per_100k",), 2),
    ]
    needs = ("wrk", "nginx")

    def cases(self, scale: Scale) -> list[Case]:
        return [
            Case(f"{size}-{connections}", f"answers of {size_text(size)}, by connections", f"{connections:,}")
            for size, several in scale.requests
            for connections in several
        ]

    def seconds(self, scale: Scale) -> float:
        return len(self.cases(scale)) * scale.repeats * (scale.seconds + 0.2) + 3

    def measure(self, bench: Bench, block: Block) -> None:
        sizes = [size for size, _ in bench.scale.requests]
        with bench.origin() as (port, _):
            with bench.placed(block, port, [(f"/{size}", SIZES[size]) for size in sizes]) as places:
                for peer in places:
                    warm(places[peer], lambda place: wrk(place.target, "/100B", 64, 1))

                def measure(peer: Peer, case: Case) -> Found:
                    size, _, connections = case.name.partition("-")
                    place = places[peer]
                    many = int(connections)
                    seconds = max(bench.scale.seconds, _COMING if many >= _MANY else 0)
                    found = costing(place, lambda: wrk(place.target, f"/{size}", many, seconds))
                    if "cpu" in found.values:
                        found.values["cpu_per_100k"] = 1e5 * found.values["cpu"] / found.values["requests"]
                    return found

                bench.turns(block, block.cases, list(places), measure)


class Http2(Axis):
    name, title = "http2", "HTTP/2 from the visitors"
    note = "`h2load -t1`, HTTP/2 in clear text, a closed loop: so many connections, so many streams at a time on each."
    views: ClassVar = [
        View("requests/s", ("requests_per_s",), ratio=True),
        View("p50 / p99 ms", ("p50", "p99"), 2),
    ]
    needs = ("h2load", "nginx")

    def cases(self, scale: Scale) -> list[Case]:
        return [
            Case(f"{count}x{each}", "answers of 100 B, by connections and streams on each", f"{count} with {each}")
            for count, each in scale.http2
        ]

    def seconds(self, scale: Scale) -> float:
        return len(self.cases(scale)) * scale.repeats * (scale.seconds + 0.3) + 2

    def measure(self, bench: Bench, block: Block) -> None:
        with bench.origin() as (port, http2):
            with bench.placed(block, port, [SMALL], http2=http2) as places:
                for peer in places:
                    if places[peer].http2 is None:
                        block.refuse(peer.name, "cannot: it has no HTTP/2 for visitors when the backend has HTTP/1.1")

                def measure(peer: Peer, case: Case) -> Found:
                    target = places[peer].http2
                    assert target is not None
                    connections, _, streams = case.name.partition("x")
                    return h2load(target, SMALL[0], int(connections), int(streams), bench.scale.seconds)

                bench.turns(block, block.cases, list(places), measure)


class Bulk(Axis):
    name, title = "bulk", "Bulk"
    note = (
        "Bodies from and to visitors of this program's own, which check how many bytes came; downloads from "
        "nginx, uploads to `benchmarks/backend.py`. A transfer is cut after a while: then the rate is that until "
        "then."
    )
    views: ClassVar = [
        View("MB/s", ("megabytes_per_s",), ratio=True),
        View("CPU s per GB", ("cpu_per_gb",), 2),
    ]
    needs = ("nginx",)

    def cases(self, scale: Scale) -> list[Case]:
        return [
            Case(f"{size}-{way}-{count}", f"{size_text(size)} {way}", "one" if count == 1 else f"{count} at a time")
            for way in ("down", "up")
            for size in scale.bulk
            for count in scale.at_once
        ]

    def seconds(self, scale: Scale) -> float:
        return len(self.cases(scale)) * scale.repeats * scale.limit * 0.6 + 3

    def measure(self, bench: Bench, block: Block) -> None:
        down = [case for case in block.cases if "-down-" in case.name]
        up = [case for case in block.cases if "-up-" in case.name]
        with bench.origin() as (port, _), bench.placed(block, port, [SMALL], cases=down) as places:
            bench.turns(block, down, list(places), lambda peer, case: self.once(bench, places[peer], case))
        with bench.backend() as port, bench.placed(block, port, [("/", 100)], cases=up) as places:
            sink = Target(port)
            bench.turns(block, up, list(places), lambda peer, case: self.once(bench, places[peer], case, sink))

    def once(self, bench: Bench, place: Place, case: Case, sink: Target | None = None) -> Found:
        size, _, count = case.name.split("-")
        return moving(place, size, count=int(count), limit=bench.scale.limit, sink=sink)


def moving(place: Place, size: str, *, count: int, limit: float, sink: Target | None = None) -> Found:
    """Bodies of a size, and what they cost."""

    def work() -> Found:
        moved = transfer(place.target, f"/{size}", SIZES[size], count=count, limit=limit, sink=sink)
        values = {
            "megabytes_per_s": moved.bytes / moved.seconds / 1e6,
            "bytes": moved.bytes,
            "whole": float(moved.whole),
        }
        return Found(values)

    found = costing(place, work)
    if "cpu" in found.values:
        found.values["cpu_per_gb"] = 1e9 * found.values["cpu"] / found.values["bytes"]
    return found


class Steady(Axis):
    name, title = "steady", "A fixed rate"
    note = (
        "`quictunnel load`, an open loop: requests leave at fixed times whatever became of those before, and "
        "their time counts from when they were due."
    )
    views: ClassVar = [View("p50 / p99 ms", ("p50", "p99"), 2)]
    needs = ("nginx",)
    groups: ClassVar = {"now": "the backend (nginx) answers at once", "35ms": "the backend takes 35 ms"}

    def cases(self, scale: Scale) -> list[Case]:
        return [
            Case(f"{key}-{rate}", group, f"{rate:,}/s") for key, group in self.groups.items() for rate in scale.rates
        ]

    def seconds(self, scale: Scale) -> float:
        return len(self.cases(scale)) * scale.repeats * (scale.seconds + 1.0) + 4

    def measure(self, bench: Bench, block: Block) -> None:
        for key, (path, size) in (("now", SMALL), ("35ms", SLOW)):
            cases = [case for case in block.cases if case.name.startswith(key)]
            with bench.origin() if key == "now" else bench.backend() as backend:
                port = backend[0] if isinstance(backend, tuple) else backend
                with bench.placed(block, port, [(path, size)], cases=cases) as places:
                    self.steady(bench, block, cases, places, path)

    def steady(self, bench: Bench, block: Block, cases: list[Case], places: Places, path: str) -> None:
        for peer in places:
            warm(places[peer], lambda place: open_loop(place.target, path, 200, 0.5))

        def measure(peer: Peer, case: Case) -> Found:
            rate = int(case.name.partition("-")[2])
            place = places[peer]
            found = open_loop(place.target, path, rate, bench.scale.seconds)
            place.alive()
            return found

        bench.turns(block, cases, list(places), measure)


class Lone(Axis):
    name, title = "lone", "A lone request"
    note = (
        "One request after the other on one connection, nothing else going on; added: what the median is above "
        "that of the direct way, measured right before it."
    )
    views: ClassVar = [View("p50 / p99 ms", ("p50", "p99"), 3), View("added ms", ("added",), 3)]
    needs = ("nginx",)

    def cases(self, scale: Scale) -> list[Case]:
        return [Case("lone", "answers of 100 B", f"{scale.lone} requests")]

    def seconds(self, scale: Scale) -> float:
        return scale.repeats * scale.lone * 0.0015 + 2

    def measure(self, bench: Bench, block: Block) -> None:
        with bench.origin() as (port, _), bench.placed(block, port, [SMALL]) as places:
            for peer in places:
                warm(places[peer], lambda place: lone(place.target, *SMALL, 50))

            def measure(peer: Peer, case: Case) -> Found:
                direct = lone(Target(port), *SMALL, bench.scale.lone)
                if peer.name == DIRECT:
                    return direct
                found = lone(places[peer].target, *SMALL, bench.scale.lone)
                found.values["added"] = found.values["p50"] - direct.values["p50"]
                return found

            bench.turns(block, block.cases, list(places), measure)


class Distance(Axis):
    name, title = "distance", "Time to first byte, by distance"
    note = (
        "The line between client and server (between the proxy and the backend, or the visitor and the backend, "
        "where there is no client) takes so long for a round trip; the visitor is beside the server. Cold: the "
        "first request of a client that has just come; warm: the median of ten after it, on the same connection. "
        "Datagrams go through a relay that delays them; TCP through one that ends it on both sides, and makes up "
        "for the handshake."
    )
    views: ClassVar = [View("cold ms", ("cold",), 1), View("warm ms", ("warm",), 1)]
    warm_count = 10

    def cases(self, scale: Scale) -> list[Case]:
        return [Case(str(each), "by round trip", f"{each} ms") for each in scale.round_trips]

    def seconds(self, scale: Scale) -> float:
        return scale.repeats * sum(1.5 + 0.02 * each for each in scale.round_trips)

    def measure(self, bench: Bench, block: Block) -> None:
        with bench.backend() as port:

            def measure(peer: Peer, case: Case) -> Found:
                line = Line(int(case.name) / 1000)
                with Place(bench.setup(port, line=line)) as place:
                    peer.serve(place)
                    peer.connect(place)
                    peer.ready(place)
                    with Visitor(place.target) as visitor:
                        cold = visitor.ask("/", 100)[0]
                        warm = [visitor.ask("/", 100)[0] for _ in range(self.warm_count)]
                return Found({"cold": 1000 * cold, "warm": 1000 * statistics.median(warm)})

            bench.turns(block, block.cases, bench.peers, measure)


class Beside(Axis):
    name, title = "beside", "Small requests beside a download"
    note = (
        "`quictunnel load` with requests of 100 B, alone and while somebody downloads 1 GB through the same client: "
        "200/s where the line between client and server has a round trip of 50 ms and loses so much in each "
        "direction, and 1,000/s without a distance, where nothing but the processors bounds the download. Loss can "
        "only be put on datagrams here: a peer over TCP is measured without."
    )
    views: ClassVar = [
        View("p50 / p99 ms alone", ("alone_p50", "alone"), 1),
        View("p50 / p99 ms beside it", ("beside_p50", "beside"), 1),
        View("times", ("times",), 2),
        View("MB/s of the download", ("megabytes_per_s",), 2),
    ]
    needs = ("nginx",)
    rate, round_trip = 200, 0.05
    here = 1000
    "requests a second without a distance"

    def cases(self, scale: Scale) -> list[Case]:
        near = Case("here", "by rate and line", "1,000/s, no distance")
        return [near, *(Case(str(loss), "by rate and line", f"200/s, 50 ms, {loss} %") for loss in scale.losses)]

    def seconds(self, scale: Scale) -> float:
        return len(self.cases(scale)) * scale.repeats * (2 * self.each(scale) + 3)

    def each(self, scale: Scale) -> float:
        return max(2.0, scale.seconds)

    def measure(self, bench: Bench, block: Block) -> None:
        with bench.origin() as (port, _):

            def measure(peer: Peer, case: Case) -> Found:
                here = case.name == "here"
                line = None if here else Line(self.round_trip, int(case.name) / 100)
                rate = self.here if here else self.rate
                with peer.placed(bench.setup(port, line=line), *SMALL) as place:
                    alone = open_loop(place.target, SMALL[0], rate, self.each(bench.scale))
                    with downloading(place.target) as progress:
                        time.sleep(0.5)
                        before, began = progress[0], time.monotonic()
                        beside = open_loop(place.target, SMALL[0], rate, self.each(bench.scale))
                        moved, took = progress[0] - before, time.monotonic() - began
                    place.alive()
                return Found(
                    {
                        "alone_p50": alone.values["p50"],
                        "alone": alone.values["p99"],
                        "beside_p50": beside.values["p50"],
                        "beside": beside.values["p99"],
                        "times": beside.values["p99"] / alone.values["p99"],
                        "megabytes_per_s": moved / took / 1e6,
                        "behind": max(alone.values["behind"], beside.values["behind"]),
                    },
                    added(alone.errors, beside.errors),
                )

            for case in block.cases:
                for peer in bench.peers:
                    if case.name not in ("here", "0") and not peer.datagrams:
                        block.refuse(peer.name, "cannot: TCP ends at the relay, so no loss can be put on it", case.name)
            bench.turns(block, block.cases, bench.peers, measure)


def added(*several: dict[str, int]) -> dict[str, int]:
    """The sum of errors by kind."""
    kinds = {kind for errors in several for kind in errors}
    return {kind: sum(errors.get(kind, 0) for errors in several) for kind in kinds}


@contextmanager
def downloading(target: Target, size: str = "1GB") -> Iterator[list[int]]:
    """A download beside the block; how many bytes have come. Begins again when it has come to its end."""
    progress, over = [0], threading.Event()

    def work() -> None:
        while not over.is_set():
            with suppress(OSError, Trouble), Visitor(target, limit=5.0) as visitor:
                visitor.sock.sendall(target.head(f"/{size}"))
                for step in visitor.body(visitor.begin(0.0)[1]):
                    progress[0] += step
                    if over.is_set():
                        return

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        yield progress
    finally:
        over.set()
        thread.join(10.0)


def room(count: int) -> int:
    """As many visitors as asked for, or as a process has room for: between visitors and backend each has two files."""
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    return count if files == resource.RLIM_INFINITY else max(1, min(count, (files - 200) // 2))


class Idle(Axis):
    name, title = "idle", "Many that wait"
    note = (
        "WebSockets on which nothing is said, and requests that are not answered yet, all on one client; options "
        "that limit how many there may be, and for how long, are raised. Memory: what server and client have grown "
        "by for each (resident). At the end each WebSocket sends a message and waits for its echo, and each request "
        "is answered: stayed is how many of them came through that. There are fewer where a process may not open two "
        "files for each."
    )
    views: ClassVar = [
        View("kB each, server", ("server_kb",), 1),
        View("kB each, client", ("client_kb",), 1),
        View("MB in all, server", ("server_mb",), 0),
        View("MB in all, client", ("client_mb",), 0),
        View("opened", ("opened",)),
        View("stayed", ("stayed",)),
        View("s to open all", ("seconds",), 1),
    ]

    def cases(self, scale: Scale) -> list[Case]:
        count = room(scale.idle)
        return [Case("sockets", f"{count:,} WebSockets", ""), Case("polls", f"{count:,} long polls", "")]

    def seconds(self, scale: Scale) -> float:
        return 2 * scale.idle_repeats * (scale.idle_seconds + 4 + scale.idle * 0.002)

    def measure(self, bench: Bench, block: Block) -> None:
        block.repeats = bench.scale.idle_repeats
        for peer in bench.peers:
            if peer.name == DIRECT:
                block.refuse(peer.name, "nothing between")
        bench.turns(block, block.cases, bench.peers, lambda peer, case: self.once(bench, peer, case))

    def once(self, bench: Bench, peer: Peer, case: Case) -> Found:
        scale = bench.scale
        with bench.backend() as port:
            with peer.placed(bench.setup(port, connections=room(scale.idle)), "/", 100) as place:
                return asyncio.run(self.hold(scale, place, Target(port), sockets=case.name == "sockets"))

    async def hold(self, scale: Scale, place: Place, backend: Target, *, sockets: bool) -> Found:
        await asyncio.sleep(QUIET)
        before = memories(place)
        async with held(place.target, backend, room(scale.idle), sockets=sockets, limit=scale.idle_limit) as found:
            await asyncio.sleep(scale.idle_seconds)
            after = memories(place)
        values = {"opened": float(found.opened), "stayed": float(found.survived), "seconds": found.seconds}
        for side, memory in after.items():
            values[f"{side}_mb"] = memory.resident
            if found.opened:
                values[f"{side}_kb"] = 1000 * (memory.resident - before[side].resident) / found.opened
        place.alive()
        return Found(values, dict(found.why))


def memories(place: Place) -> dict[str, Memory]:
    """The memory of each side that there is."""
    sides: dict[str, Process | None] = {"server": place.server, "client": place.client}
    return {side: process.memory() for side, process in sides.items() if process is not None}


class Cost(Axis):
    name, title = "cost", "What it costs"
    note = (
        "Seconds of processor time of server and client together, for `wrk -t1 -c64` with answers of 100 B and "
        "for a download; resident memory of both, half a second after the start and after the load (what several "
        "processes share counts in each)."
    )
    views: ClassVar = [
        View("CPU s per 100,000 requests", ("cpu_per_100k",), 2),
        View("CPU s per GB", ("cpu_per_gb",), 2),
        View("MB idle, server", ("idle_server",), 0),
        View("MB idle, client", ("idle_client",), 0),
        View("MB after, server", ("after_server",), 0),
        View("MB after, client", ("after_client",), 0),
    ]
    needs = ("wrk", "nginx")

    def cases(self, scale: Scale) -> list[Case]:
        return [Case("cost", "", "")]

    def seconds(self, scale: Scale) -> float:
        return scale.repeats * (scale.seconds + scale.limit * 0.5 + 2 * QUIET + 2)

    def measure(self, bench: Bench, block: Block) -> None:
        for peer in bench.peers:
            if peer.name == DIRECT:
                block.refuse(peer.name, "nothing between")
        size = bench.scale.bulk[-1]
        with bench.origin() as (port, _):

            def measure(peer: Peer, case: Case) -> Found:
                with peer.placed(bench.setup(port), *SMALL) as place:
                    time.sleep(QUIET)
                    values = {f"idle_{side}": memory.resident for side, memory in memories(place).items()}
                    load = costing(place, lambda: wrk(place.target, SMALL[0], 64, bench.scale.seconds))
                    values["cpu_per_100k"] = 1e5 * load.values["cpu"] / load.values["requests"]
                    bulk = moving(place, size, count=1, limit=bench.scale.limit)
                    values["cpu_per_gb"] = bulk.values["cpu_per_gb"]
                    time.sleep(QUIET)
                    values |= {f"after_{side}": memory.resident for side, memory in memories(place).items()}
                    values |= {f"own_{side}": memory.own for side, memory in memories(place).items()}
                return Found(values, load.errors)

            bench.turns(block, block.cases, bench.peers, measure)


class Start(Axis):
    name, title = "start", "From the client's start to the first answer"
    note = "The server is there; the client's process is started, and visitors ask until they are answered."
    views: ClassVar = [View("ms", ("milliseconds",), 0)]

    def cases(self, scale: Scale) -> list[Case]:
        return [Case("start", "", "")]

    def seconds(self, scale: Scale) -> float:
        return scale.repeats * 2.0

    def measure(self, bench: Bench, block: Block) -> None:
        for peer in bench.peers:
            if not peer.has_client:
                block.refuse(peer.name, "no client")
        with bench.backend() as port:

            def measure(peer: Peer, case: Case) -> Found:
                with Place(bench.setup(port)) as place:
                    peer.serve(place)
                    began = time.perf_counter()
                    peer.connect(place)
                    answered(place.target, "/", 100, *place.processes)
                    return Found({"milliseconds": 1000 * (time.perf_counter() - began)})

            bench.turns(block, block.cases, bench.peers, measure)


AXES: dict[str, Axis] = {
    axis.name: axis
    for axis in (
        Requests(), Http2(), Bulk(), Steady(), Lone(), Distance(), Beside(), Idle(), Cost(), Start()
    )
}  # fmt: skip
