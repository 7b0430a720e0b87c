"""What every long-running command does with its process: its engine, signals, and facts for whoever waits."""

import asyncio
import functools
import gc
import resource
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Final

from loguru import logger

from quictunnel.app.supervise import Parent
from quictunnel.options import CommandError
from quictunnel.quic.engine import Engine, select_engine

__all__ = ["calm_collector", "choose_engine", "hang_up", "raise_file_limit", "say", "stop_signals", "visitors_allowed"]

_OTHER_FILES: Final = 320
"that a server has open beside its visitors' sockets, the visitors too many among them that are told so"


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
def hang_up(act: Callable[[], None]) -> Iterator[None]:
    """Let SIGHUP do this."""
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGHUP, act)
    try:
        yield
    finally:
        loop.remove_signal_handler(signal.SIGHUP)


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


def calm_collector() -> None:
    """Keep the garbage collector off what start-up made, and from running at every burst of requests."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 100)
