"""Starts ``quictunnel`` out of an interpreter that has loaded it already: a fork in place of a second of imports.

What runs is ``python -W error -m quictunnel ARGS`` from its first line to its last, in a process with arguments, an
environment, a directory and descriptors of its own; all that it does not do again is to load the modules. The parent
has neither event loop nor thread, as that of ``quictunnel connect --processes`` has not.
"""

import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Mapping
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import BinaryIO, Final

__all__ = ["Forked", "Warm"]

ROOT: Final = Path(__file__).parents[2]

MODULES: Final = (
    *("quictunnel.cli", "quictunnel.app.serve", "quictunnel.app.connect", "quictunnel.app.demo"),
    *("quictunnel.trust.certificates", "quictunnel.quic.aioquic_reins", "qh3", "uvloop"),
)
"what commands load when they run, as far as it is installed"

DECISIVE: Final = ("PYTHON", "LC_", "LANG", "LD_", "MALLOC_", "GLIBC_")
"how variables begin that are read once, when an interpreter starts"

START_LIMIT: Final = 60.0
CHUNK: Final = 1 << 20


class Forked:
    """A running process, with what of ``subprocess.Popen`` is needed."""

    def __init__(self, args: tuple[str, ...], pid: int, status: int) -> None:
        self.args = args
        self.pid = pid
        self.returncode: int | None = None
        self._status = status
        self._lock = threading.Lock()

    def __del__(self) -> None:
        with suppress(OSError):
            os.close(self._status)

    def poll(self) -> int | None:
        """How it has ended, None while it runs."""
        self._look(0)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Wait until it has ended, and say how: negative for a signal's number."""
        self._look(timeout)
        if self.returncode is None:
            raise subprocess.TimeoutExpired(self.args, timeout or 0)
        return self.returncode

    def _look(self, timeout: float | None) -> None:
        if self.returncode is None:
            poll = select.poll()
            poll.register(self._status, select.POLLIN)
            ready = poll.poll(None if timeout is None else timeout * 1000)
            with self._lock:
                if ready and self.returncode is None:
                    word = os.read(self._status, 64)
                    assert word, "the warm interpreter is gone"
                    self.returncode = int(word)

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            with suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


class Warm:
    """The interpreter that forks. It ends with the process that has made it, and with it all that it has forked."""

    def __init__(self, env: Mapping[str, str]) -> None:
        self._decisive = _decisive(env)
        self._lock = threading.Lock()
        self._channel, other = socket.socketpair()
        self._channel.settimeout(START_LIMIT)
        with other:
            self._popen = subprocess.Popen(
                [sys.executable, "-W", "error", "-m", "tests.support.warm", str(other.fileno())],
                pass_fds=[other.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,  # its kind decides how output is buffered: as for a file
                cwd=ROOT,
                env=dict(env),
            )

    def suits(self, env: Mapping[str, str]) -> bool:
        """Whether a process with this environment would start as the interpreter itself has."""
        return _decisive(env) == self._decisive

    def start(self, args: tuple[str, ...], out: BinaryIO, err: BinaryIO, env: Mapping[str, str], cwd: Path) -> Forked:
        """Start ``quictunnel ARGS``."""
        request = json.dumps({"args": args, "env": dict(env), "cwd": str(cwd)}).encode() + b"\n"
        status, told = os.pipe()
        try:
            with self._lock:
                socket.send_fds(self._channel, [request[:1]], [out.fileno(), err.fileno(), told])
                self._channel.sendall(request[1:])
                answer = self._channel.recv(64)
        finally:
            os.close(told)
        assert answer, "the warm interpreter is gone"
        return Forked(args, int(answer), status)

    def close(self) -> None:
        """End it."""
        self._channel.close()
        self._popen.wait()


def _decisive(env: Mapping[str, str]) -> dict[str, str]:
    return {name: value for name, value in env.items() if name.startswith(DECISIVE)}


# In the interpreter that forks.


def _main(channel: socket.socket) -> None:
    """Fork for each request until there are no more; a forked process returns from here with its command done."""
    for name in MODULES:
        with suppress(ModuleNotFoundError):
            import_module(name)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for those that are forked
    wake, woken = os.pipe()
    for descriptor in (wake, woken):
        os.set_blocking(descriptor, False)
    signal.set_wakeup_fd(woken, warn_on_full_buffer=False)
    signal.signal(signal.SIGCHLD, lambda number, frame: None)
    running: dict[int, int] = {}  # by pid: where its end is told
    while True:
        ready, _, _ = select.select([channel, wake], [], [])
        if wake in ready:
            with suppress(BlockingIOError):
                os.read(wake, CHUNK)
            _reap(running)
        if channel in ready:
            text, descriptors, _, _ = socket.recv_fds(channel, CHUNK, 3)
            if not text:
                break
            while not text.endswith(b"\n"):
                text += channel.recv(CHUNK)
            pid = os.fork()
            if pid == 0:
                channel.detach()
                _become(json.loads(text), *descriptors)
                return
            running[pid] = descriptors.pop()
            for descriptor in descriptors:
                os.close(descriptor)
            channel.sendall(b"%d" % pid)
    for pid in running:
        os.kill(pid, signal.SIGKILL)


def _reap(running: dict[int, int]) -> None:
    for pid in list(running):
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            told = running.pop(pid)
            with suppress(BrokenPipeError):
                os.write(told, b"%d" % os.waitstatus_to_exitcode(status))
            os.close(told)


def _become(request: dict[str, object], out: int, err: int, told: int) -> None:
    """Be the command: nothing of the interpreter that forked is left but its modules."""
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.dup2(out, 1)
    os.dup2(err, 2)
    os.closerange(3, os.sysconf("SC_OPEN_MAX"))
    args, env, cwd = request["args"], request["env"], request["cwd"]
    assert isinstance(args, list)
    assert isinstance(env, dict)
    assert isinstance(cwd, str)
    os.environ.clear()
    os.environ.update(env)
    os.chdir(cwd)
    sys.path[0] = cwd
    sys.argv[1:] = args
    runpy.run_module("quictunnel", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    with socket.socket(fileno=int(sys.argv[1])) as descriptor:
        _main(descriptor)
