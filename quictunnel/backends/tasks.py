"""The tasks of a backend that must await: each has this owner, and none outlives it."""

import asyncio
from collections.abc import Coroutine
from typing import Any, Final

__all__ = ["Tasks"]

# Seconds that a cancelled task may take to clean up; what still runs then is left to the event loop's own end.
_CLEAN_UP_TIME: Final = 5.0


class Tasks:
    """A set of running tasks."""

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[None]] = set()
        self.closing = False
        "no new task is taken any more"

    def __len__(self) -> int:
        return len(self._tasks)

    def start(self, coroutine: Coroutine[Any, Any, None], name: str) -> "asyncio.Task[None]":
        """Run a coroutine that raises nothing but CancelledError."""
        task = asyncio.get_running_loop().create_task(coroutine, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def aclose(self, grace: float) -> None:
        """Take no new task; let the running ones end within ``grace`` seconds, then cancel them."""
        self.closing = True
        if self._tasks and grace > 0:
            await asyncio.wait(self._tasks, timeout=grace)
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=_CLEAN_UP_TIME)
