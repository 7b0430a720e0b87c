"""Commands that are forked from a loaded interpreter, as most are in the quick tests: as if each were started."""

import os
import signal
from pathlib import Path

import pytest

from tests.support.processes import Processes

ANYWHERE = ("serve", "--http", "127.0.0.1:0", "--quic", "127.0.0.1:0")


@pytest.mark.parametrize(
    ("args", "env"),
    [
        (("--version",), {}),
        (("serve", "--htpp", "x"), {}),
        (("serve", "--state-dir", "file"), {"QUICTUNNEL_HTTP": "127.0.0.1:0", "QUICTUNNEL_QUIC": "127.0.0.1:0"}),
    ],
)
def test_forked_command_ends_and_speaks_as_a_fresh_one(
    tmp_path: Path, args: tuple[str, ...], env: dict[str, str]
) -> None:
    (tmp_path / "file").touch()
    with Processes(tmp_path) as warm, Processes(tmp_path, cold=True) as cold:
        assert tuple(warm.run(*args, env=env)) == tuple(cold.run(*args, env=env))


def test_forked_command_has_an_environment_and_a_directory_of_its_own(tmp_path: Path) -> None:
    with Processes(tmp_path / "home", env={"QUICTUNNEL_DOMAIN": "forked.example"}) as processes:
        server = processes.start(*ANYWHERE)
        assert server.ready()["domain"] == "forked.example"
        assert Path(os.readlink(f"/proc/{server.pid}/cwd")) == tmp_path / "home"
        assert (tmp_path / "home" / ".local" / "state" / "quictunnel" / "ca.pem").exists()
        assert "QUICTUNNEL_DOMAIN" not in os.environ


def test_how_a_forked_command_was_ended_is_known(tmp_path: Path) -> None:
    with Processes(tmp_path) as processes:
        server, other = processes.start(*ANYWHERE), processes.start(*ANYWHERE, "--state-dir", str(tmp_path / "other"))
        server.ready()
        other.ready()
        assert server.running
        server.kill()
        assert (server.popen.returncode, server.running) == (-signal.SIGKILL, False)
        assert other.stop() == 0
        server.signal(signal.SIGTERM)  # to nobody: its number may be another's by now
