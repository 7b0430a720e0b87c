"""Requests that stay open, by the thousand, through real processes: all at a time, all answered, nothing left."""

import asyncio
import json
import signal
from pathlib import Path

import pytest

from quictunnel.app.loop import loop_factory
from tests.support.held import Crowd, HeldBackend, ask, descriptors, held_backend
from tests.support.processes import Process, Processes, Tunnel

KINDS = ("websocket", "poll")


def play(engine: str, processes: Processes, count: int) -> None:
    """So many of each kind come, wait, hear a message each and leave."""
    descriptors(2 * count + 500)
    with asyncio.Runner(loop_factory=loop_factory()) as runner:
        runner.run(_play(engine, processes, count))


async def _play(engine: str, processes: Processes, count: int) -> None:
    async with held_backend() as backend:
        serve = ("--max-in-flight", str(count + 100), "--max-visitors", str(count + 100))
        connect = ("--max-links", "128")
        tunnel = await asyncio.to_thread(
            processes.tunnel, backend.target, (engine, engine), serve=serve, connect=connect
        )
        for kind in KINDS:
            await stay(tunnel, backend, kind, count)


async def stay(tunnel: Tunnel, backend: HeldBackend, kind: str, count: int) -> None:
    """So many of a kind come and are all there, hear a message each, and leave nothing behind."""
    crowd = Crowd(tunnel.address)
    await crowd.come(kind, count)
    await backend.reached(kind, count, lambda: len(crowd.refused))
    assert [each.received for each in crowd.refused] == []
    assert await ask(tunnel.address, "/") == b"ok", "beside them others are served"
    if kind == "websocket":
        for each in crowd.visitors:
            each.say()
    else:
        assert await ask(tunnel.address, "/release") == b"%d" % count
    assert await crowd.all_answered() == count
    crowd.leave()
    await backend.reached(kind, 0)
    await nothing_left(tunnel)
    assert await ask(tunnel.address, "/") == b"ok"


async def nothing_left(tunnel: Tunnel, limit: float = 60.0) -> None:
    """Wait until the server counts nothing any more."""
    until = asyncio.get_running_loop().time() + limit
    while left := await in_flight(tunnel):
        assert asyncio.get_running_loop().time() < until, f"{left} are left"
        await asyncio.sleep(0.05)


async def in_flight(tunnel: Tunnel) -> int:
    """What the server counts: visitors, their exchanges, those of the tunnel and of its sessions."""
    out = await asyncio.to_thread(
        tunnel.server.processes.run, "status", "--json", "--state-dir", str(tunnel.server.state)
    )
    assert out.status == 0, out
    found = json.loads(out.stdout)
    sessions = sum(session["in_flight"] for tunnel in found["tunnels"] for session in tunnel["sessions"])
    totals: dict[str, int] = found["totals"]
    return totals["visitors"] + totals["in_flight"] + totals["waiting"] + sessions


@pytest.mark.either
def test_requests_that_stay_open_are_all_answered(engine: str, processes: Processes) -> None:
    play(engine, processes, 120)


@pytest.mark.slow
def test_two_thousand_requests_that_stay_open_are_all_answered(engine: str, processes: Processes) -> None:
    play(engine, processes, 2000)


# A process that does not run for a while


@pytest.mark.either
def test_server_that_was_stopped_for_a_while_loses_none_of_them(engine: str, processes: Processes) -> None:
    held_up(engine, processes, "server", 6.0, 60)


@pytest.mark.slow
@pytest.mark.parametrize("side", ["server", "client", "both"])
def test_processes_that_were_stopped_for_long_lose_none_of_them(engine: str, processes: Processes, side: str) -> None:
    # A link whose requests do not arrive is closed within ten seconds.
    held_up(engine, processes, side, 18.0, 500, after=12.0)


def held_up(engine: str, processes: Processes, side: str, seconds: float, count: int, after: float = 0.0) -> None:
    """So many of each kind are open while a process of a side, or of both, is stopped; then all are answered."""
    descriptors(4 * count + 500)
    with asyncio.Runner(loop_factory=loop_factory()) as runner:
        runner.run(_held_up(engine, processes, side, seconds, count, after))


async def _held_up(engine: str, processes: Processes, side: str, seconds: float, count: int, after: float) -> None:
    async with held_backend() as backend:
        connect = ("--max-links", "128")
        tunnel = await asyncio.to_thread(processes.tunnel, backend.target, (engine, engine), connect=connect)
        crowds = {kind: Crowd(tunnel.address) for kind in KINDS}
        for kind, crowd in crowds.items():
            await crowd.come(kind, count)
            await backend.reached(kind, count)
        sides = {"server": [tunnel.server.process], "client": [tunnel.client.process]}
        stopped = sides.get(side) or [*sides["server"], *sides["client"]]
        for process in stopped:
            process.signal(signal.SIGSTOP)
        await asyncio.sleep(seconds)
        for process in stopped:
            process.signal(signal.SIGCONT)
        assert await ask(tunnel.address, "/") == b"ok"
        await asyncio.sleep(after)
        assert [each.received for crowd in crowds.values() for each in crowd.refused] == []
        for kind in KINDS:
            await backend.reached(kind, count)
        for each in crowds["websocket"].visitors:
            each.say()
        assert await ask(tunnel.address, "/release") == b"%d" % count
        for crowd in crowds.values():
            assert await crowd.all_answered() == count
            crowd.leave()


# Files


@pytest.mark.slow
async def test_server_that_runs_out_of_files_neither_spins_nor_ends(tmp_path: Path) -> None:
    with Processes(tmp_path) as processes:
        async with held_backend() as backend:
            processes.within = ("prlimit", "--nofile=100:100")
            server = await asyncio.to_thread(processes.server)
            processes.within = ()
            await asyncio.to_thread(processes.client, server, backend.target)
            assert "50 visitors at a time instead of 10000: this process may open 100 files" in server.log
            visitors = [await asyncio.open_connection(*server.http) for _ in range(150)]
            try:
                await spun(server.process)
                reader, writer = visitors[0]
                writer.write(b"GET / HTTP/1.1\r\nHost: app.localhost\r\n\r\n")
                assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 200 "), "who is there is served"
                told = [await said(reader) for reader, _ in visitors[1:]]
                assert told[:40] == [b""] * 40
                assert sum(answer.startswith(b"HTTP/1.1 503 ") for answer in told) >= 10
            finally:
                for _, writer in visitors:
                    writer.close()
            async with asyncio.timeout(10):
                while True:
                    try:
                        assert await ask(server.http, "/") == b"ok"
                        break
                    except (OSError, ValueError, asyncio.IncompleteReadError):  # they have not all gone yet
                        await asyncio.sleep(0.05)
            assert server.process.running
            assert "Traceback" not in server.log


async def said(reader: asyncio.StreamReader) -> bytes:
    """What a visitor that asked for nothing was told, at once."""
    try:
        async with asyncio.timeout(0.01):
            return await reader.read(1000)
    except (TimeoutError, OSError):
        return b""


async def spun(process: Process) -> None:
    """Its share of a processor stays small for two seconds."""
    before = process.busy()
    await asyncio.sleep(2.0)
    assert process.busy() - before < 0.5
