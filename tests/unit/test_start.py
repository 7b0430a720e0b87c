"""The first steps of ``serve`` and ``connect``: another process has the command line, and reads the options from it."""

import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from quictunnel.cli import read
from quictunnel.failures import UsageError
from quictunnel.options import load_settings, plain
from quictunnel.plain import Plain, Secret, replaced
from quictunnel.settings import ConnectSettings, ServeSettings
from quictunnel.start import main
from quictunnel.values import Address
from tests.support.processes import Processes


@pytest.fixture
def handed(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What the commands are started with, which end at once with status 7."""
    found: list[Any] = []

    async def start(settings: Any, again: Callable[[], Any]) -> int:
        found.extend((settings, again))
        return 7

    for name in ("serve", "connect"):
        fake: Any = SimpleNamespace(**{name: start})
        monkeypatch.setitem(sys.modules, f"quictunnel.app.{name}", fake)
    return found


def test_a_command_is_handed_plain_values(handed: list[Any]) -> None:
    argv = ["connect", "3000", "--server", "a.example,b.example:1", "--token", "qtk_x", "--grace", "5s"]
    assert main(argv) == 7
    settings = handed[0]
    assert type(settings) is Plain
    assert settings.server == (Address("a.example", 4433), Address("b.example", 1))
    assert settings.grace == 5.0
    assert settings.token == Secret("qtk_x")
    assert settings.token.get_secret_value() == "qtk_x"
    assert "qtk_x" not in f"{settings} {settings.token} {settings!r}"


def test_all_options_come_through(handed: list[Any]) -> None:
    for argv, kind in ((["serve"], ServeSettings), (["connect", "3000"], ConnectSettings)):
        handed.clear()
        assert main(argv) == 7
        expected = plain(load_settings(kind, {"backend": "3000"} if kind is ConnectSettings else {}))
        assert vars(handed[0]) == vars(expected)
        assert set(vars(handed[0])) == set(kind.model_fields)


def test_options_are_read_anew(handed: list[Any], tmp_path: Path) -> None:
    file = tmp_path / "config.toml"
    file.write_text("[serve]\nhold = '4s'")
    assert main(["serve", "--config", str(file)]) == 7
    settings, again = handed
    file.write_text("[serve]\nhold = '6s'")
    assert (settings.hold, again().hold) == (4.0, 6.0)
    file.write_text("[serve]\nholt = '6s'")
    with pytest.raises(UsageError, match="did you mean 'hold'"):
        again()


@pytest.mark.parametrize(
    ("argv", "status", "said"),
    [
        (["serve", "--htpp", "80"], 2, "unknown argument '--htpp'"),
        (["connect"], 2, "BACKEND is missing"),
        (["serve", "--config", "/nowhere"], 2, "/nowhere: cannot be read"),
    ],
)
def test_what_is_wrong_is_said_once(
    handed: list[Any], capfd: pytest.CaptureFixture[str], argv: list[str], status: int, said: str
) -> None:
    assert main(argv) == status
    captured = capfd.readouterr()
    assert captured.err.startswith(f"quictunnel: {said}")
    assert captured.err.count("\n") == 1
    assert captured.out == ""
    assert not handed


@pytest.mark.parametrize("argv", [["serve", "--help"], ["connect", "-h"], ["--version"], ["token", "list", "--json"]])
def test_other_words_are_the_command_lines(
    handed: list[Any], capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, argv: list[str]
) -> None:
    """Nothing is forked for them."""
    monkeypatch.setattr("os.fork", None)
    assert main(argv) == 0
    assert capfd.readouterr().out
    assert not handed


def test_options_do_not_change_by_themselves() -> None:
    settings = read(["serve"])
    with pytest.raises(AttributeError, match="options do not change"):
        settings.hold = 1.0  # type: ignore[attr-defined]
    other = replaced(settings, {"hold": 1.0})
    assert (vars(other)["hold"], vars(settings)["hold"]) == (1.0, 3.0)


def test_what_is_used_at_the_start_alone_is_not_in_a_running_process(tmp_path: Path) -> None:
    with Processes(tmp_path, cold=True) as processes:
        tunnel = processes.tunnel("1")
        only_with_aioquic = "cryptography" if find_spec("qh3") else "pydantic"
        for process in (tunnel.server.process, tunnel.client.process):
            maps = Path(f"/proc/{process.pid}/maps").read_text()
            assert "_ssl" in maps
            assert "pydantic" not in maps
            assert only_with_aioquic not in maps
            assert not Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().strip()
