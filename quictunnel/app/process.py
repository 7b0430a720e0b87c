"""What every long-running command does with its process: signals, and facts for whoever waits."""

import asyncio
import gc
import signal
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["calm_collector", "say", "stop_signals"]


@contextmanager
def stop_signals() -> Iterator[asyncio.Event]:
    """An event that SIGTERM or SIGINT sets; the second of them ends the process as it would have without us."""
    loop = asyncio.get_running_loop()
    event = asyncio.Event()
    numbers = (signal.SIGTERM, signal.SIGINT)

    def stop() -> None:
        event.set()
        for number in numbers:
            loop.remove_signal_handler(number)

    for number in numbers:
        loop.add_signal_handler(number, stop)
    try:
        yield event
    finally:
        for number in numbers:
            loop.remove_signal_handler(number)


def say(line: str) -> None:
    """One line for the user or a waiting script; standard output is theirs, the log goes elsewhere."""
    print(line, flush=True)


def calm_collector() -> None:
    """Keep the garbage collector off what start-up made, and from running at every burst of requests."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 100)
