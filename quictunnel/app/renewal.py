"""What both running commands do when their settings are read anew, at SIGHUP."""

import os
from collections.abc import Collection
from typing import TYPE_CHECKING, Final, Generic, NamedTuple, TypeVar

from quictunnel.failures import reason
from quictunnel.plain import flag_name, replaced

if TYPE_CHECKING:
    from quictunnel.settings import LogSettings

__all__ = ["OF_THE_LOG", "OF_THE_START", "Renewed", "check_log", "flags", "renewed", "told"]

S = TypeVar("S", bound="LogSettings")

OF_THE_LOG: Final = frozenset({"log_file", "log_format", "log_level"})

# About the start alone.
OF_THE_START: Final = frozenset({"config", "takeover"})


class Renewed(NamedTuple, Generic[S]):
    """What is to be gone on with, which options are others than before, and which would be after a restart."""

    settings: S
    changed: set[str]
    fixed: set[str]


def renewed(before: S, found: S, live: frozenset[str]) -> Renewed[S]:
    """What a running process takes of settings that were read anew: the ``live`` options."""
    now = vars(found)
    names = {name for name, value in vars(before).items() if value != now[name]}
    fixed = names - OF_THE_START - live
    settings = replaced(found, {name: getattr(before, name) for name in fixed})
    return Renewed(settings, names & live, fixed)


def check_log(settings: "LogSettings") -> None:
    """Whether the log can be written, before the present one is closed. Raises OSError."""
    if settings.log_file is not None:
        settings.log_file.parent.mkdir(parents=True, exist_ok=True)
        os.close(os.open(settings.log_file, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600))


def flags(names: Collection[str]) -> str:
    """Options as they are given."""
    return ", ".join(sorted(map(flag_name, names)))


def told(error: Exception) -> str:
    """An error as one line for the log."""
    return reason(error) if isinstance(error, OSError) else str(error)
