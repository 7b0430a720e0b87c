"""What every test may rely on: its own home, a quiet log, and the QUIC engines that are installed."""

import asyncio
import importlib.util
import itertools
import os
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
from hypothesis import settings
from loguru import logger

from tests.support.processes import start_all_cold

ENGINES = ("aioquic", "qh3")

# How long an example takes depends on what else the machine does.
settings.register_profile("quictunnel", deadline=None)
settings.load_profile("quictunnel")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--cold", action="store_true", help="start every process afresh instead of forking it")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("cold"):
        start_all_cold()


def _engine(*names: str) -> object:
    """A parameter of one or more engines, skipped where one of them is missing."""
    missing = [name for name in names if importlib.util.find_spec(name) is None]
    marks = [pytest.mark.skip(reason=f"{missing[0]} is not installed")] if missing else []
    return pytest.param(names if len(names) > 1 else names[0], marks=marks, id="-".join(names))


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Of a test marked ``either``, let each case run on one engine or mix only, in turns; its other runs are slow."""
    turns: dict[object, int] = {}
    choices: dict[str, list[object]] = {"engine": [*ENGINES], "engines": [(a, b) for a in ENGINES for b in ENGINES]}
    for item in items:
        parameters = getattr(item, "callspec", None)
        chosen = (
            {}
            if parameters is None
            else {name: parameters.params[name] for name in choices if name in parameters.params}
        )
        if item.get_closest_marker("either") is None or not chosen:
            continue
        # By identity: the values may have megabytes, and are the same objects in all of a case's runs.
        others = tuple((name, id(value)) for name, value in sorted(parameters.params.items()) if name not in choices)
        case = (item.nodeid.partition("[")[0], others)
        turn = turns.setdefault(case, len(turns))
        if any(value != choices[name][turn % len(choices[name])] for name, value in chosen.items()):
            item.add_marker(pytest.mark.slow)


@pytest.fixture(params=[_engine(name) for name in ENGINES])
def engine(request: pytest.FixtureRequest) -> str:
    """Each QUIC engine in turn, on both sides."""
    name = request.param
    assert isinstance(name, str)
    return name


@pytest.fixture(params=[_engine(server, client) for server in ENGINES for client in ENGINES])
def engines(request: pytest.FixtureRequest) -> tuple[str, str]:
    """Each pair of QUIC engines in turn: the server's, the client's."""
    server, client = request.param
    return server, client


@pytest.fixture(scope="session")
def homes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Names of directories that are not there yet, without a search for the next free number among thousands."""
    above = tmp_path_factory.mktemp("homes")
    return (above / str(number) for number in itertools.count())


@pytest.fixture(autouse=True)
def home(homes: Iterator[Path], monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty home directory, and no option set from outside: tests must not depend on whose machine it is."""
    directory = next(homes)
    directory.mkdir()
    for name in list(os.environ):
        if name.startswith(("QUICTUNNEL_", "XDG_")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(directory))
    return directory


class _Sink:
    """Where all that is logged goes. To add it anew for each test would take longer than most tests."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self._number = -1

    def fresh(self) -> list[str]:
        """The lines from now on."""
        self.lines = []
        # A test may have set up the log anew, and so removed this sink already.
        if set(logger._core.handlers) != {self._number}:  # type: ignore[attr-defined]
            logger.remove()
            self._number = logger.add(self._write, level="TRACE", format="{level} {message}")
        logger.enable("quictunnel")
        return self.lines

    def _write(self, message: object) -> None:
        self.lines.append(str(message).rstrip("\n"))


_sink = _Sink()


@pytest.fixture(autouse=True)
def log_lines() -> list[str]:
    """What is logged, as ``LEVEL message``; nothing goes to the terminal."""
    return _sink.fresh()


@pytest.fixture
async def no_task_left() -> AsyncIterator[None]:
    """Fail a test that leaves a task behind. Named as the first fixture, it looks when all others are gone."""
    before = asyncio.all_tasks()
    yield
    for _ in range(10):  # done callbacks and cancellations take some turns of the loop, not time
        await asyncio.sleep(0)
    left = {task for task in asyncio.all_tasks() - before - {asyncio.current_task()} if not task.done()}
    assert not left, f"tasks left behind: {left}"
