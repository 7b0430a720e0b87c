"""The command line as users run it: ``python -m quictunnel …`` in processes of their own, ended for certain.

Most are forked from an interpreter that has loaded everything (``warm``); ``pytest --cold`` starts each afresh.
"""

import atexit
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import TracebackType
from typing import TypeVar

from quictunnel.trust.tokens import TokenStore
from tests.support.warm import Forked, Warm

__all__ = ["ROOT", "Client", "Process", "Processes", "Server", "Tunnel", "free_udp_port", "poll", "start_all_cold"]

ROOT = Path(__file__).parents[2]
START_TIME = 15.0
STOP_TIME = 15.0

T = TypeVar("T")

_warm: Warm | None = None
_warm_wanted = True


def start_all_cold() -> None:
    """From now on, start every process as a user does, with its imports."""
    global _warm_wanted
    _warm_wanted = False


def _base_env() -> dict[str, str]:
    """What every process has of this one's environment."""
    left_out = ("QUICTUNNEL_", "XDG_", "PYTHONDONTWRITEBYTECODE")  # the last: or each would compile everything
    kept = {name: value for name, value in os.environ.items() if not name.startswith(left_out)}
    return kept | {"PYTHONPATH": str(ROOT)}


def _warm_for(env: Mapping[str, str]) -> Warm | None:
    """What forks a process with that environment, if anything can."""
    global _warm
    if not _warm_wanted:
        return None
    if _warm is None:
        _warm = Warm(_base_env())
        atexit.register(_warm.close)
    return _warm if _warm.suits(env) else None


def poll(question: Callable[[], T], limit: float = 10.0, what: str = "") -> T:
    """Ask until the answer is true; the answer. Fails when ``limit`` seconds have passed."""
    deadline = time.monotonic() + limit
    while True:
        answer = question()
        if answer:
            return answer
        assert time.monotonic() < deadline, f"not within {limit:g} s: {what or question}"
        time.sleep(0.01)


def free_udp_port() -> int:
    """A UDP port of the loopback that nobody listens on."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
        return port


class Process:
    """One running command; its standard output and its log are files."""

    def __init__(
        self,
        directory: Path,
        number: int,
        args: tuple[str, ...],
        env: Mapping[str, str],
        within: tuple[str, ...] = (),
        *,
        cold: bool = False,
    ) -> None:
        self.args = args
        self._out = directory / f"{number}.out"
        self._err = directory / f"{number}.err"
        self.popen: subprocess.Popen[bytes] | Forked
        warm = None if cold or within else _warm_for(env)
        with self._out.open("wb") as out, self._err.open("wb") as err:
            if warm is not None:
                self.popen = warm.start(args, out, err, env, directory)
                return
            self.popen = subprocess.Popen(
                [*within, sys.executable, "-W", "error", "-m", "quictunnel", *args],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                env=dict(env),
                cwd=directory,
            )

    def __repr__(self) -> str:
        return f"<{' '.join(self.args[:2])} pid={self.pid}>"

    @property
    def pid(self) -> int:
        return self.popen.pid

    @property
    def output(self) -> str:
        """What it has printed."""
        return self._out.read_text()

    @property
    def log(self) -> str:
        """What it has logged, or complained of."""
        return self._err.read_text()

    @property
    def running(self) -> bool:
        return self.popen.poll() is None

    def said(self, pattern: str, limit: float = START_TIME) -> re.Match[str]:
        """Wait for a line of the output or the log that matches."""

        def look() -> re.Match[str] | None:
            found = re.search(pattern, self.output, re.M) or re.search(pattern, self.log, re.M)
            assert found or self.running or re.search(pattern, self.output + self.log, re.M), (
                f"{self!r} exited with {self.popen.returncode} before it said {pattern!r}:\n{self.output}{self.log}"
            )
            return found

        deadline = time.monotonic() + limit
        while (found := look()) is None:
            assert time.monotonic() < deadline, f"{self!r} did not say {pattern!r}:\n{self.output}{self.log}"
            time.sleep(0.01)
        return found

    def ready(self, times: int = 1, limit: float = START_TIME) -> dict[str, str]:
        """Wait for the ``ready`` line of that number; its facts."""
        found = self.said(rf"(?:^ready .*\n(?:(?!ready ).*\n)*){{{times - 1}}}^ready (.*)$", limit)
        return dict(fact.split("=", 1) for fact in found[1].split())

    def signal(self, number: signal.Signals) -> None:
        self.popen.send_signal(number)

    @property
    def children(self) -> list[int]:
        """The processes that it has forked, the oldest first."""
        try:
            return [int(pid) for pid in Path(f"/proc/{self.pid}/task/{self.pid}/children").read_text().split()]
        except OSError:
            return []

    def kill(self) -> None:
        """End it with SIGKILL, its children too: it cannot say goodbye."""
        children = self.children
        self.popen.kill()
        for pid in children:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.popen.wait(STOP_TIME)

    def stop(self, limit: float = STOP_TIME) -> int:
        """End it with SIGTERM; the exit status."""
        if self.running:
            self.popen.terminate()
        return self.exited(limit)

    def exited(self, limit: float = STOP_TIME) -> int:
        """Wait until it is over; the exit status."""
        try:
            return self.popen.wait(limit)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"{self!r} is still running after {limit:g} s:\n{self.output}{self.log}") from None

    def resident(self) -> int:
        """Bytes of memory in use."""
        return self._memory("VmRSS")

    def peak(self) -> int:
        """The most bytes of memory that it has had in use since ``forget_peak``."""
        return self._memory("VmHWM")

    def forget_peak(self) -> None:
        Path(f"/proc/{self.pid}/clear_refs").write_text("5")

    def busy(self) -> float:
        """Seconds of processor time that it has used."""
        fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def _memory(self, name: str) -> int:
        status = Path(f"/proc/{self.pid}/status").read_text()
        found = re.search(rf"^{name}:\s+(\d+) kB", status, re.M)
        assert found
        return int(found[1]) * 1024


class Server:
    """``quictunnel serve`` on ports of its own, and what it printed."""

    def __init__(
        self, processes: "Processes", args: tuple[str, ...], state: Path, quic_port: int, quic_host: str
    ) -> None:
        self.processes = processes
        self.args = args
        self.state = state
        self._ports = (0, quic_port)
        self._quic_host = quic_host
        self.start()

    def start(self) -> None:
        """Start it, or start it again on the same ports."""
        http, quic = self._ports
        places = (f"127.0.0.1:{http}", f"{self._quic_host}:{quic}")
        options = ("--http", places[0], "--quic", places[1], "--state-dir", str(self.state))
        self.process = self.processes.start("serve", *options, *self.args)
        self.facts = self.process.ready()
        line = self.process.said(r"^clients connect with: .*\n")[0]
        self.http = ("127.0.0.1", int(self.facts["http"].rpartition(":")[2]))
        self.quic_port = int(self.facts["quic"].rpartition(":")[2])
        self._ports = (self.http[1], self.quic_port)
        found = re.search(r"--join (\S+)", line)
        self.join = found[1] if found else ""

    def take_over(self) -> Process:
        """Start a second process on the same ports, which takes over; the first, that has been told to leave."""
        first = self.process
        if "--takeover" not in self.args:
            self.args = (*self.args, "--takeover")
        self.start()
        if first.running:
            first.signal(signal.SIGTERM)
        return first

    @property
    def log(self) -> str:
        return self.process.log

    def token(self, *tunnels: str, lasts: float | None = None) -> str:
        """The secret of a new token for the tunnels; ``lasts`` is in seconds."""
        expires = None if lasts is None else timedelta(seconds=lasts)
        return TokenStore(self.state).create(tunnels, expires, datetime.now(UTC)).secret

    def revoke(self, token: str) -> None:
        """Make a token useless."""
        TokenStore(self.state).revoke(token.split("_")[1], datetime.now(UTC))


class Client:
    """``quictunnel connect``."""

    def __init__(self, processes: "Processes", backend: str, engine: str, args: tuple[str, ...]) -> None:
        self.processes = processes
        self.engine = engine
        self.args = (backend, "--engine", engine, *args)
        self.start()

    def start(self) -> None:
        """Start it, or start it again."""
        self.process = self.processes.start("connect", *self.args)

    @property
    def log(self) -> str:
        return self.process.log


class Tunnel:
    """A server and a client of it that serves a backend."""

    def __init__(self, server: Server, client: Client, name: str) -> None:
        self.server = server
        self.client = client
        self.name = name
        self.address = server.http
        self.host = f"{name}.localhost"


class Processes:
    """Starts commands, each with the same empty home; none outlives the ``with`` block."""

    def __init__(self, directory: Path, env: Mapping[str, str] | None = None, *, cold: bool = False) -> None:
        """``cold``: each loads its modules itself, as when a user starts it."""
        self.directory = directory
        directory.mkdir(parents=True, exist_ok=True)
        self._cold = cold
        self.within: tuple[str, ...] = ()
        "put before each command from now on"

        self.env = _base_env() | {"HOME": str(directory)} | dict(env or {})
        self._count = 0
        self._stack = ExitStack()

    def __enter__(self) -> "Processes":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._stack.close()

    def start(self, *args: str, env: Mapping[str, str] | None = None, within: tuple[str, ...] | None = None) -> Process:
        """Start ``quictunnel ARGS``; ``within`` is a command that becomes it, such as ``ip netns exec NAME``."""
        self._count += 1
        before = within or self.within
        process = Process(self.directory, self._count, args, self.env | dict(env or {}), before, cold=self._cold)
        self._stack.callback(process.kill)
        return process

    def run(self, *args: str, limit: float = 30.0, env: Mapping[str, str] | None = None) -> "Result":
        """Run ``quictunnel ARGS`` to its end."""
        process = self.start(*args, env=env)
        status = process.exited(limit)
        return Result(status, process.output, process.log)

    def server(
        self,
        *args: str,
        engine: str = "auto",
        state: Path | None = None,
        quic_port: int = 0,
        quic_host: str = "127.0.0.1",
    ) -> Server:
        """Start a server and wait until it is ready."""
        self._count += 1
        state = state or self.directory / f"server-{self._count}"
        return Server(self, ("--engine", engine, *args), state, quic_port, quic_host)

    def client(
        self, server: Server, backend: str, *args: str, tunnel: str = "app", engine: str = "auto", wait: bool = True
    ) -> Client:
        """Start a client of ``server`` with its join string, and wait until it serves unless ``wait`` is False."""
        client = Client(self, backend, engine, ("--join", server.join, "--tunnel", tunnel, *args))
        if wait:
            client.process.ready()
        return client

    def tunnel(
        self,
        backend: str,
        engines: tuple[str, str] = ("auto", "auto"),
        *,
        serve: tuple[str, ...] = (),
        connect: tuple[str, ...] = (),
        name: str = "app",
    ) -> Tunnel:
        """Start both sides; ``engines`` are the server's and the client's."""
        server = self.server(*serve, engine=engines[0])
        return Tunnel(server, self.client(server, backend, *connect, tunnel=name, engine=engines[1]), name)


class Result:
    """What a command left behind."""

    def __init__(self, status: int, stdout: str, stderr: str) -> None:
        self.status = status
        self.stdout = stdout
        self.stderr = stderr

    def __iter__(self) -> Iterator[object]:
        return iter((self.status, self.stdout, self.stderr))

    def __repr__(self) -> str:
        return f"<exit {self.status}: {self.stdout!r} {self.stderr!r}>"
