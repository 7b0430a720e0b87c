"""``quictunnel connect``: finds out whom to trust, opens the backend, keeps the session alive until told to stop."""

import asyncio
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Final

from loguru import logger

from quictunnel import log
from quictunnel.app.process import calm_collector, choose_engine, hang_up, raise_file_limit, say, stop_signals
from quictunnel.app.renewal import OF_THE_LOG, check_log, flags, renewed, told
from quictunnel.app.supervise import Hopeless, Parent
from quictunnel.client.agent import Agent, AgentConfig, FinalRefusal
from quictunnel.client.choose import open_backend
from quictunnel.client.fan_out import Backend, FanOut, host_rule
from quictunnel.client.health import HealthCheck, HealthRules
from quictunnel.client.reach import Place
from quictunnel.failures import CommandError, UsageError
from quictunnel.trust.files import TrustError, read_bounded
from quictunnel.trust.join import LOCAL_JOIN, TEXT_LIMIT, JoinString
from quictunnel.values import Address
from quictunnel.wire.control import CONNECT_CAPABILITY, Welcome
from quictunnel.wire.credit import WindowBudget

if TYPE_CHECKING:
    from quictunnel.settings import ConnectSettings

__all__ = ["LIVE", "agent_config", "connect", "health_check", "named_backend", "serve_session"]


async def connect(
    settings: "ConnectSettings", again: "Callable[[], ConnectSettings] | None" = None, parent: Parent | None = None
) -> int:
    """Serve the backend through a server; the exit status. Raises CommandError, OSError and TrustError at the start.

    ``again`` reads the settings anew, for SIGHUP, and raises UsageError. With a ``parent`` it is one of several
    processes, and tells it what it would have printed, and how busy it is.
    """
    engine = choose_engine(settings.engine)
    raise_file_limit()
    config = agent_config(settings)
    budget = WindowBudget(settings.window_budget)
    try:
        backend = await named_backend(settings, budget)
    except ValueError as error:
        raise CommandError(str(error)) from None
    fan_out = FanOut(backend, host_rule(settings.host_header, backend.authority), allow_connect=settings.allow_connect)
    announce = _announce if parent is None else partial(_report, parent)
    health = health_check(settings, backend)
    agent = Agent(config, engine, fan_out, budget=budget, health=health, on_welcome=announce)
    gauge: AbstractContextManager[object] = nullcontext()
    if parent is not None:
        from quictunnel.app.gauge import Gauge

        gauge = Gauge(parent, lambda: fan_out.count)
    renewal = _Renewal(settings, again or (lambda: settings), agent, backend, log_shared=parent is not None)
    try:
        with stop_signals(parent) as stopped, gauge, hang_up(renewal.read, renewal.renew):
            calm_collector()
            await serve_session(agent, stopped, settings.grace)
    except FinalRefusal as refusal:
        raise Hopeless(f"the server refuses: {refusal}" if refusal.code != "untrusted" else str(refusal)) from None
    finally:
        await _close(backend, settings.grace)
    return 0


# What a running client can change: what it says to its server, and which one that is.
LIVE: Final = frozenset(
    {
        "ca",
        "health_fall",
        "health_interval",
        "health_path",
        "health_rise",
        "health_timeout",
        "host",
        "join",
        "log_file",
        "log_format",
        "log_level",
        "max_links",
        "server",
        "server_name",
        "sticky",
        "token",
        "weight",
    }
)


class _Renewal:
    """Changes a running client at SIGHUP: all is read before anything is changed."""

    def __init__(
        self,
        settings: "ConnectSettings",
        again: "Callable[[], ConnectSettings]",
        agent: Agent,
        backend: Backend,
        *,
        log_shared: bool,
    ) -> None:
        self._settings = settings
        self._again = again
        self._agent = agent
        self._backend = backend
        self._log_shared = log_shared

    def read(self) -> "ConnectSettings":
        """The settings anew. Raises UsageError. Touches nothing else: a thread may do it."""
        return self._again()

    def renew(self, read: "Callable[[], ConnectSettings] | None" = None) -> None:
        """Change what ``read`` returns other than it was; by default the settings are read here and now."""
        try:
            settings, changed, fixed = renewed(self._settings, (read or self.read)(), LIVE)
            check_log(settings)
            config = agent_config(settings)
        except (CommandError, UsageError, TrustError, ValueError, OSError) as error:
            logger.error("not reloaded, all stays as it was: {}", told(error))
            return
        if changed & OF_THE_LOG:
            log.set_up(settings.log_level, settings.log_format, settings.log_file, shared=self._log_shared)
        self._settings = settings
        self._agent.reconfigure(config, health_check(settings, self._backend))
        logger.info("= reloaded; {}", f"changed: {flags(changed)}" if changed else "no option has changed")
        if fixed:
            logger.warning("these need a restart: {}", flags(fixed))


async def named_backend(settings: "ConnectSettings", budget: WindowBudget) -> Backend:
    """The backend that the settings name. Raises ValueError."""
    return await open_backend(
        settings.backend,
        http=settings.backend_http,
        ca=settings.backend_ca,
        insecure=settings.backend_insecure,
        connect_time=settings.backend_connect_time,
        head_time=settings.backend_head_time,
        body_idle_time=settings.backend_body_idle,
        keep_alive=settings.backend_keep_alive,
        budget=budget,
    )


def health_check(settings: "ConnectSettings", backend: Backend) -> HealthCheck | None:
    """What watches over the backend, if anything is to."""
    if settings.health_path is None:
        return None
    rules = HealthRules(
        settings.health_path,
        interval=settings.health_interval,
        timeout=settings.health_timeout,
        fall=settings.health_fall,
        rise=settings.health_rise,
    )
    return HealthCheck(backend, rules, host_rule(settings.host_header, backend.authority))


async def serve_session(agent: Agent, stopped: asyncio.Event, grace: float) -> None:
    """Run the agent until ``stopped`` is set, then let it finish. Raises FinalRefusal."""
    loop = asyncio.get_running_loop()
    running = loop.create_task(agent.run())
    waiting = loop.create_task(stopped.wait())
    try:
        await asyncio.wait((running, waiting), return_when=asyncio.FIRST_COMPLETED)
        if not running.done():
            logger.info("= stopping: requests in flight get up to {:g} s", grace)
            await agent.stop(grace)
        await running
    finally:
        waiting.cancel()
        running.cancel()


def agent_config(settings: "ConnectSettings") -> AgentConfig:
    """Whom to dial and what to show there. Raises CommandError and TrustError."""
    join = None
    if settings.join is not None:
        join = JoinString.parse(settings.join.get_secret_value())
    elif settings.token is None or settings.ca is None:
        join = _local_join(settings)
    token = settings.token.get_secret_value() if settings.token is not None else join.token if join is not None else ""
    addresses = settings.server or (Address(join.host, join.port) if join is not None else Address("127.0.0.1", 4433),)
    first, *others = (Place(host, port, settings.server_name or host) for host, port in addresses)
    authority, pin = None, None
    if settings.ca is None:
        pin = join.ca_pin if join is not None else None
    elif isinstance(settings.ca, Path):
        from quictunnel.trust.certificates import load_authorities  # with a pin it is not needed, and it is large

        authority = load_authorities(settings.ca, datetime.now(UTC))
    return AgentConfig(
        host=first.host,
        port=first.port,
        server_name=first.server_name,
        token=token,
        tunnel=settings.tunnel or "",
        authority=authority,
        pin=pin,
        max_links=settings.max_links,
        capabilities=(CONNECT_CAPABILITY,) if settings.allow_connect else (),
        others=tuple(others),
        hosts=settings.host,
        weight=settings.weight,
        sticky=settings.sticky or "",
    )


def _local_join(settings: "ConnectSettings") -> JoinString:
    """What a server on this machine left for its user. Raises CommandError that says what else would do."""
    path = settings.state_dir / LOCAL_JOIN
    try:
        return JoinString.parse(read_bounded(path, TEXT_LIMIT).decode("ascii"))
    except ValueError as error:
        raise CommandError(f"{path}: {error}") from None
    except FileNotFoundError:
        pass
    if settings.ca is not None:
        raise CommandError("which token? give --token, or --join with the string that the server prints")
    if settings.server or settings.token is not None:
        raise CommandError("whom to trust? give --join with the string that the server prints, or --ca FILE or system")
    raise CommandError(
        "which server? give --join with the string that `quictunnel serve` prints on the other machine "
        f"(no server has run with the state directory {settings.state_dir} on this one)"
    )


def _announce(welcome: Welcome) -> None:
    say(f"ready tunnel={welcome.tunnel} url={welcome.urls[0] if welcome.urls else '-'}")


def _report(parent: Parent, welcome: Welcome) -> None:
    parent.is_ready(tunnel=welcome.tunnel, url=welcome.urls[0] if welcome.urls else "-")


async def _close(backend: Backend, grace: float) -> None:
    try:
        await backend.aclose(min(grace, 5.0))
    except Exception as error:
        logger.warning("closing the backend {}: {!r}", backend.name, error)
