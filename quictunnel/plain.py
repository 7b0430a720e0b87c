"""Options once they have been read: plain values under their names, and nothing left of what has read them.

What reads options takes 14 MB and a third of a second to load, which a process that runs for months has no use for.
"""

import copy
from collections.abc import Mapping
from typing import Any, NoReturn, TypeVar

__all__ = ["Plain", "Secret", "flag_name", "key_name", "replaced"]

S = TypeVar("S")


class Plain:
    """The options of one command as attributes, by the names that the fields of its settings have."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        vars(self).update(values)

    def __setattr__(self, name: str, value: object) -> NoReturn:
        raise AttributeError(f"{name}: options do not change; see replaced()")

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {vars(self)}>"


class Secret:
    """A text that is not shown by mistake; pydantic's SecretStr, without pydantic."""

    __slots__ = ("_value",)

    def __init__(self, value: str) -> None:
        self._value = value

    def get_secret_value(self) -> str:
        """The text."""
        return self._value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Secret) and other._value == self._value

    def __hash__(self) -> int:
        return hash(self._value)

    def __repr__(self) -> str:
        return "Secret('**********')"

    __str__ = __repr__


def replaced(options: S, changes: Mapping[str, Any]) -> S:
    """The options with some of them other than they were."""
    found = copy.copy(options)
    vars(found).update(changes)
    return found


def flag_name(name: str) -> str:
    """The flag of a field: ``state_dir`` is ``--state-dir``."""
    return "--" + key_name(name)


def key_name(name: str) -> str:
    """A field's key in the file. A trailing underscore only tells the field from a method of pydantic's."""
    return name.rstrip("_").replace("_", "-")
