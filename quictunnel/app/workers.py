"""``quictunnel serve --workers``: several server processes that share the public ports and the one for clients.

The parent binds everything once and keeps it open, so that the place of each worker's sockets among those of a port
stays what it is, and what waits in the queues of a worker that died is there for the one in its place. Each worker
serves what comes to its own sockets: the kernel spreads visitors by their addresses, and clients' datagrams by
connection ids (``quic.steering``).
"""

import errno
import gc
import socket
from collections.abc import Callable, Coroutine, Sequence
from typing import TYPE_CHECKING, Any, Final

from loguru import logger

from quictunnel import log
from quictunnel.app.identity import begin_identity
from quictunnel.app.process import choose_engine, raise_file_limit
from quictunnel.app.renewal import OF_THE_LOG
from quictunnel.app.serve import Bound, Worker, announce, serve
from quictunnel.app.supervise import Message, Parent, Supervisor, one_of_many
from quictunnel.app.takeover import Addresses, take_over
from quictunnel.failures import CommandError, UsageError
from quictunnel.plain import replaced
from quictunnel.quic.steering import steer
from quictunnel.server.server import Sockets
from quictunnel.trust.files import private_directory
from quictunnel.trust.tokens import TokenStore
from quictunnel.values import Address

if TYPE_CHECKING:
    from quictunnel.settings import ServeSettings

__all__ = ["Ports", "serve_workers"]

_BACKLOG: Final = 2048
_ATTEMPTS: Final = 20
"to find a free port, when somebody else takes the one that was free a moment ago"

_STOP_MARGIN: Final = 10.0
"seconds beyond --grace after which a process that should have ended is killed"

Run = Callable[[Coroutine[Any, Any, int]], int]


def serve_workers(settings: "ServeSettings", again: "Callable[[], ServeSettings]", run: Run) -> int:
    """Run a server of several processes; the exit status. ``run`` runs a coroutine in an event loop of its own.

    Raises CommandError, OSError and TrustError at the start.
    """
    # All that a first run makes is made here, once.
    engine = choose_engine(settings.engine)
    raise_file_limit()
    private_directory(settings.state_dir)
    tokens = TokenStore(settings.state_dir)
    tokens.load()
    identity = begin_identity(settings, settings.quic[0])()
    inherited: list[Sockets] = []
    if settings.takeover:
        addresses = Addresses(settings.http, settings.https, settings.quic)
        inherited = [each.hang_up() for each in take_over(settings.state_dir, addresses, settings.workers)]
        if not inherited:
            logger.info("= there is no server to take over from in {}: starting anew", settings.state_dir)
    with Ports(settings, inherited) as ports:
        ready: set[int] = set()
        started: set[int] = set()

        def child(index: int, parent: Parent) -> int:
            worker = Worker(index, parent, ports.leave_to(index), index in ready)
            return one_of_many(lambda: run(serve(settings, again, worker)), others_work=bool(started))

        def heard(index: int, message: Message) -> None:
            if message["kind"] == "ready":
                ready.add(index)
                if len(ready) == settings.workers and not started:
                    started.update(ready)
                    announce(settings, engine, tokens, identity, ports.bound)

        def hung_up() -> None:
            nonlocal settings
            settings = _log_anew(settings, again)

        supervisor = Supervisor(
            child,
            word="worker",
            on_message=heard,
            on_hangup=hung_up,
            on_stop=ports.listen_no_more,
            stop_time=settings.grace + _STOP_MARGIN,
        )
        for index in range(settings.workers):
            supervisor.start(index)
        gc.collect()
        gc.freeze()
        return supervisor.run()


def _log_anew(settings: "ServeSettings", again: "Callable[[], ServeSettings]") -> "ServeSettings":
    """Log as the options say by now; what else has changed, and what is wrong, is for the workers to say."""
    try:
        found = again()
        changed = {name for name in OF_THE_LOG if getattr(found, name) != getattr(settings, name)}
        if changed:
            log.set_up(found.log_level, found.log_format, found.log_file, shared=True)
        return replaced(settings, {name: getattr(found, name) for name in changed})
    except (UsageError, OSError):
        return settings


class Ports:
    """The sockets of all workers, each in a group of its port."""

    def __init__(self, settings: "ServeSettings", inherited: Sequence[Sockets] = ()) -> None:
        """``inherited`` are those of a server that is taken over.

        Raises OSError with the address in its text, and CommandError where workers cannot be.
        """
        self._workers: list[Sockets] = list(inherited)
        self._all: list[socket.socket] = [sock for http, https, quic in inherited for sock in (*http, *https, quic)]
        if not inherited:
            self._open(settings)
        first = self._workers[0]
        self.bound = Bound(
            first.http[0].getsockname()[:2],
            first.https[0].getsockname()[:2] if first.https else None,
            first.quic.getsockname()[:2],
        )

    def _open(self, settings: "ServeSettings") -> None:
        try:
            quic = self._bind("--quic", settings.quic, settings.workers, socket.SOCK_DGRAM)
            http = self._bind("--http", settings.http, settings.workers, socket.SOCK_STREAM)
            https = (
                self._bind("--https", settings.https, settings.workers, socket.SOCK_STREAM)
                if settings.https is not None
                else [[] for _ in range(settings.workers)]
            )
        except BaseException:
            self.close()
            raise
        self._workers = [
            Sockets(mine, mine_too, only) for mine, mine_too, (only,) in zip(http, https, quic, strict=True)
        ]

    def __enter__(self) -> "Ports":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def leave_to(self, index: int) -> Sockets:
        """The sockets of one worker; this process, which is that worker from now on, closes those of the others."""
        mine = self._workers[index]
        kept = {mine.quic, *mine.http, *mine.https}
        for sock in self._all:
            if sock not in kept:
                sock.close()
        return mine

    def listen_no_more(self) -> None:
        """Visitors are refused once the workers do not listen either; the places in the UDP group stay."""
        for worker in self._workers:
            for sock in (*worker.http, *worker.https):
                sock.close()

    def close(self) -> None:
        for sock in self._all:
            sock.close()

    def _bind(self, option: str, place: Address, workers: int, kind: int) -> list[list[socket.socket]]:
        """The sockets of each worker: one for each address that the host has, or for UDP one."""
        try:
            infos = list(
                dict.fromkeys(socket.getaddrinfo(place.host or None, place.port, type=kind, flags=socket.AI_PASSIVE))
            )
            found = infos[:1] if kind == socket.SOCK_DGRAM else infos
            columns = [self._group(family, kind, address, workers) for family, _, _, _, address in found]
        except OSError as error:
            raise OSError(error.errno, f"{option} {place}: {error.strerror or error}") from None
        return [list(row) for row in zip(*columns, strict=True)]

    def _group(self, family: int, kind: int, address: Any, workers: int) -> list[socket.socket]:
        for attempt in range(_ATTEMPTS):
            # A port that anybody else has is not to be shared, though the same user could.
            with _socket(family, kind) as probe:
                probe.bind(address)
                free = probe.getsockname()
            try:
                return self._share(family, kind, free, workers)
            except OSError as error:
                if error.errno != errno.EADDRINUSE or address[1] or attempt == _ATTEMPTS - 1:
                    raise
        raise AssertionError

    def _share(self, family: int, kind: int, address: Any, workers: int) -> list[socket.socket]:
        group: list[socket.socket] = []
        for _ in range(workers):
            sock = _socket(family, kind)
            self._all.append(sock)
            group.append(sock)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            sock.bind(address)
            if kind == socket.SOCK_STREAM:
                sock.listen(_BACKLOG)
            elif len(group) == 1:
                try:
                    steer(sock, workers)
                except OSError as error:
                    logger.debug("SO_ATTACH_REUSEPORT_CBPF: {!r}", error)
                    raise CommandError(
                        "--workers: this system cannot lead a client's datagrams to its worker (Linux can); use 1"
                    ) from None
        return group


def _socket(family: int, kind: int) -> socket.socket:
    sock = socket.socket(family, kind)
    if kind == socket.SOCK_STREAM:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # connections of an earlier process may linger
    if family == socket.AF_INET6 and kind == socket.SOCK_STREAM:
        # The same port of IPv4 is for the socket of that address, if it was asked for.
        sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
    return sock
