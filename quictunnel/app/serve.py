"""``quictunnel serve``: makes on its first run what it needs, serves, and stops without cutting anybody off."""

import asyncio
import socket
from datetime import UTC, datetime
from pathlib import Path
from typing import Final, NamedTuple

from loguru import logger

from quictunnel import __version__
from quictunnel.app.process import calm_collector, choose_engine, raise_file_limit, say, stop_signals
from quictunnel.http.tls import quiet_names
from quictunnel.http.visitor import VisitorLimits
from quictunnel.log import AccessLog
from quictunnel.options import CommandError
from quictunnel.quic.engine import Engine, ServerIdentity
from quictunnel.quic.sockets import settle
from quictunnel.server.admin import Admin
from quictunnel.server.registry import RegistryLimits
from quictunnel.server.server import Server, ServerConfig
from quictunnel.server.status import Status
from quictunnel.settings import ServeSettings
from quictunnel.trust.certificates import Issuer, check_pair, ensure_server_certificate, load_authorities, show
from quictunnel.trust.files import TrustError, private_directory, write_private
from quictunnel.trust.join import LOCAL_JOIN, JoinString
from quictunnel.trust.tokens import TokenRefused, TokenStore

__all__ = ["Identity", "identity_of", "serve"]

_RENEWAL_CHECK: Final = 3600.0
"seconds"

_WILDCARDS: Final = ("0.0.0.0", "::", "")


class Identity(NamedTuple):
    """What a server shows of itself."""

    files: ServerIdentity
    authority: str
    "PEM, empty when its clients rely on the system's trust"

    pin: bytes | None

    issuer: Issuer | None
    "of certificates for single tunnels, where the server's own cannot be for all of them"


async def serve(settings: ServeSettings) -> int:
    """Run a server until told to stop; the exit status. Raises CommandError, OSError and TrustError at the start."""
    engine = choose_engine(settings.engine)
    raise_file_limit()
    private_directory(settings.state_dir)
    tokens = TokenStore(settings.state_dir)
    tokens.load()
    identity = identity_of(settings, settings.quic[0])
    access = AccessLog(settings.log_format, enabled=settings.log_level in ("trace", "debug", "info"))
    server = make_server(settings, engine, tokens, identity, access)
    with stop_signals() as stopped, quiet_names():
        await server.start()
        admin = _open_door(settings, engine, server)
        announce(settings, engine, tokens, identity, server)
        calm_collector()
        renewal = asyncio.get_running_loop().create_task(_renew(settings, server))
        try:
            await stopped.wait()
            await server.stop(settings.grace)
        finally:
            renewal.cancel()
            admin.close()
            server.close()
            await settle()
    return 0


def identity_of(settings: ServeSettings, quic_host: str) -> Identity:
    """The certificate of the settings, or the state directory's own, made or renewed if need be. Raises TrustError."""
    now = datetime.now(UTC)
    if settings.cert is None or settings.key is None:
        ensured = ensure_server_certificate(settings.state_dir, _names(settings, quic_host), now)
        if ensured.changed:
            logger.info("issued the server certificate {}: {}", ensured.certificate, ensured.reason)
        files = ServerIdentity(str(ensured.certificate), str(ensured.key))
        # No wildcard is for the names below a domain of one label: see http.tls.
        issuer = Issuer(settings.state_dir, now) if settings.https is not None and "." not in settings.domain else None
        return Identity(files, ensured.authority.read_text("ascii"), ensured.pin, issuer)
    described = check_pair(settings.cert, settings.key, now)
    if described.days_left < 14:
        logger.warning("the certificate {} has {} days left", settings.cert, described.days_left)
    files = ServerIdentity(str(settings.cert), str(settings.key))
    if settings.ca is None:
        return Identity(files, "", None, None)
    return Identity(files, load_authorities(settings.ca, now).decode("ascii"), show(settings.ca)[0].pin, None)


def make_server(
    settings: ServeSettings, engine: Engine, tokens: TokenStore, identity: Identity, access: AccessLog
) -> Server:
    """A server of these settings, not yet started. Raises CommandError."""
    config = ServerConfig(
        http=(settings.http[0], settings.http[1]),
        https=settings.https,
        quic=(settings.quic[0], settings.quic[1]),
        domain=settings.domain,
        identity=identity.files,
        authority=identity.authority,
        issuer=identity.issuer,
        default_tunnel=settings.default_tunnel_allowed,
        trusted_proxies=tuple(settings.trusted_proxies),
        retry=settings.retry,
        window_budget=settings.window_budget,
        visitors=VisitorLimits(
            head_size=settings.head_size,
            head_fields=settings.head_fields,
            target_length=settings.target_length,
            head_time=settings.head_time,
            idle_time=settings.keep_alive,
            body_idle_time=settings.body_idle,
            write_idle_time=settings.write_idle,
            connections=settings.max_visitors,
        ),
        registry=RegistryLimits(
            in_flight=settings.max_in_flight,
            slot_wait=settings.slot_wait,
            hold=settings.hold,
            held=settings.max_held,
        ),
    )
    try:
        return Server(config, engine, tokens, access)
    except (OSError, ValueError) as error:
        raise CommandError(f"the certificate {identity.files.certificate} cannot be used: {error}") from None


def announce(settings: ServeSettings, engine: Engine, tokens: TokenStore, identity: Identity, server: Server) -> None:
    """Print the facts that a script may wait for, and the line to paste on the other machine."""
    address = _dialled_address(settings, server.quic_address)
    http = _joined(*server.http_address)
    facts = f"http={http} quic={_joined(*server.quic_address)} domain={settings.domain} engine={engine.name}"
    say(f"ready {facts}" + (f" https={_joined(*server.https_address)}" if server.https_address is not None else ""))
    say(f"visitors find a tunnel at {server.public_urls('NAME')[0]}")
    if identity.pin is None:
        say(f"clients connect with: quictunnel connect 3000 --server {address} --ca system --token TOKEN")
        say("a token is made by: quictunnel token create --tunnel NAME")
        return
    join = _local_join(settings.state_dir, tokens, address, identity.pin)
    say(f"clients connect with: quictunnel connect 3000 --join {join}")


def _local_join(directory: Path, tokens: TokenStore, address: str, pin: bytes) -> str:
    """The join string of this server, with a token that is made once and kept beside the CA's key, equally private."""
    path = directory / LOCAL_JOIN
    now = datetime.now(UTC)
    token = ""
    try:
        token = JoinString.parse(path.read_text("ascii")).token
        tokens.verify(token, "local", now)
    except (OSError, ValueError, TokenRefused):
        token = tokens.create(["*"], None, now, note="made by serve for its own join string").secret
    join = JoinString(address, pin, token).encode()
    write_private(path, join.encode() + b"\n")
    return join


def _open_door(settings: ServeSettings, engine: Engine, server: Server) -> Admin:
    """The owner's door. A server without one serves all the same."""
    facts = {"worker": 0, "workers": 1, "version": __version__, "engine": engine.name, "domain": settings.domain}
    admin = Admin(settings.state_dir, {"status": Status(server, facts).answer})
    try:
        admin.start()
    except OSError as error:
        logger.warning("quictunnel status cannot ask this server: {}", error)
    return admin


async def _renew(settings: ServeSettings, server: Server) -> None:
    """Show a renewed certificate before the old one expires, for as long as the server runs.

    One of the operator's own is renewed by whoever made it, so its files are only read again.
    """
    while True:
        await asyncio.sleep(_RENEWAL_CHECK)
        try:
            identity = identity_of(settings, settings.quic[0])
            server.replace_identity(identity.files, identity.issuer)
        except (OSError, ValueError, TrustError) as error:
            logger.error("cannot renew the server certificate: {}", error)


def _names(settings: ServeSettings, quic_host: str) -> list[str]:
    """What the server's certificate is for: every name and address that clients, and visitors by TLS, may dial."""
    names = ["localhost", "127.0.0.1", "::1"]
    if settings.domain != "localhost":
        names.append(settings.domain)
    if "." in settings.domain:
        names.append(f"*.{settings.domain}")
    if settings.advertise is not None:
        names.append(settings.advertise[0])
    hosts = [quic_host] if settings.https is None else [quic_host, settings.https.host]
    names += [host if host not in _WILDCARDS else _outward_address() for host in hosts]
    return list(dict.fromkeys(names))


def _dialled_address(settings: ServeSettings, bound: tuple[str, int]) -> str:
    """The address for the join string: the one advertised, else the one bound, else the best guess."""
    if settings.advertise is not None:
        return _joined(settings.advertise[0], settings.advertise[1] or bound[1])
    host = bound[0]
    if host in _WILDCARDS:
        host = settings.domain if settings.domain != "localhost" else _outward_address()
    return _joined(host, bound[1])


def _outward_address() -> str:
    """This machine's address on the way out; nothing is sent to find it."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        try:
            sock.connect(("192.0.2.1", 9))  # TEST-NET-1 (RFC 5737): routed like any address, and nobody's
            return str(sock.getsockname()[0])
        except OSError:
            return "127.0.0.1"


def _joined(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
