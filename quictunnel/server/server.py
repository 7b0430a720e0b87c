"""A running server: the public side, the clients' side, and the two lives of a process between start and stop."""

import asyncio
import ssl
from collections.abc import Awaitable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from ipaddress import IPv4Network, IPv6Network
from pathlib import Path
from typing import TypeVar

from loguru import logger

from quictunnel.http.visitor import VisitorLimits, VisitorListener
from quictunnel.log import AccessLog
from quictunnel.quic.engine import Engine, ServerIdentity
from quictunnel.quic.listen import LinkListener
from quictunnel.server.entry import ProxyEntry
from quictunnel.server.gate import Gate
from quictunnel.server.registry import Registry, RegistryLimits
from quictunnel.trust.tokens import TokenStore
from quictunnel.wire.control import Authority
from quictunnel.wire.credit import WindowBudget

__all__ = ["Server", "ServerConfig"]


@dataclass(frozen=True, slots=True)
class ServerConfig:
    """Everything a server is told, as plain values."""

    http: tuple[str, int]
    quic: tuple[str, int]
    domain: str
    identity: ServerIdentity
    authority: str
    "the CA's certificate (PEM) for clients that know its pin; empty without one"

    default_tunnel: bool = False
    trusted_proxies: tuple[IPv4Network | IPv6Network, ...] = ()
    retry: str = "auto"
    window_budget: int = 256 * 1024 * 1024
    "bytes that all receive windows together may grow by"

    visitors: VisitorLimits = field(default_factory=VisitorLimits)
    registry: RegistryLimits = field(default_factory=RegistryLimits)


class Server:
    """Accepts visitors and clients, and brings them together."""

    def __init__(self, config: ServerConfig, engine: Engine, tokens: TokenStore, access: AccessLog) -> None:
        """Raises OSError and ValueError for a certificate or key that cannot be used."""
        self._config = config
        self._access = access
        loop = asyncio.get_running_loop()
        self._loop = loop
        budget = WindowBudget(config.window_budget)
        self.registry = Registry(config.registry)
        self.gate = Gate(
            self.registry,
            tokens,
            authority=Authority(config.authority, _own_certificate(config.identity)),
            public_urls=self.public_urls,
            now=lambda: datetime.now(UTC),
        )
        self.entry = ProxyEntry(
            self.registry,
            budget,
            access,
            domain=config.domain,
            default_tunnel=config.default_tunnel,
            clock=loop.time,
        )
        self.visitors = VisitorListener(
            self.entry.open_exchange,
            config.visitors,
            trusted_proxies=config.trusted_proxies,
            on_done=self.entry.exchange_done,
            budget=budget,
        )
        self.links = LinkListener(engine, config.identity, self.gate, budget, retry=config.retry)
        self.gate.on_accepted = self.links.accepted
        self._ticker: asyncio.TimerHandle | None = None
        self._ticks = 0
        self.http_address: tuple[str, int] = config.http
        self.quic_address: tuple[str, int] = config.quic

    async def start(self, *, tls: ssl.SSLContext | None = None) -> None:
        """Bind both ports. Raises OSError with the address in its text."""
        self.quic_address = await _bound(self.links.start(*self._config.quic), "--quic", self._config.quic)
        try:
            addresses = await _bound(self.visitors.start(*self._config.http, ssl=tls), "--http", self._config.http)
        except OSError:
            self.links.close()
            raise
        self.http_address = addresses[0][:2]
        self._tick()

    def public_urls(self, name: str) -> list[str]:
        """Where visitors find the tunnel of that name."""
        port = self.http_address[1]
        return [f"http://{name}.{self._config.domain}" + ("" if port == 80 else f":{port}")]

    async def stop(self, grace: float) -> None:
        """Stop unnoticed: no new work, then what is under way ends within ``grace`` seconds, then the links."""
        logger.info("= stopping: {} requests in flight get up to {:g} s", self.visitors.in_flight, grace)
        self.visitors.drain()
        self.gate.drain_all()
        await self.visitors.wait_idle(grace)
        self.close()

    def close(self) -> None:
        """Stop at once."""
        if self._ticker is not None:
            self._ticker.cancel()
            self._ticker = None
        self.visitors.close()
        self.gate.close()
        self.links.close()
        self._access.close()

    def _tick(self) -> None:
        """The server's only clock: each part looks at what has become late."""
        self._ticker = self._loop.call_later(0.1, self._tick)
        self._ticks += 1
        self.registry.expire_waiting(self._loop.time())
        if self._ticks % 10 == 0:
            self.gate.recheck_tokens()
        if self._ticks % 100 == 0:
            for session in self.registry.sessions():
                session.retire_links()

    def replace_identity(self, identity: ServerIdentity) -> None:
        """Show a renewed certificate to clients from now on. Raises OSError and ValueError and then changes nothing."""
        self.links.replace_identity(identity)
        self.gate.authority = Authority(self._config.authority, _own_certificate(identity))


def _own_certificate(identity: ServerIdentity) -> str:
    return Path(identity.certificate).read_text("ascii")


_T = TypeVar("_T")


async def _bound(starting: Awaitable[_T], option: str, address: tuple[str, int]) -> _T:
    try:
        return await starting
    except OSError as error:
        reason = error.strerror or str(error)
        raise OSError(error.errno, f"{option} {address[0]}:{address[1]}: {reason}") from None
