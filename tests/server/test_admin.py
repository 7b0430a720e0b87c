"""The owner's door of a running server: who gets in, what is answered, and what a bad guest costs."""

import asyncio
import json
import os
import socket
import stat
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from quictunnel.app.ask import Call, NoAnswer, calls
from quictunnel.app.status import _asked, merged
from quictunnel.backends.asgi import AsgiBackend
from quictunnel.demo import app
from quictunnel.server import admin as module
from quictunnel.server.admin import Admin, Conversation, Line, connect, doors
from quictunnel.server.registry import Registry, RegistryLimits
from quictunnel.server.status import Status
from quictunnel.trust.tokens import Grant
from tests.support.both_ends import both_ends
from tests.support.crowd import fetch, until

FACTS = {"worker": 0, "workers": 1, "version": "1", "engine": "qh3", "domain": "localhost"}


async def echo(conversation: Conversation, question: Line) -> None:
    await conversation.send({"heard": question})


async def drip(conversation: Conversation, question: Line) -> None:
    await conversation.send_bytes(b"dr")
    await asyncio.sleep(60)


@pytest.fixture
async def door(tmp_path: Path) -> AsyncIterator[Admin]:
    admin = Admin(tmp_path, {"echo": echo, "drip": drip})
    admin.start()
    yield admin
    admin.close()


@pytest.fixture
def guests() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def path_of(admin: Admin) -> Path:
    assert admin._path is not None
    return admin._path


async def asked(admin: Admin, data: bytes) -> bytes:
    """What is answered to these bytes, until the door hangs up."""
    reader, writer = await asyncio.open_unix_connection(str(path_of(admin)))
    try:
        writer.write(data)
        return await reader.read()
    finally:
        writer.close()


async def test_only_the_owner_may_enter(door: Admin, tmp_path: Path) -> None:
    assert doors(tmp_path) == [tmp_path / "run" / f"{os.getpid()}.sock"]
    assert stat.S_IMODE((tmp_path / "run").stat().st_mode) == 0o700
    assert stat.S_IMODE(path_of(door).stat().st_mode) == 0o600
    assert os.listdir(tmp_path / "run") == [f"{os.getpid()}.sock"], "nothing but the door is left there"


async def test_another_user_is_turned_away(door: Admin, monkeypatch: pytest.MonkeyPatch) -> None:
    assert await asked(door, b'{"ask":"echo"}\n')
    monkeypatch.setattr(module, "_is_owner", lambda connection: False)
    assert await asked(door, b"") == b""


async def test_a_directory_that_others_could_enter_is_closed_to_them(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir(mode=0o755)
    admin = Admin(tmp_path, {})
    admin.start()
    assert stat.S_IMODE((tmp_path / "run").stat().st_mode) == 0o700
    admin.close()


@pytest.mark.parametrize(
    ("said", "answer"),
    [
        (b'{"ask":"echo","n":1}\n', {"heard": {"ask": "echo", "n": 1}}),
        (b'{"ask":"dance"}\n', {"error": "unknown question: dance"}),
        (b"{}\n", {"error": "unknown question: None"}),
        (b"[1]\n", None),
        (b"status\n", None),
        (b"[" * 60000 + b"\n", None),
        (b'{"ask":"echo"}', None),
    ],
    ids=lambda value: str(value)[:20],
)
async def test_what_is_answered(door: Admin, said: bytes, answer: Line | None) -> None:
    reader, writer = await asyncio.open_unix_connection(str(path_of(door)))
    writer.write(said)
    writer.write_eof()
    heard = await reader.read()
    writer.close()
    assert heard == b"" if answer is None else json.loads(heard) == answer


async def test_a_line_without_end_is_not_kept(door: Admin) -> None:
    reader, writer = await asyncio.open_unix_connection(str(path_of(door)))
    with pytest.raises((ConnectionError, BrokenPipeError)):
        for _ in range(100):
            writer.write(b"x" * 65536)
            await writer.drain()
            if reader.at_eof():
                raise ConnectionResetError
    writer.close()


async def test_silent_guests_are_left_and_stop_nobody(
    door: Admin, guests: ExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_QUESTION_TIME", 0.2)
    silent = [guests.enter_context(connect(path_of(door), 5)) for _ in range(module._CONVERSATIONS)]
    await until(lambda: len(door._tasks) == len(silent))
    assert await asked(door, b"") == b"", "one too many is turned away at once"
    await until(lambda: not door._tasks)
    assert json.loads(await asked(door, b'{"ask":"echo"}\n'))["heard"] == {"ask": "echo"}


async def test_the_end_of_the_server_is_the_end_of_its_conversations(tmp_path: Path, no_task_left: None) -> None:
    admin = Admin(tmp_path, {"drip": drip})
    admin.start()
    reader, writer = await asyncio.open_unix_connection(str(path_of(admin)))
    writer.write(b'{"ask":"drip"}\n')
    assert await reader.readexactly(2) == b"dr"
    admin.close()
    assert await reader.read() == b""
    writer.close()
    assert doors(tmp_path) == []


async def test_what_a_killed_process_left_is_removed_and_a_living_door_is_not(tmp_path: Path, door: Admin) -> None:
    dead = tmp_path / "run" / "1.sock"
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(dead))
    other = Admin(tmp_path, {})
    other.start()
    assert doors(tmp_path) == [tmp_path / "run" / f"{os.getpid()}-2.sock", path_of(door)]
    other.close()
    assert doors(tmp_path) == [path_of(door)]


async def test_a_long_path_is_no_obstacle(tmp_path: Path) -> None:
    deep = tmp_path / ("d" * 100) / ("e" * 100)
    admin = Admin(deep, {"echo": echo})
    admin.start()
    [call], silent = await asyncio.to_thread(calls, deep, 5.0)
    with call:
        call.say({"ask": "echo"})
        assert await asyncio.to_thread(call.hear) == {"heard": {"ask": "echo"}}
    assert silent == []
    admin.close()


async def test_a_path_that_cannot_be_shortened_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module.os.path, "isdir", lambda path: False)
    with pytest.raises(OSError, match="a socket's path may have 107 bytes"):
        Admin(tmp_path / ("d" * 120), {}).start()


async def test_a_process_that_does_not_answer_is_named(door: Admin, tmp_path: Path) -> None:
    [call], _ = calls(tmp_path, 0.2)
    with call:
        call.say({"ask": "drip"})
        with pytest.raises(NoAnswer, match=r"no answer within 0\.2 s"):
            await asyncio.to_thread(call.hear)


def test_nobody_there_is_no_process(tmp_path: Path) -> None:
    assert calls(tmp_path, 1.0) == ([], [])
    (tmp_path / "run").mkdir()
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(tmp_path / "run" / "1.sock"))
    assert calls(tmp_path, 1.0) == ([], [])
    with pytest.raises(ConnectionRefusedError):
        Call(tmp_path / "run" / "1.sock", 1.0)


@pytest.mark.either
async def test_a_server_tells_of_its_tunnels_and_of_no_secret(engines: tuple[str, str], tmp_path: Path) -> None:
    async with both_ends(engines, tmp_path, AsgiBackend(app)) as ends:
        server = ends.server
        admin = Admin(tmp_path, {"status": Status(server, FACTS).answer})
        admin.start()
        assert (await fetch(server.http_address, "/"))[0] == 200
        [session] = server.registry.sessions()
        link = session.links[0]
        link.ping()
        await until(lambda: link.round_trip is not None)
        [call], _ = calls(tmp_path, 5.0)
        answer = await asyncio.to_thread(_asked, call)
        admin.close()

        assert answer["pid"] == os.getpid()
        assert {key: answer[key] for key in FACTS} == FACTS
        assert (answer["http"], answer["https"]) == (f"127.0.0.1:{server.http_address[1]}", None)
        assert answer["draining"] is False
        [row] = answer["tunnels"]
        assert (row["name"], row["waiting"], row["lost"]) == ("app", 0, None)
        assert row["urls"] == server.public_urls("app")
        [said] = row["sessions"]
        host, port = link.address[:2]
        assert (said["address"], said["links"], said["health"]) == (f"{host}:{port}", 1, "healthy")
        assert said["token"] == session.grant.token_id
        assert said["round_trip_ms"] > 0
        assert 0 <= time.time() - datetime.fromisoformat(said["since"]).timestamp() < 60
        text = json.dumps(answer)
        assert session.id not in text
        assert ends.agent._config.token not in text
        assert ends.agent._config.token.split("_", 2)[2] not in text  # the secret, which may have more of them


def registry_of(sessions: int, tunnels: int) -> Registry:
    registry = Registry(RegistryLimits())
    for number in range(sessions):
        name = f"t{number % tunnels}"
        link: Any = SimpleNamespace(
            address=("192.0.2.1", number), round_trip=0.01, silent_for=lambda: 0.0, draining=False, closed=None
        )
        registry.register(Grant("t", name, (), None, b""), f"session-{number:032}", "quictunnel/1", 0, link, 1.0)
    return registry


class Visitors:
    in_flight = 0

    def __len__(self) -> int:
        return 0


@pytest.fixture
async def large() -> Status:
    """Of a server with 1,000 sessions of 500 tunnels."""
    server: Any = SimpleNamespace(
        registry=registry_of(1000, 500),
        draining=False,
        visitors=Visitors(),
        public_urls=lambda name, hosts: [f"http://{name}.localhost"],
        http_address=("127.0.0.1", 1),
        https_address=None,
        quic_address=("::1", 2),
    )
    return Status(server, FACTS)


@pytest.mark.interpreted  # a stand-in for a Link, or for a method of it
async def test_a_thousand_sessions_do_not_hold_the_loop_up(tmp_path: Path, large: Status) -> None:
    """The loop turns for others while the answer is made, and never waits for long."""
    began = time.process_time()
    size = len(b"".join(large._pieces()))
    whole = time.process_time() - began
    admin = Admin(tmp_path, {"status": large.answer})
    admin.start()
    gaps: list[float] = []

    async def turn() -> None:
        while True:
            began = time.thread_time()
            await asyncio.sleep(0)
            gaps.append(time.thread_time() - began)

    turning = asyncio.get_running_loop().create_task(turn())
    [call], _ = calls(tmp_path, 10.0)
    answer = await asyncio.to_thread(_asked, call)
    turning.cancel()
    admin.close()
    assert merged([answer])["totals"]["sessions"] == 1000
    assert len(merged([answer])["tunnels"]) == 500
    print(f"{size} bytes, {whole * 1000:.1f} ms of work, the longest turn {max(gaps) * 1000:.1f} ms")
    assert size > 200_000
    assert max(gaps) < max(0.01, whole / 2)


@pytest.mark.interpreted  # a stand-in for a Link, or for a method of it
async def test_a_guest_that_does_not_read_its_answer_stops_nobody(
    tmp_path: Path, guests: ExitStack, monkeypatch: pytest.MonkeyPatch, large: Status
) -> None:
    monkeypatch.setattr("quictunnel.server.status._ANSWER_TIME", 0.3)
    admin = Admin(tmp_path, {"status": large.answer, "echo": echo})
    admin.start()
    guest = guests.enter_context(connect(path_of(admin), 5))
    guest.sendall(b'{"ask":"status"}\n')
    await until(lambda: admin._tasks)
    assert json.loads(await asked(admin, b'{"ask":"echo"}\n')) == {"heard": {"ask": "echo"}}
    assert admin._tasks, "the answer is larger than the socket's buffer"
    await until(lambda: not admin._tasks)
    admin.close()
