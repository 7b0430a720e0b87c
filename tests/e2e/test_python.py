"""A tunnel from Python: ``quictunnel.connect``."""

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

import quictunnel
from quictunnel.client.agent import FinalRefusal
from quictunnel.options import CommandError
from tests.support.processes import Processes, Server
from tests.support.visits import Answer, visit

Send = Callable[[dict[str, Any]], Awaitable[None]]


async def app(scope: dict[str, Any], receive: Callable[[], Awaitable[dict[str, Any]]], send: Send) -> None:
    """Says which path it was asked for; knows nothing of a lifespan."""
    assert scope["type"] == "http"
    await send({"type": "http.response.start", "status": 200, "headers": [(b"x-app", b"yes")]})
    await send({"type": "http.response.body", "body": b"from " + scope["raw_path"]})


@pytest.fixture
def server(engine: str, tmp_path: Path) -> Iterator[Server]:
    with Processes(tmp_path) as processes:
        yield processes.server(engine=engine)


async def visited(server: Server, target: str, name: str) -> Answer:
    return await asyncio.to_thread(visit, server.http, target, host=f"{name}.localhost")


async def test_an_application_of_the_program_is_served(server: Server, engine: str) -> None:
    async with quictunnel.connect(app, join=server.join, tunnel="py", engine=engine) as tunnel:
        assert (tunnel.name, tunnel.url) == ("py", f"http://py.localhost:{server.http[1]}")
        answer = await visited(server, "/a%20b", "py")
        assert (answer.status, answer["x-app"], answer.body) == (200, "yes", b"from /a%20b")
    assert (await visited(server, "/", "py")).status == 503


async def test_an_httpx_transport_is_served(server: Server, engine: str) -> None:
    async def handle(request: httpx.Request) -> httpx.Response:
        return httpx.Response(201, content=b"got " + await request.aread())

    transport = httpx.MockTransport(handle)
    async with quictunnel.connect(transport, join=server.join, tunnel="py", engine=engine):
        answer = await asyncio.to_thread(visit, server.http, "/", host="py.localhost", method="POST", body=b"hello")
        assert (answer.status, answer.body) == (201, b"got hello")


async def test_a_refusal_is_raised(server: Server, engine: str) -> None:
    token = server.token("other")
    with pytest.raises(FinalRefusal, match="is not for tunnel py"):
        async with quictunnel.connect(
            app, token=token, server=f"127.0.0.1:{server.quic_port}", ca=server.state / "ca.pem", tunnel="py",
            engine=engine,
        ):  # fmt: skip
            pass


async def test_what_cannot_be_is_said_before_anything_is_dialled(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="engine"):
        quictunnel.connect(app, engine="warp")
    with pytest.raises(CommandError, match="which server"):
        async with quictunnel.connect(app, state_dir=tmp_path):
            pass
    with pytest.raises(TypeError, match="no backend"):
        async with quictunnel.connect(3.5, token="x", ca="system"):
            pass
