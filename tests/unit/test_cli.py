"""The command line: what each command is handed, what is printed, and the exit status."""

import asyncio
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from loguru import logger

import quictunnel
import quictunnel.exchange
from quictunnel.cli import main
from quictunnel.options import CommandError, Settings
from quictunnel.trust.files import TrustError
from quictunnel.trust.owners import Claim, Owners
from quictunnel.trust.tokens import TokenStore
from quictunnel.values import Address

Outcome = int | BaseException


@pytest.fixture
def app(monkeypatch: pytest.MonkeyPatch) -> Callable[[Outcome], list[Settings]]:
    """Put something in the place of each command that keeps the settings it is handed and ends as told."""

    def install(outcome: Outcome) -> list[Settings]:
        handed: list[Settings] = []

        async def start(settings: Settings, *more: object) -> int:
            handed.append(settings)
            await asyncio.sleep(0)
            logger.info("started")
            if isinstance(outcome, BaseException):
                raise outcome
            return outcome

        for name in ("serve", "connect", "demo"):
            fake: Any = SimpleNamespace(**{name: start})
            monkeypatch.setitem(sys.modules, f"quictunnel.app.{name}", fake)
        return handed

    return install


def test_serve_is_handed_its_settings(app: Callable[[Outcome], list[Any]], capsys: pytest.CaptureFixture[str]) -> None:
    handed = app(0)
    assert main(["serve", "--http", "127.0.0.1:0", "--no-default-tunnel", "--trusted-proxies", "::1"]) == 0
    assert handed[0].http == Address("127.0.0.1", 0)
    assert handed[0].default_tunnel is False
    assert "started" in capsys.readouterr().err


@pytest.mark.parametrize(
    "argv",
    [
        ["connect", "3000", "--tunnel", "app"],
        ["connect", "--tunnel", "app", "3000"],
        ["connect", "--tunnel=app", "--grace", "5s", "3000"],
    ],
)
def test_connect_takes_its_backend_anywhere(app: Callable[[Outcome], list[Any]], argv: list[str]) -> None:
    handed = app(0)
    assert main(argv) == 0
    assert (handed[0].backend, handed[0].tunnel) == ("3000", "app")


def test_demo_once(app: Callable[[Outcome], list[Any]]) -> None:
    handed = app(3)
    assert main(["demo", "--once", "--log-level", "error"]) == 3
    assert handed[0].once is True


@pytest.mark.parametrize(
    ("outcome", "status", "said"),
    [
        (7, 7, ""),
        (CommandError("the token has expired"), 1, "quictunnel: the token has expired\n"),
        (CommandError("forged\nline \x1b[31m"), 1, "quictunnel: forged\\nline \\x1b[31m\n"),
        (TrustError("ca.pem is no CA"), 1, "quictunnel: ca.pem is no CA\n"),
        (OSError(98, "Address already in use"), 1, "quictunnel: Address already in use\n"),
        (PermissionError(13, "Permission denied", "/state"), 1, "quictunnel: /state: Permission denied\n"),
        (KeyboardInterrupt(), 130, ""),
    ],
)
def test_how_a_command_ends(
    app: Callable[[Outcome], list[Any]],
    capsys: pytest.CaptureFixture[str],
    outcome: Outcome,
    status: int,
    said: str,
) -> None:
    app(outcome)
    assert main(["serve", "--log-level", "warning"]) == status
    assert capsys.readouterr().err == said


def test_a_defect_is_not_hidden(app: Callable[[Outcome], list[Any]]) -> None:
    app(ZeroDivisionError("a defect"))
    with pytest.raises(ZeroDivisionError):
        main(["serve"])


def test_a_log_file_that_cannot_be(capsys: pytest.CaptureFixture[str], tmp_path: Path, app: Any) -> None:
    app(0)
    (tmp_path / "file").write_text("")
    assert main(["serve", "--log-file", str(tmp_path / "file" / "log")]) == 1
    assert capsys.readouterr().err.startswith("quictunnel: ")


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["serve", "--htpp", "80"], "unknown argument '--htpp' (did you mean '--http'?); see quictunnel serve --help"),
        (["serve", "--htt=80"], "unknown argument '--htt' (did you mean '--http'?); see quictunnel serve --help"),
        (["serve", "80"], "unknown argument '80'; see quictunnel serve --help"),
        (["serve", "--http"], "argument --http: expected one argument; see quictunnel serve --help"),
        (["serve", "--http", "x:99999"], "--http: 'x:99999': the port must be 1..65535, or 0 for any free one"),
        (["serve", "--config", "/none.toml"], "/none.toml: cannot be read: No such file or directory"),
        (["connect"], "BACKEND is missing: 3000, localhost:3000, "),
        (["sreve"], "argument COMMAND: invalid choice: 'sreve'"),
        (["token", "create"], "--tunnel is missing: "),
        (["token", "create", "--tunnel", "a", "--expires", "soon"], "--expires: 'soon': "),
        (["token", "create", "--tunnel", "a/b"], "'a/b' is not a tunnel pattern"),
        (["token", "create", "--tunnel", "a", "--host", "*"], "'*' is not a host name: "),
        (
            ["token", "create", "--tunnel", "a", "--host", "b\u00fccher.example"],
            "the host name 'b\\xfccher.example' has ",
        ),
        (["token", "release"], "NAME is missing: "),
        (["token", "release", "a/b"], "NAME: 'a/b': 'a/b' is not a host name: "),
        (["certs", "issue", "--days", "500", "a.example"], "--days: '500': the number must be 1..397"),
        (["load", "http://localhost", "--stages", "fast"], "--stages: 'fast': "),
        (["load", "localhost"], ""),
    ],
)
def test_wrong_use_is_one_line_and_status_2(argv: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(argv) == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.startswith(f"quictunnel: {said}")
    assert output.err.count("\n") == 1


@pytest.mark.parametrize(
    "argv",
    [
        [],
        ["serve"],
        ["connect"],
        ["demo"],
        ["certs"],
        ["certs", "init"],
        ["certs", "issue"],
        ["certs", "show"],
        ["token"],
        ["token", "create"],
        ["token", "list"],
        ["token", "revoke"],
        ["token", "release"],
        ["load"],
    ],
    ids=" ".join,
)
def test_help(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*argv, "--help"]) == 0
    output = capsys.readouterr()
    assert output.out.startswith(f"usage: {' '.join(['quictunnel', *argv])} ")
    assert output.err == ""


def test_help_says_defaults_and_variables(capsys: pytest.CaptureFixture[str], home: Path) -> None:
    main(["serve", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "(default: 127.0.0.1:8080)" in text
    assert "(default: ~/.local/state/quictunnel)" in text
    assert "QUICTUNNEL_HTTP" in text
    assert "[serve]" in text
    assert str(home) not in text


@pytest.mark.parametrize("argv", [[], ["certs"], ["token"]])
def test_no_command_shows_the_help(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(argv) == 2
    assert "COMMAND" in capsys.readouterr().err


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    said = capsys.readouterr().out
    assert said.startswith(f"quictunnel {quictunnel.__version__} (aioquic ")
    assert said.endswith(", not compiled)\n" if quictunnel.exchange.__file__.endswith(".py") else ", compiled)\n")


# Tokens and certificates.


def test_a_token_lives_and_dies(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state = ["--state-dir", str(tmp_path)]
    assert main(["token", "create", "--tunnel", "app,team-*", "--expires", "30d", "--note", "for Ann", *state]) == 0
    secret = capsys.readouterr().out.strip()
    assert secret.startswith("qtk_")
    assert main(["token", "list", "--json", *state]) == 0
    [token] = json.loads(capsys.readouterr().out)
    assert (token["state"], token["tunnels"], token["note"]) == ("active", ["app", "team-*"], "for Ann")
    assert main(["token", "revoke", token["id"], *state]) == 0
    assert main(["token", "list", *state]) == 0
    output = capsys.readouterr().out
    assert "revoked" in output
    assert secret not in output


def test_tokens_are_listed_with_the_hosts_they_are_for_and_what_they_hold(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state = ["--state-dir", str(tmp_path)]
    assert main(["token", "create", "--tunnel", "*", "--host", "*.Example.com", "--host", "a.example.org", *state]) == 0
    output = capsys.readouterr()
    assert "good for *, *.Example.com, a.example.org for ever" in output.err
    token = output.out.split("_")[1]
    owners = Owners(tmp_path)
    for name, hosts in (("1", []), ("app", ["b.example.com", "*.example.com"]), ("web", ["a.example.org"])):
        owners.claim(Claim(token, name, hosts), 1.0, limit=9, stands=lambda *_: True, in_use=lambda _: False)
    assert main(["token", "list", "--json", *state]) == 0
    [row] = json.loads(capsys.readouterr().out)
    assert row["hosts"] == ["*.example.com", "a.example.org"]
    assert row["holds"] == ["1", "app", "web", "*.example.com", "a.example.org", "b.example.com"]
    assert main(["token", "list", *state]) == 0
    head, line = capsys.readouterr().out.splitlines()
    assert head.split() == ["ID", "STATE", "TUNNELS", "HOSTS", "HOLDS", "EXPIRES", "NOTE"]
    assert line.split() == [token, "active", "*", "*.example.com,a.example.org", "1,app,web,+3", "never"]
    for given, kind in (("APP", "tunnel"), ("1", "tunnel"), ("*.example.COM.", "host")):
        assert main(["token", "release", given, *state]) == 0
        name = given.lower().rstrip(".")
        assert capsys.readouterr().out == f"{kind} {name} was token {token}'s, and is whoever's registers it first\n"
        assert main(["token", "release", given, *state]) == 1
        assert capsys.readouterr().err.startswith(f"quictunnel: no token holds {name}; `quictunnel token list` shows ")
    assert [held.name for held in owners.all()] == ["web", "a.example.org", "b.example.com"]
    owners.close()


def test_lists_of_a_directory_without_a_book_make_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state = ["--state-dir", str(tmp_path)]
    assert main(["token", "create", "--tunnel", "a", *state]) == 0
    assert main(["token", "list", *state]) == 0
    assert main(["token", "release", "a", *state]) == 1
    assert not list(tmp_path.glob("*names*"))


def test_a_broken_book_of_names_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "names.db").write_bytes(b"")
    for command in (["list"], ["release", "a"]):
        assert main(["token", *command, "--state-dir", str(tmp_path)]) == 1
        error = capsys.readouterr().err
        assert error.startswith(
            f"quictunnel: {tmp_path}/names.db is not a book of names; restore it from a copy, or move"
        )
        assert error.count("\n") == 1


def test_an_unknown_token_cannot_be_revoked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["token", "revoke", "nothere1", "--state-dir", str(tmp_path)]) == 1
    assert capsys.readouterr().err.startswith("quictunnel: ")


def test_a_broken_token_file_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    TokenStore(tmp_path).path.write_text("{")
    assert main(["token", "list", "--state-dir", str(tmp_path)]) == 1
    assert capsys.readouterr().err.count("\n") == 1


def test_certificates_are_made_and_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    where = ["--dir", str(tmp_path / "certs")]
    assert main(["certs", "init", "--name", "Test CA", *where]) == 0
    assert main(["certs", "issue", "tunnel.example.com", "127.0.0.1", "--days", "30", *where]) == 0
    assert main(["certs", "show", *where]) == 0
    output = capsys.readouterr().out
    assert "Test CA" in output
    assert "tunnel.example.com, 127.0.0.1" in output


def test_a_ca_is_not_made_twice(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    where = ["--dir", str(tmp_path / "certs")]
    assert main(["certs", "init", *where]) == 0
    assert main(["certs", "init", *where]) == 1
    assert capsys.readouterr().err.startswith("quictunnel: ")


# As a process.


def test_python_m_quictunnel() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "quictunnel", "serve", "--http", "x"], capture_output=True, text=True, timeout=30
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "quictunnel: --http: 'x': a port is missing, as in x:8080\n"


def test_a_reader_that_leaves_is_no_traceback() -> None:
    with subprocess.Popen(
        [sys.executable, "-m", "quictunnel", "serve", "--help"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == b""
