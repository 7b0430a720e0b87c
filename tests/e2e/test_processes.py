"""Several processes of one command, as users run them: client pools."""

import asyncio
import json
import os
import re
import signal
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

import quictunnel
from tests.support.forge import alive
from tests.support.nonces import Load, body_of
from tests.support.pools import rise
from tests.support.processes import Process, Processes, Server, poll
from tests.support.visits import Answer, visit

pytestmark = pytest.mark.either

HEAVY = "tests.support.apps:heavy"


@pytest.fixture(scope="module")
def processes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Processes]:
    with Processes(tmp_path_factory.mktemp("processes")) as processes:
        yield processes


@pytest.fixture(scope="module")
def server(processes: Processes) -> Server:
    return processes.server()


def connect(processes: Processes, server: Server, *args: str, **options: dict[str, str]) -> Process:
    return processes.start("connect", *args, "--join", server.join, **options)


def at_once(server: Server, tunnel: str, count: int, milliseconds: int = 20) -> list[Answer]:
    """So many requests at the same time."""
    answers: list[Answer] = []

    def one(number: int) -> None:
        nonce = f"n{number}"
        got = visit(server.http, f"/{nonce}?size=50&wait={milliseconds}", host=f"{tunnel}.localhost")
        assert got.body == body_of(nonce, 50)
        answers.append(got)

    threads = [threading.Thread(target=one, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(answers) == count
    return answers


def served_by(server: Server, tunnel: str, count: int = 8) -> set[int]:
    return {int(each["served-by"]) for each in at_once(server, tunnel, count)}


# Client pools


def test_pool_shares_one_tunnel_and_replaces_who_dies(processes: Processes, server: Server, engine: str) -> None:
    client = connect(processes, server, HEAVY, "--processes", "2", "--engine", engine)
    facts = client.ready()
    assert facts["processes"] == "2"
    tunnel = facts["tunnel"]
    children = client.children
    assert len(children) == 2
    poll(lambda: served_by(server, tunnel) == set(children), what="both serve the name that the first was given")
    os.kill(children[0], signal.SIGKILL)
    client.said(r"client 0 \(process \d+\) was killed by SIGKILL: another is started in 0\.1 s")
    (other,) = set(poll(lambda: found if len(found := client.children) == 2 else [])) - set(children)
    poll(lambda: client.log.count(f"serving tunnel {tunnel} ") == 3, what="the replacement serves")
    assert client.stop() == 0
    assert client.output.count("ready") == 1
    assert not any(map(alive, (*children, other)))


@pytest.mark.slow
def test_refusal_that_is_final_for_one_is_final_for_all_and_said_once(
    processes: Processes, server: Server, engine: str
) -> None:
    token = server.token("mine")
    place = ("--server", f"127.0.0.1:{server.quic_port}", "--ca", str(server.state / "ca.pem"))
    args = ("connect", HEAVY, *place, "--token", token, "--processes", "3", "--engine", engine)
    result = processes.run(*args, "--tunnel", "theirs")
    assert result.status == 1
    said = [line for line in result.stderr.splitlines() if line.startswith("quictunnel: ")]
    assert len(said) == 1, result
    assert "the server refuses: " in said[0]
    assert "another is started" not in result.stderr
    assert result.stdout == ""

    client = processes.start(*args, "--tunnel", "mine")
    client.ready()
    server.revoke(token)
    assert client.exited() == 1, "also when it comes later"
    assert client.log.count("quictunnel: the server refuses: ") == 1


@pytest.mark.slow
@pytest.mark.parametrize("args", [("nowhere.to:be_found",), ("3000", "--ca", "/nowhere/ca.pem", "--token", "qtk_a_b")])
def test_what_is_wrong_at_the_start_is_said_once(processes: Processes, args: tuple[str, ...], engine: str) -> None:
    result = processes.run("connect", *args, "--processes", "3", "--tunnel", "app", "--engine", engine)
    assert result.status == 1
    assert len(result.stderr.splitlines()) == 1, result
    assert result.stderr.startswith("quictunnel: ")


@pytest.mark.slow
def test_ctrl_c_lets_requests_finish(processes: Processes, server: Server, engine: str) -> None:
    client = connect(processes, server, HEAVY, "--processes", "2", "--tunnel", "ctrl-c", "--engine", engine)
    client.ready()
    pids = [client.pid, *client.children]
    answers: list[Answer] = []
    visitor = threading.Thread(target=lambda: answers.extend(at_once(server, "ctrl-c", 2, milliseconds=700)))
    visitor.start()
    busy = [process_time(pid) for pid in pids[1:]]
    poll(lambda: all(process_time(pid) > before + 0.1 for pid, before in zip(pids[1:], busy, strict=True)))
    for pid in pids:  # what a terminal does to its foreground process group
        os.kill(pid, signal.SIGINT)
    visitor.join()
    assert [each.status for each in answers] == [200, 200]
    assert client.exited() == 0
    assert "KeyboardInterrupt" not in client.log


def process_time(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@pytest.mark.slow
def test_processes_end_when_the_one_that_started_them_is_killed(
    processes: Processes, server: Server, engine: str
) -> None:
    client = connect(processes, server, HEAVY, "--processes", "2", "--tunnel", "orphans", "--engine", engine)
    client.ready()
    children = client.children
    os.kill(client.pid, signal.SIGKILL)
    poll(lambda: not any(map(alive, children)), what="the end of the children")


@pytest.mark.slow
def test_pool_without_uvloop_logs_json_that_says_which_process_it_was(
    tmp_path: Path, server: Server, engine: str
) -> None:
    (tmp_path / "stub").mkdir()
    (tmp_path / "stub" / "uvloop.py").write_text("raise ImportError")
    with Processes(tmp_path / "home") as processes:
        path = f"{tmp_path / 'stub'}:{processes.env['PYTHONPATH']}"
        args = ("--processes", "2", "--tunnel", "json", "--engine", engine, "--log-format", "json")
        client = connect(processes, server, HEAVY, *args, env={"PYTHONPATH": path})
        client.ready()
        poll(lambda: len(served_by(server, "json")) == 2)
        assert client.stop() == 0
        lines = [json.loads(line) for line in client.log.splitlines()]
        served = Counter(line["client"] for line in lines if line["message"].startswith("serving tunnel json"))
        assert served == {0: 1, 1: 1}


@pytest.mark.slow
def test_process_of_a_pool_that_is_killed_costs_only_what_it_had_begun(
    processes: Processes, server: Server, engine: str
) -> None:
    async def play() -> None:
        args = ("--processes", "2", "--tunnel", "killed", "--engine", engine)
        client = connect(processes, server, HEAVY, *args)
        await asyncio.to_thread(client.ready)
        load = Load(server.http, host=lambda: "killed.localhost", post=0.5, wait=lambda chance: 3)
        running = asyncio.get_running_loop().create_task(load.at_rate(60, seconds=10))
        await asyncio.sleep(2)
        children = client.children
        os.kill(children[0], signal.SIGKILL)
        at = time.monotonic()
        await asyncio.to_thread(poll, lambda: len(found := client.children) == 2 and children[0] not in found)
        back = time.monotonic() - at
        records = await running
        failed = [record for record in records if not record.ok]
        slowest = max(record.ended - record.due for record in records if record.due > at)
        kinds = Counter(f"{each.method} {each.kind}" for each in failed)
        print(f"\n{engine}: {back * 1000:.0f} ms until another was there; of {len(records)} failed {dict(kinds)}; "
              f"slowest after it {slowest:.2f} s")  # fmt: skip
        assert all(record.method == "POST" for record in failed), failed
        assert len(failed) <= 10
        assert await asyncio.to_thread(client.stop) == 0

    asyncio.run(play())


@pytest.mark.slow
def test_pool_grows_with_the_load_loses_nothing_and_falls_back(tmp_path: Path, engine: str) -> None:
    found = asyncio.run(rise(tmp_path, engine, bounds="1-2", seconds=20))
    print(found.decisions, found.rates, found.p99, found.back_after)
    assert not found.failed, found.failed[:5]
    assert [count for _, count in found.processes] == [1, 2, 1]
    assert re.match(r"1 -> 2 processes: .* for \d\.\d s, worst lag \d+ ms", found.decisions[0])
    assert re.match(r"2 -> 1 process: with one less \d+% busy, for 10 s", found.decisions[-1])
    # How much more it is on a quiet machine is for benchmarks/pool.py to show: other work here takes a processor away.
    assert found.rates[2] > 0.6 * found.rates[1], found.rates


def test_tunnel_of_a_python_program_is_one_session() -> None:
    with pytest.raises(ValueError, match="one session, in the caller's process"):
        quictunnel.connect(3000, processes=2)


@pytest.mark.slow
def test_application_that_does_not_load_any_more_leaves_the_others_alone(
    processes: Processes, server: Server, engine: str
) -> None:
    app = processes.directory / "changing.py"
    good = "from tests.support.apps import heavy as app\n"
    app.write_text(good)
    client = connect(processes, server, "changing:app", "--processes", "2", "--tunnel", "change", "--engine", engine)
    client.ready()
    for cache in processes.directory.glob("__pycache__/changing.*"):
        cache.unlink()
    app.write_text("raise RuntimeError('half saved')\n")
    os.kill(client.children[0], signal.SIGKILL)
    client.said("cannot start: .*half saved")
    assert client.running
    app.write_text(good + "\n")
    poll(lambda: client.log.count("serving tunnel change ") == 3, 30, "it tries again")
    assert client.stop() == 0
