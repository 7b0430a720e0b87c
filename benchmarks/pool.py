"""A pool of client processes that scales itself: `.venv/bin/python -m benchmarks.pool [--engine qh3] [--seconds 30]`.

An ASGI application that computes for some milliseconds in each request, so that a process carries a hundred requests a
second or so and no more. One visitor, then many at once, each with one request after the other, then none: the pool
grows while a further process raises what is achieved, and falls back. No request may fail meanwhile.
"""

import argparse
import asyncio
import sys
import tempfile
from pathlib import Path

from tests.support.pools import Rise, rise


def show(found: Rise) -> int:
    """Print what came of it; the exit status."""
    began = found.processes[0][0]
    print("| processes | requests/s |\n|---|---|")
    for count, rate in sorted(found.rates.items()):
        print(f"| {count} | {rate:.0f} |")
    print("\nwhat the pool said:")
    for decision in found.decisions:
        print(f"  {decision}")
    print("\nprocesses:", ", ".join(f"{count} from {at - began:.1f} s" for at, count in found.processes))
    print(f"requests: {len(found.records)}, failed: {len(found.failed)}, p99 {found.p99:.0f} ms")
    print(f"back at the lower bound {found.back_after:.1f} s after the end of the load")
    for record in found.failed[:10]:
        print(f"  {record}")
    return 1 if found.failed else 0


def main() -> int:
    """Run it once."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine", default="qh3")
    parser.add_argument("--processes", default="auto")
    parser.add_argument("--visitors", type=int, default=24)
    parser.add_argument("--milliseconds", type=int, default=10)
    parser.add_argument("--seconds", type=float, default=30)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        return show(
            asyncio.run(
                rise(
                    Path(directory), given.engine, bounds=given.processes, visitors=given.visitors,
                    milliseconds=given.milliseconds, seconds=given.seconds,
                )
            )
        )  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
