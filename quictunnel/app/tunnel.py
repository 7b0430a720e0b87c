"""A tunnel from Python: ``connect("myapp:app", join="qt1_…").run()``."""

import asyncio
from types import TracebackType
from typing import Any

import httpx
from loguru import logger
from pydantic import SecretStr, ValidationError

from quictunnel.app.connect import agent_config, health_check, named_backend, serve_session
from quictunnel.app.process import choose_engine, stop_signals
from quictunnel.backends.asgi import AsgiBackend
from quictunnel.backends.transport import TransportBackend
from quictunnel.client.agent import Agent
from quictunnel.client.fan_out import Backend, FanOut, host_rule
from quictunnel.settings import ConnectSettings
from quictunnel.wire.credit import WindowBudget

__all__ = ["Tunnel", "connect"]

# In somebody else's program the log is theirs to ask for: logger.enable("quictunnel").
logger.disable("quictunnel")


def connect(backend: Any, **options: Any) -> "Tunnel":
    """A tunnel to ``backend``, opened by ``async with`` or by ``run()``.

    ``backend`` is what the command takes (``3000``, ``"http://…"``, ``"module:app"``), an ASGI application, or an
    ``httpx.AsyncBaseTransport``. ``options`` are those of ``quictunnel connect`` with underscores: ``join``,
    ``tunnel``, ``server``, ``token``, ``ca``, ``engine``, ``host_header``, ... Raises ValueError for an
    option that cannot be.
    """
    return Tunnel(backend, options)


class Tunnel:
    """One session of a client, in the caller's process.

    Entering it waits until the server has welcomed it, or raises: CommandError and TrustError for what cannot be,
    FinalRefusal for a server that will never have this client. Leaving it finishes what is under way.
    """

    def __init__(self, backend: Any, options: dict[str, Any]) -> None:
        self._backend_given = backend
        named = isinstance(backend, str | int)
        values = {**options, "backend": str(backend) if named else "3000"}
        for secret in ("join", "token"):
            if isinstance(values.get(secret), str):
                values[secret] = SecretStr(values[secret])
        try:
            self._settings = ConnectSettings(**values)
        except ValidationError as error:
            wrong = error.errors(include_input=False, include_url=False)
            raise ValueError("; ".join(f"{'.'.join(map(str, each['loc']))}: {each['msg']}" for each in wrong)) from None
        if self._settings.processes.highest > 1:
            raise ValueError(
                "processes: a tunnel from Python is one session, in the caller's process; run several of it"
            )
        self._backend: Backend | None = None
        self._agent: Agent | None = None
        self._running: asyncio.Task[None] | None = None
        self.url = ""
        "where visitors find it, once it is open"

    @property
    def name(self) -> str:
        """The tunnel's name, once it is open."""
        return "" if self._agent is None else self._agent.tunnel

    async def __aenter__(self) -> "Tunnel":
        agent = await self._make()
        loop = asyncio.get_running_loop()
        running = self._running = loop.create_task(agent.run())  # ended by close
        welcomed = loop.create_task(agent.welcomed.wait())  # ended here
        try:
            await asyncio.wait((running, welcomed), return_when=asyncio.FIRST_COMPLETED)
        finally:
            welcomed.cancel()
        if running.done():
            await self._close_backend()
            await running
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def wait(self) -> None:
        """Until the session ends, which it does only by ``close`` or by FinalRefusal, which this raises."""
        if self._running is not None:
            await asyncio.shield(self._running)

    async def close(self) -> None:
        """Finish what is under way, within the option ``grace``, and leave."""
        running, self._running = self._running, None
        if running is None or self._agent is None:
            return
        if not running.done():
            await self._agent.stop(self._settings.grace)
        await asyncio.wait((running,))
        await self._close_backend()

    def run(self) -> None:
        """Serve until Ctrl-C or SIGTERM, in an event loop of its own."""
        asyncio.run(self._run())

    async def _run(self) -> None:
        agent = await self._make()
        try:
            with stop_signals() as stopped:
                await serve_session(agent, stopped, self._settings.grace)
        finally:
            await self._close_backend()

    async def _make(self) -> Agent:
        settings = self._settings
        config = agent_config(settings)
        engine = choose_engine(settings.engine)
        budget = WindowBudget(settings.window_budget)
        backend = self._backend = await self._open_backend(budget)
        fan_out = FanOut(
            backend, host_rule(settings.host_header, backend.authority), allow_connect=settings.allow_connect
        )
        health = health_check(settings, backend)
        self._agent = Agent(config, engine, fan_out, budget=budget, health=health, on_welcome=self._welcomed)
        return self._agent

    async def _open_backend(self, budget: WindowBudget) -> Backend:
        given, settings = self._backend_given, self._settings
        if isinstance(given, str | int):
            return await named_backend(settings, budget)
        if isinstance(given, httpx.AsyncBaseTransport):
            return TransportBackend(
                given, connect_time=settings.backend_connect_time, head_time=settings.backend_head_time
            )
        if not callable(given):
            raise TypeError(f"{given!r} is no backend: give a name, an ASGI application or an httpx.AsyncBaseTransport")
        backend = AsgiBackend(given, head_time=settings.backend_head_time)
        await backend.start()
        return backend

    def _welcomed(self, welcome: Any) -> None:
        self.url = welcome.urls[0] if welcome.urls else ""

    async def _close_backend(self) -> None:
        if self._backend is not None:
            await self._backend.aclose(min(self._settings.grace, 5.0))
