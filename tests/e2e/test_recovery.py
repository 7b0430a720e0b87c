"""Ends that go away, by kill -9 and by SIGTERM, and what the others do about it."""

import re
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.support.backends import Connection, RawBackend, answer
from tests.support.processes import Processes, free_udp_port, poll
from tests.support.visits import Answer, RawVisitor, visit

pytestmark = pytest.mark.either


@pytest.fixture
def processes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Processes]:
    with Processes(tmp_path_factory.mktemp("processes")) as processes:
        yield processes


def serves(address: tuple[str, int], host: str = "app.localhost") -> Callable[[], bool]:
    def ask() -> bool:
        try:
            return visit(address, host=host, limit=2.0).status == 200
        except OSError:
            return False

    return ask


@pytest.mark.slow
def test_client_killed_and_started_again_serves_at_once(engine: str, processes: Processes) -> None:
    with RawBackend(answer()) as backend:
        tunnel = processes.tunnel(backend.target, (engine, engine))
        tunnel.client.process.kill()
        # Until the server notices, requests that it gives to the killed one wait.
        tunnel.client.start()
        tunnel.client.process.ready()
        poll(lambda: all(serves(tunnel.address)() for _ in range(20)), 10.0)


@pytest.mark.slow
@pytest.mark.parametrize("head_sent", [False, True])
def test_request_in_flight_at_a_killed_client_is_given_up_in_time(
    engine: str, processes: Processes, head_sent: bool
) -> None:
    begun = threading.Event()

    def half(connection: Connection) -> None:
        connection.head()
        if head_sent:
            connection.send(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n" + b"x" * 500)
        begun.set()
        connection.gone()

    with RawBackend(half) as backend, ExitStack() as stack:
        tunnel = processes.tunnel(backend.target, (engine, engine))
        visitor = stack.enter_context(RawVisitor(tunnel.address, limit=45.0))
        visitor.send(b"POST / HTTP/1.1\r\nHost: app.localhost\r\nContent-Length: 1\r\n\r\nx")
        assert begun.wait(10)
        if head_sent:
            assert visitor.read_line() == b"HTTP/1.1 200 OK\r\n"
        tunnel.client.process.kill()
        if head_sent:
            rest = visitor.read_all()
            assert len(rest.partition(b"\r\n\r\n")[2]) <= 500
        else:
            got = visitor.read_answer("POST")
            assert (got.status, got.error) == (502, "connection_terminated")
            assert visit(tunnel.address).error == "destination_unavailable"


def test_server_killed_and_started_again_is_served_by_its_client_within_five_seconds(
    engines: tuple[str, str], processes: Processes
) -> None:
    with RawBackend(answer()) as backend:
        server = processes.server(engine=engines[0], quic_port=free_udp_port())
        processes.client(server, backend.target, engine=engines[1])
        assert serves(server.http)()
        server.process.kill()
        server.start()
        began = time.monotonic()
        poll(serves(server.http), 10.0)
        assert time.monotonic() - began < 5.0


def test_client_that_is_there_first_waits_for_its_server(engine: str, processes: Processes) -> None:
    with RawBackend(answer()) as backend:
        server = processes.server(engine=engine, quic_port=free_udp_port())
        server.process.kill()
        client = processes.client(server, backend.target, engine=engine, wait=False)
        client.process.said("cannot reach the server")
        client.process.said("next try in 0.[0-9]")
        assert client.process.running
        server.start()
        client.process.ready()
        assert serves(server.http)()


def test_client_keeps_trying_while_there_is_no_server(engine: str, processes: Processes) -> None:
    server = processes.server(engine=engine)
    assert server.process.stop() == 0
    client = processes.client(server, "127.0.0.1:9", engine=engine, wait=False)
    poll(lambda: client.log.count("cannot reach the server") >= 4, what="four attempts")
    waits = [float(wait) for wait in re.findall(r"next try in ([0-9.]+) s", client.log)]
    # Jittered from half of it on, it doubles: 0.2, 0.4, 0.8, and then 1 s for two minutes.
    assert all(wait <= bound for wait, bound in zip(waits, (0.2, 0.4, 0.8, 1.0), strict=False))
    assert waits[3] >= 0.4
    assert client.process.running
    assert client.process.stop() == 0


def test_server_that_is_stopped_and_started_again_is_served_again(engine: str, processes: Processes) -> None:
    with RawBackend(answer()) as backend:
        tunnel = processes.tunnel(backend.target, (engine, engine))
        assert tunnel.server.process.stop() == 0
        tunnel.server.start()
        poll(serves(tunnel.address), 5.0)
        tunnel.client.process.ready(times=2)
        assert tunnel.client.process.stop() == 0


@pytest.mark.parametrize("side", ["server", "client"])
def test_sigterm_lets_a_slow_request_finish(engine: str, processes: Processes, side: str) -> None:
    come, go = threading.Event(), threading.Event()

    def slow(connection: Connection) -> None:
        head = connection.head()
        if head:
            come.set()
            assert go.wait(20)
            connection.answer(200, b"late but whole")

    with RawBackend(slow) as backend:
        tunnel = processes.tunnel(backend.target, (engine, engine))
        process = tunnel.server.process if side == "server" else tunnel.client.process
        answers: list[Answer] = []
        visitor = threading.Thread(target=lambda: answers.append(visit(tunnel.address)))
        visitor.start()
        assert come.wait(10)
        process.signal(signal.SIGTERM)
        process.said("stopping")
        go.set()
        visitor.join(20)
        assert answers[0].status == 200
        assert answers[0].body == b"late but whole"
        assert process.exited() == 0


def test_grace_bounds_the_end(processes: Processes) -> None:
    come = threading.Event()

    def never(connection: Connection) -> None:
        connection.head()
        come.set()
        connection.gone()

    with RawBackend(never) as backend:
        tunnel = processes.tunnel(backend.target, serve=("--grace", "1"))

        def ask() -> None:
            with pytest.raises(OSError):
                visit(tunnel.address)

        visitor = threading.Thread(target=ask)
        visitor.start()
        assert come.wait(10)
        began = time.monotonic()
        assert tunnel.server.process.stop() == 0
        assert time.monotonic() - began < 5
        visitor.join(10)


@pytest.mark.slow
def test_sighup_changes_what_the_file_says_and_drops_nothing(engine: str, processes: Processes, tmp_path: Path) -> None:
    come, go = threading.Event(), threading.Event()
    file = tmp_path / "tunnel.toml"
    file.write_text("[serve]\n")

    def slow(connection: Connection) -> None:
        while connection.head():
            come.set()
            assert go.wait(20)
            connection.answer(200, b"whole")

    fields = {f"x-{number}": "1" for number in range(30)}
    with RawBackend(slow) as backend:
        tunnel = processes.tunnel(backend.target, (engine, engine), serve=("--config", str(file)))
        process = tunnel.server.process
        answers: list[Answer] = []
        visitor = threading.Thread(target=lambda: answers.append(visit(tunnel.address)))
        visitor.start()
        assert come.wait(10)
        file.write_text("[serve]\nhead-fields = 10\n")
        process.signal(signal.SIGHUP)
        process.said("reloaded; changed: --head-fields")
        assert visit(tunnel.address, fields=fields).status == 431
        file.write_text("[serve]\nhead-fields = many\n")
        process.signal(signal.SIGHUP)
        process.said("not reloaded, all stays as it was: .*is not TOML")
        go.set()
        visitor.join(20)
        assert (answers[0].status, answers[0].body) == (200, b"whole")
        assert visit(tunnel.address, fields=fields).status == 431
        assert tunnel.client.log.count("serving tunnel") == 1
        assert process.stop() == 0


def test_two_clients_share_a_tunnel_and_one_leaves_unnoticed(engine: str, processes: Processes) -> None:
    with RawBackend(answer(200, b"one")) as first, RawBackend(answer(200, b"two")) as second:
        server = processes.server(engine=engine)
        one = processes.client(server, first.target, engine=engine)
        processes.client(server, second.target, engine=engine)
        barrier: set[bytes] = set()

        def ask() -> None:
            barrier.add(visit(server.http).body)

        for _ in range(10):
            visitors = [threading.Thread(target=ask) for _ in range(8)]
            for visitor in visitors:
                visitor.start()
            for visitor in visitors:
                visitor.join(20)
        assert barrier == {b"one", b"two"}
        stopping = threading.Thread(target=one.process.stop)
        stopping.start()
        statuses = [visit(server.http).status for _ in range(50)]
        stopping.join(20)
        assert set(statuses) == {200}
        assert visit(server.http).body == b"two"


@pytest.mark.parametrize("processes_of_it", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_hang_up_has_a_client_read_its_options_again(processes: Processes, processes_of_it: int) -> None:
    config = processes.directory / f"client-{processes_of_it}.toml"
    config.write_text("[connect]\n")
    with RawBackend(answer()) as backend:
        options = ("--config", str(config), "--processes", str(processes_of_it))
        tunnel = processes.tunnel(backend.target, connect=options)
        client, log = tunnel.client.process, tunnel.server.process
        log.said(rf"session {processes_of_it} serves tunnel app")
        config.write_text('[connect]\nweight = 7\nhost-header = "backend"\n')
        client.signal(signal.SIGHUP)
        client.said(r"= reloaded; changed: --weight\b")
        client.said(r"these need a restart: --host-header\b")
        log.said(rf"session {2 * processes_of_it} serves tunnel app")
        poll(lambda: log.log.count(" ended after ") == processes_of_it, what="the old sessions' end")
        assert serves(tunnel.address)()
        config.write_text("[connect]\nweight = 0\n")
        client.signal(signal.SIGHUP)
        client.said(r"not reloaded, all stays as it was: .*weight: 0: the number must be 1\.\.1000")
        assert serves(tunnel.address)()
        assert client.output.count("ready ") == 1
