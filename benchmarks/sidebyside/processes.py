"""Processes for the time of a ``with`` block, and what they use: processor time and memory, their children's too."""

import os
import re
import signal
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self

__all__ = ["ROOT", "START_LIMIT", "Memory", "Process", "Trouble", "free_port", "none_left", "run", "tidy"]

ROOT = Path(__file__).parents[2]
START_LIMIT = 20.0
STOP_LIMIT = 2.0
TICKS = os.sysconf("SC_CLK_TCK")


class Trouble(Exception):
    """Something that was to be measured cannot be; says why in a few words."""


class Memory(NamedTuple):
    """Megabytes (10^6 bytes) of a process and its children."""

    resident: float
    "the sum of what each has in memory; what they share is counted in each"

    own: float
    "the same with what is shared divided among those who share it (PSS); the same as ``resident`` where it is not told"


_running: "set[Process]" = set()


@contextmanager
def none_left() -> Iterator[None]:
    """End what was started within the ``with`` block and runs when it ends: an interruption may have left it so."""
    before = set(_running)
    try:
        yield
    finally:
        for process in _running - before:
            process.stop()


class Process:
    """A running command; what it says goes into a file."""

    def __init__(self, command: Sequence[str], log: Path, env: Mapping[str, str] | None = None) -> None:
        program = next(word for word in command if word != "env" and "=" not in word)
        self.name = Path(program).name
        self.log = log
        with log.open("wb") as out:
            self.popen = subprocess.Popen(
                list(command), stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT, cwd=log.parent,
                env=os.environ | dict(env or {}), start_new_session=True,
            )  # fmt: skip
        _running.add(self)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.stop()

    @property
    def pid(self) -> int:
        return self.popen.pid

    @property
    def running(self) -> bool:
        return self.popen.poll() is None

    def said(self, pattern: str, limit: float = START_LIMIT) -> re.Match[str]:
        """Wait for a line that matches. Raises Trouble when it does not come or the process ends."""
        deadline = time.monotonic() + limit
        while True:
            running = self.running  # before the look: what it says at its end is seen
            found = re.search(pattern, self.log.read_text(errors="replace"), re.M)
            if found:
                return found
            self.alive(running)
            if time.monotonic() > deadline:
                raise Trouble(f"{self.name} was not ready within {limit:g} s{self._last_words()}")
            time.sleep(0.005)

    def alive(self, running: bool | None = None) -> None:
        """Raises Trouble with its last words if the process is over."""
        if not (self.running if running is None else running):
            raise Trouble(f"{self.name} ended with status {self.popen.returncode}{self._last_words()}")

    def _last_words(self) -> str:
        lines = self.log.read_text(errors="replace").strip().splitlines()
        telling = [line for line in lines if re.search("error|emerg|fatal|panic", line, re.I)] or lines
        return f": {tidy(telling[-1])}" if lines else ""

    def tree(self) -> list[int]:
        """Its process id and those of all its descendants that live."""
        found, new = [], [self.pid]
        while new:
            pid = new.pop()
            found.append(pid)
            with suppress(OSError):
                for thread in Path(f"/proc/{pid}/task").iterdir():
                    new += map(int, (thread / "children").read_text().split())
        return found

    def cpu(self) -> float:
        """Seconds of processor time that it and its descendants have used, those that are over included."""
        ticks = 0
        for pid in self.tree():
            with suppress(OSError):
                fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
                ticks += sum(int(field) for field in fields[11:15])
        return ticks / TICKS

    def memory(self) -> Memory:
        """What it and its descendants have in memory now."""
        resident = own = 0
        for pid in self.tree():
            with suppress(OSError):
                kilobytes = _kilobytes(Path(f"/proc/{pid}/status").read_text(), "VmRSS")
                resident += kilobytes
                try:
                    own += _kilobytes(Path(f"/proc/{pid}/smaps_rollup").read_text(), "Pss")
                except OSError:
                    own += kilobytes
        return Memory(resident * 1024 / 1e6, own * 1024 / 1e6)

    def stop(self) -> None:
        """End it and its descendants: by SIGTERM, and by SIGKILL what is left after some seconds."""
        tree = self.tree() if self.running else []
        self.popen.terminate()
        try:
            self.popen.wait(STOP_LIMIT)
        except subprocess.TimeoutExpired:
            self.popen.kill()
            self.popen.wait()
        # The group is the process's own: what its end has left behind is in it.
        for pid in tree:
            with suppress(OSError):
                if os.getpgid(pid) == self.pid:
                    os.kill(pid, signal.SIGKILL)
        _running.discard(self)


def _kilobytes(text: str, name: str) -> int:
    found = re.search(rf"^{name}:\s+(\d+) kB", text, re.M)
    return int(found[1]) if found else 0


def tidy(text: str, length: int = 160) -> str:
    """A line of a log as it may stand in a table: no colours, no bars, no places of this machine."""
    text = re.sub(r"\x1b\[[0-9;]*m", "", text).replace("|", "/")
    for place in (str(Path.cwd()), str(Path.home()), socket.gethostname()):
        if len(place) > 1:
            text = text.replace(place, "...")
    text = re.sub(r"(?<![\w.:/])/(?:[\w.+-]+/)+", "", " ".join(text.split()))
    return text if len(text) <= length else text[: length - 3] + "..."


_given: set[int] = set()


def free_port() -> int:
    """A port of the loopback that is free for TCP and for UDP, a different one each time."""
    while True:
        with socket.socket() as tcp, socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as udp:
            tcp.bind(("127.0.0.1", 0))
            port: int = tcp.getsockname()[1]
            with suppress(OSError):
                udp.bind(("127.0.0.1", port))
                if port not in _given:
                    _given.add(port)
                    return port


def run(command: Sequence[str], limit: float, *, statuses: Sequence[int] = (0,)) -> str:
    """What a command prints. Raises Trouble when it takes longer than ``limit`` seconds, or exits otherwise."""
    name = Path(command[0]).name
    try:
        done = subprocess.run(
            list(command), stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace", timeout=limit,
            check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        raise Trouble(f"{name} was not done within {limit:g} s") from None
    if done.returncode not in statuses:
        said = (done.stderr.strip() or done.stdout.strip()).splitlines()
        raise Trouble(f"{name} ended with status {done.returncode}{': ' + tidy(said[-1]) if said else ''}")
    return done.stdout
