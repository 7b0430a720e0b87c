"""The bench without processes: what limits a tunnel, how /proc is read, what is printed."""

import os
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quictunnel.app.bench import RATES, _fixed_rate, _told, _url_of
from quictunnel.bench import meter
from quictunnel.bench.measure import Loop
from quictunnel.bench.meter import Meter, Reading, Work, parse_machine, parse_memory, parse_process, parse_udp, work
from quictunnel.bench.report import Run, as_json, as_text
from quictunnel.bench.verdict import Bulk, Rates, judge_bulk, judge_rates
from quictunnel.load.figures import Histogram

EASY: dict[str, float | None] = {"server": 0.4, "client": 0.3, "bench": 0.2}


def worked(machine: float | None = 1.0, cores: int = 4, lost: float | None = 0.0, **shares: float | None) -> Work:
    """What was used in two seconds; by default nobody was at any limit."""
    return Work(2.0, shares or EASY, machine, cores, lost)


def rates(**changes: Any) -> Rates:
    """64 connections that nothing is known to limit."""
    values: dict[str, Any] = {
        "connections": 64, "rate": 1000.0, "p50": 0.064, "p99": 0.1, "failures": {}, "answered": 2000,
        "work": worked(), "lone_p50": 0.001, "direct_rate": 9000.0,
    }  # fmt: skip
    return Rates(**values | changes)


def bulk(**changes: Any) -> Bulk:
    """A download that nothing is known to limit."""
    values: dict[str, Any] = {
        "streams": 1, "rate": 20e6, "bytes": 40_000_000, "failures": {}, "work": worked(), "round_trip": 0.001,
        "on_credit": 0.1, "on_path": 0.1, "direct_rate": 500e6, "growth": 1.1, "idle_trip": 0.001,
    }  # fmt: skip
    return Bulk(**values | changes)


# What limits


@pytest.mark.parametrize(
    ("changes", "limit", "said"),
    [
        ({"work": worked(server=0.98, client=0.5)}, "processor", "the server's processor (98 % of a core)"),
        ({"work": worked(server=0.5, client=0.91)}, "processor", "the client's processor (91 % of a core)"),
        ({"work": worked(backend=1.0)}, "processor", "the backend's processor"),
        ({"work": worked(bench=1.0, client=0.95)}, "processor", "the bench's own processor (100 % of a core): the tun"),
        (
            {"work": worked(1.9, 2, server=0.6, client=0.5, bench=0.3)},
            "processors",
            "this machine's 2 cores, all busy (server 60 %, client 50 %, other programs 50 %, bench 30 %)",
        ),
        (
            {"work": worked(1.9, 2, server=0.3, client=0.2)},
            "others",
            "other programs, which have 140 % of this machine's 2 cores (server 30 %, client 20 %)",
        ),
        ({"work": worked(1.0, 1, server=0.5, client=0.48)}, "processors", "this machine's only core (server 50 %"),
        ({"direct_rate": 1100.0}, "backend", "the backend: asked directly, it answers 1,100 requests/s"),
        (
            {"failures": {"status_503 connection_limit_reached": 500}},
            "slots",
            "the server's limits: 20 % of the requests failed, most of them with status_503 connection_limit_reached",
        ),
        ({"failures": {"status_502": 500}}, "failures", "20 % of the requests failed, most of them with status_502"),
        ({"answered": 0, "rate": 0.0, "failures": {"status_502": 5}}, "failures", "100 % of the requests failed"),
        (
            {"p50": 0.082, "lone_p50": 0.080},
            "connections",
            "the number of connections: each waits 82.0 ms for its answer, about as long as a lone one (80.0 ms)",
        ),
        ({}, "unknown", "not known; the busiest process is the server with 40 % of a core"),
        ({"direct_rate": None, "lone_p50": 0.0}, "unknown", "not known"),
        ({"failures": {"status_502": 1}}, "unknown", "not known"),
        ({"work": worked(None, client=None)}, "unknown", "this system does not tell how busy the processes are"),
    ],
)
def test_what_limits_requests(changes: dict[str, Any], limit: str, said: str) -> None:
    verdict = judge_rates(rates(**changes))
    assert said in verdict.text
    assert verdict.limit == limit


@pytest.mark.parametrize(
    ("changes", "limit", "said"),
    [
        ({"work": worked(client=0.99)}, "processor", "the client's processor (99 % of a core)"),
        (
            {"work": worked(3.9, client=0.9 - 1e-9, server=0.8, bench=0.4)},
            "processors",
            "this machine's 4 cores, all busy",
        ),
        ({"failures": {"incomplete_answer": 1}}, "failures", "most of them with incomplete_answer"),
        ({"direct_rate": 22e6}, "backend", "the backend: asked directly, it does 22.0 MB/s"),
        ({"work": worked(lost=0.031)}, "loss", "loss on this machine: 3.1% of the datagrams found no room"),
        (
            {"rate": 80e6, "round_trip": 0.1},
            "window",
            "the window: 8 MiB for each stream, at a round trip of 100.0 ms 83.9 MB/s",
        ),
        ({"on_credit": 0.7, "round_trip": 0.05}, "window", "the window, which has not grown to the distance"),
        ({"on_credit": 0.7}, "reader", "the receiving end, which takes no more: streams waited for credit in 70 %"),
        ({"on_credit": 0.7, "round_trip": None}, "reader", "the receiving end"),
        (
            {"on_path": None, "growth": 1.6},
            "time",
            "the time: it was still growing, 60 % more in the second half than in the first",
        ),
        (
            {"on_path": 0.8, "round_trip": 0.0936, "idle_trip": 0.024},
            "bandwidth",
            "80 % of the moments looked at, and its round trip grew from 24.0 ms to 93.6 ms, so a queue was full on",
        ),
        (
            {"on_path": 0.8, "round_trip": 0.044, "idle_trip": 0.0436},
            "loss",
            "loss on the path: QUIC held bytes back in 80 % of the moments looked at, though its round trip of 43.6 ms",
        ),
        (
            {"on_path": 0.8, "round_trip": 0.07, "idle_trip": 0.044, "work": worked(client=0.2)},
            "path",
            "80 % of the moments looked at; how busy the server is cannot be seen from here",
        ),
        ({"on_path": 0.8, "round_trip": 0.003}, "path", "the path: its bandwidth, or loss on it, for QUIC held bytes"),
        ({"on_path": 0.8, "idle_trip": None, "growth": None}, "path", "the path: its bandwidth, or loss on it"),
        ({}, "unknown", "not known"),
        (
            {"on_credit": None, "on_path": None, "growth": None, "direct_rate": None, "round_trip": None},
            "unknown",
            "not known",
        ),
        ({"work": worked(lost=None)}, "unknown", "not known"),
        ({"rate": 80e6, "round_trip": 0.1, "streams": 8}, "unknown", "not known"),
    ],
)
def test_what_limits_bulk(changes: dict[str, Any], limit: str, said: str) -> None:
    verdict = judge_bulk(bulk(**changes))
    assert said in verdict.text
    assert verdict.limit == limit


shares = st.one_of(st.none(), st.floats(0, 1.5))
works = st.builds(
    Work,
    st.floats(0.01, 100),
    st.dictionaries(st.sampled_from(["server", "client", "backend", "bench"]), shares),
    st.one_of(st.none(), st.floats(0, 64)),
    st.integers(1, 64),
    shares,
)


@given(st.builds(Bulk, st.integers(1, 8), st.floats(0, 1e10), st.just(1), st.just({}), works, *[shares] * 6))
def test_a_busy_processor_is_always_the_first_to_be_named(bulk: Bulk) -> None:
    known = [share for share in bulk.work.processes.values() if share is not None]
    verdict = judge_bulk(bulk)
    assert (verdict.limit == "processor") == (max(known, default=0) >= 0.9)
    assert "\n" not in verdict.text


@given(works, st.floats(0, 1e6), st.floats(0, 10), st.one_of(st.none(), st.floats(0, 1e6)))
def test_a_limit_of_requests_is_always_one_of_the_words(work: Work, rate: float, p50: float, direct: Any) -> None:
    found = judge_rates(rates(work=work, rate=rate, p50=p50, direct_rate=direct))
    assert found.limit in ("processor", "processors", "others", "backend", "connections", "unknown")


# What the system tells

SNMP = """Tcp: RtoAlgorithm RtoMin
Tcp: 1 200
Udp: InDatagrams NoPorts InErrors OutDatagrams RcvbufErrors SndbufErrors InCsumErrors
Udp: 1000 2 3 900 40 2 0
UdpLite: InDatagrams
UdpLite: 0
"""


def test_proc_is_read() -> None:
    assert parse_process("7 (a (b) c) S 1 7 7 0 -1 4 0 0 0 0 250 50 0 0 20", 100) == 3.0
    assert parse_machine("cpu  100 10 50 9000 500 5 5 30 7 7\ncpu0 1 1 1", 100) == 2.0
    assert parse_memory("Name:\tx\nVmHWM:\t  2000 kB\nVmRSS:\t  1000 kB\n") == (1_024_000, 2_048_000)
    assert parse_udp(SNMP) == (1000, 42)
    assert parse_udp("Ip6InReceives 1\nUdp6InDatagrams\t7\nUdp6RcvbufErrors 2\nUdp6SndbufErrors 0\n") == (7, 2)


@pytest.mark.parametrize("text", ["", "nonsense", "cpu x", "Udp: a\nUdp: b", "7 (a) S", "VmRSS:\tx kB"])
def test_what_proc_does_not_tell_is_not_known(text: str) -> None:
    assert parse_process(text, 100) is parse_machine(text, 100) is parse_memory(text) is parse_udp(text) is None


def test_work_is_the_difference_of_two_looks() -> None:
    before = Reading(10.0, {"server": 1.0, "client": None}, 5.0, 100, 0)
    after = Reading(12.0, {"server": 2.5, "client": None}, 8.0, 190, 10)
    assert work(before, after, 2) == Work(2.0, {"server": 0.75, "client": None}, 1.5, 2, 0.1)
    nothing = Reading(12.0, {"server": None}, None, None, None)
    assert work(nothing, nothing, 2)[1:] == ({"server": None}, None, 2, None)


def test_a_process_that_has_ended_is_not_known() -> None:
    gone = Meter({"server": 2**22 + 1, "bench": os.getpid()})
    reading = gone.read()
    assert reading.processes["server"] is None
    assert reading.processes["bench"] is not None
    assert gone.memory("server") is None
    assert gone.names == ["server", "bench"]


def test_without_proc_only_this_process_is_known(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    monkeypatch.setattr(meter, "_PROC", tmp_path)
    reading = Meter({"server": 1, "bench": os.getpid()}).read()
    assert reading.processes["server"] is None
    assert reading.processes["bench"] is not None
    assert reading[2:] == (None, None, None)


# What the client tells of its links


def test_moments_are_shares_of_those_looked_at() -> None:
    before = {"looks": 100, "on_credit": 50, "on_path": 0}
    assert _told(before, {"looks": 200, "on_credit": 60, "on_path": 60}) == (0.1, 0.6)
    assert _told(before, before) == (None, None)


@pytest.mark.parametrize(
    ("most", "rate"), [(9000.0, 1000.0), (2000.0, 1000.0), (1999.0, 500.0), (3.0, 1.0), (0.0, 1.0)]
)
def test_the_fixed_rate_is_one_that_can_be(most: float, rate: float) -> None:
    assert _fixed_rate(most) == rate
    assert rate in RATES


@pytest.mark.parametrize(
    ("backend", "url"),
    [
        ("3000", "http://localhost:3000"),
        ("[::1]:80", "http://[::1]"),
        ("https://app.test", "https://app.test"),
        ("http://app.test:8000", "http://app.test:8000"),
    ],
)
def test_a_backend_is_asked_directly_where_the_client_asks_it(backend: str, url: str) -> None:
    assert _url_of(backend) == url


# What is printed


def loop(*milliseconds: float, **changes: Any) -> Loop:
    latency = Histogram()
    for each in milliseconds:
        latency.add(each / 1000)
    return Loop(**{"rate": 500.0, "answered": len(milliseconds), "latency": latency, "failures": {}} | changes)


def measured(**changes: Any) -> Run:
    values: dict[str, Any] = {
        "engine": "qh3", "place": "this machine", "url": "http://bench.localhost:8080", "seconds": 20.0, "cores": 4,
        "direct": loop(0.1), "direct_rate": 9000.0, "lone": loop(0.5), "rates": [rates(connections=16), rates()],
        "schedule": (500.0, loop(0.6)), "bulk": {("down", 1): bulk(), ("down", 8): bulk(streams=8, rate=30e6),
        ("up", 1): bulk(rate=10e6), ("up", 8): bulk(rate=9e6)}, "round_trip": 0.0002,
        "memory": {"server": (40_000_000, 50_000_000), "client": None, "bench": (30_000_000, 30_000_000)},
    }  # fmt: skip
    return Run(**values | changes)


def test_the_page_has_all_figures() -> None:
    page = as_text(measured())
    lines = [" ".join(line.split()) for line in page.splitlines()]
    assert lines[0] == "qh3, on this machine, 4 cores: http://bench.localhost:8080"
    assert "through the tunnel, 1 connection 0.50 0.50 500" in lines
    assert "64 connections 64.00 100.00 1,000" in lines
    assert "the tunnel adds 0.40 ms to a lone request" in lines
    assert "round trip of the link: 0.20 ms, 1.00 ms under a download" in lines
    assert "down 20.0 30.0" in lines
    assert "up 10.0 9.0" in lines
    assert "CPU us/request 400 300 200" in lines
    assert "resident MB 40 - 30" in lines
    assert "down limited by: not known; the busiest process is the server with 40 % of a core" in lines
    assert not [line for line in page.splitlines() if line != line.rstrip() or len(line) > 110]


def test_the_page_of_a_backend_of_ones_own_has_no_bulk() -> None:
    page = as_text(measured(bulk={}, round_trip=None, place="tunnel.example.com:4433", cores=1))
    assert page.startswith("qh3, to the server at tunnel.example.com:4433: ")
    assert "MB/s" not in page
    assert "round trip" not in page
    assert list(as_json([measured(bulk={})])["runs"][0]["limits"]) == ["requests"]


def test_failures_are_told_by_kind() -> None:
    failing = rates(answered=0, rate=0.0, failures={"status_502": 7})
    run = measured(rates=[failing, failing], schedule=(1.0, loop(failures={"status_502": 1}, late=True)))
    page = as_text(run)
    assert "failed: 15 with status_502" in page
    assert "at a fixed rate, behind schedule" in page
    assert as_json([run])["runs"][0]["rates"][0]["p50_ms"] is None
    assert as_json([run])["runs"][0]["limits"]["requests"]["limit"] == "failures"
