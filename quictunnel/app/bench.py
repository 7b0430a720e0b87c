"""``quictunnel bench``: a tunnel measured by requests that go through it, and what limits it.

Without a server's address all of it is made for the purpose: a server, a client and a backend, each a process of its
own, with a directory that is thrown away. With one only client and backend are, and the requests take the way of
visitors, from this machine to the server's public URL and back. The load is this process's own.
"""

import asyncio
import json
import os
import re
import secrets
import signal
import ssl
import sys
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any, Final, NamedTuple

from quictunnel.app.process import say
from quictunnel.backends.target import parse_backend
from quictunnel.bench.measure import ANSWER_TIME, Loop, Marks, Place, ask, closed_loop, download, on_schedule, upload
from quictunnel.bench.meter import Meter, Reading, Work, cores, work
from quictunnel.bench.report import Run, as_json, as_text
from quictunnel.bench.verdict import Bulk, Rates
from quictunnel.failures import CommandError, reason
from quictunnel.load.plan import parse_target
from quictunnel.load.run import resolve
from quictunnel.log import escape
from quictunnel.quic.engine import select_engine
from quictunnel.settings import BenchSettings
from quictunnel.trust.join import JoinString

__all__ = ["bench"]

START_TIME: Final = 15.0
"seconds for a process to be ready, and for a server to be reached"

SHUT_TIME: Final = 5.0
"seconds that a server may think about a request that no client accepts: serve --hold, and a little"

STOP_TIME: Final = 5.0
"seconds for a process to end, before it is killed"

ASK_TIME: Final = 5.0
"seconds for a process to answer"

CONNECTIONS: Final = (16, 64)
STREAMS: Final = (1, 8)

RATES: Final = (1000.0, 500.0, 200.0, 100.0, 50.0, 20.0, 10.0, 5.0, 2.0, 1.0)
"requests a second of the open loop: the first that is at most half of what there can be"

LOCAL_BYTES: Final = 2**40
"bytes that one transfer may move where no network is in between: no bound but time"

# What each thing may take of the time. Those of the bulk transfers go to the others where there are none.
_DIRECT: Final = 0.05
_DIRECT_MANY: Final = 0.05
_LONE: Final = 0.14
_MANY: Final = {16: 0.1, 64: 0.14}
_SCHEDULE: Final = 0.12
_BULK: Final = 0.1
"each direction, each number of streams"

_PINGS: Final = 5
_LINE_LIMIT: Final = 2**20

_TERMINATED: Final = 128 + signal.SIGTERM


async def bench(settings: BenchSettings) -> int:
    """Measure and print; the exit status. Raises CommandError for what cannot be measured."""
    loop = asyncio.get_running_loop()
    task = asyncio.current_task()
    terminated = False

    def terminate() -> None:
        nonlocal terminated
        terminated = True
        assert task is not None
        task.cancel()

    if settings.most_bytes is not None and settings.backend is None and not settings.json_:
        most = f"{settings.most_bytes * len(_engines(settings)) / 1e6:,.0f} MB"
        print(f"bulk transfers move at most {most} each way; --max-bytes changes it", file=sys.stderr)
    loop.add_signal_handler(signal.SIGTERM, terminate)
    try:
        runs = [await _run(settings, engine) for engine in _engines(settings)]
    except asyncio.CancelledError:
        if terminated:
            return _TERMINATED
        raise
    finally:
        loop.remove_signal_handler(signal.SIGTERM)
    say(json.dumps(as_json(runs), indent=2) if settings.json_ else "\n".join(as_text(run) for run in runs).rstrip("\n"))
    return 0


def _engines(settings: BenchSettings) -> list[str]:
    """By name. Raises CommandError for one that is not there."""
    names = ["aioquic", "qh3"] if settings.engine == "both" else [settings.engine]
    try:
        return [select_engine(name).name for name in names]
    except ValueError as error:
        raise CommandError(str(error)) from None


async def _run(settings: BenchSettings, engine: str) -> Run:
    seconds = settings.duration / (2 if settings.engine == "both" else 1)
    with tempfile.TemporaryDirectory(prefix="quictunnel-bench-") as name:
        async with _children(Path(name)) as children:
            parts = _Parts(settings, engine, seconds, children)
            try:
                await parts.start()
                return await parts.measure()
            finally:
                _progress("")


# The processes


class _Child:
    """A process of ours, told by lines and answering by lines. It ends when its standard input does."""

    def __init__(self, role: str, process: asyncio.subprocess.Process, log: Path) -> None:
        self.role = role
        self.process = process
        self._log = log

    @property
    def pid(self) -> int:
        return self.process.pid

    async def hear(self, limit: float) -> str:
        """The next line that it says. Raises CommandError, for a failure that it tells of too, and TimeoutError."""
        assert self.process.stdout is not None
        async with asyncio.timeout(limit):
            line = (await self.process.stdout.readline()).decode("utf-8", "replace").rstrip("\n")
        if not line:
            raise CommandError(f"the bench's {self.role} ended: {self._last_words()}")
        if line.startswith('{"failed"'):
            raise CommandError(str(json.loads(line)["failed"]))
        return line

    async def hear_facts(self, limit: float) -> dict[str, Any]:
        """The next line that is JSON. Raises as ``hear``."""
        found: dict[str, Any] = json.loads(await self.hear(limit))
        return found

    async def ask(self, question: str) -> dict[str, Any]:
        """What it answers. Raises CommandError."""
        assert self.process.stdin is not None
        with suppress(OSError):
            self.process.stdin.write(question.encode() + b"\n")
            await self.process.stdin.drain()
        try:
            return await self.hear_facts(ASK_TIME)
        except TimeoutError:
            raise CommandError(f"the bench's {self.role} does not answer") from None

    async def stop(self) -> None:
        """Have it end, at the latest by force."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        try:
            async with asyncio.timeout(STOP_TIME):
                await self.process.wait()
        except TimeoutError:
            self.process.kill()
            await self.process.wait()

    def _last_words(self) -> str:
        text = self._log.read_text("utf-8", "replace").strip()
        return escape(text.rpartition("\n")[2][-300:]) or "it does not say why"


class _Children:
    """Starts processes; all of them have ended when the ``with`` block has."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.all: dict[str, _Child] = {}

    async def start(self, role: str) -> None:
        """Have one load itself, from where this process has its modules, and with none of this process's options."""
        errors = self.directory / f"{role}.err"
        paths = os.pathsep.join(path or str(Path.cwd()) for path in sys.path)
        env = {name: value for name, value in os.environ.items() if not name.startswith("QUICTUNNEL_")}
        with errors.open("wb") as file:
            process = await asyncio.create_subprocess_exec(
                sys.executable, "-P", *(f"-W{each}" for each in sys.warnoptions), "-m", "quictunnel.app.bench_child",
                role,
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                stderr=file,
                env=env | {"PYTHONPATH": paths},
                limit=_LINE_LIMIT,
                start_new_session=True,  # Ctrl-C is for this process, which then ends them in order
            )  # fmt: skip
        self.all[role] = _Child(role, process, errors)

    def tell(self, role: str, told: dict[str, Any]) -> _Child:
        """Tell one what to do."""
        child = self.all[role]
        assert child.process.stdin is not None
        line = json.dumps(told | {"log": str(self.directory / f"{role}.log")}).encode() + b"\n"
        child.process.stdin.write(line)
        return child


@asynccontextmanager
async def _children(directory: Path) -> AsyncIterator[_Children]:
    children = _Children(directory)
    try:
        yield children
    finally:
        # The client first: a server that goes before it makes it dial anew.
        for role in ("client", "server", "backend"):
            if role in children.all:
                await children.all[role].stop()


class _Parts:
    """What a bench measures with, and what it has found."""

    def __init__(self, settings: BenchSettings, engine: str, seconds: float, children: _Children) -> None:
        self._settings = settings
        self._engine = engine
        self._children = children
        self._seconds = seconds
        self._scale = 1.0 if settings.backend is None else 1 / (1 - 4 * _BULK)
        self._mark = secrets.token_hex(16)
        self._path = settings.path
        self._is_remote = settings.is_remote
        self._before: Reading
        self._done: Work
        self._trip: float | None = None
        self._facts_before: dict[str, Any] = {}
        self._facts: dict[str, Any] = {}

    def _share(self, share: float) -> float:
        return share * self._seconds * self._scale

    # Before the first request

    async def start(self) -> None:
        """Start all that is needed, and see that a request passes. Raises CommandError."""
        settings = self._settings
        _progress("starting")
        backend = settings.backend
        if backend is not None:
            await self._find_backend(backend)
        # All at once: most of the time is each one's own.
        wanted = {"client": True, "server": not self._is_remote, "backend": backend is None}
        for role in (role for role, is_wanted in wanted.items() if is_wanted):
            await self._children.start(role)
        if backend is None:
            self._backend = self._children.tell("backend", {"mark": self._mark})
            backend = f"127.0.0.1:{(await self._ready(self._backend))['port']}"
            await self._find_backend(backend)
        told = {"backend": backend, "engine": self._engine} | _connect_options(settings)
        via: tuple[str, int] | None = settings.via
        if not self._is_remote:
            join, via = await self._start_server()
            told |= {"join": join, "tunnel": "bench"}
        self._client = self._children.tell("client", {"settings": told})
        welcome = await self._welcomed()
        if self._is_remote and settings.tunnel is None and not welcome["made_up"]:
            # It may be a real client's that is away just now.
            raise CommandError(
                f"the token is for the tunnel {welcome['tunnel']} and no other, so the bench would take its place; give"
                f" --tunnel {welcome['tunnel']} if nobody serves it, or a join string whose token is for others too"
            )
        if not welcome["urls"]:
            raise CommandError(f"the server does not say where visitors find the tunnel {welcome['tunnel']}")
        self._url = str(welcome["urls"][0])
        self._tunnel = str(welcome["tunnel"])
        authority = welcome["authority"]
        try:
            self._public = await _place(self._url.rstrip("/") + self._path, authority, via)
        except (OSError, ValueError) as error:
            raise CommandError(self._unreachable(escape(self._url), str(error))) from None
        pids = {name: each.pid for name, each in self._children.all.items() if name in ("server", "client")}
        if settings.backend is None:
            pids["backend"] = self._backend.pid
        self._meter = Meter(pids | {"bench": os.getpid()})

    async def _ready(self, child: _Child) -> dict[str, Any]:
        try:
            return await child.hear_facts(START_TIME)
        except TimeoutError:
            raise CommandError(f"the bench's {child.role} was not ready within {START_TIME:g} s") from None

    async def _start_server(self) -> tuple[str, tuple[str, int]]:
        """The join string of a server that runs on this machine, and where visitors come in."""
        settings = {
            "http": "127.0.0.1:0",
            "quic": "127.0.0.1:0",
            "state_dir": str(self._children.directory / "state"),
            "engine": self._engine,
            "grace": "1s",
        }
        server = self._children.tell("server", {"settings": settings})
        facts: dict[str, str] = {}
        try:
            while True:
                line = await server.hear(START_TIME)
                if line.startswith("ready "):
                    facts = dict(word.split("=", 1) for word in line.split()[1:])
                elif "--join " in line:
                    break
        except TimeoutError:
            raise CommandError(f"the bench's server was not ready within {START_TIME:g} s") from None
        host, _, port = facts["http"].rpartition(":")
        return line.rpartition("--join ")[2], (host, int(port))

    async def _welcomed(self) -> dict[str, Any]:
        try:
            return await self._client.hear_facts(START_TIME)
        except TimeoutError:
            why = (await self._client.ask("why")).get("why") or "it does not say why"
            raise CommandError(f"the server did not take the bench's client within {START_TIME:g} s: {why}") from None

    async def _find_backend(self, backend: str) -> None:
        url = f"{_url_of(backend)}{self._path}"
        try:
            self._direct = await _place(url, None, None)
            await self._asked(self._direct)
        except TimeoutError:
            raise CommandError(f"the backend gave no answer within {ANSWER_TIME:g} s: {url}") from None
        except ssl.SSLCertVerificationError as error:
            raise CommandError(f"the backend {url}: its certificate is not trusted: {error.verify_message}") from None
        except OSError as error:
            raise CommandError(f"the backend {url}: {reason(error)}") from None

    async def _asked(self, place: Place, limit: float = ANSWER_TIME) -> tuple[int, bytes]:
        return await ask(place, self._path, limit)

    # Whose tunnel it is

    async def _see_that_it_is_ours(self) -> None:
        """While the client accepts nothing, nobody must answer. Raises CommandError."""
        if not self._is_remote:
            return
        label = self._public.target.label
        try:
            status, body = await self._asked(self._public, SHUT_TIME)
        except TimeoutError:
            return  # it is held for a client, as it should be
        except ssl.SSLCertVerificationError as error:
            raise CommandError(f"{label}: its certificate is not trusted: {error.verify_message}") from None
        except OSError as error:
            raise CommandError(self._unreachable(label, reason(error))) from None
        if status == 503:
            return
        if status == 404 and b"tunnel" in body:
            raise CommandError(f"{label}: the server there knows no tunnel {self._tunnel}; is it another server's?")
        raise CommandError(
            f"{label} is answered (status {status}) by something else: the tunnel {self._tunnel} has other clients, or"
            " another program is there. Nothing was disturbed; give --tunnel NAME that nobody serves"
        )

    def _unreachable(self, label: str, why: str) -> str:
        advice = "ive --via HOST:PORT, where the server takes visitors in"
        if self._settings.via is not None:
            advice = "Is --via right?"
        elif re.search(r"://([^/]*\.)?localhost[:/]", f"{self._url}/"):
            advice = f"That name means this machine: start the server with --domain NAME, or g{advice}"
        else:
            advice = f"G{advice}"
        return f"{label} cannot be reached from here: {why}. {advice}"

    async def _open(self) -> None:
        """Let requests through. Raises CommandError when the first one does not pass."""
        await self._client.ask("open")
        label = self._public.target.label
        try:
            status, body = await self._asked(self._public)
        except TimeoutError:
            raise CommandError(f"{label}: no answer within {ANSWER_TIME:g} s") from None
        except OSError as error:
            raise CommandError(self._unreachable(label, reason(error))) from None
        if self._settings.backend is None and (status != 200 or not body.startswith(self._mark.encode())):
            raise CommandError(f"{label} is answered (status {status}), but not by this bench: what else is there?")
        if status >= 400:
            raise CommandError(f"{label} is answered with status {status}; give --path PATH that is answered well")

    # Measuring

    async def measure(self) -> Run:
        """Everything, one after the other. Raises CommandError."""
        settings, path = self._settings, self._path
        own = settings.backend is None
        loop = asyncio.get_running_loop()
        _progress("the backend, asked directly")
        shut = loop.create_task(self._see_that_it_is_ours())  # awaited here
        try:
            direct = await closed_loop(self._direct, path, 1, self._share(_DIRECT))
            direct_many = await closed_loop(self._direct, path, CONNECTIONS[-1], self._share(_DIRECT_MANY))
            direct_bulk = None
            if own:
                direct_bulk = await download(self._direct, 1, self._share(_DIRECT) / 2, LOCAL_BYTES)
            await shut
        finally:
            shut.cancel()
            await asyncio.gather(shut, return_exceptions=True)
        await self._open()
        self._trip = await self._round_trip()
        _progress("requests one by one")
        lone = await closed_loop(self._public, path, 1, self._share(_LONE))
        rates = [await self._rates(count, lone, direct_many) for count in CONNECTIONS]
        rate = _fixed_rate(max(each.rate for each in rates))
        _progress(f"{rate:g} requests/s")
        schedule = await on_schedule(self._public, path, rate, max(self._share(_SCHEDULE), 1 / rate))
        bulk: dict[tuple[str, int], Bulk] = {}
        if direct_bulk is not None:
            for direction in ("down", "up"):
                for streams in STREAMS:
                    bulk[direction, streams] = await self._bulk(direction, streams, direct_bulk.rate)
        memory = {name: self._meter.memory(name) for name in self._meter.names}
        return Run(
            engine=self._engine,
            place=self._where(),
            url=self._url,
            seconds=self._seconds,
            cores=cores(),
            direct=direct,
            direct_rate=direct_many.rate,
            lone=lone,
            rates=rates,
            schedule=(rate, schedule),
            bulk=bulk,
            round_trip=self._trip,
            memory=memory,
        )

    def _where(self) -> str:
        return _server_of(self._settings) if self._is_remote else "this machine"

    async def _begin(self) -> None:
        """Look at processes and links when something begins to count."""
        self._facts_before = await self._client.ask("")
        self._before = self._meter.read()

    async def _end(self) -> None:
        """Look again when it counts no more."""
        self._done = work(self._before, self._meter.read())
        self._facts = await self._client.ask("")

    async def _round_trip(self) -> float | None:
        """Of the link while nothing else goes over it."""
        facts: dict[str, Any] = {}
        for _ in range(_PINGS):
            await self._client.ask("ping")
            await asyncio.sleep(0.02 + 1.2 * (facts.get("round_trip") or 0.0))
            facts = await self._client.ask("")
        trip: float | None = facts["round_trip"]
        return trip

    async def _rates(self, connections: int, lone: Loop, direct: Loop) -> Rates:
        _progress(f"{connections} connections")
        seconds = self._share(_MANY[connections])
        found = await closed_loop(self._public, self._path, connections, seconds, Marks(self._begin, self._end))
        done = self._done
        latency = found.latency
        return Rates(
            connections=connections,
            rate=found.rate,
            p50=latency.percentile(50),
            p99=latency.percentile(99),
            failures=found.failures,
            answered=found.answered,
            work=done,
            lone_p50=lone.latency.percentile(50),
            direct_rate=direct.rate if connections == CONNECTIONS[-1] else None,
        )

    async def _bulk(self, direction: str, streams: int, direct_rate: float) -> Bulk:
        _progress(f"{direction}, {streams} at a time")
        seconds = self._share(_BULK)
        limit = self._settings.most_bytes
        limit = LOCAL_BYTES if limit is None else max(1, limit // len(STREAMS))
        marks = Marks(self._begin, self._end)

        async def received() -> int:
            count: int = (await self._backend.ask(""))["received"]
            return count

        if direction == "down":
            found = await download(self._public, streams, seconds, limit, marks)
        else:
            found = await upload(self._public, streams, seconds, limit, received, marks)
        told = (
            _told(self._facts_before, self._facts) if direction == "down" else _Told()
        )  # up it is the server's to say
        return Bulk(
            streams=streams,
            rate=found.rate,
            bytes=found.bytes,
            failures=found.failures,
            work=self._done,
            round_trip=self._facts["round_trip"],
            on_credit=told.on_credit,
            on_path=told.on_path,
            growth=found.growth,
            idle_trip=self._trip,
            direct_rate=direct_rate if direction == "down" else None,
        )


def _progress(text: str) -> None:
    """On a terminal, what is being done now, until the next call."""
    if sys.stderr.isatty():
        sys.stderr.write(f"\r\x1b[K{text}{' ' if text else ''}")
        sys.stderr.flush()


class _Told(NamedTuple):
    """What the client's looks at its links come to, as ``verdict.Bulk`` has it; None where it is not known."""

    on_credit: float | None = None
    on_path: float | None = None


def _told(before: dict[str, Any], after: dict[str, Any]) -> _Told:
    looks = after["looks"] - before["looks"]
    if looks <= 0:
        return _Told()
    return _Told(*((after[name] - before[name]) / looks for name in ("on_credit", "on_path")))


def _connect_options(settings: BenchSettings) -> dict[str, Any]:
    """What ``quictunnel connect`` would be given to reach the server, as texts."""
    given: dict[str, Any] = {
        "join": None if settings.join is None else settings.join.get_secret_value(),
        "token": None if settings.token is None else settings.token.get_secret_value(),
        "server": [str(each) for each in settings.server],
        "tunnel": settings.tunnel,
        "ca": None if settings.ca is None else str(settings.ca),
        "server_name": settings.server_name,
        "state_dir": str(settings.state_dir),
    }
    return {name: value for name, value in given.items() if value}


def _server_of(settings: BenchSettings) -> str:
    """The address that is dialled first."""
    if settings.server:
        return str(settings.server[0])
    assert settings.join is not None
    return JoinString.parse(settings.join.get_secret_value()).address


def _fixed_rate(most: float) -> float:
    return next((rate for rate in RATES if rate <= most / 2), RATES[-1])


def _url_of(backend: str) -> str:
    """Where a backend can be asked directly."""
    target = parse_backend(backend)
    return f"{target.kind}://{target.authority}"


async def _place(url: str, authority: str | None, via: tuple[str, int] | None) -> Place:
    """Where requests to a URL go; ``authority`` (PEM) is trusted beside the system's CAs.

    Raises ValueError for what is no URL, and OSError.
    """
    target = parse_target(url)
    addresses = await resolve(target if via is None else target._replace(host=via[0], port=via[1]))
    context = None
    if target.secure:
        context = ssl.create_default_context()
        if authority is not None:
            context.load_verify_locations(cadata=authority)
        context.set_alpn_protocols(["http/1.1"])
    return Place(target, tuple(addresses), context)
