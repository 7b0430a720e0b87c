"""Commands that stay running: from their settings to their exit status, with a log and an event loop."""

import asyncio
import os
import sys
from collections.abc import Callable, Coroutine
from typing import TYPE_CHECKING, Any, Final, TypeVar

from quictunnel import log
from quictunnel.app.loop import loop_factory
from quictunnel.failures import CommandError, UsageError, reason
from quictunnel.trust.files import TrustError

if TYPE_CHECKING:
    from quictunnel.settings import ConnectSettings, LogSettings, ServeSettings

__all__ = ["INTERRUPTED", "guarded", "load", "run", "run_connect", "run_logged", "run_serve"]

L = TypeVar("L", bound="LogSettings")

INTERRUPTED: Final = 130
"128 + SIGINT, as shells have it"


def guarded(work: Callable[[], int]) -> int:
    """Do a command's work; the exit status. What its user is to blame for, or the system, is told in one line."""
    try:
        status = _guarded(work)
        sys.stdout.flush()
    except BrokenPipeError:
        # Who read our output has seen enough; the interpreter's own flush at exit must not fail again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    return status


def _guarded(work: Callable[[], int]) -> int:
    try:
        return work()
    except UsageError as error:
        return _failed(str(error), 2)
    except (CommandError, TrustError) as error:
        return _failed(str(error), 1)
    except BrokenPipeError:
        raise
    except OSError as error:
        return _failed(reason(error), 1)
    except KeyboardInterrupt:
        return INTERRUPTED
    except SystemExit as way_out:  # argparse's, after --help and --version
        return way_out.code if isinstance(way_out.code, int) else 0


def _failed(text: str, status: int) -> int:
    print(f"quictunnel: {log.escape(text)}", file=sys.stderr)
    return status


def load(command: str) -> None:
    """Load what ``serve`` or ``connect`` runs on, ahead of its settings."""
    loop_factory()
    if command == "serve":
        import quictunnel.app.serve
    else:
        import quictunnel.app.connect  # noqa: F401


def run_serve(settings: "ServeSettings", again: "Callable[[], ServeSettings]") -> int:
    """``quictunnel serve``; ``again`` reads its settings anew and raises UsageError. Raises what ``guarded`` tells."""
    if settings.workers > 1:
        from quictunnel.app.workers import serve_workers

        return _fork_logged(lambda settings, run: serve_workers(settings, again, run), settings)
    from quictunnel.app.serve import serve

    return run_logged(lambda settings: serve(settings, again), settings)


def run_connect(settings: "ConnectSettings", again: "Callable[[], ConnectSettings]") -> int:
    """``quictunnel connect``, in the same way."""
    if settings.processes.highest > 1:
        from quictunnel.app.pool import connect_processes

        return _fork_logged(lambda settings, run: connect_processes(settings, again, run), settings)
    from quictunnel.app.connect import connect

    return run_logged(lambda settings: connect(settings, again), settings)


def run_logged(start: Callable[[L], Coroutine[Any, Any, int]], settings: L) -> int:
    """Run a coroutine function with the log that its settings ask for."""
    take_down = log.set_up(settings.log_level, settings.log_format, settings.log_file)
    try:
        return run(start(settings))
    finally:
        take_down()


def _fork_logged(start: Callable[[L, Callable[[Coroutine[Any, Any, int]], int]], int], settings: L) -> int:
    """Start what forks: it runs no event loop itself, and is told how its children do."""
    take_down = log.set_up(settings.log_level, settings.log_format, settings.log_file, shared=True)
    try:
        loop_factory()  # loaded once, for all
        return start(settings, run)
    finally:
        take_down()


def run(work: Coroutine[Any, Any, int]) -> int:
    """Run a coroutine in an event loop of its own."""
    with asyncio.Runner(loop_factory=loop_factory()) as runner:
        return runner.run(work)
