"""``quictunnel demo``: a server, a client and a small backend in one process, and requests that go through them."""

import asyncio
import errno
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

from loguru import logger

from quictunnel.app.identity import identity_of
from quictunnel.app.process import calm_collector, choose_engine, raise_file_limit, say, stop_signals
from quictunnel.app.serve import make_server
from quictunnel.backends.asgi import AsgiBackend
from quictunnel.client.agent import Agent, AgentConfig
from quictunnel.client.fan_out import FanOut
from quictunnel.demo import app
from quictunnel.failures import CommandError
from quictunnel.log import AccessLog
from quictunnel.quic.engine import Engine
from quictunnel.quic.sockets import settle
from quictunnel.server.server import Server
from quictunnel.settings import DemoSettings, ServeSettings
from quictunnel.trust.tokens import TokenStore
from quictunnel.values import Address

__all__ = ["demo"]

TUNNEL: Final = "demo"
REQUESTS: Final = 50
START_TIME: Final = 15.0
"seconds until the client must be served"


async def demo(settings: DemoSettings) -> int:
    """Show the whole tunnel at work until Ctrl-C, or once; the exit status. Raises CommandError and OSError."""
    engine = choose_engine(settings.engine)
    raise_file_limit()
    with tempfile.TemporaryDirectory(prefix="quictunnel-demo-") as directory, stop_signals() as stopped:
        return await _demo(settings, engine, Path(directory), stopped)


async def _demo(settings: DemoSettings, engine: Engine, directory: Path, stopped: asyncio.Event) -> int:
    tokens = TokenStore(directory)
    tokens.load()
    server, authority = await _start_server(settings, engine, directory, tokens)
    say(f"server     certificates made, {engine.name} on {server.quic_address[0]}:{server.quic_address[1]} (UDP)")
    token = tokens.create([TUNNEL], None, datetime.now(UTC)).secret
    host, port = server.quic_address[:2]
    config = AgentConfig(host=host, port=port, server_name=host, token=token, tunnel=TUNNEL, authority=authority)
    backend = AsgiBackend(app)
    await backend.start()
    agent = Agent(config, engine, FanOut(backend))
    running = asyncio.get_running_loop().create_task(agent.run())
    try:
        await _served(agent, running)
        url = server.public_urls(TUNNEL)[0]
        say(f"client     serves the tunnel {TUNNEL}, its backend is an ASGI application in this process")
        failed = await _send_requests(server, url)
        say(f"requests   {REQUESTS - failed} of {REQUESTS} went through, all at once")
        say(f"public URL {url}")
        if not settings.once and not failed:
            calm_collector()
            say("           open it in a browser; Ctrl-C ends the demo")
            await stopped.wait()
        await agent.stop(2.0)
        await server.stop(2.0)
        return 1 if failed else 0
    finally:
        running.cancel()
        server.close()
        await backend.aclose(1.0)
        await settle()


async def _start_server(
    settings: DemoSettings, engine: Engine, directory: Path, tokens: TokenStore
) -> tuple[Server, bytes]:
    port = settings.http[1]
    while True:
        options = ServeSettings(
            http=Address(settings.http.host, port),
            https=None,  # whatever the environment has for serve
            quic=settings.quic,
            state_dir=directory,
        )
        identity = identity_of(options, options.quic[0])
        access = AccessLog(settings.log_format, enabled=settings.log_level in ("trace", "debug", "info"))
        server = make_server(options, engine, tokens, identity, access)
        try:
            await server.start()
            return server, identity.authority.encode()
        except OSError as error:
            server.close()
            if error.errno != errno.EADDRINUSE or port != 8080:
                raise
            # A demo must not fail because something else has the default port.
            logger.warning("{}; taking another port", error)
            port = 0


async def _served(agent: Agent, running: "asyncio.Task[None]") -> None:
    try:
        async with asyncio.timeout(START_TIME):
            while not agent.welcomed.is_set():
                if running.done():
                    await running
                await asyncio.sleep(0.01)
    except TimeoutError:
        raise CommandError(f"the demo's client was not served within {START_TIME:g} s") from None


async def _send_requests(server: Server, url: str) -> int:
    """Requests over the public side, all at once; how many failed."""
    import httpx  # here, because serve and connect import this package too and would start 65 ms later

    host, port = server.http_address[:2]
    headers = {"Host": url.removeprefix("http://")}
    base = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
    async with httpx.AsyncClient(base_url=base, headers=headers, timeout=10.0, trust_env=False) as client:

        async def one(number: int) -> bool:
            body = b"hello %d" % number
            try:
                answer = await client.post("/echo", content=body)
            except httpx.HTTPError as error:
                logger.error("request {} failed: {!r}", number, error)
                return False
            return answer.status_code == 200 and answer.content == body

        results = await asyncio.gather(*(one(number) for number in range(REQUESTS)))
    return results.count(False)
