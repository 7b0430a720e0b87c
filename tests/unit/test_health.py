"""The client's checks of its backend: what counts as well, how many answers make a change, and who is told."""

import asyncio
from pathlib import Path
from typing import Any

import httpx
import pytest

from quictunnel.backends.asgi import AsgiBackend
from quictunnel.backends.transport import TransportBackend
from quictunnel.client.health import HealthCheck, HealthRules
from quictunnel.exchange import Leg
from quictunnel.http.origin import Origin
from quictunnel.wire.control import Health
from quictunnel.wire.errors import ErrorCode, TunnelError
from quictunnel.wire.frames import Data, ResponseHead
from tests.support.backends import RawBackend, answer
from tests.support.clock import run
from tests.support.ends import Backend, Ends, Request, play
from tests.support.hostile import HostileServer


class Answers(Backend):
    """Answers each request with the next status; 0 is a refused connection, None never an answer."""

    def __init__(self, *statuses: int | None) -> None:
        super().__init__(None)
        self.statuses = list(statuses)

    def on_request(self, request: Request) -> None:
        status = self.statuses.pop(0) if len(self.statuses) > 1 else self.statuses[0]
        if status == 0:
            request.peer.abort(TunnelError(ErrorCode.CONNECTION_REFUSED))
        elif status is not None:
            asyncio.get_running_loop().call_later(0.01, request.answer, status)


def changes(backend: Backend, seconds: float, **rules: Any) -> list[tuple[float, bool, str]]:
    """What a check tells in so many seconds, and when."""
    told: list[tuple[float, bool, str]] = []

    async def work() -> None:
        loop = asyncio.get_running_loop()
        began = loop.time()
        check = HealthCheck(backend, HealthRules("/healthz", **rules))
        task = loop.create_task(check.run(lambda well, why: told.append((round(loop.time() - began), well, why))))
        await asyncio.sleep(seconds)
        task.cancel()
        await asyncio.wait((task,))

    run(work())
    return told


@pytest.mark.parametrize(
    ("status", "why"),
    [
        (200, ""),
        (204, ""),
        (302, ""),
        (404, "GET /healthz: the answer is 404"),
        (503, "GET /healthz: the answer is 503"),
        (0, "GET /healthz: The backend refused the connection."),
        (None, "GET /healthz: no answer within 2 s"),
    ],
)
def test_first_answer_decides_at_once(status: int | None, why: str) -> None:
    [(_, well, told)] = changes(Answers(status), 4.0)
    assert (well, told) == (not why, why)


def test_request_is_one_that_a_person_would_make() -> None:
    backend = Answers(200)
    changes(backend, 12.0)
    heads = [request.head for request in backend.requests]
    assert [(head.method, head.target, head.authority, head.body) for head in heads] == [
        (b"GET", b"/healthz", b"backend.example", False)
    ] * 3
    assert dict(heads[0].fields)[b"user-agent"].startswith(b"quictunnel/")


def test_enough_failures_in_a_row_are_told_and_enough_good_answers_after_them() -> None:
    statuses = [200, 500, 500, 200, 500, 500, 500, 200, 500, 200, 200, 200]
    told = changes(Answers(*statuses), 59.0, interval=5.0, fall=3, rise=2)
    assert [(at, well) for at, well, _ in told] == [(0, True), (30, False), (50, True)]


def test_check_that_takes_too_long_is_given_up_at_the_backend() -> None:
    backend = Answers(None)
    changes(backend, 7.5, interval=3.0, timeout=1.0)
    assert [request.error is not None and request.error.code for request in backend.requests] == [
        ErrorCode.CANCELLED
    ] * 3
    assert not backend.open_requests


def test_head_is_enough_of_an_answer_that_never_ends() -> None:
    class Endless(Answers):
        def on_request(self, request: Request) -> None:
            request.peer.receive(ResponseHead(200, []))
            for _ in range(100):
                request.peer.receive(Data(b"x" * 65536))

    backend = Endless(200)
    [(_, well, _)] = changes(backend, 4.0)
    assert well
    assert backend.requests[0].error is not None


def test_backend_that_fails_inside_itself_counts_as_not_well() -> None:
    class Broken(Answers):
        def open(self) -> Leg:
            raise RuntimeError("broken")

    [(_, well, why)] = changes(Broken(200), 4.0)
    assert (well, why) == (False, "RuntimeError: broken")


# Whatever the backend is


async def _application(scope: Any, receive: Any, send: Any) -> None:
    if scope["type"] == "http":
        status = 204 if scope["path"] == "/healthz" else 500
        await send({"type": "http.response.start", "status": status, "headers": []})
        await send({"type": "http.response.body", "body": b""})


async def _asked(backend: Any, path: str) -> str:
    try:
        return await HealthCheck(backend, HealthRules(path)).ask()
    finally:
        await backend.aclose(1.0)


async def test_application_in_the_process_is_asked() -> None:
    assert await _asked(AsgiBackend(_application), "/healthz") == ""
    assert await _asked(AsgiBackend(_application), "/other") == "GET /other: the answer is 500"


async def test_transport_is_asked() -> None:
    transport = httpx.MockTransport(lambda request: httpx.Response(200 if request.url.path == "/healthz" else 404))
    assert await _asked(TransportBackend(transport), "/healthz") == ""
    assert await _asked(TransportBackend(transport), "/other") == "GET /other: the answer is 404"


async def test_backend_on_a_socket_is_asked_over_a_connection_that_is_kept() -> None:
    with RawBackend(answer(200, b"well")) as raw:
        host, port = raw.target.removeprefix("http://").split(":")
        backend = Origin(host, int(port))
        check = HealthCheck(backend, HealthRules("/healthz"))
        assert [await check.ask() for _ in range(3)] == [""] * 3
        assert backend.kept == 1
        await backend.aclose(1.0)
    gone = Origin(host, int(port))
    assert "refused" in await _asked(gone, "/healthz")


# Who is told


@pytest.mark.either
def test_each_link_is_told_of_a_change_and_each_new_one_while_it_lasts(engine: str, tmp_path: Path) -> None:
    async def scenario(ends: Ends) -> None:
        server = await HostileServer(ends, engine).start()
        backend = Answers(503)
        await ends.connected(backend, health=HealthCheck(backend, HealthRules("/healthz")))
        told = Health(False, "GET /healthz: the answer is 503")
        await ends.until(lambda: server.messages.count(told) == 1)
        server.links[0].close()
        await ends.until(lambda: server.messages.count(told) == 2, 5)
        backend.statuses = [200]
        await ends.until(lambda: Health(True, "") in server.messages, 15)
        server.links[1].close()
        await ends.until(lambda: len(server.hellos) == 3, 5)
        await asyncio.sleep(20)
        assert server.messages.count(told) == 2
        assert server.messages.count(Health(True, "")) == 1

    play(scenario, (engine, engine), tmp_path, serve=False)


@pytest.mark.either
def test_well_backend_is_nothing_to_tell(engine: str, tmp_path: Path) -> None:
    async def scenario(ends: Ends) -> None:
        server = await HostileServer(ends, engine).start()
        backend = Answers(200)
        agent = await ends.connected(backend, health=HealthCheck(backend, HealthRules("/healthz")))
        await asyncio.sleep(30)
        assert len(backend.requests) == 7
        assert not [message for message in server.messages if isinstance(message, Health)]
        await agent.stop(1.0)
        await ends.ended(agent)
        asked = len(backend.requests)
        await asyncio.sleep(30)
        assert len(backend.requests) == asked

    play(scenario, (engine, engine), tmp_path, serve=False)
