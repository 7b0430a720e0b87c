"""Links on an event loop whose clock counts milliseconds, as uvloop's does."""

import asyncio
import math
from typing import Any

import pytest

from quictunnel.wire.frames import Data, End, RequestHead, ResponseHead
from tests.support.clock import ClockLoop
from tests.support.memory import Network, opened

pytestmark = pytest.mark.either

GET = RequestHead(b"GET", b"http", b"app.localhost", b"/", [])
SIZE = 400_000


class CoarseLoop(ClockLoop):
    """What is due in less than half a millisecond is due now, and the clock says that it is not."""

    def time(self) -> float:
        return math.floor(self.now * 1000) / 1000

    def call_at(self, when: float, *args: Any, **options: Any) -> asyncio.TimerHandle:
        return super().call_at(round(when, 3), *args, **options)


@pytest.mark.parametrize("delay", [0.0, 0.0103])
def test_timer_that_fires_too_early_is_not_set_again_and_again(delay: float, engines: tuple[str, str]) -> None:
    async def work() -> None:
        network = Network(*engines, delay=delay)
        client, server = await network.joined()
        fired = 0
        for link in (client, server):
            handle_timer = link._connection.handle_timer

            def count(now: float, handle_timer: Any = handle_timer) -> None:
                nonlocal fired
                fired += 1
                assert fired < SIZE // 100, "the time stands still"
                handle_timer(now=now)

            link._connection.handle_timer = count  # type: ignore[method-assign]
        _, visitor = opened(network, server, GET, End())
        await network.until(lambda: bool(network.client_owner.legs))
        backend = network.client_owner.legs[0].peer
        for frame in (ResponseHead(200, []), Data(bytes(SIZE)), End()):
            backend.receive(frame)
        await network.until(lambda: visitor.ended)
        assert len(visitor.body) == SIZE
        await network.close()

    with asyncio.Runner(loop_factory=CoarseLoop) as runner:
        runner.run(work())
