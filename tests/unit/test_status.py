"""What ``quictunnel status`` makes of the answers of a server's processes."""

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from quictunnel.app import status as command
from quictunnel.app.status import merged, table
from quictunnel.cli import main

SINCE = "2026-01-31T09:30:00+00:00"
NOW = datetime.fromisoformat(SINCE).timestamp() + 750


def process(pid: int, *tunnels: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return {
        "pid": pid, "worker": 0, "workers": 1, "version": "1.2", "engine": "qh3", "domain": "localhost",
        "started": SINCE, "draining": False, "http": "127.0.0.1:80", "https": None, "quic": "127.0.0.1:4433",
        "visitors": 2, "in_flight": 1, "tunnels": list(tunnels),
    } | changes  # fmt: skip


def tunnel(name: str, *sessions: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return {
        "name": name, "urls": [f"http://{name}.localhost"], "token": "t1", "sticky": "", "in_flight": 1, "waiting": 1,
        "lost": None, "sessions": list(sessions),
    } | changes  # fmt: skip


def session(key: str, **changes: Any) -> dict[str, Any]:
    return {
        "id": key, "number": 1, "agent": "quictunnel/1.2", "address": "192.0.2.1:999", "token": "t1", "hosts": [],
        "weight": 1, "health": "healthy", "health_text": "", "since": SINCE, "links": 2, "lingering": 0,
        "in_flight": 3, "served": 40, "round_trip_ms": 5.0,
    } | changes  # fmt: skip


def test_one_session_on_two_workers_is_one_row_with_their_sum() -> None:
    other = session(
        "aa", number=7, links=1, in_flight=1, served=2, round_trip_ms=2.5, since="2026-01-31T09:29:00+00:00"
    )
    whole = merged(
        [
            process(11, tunnel("app", other), worker=1, workers=2),
            process(10, tunnel("app", session("aa")), workers=2),
        ]
    )
    [app] = whole["tunnels"]
    [row] = app["sessions"]
    assert (app["in_flight"], app["waiting"]) == (2, 2)
    assert (row["links"], row["in_flight"], row["served"], row["round_trip_ms"]) == (3, 4, 42, 2.5)
    assert row["since"] == "2026-01-31T09:29:00+00:00"
    assert row["numbers"] == {"10": 1, "11": 7}
    assert [each["pid"] for each in whole["processes"]] == [10, 11]
    assert whole["totals"] == {"tunnels": 1, "sessions": 1, "links": 3, "visitors": 4, "in_flight": 2, "waiting": 2}


@pytest.mark.parametrize(
    ("one", "other", "shown"),
    [
        ("healthy", "healthy", "healthy"),
        ("healthy", "suspect", "suspect"),
        ("healthy", "draining", "healthy"),
        ("draining", "draining", "draining"),
        ("suspect", "unhealthy", "unhealthy"),
        ("healthy", "a word of a later version", "a word of a later version"),
    ],
)
def test_the_worst_that_a_process_says_of_a_session_is_shown(one: str, other: str, shown: str) -> None:
    answers = [
        process(1, tunnel("app", session("aa", health=one))),
        process(2, tunnel("app", session("aa", health=other))),
    ]
    assert merged(answers)["tunnels"][0]["sessions"][0]["health"] == shown


def test_a_tunnel_without_a_client_says_since_when() -> None:
    whole = merged([process(1, tunnel("app", lost=SINCE)), process(2, tunnel("app", lost=None))])
    assert whole["tunnels"][0]["lost"] == SINCE
    assert "no client for 12m" in "\n".join(table(whole, NOW))


def test_a_tunnel_that_one_worker_still_serves_is_not_lost() -> None:
    whole = merged([process(1, tunnel("app", lost=SINCE)), process(2, tunnel("app", session("aa")))])
    assert whole["tunnels"][0]["lost"] is None


def test_the_table_has_a_column_for_each_fact_under_its_heading() -> None:
    row = session(
        "aa", hosts=["a.example", "*.b.example"], weight=3, health="unhealthy", health_text="GET /healthz: 500"
    )
    lines = table(merged([process(10, tunnel("app", row, waiting=9), draining=True, workers=2, worker=1)]), NOW)
    assert lines[0] == (
        "server 10 (worker 1 of 2) draining: quictunnel/1.2 on qh3, up 12m, http 127.0.0.1:80, quic 127.0.0.1:4433; "
        "2 visitors, 1 requests in flight"
    )
    head, shown = lines[2], lines[3]
    facts = {
        "TUNNEL": "app", "SESSION": "1", "HEALTH": "unhealthy: GET /healthz: 500", "LINKS": "2", "IN FLIGHT": "3",
        "WAITING": "9", "SERVED": "40", "WEIGHT": "3", "RTT": "5.0ms", "SINCE": "12m", "FROM": "192.0.2.1:999",
        "TOKEN": "t1", "AGENT": "quictunnel/1.2", "HOSTS": "a.example,*.b.example",
    }  # fmt: skip
    for heading, value in facts.items():
        assert shown[head.index(heading) :].startswith(value), heading


def test_no_word_of_a_client_steers_the_terminal_or_forges_a_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    bad = "\x1b[2J\nserver 1\u202e\x7f\x9b"
    row = session("aa", agent=bad, health="unhealthy", health_text=bad, hosts=[bad])
    answers = [process(10, tunnel("app", row))]
    text = "\n".join(table(merged(answers), NOW))
    assert len(text.split("\n")) == 4
    assert not set(text) & set("\x1b\u202e\x7f\x9b")
    monkeypatch.setattr(command, "calls", lambda directory, limit: ([answers[0]], []))
    monkeypatch.setattr(command, "_asked", lambda answer: answer)
    assert main(["status", "--json"]) == 0
    out = capsys.readouterr().out
    assert out.isascii()
    assert not set(out) & set("\x1b\x7f")
    assert json.loads(out)["tunnels"][0]["sessions"][0]["agent"] == bad


def test_no_server_is_one_line(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["status", "--state-dir", str(tmp_path)]) == 1
    out = capsys.readouterr()
    assert (out.out, out.err) == ("", f"quictunnel: no server is running with the state directory {tmp_path}\n")


def test_somebody_elses_server_is_one_line(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def forbidden(path: Path) -> list[str]:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("quictunnel.server.admin.os.listdir", forbidden)
    assert main(["status", "--state-dir", str(tmp_path)]) == 1
    said = capsys.readouterr().err
    assert (
        said
        == f"quictunnel: only the owner of the state directory may ask its server: {tmp_path}/run: Permission denied\n"
    )


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [(0, "0s"), (99, "99s"), (100, "1m"), (5999, "99m"), (6000, "1h40m"), (172800, "2d"), (-5, "0s")],
)
def test_an_age_is_short(seconds: int, shown: str) -> None:
    assert command._age(SINCE, datetime.fromisoformat(SINCE).astimezone(UTC).timestamp() + seconds) == shown
