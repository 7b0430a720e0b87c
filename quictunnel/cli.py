"""The command line: commands -> settings -> app. Flags and help are made from the fields in ``settings``.

Exit status: 0 done, 1 it could not be done (one line on standard error says why), 2 it was not asked for rightly, 130
after Ctrl-C.
"""

import argparse
import json
import os
import sys
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final, NoReturn

from pydantic.fields import FieldInfo

from quictunnel.app.running import guarded, run, run_connect, run_logged, run_serve
from quictunnel.options import (
    CommandError,
    Settings,
    UsageError,
    environment_name,
    flag_name,
    load_settings,
    nearest,
    option_of,
    plain,
)
from quictunnel.settings import (
    BenchSettings,
    CertsInitSettings,
    CertsIssueSettings,
    CertsShowSettings,
    ConnectSettings,
    DemoSettings,
    LoadSettings,
    LogSettings,
    ServeSettings,
    StatusSettings,
    TokenCreateSettings,
    TokenListSettings,
    TokenReleaseSettings,
    TokenRevokeSettings,
)
from quictunnel.trust.files import read_bounded

__all__ = ["main", "read"]

_SHOWN: Final = 3
"names that a token holds, in a table"

_BOOK_WAIT: Final = 5.0
"seconds to wait for a server that is writing the book of names"


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line (by default the process's own) and return the exit status."""
    return guarded(lambda: _main(sys.argv[1:] if argv is None else argv))


def read(argv: Sequence[str]) -> Settings:
    """The options of a command line as plain values. Raises what ``guarded`` tells, and SystemExit after the help."""
    command, flags = _parse(argv)
    return plain(load_settings(command.settings, flags))


def _main(argv: Sequence[str]) -> int:
    command, flags = _parse(argv)
    settings = load_settings(command.settings, flags)
    if command.reads_again:
        return command.run(plain(settings), lambda: read(argv))
    return command.run(settings)


# Commands that stay running.


def _demo(settings: DemoSettings) -> int:
    from quictunnel.app.demo import demo

    return run_logged(demo, settings)


def _status(settings: StatusSettings) -> int:
    from quictunnel.app.status import status

    return status(settings)


# Certificates and tokens.


def _certs_init(settings: CertsInitSettings) -> int:
    from quictunnel.trust import certificates

    with _bad_values_are_usage():
        path = certificates.init(settings.dir, common_name=settings.name, days=settings.days)
    print(path)
    return 0


def _certs_issue(settings: CertsIssueSettings) -> int:
    from quictunnel.trust import certificates

    with _bad_values_are_usage():
        paths = certificates.issue(settings.dir, settings.names, days=settings.days, out=settings.out)
    print(paths.certificate)
    print(paths.key)
    return 0


def _certs_show(settings: CertsShowSettings) -> int:
    from quictunnel.trust import certificates

    print("\n\n".join(map(str, certificates.show(settings.file or settings.dir))))
    return 0


@contextmanager
def _bad_values_are_usage() -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise UsageError(str(error)) from None


def _token_create(settings: TokenCreateSettings) -> int:
    from quictunnel.trust.tokens import TokenStore, parse_duration

    expires = parse_duration(settings.expires)
    now = datetime.now(UTC)
    with _bad_values_are_usage():
        new = TokenStore(settings.state_dir).create(settings.tunnel, expires, now, settings.host, settings.note)
    until = "for ever" if expires is None else f"until {now + expires:%Y-%m-%d %H:%M} UTC"
    scope = ", ".join([*settings.tunnel, *settings.host])
    print(f"token {new.id}, good for {scope} {until}; it is shown only now:", file=sys.stderr)
    print(new.secret)
    join = _join_string(settings.state_dir, new.secret)
    if join:
        print(f"or, with the server's address and pin in one: quictunnel connect 3000 --join {join}", file=sys.stderr)
    return 0


def _join_string(state_dir: Path, token: str) -> str:
    """A join string with this token for the server that has run with the state directory; empty if none has."""
    from quictunnel.trust.join import LOCAL_JOIN, TEXT_LIMIT, JoinString

    try:
        local = JoinString.parse(read_bounded(state_dir / LOCAL_JOIN, TEXT_LIMIT).decode("ascii"))
    except (FileNotFoundError, ValueError):
        return ""
    return JoinString(local.address, local.ca_pin, token).encode()


def _token_list(settings: TokenListSettings) -> int:
    from quictunnel.trust.tokens import TokenStore

    store, now = TokenStore(settings.state_dir), datetime.now(UTC)
    store.load()
    holdings = _holdings(settings.state_dir)
    rows: list[dict[str, Any]] = [
        {
            "id": token.id,
            "state": token.state(now),
            "tunnels": token.tunnels,
            "hosts": token.hosts,
            "holds": holdings.get(token.id, []),
            "created": token.created.isoformat(timespec="seconds"),
            "expires": token.expires.isoformat(timespec="seconds") if token.expires else None,
            "note": token.note,
        }
        for token in store.tokens
    ]
    if settings.json_:
        print(json.dumps(rows, indent=2))
    else:
        _print_table(("ID", "STATE", "TUNNELS", "HOSTS", "HOLDS", "EXPIRES", "NOTE"), [_token_row(row) for row in rows])
    return 0


def _token_row(row: Mapping[str, Any]) -> tuple[str, ...]:
    holds = row["holds"][:_SHOWN]
    if len(row["holds"]) > _SHOWN:
        holds.append(f"+{len(row['holds']) - _SHOWN}")
    lists = (",".join(names) or "-" for names in (row["tunnels"], row["hosts"], holds))
    return row["id"], row["state"], *lists, row["expires"] or "never", row["note"]


def _holdings(state_dir: Path) -> dict[str, list[str]]:
    """The names and hosts that each token holds."""
    from quictunnel.trust.owners import FILE_NAME, Owners

    found: dict[str, list[str]] = {}
    if (state_dir / FILE_NAME).exists():
        owners = Owners(state_dir, wait=_BOOK_WAIT)
        for held in owners.all():
            found.setdefault(held.token, []).append(held.name)
        owners.close()
    return found


def _print_table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> None:
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    for row in (head, *rows):
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def _token_revoke(settings: TokenRevokeSettings) -> int:
    from quictunnel.trust.tokens import TokenStore

    token = TokenStore(settings.state_dir).revoke(settings.id, datetime.now(UTC))
    print(f"token {token.id} is revoked; a running server ends its sessions within 5 seconds")
    return 0


def _token_release(settings: TokenReleaseSettings) -> int:
    from quictunnel.trust.owners import FILE_NAME, Owners

    released = []
    if (settings.state_dir / FILE_NAME).exists():
        owners = Owners(settings.state_dir, wait=_BOOK_WAIT)
        released = owners.release(settings.name)
        owners.close()
    if not released:
        raise CommandError(f"no token holds {settings.name}; `quictunnel token list` shows what each one holds")
    for held in released:
        what = "tunnel" if held.kind == "tunnel" else "host"
        print(f"{what} {held.name} was token {held.token}'s, and is whoever's registers it first")
    return 0


# The load test and the bench.


def _load(settings: LoadSettings) -> int:
    from quictunnel.load.plan import make_options
    from quictunnel.load.run import run_load

    with _bad_values_are_usage():
        options = make_options(**settings.model_dump(exclude={"config", "json_"}), json=settings.json_)
    return run(run_load(options, sys.stdout, sys.stderr))


def _bench(settings: BenchSettings) -> int:
    from quictunnel.app.bench import bench

    return run(bench(settings))


# The table of commands.


@dataclass(frozen=True, slots=True)
class _Command:
    settings: type[Settings]
    run: Callable[..., int]
    help: str
    reads_again: bool = False
    "``run`` is also handed what reads the settings anew, in the same way"


@dataclass(frozen=True, slots=True)
class _Group:
    commands: Mapping[str, _Command]
    help: str


_COMMANDS: Final[Mapping[str, _Command | _Group]] = {
    "serve": _Command(
        ServeSettings,
        run_serve,
        "take visitors' requests in and hand them to the clients of their tunnels",
        reads_again=True,
    ),
    "connect": _Command(
        ConnectSettings, run_connect, "expose a local web application through a server", reads_again=True
    ),
    "demo": _Command(DemoSettings, _demo, "try it: server, client and a small backend together"),
    "certs": _Group(
        {
            "init": _Command(CertsInitSettings, _certs_init, "make a certificate authority"),
            "issue": _Command(CertsIssueSettings, _certs_issue, "issue a server certificate"),
            "show": _Command(CertsShowSettings, _certs_show, "show certificates"),
        },
        "make and show certificates of your own",
    ),
    "token": _Group(
        {
            "create": _Command(TokenCreateSettings, _token_create, "make a token, shown once"),
            "list": _Command(TokenListSettings, _token_list, "list tokens, without their secrets"),
            "revoke": _Command(TokenRevokeSettings, _token_revoke, "make a token useless"),
            "release": _Command(TokenReleaseSettings, _token_release, "take a name or a host from its token"),
        },
        "say who may serve which tunnels",
    ),
    "status": _Command(StatusSettings, _status, "show a running server's tunnels and who serves them"),
    "load": _Command(LoadSettings, _load, "an open-loop load test"),
    "bench": _Command(BenchSettings, _bench, "measure a tunnel, on this machine or to a server, and what limits it"),
}


# From the table and the fields to a parser.


class _Parser(argparse.ArgumentParser):
    """Errors are ours to show, and an abbreviated flag would change its meaning when another is added."""

    def __init__(self, **options: Any) -> None:
        super().__init__(allow_abbrev=False, formatter_class=_Formatter, **options)

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message[:1].lower()}{message[1:]}; see {self.prog} --help")


class _Formatter(argparse.RawDescriptionHelpFormatter):
    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=32)


def _parse(argv: Sequence[str]) -> tuple[_Command, dict[str, Any]]:
    parser = _parser()
    found, unknown = parser.parse_known_args(argv)
    flags = vars(found)
    command, used = flags.pop("command", None), flags.pop("parser", parser)
    if unknown:
        known = [flag for action in used._actions for flag in action.option_strings]
        word = unknown[0].partition("=")[0]
        raise UsageError(f"unknown argument {word!r}{nearest(word, known)}; see {used.prog} --help")
    if command is None:
        used.print_help(sys.stderr)
        raise SystemExit(2)
    return command, flags


def _parser() -> _Parser:
    parser = _Parser(
        prog="quictunnel",
        usage="quictunnel COMMAND [options]",
        description="A self-hosted reverse HTTP tunnel over QUIC.",
        epilog="quictunnel COMMAND --help tells a command's options.",
    )
    parser.add_argument(
        "--version", action=_Version, nargs=0, default=argparse.SUPPRESS, help="show program's version number and exit"
    )
    _add_commands(parser, _COMMANDS)
    return parser


def _add_commands(parser: _Parser, commands: Mapping[str, _Command | _Group]) -> None:
    subparsers = parser.add_subparsers(title="commands", metavar="COMMAND", parser_class=_Parser)
    for name, entry in commands.items():
        prog = f"{parser.prog} {name}"
        if isinstance(entry, _Group):
            group = subparsers.add_parser(name, prog=prog, usage=f"{prog} COMMAND [options]", help=entry.help)
            group.set_defaults(parser=group)
            _add_commands(group, entry.commands)
        else:
            words = " ".join(filter(None, (prog, _positionals(entry.settings), "[options]")))
            leaf = subparsers.add_parser(name, prog=prog, usage=words, help=entry.help, epilog=_epilog(entry.settings))
            leaf.description = f"{entry.help[:1].upper()}{entry.help[1:]}."
            leaf.set_defaults(command=entry, parser=leaf)
            _add_fields(leaf, entry.settings)


def _positionals(settings: type[Settings]) -> str:
    words = []
    for field in settings.model_fields.values():
        if option_of(field).positional:
            metavar = option_of(field).metavar + ("…" if _is_list(field) else "")
            words.append(metavar if field.is_required() else f"[{metavar}]")
    return " ".join(words)


def _epilog(settings: type[Settings]) -> str:
    fields = _in_order(settings)
    text = f"Each option can also be an environment variable, as {environment_name(settings, fields[0][0])}"
    if settings.table:
        text += f",\nor a key in the table [{settings.table}] of the --config file"
    timed = any(option_of(field).metavar == "TIME" for _, field in fields)
    return f"{text}. TIME is as 30s, 5m or 500ms." if timed else f"{text}."


def _in_order(settings: type[Settings]) -> list[tuple[str, FieldInfo]]:
    """The fields as --help lists them: what is the same for every command comes last."""
    return sorted(settings.model_fields.items(), key=lambda item: item[0] in LogSettings.model_fields)


def _add_fields(parser: _Parser, settings: type[Settings]) -> None:
    groups: dict[str, Any] = {"": parser}
    for name, field in _in_order(settings):
        option = option_of(field)
        if option.group not in groups:
            groups[option.group] = parser.add_argument_group(option.group)
        names = [name] if option.positional else [flag_name(name)]
        groups[option.group].add_argument(*names, **_argument(name, field))


def _argument(name: str, field: FieldInfo) -> dict[str, Any]:
    """What argparse is told of a field. It only collects texts: the settings read and check them."""
    option = option_of(field)
    told: dict[str, Any] = {"default": argparse.SUPPRESS, "help": _help(field)}
    if field.annotation is bool:
        return told | {"dest": name, "action": "store_const", "const": True}
    if field.annotation == bool | None:
        return told | {"dest": name, "action": argparse.BooleanOptionalAction}
    told["metavar"] = option.metavar
    if option.positional:
        # Whether it must be there is for the settings to say: the environment or the file may hold it.
        return told | {"nargs": "*" if _is_list(field) else "?"}
    return told | {"dest": name, "action": "append" if _is_list(field) else "store"}


def _is_list(field: FieldInfo) -> bool:
    return typing.get_origin(field.annotation) is tuple


def _help(field: FieldInfo) -> str:
    default = field.get_default(call_default_factory=True) if not field.is_required() else None
    if isinstance(default, Path):
        home = str(Path.home())
        default = "~" + str(default)[len(home) :] if str(default).startswith(home + os.sep) else default
    shown = "" if default is None or default in (False, (), "") else f" (default: {default})"
    if field.is_required() and not option_of(field).positional:
        shown = " (needed)"
    return f"{field.description}{shown}".replace("%", "%%")


class _Version(argparse.Action):
    """What is installed is looked up by whoever asks."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> NoReturn:
        from quictunnel.versions import versions

        print(versions())
        parser.exit()
