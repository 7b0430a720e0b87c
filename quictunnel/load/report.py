"""The outcome of a load test, for people and for programs, and what it means for the exit status."""

from collections import Counter
from collections.abc import Sequence
from enum import IntEnum
from typing import Any, Final, NamedTuple

from quictunnel.load.figures import LATE, Histogram, Tally
from quictunnel.load.plan import LoadOptions

__all__ = ["ExitStatus", "Verdict", "as_json", "as_text", "exit_status", "judge", "progress"]

_COLUMNS: Final = ("rate/s", "sent", "ok", "failed", "ok/s", "p50 ms", "p90 ms", "p99 ms", "max ms", "cpu", "late p99")


class ExitStatus(IntEnum):
    """What ``quictunnel load`` exits with."""

    OK = 0
    BROKEN = 1  # --max-errors or --max-p99 was exceeded, or not one request succeeded
    USAGE = 2  # the test could not start
    FELL_BEHIND = 3  # nothing was exceeded, but the load was not the one asked for: the figures are not the target's


class Verdict(NamedTuple):
    """One threshold and what was measured."""

    name: str
    "``max_errors`` or ``max_p99``"

    limit: str
    measured: str
    broken: bool


def judge(options: LoadOptions, tallies: Sequence[Tally]) -> list[Verdict]:
    """A verdict for each threshold that was set.

    A stage without any success has no p99 and breaks ``max_p99``. Failed requests have no latency: ``max_errors`` is
    for them.
    """
    verdicts = []
    if options.max_errors is not None:
        limit = options.max_errors
        if limit.share is None:
            failed = sum(_lost(tally) for tally in tallies)
            verdicts.append(Verdict("max_errors", limit.text, str(failed), failed > (limit.count or 0)))
        else:
            share = max(_lost(tally) / tally.scheduled for tally in tallies)
            verdicts.append(Verdict("max_errors", limit.text, f"{share:.4%}", share > limit.share))
    if options.max_p99 is not None:
        missing = any(not tally.succeeded for tally in tallies)
        worst = max(tally.latency.percentile(99) for tally in tallies) * 1000
        measured = "no answer" if missing else f"{worst:.2f} ms"
        verdicts.append(Verdict("max_p99", f"{options.max_p99:g} ms", measured, missing or worst > options.max_p99))
    return verdicts


def exit_status(options: LoadOptions, tallies: Sequence[Tally]) -> ExitStatus:
    """What the whole run amounts to."""
    if any(verdict.broken for verdict in judge(options, tallies)) or not any(tally.succeeded for tally in tallies):
        return ExitStatus.BROKEN
    if any(tally.fell_behind for tally in tallies):
        return ExitStatus.FELL_BEHIND
    return ExitStatus.OK


def as_json(options: LoadOptions, tallies: Sequence[Tally]) -> dict[str, Any]:
    """The result as one JSON object. Members are only ever added; times are milliseconds unless named otherwise.

    ::

        url                 as given, without its query
        method, timeout     timeout in seconds
        stages[]            in order
          rate              requests a second asked for
          scheduled         requests asked for
          sent              requests made; ``unsent`` were given up because the generator was too late for them
          succeeded         complete answers with a status of 2xx or 3xx
          failed            sent - succeeded
          failures          {kind: number}: connection_refused, connection_timeout, connection_failed, tls_error,
                            too_many_open_files, no_local_port, no_connection_free, closed_before_answer,
                            closed_before_answer_on_reused_connection, incomplete_answer, protocol_error,
                            response_timeout, timeout_in_body, status_NNN, "status_NNN WORD" with the error of
                            Proxy-Status (RFC 9209), other
          latency_ms        of the successes, from the scheduled time: min, mean, p50, p90, p99, max; null without any
          lateness_ms       how late requests left: p50, p99, max; null without any
          late              requests that left more than 20 ms late
          fell_behind       whether the load was not the one asked for
          offered_rate      requests a second that left
          achieved_rate     successes a second, until the last outcome
          seconds           until the last outcome
          received_bytes    of bodies
          cpu               share of one core that the generator used, 0 to 1
        total               scheduled, sent, succeeded, failed, failures of all stages
        thresholds[]        name, limit, measured (texts), broken
        fell_behind         whether any stage did
        exit_status         0 ok, 1 threshold exceeded or no success at all, 3 fell behind
    """
    return {
        "url": options.target.label,
        "method": options.method,
        "timeout": options.timeout,
        "stages": [_stage_json(tally) for tally in tallies],
        "total": {
            "scheduled": sum(tally.scheduled for tally in tallies),
            "sent": sum(tally.sent for tally in tallies),
            "succeeded": sum(tally.succeeded for tally in tallies),
            "failed": sum(tally.failed for tally in tallies),
            "failures": dict(_all_failures(tallies).most_common()),
        },
        "thresholds": [verdict._asdict() for verdict in judge(options, tallies)],
        "fell_behind": any(tally.fell_behind for tally in tallies),
        "exit_status": int(exit_status(options, tallies)),
    }


def as_text(options: LoadOptions, tallies: Sequence[Tally]) -> str:
    """The result as a table, the failures by kind, and what else there is to know; ends with a line feed."""
    rows = [_COLUMNS, *(_row(tally) for tally in tallies)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(_COLUMNS))]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    for tally in tallies:
        lines += [f"{tally.rate:g}/s: {count} failed: {kind}" for kind, count in tally.failures.most_common()]
    lines += [_behind(tally) for tally in tallies if tally.fell_behind]
    for verdict in judge(options, tallies):
        outcome = "EXCEEDED" if verdict.broken else "kept"
        lines.append(f"--{verdict.name.replace('_', '-')} {verdict.limit}: {outcome} ({verdict.measured})")
    scheduled = sum(tally.scheduled for tally in tallies)
    succeeded = sum(tally.succeeded for tally in tallies)
    lines.append(f"{succeeded} of {scheduled} requests succeeded")
    return "\n".join(lines) + "\n"


def progress(tally: Tally, elapsed: float) -> str:
    """One line on a stage that is under way, ``elapsed`` seconds after its start."""
    return (
        f"{tally.rate:g}/s {elapsed:.0f} s: {tally.sent}/{tally.scheduled} sent, {tally.succeeded} ok,"
        f" {tally.failed} failed, {tally.in_flight} in flight, p99 {_ms(tally.latency, 99)} ms"
    )


def _lost(tally: Tally) -> int:
    """What did not succeed; a request that was never made is no success either."""
    return tally.scheduled - tally.succeeded


def _all_failures(tallies: Sequence[Tally]) -> Counter[str]:
    failures: Counter[str] = Counter()
    for tally in tallies:
        failures += tally.failures
    return failures


def _stage_json(tally: Tally) -> dict[str, Any]:
    return {
        "rate": tally.rate,
        "scheduled": tally.scheduled,
        "sent": tally.sent,
        "unsent": tally.unsent,
        "succeeded": tally.succeeded,
        "failed": tally.failed,
        "failures": dict(tally.failures.most_common()),
        "latency_ms": _milliseconds(tally.latency, "min", "mean", "p50", "p90", "p99", "max"),
        "lateness_ms": _milliseconds(tally.lateness, "p50", "p99", "max"),
        "late": tally.late,
        "fell_behind": tally.fell_behind,
        "offered_rate": round(tally.offered_rate, 3),
        "achieved_rate": round(tally.achieved_rate, 3),
        "seconds": round(tally.seconds, 3),
        "received_bytes": tally.received,
        "cpu": round(tally.cpu_share, 4),
    }


def _milliseconds(histogram: Histogram, *names: str) -> dict[str, float] | None:
    if not histogram.count:
        return None
    exact = {"min": histogram.minimum, "mean": histogram.mean, "max": histogram.maximum}
    return {
        name: round(1000 * (exact[name] if name in exact else histogram.percentile(float(name[1:]))), 3)
        for name in names
    }


def _row(tally: Tally) -> tuple[str, ...]:
    return (
        f"{tally.rate:g}",
        str(tally.sent),
        str(tally.succeeded),
        str(tally.failed),
        f"{tally.achieved_rate:.1f}",
        _ms(tally.latency, 50),
        _ms(tally.latency, 90),
        _ms(tally.latency, 99),
        f"{tally.latency.maximum * 1000:.2f}" if tally.latency.count else "-",
        f"{tally.cpu_share:.0%}",
        _ms(tally.lateness, 99),
    )


def _ms(histogram: Histogram, percent: float) -> str:
    return f"{histogram.percentile(percent) * 1000:.2f}" if histogram.count else "-"


def _behind(tally: Tally) -> str:
    text = (
        f"{tally.rate:g}/s: THE LOAD GENERATOR FELL BEHIND: {tally.late} requests left more than"
        f" {LATE * 1000:.0f} ms late (the latest by {tally.lateness.maximum * 1000:.0f} ms),"
        f" {tally.unsent} were never made; {tally.offered_rate:.1f}/s were offered"
    )
    if tally.failures["no_connection_free"]:
        return f"{text}. Requests found no free connection: see --connections"
    return f"{text}. These figures say more about this machine than about the target"
