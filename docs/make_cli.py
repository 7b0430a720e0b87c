"""Writes the tables of options in ``docs/cli.md`` from the declarations in ``quictunnel.settings``.

    .venv/bin/python docs/make_cli.py            # write them anew
    .venv/bin/python docs/make_cli.py --check    # exit with 1 if they are not as declared

The text around the tables is written by hand. A table stands between ``<!-- options: COMMAND -->`` and
``<!-- end -->``.
"""

import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Final

from pydantic.fields import FieldInfo

from quictunnel import cli
from quictunnel.options import Settings, environment_name, flag_name, option_of

__all__ = ["commands", "documented", "render"]

PAGE: Final = Path(__file__).with_name("cli.md")

# Not asked of the machine this runs on: the page is the same wherever it is made.
STATE_DIR: Final = "~/.local/state/quictunnel"

_PLACE: Final = re.compile(r"(<!-- options: (?P<command>[a-z ]+) -->\n).*?(<!-- end -->)", re.DOTALL)


def commands() -> dict[str, type[Settings]]:
    """Every command, as ``token create``, and what declares its options."""
    return dict(_walk(cli._COMMANDS))


def documented(page: str) -> list[str]:
    """The commands that the page has a table for."""
    return [found["command"] for found in _PLACE.finditer(page)]


def render(page: str) -> str:
    """The page with each table as declared. Raises KeyError for a table of a command that does not exist."""
    known = commands()
    return _PLACE.sub(lambda found: f"{found[1]}\n{_table(known[found['command']])}\n{found[3]}", page)


def _walk(entries: Mapping[str, "cli._Command | cli._Group"], before: str = "") -> Iterator[tuple[str, type[Settings]]]:
    for name, entry in entries.items():
        if isinstance(entry, cli._Group):
            yield from _walk(entry.commands, f"{before}{name} ")
        else:
            yield f"{before}{name}", entry.settings


def _table(settings: type[Settings]) -> str:
    head = ["option", "default", "variable", *(["key"] if settings.table else []), "meaning"]
    rows = [head, ["---"] * len(head)]
    rows += [_row(settings, name, field) for name, field in cli._in_order(settings)]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def _row(settings: type[Settings], name: str, field: FieldInfo) -> list[str]:
    key = [_code(flag_name(name)[2:]) if name != "config" else ""] if settings.table else []
    text = (field.description or "").replace("|", "\\|").replace("*", "\\*")
    return [_option(name, field), _default(field), _code(environment_name(settings, name)), *key, text]


def _option(name: str, field: FieldInfo) -> str:
    option = option_of(field)
    if option.positional:
        return _code(option.metavar + ("…" if cli._is_list(field) else ""))
    if field.annotation == bool | None:
        return f"{_code(flag_name(name))}, {_code('--no-' + flag_name(name)[2:])}"
    return _code(f"{flag_name(name)} {option.metavar}".rstrip())


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "*required*"
    if field.default_factory is not None:
        return _code(STATE_DIR)
    if field.default is None or field.default in ((), ""):
        return ""
    return "off" if field.default is False else _code(str(field.default))


def _code(text: str) -> str:
    return f"`{text}`".replace("|", "\\|")


def main(argv: list[str]) -> int:
    """Write the page, or check it; the exit status."""
    page = PAGE.read_text("utf-8")
    fresh = render(page)
    if argv == ["--check"]:
        if fresh != page:
            sys.stderr.write(f"{PAGE.name} is not as declared: run .venv/bin/python docs/make_cli.py\n")
        return int(fresh != page)
    PAGE.write_text(fresh, "utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
