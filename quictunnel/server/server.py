"""A running server: the public side, the clients' side, and the two lives of a process between start and stop."""

import asyncio
import socket
from collections.abc import Awaitable, Collection, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from ipaddress import IPv4Network, IPv6Network
from pathlib import Path
from typing import TYPE_CHECKING, Final, NamedTuple, TypeVar

from loguru import logger

from quictunnel.http.tls import VisitorTls
from quictunnel.http.visitor import VisitorLimits, VisitorListener
from quictunnel.log import AccessLog
from quictunnel.quic.engine import Engine, ServerIdentity
from quictunnel.quic.listen import LinkListener
from quictunnel.quic.steering import Steering
from quictunnel.quic.succession import Predecessor
from quictunnel.server.book import Book
from quictunnel.server.entry import ProxyEntry
from quictunnel.server.gate import Gate
from quictunnel.server.hosts import Hosts
from quictunnel.server.probes import Prober
from quictunnel.server.registry import Registry, RegistryLimits
from quictunnel.trust.owners import Owners
from quictunnel.trust.tokens import TokenStore
from quictunnel.wire.control import Authority
from quictunnel.wire.credit import WindowBudget
from quictunnel.wire.errors import TunnelError
from quictunnel.wire.fields import tunnel_name

if TYPE_CHECKING:
    from quictunnel.trust.certificates import Issuer

__all__ = ["Known", "Server", "ServerConfig", "Sockets", "public_urls"]

_LOOK_EVERY: Final = 0.02
"seconds"


@dataclass(frozen=True, slots=True)
class ServerConfig:
    """Everything a server is told, as plain values."""

    http: tuple[str, int]
    quic: tuple[str, int]
    domain: str
    identity: ServerIdentity
    "shown to clients, and to visitors by TLS"

    authority: str
    "the CA's certificate (PEM) for clients that know its pin; empty without one"

    https: tuple[str, int] | None = None
    "where visitors come in by TLS, beside ``http``"

    issuer: "Issuer | None" = None
    "makes certificates for custom hosts, and for tunnels of a domain whose wildcard no certificate can have"

    default_tunnel: bool = False
    max_names: int = 1000
    "tunnel names and custom hosts that one token may have"

    trusted_proxies: tuple[IPv4Network | IPv6Network, ...] = ()
    retry: str = "auto"
    window_budget: int = 256 * 1024 * 1024
    "bytes that all receive windows together may grow by"

    visitors: VisitorLimits = field(default_factory=VisitorLimits)
    registry: RegistryLimits = field(default_factory=RegistryLimits)

    worker: int = 0
    workers: int = 1
    "how many processes share the ports, and which of them this is"


class Sockets(NamedTuple):
    """What a server listens at, when another process has opened it."""

    http: list[socket.socket]
    https: list[socket.socket]
    quic: socket.socket


class Known(NamedTuple):
    """A tunnel that a server knows, as its successor hears of it."""

    name: str
    lost: float | None
    "for how many seconds it has had no client"

    sessions: list[str]
    "the keys of its sessions that were heard lately"


class Server:
    """Accepts visitors and clients, and brings them together."""

    def __init__(
        self, config: ServerConfig, engine: Engine, tokens: TokenStore, owners: Owners, access: AccessLog
    ) -> None:
        """``owners`` is closed with it. Raises OSError and ValueError for a certificate or key that cannot be used."""
        self._config = config
        self._access = access
        loop = asyncio.get_running_loop()
        self._loop = loop
        budget = WindowBudget(config.window_budget)
        self._book = Book(owners, tokens, max_names=config.max_names, now=_now, clock=loop.time)
        self.registry = Registry(config.registry, self._book.knows, self._book.only, loop.time())
        self._hosts = Hosts(self.registry.tunnel, self._book.host)
        self.gate = Gate(
            self.registry,
            tokens,
            self._book,
            self._hosts,
            domain=config.domain,
            authority=Authority(config.authority, _own_certificate(config.identity)),
            public_urls=self.public_urls,
            now=_now,
            worker=config.worker,
            workers=config.workers,
        )
        self.entry = ProxyEntry(
            self.registry,
            self._hosts,
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
        self._issuer = config.issuer
        self._tls: VisitorTls | None = None
        if config.https is not None:
            self._tls = VisitorTls(config.identity.certificate, config.identity.key, self._issue, self._own_name)
        steering = Steering(config.worker, config.workers)
        self.links = LinkListener(engine, config.identity, self.gate, budget, retry=config.retry, steering=steering)
        self.prober = Prober(self.registry, budget, loop.time)
        self.gate.on_accepted = self.links.accepted
        self._ticker: asyncio.TimerHandle | None = None
        self._ticks = 0
        self.draining = False
        self.http_address: tuple[str, int] = config.http
        self.https_address: tuple[str, int] | None = config.https
        self.quic_address: tuple[str, int] = config.quic

    async def start(self) -> None:
        """Bind all ports. Raises OSError with the address in its text."""
        await self.start_links()
        await self.start_visitors()

    async def start_links(self, sockets: Sockets | None = None, before: Predecessor | None = None) -> None:
        """Take clients in; what comes for links of ``before`` is passed on to it. Raises OSError as ``start``."""
        quic = self._config.quic
        self.links.predecessor = before
        if sockets is not None:
            # Clients are told of these before visitors are let in.
            self.http_address = sockets.http[0].getsockname()[:2]
            if sockets.https:
                self.https_address = sockets.https[0].getsockname()[:2]
        starting = self.links.start(*quic, sock=None if sockets is None else sockets.quic)
        self.quic_address = await _bound(starting, "--quic", quic)
        self._tick()

    async def start_visitors(self, sockets: Sockets | None = None) -> None:
        """Take visitors in. Raises OSError as ``start``, and then all is closed."""
        config = self._config
        http, https, _ = sockets or ((), (), None)
        try:
            addresses = await _bound(self.visitors.start(*config.http, sockets=http), "--http", config.http)
            self.http_address = addresses[0]
            if config.https is not None:
                starting = self.visitors.start(*config.https, tls=self._tls, sockets=https)
                addresses = await _bound(starting, "--https", config.https)
                self.https_address = addresses[0]
        except OSError:
            self.close()
            raise

    def public_urls(self, name: str, hosts: Sequence[str] = ()) -> list[str]:
        """Where visitors find the tunnel of that name and of these custom hosts, the best way first."""
        own = f"{name}.{self._config.domain}"
        exact = [host for host in hosts if not host.startswith("*.")]
        wild = [host for host in hosts if host.startswith("*.")]
        return [
            *(self._urls(host)[0] for host in exact),
            *self._urls(own),
            *(self._urls(host)[0] for host in wild),
        ]

    def _urls(self, host: str) -> list[str]:
        return public_urls(host, self.http_address, self.https_address)

    # The end

    async def stop(self, grace: float) -> None:
        """Stop unnoticed: no new work, then what is under way ends within ``grace`` seconds, then the links."""
        logger.info("= stopping: {} requests in flight get up to {:g} s", self.visitors.in_flight, grace)
        deadline = self._loop.time() + grace
        self.draining = True
        self.visitors.drain()
        self.gate.drain_all()
        await self.visitors.wait_idle(grace)
        before = self.links.predecessor
        if before is not None:
            # What is sent to that one comes by way of us.
            with suppress(TimeoutError):
                async with asyncio.timeout_at(deadline):
                    await before.gone.wait()
        self.close()

    def close(self) -> None:
        """Stop at once."""
        if self._ticker is not None:
            self._ticker.cancel()
            self._ticker = None
        self.visitors.close()
        self.gate.close()
        self.links.close()
        self._book.close()
        self._access.close()

    # One server takes over from another

    def known(self) -> list[Known]:
        """What a successor has to know before visitors come to it."""
        now = self._loop.time()
        return [
            Known(
                tunnel.name,
                None if tunnel.lost_at is None or tunnel.sessions else now - tunnel.lost_at,
                [each.key for each in tunnel.sessions.values() if not each.is_suspect() and not each.is_leaving()],
            )
            for tunnel in self.registry.tunnels.values()
        ]

    async def succeed(self, known: Collection[Known], limit: float) -> int:
        """Wait until the sessions of the server before this one have come here, for up to ``limit`` seconds.

        Its tunnels are known here from now on. How many sessions have not come.
        """
        now = self._loop.time()
        for tunnel in known:
            self.registry.remember(tunnel.name, now - (tunnel.lost or 0.0))
        missing = [(tunnel.name, key) for tunnel in known for key in tunnel.sessions]
        deadline = now + limit
        while missing and self._loop.time() < deadline:
            await asyncio.sleep(_LOOK_EVERY)
            missing = self._not_here(missing)
        return len(missing)

    def _not_here(self, sessions: Iterable[tuple[str, str]]) -> list[tuple[str, str]]:
        tunnels = self.registry.tunnels
        return [
            (name, key) for name, key in sessions if name not in tunnels or tunnels[name].session_of_key(key) is None
        ]

    def _tick(self) -> None:
        """The server's only clock: each part looks at what has become late."""
        self._ticker = self._loop.call_later(0.1, self._tick)
        self._ticks += 1
        self.registry.look_again(self._loop.time())
        self.prober.look()
        if self._ticks % 10 == 0:
            self.gate.recheck_tokens()
            self.registry.rescue()
        if self._ticks % 100 == 0:
            for session in self.registry.sessions():
                session.retire_links()

    def reconfigure(self, config: ServerConfig) -> None:
        """Go by ``config`` from now on; its addresses, domain and window budget must be those of before.

        Raises OSError and ValueError for a certificate that cannot be used, and then changes nothing.
        """
        certificate = _own_certificate(config.identity)
        self.links.replace_identity(config.identity)
        if self._tls is not None:
            if certificate != self.gate.authority.server:
                self._tls.replace(config.identity.certificate, config.identity.key, self._issue)
            self._issuer = config.issuer
        self.gate.authority = Authority(config.authority, certificate)
        self.links.retry = config.retry
        self.registry.limits = config.registry
        self._book.max_names = config.max_names
        self.visitors.change(config.visitors, config.trusted_proxies)
        self.entry.default_tunnel = config.default_tunnel
        self._config = config

    def _own_name(self, host: str) -> str:
        """What a certificate of its own for a visitor's host is to be for; empty for a host that needs or has none."""
        domain = self._config.domain
        if self._issuer is None or host == domain:
            return ""
        name = tunnel_name(host, domain)
        with suppress(TunnelError):
            if name is None:
                pattern = self._hosts.pattern(host)
                return host if pattern.startswith("*.") and "." not in pattern[2:] else pattern
            # Below a domain of more labels the server's own certificate is for all of them.
            if "." not in domain and "." not in name and self.registry.tunnel(name) is not None:
                return host
        return ""

    def _issue(self, name: str) -> bytes:
        assert self._issuer is not None
        return self._issuer.issue(name, _now())


def _now() -> datetime:
    return datetime.now(UTC)


def public_urls(host: str, http: tuple[str, int], https: tuple[str, int] | None) -> list[str]:
    """Where visitors find a host of a server that is bound to these addresses, the best way first."""
    urls = [f"http://{host}" + ("" if http[1] == 80 else f":{http[1]}")]
    if https is not None:
        urls.insert(0, f"https://{host}" + ("" if https[1] == 443 else f":{https[1]}"))
    return urls


def _own_certificate(identity: ServerIdentity) -> str:
    return Path(identity.certificate).read_text("ascii")


_T = TypeVar("_T")


async def _bound(starting: Awaitable[_T], option: str, address: tuple[str, int]) -> _T:
    try:
        return await starting
    except OSError as error:
        reason = error.strerror or str(error)
        raise OSError(error.errno, f"{option} {address[0]}:{address[1]}: {reason}") from None
