"""The figures in README.md beside this file, made anew: `.venv/bin/python benchmarks/run.py seed|ratio|processes ...`.

seed   one client, a backend that takes 35 ms, stages of 20,50,100,200,500,1000 requests/s: the load that the
       tunnel's predecessor failed
ratio  requests/s of `wrk -t1 -c64` to nginx: through nginx as a reverse proxy, and through the tunnel; interleaved,
       medians. Needs wrk and nginx.
processes  the same with one and two server processes (--workers) and client processes (--processes), interleaved

All of it runs on this machine, over loopback, with the tunnel's defaults and its log at INFO into a file.
"""

import argparse
import contextlib
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).parent

NGINX = """
worker_processes 1; daemon off; pid {directory}/nginx.pid; error_log {directory}/error.log;
events {{ worker_connections 4096; }}
http {{
  access_log off; keepalive_requests 100000000;
  client_body_temp_path {directory}; proxy_temp_path {directory}; fastcgi_temp_path {directory};
  uwsgi_temp_path {directory}; scgi_temp_path {directory};
  upstream origin {{ server 127.0.0.1:{origin}; keepalive 128; keepalive_requests 100000000; }}
  server {{ listen 127.0.0.1:{origin}; location / {{ default_type text/plain; return 200 "{body}"; }} }}
  server {{ listen 127.0.0.1:{proxy};
    location / {{ proxy_pass http://origin; proxy_http_version 1.1; proxy_set_header Connection ""; }} }}
}}
"""


class Place(NamedTuple):
    """Where wrk is sent, and who works for it."""

    address: str
    pids: tuple[int, ...] = ()

    def busy(self) -> float:
        """Seconds of processor time that these processes and their children have used."""
        ticks = 0
        for pid in self.pids:
            children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
            for each in (str(pid), *children):
                fields = Path(f"/proc/{each}/stat").read_text().rpartition(")")[2].split()
                ticks += int(fields[11]) + int(fields[12])
        return ticks / os.sysconf("SC_CLK_TCK")


@contextlib.contextmanager
def process(*command: str, ready: str = "") -> Iterator[dict[str, str]]:
    """A process for the time of a with block; the facts of the line that begins with ``ready``."""
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as running:
        try:
            facts: dict[str, str] = {}
            if ready:
                assert running.stdout is not None
                line = next((line for line in running.stdout if line.startswith(ready)), "")
                if not line:
                    sys.exit(f"{command} did not start")
                facts = dict(re.findall(r"(\w+)=(\S+)", line)) or {"address": line.split()[-1]}
            yield facts | {"pid": str(running.pid)}
        finally:
            running.terminate()
            running.wait(10)


@contextlib.contextmanager
def tunnel(directory: Path, engine: str, backend: str, workers: int = 1, processes: int = 1) -> Iterator[Place]:
    """A server and one client for ``backend``, each of so many processes."""
    base = (sys.executable, "-m", "quictunnel")
    state = directory / f"{engine}-{workers}-{processes}"
    common = ("--state-dir", str(state), "--engine", engine)
    serve = (
        *base,
        "serve",
        "--http",
        "127.0.0.1:0",
        "--quic",
        "127.0.0.1:0",
        "--log-file",
        str(directory / "serve.log"),
        "--workers",
        str(workers),
    )
    with process(*serve, *common, ready="ready") as server:
        connect = (*base, "connect", backend, "--tunnel", "bench", "--log-file", str(directory / "connect.log"))
        connect += ("--processes", str(processes))
        with process(*connect, *common, ready="ready") as client:
            yield Place(server["http"], (int(server["pid"]), int(client["pid"])))


def seed(arguments: argparse.Namespace) -> int:
    """The stages of the load test through one client; its exit status."""
    with tempfile.TemporaryDirectory() as name:
        with process(sys.executable, str(HERE / "backend.py"), "0", "35", ready="ready") as backend:
            with tunnel(Path(name), arguments.engine, backend["address"]) as place:
                address = place.address
                print(f"engine {arguments.engine}", flush=True)
                return subprocess.run(
                    (sys.executable, "-m", "quictunnel", "load", f"http://{address}/", "--stages", arguments.stages,
                     "--duration", str(arguments.duration), "--max-errors", "0", "--max-p99", "60"),
                    check=False,
                ).returncode  # fmt: skip


def wrk(address: str, connections: int, seconds: int) -> tuple[float, str]:
    """Requests a second, and the 99th percentile as wrk writes it."""
    out = subprocess.run(
        ("wrk", "-t1", f"-c{connections}", f"-d{seconds}", "--latency", f"http://{address}/"),
        check=True, capture_output=True, text=True,
    ).stdout  # fmt: skip
    if "Non-2xx" in out or "Socket errors" in out:
        sys.exit(f"{address}: {out}")
    return float(re.search(r"Requests/sec:\s+([\d.]+)", out)[1]), re.search(r"99%\s+(\S+)", out)[1]  # type: ignore[index]


def ratio(arguments: argparse.Namespace) -> int:
    """nginx's reverse proxy and the tunnel on each engine, in turn, several times."""
    return compare(arguments, [(engine, 1, 1) for engine in arguments.engine.split(",")])


def processes(arguments: argparse.Namespace) -> int:
    """The tunnel with one and two processes on each side, in turn, several times."""
    numbers = [(1, 1), (2, 1), (1, 2), (2, 2)]
    return compare(arguments, [(engine, *each) for engine in arguments.engine.split(",") for each in numbers])


def compare(arguments: argparse.Namespace, tunnels: list[tuple[str, int, int]]) -> int:
    """nginx's reverse proxy and tunnels (engine, server processes, client processes), in turn, several times."""
    for program in ("wrk", "nginx"):
        if shutil.which(program) is None:
            sys.exit(f"{program} is not installed")
    with tempfile.TemporaryDirectory() as name, contextlib.ExitStack() as stack:
        directory = Path(name)
        directory.chmod(0o755)
        config = directory / "nginx.conf"
        origin, proxy = 9180, 9181
        config.write_text(NGINX.format(directory=directory, origin=origin, proxy=proxy, body="x" * 100))
        stack.enter_context(process("nginx", "-c", str(config)))
        places = {"nginx reverse proxy": Place(f"127.0.0.1:{proxy}")}
        for engine, workers, clients in tunnels:
            label = f"quictunnel {engine}" + (f", {workers} + {clients}" if len(tunnels) > 2 else "")
            places[label] = stack.enter_context(tunnel(directory, engine, str(origin), workers, clients))
        time.sleep(2)
        rates: dict[str, list[float]] = {label: [] for label in places}
        costs: dict[str, list[float]] = {label: [] for label in places}
        tails: dict[str, list[str]] = {label: [] for label in places}
        for _ in range(arguments.repeats):
            for label, place in places.items():
                before = place.busy()
                rate, tail = wrk(place.address, arguments.connections, arguments.seconds)
                rates[label].append(rate)
                tails[label].append(tail)
                costs[label].append(1e6 * (place.busy() - before) / (rate * arguments.seconds))
        whole = statistics.median(rates["nginx reverse proxy"])
        print(f"`wrk -t1 -c{arguments.connections} -d{arguments.seconds}`, {arguments.repeats} interleaved repeats\n")
        print("| | requests/s (median) | range | p99 (median) | ratio | CPU us/request |\n|---|---|---|---|---|---|")
        for label, found in rates.items():
            middle = statistics.median(found)
            tail = sorted(tails[label])[len(tails[label]) // 2]
            cost = f"{statistics.median(costs[label]):.0f}" if places[label].pids else ""
            print(
                f"| {label} | {middle:,.0f} | {min(found):,.0f}-{max(found):,.0f} | {tail} | {middle / whole:.2f} "
                f"| {cost} |"
            )
    return 0


def main() -> int:
    """Run one of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    each = commands.add_parser("seed")
    each.add_argument("--engine", default="aioquic")
    each.add_argument("--stages", default="20,50,100,200,500,1000")
    each.add_argument("--duration", type=float, default=30)
    each.set_defaults(run=seed)
    each = commands.add_parser("ratio")
    each.add_argument("--engine", default="aioquic,qh3")
    each.add_argument("--connections", type=int, default=64)
    each.add_argument("--seconds", type=int, default=5)
    each.add_argument("--repeats", type=int, default=5)
    each.set_defaults(run=ratio)
    each = commands.add_parser("processes")
    each.add_argument("--engine", default="qh3")
    each.add_argument("--connections", type=int, default=64)
    each.add_argument("--seconds", type=int, default=5)
    each.add_argument("--repeats", type=int, default=5)
    each.set_defaults(run=processes)
    arguments = parser.parse_args()
    status: int = arguments.run(arguments)
    return status


if __name__ == "__main__":
    sys.exit(main())
