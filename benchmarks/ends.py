"""A server and its client as real processes, for the time of a ``with`` block."""

import contextlib
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

__all__ = ["Place", "process", "tunnel"]


class Place(NamedTuple):
    """Where visitors are sent, and who works for it."""

    address: str
    pids: tuple[int, ...] = ()

    def busy(self) -> float:
        """Seconds of processor time that these processes and their children have used."""
        ticks = 0
        for pid in self.pids:
            children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
            for each in (str(pid), *children):
                fields = Path(f"/proc/{each}/stat").read_text().rpartition(")")[2].split()
                ticks += int(fields[11]) + int(fields[12])
        return ticks / os.sysconf("SC_CLK_TCK")


@contextlib.contextmanager
def process(*command: str, ready: str = "", env: Mapping[str, str] | None = None) -> Iterator[dict[str, str]]:
    """A process for the time of a with block; the facts of the line that begins with ``ready``."""
    more = os.environ | dict(env or {})
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=more) as running:
        try:
            facts: dict[str, str] = {}
            if ready:
                assert running.stdout is not None
                line = next((line for line in running.stdout if line.startswith(ready)), "")
                if not line:
                    sys.exit(f"{command} did not start")
                facts = dict(re.findall(r"(\w+)=(\S+)", line)) or {"address": line.split()[-1]}
            yield facts | {"pid": str(running.pid)}
        finally:
            running.terminate()
            running.wait(10)


@contextlib.contextmanager
def tunnel(
    directory: Path, engine: str, backend: str, envs: tuple[Mapping[str, str], Mapping[str, str]] = ({}, {})
) -> Iterator[Place]:
    """A server and its client for ``backend``, with defaults and logs at INFO in files; ``envs`` are theirs."""
    base = (sys.executable, "-m", "quictunnel")
    common = ("--state-dir", str(directory / engine), "--engine", engine, "--grace", "1s")
    serve = (*base, "serve", "--http", "127.0.0.1:0", "--quic", "127.0.0.1:0")
    connect = (*base, "connect", backend, "--tunnel", "bench", "--log-file", str(directory / "connect.log"))
    with process(*serve, "--log-file", str(directory / "serve.log"), *common, ready="ready", env=envs[0]) as server:
        dial = ("--server", server["quic"])
        with process(*connect, *dial, *common, ready="ready", env=envs[1]) as client:
            yield Place(server["http"], (int(server["pid"]), int(client["pid"])))
