"""Changing a running server: by SIGHUP, and by the hour for certificates.

Everything is read before anything is changed: a file that cannot be used is one line in the log, and the server goes
on as it was.
"""

from collections.abc import Callable
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Final

from loguru import logger

from quictunnel import log
from quictunnel.app.identity import Identity, identity_of
from quictunnel.app.process import visitors_allowed
from quictunnel.app.renewal import OF_THE_LOG, check_log, flags, renewed, told
from quictunnel.failures import UsageError
from quictunnel.http.visitor import VisitorLimits
from quictunnel.log import AccessLog
from quictunnel.server.registry import RegistryLimits
from quictunnel.server.server import Server, ServerConfig
from quictunnel.trust.files import TrustError
from quictunnel.trust.tokens import TokenStore

if TYPE_CHECKING:
    from quictunnel.settings import LogSettings, ServeSettings

__all__ = ["Reloader", "default_tunnel_allowed", "logs_requests", "server_config"]

_LIVE: Final = frozenset(
    {
        "advertise",
        "body_idle",
        "ca",
        "cert",
        "default_tunnel",
        "grace",
        "head_fields",
        "head_size",
        "head_time",
        "hold",
        "keep_alive",
        "key",
        "log_file",
        "log_format",
        "log_level",
        "max_held",
        "max_in_flight",
        "max_names",
        "max_visitors",
        "retry",
        "slot_wait",
        "target_length",
        "trusted_proxies",
        "write_idle",
    }
)
"the options that a running server can change; all others need a new process"


class Reloader:
    """Holds the settings that a server runs by now."""

    def __init__(
        self,
        settings: "ServeSettings",
        again: "Callable[[], ServeSettings]",
        server: Server,
        tokens: TokenStore,
        access: AccessLog,
        identity: Identity,
        announce: "Callable[[ServeSettings, Identity], None]" = lambda settings, identity: None,
        *,
        log_shared: bool = False,
        worker: int = 0,
    ) -> None:
        """``again`` reads the settings anew, and raises UsageError.

        ``announce`` is called when clients are to be told something else than before. ``worker`` is this process's
        number among ``settings.workers``.
        """
        self.settings = settings
        self._again = again
        self._server = server
        self._tokens = tokens
        self._access = access
        self._identity = identity
        self._announce = announce
        self._log_shared = log_shared
        self._worker = worker

    def read(self) -> "ServeSettings":
        """The settings anew. Raises UsageError. Touches nothing else: a thread may do it, and loads what comes next."""
        import quictunnel.trust.certificates  # noqa: F401

        return self._again()

    def reload(self, read: "Callable[[], ServeSettings] | None" = None) -> None:
        """Read everything anew, and change what can be changed.

        ``read`` returns the settings or raises UsageError; by default they are read here and now.
        """
        try:
            settings, changed, fixed = renewed(self.settings, (read or self.read)(), _LIVE)
            check_log(settings)
            identity = identity_of(settings, settings.quic[0])
            self._server.reconfigure(server_config(settings, identity, self._worker))
        except (UsageError, TrustError, ValueError, OSError) as error:
            logger.error("not reloaded, all stays as it was: {}", told(error))
            return
        if changed & OF_THE_LOG:
            log.set_up(settings.log_level, settings.log_format, settings.log_file, shared=self._log_shared)
            self._access.change(settings.log_format, enabled=logs_requests(settings))
        try:
            self._tokens.reload_if_changed()
        except TrustError as error:
            logger.error("{}", error)
        told_anew = "advertise" in changed or identity.pin != self._identity.pin
        self.settings, self._identity = settings, identity
        logger.info("= reloaded; {}", f"changed: {flags(changed)}" if changed else "no option has changed")
        if fixed:
            logger.warning("these need a new process (quictunnel serve --takeover): {}", flags(fixed))
        if told_anew:
            self._announce(settings, identity)

    def renew(self) -> None:
        """Read the certificate anew if it is another, and make the next one if it is time."""
        if not self._identity.is_due(datetime.now(UTC)):
            return
        try:
            identity = identity_of(self.settings, self.settings.quic[0])
            self._server.reconfigure(server_config(self.settings, identity, self._worker))
            self._identity = identity
        except (OSError, ValueError, TrustError) as error:
            logger.error("cannot renew the server certificate: {}", told(error))


def server_config(settings: "ServeSettings", identity: Identity, worker: int = 0) -> ServerConfig:
    """What a server of these settings is told, or one worker of it: what is limited as a whole is divided evenly."""
    workers = settings.workers
    return ServerConfig(
        http=(settings.http[0], settings.http[1]),
        https=settings.https,
        quic=(settings.quic[0], settings.quic[1]),
        domain=settings.domain,
        identity=identity.files,
        authority=identity.authority,
        issuer=identity.issuer,
        default_tunnel=default_tunnel_allowed(settings),
        max_names=settings.max_names,
        trusted_proxies=tuple(settings.trusted_proxies),
        retry=settings.retry,
        window_budget=-(-settings.window_budget // workers),
        visitors=VisitorLimits(
            head_size=settings.head_size,
            head_fields=settings.head_fields,
            target_length=settings.target_length,
            head_time=settings.head_time,
            idle_time=settings.keep_alive,
            body_idle_time=settings.body_idle,
            write_idle_time=settings.write_idle,
            connections=visitors_allowed(-(-settings.max_visitors // workers)),
        ),
        registry=RegistryLimits(
            in_flight=-(-settings.max_in_flight // workers),
            slot_wait=settings.slot_wait,
            hold=settings.hold,
            held=-(-settings.max_held // workers),
        ),
        worker=worker,
        workers=workers,
    )


def default_tunnel_allowed(settings: "ServeSettings") -> bool:
    """``default_tunnel``, or by default whether the domain is ``localhost``."""
    return settings.domain == "localhost" if settings.default_tunnel is None else settings.default_tunnel


def logs_requests(settings: "LogSettings") -> bool:
    """Whether the line of each request is logged."""
    return settings.log_level in ("trace", "debug", "info")
