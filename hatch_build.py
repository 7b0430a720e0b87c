"""Compiles the modules that every request passes through, when a wheel is built.

mypyc turns typed Python into C. A wheel has both: the compiled modules, which Python takes, and their source, for
people and tracebacks. An editable installation has the source alone, so what is edited is what runs.

    QUICTUNNEL_COMPILE=auto   (or nothing) compile if that works, else build a wheel that runs anywhere
    QUICTUNNEL_COMPILE=1      compile, or fail
    QUICTUNNEL_COMPILE=0      do not

`python hatch_build.py DIRECTORY` copies the package there and compiles it in the copy: for tests and benchmarks. It
needs mypy, setuptools, a C compiler and Python's headers.
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

ROOT: Final = Path(__file__).resolve().parent
TIME_LIMIT: Final = 1200
"seconds"

# What it is run with there: one extension for all modules, so that they call each other without Python in between.
SETUP: Final = """
import sys
from mypyc.build import mypycify
from setuptools import setup
files, options = sys.argv.pop().split(","), ["--ignore-missing-imports", "--python-executable", sys.executable]
setup(name="quictunnel", packages=[], ext_modules=mypycify([*options, *files], group_name="quictunnel", opt_level="2"))
"""


class CompileError(Exception):
    """The modules cannot be compiled here, with the reason."""


def modules() -> list[str]:
    """The files that are compiled, as pyproject.toml has them."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())
    found: list[str] = settings["tool"]["quictunnel"]["compiled"]
    return found


def compile_in(directory: Path) -> list[Path]:
    """Compile in ``directory``, where the package is; the files that were made. Raises CompileError."""
    # Neither the settings of the project nor anything else that is there has a say in it.
    (directory / "compile_setup.py").write_text(SETUP)
    command = (sys.executable, "compile_setup.py", "--quiet", "build_ext", "--inplace", ",".join(modules()))
    try:
        done = subprocess.run(
            command, cwd=directory, capture_output=True, text=True, check=False, timeout=TIME_LIMIT,
            env=os.environ | {"MYPY_CACHE_DIR": str(directory / ".mypy_cache")},
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired) as error:
        raise CompileError(str(error)) from None
    if done.returncode:
        said = [line for line in (done.stdout + done.stderr).splitlines() if line.strip()]
        wrong = [line for line in said if re.search(r"error|No module|not found", line)] or said
        raise CompileError("; ".join(wrong[:3]) or f"exit status {done.returncode}")
    made = sorted(directory.glob("*__mypyc.*.so")) + sorted(directory.glob("quictunnel/**/*.so"))
    if len(made) != len(modules()) + 1:
        raise CompileError(f"{len(made)} files were made of {len(modules())} modules")
    return made


def compiled_copy(directory: Path) -> list[Path]:
    """Copy the package to ``directory`` and compile it there; the files that were made. Raises CompileError."""
    shutil.copytree(ROOT / "quictunnel", directory / "quictunnel", ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    return compile_in(directory)


def add_to_wheel(version: str, build_data: dict[str, Any], warn: Callable[[str], None]) -> Path | None:
    """Compile for a ``standard`` or ``editable`` wheel, if it is to be; the directory to remove afterwards.

    Raises CompileError and ValueError.
    """
    wish = os.environ.get("QUICTUNNEL_COMPILE") or "auto"
    if wish not in ("auto", "0", "1"):
        raise ValueError(f"QUICTUNNEL_COMPILE is {wish!r}: it may be auto, 1 or 0")
    if version == "editable" or wish == "0":
        return None
    directory = Path(tempfile.mkdtemp(prefix="quictunnel-compile-"))
    try:
        made = compiled_copy(directory)
    except CompileError as error:
        shutil.rmtree(directory, ignore_errors=True)
        if wish == "1":
            raise
        warn(f"quictunnel is not compiled, it will run as plain Python: {error}")
        return None
    build_data["pure_python"] = False
    build_data["infer_tag"] = True
    for path in made:
        build_data["force_include"][str(path)] = str(path.relative_to(directory))
    return directory


try:
    from hatchling.builders.hooks.plugin.interface import BuildHookInterface
except ImportError:  # run by hand
    BuildHookInterface = object


class CompileHook(BuildHookInterface):
    """What hatchling calls."""

    PLUGIN_NAME = "custom"
    _directory: Path | None = None

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        self._directory = add_to_wheel(version, build_data, self.app.display_warning)

    def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:
        if self._directory is not None:
            shutil.rmtree(self._directory, ignore_errors=True)


def main() -> int:
    """Make a compiled copy; the exit status."""
    if len(sys.argv) != 2 or sys.argv[1].startswith("-"):
        print(__doc__, file=sys.stderr)
        return 2
    directory = Path(sys.argv[1])
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    try:
        made = compiled_copy(directory)
    except CompileError as error:
        print(f"cannot compile: {error}", file=sys.stderr)
        return 1
    print(f"{len(made) - 1} modules are compiled in {directory}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
