"""What visitors notice when clients, servers and networks come and go: `.venv/bin/python -m benchmarks.fleet FIGURE`.

stop        2 clients, 500 requests/s, one client ended by SIGTERM and started again ten times
kill        the same by kill -9
takeover    the server replaced ten times at 300 requests/s
nonces      20,000 requests of all sizes while clients are killed and come back at random moments
rebinding   the server sees the client's datagrams come from another port every second for a minute
loss        1,000 requests of 20 kB at losses of 0.1, 1, 2 and 5 % and round trips of 10, 50 and 200 ms
mess        1,000 requests of 20 kB with 30 % duplicates, 20 % reordering, 5 % corruption, and all of these
blackhole   every datagram is dropped for 3, 10 and 40 s
bulk        50 visitors with small GETs beside a download, at 2 % loss and a round trip of 50 ms
many        1,000 clients with 1,000 tunnels on one server, and a lone client on another
restart     the server killed (-9) and started again 20 times
moving      the client's machine gets another address, and loses its network for 3 s (needs root)

Losses and the other chances are of each direction. A visitor sends a GET again when the kept connection on which it was
sent is closed before any byte of an answer; that is counted as `repeated`. A POST is not sent again by the visitor.
With --post 0 the requests of `loss` and `mess` are GETs only; else half of them are POSTs that bring as much as they
fetch. --quick makes each figure smaller and says less. --json prints a line of JSON for each row.
"""

import argparse
import asyncio
import json
import sys
import tempfile
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

from tests.support import fleet
from tests.support.namespaces import can_make_namespaces

Row = dict[str, Any]
Rows = AsyncIterator[Row]
Engines = tuple[str, str]
Wanted = argparse.Namespace

COUNTS = ("engines", "sent", "failed", "failed_get", "failed_post_delivered", "failed_post_undelivered", "wrong",
          "post_twice", "get_twice", "repeated_get", "closed_kept_post", "p50", "p99", "longest")  # fmt: skip


def rate_of(wanted: Wanted) -> dict[str, float]:
    return {} if wanted.rate is None else {"rate": wanted.rate}


async def stop(directory: Path, engines: Engines, wanted: Wanted) -> Rows:
    yield await fleet.clients_leave(directory, engines, kill=False, **rate_of(wanted), times=2 if wanted.quick else 10)


async def kill(directory: Path, engines: Engines, wanted: Wanted) -> Rows:
    yield await fleet.clients_leave(directory, engines, kill=True, **rate_of(wanted), times=2 if wanted.quick else 10)


async def takeover(directory: Path, engines: Engines, wanted: Wanted) -> Rows:
    yield await fleet.takeover(directory, engines, **rate_of(wanted), times=2 if wanted.quick else 10)


async def nonces(directory: Path, engines: Engines, wanted: Wanted) -> Rows:
    yield await fleet.nonces(directory, engines, **rate_of(wanted), count=3000 if wanted.quick else 20_000)


async def rebinding(directory: Path, engines: Engines, wanted: Wanted) -> Rows:
    yield await fleet.rebinding(directory, engines, **rate_of(wanted), seconds=10 if wanted.quick else 60)


async def loss(directory: Path, engines: Engines, wanted: Wanted) -> Rows:
    for milliseconds in (50,) if wanted.quick else (10, 50, 200):
        for percent in (1,) if wanted.quick else (0.1, 1, 2, 5):
            faults = {"loss": percent / 100, "delay": milliseconds / 2000}
            row = await fleet.lossy(directory, engines, faults, count=200 if wanted.quick else 1000, post=wanted.post)
            yield {"loss %": percent, "round trip ms": milliseconds} | row


async def mess(directory: Path, engines: Engines, wanted: Wanted) -> Rows:
    each = {"duplicates": 0.3, "reorder": 0.2, "corrupt": 0.05}
    for name, faults in ([] if wanted.quick else [(name, {name: chance}) for name, chance in each.items()]) + [
        ("all", each)
    ]:
        faults = {"delay": 0.005, **faults}
        row = await fleet.lossy(directory, engines, faults, count=200 if wanted.quick else 1000, post=wanted.post)
        yield {"fault": name} | row


async def blackhole(directory: Path, engines: Engines, wanted: Wanted) -> Rows:
    for seconds in (3,) if wanted.quick else (3, 10, 40):
        yield await fleet.blackhole(directory, engines, seconds=seconds)


async def bulk(directory: Path, engines: Engines, wanted: Wanted) -> Rows:
    yield await fleet.bulk_beside(directory, engines, rounds=1 if wanted.quick else 4)


async def many(directory: Path, engines: Engines, wanted: Wanted) -> Rows:
    yield await fleet.many_clients(
        directory, engines, count=100 if wanted.quick else 1000, requests=200 if wanted.quick else 2000
    )


async def restart(directory: Path, engines: Engines, wanted: Wanted) -> Rows:
    yield await fleet.server_killed(directory, engines, times=3 if wanted.quick else 20)
    if not wanted.quick:
        yield await fleet.server_killed(directory, engines, times=3, down=10.0)


async def moving(directory: Path, engines: Engines, wanted: Wanted) -> Rows:
    if not can_make_namespaces():
        sys.exit("moving needs root and network namespaces")
    for row in await fleet.moving_client(directory, engines):
        yield row


FIGURES: dict[str, tuple[Callable[[Path, Engines, Wanted], Rows], tuple[str, ...]]] = {
    "stop": (stop, COUNTS),
    "kill": (kill, COUNTS),
    "takeover": (takeover, ("how", *COUNTS)),
    "nonces": (nonces, (*COUNTS, "damaged", "killed")),
    "rebinding": (rebinding, ("engines", "sent", "failed", "wrong", "post_twice", "p50", "p99", "longest", "rebound",
                              "dialled")),
    "loss": (loss, ("engines", "loss %", "round trip ms", "sent", "failed", "wrong", "post_twice", "p50", "p99",
                    "longest", "seconds")),
    "mess": (mess, ("engines", "fault", "sent", "failed", "wrong", "damaged", "post_twice", "p50", "p99", "longest",
                    "seconds")),
    "blackhole": (blackhole, ("engines", "seconds", "hold", "sent", "failed", "failed_before", "failed_during",
                              "failed_after", "post_twice", "first_success", "first_fresh_success", "longest")),
    "bulk": (bulk, ("engines", "sent", "failed", "p50_alone", "p50_beside", "p99_alone", "p99_beside", "ratio",
                    "download_mb_per_s")),
    "many": (many, ("engines", "sessions", "sent", "failed", "kb_per_session", "kb_per_session_used",
                    "registered_per_s", "p50_among", "p50_alone", "ratio", "idle_cpu")),
    "restart": (restart, ("engines", "times", "clients", "down", "p50", "p95", "longest", "p50_since_kill",
                          "p95_since_kill")),
    "moving": (moving, ("engines", "fault", "sent", "failed", "post_twice", "first_success", "longest")),
}  # fmt: skip

MILLISECONDS = ("p50", "p99", "p95", "longest", "first_success", "first_fresh_success")
"columns whose seconds are shown as milliseconds"


def cell(name: str, value: Any) -> str:
    if not isinstance(value, float):
        return str(value)
    if name.startswith(MILLISECONDS):
        return f"{value * 1000:.1f}" if value < 100 else f"{value:.1f} s"
    return f"{value:.3g}" if value < 1000 else f"{value:.0f}"


def heading(name: str) -> str:
    return name.replace("_", " ") + (" ms" if name.startswith(MILLISECONDS) else "")


async def run(figure: str, pairs: list[Engines], wanted: Wanted) -> None:
    """Print the rows of one figure as they come."""
    make, columns = FIGURES[figure]
    if not wanted.json:
        print(f"| {' | '.join(heading(name) for name in columns)} |\n|{'---|' * len(columns)}", flush=True)
    for engines in pairs:
        with tempfile.TemporaryDirectory() as name:
            directory = (wanted.keep or Path(name)) / f"{figure}-{'-'.join(engines)}"
            directory.mkdir(parents=True)
            async for row in make(directory, engines, wanted):
                if wanted.json:
                    print(json.dumps({"figure": figure} | row), flush=True)
                    continue
                print(f"| {' | '.join(cell(name, row[name]) for name in columns)} |", flush=True)
                if row.get("kinds"):
                    print(f"  failures: {row['kinds']}", file=sys.stderr, flush=True)


def main() -> None:
    """Run one figure, or several."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("figures", nargs="+", choices=[*FIGURES, "all"], metavar="FIGURE")
    parser.add_argument("--engine", default="qh3,aioquic", help="of both sides, or SERVER/CLIENT; several with commas")
    parser.add_argument("--post", type=float, default=0.5, help="the share of POSTs of loss and mess")
    parser.add_argument("--rate", type=float, help="requests a second, where a figure has a rate (default: see above)")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--keep", type=Path, help="leave the processes' output and logs here")
    wanted = parser.parse_args()
    sides = [pair.split("/") for pair in wanted.engine.split(",")]
    pairs = [(pair[0], pair[-1]) for pair in sides]
    for figure in FIGURES if "all" in wanted.figures else wanted.figures:
        if not wanted.json and (len(wanted.figures) > 1 or "all" in wanted.figures):
            print(f"\n{figure}\n")
        asyncio.run(run(figure, pairs, wanted))


if __name__ == "__main__":
    main()
