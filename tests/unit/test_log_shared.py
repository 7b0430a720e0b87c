"""One log of several processes: a file that any of them may rotate, and a pipe."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from loguru import logger

from quictunnel import log
from tests.support.forge import Forge

LINES = 900
FULL = 60_000
BATCH = 30


def writers(file: Path | None) -> int:
    """Three processes that were forked after the log was set up, each with lines of its own; the file is soon full."""
    log.FILE_SIZE, log.FILES_KEPT = FULL, 10_000  # type: ignore[misc]
    take_down = log.set_up(file=file, shared=True)
    pids = []
    for name in "abc":
        pids.append(os.fork())
        if pids[-1] == 0:
            for number in range(0, LINES, BATCH):
                lines = "".join(f"{name}{each} {name * 500}\n" for each in range(number, number + BATCH))
                logger.bind(batch=True).opt(raw=True).info("{}", lines)
            os._exit(0)
    statuses = [os.waitpid(pid, 0)[1] for pid in pids]
    take_down()
    return max(statuses)


def into_a_file() -> int:
    return writers(Path(os.environ["HOME"]) / "logs" / "serve.log")


def into_a_pipe() -> int:
    """As a service manager makes it; what comes out of it is printed."""
    reading, writing = os.pipe()
    os.dup2(writing, 2)
    pid = os.fork()
    if pid == 0:
        os.close(reading)
        os._exit(writers(None))
    os.close(writing)
    os.dup2(1, 2)
    while data := os.read(reading, 1000):  # slowly: writers then wait in the midst of what does not fit
        os.write(1, data)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


@pytest.fixture
def forge(tmp_path: Path, home: Path) -> Iterator[Forge]:
    with Forge("tests.unit.test_log_shared", tmp_path) as forge:
        yield forge


def assert_whole(text: str) -> None:
    """Every line of each writer is there, once and whole."""
    lines = text.splitlines()
    assert sorted(lines) == sorted(f"{name}{number} {name * 500}" for name in "abc" for number in range(LINES))


def test_several_processes_rotate_one_file_and_lose_no_line(forge: Forge, home: Path) -> None:
    family = forge.family("into_a_file")
    assert family.exited() == 0, family.output
    files = list((home / "logs").iterdir())
    assert len(files) >= 3 * LINES * 500 // (5 * FULL)
    assert_whole("".join(file.read_text() for file in files))


def test_several_processes_share_standard_error_and_mix_no_lines(forge: Forge) -> None:
    family = forge.family("into_a_pipe")
    assert family.exited() == 0, family.output
    assert_whole(family.output)
