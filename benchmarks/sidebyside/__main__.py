"""Tunnels and proxies side by side in one run, on this machine, over loopback.

Writes latest.md, latest.json and plots (PNG) to benchmarks/results/. Peers whose programs are not on PATH are named in
the table and left out. Needs nginx, wrk and h2load (Debian: apt install nginx-light wrk nghttp2-client) for most axes.
"""

import argparse
import os
import platform
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import timeit
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import FrameType

from benchmarks.sidebyside import nginx
from benchmarks.sidebyside.axes import AXES, Axis
from benchmarks.sidebyside.bench import Bench, Scale, quick
from benchmarks.sidebyside.peers import BASELINE, Peer, all_peers, chosen
from benchmarks.sidebyside.plots import plot
from benchmarks.sidebyside.processes import ROOT, none_left
from benchmarks.sidebyside.report import Results, machine, read, write

RESULTS = ROOT / "benchmarks" / "results"
PACKAGES = {"wrk": "wrk", "h2load": "nghttp2-client", "nginx": "nginx-light"}
"Debian's, by program"

FILES = 65536
"open files that a peer may have, if root is allowed to say so"


def parser() -> argparse.ArgumentParser:
    axes = "\n".join(f"  {name:<10}{axis.title}" for name, axis in AXES.items())
    peers = ", ".join(peer.name for peer in all_peers())
    hours = sum(axis.seconds(Scale()) for axis in AXES.values()) / 60
    made = argparse.ArgumentParser(
        prog="make bench ARGS='...'",
        description=__doc__,
        epilog=f"axes:\n{axes}\n\npeers:\n  {peers}\n\nA whole run takes about {hours:.0f} minutes for each peer, "
        "a quick one less than one; keep the machine quiet meanwhile.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument("--only", metavar="AXIS,...", help="these axes alone")
    made.add_argument("--peers", metavar="PEER,...", help="these peers alone; quictunnel or frp for all of that name, "
                      "quictunnel-qh3-2+2 for 2 server and 2 client processes")  # fmt: skip
    made.add_argument("--quick", action="store_true", help="less of everything, once: for trying")
    made.add_argument("--repeats", type=int, metavar="N", help="of each measurement (default: 5; quick: 1)")
    made.add_argument("--seconds", type=int, metavar="S", help="of each load (default: 2; quick: 1)")
    made.add_argument("--limit", type=float, metavar="S", help="after which a transfer is cut (default: 8; quick: 2)")
    made.add_argument("--idle", type=int, metavar="N", help="visitors that wait (default: 10000; quick: 200)")
    made.add_argument("--out", type=Path, default=RESULTS, metavar="DIR", help="(default: benchmarks/results)")
    made.add_argument("--merge", action="store_true", help="keep the axes in DIR that are not measured now")
    made.add_argument("--plot", action="store_true", help="measure nothing: write latest.md and the plots anew from "
                      "latest.json")  # fmt: skip
    return made


def scale_of(given: argparse.Namespace) -> Scale:
    scale = quick(Scale()) if given.quick else Scale()
    changes = {name: getattr(given, name) for name in ("repeats", "seconds", "limit", "idle")}
    changes = {name: value for name, value in changes.items() if value is not None}
    if given.repeats is not None:
        changes["idle_repeats"] = min(given.repeats, scale.idle_repeats)
    return replace(scale, **changes)


def allow_files() -> None:
    """Let this process and those it starts open as many files as they may."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    for limit in (max(hard, FILES), hard):
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))
            return
        except (ValueError, OSError):
            continue


def turn() -> float:
    """Nanoseconds that Python takes to count by one: the least of several tries."""
    return min(timeit.repeat("for i in range(100_000): x += i", "x = 0", number=1, repeat=20)) * 1e4


def versions() -> dict[str, str]:
    """Of what measures."""
    # The same version is built to be twice as fast here as there.
    found = {"Python": f"{platform.python_version()} ({turn():.0f} ns for a turn of a loop)"}
    for name in ("uvloop",):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    if shutil.which("nginx"):
        found["nginx"] = nginx.version()
    for program, flag in (("wrk", "-v"), ("h2load", "--version")):
        if shutil.which(program):
            said = subprocess.run((program, flag), capture_output=True, text=True, timeout=10, check=False).stdout
            words = said.replace("nghttp2/", "").split()
            found[program] = words[1] if len(words) > 1 else "?"
    return found


def plots(results: Results, directory: Path) -> None:
    """Make them, or say what is missing."""
    try:
        plot(results, directory)
    except ImportError:
        print("no plots: matplotlib is not installed (pip install 'quictunnel[bench]')", file=sys.stderr)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run it; 1 if nothing could be measured at all, 2 for options that are none."""
    options = list(sys.argv[1:] if arguments is None else arguments)
    made = parser()
    given = made.parse_args(options)
    if given.plot:
        results = read(given.out / "latest.json")
        write(results, given.out)
        plots(results, given.out)
        return 0
    unknown = [name for name in (given.only or "").split(",") if name and name not in AXES]
    if unknown:
        made.error(f"no axis {unknown[0]!r}: there are {', '.join(AXES)}")
    try:
        peers = chosen(given.peers) if given.peers else all_peers()
    except ValueError as error:
        made.error(str(error))
    scale = scale_of(given)
    if min(scale.repeats, scale.seconds, scale.limit, scale.idle) < 1:
        made.error("nothing can be less than 1")
    return measure(peers, axes_of(given.only), scale, given, options)


def axes_of(only: str | None) -> list[Axis]:
    names = [name for name in (only or "").split(",") if name] or list(AXES)
    return [AXES[name] for name in AXES if name in names]


def interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def measure(peers: list[Peer], axes: list[Axis], scale: Scale, given: argparse.Namespace, options: list[str]) -> int:
    """Measure all axes, and write what there is after each."""
    missing = {peer.name: why for peer in peers if (why := peer.lacks())}
    there = [peer for peer in peers if peer.name not in missing]
    results = Results(
        date=datetime.now(UTC).strftime("%Y-%m-%d"),
        machine=machine(),
        versions=versions(),
        options=shown(options),
        peers={
            peer.name: {
                "label": peer.label,
                "about": peer.about,
                "version": "" if peer.name in missing else peer.version(),
                "missing": missing.get(peer.name, ""),
            }
            for peer in peers
        },
    )
    if given.merge:
        merge(results, given.out)
    for name, why in missing.items():
        print(f"{name}: {why}", file=sys.stderr)
    if not any(peer.name == BASELINE for peer in there):
        print("without nginx as a peer there are no ratios", file=sys.stderr)
    possible = []
    for axis in axes:
        lacking = [program for program in axis.needs if shutil.which(program) is None]
        if lacking:
            packages = " ".join(PACKAGES[program] for program in lacking)
            why = f"{' and '.join(lacking)} not on PATH (Debian: apt install {packages})"
            results.unmeasured[axis.name] = why
            print(f"{axis.name}: {why}", file=sys.stderr)
        else:
            possible.append(axis)
    minutes = sum(axis.seconds(scale) for axis in possible) * len(there) / 60
    print(f"{len(possible)} axes, {len(there)} peers: about {minutes:.0f} minutes", file=sys.stderr, flush=True)
    with tempfile.TemporaryDirectory(prefix="sidebyside-") as name, none_left():
        directory = Path(name)
        directory.chmod(0o755)  # nginx's worker is somebody else
        bench = Bench(there, scale, directory, missing)
        try:
            for axis in possible:
                bench.say(f"{axis.name}: about {axis.seconds(scale) * len(there):.0f} s")
                axis.run(bench, results.blocks)
                write(results, given.out)
        except KeyboardInterrupt:
            bench.say("interrupted: what was measured so far is written")
    order = [*AXES, *results.blocks]
    results.blocks = dict(sorted(results.blocks.items(), key=lambda item: order.index(item[0])))
    write(results, given.out)
    plots(results, given.out)
    print(f"{os.path.relpath(given.out)}/latest.md", flush=True)
    measured = [results.blocks[axis.name] for axis in possible if axis.name in results.blocks]
    return 0 if any(sample.values for block in measured for sample in block.samples) else 1


def shown(options: Sequence[str]) -> str:
    """The options as they may be published: without the place that the results go to."""
    found: list[str] = []
    for before, option in zip(["", *options], options, strict=False):
        if before != "--out" and not option.startswith("--out"):
            found.append(option)
    return " ".join(found)


def merge(results: Results, directory: Path) -> None:
    """Keep what is there of other axes; where there is nothing to keep, that is said."""
    try:
        before = read(directory / "latest.json")
    except (OSError, ValueError) as error:
        print(f"nothing to merge with: {error}", file=sys.stderr)
        return
    results.blocks = before.blocks
    results.peers = before.peers | results.peers


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, interrupt)
    allow_files()
    sys.exit(main())
