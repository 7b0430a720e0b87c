"""A link's slots at a distance: the peer learns later than we do that a stream is over, and must never be overrun."""

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from quictunnel.quic.link import SLOTS, Link
from quictunnel.wire.errors import ErrorCode, TunnelError
from quictunnel.wire.frames import Data, End, RequestHead, ResponseHead
from tests.support.clock import run
from tests.support.memory import Network, Recorder, opened

pytestmark = pytest.mark.either

GET = RequestHead(b"GET", b"http", b"app.localhost", b"/", [])
OK = ResponseHead(200, [])

Play = Callable[[Callable[[Network, Link], Coroutine[Any, Any, None]]], None]


@pytest.fixture
def play(engines: tuple[str, str]) -> Play:
    """Runs a scenario on a link with a round trip of 100 ms."""

    def play(scenario: Callable[[Network, Link], Coroutine[Any, Any, None]]) -> None:
        async def work() -> None:
            network = Network(*engines, delay=0.05)
            try:
                await scenario(network, (await network.joined())[1])
            finally:
                await network.close()

        run(work())

    return play


def at_once(leg: Any, head: RequestHead, backend: Any) -> None:
    """A backend that answers without waiting for anything."""
    for frame in (OK, Data(b"x"), End()):
        leg.receive(frame)


async def _answered(network: Network, server: Link) -> None:
    network.client_owner.on_request = at_once
    await network.until(server.has_slot, 5)
    _, visitor = opened(network, server, GET, End())
    await network.until(lambda: visitor.ended, 5)


@pytest.mark.parametrize("after", [0.0, 0.001, 0.06, 0.11])
def test_visitors_who_leave_in_a_rush_do_not_break_the_link(play: Play, after: float) -> None:
    async def scenario(network: Network, server: Link) -> None:
        count = 0
        end = network.loop.time() + 1
        while network.loop.time() < end:
            legs = []
            while server.has_slot() and len(legs) < 50:
                legs.append(opened(network, server, GET, End())[0])
            count += len(legs)
            await asyncio.sleep(after)
            for leg in legs:
                leg.abort(TunnelError(ErrorCode.CANCELLED))
            await asyncio.sleep(0.001)
        assert count > SLOTS
        await asyncio.sleep(1)
        assert server.closed is None
        assert (server.active, server.exchanges) == (0, 0)
        await _answered(network, server)

    play(scenario)


def test_streams_come_free_within_a_few_round_trips(play: Play) -> None:
    async def scenario(network: Network, server: Link) -> None:
        network.client_owner.on_request = at_once
        visitors: list[Recorder] = []
        began = network.loop.time()
        while len(visitors) < 10 * SLOTS:
            await network.until(server.has_slot, 1)
            visitors.append(opened(network, server, GET, End())[1])
        await network.until(lambda: all(visitor.ended for visitor in visitors), 2)
        assert network.loop.time() - began < 10 * 0.35
        assert server.closed is None

    play(scenario)


def test_owner_hears_when_the_peer_allows_more(play: Play) -> None:
    async def scenario(network: Network, server: Link) -> None:
        network.client_owner.on_request = at_once
        waiting = 10 * SLOTS
        visitors: list[Recorder] = []

        def serve() -> None:
            nonlocal waiting
            while waiting and server.has_slot():
                waiting -= 1
                visitors.append(opened(network, server, GET, End())[1])

        owner = network.server_owner
        owner.link_slot_free = lambda link, leg: serve()  # type: ignore[method-assign]
        owner.link_slots_allowed = lambda link: serve()  # type: ignore[method-assign]
        serve()
        await network.until(lambda: not waiting, 4)
        await network.until(lambda: all(visitor.ended for visitor in visitors), 2)

    play(scenario)
