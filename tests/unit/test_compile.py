"""What is compiled, when it is, and what an installation is without."""

import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]


def load_hook() -> ModuleType:
    spec = importlib.util.spec_from_file_location("hatch_build", ROOT / "hatch_build.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


HOOK = load_hook()


@pytest.fixture
def wheel() -> dict[str, Any]:
    """What hatchling is about to build."""
    return {"pure_python": True, "infer_tag": False, "force_include": {}}


@pytest.fixture(autouse=True)
def wish(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("QUICTUNNEL_COMPILE", raising=False)


def compiles(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Have the compiler be one that makes empty files; where it was asked to."""
    asked: list[Path] = []

    def compiled_copy(directory: Path) -> list[Path]:
        asked.append(directory)
        (directory / "quictunnel").mkdir()
        made = [directory / "quictunnel__mypyc.x.so", directory / "quictunnel" / "exchange.x.so"]
        for path in made:
            path.touch()
        return made

    monkeypatch.setattr(HOOK, "compiled_copy", compiled_copy)
    return asked


def fails(monkeypatch: pytest.MonkeyPatch) -> None:
    def compiled_copy(directory: Path) -> list[Path]:
        raise HOOK.CompileError("there is no compiler")

    monkeypatch.setattr(HOOK, "compiled_copy", compiled_copy)


def no_warning(text: str) -> None:
    raise AssertionError(text)


def test_each_module_that_is_compiled_is_there_and_named_once() -> None:
    modules = HOOK.modules()
    assert modules == sorted(set(modules))
    assert [each for each in modules if not (ROOT / each).is_file()] == []


@pytest.mark.parametrize("said", [None, "", "auto", "1"])
def test_wheel_has_what_was_compiled_and_says_for_which_python(
    said: str | None, wheel: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    if said is not None:
        monkeypatch.setenv("QUICTUNNEL_COMPILE", said)
    compiles(monkeypatch)
    directory = HOOK.add_to_wheel("standard", wheel, no_warning)
    assert (wheel["pure_python"], wheel["infer_tag"]) == (False, True)
    assert sorted(wheel["force_include"].values()) == ["quictunnel/exchange.x.so", "quictunnel__mypyc.x.so"]
    assert all(Path(path).is_file() for path in wheel["force_include"])
    HOOK.CompileHook.finalize(type("Hook", (), {"_directory": directory})(), "standard", wheel, "")
    assert not directory.exists()


@pytest.mark.parametrize(("version", "said"), [("editable", "auto"), ("editable", "1"), ("standard", "0")])
def test_nothing_is_compiled_for_who_edits_or_does_not_want_it(
    version: str, said: str, wheel: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QUICTUNNEL_COMPILE", said)
    asked = compiles(monkeypatch)
    assert HOOK.add_to_wheel(version, wheel, no_warning) is None
    assert (asked, wheel["pure_python"]) == ([], True)


def test_wheel_for_any_python_is_built_where_nothing_can_be_compiled(
    wheel: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    fails(monkeypatch)
    warnings: list[str] = []
    assert HOOK.add_to_wheel("standard", wheel, warnings.append) is None
    assert wheel == {"pure_python": True, "infer_tag": False, "force_include": {}}
    assert warnings == ["quictunnel is not compiled, it will run as plain Python: there is no compiler"]


def test_who_insists_on_it_is_told_that_nothing_can_be_compiled(
    wheel: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QUICTUNNEL_COMPILE", "1")
    fails(monkeypatch)
    with pytest.raises(HOOK.CompileError, match="there is no compiler"):
        HOOK.add_to_wheel("standard", wheel, no_warning)


def test_wish_that_is_none_is_refused(wheel: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QUICTUNNEL_COMPILE", "yes")
    with pytest.raises(ValueError, match="auto, 1 or 0"):
        HOOK.add_to_wheel("standard", wheel, no_warning)


def test_reason_is_told_when_the_compiler_refuses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(HOOK, "SETUP", "raise SystemExit('error: unknown type name PyObject')")
    with pytest.raises(HOOK.CompileError, match="unknown type name PyObject"):
        HOOK.compile_in(tmp_path)


def test_compiler_that_makes_too_little_is_not_believed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(HOOK, "SETUP", "")
    with pytest.raises(HOOK.CompileError, match="0 files were made"):
        HOOK.compile_in(tmp_path)


@pytest.mark.parametrize("arguments", [[], ["--help"], ["a", "b"]])
def test_by_hand_it_wants_to_know_where(arguments: list[str]) -> None:
    done = subprocess.run((sys.executable, str(ROOT / "hatch_build.py"), *arguments), capture_output=True, check=False)
    assert (done.returncode, done.stdout) == (2, b"")
    assert b"DIRECTORY" in done.stderr
