"""The program's first steps.

``serve`` and ``connect`` run for months, and what reads their options takes 14 MB of memory: a third of a small
process, for what was done before its first second was over. So another process reads them. It is forked at once, has
the command line to itself (the help, every complaint, the exit status), hands back plain values and is gone. This one
loads meanwhile what it is going to run.
"""

import os
import pickle
import sys
from collections.abc import Sequence
from typing import Any, Final, NoReturn

__all__ = ["main"]

_STAYING: Final = ("serve", "connect")
_HELP: Final = frozenset({"-h", "--help"})


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line (by default the process's own) and return the exit status."""
    words = sys.argv[1:] if argv is None else list(argv)
    if words[:1] and words[0] in _STAYING and not _HELP.intersection(words) and hasattr(os, "fork"):
        return _stay(words[0], words)
    if words == ["--version"]:
        from quictunnel.versions import versions

        try:
            print(versions(), flush=True)
        except BrokenPipeError:
            # The interpreter's own flush at exit must not fail again.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 1
        return 0
    from quictunnel.cli import main

    return main(words)


def _stay(command: str, words: list[str]) -> int:
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        _read_and_leave(words, writing)
    os.close(writing)
    from quictunnel.app.running import guarded, load, run_connect, run_serve

    def start() -> int:
        load(command)
        with open(reading, "rb") as pipe:
            data = pipe.read()
        _, status = os.waitpid(child, 0)
        if not data:
            return os.waitstatus_to_exitcode(status)
        return (run_serve if command == "serve" else run_connect)(pickle.loads(data), again)

    def again() -> Any:
        from quictunnel.cli import read

        return read(words)

    return guarded(start)


def _read_and_leave(words: list[str], pipe: int) -> NoReturn:
    """Read the options into a pipe, in a process that does nothing else."""
    status = 1
    try:
        from quictunnel.app.running import guarded
        from quictunnel.cli import read

        def hand_over() -> int:
            with open(pipe, "wb") as file:
                pickle.dump(read(words), file)
            return 0

        status = guarded(hand_over)
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        sys.stderr.flush()
        os._exit(status)  # what the other process would still do at its end is not this one's
