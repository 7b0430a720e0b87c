"""The outcome of a bench, for people and for programs."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from quictunnel.bench.measure import Loop
from quictunnel.bench.meter import Work
from quictunnel.bench.verdict import Bulk, Rates, Verdict, judge_bulk, judge_rates
from quictunnel.load.figures import Histogram

__all__ = ["Run", "as_json", "as_text"]


class Run(NamedTuple):
    """What was measured of one tunnel. Times in seconds."""

    engine: str
    "the client's"

    place: str
    "where the server is: ``this machine``, or its address"

    url: str
    seconds: float
    "that were asked for"

    cores: int
    direct: Loop
    "a lone request to the backend, without the tunnel"

    direct_rate: float
    lone: Loop
    "a lone request through the tunnel"

    rates: Sequence[Rates]
    schedule: tuple[float, Loop]
    "requests a second of the open loop, and what came of them"

    bulk: Mapping[tuple[str, int], Bulk]
    "by direction (``down`` or ``up``) and streams; none for a backend of the user's own"

    round_trip: float | None
    "of the link, when nothing else went over it"

    memory: Mapping[str, tuple[int, int] | None]
    "bytes resident by process, and the most there were"

    @property
    def added(self) -> float:
        """What the tunnel adds to a lone request."""
        return self.lone.latency.percentile(50) - self.direct.latency.percentile(50)

    @property
    def verdicts(self) -> dict[str, Verdict]:
        """What limits requests, and bytes in each direction."""
        found = {"requests": judge_rates(self.rates[-1])}
        for direction in ("down", "up"):
            each = [bulk for (name, _), bulk in self.bulk.items() if name == direction]
            if each:
                found[direction] = judge_bulk(max(each, key=lambda bulk: bulk.rate))
        return found

    @property
    def failures(self) -> dict[str, int]:
        """Requests that failed, by kind, whatever was being measured."""
        found: dict[str, int] = {}
        everything: list[Mapping[str, int]] = [self.lone.failures, self.schedule[1].failures]
        everything += [rates.failures for rates in self.rates]
        everything += [bulk.failures for bulk in self.bulk.values()]
        for each in everything:
            for kind, count in each.items():
                found[kind] = found.get(kind, 0) + count
        return found


def as_text(run: Run) -> str:
    """The result as a page; ends with a line feed."""
    many = run.rates[-1]
    where = f"on {run.place}, {run.cores} cores" if run.place == "this machine" else f"to the server at {run.place}"
    lines = [f"{run.engine}, {where}: {run.url}", ""]
    rows: list[tuple[str, ...]] = [("", "p50 ms", "p99 ms", "requests/s")]
    rows.append(("asked directly, 1 connection", *_latency(run.direct.latency), _count(run.direct.rate)))
    rows.append(("through the tunnel, 1 connection", *_latency(run.lone.latency), _count(run.lone.rate)))
    rows += [
        (f"{each.connections} connections", _ms(each.p50), _ms(each.p99), _count(each.rate))
        if each.answered
        else (f"{each.connections} connections", "-", "-", "0")
        for each in run.rates
    ]
    rate, schedule = run.schedule
    fixed = "at a fixed rate" + (", behind schedule" if schedule.late else "")
    rows.append((fixed, *_latency(schedule.latency), _count(rate)))
    lines += _table(rows)
    lines += ["", f"the tunnel adds {_ms(run.added)} ms to a lone request", *_trips(run)]
    if run.bulk:
        streams = sorted({number for _, number in run.bulk})
        rows = [("MB/s", *(f"{number} stream{'s' * (number > 1)}" for number in streams))]
        for direction in ("down", "up"):
            rows.append((direction, *(f"{run.bulk[direction, number].rate / 1e6:,.1f}" for number in streams)))
        lines += ["", *_table(rows)]
    lines += ["", *_table(_processes(run, many.work, many.rate))]
    lines += [f"failed: {count} with {kind}" for kind, count in sorted(run.failures.items())]
    lines.append("")
    lines += [f"{what} limited by: {verdict.text}" for what, verdict in run.verdicts.items()]
    return "\n".join(line.rstrip() for line in lines) + "\n"


def as_json(runs: Sequence[Run]) -> dict[str, Any]:
    """The results as one JSON object. Members are only ever added; what is not known is null.

    docs/cli.md tells of each.
    """
    return {"runs": [_run_json(run) for run in runs]}


def _run_json(run: Run) -> dict[str, Any]:
    rate, schedule = run.schedule
    return {
        "engine": run.engine,
        "server": run.place,
        "url": run.url,
        "seconds": run.seconds,
        "cores": run.cores,
        "direct": _loop_json(run.direct) | {"rate_64": round(run.direct_rate, 1)},
        "lone": _loop_json(run.lone),
        "added_ms": _rounded(run.added),
        "round_trip_ms": _rounded(run.round_trip),
        "rates": [
            {
                "connections": each.connections,
                "rate": round(each.rate, 1),
                "p50_ms": _rounded(each.p50 if each.answered else None),
                "p99_ms": _rounded(each.p99 if each.answered else None),
                "failures": dict(each.failures),
                "cpu": _cpu_json(each.work),
            }
            for each in run.rates
        ],
        "schedule": _loop_json(schedule) | {"asked_rate": rate, "fell_behind": schedule.late},
        "bulk": [
            {
                "direction": direction,
                "streams": streams,
                "bytes_per_second": round(bulk.rate),
                "bytes": bulk.bytes,
                "round_trip_ms": _rounded(bulk.round_trip),
                "on_credit": _share(bulk.on_credit),
                "on_path": _share(bulk.on_path),
                "growth": _share(bulk.growth),
                "lost_locally": _share(bulk.work.lost),
                "failures": dict(bulk.failures),
                "cpu": _cpu_json(bulk.work),
            }
            for (direction, streams), bulk in run.bulk.items()
        ],
        "memory": {
            name: None if found is None else {"resident_bytes": found[0], "peak_bytes": found[1]}
            for name, found in run.memory.items()
        },
        "limits": {what: verdict._asdict() for what, verdict in run.verdicts.items()},
    }


def _loop_json(loop: Loop) -> dict[str, Any]:
    latency = loop.latency
    return {
        "rate": round(loop.rate, 1),
        "p50_ms": _rounded(latency.percentile(50) if latency.count else None),
        "p99_ms": _rounded(latency.percentile(99) if latency.count else None),
        "failures": dict(loop.failures),
    }


def _cpu_json(work: Work) -> dict[str, float | None]:
    return {name: _share(share) for name, share in work.processes.items()} | {"machine": _share(work.machine)}


def _trips(run: Run) -> list[str]:
    if run.round_trip is None:
        return []
    text = f"round trip of the link: {_ms(run.round_trip)} ms"
    loaded = [bulk.round_trip for (way, _), bulk in run.bulk.items() if way == "down" and bulk.round_trip is not None]
    return [f"{text}, {_ms(max(loaded))} ms under a download" if loaded else text]


def _processes(run: Run, work: Work, rate: float) -> list[tuple[str, ...]]:
    """Processor time of a request, and memory, by process."""
    names = list(work.processes)
    costs = [work.processes[name] for name in names]
    rows = [
        ("", *(f"the {name}" for name in names)),
        ("CPU us/request", *("-" if cost is None or not rate else f"{1e6 * cost / rate:,.0f}" for cost in costs)),
    ]
    found = [run.memory.get(name) for name in names]
    rows.append(("resident MB", *("-" if each is None else f"{each[0] / 1e6:.0f}" for each in found)))
    return rows


def _table(rows: Sequence[tuple[str, ...]]) -> list[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [
        "  ".join(
            [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        )
        for row in rows
    ]


def _latency(latency: Histogram) -> tuple[str, str]:
    if not latency.count:
        return "-", "-"
    return _ms(latency.percentile(50)), _ms(latency.percentile(99))


def _ms(seconds: float) -> str:
    return f"{seconds * 1000:.2f}"


def _count(rate: float) -> str:
    return f"{rate:,.0f}"


def _rounded(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds * 1000, 3)


def _share(value: float | None) -> float | None:
    return None if value is None else round(value, 4)
