"""``quictunnel serve``: makes on its first run what it needs, serves, and stops without cutting anybody off."""

import asyncio
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Final, NamedTuple

from loguru import logger

from quictunnel import __version__
from quictunnel.app.identity import WILDCARDS, Identity, begin_identity, outward_address
from quictunnel.app.process import calm_collector, choose_engine, hang_up, raise_file_limit, say, stop_signals
from quictunnel.app.reload import Reloader, logs_requests, server_config
from quictunnel.app.supervise import Parent
from quictunnel.app.takeover import Addresses, Inherited, take_over
from quictunnel.failures import CommandError
from quictunnel.http.tls import quiet_names
from quictunnel.log import AccessLog
from quictunnel.quic.engine import Engine
from quictunnel.quic.sockets import settle
from quictunnel.server.admin import Admin
from quictunnel.server.handover import Handover
from quictunnel.server.server import Server, Sockets, public_urls
from quictunnel.server.status import Status
from quictunnel.trust.files import private_directory, write_private
from quictunnel.trust.join import LOCAL_JOIN, JoinString
from quictunnel.trust.owners import Owners
from quictunnel.trust.tokens import TokenRefused, TokenStore
from quictunnel.values import Address

if TYPE_CHECKING:
    from quictunnel.settings import ServeSettings

__all__ = ["Bound", "Worker", "announce", "make_server", "serve"]

_RENEWAL_CHECK: Final = 3600.0
"seconds"

# A client takes another process's silence for suspect after four seconds (quic.link.SUSPECT_AFTER), and dials anew.
_CLIENTS_TIME: Final = 6.0
_CLIENTS_QUIET: Final = 0.5
_CLIENTS_LOOK: Final = 0.05
"seconds"


class Worker(NamedTuple):
    """What one of several processes of a server is given by its parent."""

    number: int
    parent: Parent
    sockets: Sockets
    replaces: bool
    "whether a process with this number has died"


async def serve(
    settings: "ServeSettings", again: "Callable[[], ServeSettings] | None" = None, worker: Worker | None = None
) -> int:
    """Run a server until told to stop; the exit status. Raises CommandError, OSError and TrustError at the start.

    ``again`` reads the settings anew, for SIGHUP, and raises UsageError. With a ``worker`` this process is one of
    several; its parent has announced the server.
    """
    index, parent, sockets = (worker.number, worker.parent, worker.sockets) if worker is not None else (0, None, None)
    raise_file_limit()
    private_directory(settings.state_dir)
    tokens = TokenStore(settings.state_dir)
    tokens.load()
    identify = begin_identity(settings, settings.quic[0])
    engine = choose_engine(settings.engine)  # loaded meanwhile
    identity = identify()
    access = AccessLog(settings.log_format, enabled=logs_requests(settings))
    server = make_server(settings, engine, tokens, identity, access, index)

    def tell(settings: "ServeSettings", identity: Identity) -> None:
        if index == 0:
            bound = Bound(server.http_address, server.https_address, server.quic_address)
            announce(settings, engine, tokens, identity, bound)

    reloader = Reloader(
        settings, again or (lambda: settings), server, tokens, access, identity, tell,
        log_shared=worker is not None, worker=index,
    )  # fmt: skip
    # Only now: what cannot be is found out before anything of a running server is touched.
    inherited = _inherit(settings, worker) if settings.takeover else None
    with stop_signals(parent) as stopped, hang_up(reloader.read, reloader.reload), quiet_names():
        if inherited is not None:
            try:
                await inherited.begin(server)
            except BaseException:
                server.close()
                raise
        else:
            await server.start_links(sockets)
            if worker is not None and worker.replaces:
                await _clients_back(server, stopped)
            await server.start_visitors(sockets)

        def succeeded() -> None:
            if parent is not None:
                parent.leave()
            stopped.set()

        admin = _open_door(settings, engine, server, index, succeeded)
        if parent is None:
            tell(settings, identity)
        else:
            parent.is_ready()
        calm_collector()
        renewal = asyncio.get_running_loop().create_task(_renew(reloader))
        try:
            await stopped.wait()
            await server.stop(reloader.settings.grace)
        finally:
            renewal.cancel()
            admin.close()
            server.close()
            await settle()
    return 0


async def _clients_back(server: Server, stopped: asyncio.Event) -> None:
    """Wait until the clients of a process that died have found the one in its place, for some seconds at most.

    Visitors wait meanwhile in the sockets' queues, and not one of them is told that there is no such tunnel.
    """
    loop = asyncio.get_running_loop()
    until = loop.time() + _CLIENTS_TIME
    count, since = 0, until
    while loop.time() < until and loop.time() - since < _CLIENTS_QUIET and not stopped.is_set():
        await asyncio.sleep(_CLIENTS_LOOK)
        sessions = len(server.registry.sessions())
        if sessions != count:
            count, since = sessions, loop.time()


def make_server(
    settings: "ServeSettings",
    engine: Engine,
    tokens: TokenStore,
    identity: Identity,
    access: AccessLog,
    worker: int = 0,
) -> Server:
    """A server of these settings, not yet started. Raises CommandError and TrustError."""
    owners = Owners(settings.state_dir)
    try:
        return Server(server_config(settings, identity, worker), engine, tokens, owners, access)
    except (OSError, ValueError) as error:
        owners.close()
        raise CommandError(f"the certificate {identity.files.certificate} cannot be used: {error}") from None


class Bound(NamedTuple):
    """The addresses of a server."""

    http: tuple[str, int]
    https: tuple[str, int] | None
    quic: tuple[str, int]


def announce(settings: "ServeSettings", engine: Engine, tokens: TokenStore, identity: Identity, bound: Bound) -> None:
    """Print the facts that a script may wait for, and the line to paste on the other machine."""
    address = _dialled_address(settings, bound.quic)
    facts = f"http={Address(*bound.http)} quic={Address(*bound.quic)} domain={settings.domain} engine={engine.name}"
    facts += f" https={Address(*bound.https)}" if bound.https is not None else ""
    say(f"ready {facts}" + (f" workers={settings.workers}" if settings.workers > 1 else ""))
    say(f"visitors find a tunnel at {public_urls(f'NAME.{settings.domain}', bound.http, bound.https)[0]}")
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


def _inherit(settings: "ServeSettings", worker: Worker | None) -> Inherited | None:
    """What the running server, or its worker of the same number, leaves to this one. Raises CommandError."""
    addresses = Addresses(settings.http, settings.https, settings.quic)
    only = None if worker is None else worker.number
    found = take_over(settings.state_dir, addresses, settings.workers, only=only)
    if found:
        if worker is not None:  # the same, once more
            for sock in (*worker.sockets.http, *worker.sockets.https, worker.sockets.quic):
                sock.close()
        return found[0]
    if worker is None:
        logger.info("= there is no server to take over from in {}: starting anew", settings.state_dir)
    return None


def _open_door(
    settings: "ServeSettings", engine: Engine, server: Server, worker: int, end: Callable[[], None]
) -> Admin:
    """The owner's door. A server without one serves all the same. ``end`` is called when another process serves."""
    facts = {
        "worker": worker,
        "workers": settings.workers,
        "version": __version__,
        "engine": engine.name,
        "domain": settings.domain,
        "listens": {
            name: None if address is None else str(Address(*address))
            for name, address in (("http", settings.http), ("https", settings.https), ("quic", settings.quic))
        },
    }
    status = Status(server, facts)
    verbs = {"about": status.answer_about, "status": status.answer, "takeover": Handover(server, end).answer}
    admin = Admin(settings.state_dir, verbs)
    try:
        admin.start()
    except OSError as error:
        logger.warning("quictunnel status cannot ask this server: {}", error)
    return admin


async def _renew(reloader: Reloader) -> None:
    """Show a renewed certificate before the old one expires, for as long as the server runs.

    One of the operator's own is renewed by whoever made it, so its files are only read again.
    """
    while True:
        await asyncio.sleep(_RENEWAL_CHECK)
        reloader.renew()


def _dialled_address(settings: "ServeSettings", bound: tuple[str, int]) -> str:
    """The address for the join string: the one advertised, else the one bound, else the best guess."""
    if settings.advertise is not None:
        return str(Address(settings.advertise[0], settings.advertise[1] or bound[1]))
    host = bound[0]
    if host in WILDCARDS:
        host = settings.domain if settings.domain != "localhost" else outward_address()
    return str(Address(host, bound[1]))
