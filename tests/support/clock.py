"""An event loop whose clock the test turns: waiting costs nothing, half a minute of silence takes milliseconds."""

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


class ClockLoop(asyncio.SelectorEventLoop):
    """Jumps to the next timer when nothing is ready."""

    def __init__(self) -> None:
        self.now = 1000.0
        super().__init__()
        select = self._selector.select  # type: ignore[attr-defined]

        def jump(timeout: float | None = None) -> Any:
            events = select(0)
            if not events and timeout:
                self.now += timeout
            if timeout is None and not events:
                raise RuntimeError("nothing is under way and nothing will happen: the test would wait for ever")
            return events

        self._selector.select = jump  # type: ignore[attr-defined]

    def time(self) -> float:
        return self.now


def run(work: Coroutine[Any, Any, T]) -> T:
    """Run to its end under a turned clock."""
    with asyncio.Runner(loop_factory=ClockLoop) as runner:
        return runner.run(work)
