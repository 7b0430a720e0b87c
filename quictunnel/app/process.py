"""What every long-running command does with its process: its engine, signals, and facts for whoever waits."""

import asyncio
import functools
import gc
import resource
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Final, TypeVar

from loguru import logger

from quictunnel.app.supervise import Parent
from quictunnel.failures import CommandError
from quictunnel.quic.engine import Engine, select_engine

__all__ = ["calm_collector", "choose_engine", "hang_up", "raise_file_limit", "say", "stop_signals", "visitors_allowed"]

_OTHER_FILES: Final = 320
"that a server has open beside its visitors' sockets, the visitors too many among them that are told so"


S = TypeVar("S")


def choose_engine(name: str) -> Engine:
    """The engine of that name. Raises CommandError."""
    try:
        return select_engine(name)
    except ValueError as error:
        raise CommandError(str(error)) from None


@contextmanager
def stop_signals(parent: Parent | None = None) -> Iterator[asyncio.Event]:
    """An event that SIGTERM or SIGINT sets; the second of them ends the process as it would have without us.

    In a child it is its parent that has SIGINT, and the event is also set when that is gone.
    """
    loop = asyncio.get_running_loop()
    event = asyncio.Event()
    numbers = (signal.SIGTERM, signal.SIGINT) if parent is None else (signal.SIGTERM,)

    def stop() -> None:
        event.set()
        forget()

    def forget() -> None:
        for number in numbers:
            loop.remove_signal_handler(number)
        if parent is not None:
            loop.remove_reader(parent.life)

    for number in numbers:
        loop.add_signal_handler(number, stop)
    if parent is not None:
        loop.add_reader(parent.life, stop)
    try:
        yield event
    finally:
        forget()


@contextmanager
def hang_up(read: Callable[[], S], act: Callable[[Callable[[], S]], None]) -> Iterator[None]:
    """Let SIGHUP read the settings and act on them: ``act`` is given what returns them, or raises what ``read`` did.

    They are read by a thread: what reads options is loaded for it, which takes a third of a second.
    """
    loop = asyncio.get_running_loop()
    reading: asyncio.Future[S] | None = None
    again = False

    def begin() -> None:
        nonlocal reading, again
        if reading is not None:
            again = True  # what is being read now may be older than this signal
            return
        reading = loop.run_in_executor(None, read)
        reading.add_done_callback(done)

    def done(found: asyncio.Future[S]) -> None:
        nonlocal reading, again
        reading = None
        if found.cancelled():
            return
        if again:
            again = False
            found.exception()  # seen, and not needed
            begin()
        else:
            act(found.result)

    loop.add_signal_handler(signal.SIGHUP, begin)
    try:
        yield
    finally:
        loop.remove_signal_handler(signal.SIGHUP)
        if reading is not None:
            reading.remove_done_callback(done)


def say(line: str) -> None:
    """One line for the user or a waiting script; standard output is theirs, the log goes elsewhere."""
    print(line, flush=True)


def raise_file_limit() -> None:
    """Take as many file descriptors as this user may have: each visitor and each backend connection is one."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        with suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def visitors_allowed(wanted: int) -> int:
    """As many visitors as are wanted, or as fit into the files that this process may open; then it warns, once.

    Whoever comes when there are no more files is disconnected without a word; whoever comes beyond this is told why.
    """
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    room = max(files - _OTHER_FILES, files // 2)
    if files == resource.RLIM_INFINITY or room >= wanted:
        return wanted
    _tell_few_files(files, wanted, room)
    return room


@functools.cache
def _tell_few_files(files: int, wanted: int, room: int) -> None:
    logger.warning(
        "{} visitors at a time instead of {}: this process may open {} files (`ulimit -Hn`, LimitNOFILE= of systemd)",
        room, wanted, files,
    )  # fmt: skip


# Exchanges leave no cycles (tests/e2e/test_cancellation.py): nothing of them waits for the collector, which looks at so
# many new objects whenever there are so many more than before, as when requests begin to wait by the thousand. 10,000
# objects are a pause of some milliseconds and 50,000 of fifteen; the older ones are looked at when 500,000 more of them
# have come, which no load of requests does by itself. docs/performance.md has the figures.
_THRESHOLDS: Final = (10_000, 50, 1000)


def calm_collector() -> None:
    """Keep the garbage collector off what start-up made, and its pauses short and rare."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(*_THRESHOLDS)
