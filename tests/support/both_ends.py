"""A server and a client in the test's own process, on real sockets, so that their counts can be looked at."""

import asyncio
import gc
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractContextManager, asynccontextmanager, nullcontext, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from quictunnel.backends.asgi import AsgiBackend, AsgiLeg
from quictunnel.backends.transport import TransportBackend, TransportLeg
from quictunnel.client.agent import Agent, AgentConfig
from quictunnel.client.fan_out import FanOut
from quictunnel.http.departure import Departure
from quictunnel.http.http1_visitor import Http1VisitorLeg
from quictunnel.http.http2 import Http2Stream
from quictunnel.http.http2_origin import Http2Origin, Http2OriginLeg
from quictunnel.http.http2_visitor import Http2VisitorLeg
from quictunnel.http.origin import Origin
from quictunnel.http.origin_leg import OriginLeg
from quictunnel.http.origin_pool import OriginPool
from quictunnel.log import AccessLog
from quictunnel.quic.engine import select_engine
from quictunnel.quic.stream import StreamLeg
from quictunnel.server.registry import RegistryLimits
from quictunnel.server.server import Server, ServerConfig
from quictunnel.trust.owners import Owners
from quictunnel.trust.tokens import TokenStore
from tests.support.crowd import until
from tests.support.memory import identity

__all__ = ["BothEnds", "both_ends", "objects_of_exchanges"]

_OF_EXCHANGES = (
    AsgiLeg,
    Departure,
    Http1VisitorLeg,
    Http2OriginLeg,
    Http2Stream,
    Http2VisitorLeg,
    OriginLeg,
    StreamLeg,
    TransportLeg,
)


def objects_of_exchanges() -> Counter[str]:
    """How many objects there are of each kind that is made for one exchange."""
    gc.collect()
    return Counter(type(each).__name__ for each in gc.get_objects() if isinstance(each, _OF_EXCHANGES))


class BothEnds:
    """A server, a client and whatever the client forwards to."""

    def __init__(self, server: Server, agent: Agent, backend: Any, make_server: Callable[[], Server]) -> None:
        """``make_server`` makes another server of the same state directory."""
        self.server = server
        self.agent = agent
        self.backend = backend
        self.make_server = make_server

    @property
    def counts(self) -> dict[str, int]:
        """Everything of which something could be left."""
        server, links = self.server, self.agent.links
        session = next(iter(server.registry.sessions()))
        visitors = list(server.visitors._connections)
        return {
            "visitors' exchanges": server.visitors.in_flight,
            "visitors' legs": sum(_legs(connection) for connection in visitors),
            "visitors' streams": sum(_streams(connection) for connection in visitors),
            "tunnel's exchanges": session.tunnel.in_flight,
            "session's exchanges": session.in_flight,
            "waiting": len([leg for _, leg in session.tunnel.waiting if not leg.ended]),
            "slots": sum(link.active for link in server.links.links),
            "server's streams": sum(link.exchanges for link in server.links.links),
            "client's streams": sum(link.exchanges for link in links),
            "client's deaf streams": sum(len(link._deaf) for link in links),
            "dirty legs": sum(len(link._dirty) for link in [*links, *server.links.links]),
            "server's window": server.entry._budget.total - server.entry._budget.left,
            "client's window": self.agent._budget.total - self.agent._budget.left,
            **self._backend_counts(),
        }

    def _backend_counts(self) -> dict[str, int]:
        backend = self.backend
        counts = {"backend's exchanges": backend.in_flight}
        if isinstance(backend, OriginPool):
            counts["backend's dials"] = backend.dials
        if isinstance(backend, Origin):
            counts["backend's busy connections"] = backend.connections - backend.kept
        if isinstance(backend, Http2Origin):
            connections = list(backend._connections)
            counts["backend's legs"] = sum(len(connection.legs) for connection in connections)
            counts["backend's streams"] = sum(len(connection._session.streams) for connection in connections)
            counts["backend's waiting"] = len(backend._waiting)
            counts["backend's window"] = backend.budget.total - backend.budget.left
        return counts

    async def left(self, counts: dict[str, int] | None = None, limit: float = 10.0) -> None:
        """Wait until these are the counts, all zero if none are given."""
        counts = counts or dict.fromkeys(self.counts, 0)
        with suppress(AssertionError):
            await until(lambda: self.counts == counts, limit)
        found = self.counts
        assert found == counts, {name: count for name, count in found.items() if count != counts[name]}


def _legs(connection: Any) -> int:
    legs = getattr(connection, "_legs", None)
    if legs is not None:
        return len(legs) + len(connection._waiting)
    return int(connection._leg is not None)


def _streams(connection: Any) -> int:
    session = getattr(connection, "_session", None)
    return 0 if session is None else len(session.streams) + len(session._held)


@asynccontextmanager
async def both_ends(
    engines: tuple[str, str],
    directory: Path,
    backend: Any,
    *,
    registry: RegistryLimits | None = None,
    links_at: str = "127.0.0.1",
    links_in: AbstractContextManager[object] | None = None,
) -> AsyncIterator[BothEnds]:
    """Both ends, before ``backend`` or, if it is a number, an HTTP/1.1 backend on that port.

    The server's socket for links is bound to ``links_at``, within ``links_in``.
    """
    tokens = TokenStore(directory)
    tokens.load()
    secret = tokens.create(["app"], None, datetime.now(UTC)).secret
    files, authority = identity()
    config = ServerConfig(
        ("127.0.0.1", 0),
        (links_at, 0),
        "localhost",
        files,
        authority.decode(),
        registry=registry or RegistryLimits(),
    )

    def make_server() -> Server:
        access = AccessLog("text", enabled=False)
        return Server(config, select_engine(engines[0]), tokens, Owners(directory), access)

    server = make_server()
    with links_in or nullcontext():
        await server.start_links()
    await server.start_visitors()
    if isinstance(backend, int):
        backend = Origin("127.0.0.1", backend)
    if isinstance(backend, AsgiBackend | TransportBackend):
        await backend.start()
    whom = AgentConfig(links_at, server.quic_address[1], "127.0.0.1", secret, "app", authority)
    agent = Agent(whom, select_engine(engines[1]), FanOut(backend))
    running = asyncio.get_running_loop().create_task(agent.run())
    try:
        await until(lambda: agent.serving)
        yield BothEnds(server, agent, backend, make_server)
    finally:
        await agent.stop(0.0)
        await running
        server.close()
        await backend.aclose()
