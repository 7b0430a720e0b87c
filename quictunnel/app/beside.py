"""Work done by a process of its own, for the sake of what is not loaded into this one."""

import os
import pickle
import signal
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import NoReturn, TypeVar

__all__ = ["beside"]

T = TypeVar("T")


def beside(work: Callable[[], T]) -> Callable[[], T]:
    """Begin ``work`` in a forked process. What is returned waits for its end, and returns or raises what it did.

    To be called before this process has threads, and its result asked for once.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        _work_and_leave(work, writing)
    os.close(writing)

    def finish() -> T:
        with open(reading, "rb") as pipe:
            data = pipe.read()
        _, status = os.waitpid(child, 0)
        if not data:
            raise OSError(f"a process that this one needed ended with status {os.waitstatus_to_exitcode(status)}")
        done, outcome = pickle.loads(data)
        if not done:
            raise outcome
        result: T = outcome
        return result

    return finish


def _work_and_leave(work: Callable[[], T], pipe: int) -> NoReturn:
    status = 1
    try:
        with suppress(ValueError):  # what the event loop of the other process is woken by
            signal.set_wakeup_fd(-1)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_DFL)
        try:
            outcome: tuple[bool, object] = True, work()
        except Exception as error:
            outcome = False, error
        with open(pipe, "wb") as file:
            pickle.dump(outcome, file)
        status = 0
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        with suppress(Exception):
            sys.stderr.flush()
        os._exit(status)  # what the other process would still do at its end is not this one's
