"""A server of several processes, as users run it."""

import asyncio
import os
import re
import signal
import socket
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.backends import RawBackend, answer
from tests.support.forge import alive
from tests.support.nonces import Ledger, Load, nonce_backend
from tests.support.processes import Processes, poll
from tests.support.visits import visit

pytestmark = pytest.mark.either

ANYWHERE = ("--http", "127.0.0.1:0", "--quic", "127.0.0.1:0")


@pytest.fixture
def processes(tmp_path: Path) -> Iterator[Processes]:
    with Processes(tmp_path / "home") as processes:
        yield processes


def test_visitors_reach_a_tunnel_by_every_worker(processes: Processes, engines: tuple[str, str]) -> None:
    with RawBackend(answer(200, b"yes")) as backend:
        tunnel = processes.tunnel(backend.target, engines, serve=("--workers", "2", "--log-format", "json"))
        server = tunnel.server.process
        assert tunnel.server.facts["workers"] == "2"
        workers = server.children
        assert len(workers) == 2
        poll(lambda: len(set(re.findall(r'"session \d+ serves tunnel app .*"worker": (\d)', server.log))) == 2)
        for _ in range(20):
            got = visit(tunnel.address)
            assert (got.status, got.body) == (200, b"yes")
        assert tunnel.client.process.stop() == 0
        assert server.stop() == 0
        assert server.output.count("ready") == 1
        assert server.log.count("issued the server certificate") == 1
        assert not any(map(alive, workers))


@pytest.mark.slow
@pytest.mark.parametrize("option", ["--http", "--quic"])
def test_port_that_is_taken_ends_it_at_once(processes: Processes, engine: str, option: str) -> None:
    kind = socket.SOCK_DGRAM if option == "--quic" else socket.SOCK_STREAM
    with socket.socket(socket.AF_INET, kind) as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        sock.bind(("127.0.0.1", 0))
        place = f"127.0.0.1:{sock.getsockname()[1]}"
        if option == "--http":
            sock.listen()
        result = processes.run("serve", *ANYWHERE, option, place, "--workers", "2", "--engine", engine)
    assert result.status == 1
    assert result.stderr.splitlines()[-1] == f"quictunnel: {option} {place}: Address already in use"
    assert result.stdout == ""


@pytest.mark.slow
def test_what_no_worker_can_do_is_said_once(processes: Processes, engine: str) -> None:
    files = [processes.directory / name for name in ("server.pem", "server.key")]
    for args in (("init",), ("issue", "localhost")):
        assert processes.run("certs", *args, "--dir", str(processes.directory)).status == 0
    files[0].write_text(files[0].read_text()[:200])
    options = ("--cert", str(files[0]), "--key", str(files[1]), "--workers", "3", "--engine", engine)
    result = processes.run("serve", *ANYWHERE, *options)
    assert result.status == 1
    assert [line.split(":")[0] for line in result.stderr.splitlines()] == ["quictunnel"], result


@pytest.mark.slow
def test_hangup_reaches_every_worker_and_whoever_comes_later(processes: Processes, engine: str) -> None:
    config = processes.directory / "serve.toml"
    config.write_text("[serve]\nhold = '1s'\n")
    server = processes.server("--workers", "2", "--config", str(config), engine=engine)
    config.write_text("[serve]\nhold = '2s'\n")
    server.process.signal(signal.SIGHUP)
    poll(lambda: set(re.findall(r"reloaded; changed: --hold worker=(\d)", server.log)) == {"0", "1"})
    os.kill(server.process.children[0], signal.SIGKILL)
    poll(lambda: server.log.count("reloaded; changed: --hold worker=0") == 2, 20)
    assert server.process.stop() == 0


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_requests_in_flight_at_every_worker_finish(processes: Processes, engine: str, number: signal.Signals) -> None:
    async def play() -> None:
        async with nonce_backend(Ledger()) as backend:
            serving = asyncio.to_thread(processes.tunnel, backend.target, (engine, engine), serve=("--workers", "2"))
            tunnel = await serving
            await asyncio.to_thread(poll, lambda: tunnel.server.log.count(" serves tunnel app ") == 2)
            load = Load(tunnel.address, post=0.5, wait=lambda chance: 700)
            running = asyncio.get_running_loop().create_task(load.in_turn(30, 30))
            await asyncio.to_thread(poll, lambda: len(backend.ledger.whole) == 30)
            for pid in [tunnel.server.process.pid, *tunnel.server.process.children]:
                if number == signal.SIGINT or pid == tunnel.server.process.pid:
                    os.kill(pid, number)
            assert all(record.ok for record in await running), [each for each in load.records if not each.ok]
            assert await asyncio.to_thread(tunnel.server.process.exited) == 0

    asyncio.run(play())


@pytest.mark.slow
def test_worker_that_is_killed_is_back_and_loses_only_what_it_held(processes: Processes, engine: str) -> None:
    async def play() -> None:
        async with nonce_backend(ledger := Ledger()) as backend:
            tunnel = await asyncio.to_thread(
                processes.tunnel, backend.target, (engine, engine), serve=("--workers", "2")
            )
            server = tunnel.server.process
            await asyncio.to_thread(poll, lambda: tunnel.server.log.count(" serves tunnel app ") == 2)
            load = Load(tunnel.address, post=0.5, wait=lambda chance: 10)
            running = asyncio.get_running_loop().create_task(load.at_rate(100, seconds=12))
            await asyncio.sleep(3)
            killed, other = server.children
            os.kill(killed, signal.SIGKILL)
            at = time.monotonic()
            await asyncio.to_thread(poll, lambda: len(found := server.children) == 2 and killed not in found)
            back = time.monotonic() - at
            records = await running
            failed = [record for record in records if not record.ok]
            ready = [record for record in records if record.due > at]
            slowest = max(record.ended - record.due for record in ready)
            print(f"\n{engine}: worker back after {back * 1000:.0f} ms; {len(failed)} of {len(records)} failed: "
                  f"{Counter(each.kind for each in failed)}; slowest after it {slowest:.2f} s")  # fmt: skip
            assert back < 5
            assert other in server.children
            assert all(record.due < at + 1 for record in failed), [each for each in failed if each.due > at]
            assert len(failed) <= 20
            assert max(ledger.whole[record.nonce] for record in records if record.method == "POST") == 1
            assert await asyncio.to_thread(server.stop) == 0

    asyncio.run(play())


@pytest.mark.slow
@pytest.mark.timeout(180)
def test_workers_are_taken_over_one_by_one_and_lose_nothing(processes: Processes, engine: str) -> None:
    async def play() -> None:
        async with nonce_backend(ledger := Ledger()) as backend:
            tunnel = await asyncio.to_thread(
                processes.tunnel, backend.target, (engine, engine), serve=("--workers", "2")
            )
            await asyncio.to_thread(poll, lambda: tunnel.server.log.count(" serves tunnel app ") == 2)
            load = Load(tunnel.address, post=0.5)
            running = asyncio.get_running_loop().create_task(load.at_rate(100))
            old = tunnel.server.process
            for _ in range(2):
                await asyncio.sleep(1)
                args = (*ANYWHERE, "--state-dir", str(tunnel.server.state), "--workers", "2", "--engine", engine)
                new = processes.start("serve", "--takeover", *args)
                facts = await asyncio.to_thread(new.ready, limit=60)
                assert (facts["http"], facts["quic"]) == (tunnel.server.facts["http"], tunnel.server.facts["quic"])
                assert await asyncio.to_thread(old.exited, 60) == 0
                assert "another is started" not in old.log, "its workers left for good"
                old = new
            await asyncio.sleep(1)
            load.stop()
            records = await running
            assert len(records) > 200
            assert all(record.ok for record in records), [each for each in records if not each.ok][:5]
            assert max(ledger.whole.values()) == 1
            assert await asyncio.to_thread(old.stop) == 0

    asyncio.run(play())


@pytest.mark.slow
def test_processes_end_when_the_one_that_started_them_is_killed(processes: Processes, engine: str) -> None:
    server = processes.server("--workers", "2", engine=engine)
    workers = server.process.children
    os.kill(server.process.pid, signal.SIGKILL)
    poll(lambda: not any(map(alive, workers)), what="the end of the workers")
