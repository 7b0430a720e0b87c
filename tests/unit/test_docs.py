"""What the pages say about the product is true of the product: options, variables, commands, files, links."""

import argparse
import importlib.util
import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from quictunnel import cli
from quictunnel.bench import report as bench_report
from quictunnel.load.figures import Tally
from quictunnel.load.plan import make_options
from quictunnel.load.report import as_json
from quictunnel.options import TABLES, environment_name, load_settings
from quictunnel.trust.join import JoinString
from tests.unit.test_bench import measured

ROOT = Path(__file__).parents[2]
PAGES = ("README.md", "docs/cli.md", "docs/operations.md", "certs/README.md")
JOIN = JoinString("tunnel.example.com:4433", bytes(32), "qtk_secret").encode()

# Flags of other programs, in commands that the pages show.
FOREIGN = {"--upgrade", "--now", "--system", "--home-dir", "--shell", "--check", "--cacert", "--http2-prior-knowledge"}


def load_make_cli() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_cli", ROOT / "docs" / "make_cli.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


MAKE_CLI = load_make_cli()
COMMANDS: dict[str, Any] = MAKE_CLI.commands()


def text_of(page: str) -> str:
    return (ROOT / page).read_text("utf-8")


def flags(parser: argparse.ArgumentParser) -> Iterator[str]:
    """Every flag of a parser and of those below it."""
    for action in parser._actions:
        yield from action.option_strings
        if isinstance(action, argparse._SubParsersAction):
            for below in action.choices.values():
                yield from flags(below)


def code_lines(text: str) -> Iterator[str]:
    """The lines of code blocks, indented or fenced, without a prompt."""
    fenced = False
    for line in text.split("\n"):
        if line.startswith("```"):
            fenced = not fenced
        elif fenced or line.startswith("    "):
            yield line.strip().removeprefix("$ ")


def shown_commands(page: str) -> list[tuple[str, ...]]:
    """The arguments of each ``quictunnel`` command that a page shows, synopses such as ``[options]`` left out."""
    found = []
    for line in code_lines(text_of(page)):
        command = re.fullmatch(r"(?:ExecStart=|sudo -u \w+ )?(?:/\S+/)?quictunnel (.*)", line)
        if command and not re.search(r"\[\w|\w \| | {3,}", line):
            found.append(tuple(shlex.split(command[1], comments=True)))
    return found


def test_the_tables_of_options_are_as_declared() -> None:
    page = text_of("docs/cli.md")
    assert MAKE_CLI.render(page) == page, "run .venv/bin/python docs/make_cli.py"


def test_every_command_has_a_table() -> None:
    assert sorted(MAKE_CLI.documented(text_of("docs/cli.md"))) == sorted(COMMANDS)


def test_a_table_that_misses_an_option_is_noticed() -> None:
    page = text_of("docs/cli.md")
    [row] = [line for line in page.split("\n") if line.startswith("| `--slot-wait TIME`")]
    assert MAKE_CLI.render(page.replace(row + "\n", "")) == page


@pytest.mark.parametrize("page", PAGES)
def test_every_flag_that_a_page_names_exists(page: str) -> None:
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z0-9-]*", text_of(page)))
    assert named - set(flags(cli._parser())) - FOREIGN == set()


@pytest.mark.parametrize("page", PAGES)
def test_every_variable_that_a_page_names_exists(page: str) -> None:
    known = {environment_name(settings, name) for settings in COMMANDS.values() for name in settings.model_fields}
    known.add("QUICTUNNEL_COMPILE")  # of hatch_build.py, when it is installed
    assert set(re.findall(r"QUICTUNNEL_[A-Z0-9_]*[A-Z0-9]", text_of(page))) - known == set()


@pytest.mark.parametrize(
    ("page", "words"), [(page, words) for page in PAGES for words in shown_commands(page)], ids=" ".join
)
def test_a_command_that_a_page_shows_is_one_that_works(
    page: str, words: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("tunnel.toml").touch()  # a file that a page lets --config name
    command, given = cli._parse([word.replace("qt1_…", JOIN) for word in words])
    load_settings(command.settings, given)


@pytest.mark.parametrize("page", PAGES)
def test_a_command_named_in_a_sentence_exists(page: str) -> None:
    named = set(re.findall(r"`quictunnel ([a-z]+)", text_of(page)))
    assert named <= {command.partition(" ")[0] for command in COMMANDS}


def test_the_pages_show_commands() -> None:
    assert len(shown_commands("README.md")) >= 5
    assert len(shown_commands("docs/operations.md")) >= 8


@pytest.mark.parametrize("table", TABLES)
def test_the_file_that_the_page_shows_is_accepted(table: str, tmp_path: Path) -> None:
    file = tmp_path / "tunnel.toml"
    [toml] = re.findall(r"```toml\n(.*?)```", text_of("docs/cli.md"), re.DOTALL)
    file.write_text(toml)
    given = {"config": str(file)} | ({"url": "http://localhost/"} if table == "load" else {})
    load_settings(COMMANDS[table], given)


@pytest.mark.parametrize("page", PAGES)
def test_every_link_leads_somewhere(page: str) -> None:
    for target, anchor in re.findall(r"\]\(([^)#:]*)(?:#([^)]*))?\)", text_of(page)):
        path = (ROOT / page).parent / target if target else ROOT / page
        assert path.exists(), target
        if anchor:
            titles = re.findall(r"^#+ (.*)$", path.read_text("utf-8"), re.M)
            assert anchor in [re.sub(r"[^\w-]", "", title.lower().replace(" ", "-")) for title in titles]


@pytest.mark.parametrize("page", ["README.md", "docs/operations.md"])
def test_every_make_target_that_a_page_names_exists(page: str) -> None:
    targets = re.findall(r"^([a-z-]+):", text_of("Makefile"), re.M)
    assert set(re.findall(r"\bmake ([a-z-]+)(?=\s+#|`)", text_of(page))) <= set(targets)


def test_the_first_commands_of_the_readme_are_demo_and_test() -> None:
    commands = [line for line in code_lines(text_of("README.md")) if line]
    assert [line.partition("#")[0].strip() for line in commands[:2]] == ["make demo", "make test"]


def test_the_members_of_loads_json_are_all_told_of() -> None:
    told = set(re.findall(r"`(\w+)`", text_of("docs/cli.md").partition("## load")[2]))
    tally = Tally(20.0, 1.0)
    tally.left(0.001)
    tally.succeed(0.01)
    options = make_options("http://localhost/", max_errors="0", max_p99="60")
    assert set(members(as_json(options, [tally]))) - told == set()


def test_the_members_of_the_benchs_json_are_all_told_of() -> None:
    told = set(re.findall(r"`(\w+)`", text_of("docs/cli.md").partition("## bench")[2]))
    assert set(members(bench_report.as_json([measured()]))) - told == set()


def test_the_members_of_the_list_of_tokens_are_all_told_of(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    cli.main(["token", "create", "--tunnel", "app", "--state-dir", str(tmp_path)])
    capsys.readouterr()
    cli.main(["token", "list", "--json", "--state-dir", str(tmp_path)])
    section = text_of("docs/cli.md").partition("### token list")[2].partition("### token revoke")[0]
    assert list(members(json.loads(capsys.readouterr().out))) == re.findall(r"^\| `(\w+)` \|", section, re.M)


def members(value: object) -> Iterator[str]:
    """The names of every object's members, however deep."""
    if isinstance(value, list | tuple):
        for item in value:
            yield from members(item)
    elif isinstance(value, dict):
        for name, item in value.items():
            yield name
            yield from members(item)


def named_tests() -> Iterator[tuple[str, str]]:
    """Each test that the threat model names, as file and function; ``::name`` alone is of the file before it."""
    file = ""
    for found in re.finditer(r"`(tests/[\w/]+\.py)?(?:::(\w+))?`", text_of("docs/security.md")):
        file = found[1] or file
        if found[1] or found[2]:
            yield file, found[2] or ""


def test_every_test_that_the_threat_model_names_is_there() -> None:
    named = set(named_tests())
    assert len(named) > 40
    missing = [f"{file}::{name}" for file, name in named if not (ROOT / file).exists()]
    missing += [
        f"{file}::{name}"
        for file, name in named
        if name and (ROOT / file).exists() and f"def {name}(" not in text_of(file)
    ]
    assert missing == []
