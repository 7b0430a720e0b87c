"""``quictunnel status``: what the running server says of its tunnels, put together from all of its processes."""

import json
import sys
import time
from collections.abc import Mapping
from contextlib import closing
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

from quictunnel.app.ask import Call, NoAnswer, calls
from quictunnel.app.process import say
from quictunnel.failures import CommandError
from quictunnel.log import escape
from quictunnel.settings import StatusSettings

__all__ = ["merged", "status", "table"]

_ANSWER_TIME: Final = 5.0
"seconds for each process to answer"

_ANSWER_LIMIT: Final = 256 * 1024 * 1024
"bytes"

# Of the words for a session's health the first that any process says; those of a process that drains count last.
_HEALTH: Final = ("unhealthy", "put aside", "suspect", "healthy", "draining")

_ABSENT: Final = "-"


def status(settings: StatusSettings) -> int:
    """Ask, print, and return the exit status. Raises CommandError."""
    found, silent = calls(settings.state_dir, _ANSWER_TIME)
    answers: list[dict[str, Any]] = []
    for call in found:
        try:
            answers.append(_asked(call))
        except NoAnswer as error:
            silent.append((call.path, str(error)))
    if not answers and not silent:
        raise CommandError(f"no server is running with the state directory {settings.state_dir}")
    for path, why in silent:
        print(f"quictunnel: {escape(str(path))}: {escape(why)}", file=sys.stderr)
    if not answers:
        return 1
    whole = merged(answers) | {"silent": [_process_of(path) for path, _ in silent]}
    if settings.json_:
        # Whatever a client calls itself, it is ASCII here, and DEL is the one control character that JSON lets pass.
        say(json.dumps(whole, indent=2).replace("\x7f", "\\u007f"))
    else:
        for line in table(whole, time.time()):
            say(line)
    return 0


def _asked(call: Call) -> dict[str, Any]:
    with closing(call):
        call.say({"ask": "status"})
        answer = call.hear(_ANSWER_LIMIT)
    if not isinstance(answer.get("tunnels"), list) or "pid" not in answer:
        raise NoAnswer(f"it answers: {str(answer.get('error', 'something else'))[:200]}")
    return answer


def _process_of(path: Path) -> str:
    return path.name.removesuffix(".sock")


# Many processes, one answer


def merged(answers: list[dict[str, Any]]) -> dict[str, Any]:
    """The answers of a server's processes as one: counts are sums, a session that several of them have is one."""
    # A process that drains tells of the same sessions as its successor, and less of them.
    answers = sorted(answers, key=lambda each: (each.get("draining", False), each.get("worker", 0), each["pid"]))
    tunnels: dict[str, dict[str, Any]] = {}
    for answer in answers:
        for tunnel in answer["tunnels"]:
            known = tunnels.get(tunnel["name"])
            if known is None:
                known = tunnels[tunnel["name"]] = tunnel | {"sessions": {}, "in_flight": 0, "waiting": 0}
            known["in_flight"] += tunnel["in_flight"]
            known["waiting"] += tunnel["waiting"]
            known["token"] = known["token"] or tunnel["token"]
            known["lost"] = max(filter(None, (known["lost"], tunnel["lost"])), default=None)
            for session in tunnel["sessions"]:
                _add(known["sessions"], session, answer["pid"])
    rows = [_finished(tunnels[name]) for name in sorted(tunnels)]
    processes = [{key: value for key, value in answer.items() if key != "tunnels"} for answer in answers]
    totals = {
        "tunnels": len(rows),
        "sessions": sum(len(row["sessions"]) for row in rows),
        "links": sum(session["links"] for row in rows for session in row["sessions"]),
        "visitors": sum(process["visitors"] for process in processes),
        "in_flight": sum(process["in_flight"] for process in processes),
        "waiting": sum(row["waiting"] for row in rows),
    }
    return {"processes": processes, "totals": totals, "tunnels": rows}


def _add(sessions: dict[str, dict[str, Any]], session: Mapping[str, Any], pid: int) -> None:
    known = sessions.get(session["id"])
    number = session["number"]
    if known is None:
        rest = {key: value for key, value in session.items() if key != "number"}
        sessions[session["id"]] = rest | {"numbers": {str(pid): number}}
        return
    known["numbers"][str(pid)] = number
    for key in ("links", "lingering", "in_flight", "served"):
        known[key] += session[key]
    known["since"] = min(known["since"], session["since"])
    trips = [each for each in (known["round_trip_ms"], session["round_trip_ms"]) if each is not None]
    known["round_trip_ms"] = min(trips, default=None)
    if _rank(session["health"]) < _rank(known["health"]):
        known["health"], known["health_text"] = session["health"], session["health_text"]


def _rank(health: str) -> int:
    return _HEALTH.index(health) if health in _HEALTH else 0


def _finished(tunnel: dict[str, Any]) -> dict[str, Any]:
    sessions = sorted(tunnel.pop("sessions").values(), key=lambda each: (each["since"], each["id"]))
    if sessions:
        tunnel["lost"] = None
    return tunnel | {"sessions": sessions}


# For people


def table(whole: Mapping[str, Any], now: float) -> list[str]:
    """The lines that show it; ``now`` is in seconds since the epoch."""
    lines = [_process_line(process, now) for process in whole["processes"]]
    head = (
        "TUNNEL", "SESSION", "HEALTH", "LINKS", "IN FLIGHT", "WAITING", "SERVED", "WEIGHT", "RTT", "SINCE", "FROM",
        "TOKEN", "AGENT", "HOSTS",
    )  # fmt: skip
    rows = [row for tunnel in whole["tunnels"] for row in _rows(tunnel, now)]
    if not rows:
        return [*lines, "no tunnels yet"]
    # Escaped before they are measured: these are a client's words.
    cells = [tuple(map(escape, row)) for row in (head, *rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines.append("")
    lines += ["  ".join(map(str.ljust, row, widths)).rstrip() for row in cells]
    return lines


def _process_line(process: Mapping[str, Any], now: float) -> str:
    workers = process.get("workers", 1)
    worker = f" (worker {process.get('worker', 0)} of {workers})" if workers > 1 else ""
    places = [f"{name} {process[name]}" for name in ("http", "https", "quic") if process.get(name)]
    return escape(
        f"server {process['pid']}{worker}{' draining' if process.get('draining') else ''}: "
        f"quictunnel/{process.get('version')} on {process.get('engine')}, up {_age(process['started'], now)}, "
        f"{', '.join(places)}; {process['visitors']} visitors, {process['in_flight']} requests in flight"
    )


def _rows(tunnel: Mapping[str, Any], now: float) -> list[tuple[str, ...]]:
    waiting = str(tunnel["waiting"])
    if not tunnel["sessions"]:
        gone = "no client" if tunnel["lost"] is None else f"no client for {_age(tunnel['lost'], now)}"
        blank = (_ABSENT,) * 4
        return [(tunnel["name"], _ABSENT, gone, "0", str(tunnel["in_flight"]), waiting, *blank, _ABSENT,
                 tunnel["token"] or _ABSENT, "", "")]  # fmt: skip
    rows: list[tuple[str, ...]] = []
    for session in tunnel["sessions"]:
        health = session["health"]
        if session["health_text"] and health == "unhealthy":
            health = f"{health}: {session['health_text'][:80]}"
        trip = session["round_trip_ms"]
        rows.append((
            tunnel["name"], ",".join(dict.fromkeys(map(str, session["numbers"].values()))), health,
            str(session["links"]), str(session["in_flight"]), waiting, str(session["served"]), str(session["weight"]),
            _ABSENT if trip is None else f"{trip:.1f}ms", _age(session["since"], now), session["address"],
            session["token"], session["agent"] or _ABSENT, ",".join(session["hosts"]),
        ))  # fmt: skip
        waiting = ""
    return rows


def _age(then: str, now: float) -> str:
    """How long ago it was: ``45s``, ``12m``, ``3h05m``, ``9d``."""
    seconds = max(0, int(now - datetime.fromisoformat(then).astimezone(UTC).timestamp()))
    if seconds < 100:
        return f"{seconds}s"
    minutes, hours = seconds // 60, seconds // 3600
    if minutes < 100:
        return f"{minutes}m"
    return f"{hours}h{minutes % 60:02}m" if hours < 48 else f"{hours // 24}d"
