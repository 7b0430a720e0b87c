"""Imports climb, never descend: which room of the house may import which."""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "quictunnel"

# A room is a package or a module directly beneath quictunnel/. It may import itself and what stands here.
FLOORS: dict[str, set[str]] = {
    # ground
    "wire": set(),
    # stairwell
    "log": set(),
    "trust": {"wire"},
    "values": {"wire"},
    "failures": set(),
    "plain": set(),
    "versions": set(),
    # the landing, and what translates into its frames: none of these imports another
    "exchange": {"wire"},
    "quic": {"wire", "exchange", "log", "trust"},
    "http": {"wire", "exchange", "log"},
    "backends": {"wire", "exchange", "log"},
    # two flats with no door between them
    "server": {"wire", "exchange", "quic", "http", "log", "trust"},
    "client": {"wire", "exchange", "quic", "http", "backends", "log", "trust"},
    # beside the tunnel
    "demo": set(),
    "load": {"log"},
    "bench": {"load", "wire"},
    # the roof
    "options": {"failures", "plain"},
    "settings": {"wire", "trust", "backends", "load", "values", "options"},
    "app": {
        "wire",
        "trust",
        "log",
        "exchange",
        "http",
        "backends",
        "server",
        "client",
        "demo",
        "load",
        "bench",
        "values",
        "options",
        "settings",
        "failures",
        "plain",
    }
    | {"quic"},
    "cli": {"log", "trust", "load", "values", "options", "settings", "app", "versions"},
    "start": {"cli", "app", "versions"},
    "__main__": {"start"},
    "__init__": {"app"},  # the door for Python programs, opened when somebody comes
}

# The ground is bytes and rules: no clock, no chance, no socket, no file, nothing that waits.
PURE = {"wire"}
IMPURE = {
    "aioquic",
    "asyncio",
    "concurrent",
    "datetime",
    "httptools",
    "httpx",
    "io",
    "logging",
    "loguru",
    "os",
    "pathlib",
    "pydantic",
    "pydantic_settings",
    "qh3",
    "random",
    "secrets",
    "select",
    "selectors",
    "signal",
    "socket",
    "ssl",
    "subprocess",
    "sys",
    "tempfile",
    "threading",
    "time",
    "uuid",
    "uvloop",
}

ENGINES = {"aioquic", "qh3"}
ONLY_FILES_WITH_ENGINES = {PACKAGE / "quic" / name for name in ("engine.py", "aioquic_reins.py", "qh3_reins.py")}

MODULES = sorted(PACKAGE.rglob("*.py"))


def room_of(module: Path) -> str:
    return module.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(module: Path) -> Iterator[str]:
    """The full dotted names that a module imports, at its top or within, by statement or by ``import_module``."""
    package = ["quictunnel", *module.relative_to(PACKAGE).parts[:-1]]
    for node in ast.walk(ast.parse(module.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            origin = ".".join(filter(None, (base, node.module)))
            yield from (f"{origin}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("import_module", "__import__")):
            first = node.args[0] if node.args else None
            assert (
                isinstance(first, ast.Constant)
                or module in ONLY_FILES_WITH_ENGINES
                or room_of(module)
                in (
                    "backends",
                    "client",
                )
            ), f"{module}: import of what is not known before it runs"
            if isinstance(first, ast.Constant):
                yield str(first.value)


def rooms_imported(module: Path) -> set[str]:
    names = [name.split(".") for name in imports(module)]
    found = {parts[1] for parts in names if parts[0] == "quictunnel" and len(parts) > 1}
    # What is no room is a name in quictunnel/__init__.py, which imports nothing.
    return (found & {room_of(path) for path in MODULES}) - {room_of(module)}


def outsiders_imported(module: Path) -> set[str]:
    return {name.split(".")[0] for name in imports(module)}


@pytest.mark.parametrize("module", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_climb(module: Path) -> None:
    room = room_of(module)
    assert room in FLOORS, f"say in FLOORS what {room} may import"
    forbidden = rooms_imported(module) - FLOORS[room]
    assert not forbidden, f"{room} may not import {', '.join(sorted(forbidden))}"


@pytest.mark.parametrize(
    "module", [path for path in MODULES if room_of(path) in PURE], ids=lambda path: str(path.relative_to(PACKAGE))
)
def test_the_ground_is_pure(module: Path) -> None:
    assert not outsiders_imported(module) & IMPURE


@pytest.mark.parametrize("module", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_one_file_knows_the_engines(module: Path) -> None:
    if module not in ONLY_FILES_WITH_ENGINES:
        assert not outsiders_imported(module) & ENGINES


def test_the_table_has_no_way_down() -> None:
    """Going up from any room never comes back to it."""
    above: dict[str, set[str]] = {}

    def below(room: str, path: tuple[str, ...]) -> set[str]:
        assert room not in path, f"a circle: {' -> '.join((*path, room))}"
        if room not in above:
            above[room] = FLOORS[room].union(*(below(other, (*path, room)) for other in FLOORS[room]))
        return above[room]

    for room in FLOORS:
        below(room, ())


@pytest.mark.parametrize("name", ["server", "client"])
def test_no_door_between_the_flats(name: str) -> None:
    assert not FLOORS[name] & {"server", "client"}
    assert not FLOORS[name] & {"settings", "options", "app"}, "lower rooms are handed plain values"


def test_impure_names_are_real_modules() -> None:
    third_parties = {"aioquic", "httptools", "httpx", "loguru", "pydantic", "pydantic_settings", "qh3", "uvloop"}
    assert IMPURE - third_parties <= sys.stdlib_module_names
