"""The load test's pure parts: what is asked for, what is counted, what is reported."""

import io
import json
import math
import resource
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quictunnel.load import run
from quictunnel.load.connections import connection_kind, status_kind
from quictunnel.load.figures import Histogram, Tally, requests_of
from quictunnel.load.plan import (
    BLOCK,
    LoadOptions,
    MaxErrors,
    make_options,
    make_request,
    parse_header,
    parse_max_errors,
    parse_max_p99,
    parse_stages,
    parse_target,
)
from quictunnel.load.report import ExitStatus, as_json, as_text, exit_status, judge, progress

URL = "http://demo.localhost:8080/"


def options_for(url: str = URL, **changes: Any) -> LoadOptions:
    return make_options(url, **changes)


def finished(rate: float = 100, *, failures: dict[str, int] | None = None, latency: float = 0.01) -> Tally:
    """A stage of one second that went as planned but for ``failures``."""
    tally = Tally(rate, 1)
    tally.finished = 1.0
    tally.last_left = 1 - 1 / rate
    for _ in range(tally.scheduled):
        tally.sent += 1
        tally.left(0.0005)
    for kind, count in (failures or {}).items():
        for _ in range(count):
            tally.fail(kind)
    for _ in range(tally.in_flight):
        tally.succeed(latency)
    return tally


# What is asked for


def test_stages_are_rates_in_order() -> None:
    assert parse_stages("20, 50,0.5") == (20.0, 50.0, 0.5)


@pytest.mark.parametrize(
    "text", ["", "20,", "0", "-5", "x", "1e3", "nan", "inf", "1000001", "٣", ",".join(["1"] * 1001)]
)
def test_bad_stages_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="stages"):
        parse_stages(text)


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("http://a", (False, "a", 80, "a", "/")),
        ("HTTPS://a:8443/x?y=%2F#z", (True, "a", 8443, "a:8443", "/x?y=%2F")),
        ("http://[::1]:80?q", (False, "::1", 80, "[::1]:80", "/?q")),
        (
            "http://b\u00fccher.example/../a//b",
            (False, "xn--bcher-kva.example", 80, "xn--bcher-kva.example", "/../a//b"),
        ),
    ],
)
def test_target_keeps_the_path_as_it_is(url: str, expected: tuple[object, ...]) -> None:
    assert tuple(parse_target(url)) == expected


BAD_URLS = (
    "",
    "a",
    "ftp://a",
    "http://",
    "http://a:0",
    "http://a:x",
    "http://a:99999",
    "http://u:p@a",
    "http://a/ b",
    "http://a/\r",
    "http://[::1",
    "http://a b/",
    "http://a/\u00e4",
    "http://\u00e4\u3002\u3002/",
)


@pytest.mark.parametrize("url", BAD_URLS)
def test_bad_urls_are_refused(url: str) -> None:
    with pytest.raises(ValueError, match=r"."):
        parse_target(url)


@given(st.text(max_size=40))
def test_any_text_as_a_url_is_a_target_or_a_value_error(text: str) -> None:
    for url in (text, "http://" + text):
        try:
            target = parse_target(url)
        except ValueError:
            continue
        assert target.path.startswith("/")
        assert not set(target.authority + target.path) & set(" \r\n\0")


def test_label_hides_the_query() -> None:
    assert parse_target("https://a/x?token=secret").label == "https://a/x?…"


def test_header_is_read() -> None:
    assert parse_header("X-A:  b: c ") == ("X-A", "b: c")


@pytest.mark.parametrize(
    "line", ["", "a", ": b", "a b: c", "a: b\r\nc: d", "a: \u20ac", "Content-Length: 5", "transfer-encoding: chunked"]
)
def test_bad_headers_are_refused(line: str) -> None:
    with pytest.raises(ValueError, match="header"):
        parse_header(line)


def test_thresholds_are_read() -> None:
    assert parse_max_errors("5") == MaxErrors("5", count=5)
    assert parse_max_errors("0.5%") == MaxErrors("0.5%", share=0.005)
    assert parse_max_p99("60") == parse_max_p99("60ms") == 60.0


@pytest.mark.parametrize("text", ["", "-1", "x", "101%", "%", "1.5", "1/3"])
def test_bad_error_thresholds_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="--max-errors"):
        parse_max_errors(text)


@pytest.mark.parametrize("text", ["", "0", "-1", "x", "60s", "inf"])
def test_bad_latency_thresholds_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="--max-p99"):
        parse_max_p99(text)


@pytest.mark.parametrize(
    "changes",
    [
        {"ca": Path("ca.pem")},
        {"insecure": True},
        {"url": "https://a", "insecure": True, "ca": Path("ca.pem")},
        {"body": "x", "body_size": 1},
        {"body_size": -1},
        {"connections": 0},
        {"duration": 0.0},
        {"timeout": math.nan},
        {"stages": "1", "duration": 0.5},
        {"method": "CONNECT"},
        {"method": "G T"},
        {"header": ["x"]},
        {"body": "@/nonexistent/file"},
    ],
)
def test_options_that_cannot_be_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"."):
        options_for(**changes)


def test_options_do_not_show_secrets() -> None:
    options = options_for(header=["Authorization: Bearer hush"], body="hush")
    assert "hush" not in repr(options)


def test_request_has_what_http_needs() -> None:
    request = make_request(options_for("http://a:81/x?y"))
    lines = request.head.split(b"\r\n")
    assert lines[:2] == [b"GET /x?y HTTP/1.1", b"Host: a:81"]
    assert lines[-2:] == [b"", b""]
    assert b"content-length" not in request.head.lower()


def test_headers_given_replace_the_default_ones() -> None:
    request = make_request(options_for(header=["host: other", "X-A: 1", "X-A: 2"]))
    assert request.head.lower().count(b"host:") == 1
    assert request.head.endswith(b"host: other\r\nX-A: 1\r\nX-A: 2\r\n\r\n")


@pytest.mark.parametrize("size", [0, 1, BLOCK, BLOCK + 1, 3 * BLOCK + 7])
def test_made_up_body_has_its_size_and_costs_one_block(size: int) -> None:
    request = make_request(options_for(method="post", body_size=size))
    assert b"Content-Length: %d\r\n" % size in request.head
    assert len(request.body) <= BLOCK
    offset = 0
    while offset < size:
        offset += len(request.block(offset))
    assert offset == size


def test_body_of_a_file_is_sent_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "body"
    path.write_bytes(bytes(range(256)) * 300)
    request = make_request(options_for(method="PUT", body=f"@{path}"))
    assert request.block(0) + request.block(BLOCK) == path.read_bytes()


# What is counted


@given(st.lists(st.floats(0, 4000), min_size=1, max_size=200), st.sampled_from([0.1, 50, 90, 99, 99.9, 100]))
def test_percentiles_are_within_one_percent(values: list[float], percent: float) -> None:
    histogram = Histogram()
    for value in values:
        histogram.add(value)
    rank = max(1, math.ceil(len(values) * round(percent * 10) / 1000))
    exact = sorted(values)[rank - 1]
    assert histogram.percentile(percent) == pytest.approx(exact, rel=0.005, abs=1e-6)
    assert histogram.minimum == min(values)
    assert histogram.maximum == max(values)
    assert histogram.mean == pytest.approx(sum(values) / len(values))


def test_histogram_takes_any_duration() -> None:
    histogram = Histogram()
    for value in (-1.0, 0.0, 1e-9, 1e9):
        histogram.add(value)
    assert histogram.count == 4
    assert histogram.minimum == 0.0
    assert histogram.percentile(50) <= 1e-6


def test_empty_histogram_has_zeros() -> None:
    assert (Histogram().percentile(99), Histogram().mean) == (0.0, 0.0)


def test_kinds_of_failure_are_bounded() -> None:
    tally = Tally(1000, 1)
    for number in range(1000):
        tally.fail(f"status_{number}")
    assert len(tally.failures) == 65
    assert tally.failed == 1000


def test_rates_times_durations_are_whole_requests() -> None:
    assert [requests_of(0.7, 10), requests_of(0.1, 30), requests_of(1.5, 1)] == [7, 3, 1]


def test_stage_on_time_did_not_fall_behind() -> None:
    tally = finished()
    assert not tally.fell_behind
    assert tally.offered_rate == pytest.approx(100)
    assert tally.achieved_rate == pytest.approx(100)


def test_stage_with_more_than_one_in_a_hundred_late_fell_behind() -> None:
    tally = finished()
    for _ in range(2):
        tally.left(0.021)
    assert not tally.fell_behind
    tally.left(0.021)
    assert tally.fell_behind


def test_stage_with_requests_never_made_fell_behind() -> None:
    tally = finished()
    tally.scheduled += 1
    assert tally.fell_behind


def test_late_answers_lower_the_achieved_rate() -> None:
    tally = finished()
    tally.finished = 2.0
    assert tally.achieved_rate == pytest.approx(50)


# What is reported


def test_thresholds_kept_are_success() -> None:
    options = options_for(max_errors="0", max_p99="11")
    assert exit_status(options, [finished(), finished()]) is ExitStatus.OK
    assert [verdict.broken for verdict in judge(options, [finished()])] == [False, False]


@pytest.mark.parametrize(("limit", "broken"), [("3", True), ("4", False), ("2%", True), ("4%", False)])
def test_errors_count_in_the_run_and_share_in_each_stage(limit: str, broken: bool) -> None:
    tallies = [finished(), finished(failures={"status_503": 3}), finished(failures={"response_timeout": 1})]
    (verdict,) = judge(options_for(max_errors=limit), tallies)
    assert verdict.broken is broken


def test_p99_counts_in_every_stage() -> None:
    assert exit_status(options_for(max_p99="20"), [finished(), finished(latency=0.03)]) is ExitStatus.BROKEN


def test_stage_without_any_answer_breaks_p99() -> None:
    tallies = [finished(), finished(failures={"connection_refused": 100})]
    assert exit_status(options_for(max_p99="20"), tallies) is ExitStatus.BROKEN


def test_run_without_any_success_is_no_success_whatever_the_thresholds() -> None:
    assert exit_status(options_for(), [finished(failures={"status_404": 100})]) is ExitStatus.BROKEN


def test_falling_behind_has_a_status_of_its_own_and_is_said() -> None:
    tally = finished()
    tally.late = 50
    assert exit_status(options_for(), [tally]) is ExitStatus.FELL_BEHIND
    assert "FELL BEHIND" in as_text(options_for(), [tally])
    assert exit_status(options_for(max_p99="1"), [tally]) is ExitStatus.BROKEN


def test_requests_never_made_are_no_successes() -> None:
    tally = finished()
    tally.scheduled += 10
    assert judge(options_for(max_errors="9"), [tally])[0].broken


def test_table_has_a_row_a_stage_and_the_failures() -> None:
    tallies = [finished(20), finished(50, failures={"status_503 destination_unavailable": 2})]
    lines = as_text(options_for(max_errors="1"), tallies).splitlines()
    assert lines[1].split()[:4] == ["20", "20", "20", "0"]
    assert lines[2].split()[:4] == ["50", "50", "48", "2"]
    assert lines[3] == "50/s: 2 failed: status_503 destination_unavailable"
    assert lines[4] == "--max-errors 1: EXCEEDED (2)"
    assert lines[-1] == "68 of 70 requests succeeded"


def test_json_is_whole() -> None:
    told = json.loads(json.dumps(as_json(options_for(max_p99="60"), [finished(failures={"status_500": 1})])))
    assert told["exit_status"] == 0
    assert told["total"]["failures"] == {"status_500": 1}
    assert told["thresholds"][0]["name"] == "max_p99"
    (stage,) = told["stages"]
    assert (stage["sent"], stage["succeeded"], stage["failed"], stage["fell_behind"]) == (100, 99, 1, False)
    assert stage["latency_ms"]["p99"] == pytest.approx(10, rel=0.01)


def test_stage_without_answers_is_reported_too() -> None:
    tally = finished(failures={"connection_refused": 100})
    assert as_json(options_for(), [tally])["stages"][0]["latency_ms"] is None
    assert "p99 - ms" in progress(tally, 1.0)


# Kinds of failure


@pytest.mark.parametrize(
    ("field", "kind"),
    [
        (b"", "status_502"),
        (b"quictunnel; error=connection_refused", "status_502 connection_refused"),
        (b'quictunnel; details="; error=no"; error=dns_error, other', "status_502 dns_error"),
        (b"quictunnel; error=\x1b[2J", "status_502"),
    ],
)
def test_status_is_told_with_the_error_of_proxy_status(field: bytes, kind: str) -> None:
    assert status_kind(502, field) == kind


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (ConnectionRefusedError(), "connection_refused"),
        (TimeoutError(), "connection_timeout"),
        (OSError(24, "too many open files"), "too_many_open_files"),
        (OSError(99, "no address"), "no_local_port"),
        (OSError(113, "no route"), "connection_failed"),
    ],
)
def test_dials_fail_in_kinds(error: OSError, kind: str) -> None:
    assert connection_kind(error) == kind


# The limit of open files


def test_too_small_a_limit_of_files_is_said_and_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _: (256, 1024))
    limits: list[tuple[int, int]] = []
    monkeypatch.setattr(resource, "setrlimit", lambda _, limit: limits.append(limit))
    err = io.StringIO()
    assert run._allow_connections(4096, err) == 960
    assert limits == [(1024, 1024)]
    assert "ulimit -n 4160" in err.getvalue()


def test_the_limit_of_files_is_raised_without_a_word_where_it_may(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _: (256, 20_000))
    limits: list[tuple[int, int]] = []
    monkeypatch.setattr(resource, "setrlimit", lambda _, limit: limits.append(limit))
    err = io.StringIO()
    assert run._allow_connections(4096, err) == 4096
    assert limits == [(4160, 20_000)]
    assert err.getvalue() == ""
