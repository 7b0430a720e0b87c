"""The benchmarks that stand for themselves: each can be started."""

import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.mark.parametrize("name", ["bulk", "copies", "datagrams", "memory", "streaming"])
def test_each_says_what_it_measures(name: str) -> None:
    command = (sys.executable, str(BENCHMARKS / f"{name}.py"), "--help")
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    assert "usage:" in done.stdout
