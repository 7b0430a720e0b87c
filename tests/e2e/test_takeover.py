"""A server that takes over from the one that runs: its visitors and clients notice nothing."""

import asyncio
import re
import signal
import threading
from collections.abc import Iterator

import pytest

from quictunnel.app.ask import calls
from quictunnel.app.status import _asked, merged
from tests.support.backends import Connection, RawBackend, answer
from tests.support.nonces import Ledger, Load, figures, nonce_backend
from tests.support.processes import Process, Processes, Tunnel, poll
from tests.support.tls import TlsVisitor, client_context
from tests.support.visits import Answer, visit

pytestmark = pytest.mark.either


@pytest.fixture
def processes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Processes]:
    with Processes(tmp_path_factory.mktemp("processes")) as processes:
        yield processes


def successor(processes: Processes, tunnel: Tunnel, *args: str, engine: str = "auto") -> Process:
    """A server that takes over from that of ``tunnel``, on whatever ports that has."""
    places = ("--http", "127.0.0.1:0", "--quic", "127.0.0.1:0", "--state-dir", str(tunnel.server.state))
    return processes.start("serve", "--takeover", *places, "--engine", engine, *args)


def test_a_request_under_way_ends_at_the_old_server_and_the_next_is_the_new_ones(
    engines: tuple[str, str], processes: Processes
) -> None:
    come, go = threading.Event(), threading.Event()

    def slow(connection: Connection) -> None:
        while head := connection.head():
            if b" /slow " in head.split(b"\r\n")[0]:
                come.set()
                assert go.wait(20)
            connection.answer(200, b"whole")

    with RawBackend(slow) as backend:
        tunnel = processes.tunnel(backend.target, engines)
        answers: list[Answer] = []
        visitor = threading.Thread(target=lambda: answers.append(visit(tunnel.address, "/slow")))
        visitor.start()
        assert come.wait(10)
        old = tunnel.server.process
        new = successor(processes, tunnel, engine=engines[0])
        facts = new.ready()
        assert facts["http"] == tunnel.server.facts["http"]
        assert facts["quic"] == tunnel.server.facts["quic"]
        assert visit(tunnel.address).body == b"whole"
        shown = merged([_asked(call) for call in calls(tunnel.server.state, 5.0)[0]])
        assert [(each["pid"], each["draining"]) for each in shown["processes"]] == [(new.pid, False), (old.pid, True)]
        assert [session["health"] for session in shown["tunnels"][0]["sessions"]] == ["healthy"]
        assert old.running
        go.set()
        visitor.join(20)
        assert (answers[0].status, answers[0].body) == (200, b"whole")
        assert old.exited() == 0
        assert visit(tunnel.address).status == 200
        assert tunnel.client.log.count("serving tunnel") == 1, "its session never ended"
        assert "ERROR" not in new.log + old.log
        assert new.stop() == 0


@pytest.mark.slow
@pytest.mark.timeout(240)
@pytest.mark.parametrize("post", [0.0, 0.5], ids=["GET", "GET and POST"])
async def test_ten_takeovers_under_300_requests_a_second_lose_none(
    engines: tuple[str, str], processes: Processes, post: float
) -> None:
    """On connections that are kept, so that the end of each server meets requests on their way."""
    ledger = Ledger()
    async with nonce_backend(ledger) as backend:
        tunnel = await asyncio.to_thread(processes.tunnel, backend.target, engines)
        load = Load(tunnel.address, post=post)
        servers = [tunnel.server.process]
        running = asyncio.get_running_loop().create_task(load.at_rate(300))
        try:
            await asyncio.sleep(1)
            for _ in range(10):
                new = successor(processes, tunnel, engine=engines[0])
                await asyncio.to_thread(new.ready, 1, 20.0)
                servers.append(new)
                await asyncio.sleep(0.5)
        finally:
            load.stop()
            records = await running
        for old in servers[:-1]:
            assert await asyncio.to_thread(old.exited, 40.0) == 0
    found = figures(records, ledger)
    print(found)
    assert found.sent > 2000
    assert (found.failed, found.kinds) == (0, {})
    assert (found.wrong, found.post_twice, found.get_twice, found.damaged) == (0, 0, 0, 0)
    # One that was itself taken over soon may have ended before its predecessor.
    passed = [re.search(r"(\d+) datagrams were passed on", server.log) for server in servers[1:]]
    assert any(passed), "they had predecessors, which have gone"


@pytest.mark.slow
@pytest.mark.timeout(120)
async def test_workers_are_taken_over_each_by_its_own(engines: tuple[str, str], processes: Processes) -> None:
    ledger = Ledger()
    async with nonce_backend(ledger) as backend:
        tunnel = await asyncio.to_thread(processes.tunnel, backend.target, engines, serve=("--workers", "2"))
        load = Load(tunnel.address)
        servers = [tunnel.server.process]
        running = asyncio.get_running_loop().create_task(load.in_turn(100_000, 8))
        try:
            for _ in range(3):
                new = successor(processes, tunnel, "--workers", "2", engine=engines[0])
                await asyncio.to_thread(new.ready, 1, 30.0)
                servers.append(new)
        finally:
            load.stop()
            records = await running
        for old in servers[:-1]:
            assert await asyncio.to_thread(old.exited, 40.0) == 0
        last = servers[-1]
        assert last.log.count("took over from process") == 2
        assert not re.search("was killed|exited", "".join(server.log for server in servers)), "no worker was replaced"
    found = figures(records, ledger)
    print(found)
    assert found.sent > 100
    assert (found.failed, found.kinds) == (0, {})
    assert (found.wrong, found.post_twice, found.get_twice, found.damaged) == (0, 0, 0, 0)


@pytest.mark.slow
def test_visitors_by_tls_are_taken_over_too(engine: str, processes: Processes) -> None:
    with RawBackend(answer()) as backend:
        tunnel = processes.tunnel(backend.target, (engine, engine), serve=("--https", "127.0.0.1:0"))
        context = client_context(tunnel.server.state / "ca.pem")
        port = int(tunnel.server.facts["https"].rpartition(":")[2])
        request = b"GET / HTTP/1.1\r\nHost: app.localhost\r\n\r\n"
        with TlsVisitor(port, context, "app.localhost") as kept:
            kept.send(request)
            assert b"connection: close" not in kept.read().lower()
            new = successor(processes, tunnel, "--https", "127.0.0.1:0", engine=engine)
            assert new.ready()["https"] == tunnel.server.facts["https"]
            kept.send(request)
            assert b"connection: close" in kept.read().lower()
        with TlsVisitor(port, context, "app.localhost") as fresh:
            fresh.send(request)
            assert b"connection: close" not in fresh.read().lower()
        assert tunnel.server.process.exited() == 0


@pytest.mark.slow
def test_what_cannot_be_is_one_line_and_the_old_server_is_left_as_it_was(processes: Processes) -> None:
    with RawBackend(answer()) as backend:
        tunnel = processes.tunnel(backend.target)
        for args, said in (
            (("--http", "127.0.0.1:1"), "--http is 127.0.0.1:1, and that of the running server"),
            (("--cert", "/nowhere/a.pem", "--key", "/nowhere/a.key"), "/nowhere/a.pem"),
            (("--workers", "2"), "the running server has 1 worker, and this one is to have 2 workers"),
        ):
            new = successor(processes, tunnel, *args)
            assert new.exited() == 1
            lines = [line for line in new.log.splitlines() if line.startswith("quictunnel: ")]
            assert len(lines) == 1
            assert said in lines[0]
            assert visit(tunnel.address).status == 200
        assert "another process" not in tunnel.server.log
        assert "drain" not in tunnel.client.log


@pytest.mark.slow
def test_where_no_server_runs_it_starts_anew_and_says_so(engine: str, processes: Processes) -> None:
    with RawBackend(answer()) as backend:
        tunnel = processes.tunnel(backend.target, (engine, engine), serve=("--takeover",))
        assert "there is no server to take over from in" in tunnel.server.log
        assert visit(tunnel.address).status == 200
        tunnel.server.process.kill()
        tunnel.server.start()  # what a killed one left in its state directory is no server
        poll(lambda: served(tunnel), 15.0)


def served(tunnel: Tunnel) -> bool:
    try:
        return visit(tunnel.address, limit=3.0).status == 200
    except OSError:
        return False


@pytest.mark.slow
def test_a_successor_that_is_killed_while_it_waits_for_clients_changes_nothing(
    engine: str, processes: Processes
) -> None:
    with RawBackend(answer()) as backend:
        tunnel = processes.tunnel(backend.target, (engine, engine))
        old, client = tunnel.server.process, tunnel.client.process
        client.signal(signal.SIGSTOP)  # so that it does not come at once
        new = successor(processes, tunnel, engine=engine)
        old.said("another process takes the links over")
        new.kill()
        client.signal(signal.SIGCONT)
        old.said("has gone before it served: going on without it")
        poll(lambda: served(tunnel), 15.0)
        assert all(visit(tunnel.address).status == 200 for _ in range(10))
        assert successor(processes, tunnel, engine=engine).ready()
        assert visit(tunnel.address).status == 200
        assert old.exited() == 0
