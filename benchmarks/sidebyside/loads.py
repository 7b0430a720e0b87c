"""The load generators: how each is called, and what its output says. All figures of time are milliseconds."""

import json
import re
import statistics
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.sidebyside.processes import Trouble, run
from benchmarks.sidebyside.visitors import Target, Visitor

__all__ = ["Found", "h2load", "lone", "open_loop", "parse_h2load", "parse_open_loop", "parse_wrk", "wrk"]

SPARE = 20.0
"seconds that a generator may take beyond the time it was given"

MILLISECONDS = {"us": 0.001, "ms": 1.0, "s": 1000.0, "m": 60_000.0, "h": 3_600_000.0}


@dataclass
class Found:
    """What a load came to."""

    values: dict[str, float] = field(default_factory=dict)
    errors: dict[str, int] = field(default_factory=dict)
    "requests that failed, by kind"


def in_milliseconds(text: str) -> float:
    """A time as wrk writes it: ``740.00us``, ``2.22ms``, ``1.06s``, ``1.50m``."""
    found = re.fullmatch(r"([\d.]+)(us|ms|s|m|h)", text)
    if found is None:
        raise Trouble(f"wrk says a time that is not understood: {text}")
    return float(found[1]) * MILLISECONDS[found[2]]


def parse_wrk(out: str) -> Found:
    """wrk's output with --latency: requests_per_s, p50, p99, requests; and its errors.

    Only answers with 2xx and 3xx are requests; wrk's times are those of the others too.
    """
    rate = re.search(r"^Requests/sec:\s+([\d.]+)", out, re.M)
    count = re.search(r"^\s+(\d+) requests in ", out, re.M)
    times = dict(re.findall(r"^\s+(50|99)%\s+(\S+)", out, re.M))
    if rate is None or count is None or len(times) < 2:
        raise Trouble("wrk says nothing of what it did")
    errors: Counter[str] = Counter()
    status = re.search(r"Non-2xx or 3xx responses: (\d+)", out)
    errors["status"] += int(status[1]) if status else 0
    sockets = re.search(r"Socket errors: (.*)", out)
    for kind, number in re.findall(r"(\w+) (\d+)", sockets[1] if sockets else ""):
        errors[kind] += int(number)
    requests = int(count[1])
    good = requests - errors["status"]
    if good < 1:
        raise Trouble("not one answer" + (f" ({dict(+errors)})" if +errors else ""))
    values = {
        "requests_per_s": float(rate[1]) * good / requests,
        "requests": float(good),
        "p50": in_milliseconds(times["50"]),
        "p99": in_milliseconds(times["99"]),
    }
    return Found(values, dict(+errors))


def wrk(target: Target, path: str, connections: int, seconds: int) -> Found:
    """A closed loop: each connection asks again when it has its answer."""
    command = ["wrk", "-t1", f"-c{connections}", f"-d{seconds}s", "--latency", "--timeout", "10s"]
    for name, value in target.fields:
        command += ["-H", f"{name}: {value}"]
    return parse_wrk(run((*command, f"http://{target.address}{path}"), seconds + SPARE))


def parse_h2load(out: str, log: str) -> Found:
    """h2load's output and its --log-file: requests_per_s, p50, p99, requests; and its errors.

    Only answers with 2xx are requests.
    """
    rate = re.search(r"^finished in [^,]+, ([\d.]+) req/s", out, re.M)
    counts = re.search(r"^requests: .*", out, re.M)
    if rate is None or counts is None:
        raise Trouble("h2load says nothing of what it did")
    times, statuses = [], Counter[str]()
    for line in log.splitlines():
        _, status, microseconds = line.split("\t")
        if status.startswith("2"):
            times.append(int(microseconds) / 1000)
        elif status != "-1":
            statuses[f"status {status}"] += 1
    numbers = {kind: int(number) for number, kind in re.findall(r"(\d+) (done|failed)", counts[0])}
    # h2load counts an answer with another status as failed too, and as done.
    errors = statuses + Counter({"failed": numbers.get("failed", 0) - statuses.total()})
    if len(times) < 2:
        raise Trouble("not one answer" + (f" ({dict(errors)})" if errors else ""))
    cuts = statistics.quantiles(times, n=100, method="inclusive")
    good = float(rate[1]) * len(times) / max(len(times), numbers.get("done", 0))
    values = {"requests_per_s": good, "requests": float(len(times)), "p50": cuts[49], "p99": cuts[98]}
    return Found(values, dict(errors))


def h2load(target: Target, path: str, clients: int, streams: int, seconds: int) -> Found:
    """A closed loop over HTTP/2 in clear text: so many connections with so many streams at a time each."""
    with tempfile.TemporaryDirectory() as directory:
        log = Path(directory) / "log"
        command = ["h2load", "-t1", f"-c{clients}", f"-m{streams}", f"-D{seconds}", "-N10s", f"--log-file={log}"]
        for name, value in target.fields:
            command += ["-H", f"{':authority' if name.lower() == 'host' else name}: {value}"]
        out = run((*command, f"http://{target.address}{path}"), seconds + SPARE)
        return parse_h2load(out, log.read_text() if log.exists() else "")


def parse_open_loop(out: str) -> Found:
    """``quictunnel load --json``: requests_per_s, p50, p99, requests, behind (1.0 if the load was late); failures."""
    try:
        (stage,) = json.loads(out)["stages"]
        latency = stage["latency_ms"]
        failures: dict[str, int] = dict(stage["failures"])
        values = {"requests_per_s": stage["achieved_rate"], "requests": float(stage["succeeded"])}
    except (ValueError, KeyError, TypeError):
        raise Trouble("quictunnel load says nothing of what it did") from None
    if latency is None:
        raise Trouble(f"not one answer ({failures})")
    behind = float(stage["fell_behind"])
    return Found(values | {"p50": latency["p50"], "p99": latency["p99"], "behind": behind}, failures)


def open_loop(target: Target, path: str, rate: float, seconds: float) -> Found:
    """Requests at fixed times, whatever becomes of those before; each one's time counts from when it was due."""
    command = [sys.executable, "-m", "quictunnel", "load", f"http://{target.address}{path}", "--json"]
    command += ["--stages", f"{rate:g}", "--duration", f"{seconds:g}s", "--timeout", "10s"]
    for name, value in target.fields:
        command += ["--header", f"{name}: {value}"]
    return parse_open_loop(run(command, seconds + SPARE, statuses=(0, 1, 3)))


def lone(target: Target, path: str, size: int, count: int) -> Found:
    """One request after the other on one connection: the middle and the tail of their times."""
    with Visitor(target) as visitor:
        visitor.ask(path, size)
        times = [1000 * visitor.ask(path, size)[1] for _ in range(count)]
    cuts = statistics.quantiles(times, n=100, method="inclusive")
    return Found({"p50": cuts[49], "p99": cuts[98], "requests": float(count)})
