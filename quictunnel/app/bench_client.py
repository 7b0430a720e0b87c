"""The bench's client as a process: a real one, which also tells of its links."""

import asyncio
import json
from typing import TYPE_CHECKING, Any, Final

from loguru import logger

from quictunnel import log
from quictunnel.app.connect import agent_config
from quictunnel.app.process import calm_collector, choose_engine, raise_file_limit, say, stop_signals
from quictunnel.client.agent import Agent, FinalRefusal
from quictunnel.client.choose import open_backend
from quictunnel.client.fan_out import FanOut
from quictunnel.failures import CommandError
from quictunnel.quic.stream import StreamLeg
from quictunnel.wire.credit import WindowBudget
from quictunnel.wire.errors import ErrorCode, TunnelError
from quictunnel.wire.frames import PROBE, RequestHead

if TYPE_CHECKING:
    from loguru import Message

    from quictunnel.app.bench_child import Converse, Facts

__all__ = ["client"]

GRACE: Final = 1.0
"seconds that exchanges may take to end; all that count have ended by then"

LOOK_EVERY: Final = 0.02
"seconds between two looks at the links"

_PING_EVERY: Final = 10
"looks: a link that carries something is asked for its round trip"


class _ShutFanOut(FanOut):
    """Accepts nothing until it is opened: a server then gives its requests to the tunnel's other clients."""

    open = False

    def open_exchange(self, head: RequestHead, leg: StreamLeg) -> RequestHead:
        if not self.open and head.scheme != PROBE.scheme:
            leg.abort(TunnelError(ErrorCode.NOT_ACCEPTED, "the bench has not begun"))
            return head
        return super().open_exchange(head, leg)


async def client(told: "Facts", converse: "Converse") -> int:
    """Serve a tunnel until told to stop; ``told`` has ``settings``, as those of ``connect``.

    It accepts nothing before the line ``open`` comes. Raises CommandError, TrustError, ValueError and OSError.
    """
    settings = told["settings"]
    raise_file_limit()
    engine = choose_engine(settings.engine)
    config = agent_config(settings)
    backend = await open_backend(settings.backend, head_time=settings.backend_head_time)
    fan_out = _ShutFanOut(backend)
    budget = WindowBudget(settings.window_budget)
    agent = Agent(config, engine, fan_out, budget=budget, on_welcome=lambda welcome: _tell(agent, welcome.urls))
    complaints = _Complaints()
    number = logger.add(complaints.take, level="WARNING", format="{message}")
    watch = _Watch(agent)
    loop = asyncio.get_running_loop()

    def answer(line: str) -> "Facts":
        match line:
            case "open":
                fan_out.open = True
            case "why":
                return {"why": complaints.last}
            case "ping":
                for link in agent.links:
                    link.ping()
        return watch.facts()

    running = loop.create_task(agent.run())
    tasks: list[asyncio.Task[Any]] = [loop.create_task(converse(answer)), loop.create_task(watch.run())]
    try:
        with stop_signals() as stopped:
            tasks.append(loop.create_task(stopped.wait()))
            calm_collector()
            await asyncio.wait((running, tasks[-1]), return_when=asyncio.FIRST_COMPLETED)
            if not running.done():
                await agent.stop(GRACE)
            await running
    except FinalRefusal as refusal:
        text = f"the server refuses: {refusal}" if refusal.code != "untrusted" else str(refusal)
        raise CommandError(text) from None
    finally:
        for task in (running, *tasks):
            task.cancel()
        await asyncio.gather(running, *tasks, return_exceptions=True)
        logger.remove(number)
        await backend.aclose(GRACE)
    return 0


def _tell(agent: Agent, urls: list[str]) -> None:
    authority = agent.authority
    facts = {
        "tunnel": agent.tunnel,
        "made_up": agent.name_is_made_up,
        "urls": urls,
        "authority": authority.decode("ascii") if authority else None,
    }
    say(json.dumps(facts))


class _Complaints:
    """Keeps the last warning: why a server cannot be reached."""

    def __init__(self) -> None:
        self.last = ""

    def take(self, message: "Message") -> None:
        self.last = log.escape(message.record["message"])


class _Watch:
    """Looks at a client's links every now and then."""

    def __init__(self, agent: Agent) -> None:
        self._agent = agent
        self.looks = self.on_credit = self.on_path = 0

    async def run(self) -> None:
        while True:
            await asyncio.sleep(LOOK_EVERY)
            unsent = stalls = 0
            due = self.looks % _PING_EVERY == 0
            for link in self._agent.links:
                unsent += link.unsent
                stalls += link.stalls
                if due and link.exchanges:
                    link.ping()
            self.looks += 1
            if unsent:
                self.on_path += 1
            elif stalls:
                self.on_credit += 1

    def facts(self) -> "Facts":
        """Counts until now, and the round trip, in seconds, of the link that has most to do."""
        links = self._agent.links
        busiest = max(links, key=lambda link: link.exchanges, default=None)
        return {
            "links": len(links),
            "round_trip": None if busiest is None else busiest.round_trip,
            "looks": self.looks,
            "on_credit": self.on_credit,
            "on_path": self.on_path,
        }
