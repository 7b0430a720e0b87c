"""Fuzz for a while: ``python -m tests.fuzz [TARGET …] [--seconds N] [--seed N]``.

Coverage guides the search where atheris is installed (``pip install atheris``); without it, seeds are mutated blindly.
What is found is printed as bytes: put them into ``tests/fuzz/test_found.py`` with the mend.
"""

import argparse
import random
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

NAMES = ("stream", "control", "door", "answer", "http2", "sections", "datagram", "join")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__.split("\n", 1)[0])
    parser.add_argument("targets", nargs="*", metavar="TARGET", help=f"of {', '.join(NAMES)}; all by default")
    parser.add_argument("--seconds", type=int, default=60, help="for each target")
    parser.add_argument("--seed", type=int, default=None, help="of the random numbers")
    parser.add_argument("--blind", action="store_true", help="without atheris")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    unknown = set(args.targets) - set(NAMES)
    if unknown:
        parser.error(f"there is no target {', '.join(sorted(unknown))}: choose from {', '.join(NAMES)}")
    if args.one:
        return _guided(args.targets[0], args.seconds, args.seed)
    failed = []
    for name in args.targets or NAMES:
        status = _blind(name, args.seconds, args.seed) if args.blind or not _has_atheris() else _spawn(name, args)
        if status:
            failed.append(name)
    print(f"{'found something: ' + ', '.join(failed) if failed else 'nothing found'}", flush=True)
    return 1 if failed else 0


def _has_atheris() -> bool:
    from importlib.util import find_spec

    return find_spec("atheris") is not None


def _spawn(name: str, args: argparse.Namespace) -> int:
    """Each target in a process of its own: libFuzzer ends the process it runs in."""
    command = [sys.executable, "-m", "tests.fuzz", "--one", name, "--seconds", str(args.seconds)]
    if args.seed is not None:
        command += ["--seed", str(args.seed)]
    return subprocess.run(command, check=False).returncode


def _guided(name: str, seconds: int, seed: int | None) -> int:
    import atheris

    # Only what is imported in here is instrumented: ours, not the libraries.
    with atheris.instrument_imports(include=["quictunnel"]):
        from tests.fuzz.targets import SEEDS, TARGETS

    with TemporaryDirectory() as directory:
        for index, data in enumerate(SEEDS[name]):
            Path(directory, str(index)).write_bytes(data)
        options = [f"-max_total_time={seconds}", "-max_len=4096", "-timeout=10", "-print_final_stats=1"]
        if seed is not None:
            options.append(f"-seed={seed}")
        print(f"{name}: {seconds} s", flush=True)
        atheris.Setup([name, *options, directory], TARGETS[name])
        atheris.Fuzz()
    return 0


def _blind(name: str, seconds: int, seed: int | None) -> int:
    from tests.fuzz.targets import SEEDS, TARGETS

    rng = random.Random(seed)
    target, seeds = TARGETS[name], SEEDS[name]
    until = time.monotonic() + seconds
    count = 0
    while time.monotonic() < until:
        data = mutate(rng.choice(seeds), rng)
        count += 1
        try:
            target(data)
        except Exception:
            print(f"{name}: found after {count} cases: {data!r}", flush=True)
            raise
    print(f"{name}: {count} cases in {seconds} s", flush=True)
    return 0


def mutate(data: bytes, rng: random.Random) -> bytes:
    """A few random edits."""
    out = bytearray(data)
    for _ in range(rng.randint(1, 6)):
        at = rng.randrange(len(out) + 1)
        match rng.randrange(6):
            case 0 if out:
                out[at % len(out)] = (
                    rng.choice(b"\x00\x01\x07\x0a\x0d\x20\x2c\x3a\x7f\x80\xff0159:;,")
                    if rng.random() < 0.5
                    else rng.randrange(256)
                )
            case 1:
                out[at:at] = rng.choice(
                    (b"\r\n", b"\n", b"\r", b" ", b"\t", b"\0", b":", b",", b"0", b"chunked", b"\r\n\r\n")
                )
            case 2 if out:
                del out[at : at + rng.randint(1, 8)]
            case 3 if out:
                end = at + rng.randint(1, 40)
                out[at:at] = out[at:end]
            case 4:
                out[at:at] = rng.randbytes(rng.randint(1, 9))
            case _:
                other = rng.randrange(len(out) + 1)
                out = out[:at] + out[other:]
    return bytes(out[:8192])


if __name__ == "__main__":
    sys.exit(main())
