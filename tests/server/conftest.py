"""How scenarios are played in memory: on both engines and their mixtures, or on each engine by itself."""

from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest

from tests.support.ends import Ends, play

Play = Callable[[Callable[[Ends], Coroutine[Any, Any, None]]], None]


@pytest.fixture
def on_all(engines: tuple[str, str], tmp_path: Path) -> Play:
    return lambda scenario: play(scenario, engines, tmp_path)


@pytest.fixture
def on_each(engine: str, tmp_path: Path) -> Play:
    return lambda scenario: play(scenario, (engine, engine), tmp_path)
