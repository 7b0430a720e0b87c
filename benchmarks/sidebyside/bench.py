"""One run: which peers, how much of everything, and the turns in which they are measured."""

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Self

from benchmarks.sidebyside import nginx
from benchmarks.sidebyside.figures import EVERY, Block, Case, Sample
from benchmarks.sidebyside.lines import Line
from benchmarks.sidebyside.loads import Found
from benchmarks.sidebyside.peers import Peer, Place, Setup
from benchmarks.sidebyside.processes import ROOT, Process, Trouble, tidy
from benchmarks.sidebyside.visitors import answered

__all__ = ["Bench", "Places", "Scale", "costing", "quick", "warm"]

TWICE = 2
"failures of a peer in a case after which it is left alone"


@dataclass(frozen=True)
class Scale:
    """How much of everything."""

    repeats: int = 5
    seconds: int = 2
    "of each closed or open loop"

    limit: float = 8.0
    "seconds after which a transfer is cut"

    requests: tuple[tuple[str, tuple[int, ...]], ...] = (
        ("100B", (1, 16, 64, 256, 1000)),
        ("10kB", (1, 64, 1000)),
        ("1MB", (1, 16, 64)),
    )
    "connections for each size of answer"

    http2: tuple[tuple[int, int], ...] = ((1, 16), (16, 16))
    "connections, and streams at a time on each"

    bulk: tuple[str, ...] = ("100MB", "1GB")
    at_once: tuple[int, ...] = (1, 8)
    rates: tuple[int, ...] = (1000, 4000)
    lone: int = 500
    round_trips: tuple[int, ...] = (0, 20, 50, 100)
    "milliseconds"

    losses: tuple[int, ...] = (0, 1, 2)
    "per cent"

    idle: int = 10_000
    idle_repeats: int = 2
    idle_seconds: float = 10.0
    idle_limit: float = 90.0
    "seconds to open them, and to end"


def quick(scale: Scale) -> Scale:
    """The same in a few minutes: for trying, not for publishing."""
    return replace(
        scale, repeats=1, seconds=1, limit=2.0, requests=(("100B", (1, 64, 1000)),), http2=((16, 16),),
        bulk=("100MB",), at_once=(1,), rates=(1000,), lone=200, round_trips=(0, 50), losses=(2,), idle=200,
        idle_repeats=1, idle_seconds=0.5, idle_limit=20.0,
    )  # fmt: skip


class Places:
    """Peers that run for the time of a ``with`` block; one that has ended is started again when it is wanted."""

    def __init__(self, bench: "Bench", backend: int, checks: Sequence[tuple[str, int]], http2: int) -> None:
        self._bench, self._backend, self._checks, self._http2 = bench, backend, checks, http2
        self._stacks: dict[Peer, ExitStack] = {}
        self._places: dict[Peer, Place] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        with ExitStack() as all_of_them:
            for stack in self._stacks.values():
                all_of_them.push(stack)

    def __iter__(self) -> Iterator[Peer]:
        return iter(self._places)

    def __getitem__(self, peer: Peer) -> Place:
        """Raises Trouble or OSError when it has to be started again and is not ready."""
        place = self._places[peer]
        return place if all(process.running for process in place.processes) else self.start(peer)

    def start(self, peer: Peer) -> Place:
        """Start it; ready when all the checks are answered. Raises Trouble or OSError."""
        stack = self._stacks.setdefault(peer, ExitStack())
        stack.close()
        path, size = self._checks[0]
        setup = self._bench.setup(self._backend, http2=self._http2)
        place = stack.enter_context(peer.placed(setup, path, size))
        for path, size in self._checks[1:]:
            answered(place.target, path, size, *place.processes)
        self._places[peer] = place
        return place


@dataclass
class Bench:
    """The run."""

    peers: list[Peer]
    scale: Scale
    directory: Path
    missing: dict[str, str] = field(default_factory=dict)
    "peers that cannot take part, with the reason"

    count: int = 0

    def say(self, text: str) -> None:
        """What is going on, for who watches."""
        print(text, file=sys.stderr, flush=True)

    def fresh(self) -> Path:
        """A directory that nobody has used."""
        self.count += 1
        directory = self.directory / str(self.count)
        directory.mkdir(parents=True)
        return directory

    def begin(self, block: Block, cases: Sequence[Case], repeats: int | None = None) -> None:
        """Set a block up; peers that cannot take part are refused with their reason."""
        block.cases = list(cases)
        block.repeats = self.scale.repeats if repeats is None else repeats
        block.peers = [*self.missing, *(peer.name for peer in self.peers)]
        block.began = datetime.now(UTC).isoformat(timespec="seconds")
        for name, why in self.missing.items():
            block.refuse(name, why)

    # Backends

    @contextmanager
    def origin(self) -> Iterator[tuple[int, int]]:
        """nginx as the backend: its port, and the one for HTTP/2."""
        with nginx.origin(self.fresh()) as ports:
            yield ports

    @contextmanager
    def backend(self, milliseconds: float = 0.0) -> Iterator[int]:
        """benchmarks/backend.py as the backend: its port."""
        command = (sys.executable, str(ROOT / "benchmarks" / "backend.py"), "0", str(milliseconds))
        with Process(command, self.fresh() / "backend.out") as process:
            port = int(process.said(r"^ready \S+:(\d+)$")[1])
            yield port

    # Peers

    def setup(self, backend: int, *, line: Line | None = None, connections: int = 0, http2: int = 0) -> Setup:
        return Setup(self.fresh(), backend, line, connections, http2)

    @contextmanager
    def placed(
        self,
        block: Block,
        backend: int,
        checks: Sequence[tuple[str, int]],
        *,
        http2: int = 0,
        cases: Sequence[Case] = (),
    ) -> Iterator[Places]:
        """All peers before one backend, each having answered all of ``checks`` (path and size).

        Those that do not come so far are refused, for these cases or for all.
        """
        with Places(self, backend, checks, http2) as places:
            for peer in self.peers:
                try:
                    places.start(peer)
                except (OSError, Trouble) as error:
                    for case in [case.name for case in cases] or [EVERY]:
                        block.refuse(peer.name, f"did not start: {tidy(str(error))}", case)
                    self.say(f"  {peer.name} did not start: {error}")
            yield places

    # Turns

    def attempt(self, block: Block, peer: Peer, case: Case, repeat: int, measure: Callable[[], Found]) -> Sample:
        """Measure once; what goes wrong is in the sample."""
        sample = Sample(peer.name, case.name, repeat)
        try:
            found = measure()
            sample.values, sample.errors = found.values, found.errors
        except (OSError, Trouble) as error:
            sample.failed = tidy(str(error) or type(error).__name__)
            self.say(f"  {peer.name}, {case.name}: {sample.failed}")
        sample.load = round(os.getloadavg()[0], 2)
        block.samples.append(sample)
        return sample

    def turns(
        self,
        block: Block,
        cases: Sequence[Case],
        peers: Sequence[Peer],
        measure: Callable[[Peer, Case], Found],
        repeats: int | None = None,
    ) -> None:
        """Each case on each peer in turn, and that several times, each time beginning with the next peer."""
        for case in cases:
            taking_part = [peer for peer in peers if not block.reason(peer.name, case.name)]
            if not taking_part:
                continue
            self.say("  " + ", ".join(word for word in (case.group, case.label) if word))
            for repeat in range(block.repeats if repeats is None else repeats):
                first = repeat % len(taking_part)
                for peer in taking_part[first:] + taking_part[:first]:
                    failures = sum(bool(sample.failed) for sample in block.of(peer.name, case.name))
                    if failures < TWICE:
                        self.attempt(block, peer, case, repeat, lambda peer=peer, case=case: measure(peer, case))  # type: ignore[misc]


def costing(place: Place, work: Callable[[], Found]) -> Found:
    """The same, with the seconds of processor time that server and client used for it as ``cpu``."""
    before = place.cpu()
    found = work()
    place.alive()
    if place.processes:
        found.values["cpu"] = place.cpu() - before
    return found


def warm(place: Place, work: Callable[[Place], object]) -> None:
    """Do something once before it is measured; what goes wrong will show again."""
    with suppress(OSError, Trouble):
        work(place)
