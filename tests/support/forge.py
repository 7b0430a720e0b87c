"""Forks whole process families: a small process that has everything loaded, is free of threads, and forks on demand.

A test process may have threads (those of its own backends, of the test runner), and forking beside threads is what the
tested code never does. A family is there within a millisecond; ``Forge`` is for a whole module.
"""

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from types import TracebackType
from typing import Self

from tests.support.processes import ROOT, poll

__all__ = ["Family", "Forge", "alive"]


class Family:
    """One process that the forge has forked, and what it and its children print."""

    def __init__(self, forge: "Forge", pid: int, out: Path) -> None:
        self._forge = forge
        self._out = out
        self.pid = pid

    @property
    def output(self) -> str:
        return self._out.read_text()

    def lines(self, word: str) -> list[str]:
        """What was printed after that word, a line each."""
        found = [line for line in self.output.splitlines(keepends=True) if line.startswith(f"{word} ")]
        return [line.partition(" ")[2].strip() for line in found if line.endswith("\n")]

    def said(self, word: str, count: int = 1) -> list[str]:
        """Wait until the word was printed so often."""
        return poll(lambda: found if len(found := self.lines(word)) >= count else [], what=f"{word} {count}x: {self}")

    def signal(self, number: signal.Signals) -> None:
        os.kill(self.pid, number)

    def exited(self) -> int:
        """Wait until it is over; its exit status, negative for a signal's number."""
        return poll(lambda: self._forge.status(self.pid), what=f"the end of {self}")[0]

    def __str__(self) -> str:
        return self.output


class Forge:
    """The process that forks; families call functions of one test module, by name."""

    def __init__(self, module: str, directory: Path) -> None:
        self._directory = directory
        self._count = 0
        self._pids: list[int] = []
        self._statuses: dict[int, int] = {}
        self._popen = subprocess.Popen(
            [sys.executable, "-W", "error", "-m", "tests.support.forge", module],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1, cwd=ROOT,
        )  # fmt: skip

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for pid in self._pids:
            if pid not in self._statuses:
                with suppress(ProcessLookupError):
                    os.killpg(pid, signal.SIGKILL)  # each family is a process group of its own
        assert self._popen.stdin is not None
        self._popen.stdin.close()
        self._popen.wait(10)
        assert self._popen.stdout is not None
        self._popen.stdout.close()

    def family(self, function: str) -> Family:
        """Fork a process that calls the function and exits with what it returns."""
        self._count += 1
        out = self._directory / f"family-{self._count}"
        out.touch()
        pid = int(self._ask(f"fork {function} {out}"))
        self._pids.append(pid)
        return Family(self, pid, out)

    def status(self, pid: int) -> tuple[int] | None:
        """How the process has ended, None while it runs."""
        if pid not in self._statuses:
            answer = self._ask(f"wait {pid}")
            if answer == "running":
                return None
            self._statuses[pid] = int(answer)
        return (self._statuses[pid],)

    def _ask(self, line: str) -> str:
        assert self._popen.stdin is not None
        assert self._popen.stdout is not None
        self._popen.stdin.write(line + "\n")
        return self._popen.stdout.readline().strip()


def alive(pid: int) -> bool:
    """Whether a process is there and not only its remains are."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


def _main(module: str) -> None:
    functions = vars(import_module(module))
    for line in sys.stdin:
        match line.split():
            case ["fork", function, out]:
                pid = os.fork()
                if pid == 0:
                    os.setpgid(0, 0)
                    descriptor = os.open(out, os.O_WRONLY | os.O_APPEND)
                    os.dup2(descriptor, 1)
                    os.dup2(descriptor, 2)
                    os.close(0)
                    os._exit(_run(functions[function]))
                print(pid, flush=True)
            case ["wait", number]:
                pid, status = os.waitpid(int(number), os.WNOHANG)
                print(os.waitstatus_to_exitcode(status) if pid else "running", flush=True)


def _run(function: object) -> int:
    assert callable(function)
    try:
        return int(function())
    except Exception as error:
        print("raised", repr(error), time.monotonic(), flush=True)
        return 99


if __name__ == "__main__":
    _main(sys.argv[1])
