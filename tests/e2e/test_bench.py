"""``quictunnel bench`` as users run it: on one machine, between two, with their own backend, and when it cannot be."""

import json
import signal
import socket
import time
from pathlib import Path
from typing import Any

import pytest

from tests.support.backends import Connection, RawBackend, answer
from tests.support.processes import Process, Processes, Server, poll
from tests.support.relay import UdpRelay
from tests.support.visits import visit

SHORT = ("--duration", "2s", "--json")
LIMIT = 60.0


class Benches:
    """Runs benches, and sees that nothing of them is left."""

    def __init__(self, processes: Processes, directory: Path) -> None:
        self.processes = processes
        self.directory = directory
        directory.mkdir()

    def start(self, *args: str) -> Process:
        return self.processes.start("bench", *args, env={"TMPDIR": str(self.directory)})

    def end(self, process: Process) -> tuple[int, str, str]:
        """Its exit status, and what it printed and said."""
        status = process.exited(LIMIT)
        self.nothing_is_left()
        return status, process.output, process.log

    def nothing_is_left(self) -> None:
        poll(lambda: not self.children(), 10.0, "the bench's processes have ended")
        assert list(self.directory.iterdir()) == []

    def run(self, *args: str) -> tuple[int, str, str]:
        return self.end(self.start(*args))

    def measured(self, *args: str) -> dict[str, Any]:
        """The JSON of one that works, its one run."""
        status, output, log = self.run(*SHORT, *args)
        assert (status, log) == (0, ""), log
        [run] = json.loads(output)["runs"]
        found: dict[str, Any] = run
        return found

    def refused(self, *args: str) -> str:
        """The one line of one that cannot measure."""
        status, output, log = self.run(*SHORT, *args)
        assert (status, output) == (1, ""), log
        [line] = log.splitlines()
        assert line.startswith("quictunnel: ")
        return line.removeprefix("quictunnel: ")

    def children(self) -> list[int]:
        """The processes that benches of this directory have started and that still run."""
        found = []
        for entry in Path("/proc").iterdir():
            try:
                command = (entry / "cmdline").read_bytes() if entry.name.isdigit() else b""
                if b"quictunnel.app.bench_child" in command and self._is_ours(entry):
                    found.append(int(entry.name))
            except OSError:
                continue
        return found

    def _is_ours(self, entry: Path) -> bool:
        return f"TMPDIR={self.directory}".encode() in (entry / "environ").read_bytes().split(b"\0")


@pytest.fixture
def benches(processes: Processes, tmp_path: Path) -> Benches:
    return Benches(processes, tmp_path / "tmp")


def looks_right(run: dict[str, Any], *names: str) -> None:
    """The figures are such as can be, and the processes of these names are known."""
    assert 0 < run["lone"]["p50_ms"] <= run["lone"]["p99_ms"]
    assert run["lone"]["rate"] > 0
    assert run["direct"]["rate_64"] > 0
    assert [each["connections"] for each in run["rates"]] == [16, 64]
    assert all(each["rate"] > 0 and each["failures"] == {} for each in run["rates"])
    assert run["schedule"]["asked_rate"] > 0
    assert run["round_trip_ms"] > 0
    assert set(run["memory"]) == set(names)
    assert all(found["peak_bytes"] >= found["resident_bytes"] > 2**20 for found in run["memory"].values())
    for each in (*run["rates"], *run["bulk"]):
        assert set(each["cpu"]) == {*names, "machine"}


def totals(server: Server) -> dict[str, int]:
    """What the server says of itself."""
    told = server.processes.run("status", "--json", "--state-dir", str(server.state))
    found: dict[str, int] = json.loads(told.stdout)["totals"]
    return found


def test_a_tunnel_on_one_machine_is_measured_and_nothing_is_left(benches: Benches) -> None:
    run = benches.measured("--duration", "1s")
    looks_right(run, "server", "client", "backend", "bench")
    assert run["server"] == "this machine"
    assert [(each["direction"], each["streams"]) for each in run["bulk"]] == [
        ("down", 1), ("down", 8), ("up", 1), ("up", 8),
    ]  # fmt: skip
    assert all(each["bytes"] > 0 and each["failures"] == {} for each in run["bulk"])
    assert set(run["limits"]) == {"requests", "down", "up"}
    assert not (benches.processes.directory / ".local").exists()


@pytest.mark.slow
def test_both_engines_are_measured_one_after_the_other(benches: Benches) -> None:
    status, output, log = benches.run("--duration", "2s", "--engine", "both")
    assert (status, log) == (0, "")
    assert [line.partition(",")[0] for line in output.splitlines() if "on this machine" in line] == ["aioquic", "qh3"]
    assert output.count("requests limited by: ") == output.count("through the tunnel, 1 connection ") == 2


# Between two machines


@pytest.mark.slow
def test_the_way_to_a_server_is_measured(engine: str, processes: Processes, benches: Benches) -> None:
    server = processes.server(engine=engine)
    run = benches.measured("--join", server.join, "--engine", engine)
    looks_right(run, "client", "backend", "bench")
    assert run["server"] == f"127.0.0.1:{server.quic_port}"
    assert len(run["bulk"]) == 4
    poll(lambda: totals(server)["sessions"] == totals(server)["visitors"] == 0, 10.0, "it has left the server")


@pytest.mark.slow
def test_a_server_of_several_processes_is_measured(processes: Processes, benches: Benches) -> None:
    server = processes.server("--workers", "2")
    looks_right(benches.measured("--join", server.join), "client", "backend", "bench")


@pytest.mark.slow
def test_a_public_url_by_tls_of_the_servers_own_ca_is_trusted(processes: Processes, benches: Benches) -> None:
    server = processes.server("--https", "127.0.0.1:0")
    run = benches.measured("--join", server.join)
    assert run["url"].startswith("https://")
    looks_right(run, "client", "backend", "bench")


@pytest.mark.slow
def test_a_public_url_that_leads_nowhere_is_said_and_has_a_way_round(processes: Processes, benches: Benches) -> None:
    server = processes.server("--domain", "tunnel.invalid")
    said = benches.refused("--join", server.join)
    assert "cannot be reached from here" in said
    assert said.endswith("Give --via HOST:PORT, where the server takes visitors in")
    run = benches.measured("--join", server.join, "--via", f"{server.http[0]}:{server.http[1]}")
    assert ".tunnel.invalid" in run["url"]
    looks_right(run, "client", "backend", "bench")
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    assert "Is --via right?" in benches.refused("--join", server.join, "--via", f"127.0.0.1:{port}")


@pytest.mark.slow
def test_bulk_transfers_keep_within_max_bytes(processes: Processes, benches: Benches) -> None:
    server = processes.server()
    run = benches.measured("--join", server.join, "--max-bytes", "1MB")
    moved = {way: sum(each["bytes"] for each in run["bulk"] if each["direction"] == way) for way in ("down", "up")}
    assert all(0 < count <= 1_000_000 for count in moved.values())


@pytest.mark.slow
def test_a_distant_server_is_limited_by_connections_and_its_round_trip_told(
    engine: str, processes: Processes, benches: Benches
) -> None:
    server = processes.server(engine=engine)
    with UdpRelay(server.quic_port, delay=0.06) as relay:
        run = benches.measured("--join", server.join, "--server", relay.address, "--engine", engine, "--duration", "8s")
    assert 115 < run["round_trip_ms"] < 400
    assert run["limits"]["requests"]["limit"] in ("connections", "processors", "others")
    assert run["server"] == relay.address


# What is in the way


@pytest.mark.slow
def test_a_revoked_token_is_refused_in_one_line(processes: Processes, benches: Benches) -> None:
    server = processes.server()
    token = server.token("*")
    server.revoke(token)
    said = benches.refused("--join", server.join, "--token", token)
    assert said.startswith("the server refuses: token ")
    assert "was revoked" in said


@pytest.mark.slow
def test_a_tunnel_in_use_is_left_alone(engine: str, processes: Processes, benches: Benches) -> None:
    with RawBackend(answer(200, b"the app")) as backend:
        tunnel = processes.tunnel(backend.target, (engine, engine), name="app")
        bench = benches.start(*SHORT, "--join", tunnel.server.join, "--tunnel", "app", "--engine", engine)
        while bench.running:
            found = visit(tunnel.address)
            assert (found.status, found.body) == (200, b"the app")
        status, _, log = benches.end(bench)
    assert status == 1
    assert "the tunnel app has other clients" in log


@pytest.mark.slow
def test_a_name_that_is_somebodys_is_not_taken_unasked(processes: Processes, benches: Benches) -> None:
    """Whose client is away just now must not find the bench in its place."""
    server = processes.server()
    token = server.token("app")
    said = benches.refused("--join", server.join, "--token", token)
    assert said.startswith("the token is for the tunnel app and no other, so the bench would take its place")
    assert benches.measured("--join", server.join, "--token", token, "--tunnel", "app")["url"].startswith("http://app.")


@pytest.mark.slow
def test_a_server_that_never_answers_is_given_up(benches: Benches, processes: Processes) -> None:
    server = processes.server()
    server.process.kill()
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as silent:
        silent.bind(("127.0.0.1", 0))
        port = silent.getsockname()[1]
        said = benches.refused("--join", server.join, "--server", f"127.0.0.1:{port}")
    assert said.startswith("the server did not take the bench's client within 15 s: cannot reach the server at ")


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
@pytest.mark.parametrize("after", [0.0, 0.5, 3.0])
def test_an_interrupted_bench_leaves_nothing(
    number: signal.Signals, after: float, processes: Processes, benches: Benches
) -> None:
    server = processes.server()
    bench = benches.start("--duration", "30s", "--join", server.join)
    poll(benches.children, 15.0, "it has begun")
    time.sleep(after)
    bench.signal(number)
    status = bench.exited(20.0)
    poll(lambda: not benches.children(), 10.0, "its processes have ended")
    assert bench.output == ""
    assert "Traceback" not in bench.log
    if number != signal.SIGKILL:
        assert status in ((130,) if number == signal.SIGINT else (143, -signal.SIGTERM))
        assert list(benches.directory.iterdir()) == []
    poll(lambda: totals(server)["sessions"] == 0, 10.0, "it has left the server")


# A backend of one's own


def slow(connection: Connection) -> None:
    while connection.head():
        time.sleep(0.05)
        connection.answer(200, b"at last")


@pytest.mark.slow
def test_a_slow_backend_is_the_limit(benches: Benches) -> None:
    with RawBackend(slow) as backend:
        run = benches.measured("--backend", backend.target, "--path", "/healthz?deep=1")
        assert {head.split(b" ")[1] for head in backend.requests} == {b"/healthz?deep=1"}
    looks_right(run, "server", "client", "bench")
    assert run["bulk"] == []
    assert run["lone"]["p50_ms"] >= 50
    assert run["limits"]["requests"]["limit"] in ("backend", "processors", "others")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("handler", "said"),
    [
        (lambda connection: connection.gone(), "the backend gave no answer within 10 s: http://127.0.0.1:"),
        (lambda connection: connection.reset(), "the backend http://127.0.0.1:"),
        (answer(500), "is answered with status 500; give --path PATH that is answered well"),
        (lambda connection: connection.send(b"SSH-2.0-x\r\n"), "what answers there does not speak HTTP"),
    ],
    ids=["silent", "reset", "status 500", "no HTTP"],
)
def test_a_backend_that_cannot_be_measured_is_one_line(handler: Any, said: str, benches: Benches) -> None:
    with RawBackend(handler) as backend:
        assert said in benches.refused("--backend", backend.target)


def test_no_backend_is_one_line(benches: Benches) -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    said = benches.refused("--backend", str(port))
    assert said == f"the backend http://localhost:{port}/: Connection refused"
