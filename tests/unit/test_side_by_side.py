"""The side-by-side benchmark's own parts: what it makes of the load generators' words, what it writes, what it asks."""

import asyncio
import os
import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from benchmarks.sidebyside import nginx, peers
from benchmarks.sidebyside.__main__ import main, shown
from benchmarks.sidebyside.axes import AXES
from benchmarks.sidebyside.bench import Bench, Places, Scale, quick
from benchmarks.sidebyside.figures import Block, Case, Sample, View, ratios, spread
from benchmarks.sidebyside.lines import Line, Lines
from benchmarks.sidebyside.loads import Found, in_milliseconds, parse_h2load, parse_open_loop, parse_wrk
from benchmarks.sidebyside.peers import Bore, Chisel, Frp, Peer, Piko, Place, Quictunnel, Rathole, Setup, chosen
from benchmarks.sidebyside.processes import ROOT, Process, Trouble, none_left, tidy
from benchmarks.sidebyside.report import Results, as_markdown, read, write
from benchmarks.sidebyside.visitors import Target, Visitor, answered, held, parse_head, transfer
from tests.support.processes import poll

WRK = """\
Running 1s test @ http://127.0.0.1:44957/nix
  1 threads and 4 connections
  Thread Stats   Avg      Stdev     Max   +/- Stdev
    Latency     5.13ms   12.59ms  94.25ms   93.49%
    Req/Sec     4.96k     4.26k   11.57k    70.00%
  Latency Distribution
     50%  175.00us
     75%    4.38ms
     90%   12.72ms
     99%    1.06s
  5000 requests in 1.11s, 1.48MB read
  Socket errors: connect 0, read 2, write 0, timeout 3
  Non-2xx or 3xx responses: 1000
Requests/sec:   4500.00
Transfer/sec:      1.33MB
"""

H2LOAD = """\
finished in 1.02s, 4.00 req/s, 282.39KB/s
requests: 4 total, 8 started, 4 done, 3 succeeded, 1 failed, 0 errored, 0 timeout
status codes: 3 2xx, 0 3xx, 1 4xx, 0 5xx
time for request:       98us     37.42ms      4.56ms      7.10ms    85.28%
"""
H2LOAD_LOG = (
    "1795669096494036\t200\t1000\n1795669096494038\t200\t2000\n1795669096494039\t404\t9\n1795669096494040\t200\t3000\n"
)


# What the load generators say


@pytest.mark.parametrize(
    ("text", "milliseconds"), [("740.00us", 0.74), ("2.22ms", 2.22), ("1.06s", 1060.0), ("1.50m", 90_000.0)]
)
def test_times_of_wrk_are_milliseconds(text: str, milliseconds: float) -> None:
    assert in_milliseconds(text) == pytest.approx(milliseconds)


def test_answers_with_another_status_are_no_requests_for_wrk() -> None:
    found = parse_wrk(WRK)
    assert found.values == pytest.approx({"requests_per_s": 3600.0, "requests": 4000.0, "p50": 0.175, "p99": 1060.0})
    assert found.errors == {"status": 1000, "read": 2, "timeout": 3}


def test_wrk_without_an_answer_is_trouble() -> None:
    with pytest.raises(Trouble, match=r"not one answer .*'status': 5000"):
        parse_wrk(WRK.replace("responses: 1000", "responses: 5000"))
    with pytest.raises(Trouble, match="says nothing"):
        parse_wrk("unable to connect")


def test_h2load_counts_an_answer_with_another_status_once() -> None:
    found = parse_h2load(H2LOAD, H2LOAD_LOG)
    assert found.values == {"requests_per_s": 3.0, "requests": 3.0, "p50": 2.0, "p99": pytest.approx(2.98)}
    assert found.errors == {"status 404": 1}


def test_h2load_without_an_answer_is_trouble() -> None:
    with pytest.raises(Trouble, match=r"not one answer .*'failed': 1"):
        parse_h2load(H2LOAD, "")
    with pytest.raises(Trouble, match="says nothing"):
        parse_h2load("", "")


def test_an_open_loop_that_was_late_says_so() -> None:
    stage = (
        '{"achieved_rate": 99.5, "succeeded": 199, "failures": {"response_timeout": 1}, "fell_behind": true, '
        '"latency_ms": {"p50": 1.5, "p99": 7.25}}'
    )
    found = parse_open_loop(f'{{"stages": [{stage}]}}')
    assert found.values == {"requests_per_s": 99.5, "requests": 199.0, "p50": 1.5, "p99": 7.25, "behind": 1.0}
    assert found.errors == {"response_timeout": 1}


@pytest.mark.parametrize("out", ["", "{}", '{"stages": []}', '{"stages": [{"latency_ms": null, "failures": {}}]}'])
def test_an_open_loop_without_figures_is_trouble(out: str) -> None:
    with pytest.raises(Trouble):
        parse_open_loop(out)


def test_a_head_tells_status_and_length() -> None:
    assert parse_head(b"HTTP/1.1 200 OK\r\ncontent-length: 100\r\nA: b") == (200, 100)
    assert parse_head(b"HTTP/1.1 101 Switching Protocols") == (101, -1)
    with pytest.raises(Trouble, match="no HTTP answer"):
        parse_head(b"SSH-2.0-chisel")


# Figures


def samples(peer: str, *values: float, case: str = "c", **more: Any) -> list[Sample]:
    return [Sample(peer, case, number, {"v": value}, **more) for number, value in enumerate(values)]


def test_ratios_are_within_each_repeat() -> None:
    """A repeat in which everything was slow says as much of the ratio as the others."""
    base = samples("nginx", 100, 10, 100)
    found = ratios(samples("x", 50, 5, 70), base, "v")
    assert found is not None
    assert (found.median, found.least, found.most, found.count) == (0.5, 0.5, 0.7, 3)


def test_a_repeat_without_the_baseline_has_no_ratio() -> None:
    found = ratios(samples("x", 50, 5), [Sample("nginx", "c", 0, failed="gone"), *samples("nginx", 10, 10)[1:]], "v")
    assert found is not None
    assert (found.median, found.count) == (0.5, 1)
    assert ratios(samples("x", 1), [], "v") is None


def test_the_spread_leaves_failures_out() -> None:
    found = spread([*samples("x", 3, 1, 2), Sample("x", "c", 3, failed="hung")], "v")
    assert found is not None
    assert (found.median, found.least, found.most, found.count) == (2, 1, 3, 3)
    assert spread([Sample("x", "c", 0, failed="hung")], "v") is None


# Turns


class Says(Bench):
    """A run that keeps what it says to itself."""

    def say(self, text: str) -> None:
        pass


def bench_of(names: str, directory: Path, **scale: Any) -> Bench:
    return Says(chosen(names), Scale(**scale), directory)


def test_peers_take_turns_and_each_repeat_begins_with_the_next(tmp_path: Path) -> None:
    bench = bench_of("direct,nginx,bore", tmp_path)
    block = Block("a", "A", "", [])
    bench.begin(block, [Case("c", "g", "l")], repeats=3)
    bench.turns(block, block.cases, bench.peers, lambda peer, case: Found({"v": 1.0}))
    order = [sample.peer for sample in block.samples]
    assert order == ["direct", "nginx", "bore", "nginx", "bore", "direct", "bore", "direct", "nginx"]


def test_a_peer_that_fails_twice_is_left_alone_in_that_case(tmp_path: Path) -> None:
    bench = bench_of("direct,bore", tmp_path)
    block = Block("a", "A", "", [])
    bench.begin(block, [Case("c", "g", "l"), Case("d", "g", "l")], repeats=4)

    def measure(peer: Any, case: Case) -> Found:
        if peer.name == "bore" and case.name == "c":
            raise TimeoutError("timed out")
        return Found({"v": 1.0})

    bench.turns(block, block.cases, bench.peers, measure)
    assert [sample.failed for sample in block.of("bore", "c")] == ["timed out"] * 2
    assert len(block.of("direct", "c")) == len(block.of("bore", "d")) == 4


def test_a_refused_peer_is_not_asked(tmp_path: Path) -> None:
    bench = bench_of("direct,bore", tmp_path)
    block = Block("a", "A", "", [])
    bench.begin(block, [Case("c", "g", "l")], repeats=1)
    block.refuse("bore", "cannot: TCP", "c")
    bench.turns(block, block.cases, bench.peers, lambda peer, case: Found({"v": 1.0}))
    assert [sample.peer for sample in block.samples] == ["direct"]


def test_a_peer_that_does_not_start_is_named_with_its_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its program is there, but ends at once."""
    program = tmp_path / "bore"
    program.write_text("#!/bin/sh\necho it is Monday\nexit 3\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    bench = bench_of("bore", tmp_path)
    block = Block("a", "A", "", [])
    bench.begin(block, [Case("c", "g", "l")])
    with bench.placed(block, 1, [("/", 100)]) as places:
        assert not list(places)
    assert block.reason("bore", "c") == "did not start: bore ended with status 3: it is Monday"


class Sleeper(Peer):
    """A peer that does nothing but be there: its visitors go to the backend."""

    name, label, about = "sleeper", "sleeper", ""
    has_client = False

    def serve(self, place: Place) -> None:
        place.server = place.start("server", (sys.executable, "-ISc", "import time; time.sleep(60)"))


def test_a_peer_that_has_ended_is_started_again_when_it_is_wanted(tmp_path: Path, backend: Target) -> None:
    peer = Sleeper()
    with Places(Says([peer], Scale(), tmp_path), backend.port, [("/", 100)], 0) as places:
        first = places.start(peer).server
        assert first is not None
        assert places[peer].server is first
        first.stop()
        second = places[peer].server
        assert second is not None
        assert second.running
    assert not second.running


def test_what_an_interruption_leaves_running_is_ended(tmp_path: Path) -> None:
    with Process((sys.executable, "-ISc", "import time; time.sleep(60)"), tmp_path / "other") as other:
        with pytest.raises(KeyboardInterrupt), none_left():
            left = Process((sys.executable, "-ISc", "import time; time.sleep(60)"), tmp_path / "left")
            raise KeyboardInterrupt
        assert not left.running
        assert other.running


def test_an_interrupted_axis_keeps_its_samples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bench = bench_of("bore", tmp_path)
    axis = AXES["start"]

    def interrupted(bench: Bench, block: Block) -> None:
        block.samples += samples("bore", 5)
        raise KeyboardInterrupt

    monkeypatch.setattr(axis, "measure", interrupted)
    blocks: dict[str, Block] = {}
    with pytest.raises(KeyboardInterrupt):
        axis.run(bench, blocks)
    assert len(blocks["start"].samples) == 1


# The report


def results_of(*blocks: Block) -> Results:
    names = ("direct", "nginx", "x", "gone")
    peers = {name: {"label": name.title(), "about": "a", "version": "1", "missing": ""} for name in names}
    peers["gone"]["missing"] = "x not on PATH"
    machine = {"processor": "P", "processors": 2, "memory_gb": 1, "kernel": "Linux 6"}
    return Results("2026-01-01", machine, {"wrk": "4"}, "--quick", peers, {block.name: block for block in blocks})


def block_of(*found: Sample, cases: int = 2, repeats: int = 2) -> Block:
    block = Block("a", "An axis", "How.", [View("rate", ("v",), ratio=True)], samples=list(found), repeats=repeats)
    block.cases = [Case("c", "g", "one"), Case("d", "g", "two")][:cases]
    block.peers = ["nginx", "x", "gone"]
    block.refuse("gone", "x not on PATH")
    return block


def row(text: str, first: str) -> list[str]:
    """The cells of the last row that begins so."""
    found = [line for line in text.splitlines() if line.startswith(f"| {first} |")]
    return [cell.strip() for cell in found[-1].strip("|").split("|")]


def test_a_cell_has_median_range_and_ratio() -> None:
    found = as_markdown(results_of(block_of(*samples("nginx", 1000, 2000), *samples("x", 500, 500))))
    assert row(found, "X")[1] == "500 (500-500) [0.38]"
    assert row(found, "Nginx")[1] == "1,500 (1,000-2,000)"


def test_what_failed_is_in_the_cell_and_its_reason_below() -> None:
    block = block_of(*samples("x", 7, errors={"timeout": 3}), Sample("x", "c", 1, failed="it hung"),
                     Sample("x", "d", 0, failed="it went away"))  # fmt: skip
    found = as_markdown(results_of(block))
    assert row(found, "X")[1:] == ["7; 3 timeout; 1 of 2 failed", "failed"]
    assert "- X: failed: it hung" in found
    assert "- X: failed: it went away" in found


def test_who_cannot_says_so_in_the_cell() -> None:
    block = block_of(*samples("nginx", 1))
    block.refuse("x", "cannot: loss is put on datagrams", "d")
    found = as_markdown(results_of(block))
    assert row(found, "X")[1:] == ["not measured", "cannot"]
    assert "- X: cannot: loss is put on datagrams" in found


def test_who_is_missing_is_named() -> None:
    found = as_markdown(results_of(block_of(*samples("nginx", 1))))
    assert row(found, "Gone")[-1] == "x not on PATH"
    assert "Not there: Gone." in found


def test_an_axis_that_could_not_be_measured_is_named() -> None:
    results = results_of()
    results.unmeasured["requests"] = "wrk not on PATH"
    assert "**requests** was not measured: wrk not on PATH." in as_markdown(results)


def test_a_cut_transfer_and_a_late_load_are_marked() -> None:
    found = as_markdown(results_of(block_of(Sample("x", "c", 0, {"v": 3.0, "whole": 0.0, "behind": 1.0}), cases=1)))
    assert row(found, "X")[1] == "3; cut; load fell behind"


def test_results_are_read_as_they_were_written(tmp_path: Path) -> None:
    results = results_of(block_of(*samples("nginx", 1, 2, errors={"status": 1}, load=3.5)))
    write(results, tmp_path)
    assert read(tmp_path / "latest.json") == results
    (tmp_path / "latest.json").write_text("{}")
    with pytest.raises(ValueError, match="no result of this"):
        read(tmp_path / "latest.json")


def test_a_log_line_is_fit_to_be_published(tmp_path: Path) -> None:
    said = tidy(f"\x1b[31mERR\x1b[0m   cannot open {tmp_path}/frps.toml | {Path.home()}/x", length=60)
    assert said.startswith("ERR cannot open frps.toml / ")
    assert str(tmp_path) not in said
    assert len(tidy("x" * 500)) == 160


def test_the_place_of_the_results_is_not_published() -> None:
    assert shown(["--quick", "--out", "/home/me", "--only", "start"]) == "--quick --only start"
    assert shown(["--out=/home/me"]) == ""


# Peers


def test_peers_are_chosen_by_name_and_by_what_several_begin_with() -> None:
    assert [peer.name for peer in chosen("nginx, frp")] == ["nginx", "frp-tcp", "frp-quic"]
    assert [peer.name for peer in chosen("quictunnel-qh3")] == ["quictunnel-qh3"]
    assert len(chosen("quictunnel")) == 6
    assert [peer.name for peer in chosen("quictunnel-qh3-2-plain")] == ["quictunnel-qh3-2-plain"]
    (peer,) = chosen("quictunnel-aioquic-1+3")
    assert isinstance(peer, Quictunnel)
    assert (peer.engine, peer.workers, peer.processes) == ("aioquic", 1, 3)
    with pytest.raises(ValueError, match="no peer 'ngrok'"):
        chosen("nginx,ngrok")


def test_a_peer_whose_program_is_missing_says_which(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    assert Frp("tcp").lacks() == "frps and frpc not on PATH (github.com/fatedier/frp)"
    assert Quictunnel("aioquic", plain=True).lacks() == ""
    assert "xquic is not installed" in Quictunnel("xquic").lacks()


def test_what_is_installed_is_measured_compiled_or_missed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "COMPILED", tmp_path / "none")
    assert "could not be compiled" in Quictunnel("aioquic").lacks()
    monkeypatch.setattr(peers, "COMPILED", tmp_path)
    assert Quictunnel("aioquic").lacks() == ""
    assert Quictunnel("aioquic").command("serve")[:2] == ["env", f"PYTHONPATH={tmp_path}"]
    assert Quictunnel("aioquic", plain=True).command("serve")[0] == sys.executable


def test_frp_is_told_its_transport_and_its_virtual_host() -> None:
    server = tomllib.loads(Frp("quic").serve_config(7000, 8080))
    client = tomllib.loads(Frp("quic").connect_config(7001, 3000))
    assert (server["bindPort"], server["quicBindPort"], server["vhostHTTPPort"]) == (7000, 7000, 8080)
    assert (client["serverPort"], client["transport"]["protocol"]) == (7001, "quic")
    assert client["proxies"] == [
        {"name": "bench", "type": "http", "localIP": "127.0.0.1", "localPort": 3000, "customDomains": ["127.0.0.1"]}
    ]
    assert server["auth"] == client["auth"]


def test_rathole_is_told_the_same_service_on_both_ends() -> None:
    server = tomllib.loads(Rathole().serve_config(2333, 8080))["server"]
    client = tomllib.loads(Rathole().connect_config(2334, 3000))["client"]
    assert (server["bind_addr"], client["remote_addr"]) == ("127.0.0.1:2333", "127.0.0.1:2334")
    assert server["services"] == {"bench": {"bind_addr": "127.0.0.1:8080"}}
    assert client["services"] == {"bench": {"local_addr": "127.0.0.1:3000"}}
    assert server["default_token"] == client["default_token"]


def test_the_others_are_told_by_their_arguments() -> None:
    assert Bore().serve_command("127.83.53.2", 8080)[-2:] == ["--max-port", "8080"]
    assert Bore().connect_command("127.83.53.2", 8080, 3000)[2] == "3000"
    assert Chisel().connect_command(7000, 8080, 3000)[-1] == "R:127.0.0.1:8080:127.0.0.1:3000"
    assert "127.0.0.1:3000" in Piko().connect_command(7000, 3000, 9000)
    assert "--proxy.bind-addr" in Piko().serve_command(1, 2, 3, 4)


def test_every_option_that_quictunnel_is_given_is_one(tmp_path: Path) -> None:
    known = (ROOT / "docs" / "cli.md").read_text()
    peer = Quictunnel("qh3", 2, 2)
    given = [*peer.serve_command(tmp_path, 10_000), *peer.connect_command(tmp_path, 4433, 3000, 10_000)]
    options = {word for word in given if word.startswith("--")}
    assert {"--workers", "--processes", "--max-links", "--max-visitors"} <= options
    assert [option for option in options if f"`{option} " not in known] == []


def test_nginx_keeps_its_connections_and_writes_nothing_to_the_disk(tmp_path: Path) -> None:
    config = nginx.proxy_config(tmp_path, 8080, 3000, connections=10_000)
    assert "worker_processes 1;" in config
    assert re.search(r"server 127\.0\.0\.1:3000; keepalive \d+", config)
    assert "proxy_request_buffering off" in config
    connections = re.search(r"worker_connections (\d+)", config)
    assert connections is not None
    assert int(connections[1]) > 2 * 10_000 * 16 / 15, "nginx closes what idles when less than a sixteenth is left"
    assert config.count("{") == config.count("}")


# The whole, without programs


def test_without_any_program_all_is_named_and_the_status_is_1(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", "")
    assert main(["--only", "requests,http2,cost", "--peers", "nginx,bore,frp", "--out", str(tmp_path)]) == 1
    told = capsys.readouterr().err
    assert "requests: wrk and nginx not on PATH (Debian: apt install wrk nginx-light)" in told
    assert "http2: h2load and nginx not on PATH" in told
    assert "bore: bore not on PATH (cargo install bore-cli)" in told
    found = read(tmp_path / "latest.json")
    assert sorted(found.unmeasured) == ["cost", "http2", "requests"]
    assert found.peers["frp-quic"]["missing"].startswith("frps and frpc not on PATH")
    assert "**cost** was not measured" in (tmp_path / "latest.md").read_text()


def test_other_axes_are_kept_when_that_is_wished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    write(results_of(block_of(*samples("nginx", 1, 2))), tmp_path)
    options = ["--only", "requests", "--peers", "bore", "--out", str(tmp_path)]
    assert main([*options, "--merge"]) == 1, "nothing was measured now"
    kept = read(tmp_path / "latest.json")
    assert len(kept.blocks["a"].samples) == 2
    assert {"x", "bore"} <= kept.peers.keys()
    assert main(options) == 1
    assert read(tmp_path / "latest.json").blocks == {}


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--only", "speed"], "no axis 'speed'"),
        (["--peers", "ngrok"], "no peer 'ngrok'"),
        (["--repeats", "0"], "less than 1"),
    ],
)
def test_options_that_are_none_are_refused(options: list[str], told: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(options)
    assert ended.value.code == 2
    assert told in capsys.readouterr().err


def test_every_axis_has_cases_of_different_names_in_both_scales() -> None:
    for scale in (Scale(), quick(Scale())):
        for axis in AXES.values():
            names = [case.name for case in axis.cases(scale)]
            assert names, axis.name
            assert len(names) == len(set(names)), axis.name
            assert axis.seconds(scale) > 0


# Visitors of real sockets


@pytest.fixture(scope="module")
def backend(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Target]:
    """benchmarks/backend.py, which answers at once."""
    command = (sys.executable, str(ROOT / "benchmarks" / "backend.py"), "0", "0")
    with Process(command, tmp_path_factory.mktemp("backend") / "out") as process:
        yield Target(int(process.said(r"^ready \S+:(\d+)$")[1]))


def test_an_answer_of_another_size_is_trouble(backend: Target) -> None:
    with Visitor(backend) as visitor:
        first, last = visitor.ask("/", 100)
        assert 0 < first <= last
        with pytest.raises(Trouble, match="100 bytes instead of 99"):
            visitor.ask("/", 99)


def test_a_wrong_answer_is_waited_out_and_then_told(backend: Target) -> None:
    with pytest.raises(Trouble, match=r"no right answer within 0\.02 s: an answer of 100 bytes"):
        answered(backend, "/", 5, limit=0.02)


def test_uploads_are_counted_by_the_backend(backend: Target) -> None:
    found = transfer(backend, "/sink", 300_000, count=3, limit=10.0, sink=backend)
    assert (found.bytes, found.whole) == (900_000, True)


def test_a_transfer_that_fails_is_not_measured(backend: Target) -> None:
    with pytest.raises(Trouble, match="100 bytes instead of 5000"):
        transfer(backend, "/", 5000, count=2, limit=5.0)


@pytest.mark.parametrize("sockets", [True, False], ids=["sockets", "polls"])
def test_visitors_that_wait_are_all_answered_at_the_end(backend: Target, sockets: bool) -> None:
    async def hold() -> tuple[int, int]:
        async with held(backend, backend, 20, sockets=sockets, limit=10.0) as found:
            opened = found.opened
        assert not found.why
        return opened, found.survived

    assert asyncio.run(hold()) == (20, 20)


def test_visitors_that_are_not_let_in_are_counted_by_reason() -> None:
    """Nobody listens there."""
    closed = Target(1)

    async def hold() -> Any:
        async with held(closed, closed, 3, sockets=True, limit=10.0) as found:
            pass
        return found

    found = asyncio.run(hold())
    assert (found.opened, found.survived, found.why.total()) == (0, 0, 3)


def test_a_line_holds_a_handshake_and_a_request_back_by_a_round_trip_each(backend: Target) -> None:
    with Lines(Line(0.02)) as lines, Visitor(Target(lines.tcp(backend.port))) as visitor:
        cold, warm = visitor.ask("/", 100)[0], visitor.ask("/", 100)[0]
    assert cold >= 0.04
    assert warm >= 0.02


def test_loss_cannot_be_put_on_tcp(backend: Target) -> None:
    with Lines(Line(0.0, loss=0.01)) as lines, pytest.raises(Trouble, match="only be put on datagrams"):
        lines.tcp(backend.port)


def test_a_process_counts_what_its_children_use(tmp_path: Path) -> None:
    """Those that are over too."""
    work = "import time\nwhile time.process_time() < 0.1: pass\nprint('done', flush=True)"
    code = f"import subprocess, sys, time; subprocess.run([sys.executable, '-ISc', {work!r}]); time.sleep(60)"
    with Process((sys.executable, "-ISc", code), tmp_path / "out") as process:
        process.said("^done$")
        poll(lambda: len(process.tree()) == 1, what="its child has ended")
        assert process.cpu() >= 0.1
        assert process.memory().resident > 1
    assert not process.running


@pytest.mark.slow
def test_each_plot_is_a_picture(tmp_path: Path) -> None:
    """It is the import of matplotlib that is slow."""
    pytest.importorskip("matplotlib")
    from benchmarks.sidebyside.plots import DRAWN, plot

    results = results_of()
    for name in DRAWN:
        block = Block(name, name, "", [], AXES[name].cases(Scale()))
        keys = {key for view in AXES[name].views for key in view.keys}
        for case in block.cases:
            for repeat in range(3):
                block.samples.append(Sample("nginx", case.name, repeat, dict.fromkeys(keys, 10.0 + repeat)))
        results.blocks[name] = block
    made = plot(results, tmp_path)
    assert [path.stem for path in made] == list(DRAWN)
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in made)


# With real peers


@pytest.mark.slow
def test_a_quick_run_measures_the_tunnel(tmp_path: Path) -> None:
    """The axes that need no program but quictunnel itself."""
    names = "direct,quictunnel-qh3-plain,quictunnel-aioquic-2-plain"
    options = ["--quick", "--only", "distance,idle,start", "--peers", names, "--idle", "50"]
    assert main([*options, "--out", str(tmp_path)]) == 0
    found = read(tmp_path / "latest.json")
    for block in found.blocks.values():
        assert not [sample for sample in block.samples if sample.failed or sample.errors]
        for case in block.cases:
            assert block.of("quictunnel-qh3-plain", case.name)[0].values
    idle = found.blocks["idle"].of("quictunnel-aioquic-2-plain", "polls")[0].values
    assert (idle["opened"], idle["stayed"]) == (50, 50)
    far = found.blocks["distance"].of("quictunnel-qh3-plain", "50")[0].values
    assert far["warm"] >= 50


def test_a_bare_tunnel_passes_requests_on_each_engine(tmp_path: Path, backend: Target) -> None:
    """So what it is compared by is a tunnel; another answer is Trouble."""
    for peer in chosen("bare"):
        with (
            peer.placed(Setup(tmp_path / peer.name, backend.port), "/", 100) as place,
            Visitor(place.target) as visitor,
        ):
            for _ in range(3):
                visitor.ask("/", 100)
            place.alive()
