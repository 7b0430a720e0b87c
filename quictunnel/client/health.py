"""Whether the backend is well: asked for by the same leg that its exchanges take, so whatever the backend is."""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from loguru import logger

from quictunnel import __version__
from quictunnel.client.fan_out import Backend, HostRule
from quictunnel.exchange import Leg, join
from quictunnel.wire.errors import ErrorCode, TunnelError
from quictunnel.wire.frames import Data, End, Frame, RequestHead, ResponseHead

__all__ = ["HealthCheck", "HealthRules"]

ANSWER_LIMIT: Final = 256 * 1024
"bytes of an answer that are let come to its end, so that the connection can be kept; its head has said all"


@dataclass(frozen=True, slots=True)
class HealthRules:
    """What is asked for, how often, and how many answers make a change."""

    path: str
    interval: float = 5.0
    timeout: float = 2.0
    fall: int = 3
    rise: int = 2


class _Check(Leg):
    """One request, and what became of it: ``done`` has an empty text if the backend is well, else why not."""

    __slots__ = ("_size", "done", "ended")

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        super().__init__()
        self.done: asyncio.Future[str] = loop.create_future()
        self.ended: asyncio.Future[None] = loop.create_future()
        self._size = 0

    def receive(self, frame: Frame) -> None:
        if isinstance(frame, ResponseHead):
            if frame.status >= 200:
                self._say("" if frame.status < 400 else f"the answer is {frame.status}")
            elif frame.status == 101:
                self.cancel("the answer is 101")
        elif isinstance(frame, Data):
            self._size += len(frame.data)
            if self._size > ANSWER_LIMIT:
                self.cancel("")
        elif isinstance(frame, End):
            self._end("it ended before a head")

    def pause(self) -> None:
        pass

    def resume(self) -> None:
        pass

    def abort(self, error: TunnelError) -> None:
        self._end(error.details)

    def cancel(self, why: str) -> None:
        """It has taken long enough."""
        peer = self.peer
        self._end(why)
        peer.abort(TunnelError(ErrorCode.CANCELLED))

    def _end(self, why: str) -> None:
        self._say(why)
        self.detach()
        if not self.ended.done():
            self.ended.set_result(None)

    def _say(self, text: str) -> None:
        if not self.done.done():
            self.done.set_result(text)


class HealthCheck:
    """Asks the backend again and again, and tells what has changed."""

    def __init__(self, backend: Backend, rules: HealthRules, rule: HostRule | None = None) -> None:
        """``rule`` is what ``--host-header`` asks for; without one the backend is asked by its own name."""
        self._backend = backend
        self._rules = rules
        self._rule = rule

    async def run(self, on_change: Callable[[bool, str], None]) -> None:
        """Until it is cancelled. ``on_change`` is called with the first result, and when enough others agree."""
        rules = self._rules
        loop = asyncio.get_running_loop()
        well: bool | None = None
        against = 0
        while True:
            began = loop.time()
            try:
                why = await self.ask()
            except Exception as error:  # of an application's or a transport's making: it must not end the client
                logger.opt(exception=error).error("= the health check failed: {!r}", error)
                why = f"{type(error).__name__}: {error}"
            if well is None or bool(why) == well:
                against += 1
                if well is None or against >= (rules.fall if well else rules.rise):
                    first, well, against = well is None, not why, 0
                    self._log(why, first=first)
                    on_change(well, why)
            else:
                against = 0
            await asyncio.sleep(max(0.0, began + rules.interval - loop.time()))

    async def ask(self) -> str:
        """One check: why the backend is not well, empty if it is."""
        loop = asyncio.get_running_loop()
        check = _Check(loop)
        leg = self._backend.open()
        join(check, leg)
        try:
            leg.receive(self._head())
            check.peer.receive(End())
            await asyncio.wait((check.ended,), timeout=self._rules.timeout)
        finally:
            if not check.ended.done():
                check.cancel(f"no answer within {self._rules.timeout:g} s")
        why = check.done.result()
        return f"GET {self._rules.path}: {why}" if why else ""

    def _head(self) -> RequestHead:
        fields = [(b"user-agent", f"quictunnel/{__version__} (health check)".encode()), (b"accept", b"*/*")]
        head = RequestHead(b"GET", b"http", self._backend.authority.encode(), self._rules.path.encode(), fields)
        return head if self._rule is None else self._rule(head)

    def _log(self, why: str, *, first: bool) -> None:
        if why:
            logger.warning("= the backend {} is not well: {}", self._backend.name, why)
        elif first:
            logger.debug("= the backend {} is well", self._backend.name)
        else:
            logger.info("= the backend {} is well again", self._backend.name)
