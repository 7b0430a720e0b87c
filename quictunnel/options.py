"""How options are declared, and the door that they come in by.

A field of a ``Settings`` class is at the same time a flag (``--state-dir``), an environment variable
(``QUICTUNNEL_STATE_DIR``) and a key of the command's table in the file that ``--config`` names (``state-dir`` or
``state_dir`` in ``[serve]``). A flag wins over the environment, that over the file, that over the default. ``cli``
makes the flags and the help from these same fields.

``load_settings`` is the door: what gets through it is whole and sound; anything else is one UsageError that names the
place (flag, variable, or file and key), the value unless it is secret, and what would be right.
"""

import difflib
import os
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, ClassVar, Final, TypeVar, cast

from pydantic import SecretStr, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict

from quictunnel.failures import CommandError, UsageError, reason
from quictunnel.plain import Plain, Secret, flag_name, key_name

__all__ = [
    "TABLES",
    "CommandError",
    "Option",
    "Settings",
    "UsageError",
    "environment_name",
    "flag_name",
    "load_settings",
    "nearest",
    "option_of",
    "plain",
    "reason",
]

TABLES: Final = ("serve", "connect", "load", "bench")
"of the file: the commands that read one"

S = TypeVar("S", bound="Settings")


class Option:
    """How a field looks on the command line; it stands in the field's ``Annotated`` metadata."""

    __slots__ = ("group", "metavar", "positional", "shared")

    def __init__(self, metavar: str = "", *, group: str = "", positional: bool = False, shared: bool = False) -> None:
        self.metavar = metavar
        "what --help shows for the value"

        self.group = group
        "the heading of --help under which it stands; empty for the first one"

        self.positional = positional
        "given without a flag"

        self.shared = shared
        "its variable is QUICTUNNEL_NAME even where the command's others have a prefix of their own"


class _Environment(PydanticBaseSettingsSource):
    """``QUICTUNNEL_…``; an empty variable counts as not set."""

    def get_field_value(self, field: FieldInfo, field_name: str) -> tuple[Any, str, bool]:
        value = os.environ.get(environment_name(_checked(self.settings_cls), field_name))
        return value or None, field_name, False

    def __call__(self) -> dict[str, Any]:
        found = {name: self.get_field_value(field, name)[0] for name, field in self.settings_cls.model_fields.items()}
        return {name: value for name, value in found.items() if value is not None}


class _File(PydanticBaseSettingsSource):
    """The command's table in the file that --config, or QUICTUNNEL_CONFIG, names."""

    def get_field_value(self, field: FieldInfo, field_name: str) -> tuple[Any, str, bool]:
        return self().get(field_name), field_name, False

    def __call__(self) -> dict[str, Any]:
        config = self.current_state.get("config")
        return {} if config is None else _read_table(_checked(self.settings_cls), str(config))


class Settings(BaseSettings):
    """The options of one command. Made by ``load_settings``, or directly where the values are known to be sound."""

    model_config = SettingsConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True, defer_build=True)

    table: ClassVar[str] = ""
    "the command's table in the file; empty: it reads none"

    prefix: ClassVar[str] = "QUICTUNNEL_"
    "of its environment variables"

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Flags, then the environment, then the file."""
        return init_settings, _Environment(settings_cls), _File(settings_cls)


def load_settings(settings: type[S], flags: Mapping[str, Any]) -> S:
    """Settings from ``flags`` (by field name), the environment and the file.

    Raises UsageError for the first thing that is wrong.
    """
    try:
        return settings(**flags)
    except ValidationError as error:
        raise UsageError(_explain(settings, flags, error.errors(include_url=False)[0])) from None


def plain(settings: S) -> S:
    """The same as plain values: an object with the attributes of ``settings``, and with none of its methods."""
    values = {
        name: Secret(value.get_secret_value()) if isinstance(value, SecretStr) else value
        for name, value in vars(settings).items()
    }
    return cast(S, Plain(values))


def option_of(field: FieldInfo) -> Option:
    """The field's command-line side; what stands further out adds to what its type says."""
    merged = Option()
    for extra in field.metadata:
        if isinstance(extra, Option):
            merged.metavar = extra.metavar or merged.metavar
            merged.group = extra.group or merged.group
            merged.positional |= extra.positional
            merged.shared |= extra.shared
    return merged


def environment_name(settings: type[Settings], name: str) -> str:
    """The variable of a field."""
    prefix = Settings.prefix if option_of(settings.model_fields[name]).shared else settings.prefix
    return prefix + name.rstrip("_").upper()


def _checked(settings: type[BaseSettings]) -> type[Settings]:
    assert issubclass(settings, Settings)
    return settings


def _read_table(settings: type[Settings], config: str) -> dict[str, Any]:
    """The command's table, by field name; the other commands' tables are only looked at by name."""
    content = _read_file(config)
    for name, value in content.items():
        if name not in TABLES or not isinstance(value, dict):
            kind = "table" if isinstance(value, dict) else "key outside the tables"
            raise UsageError(f"{config}: unknown {kind} {name!r}{nearest(name, TABLES)}")
    fields = {key_name(name): name for name in settings.model_fields if name != "config"}
    values: dict[str, Any] = {}
    for key, value in content.get(settings.table, {}).items():
        field = fields.get(key.replace("_", "-"))
        if field is None:
            raise UsageError(f"{config}: unknown option {key!r} in [{settings.table}]{nearest(key, fields)}")
        if field in values:
            raise UsageError(f"{config}: {key!r} stands twice in [{settings.table}]")
        values[field] = value
    return values


def _read_file(config: str) -> dict[str, Any]:
    try:
        return tomllib.loads(Path(config).expanduser().read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"{config}: cannot be read: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"{config}: is not TOML: {error}") from None


def _explain(settings: type[Settings], flags: Mapping[str, Any], error: ErrorDetails) -> str:
    """One line: where the value stands, the value, what is wrong with it."""
    problem = _problem(error)
    if not error["loc"]:
        return problem
    name = str(error["loc"][0])
    field = settings.model_fields.get(name)
    if field is None:
        return f"unknown option {flag_name(name)}"
    if error["type"] == "missing":
        return f"{_spelled(field, name)} is missing: {field.description}"
    place, value = _origin(settings, flags, name)
    return f"{place}: {problem}" if "Secret" in str(field.annotation) else f"{place}: {value!r}: {problem}"


def _problem(error: ErrorDetails) -> str:
    context = error.get("ctx", {})
    match error["type"]:
        case "value_error":
            return str(context["error"])
        case "literal_error":
            return f"{context['expected']} is needed".replace("'", "")
        case "too_short":
            return "at least one is needed"
    return error["msg"][:1].lower() + error["msg"][1:]


def _origin(settings: type[Settings], flags: Mapping[str, Any], name: str) -> tuple[str, Any]:
    """Which place gave the field its value, and the value as it stands there."""
    if name in flags:
        return _spelled(settings.model_fields[name], name), flags[name]
    variable = environment_name(settings, name)
    if os.environ.get(variable):
        return variable, os.environ[variable]
    config = ""
    if "config" in settings.model_fields:
        config = str(flags.get("config") or os.environ.get(environment_name(settings, "config"), ""))
    value = _read_table(settings, config).get(name) if config else settings.model_fields[name].default
    return f"{config}: {settings.table}.{key_name(name)}" if config else _spelled(
        settings.model_fields[name], name
    ), value


def _spelled(field: FieldInfo, name: str) -> str:
    return option_of(field).metavar if option_of(field).positional else flag_name(name)


def nearest(name: str, known: Iterable[str]) -> str:
    """What the user may have meant, ready to be put behind what was said; empty if nothing is like it."""
    found = difflib.get_close_matches(name, list(known), n=1)
    return f" (did you mean {found[0]!r}?)" if found else ""
