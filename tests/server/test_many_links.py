"""One client with very many links: what they cost when nothing happens, and how soon it is known that they are dead."""

import asyncio
from typing import Any

import pytest

from quictunnel.server.registry import RegistryLimits
from tests.server.conftest import Play
from tests.support.ends import Backend, Ends

pytestmark = pytest.mark.either


def pings(agent: Any) -> int:
    """How many pings a client has sent on the links that it has."""
    return sum(link._ping_count for link in agent.links)


async def grown(ends: Ends, links: int, backend: Backend | None = None) -> Any:
    """A client that has so many links, because it was asked to."""
    agent = await ends.connected(backend, max_links=links)
    agent._grow(0, links)
    await ends.until(lambda: len(ends.session().links) == links)
    return agent


def test_probes_of_the_server_do_not_make_an_idle_link_a_busy_one(on_each: Play) -> None:
    async def scenario(ends: Ends) -> None:
        agent = await ends.connected()
        await asyncio.sleep(15.0)  # it is busy for a while after its beginning
        before, probed = pings(agent), agent.links[0].probed
        await asyncio.sleep(60.0)
        assert agent.links[0].probed - probed >= 10
        assert 40 <= pings(agent) - before <= 61

    on_each(scenario)


def test_links_of_a_busy_client_are_pinged_twice_a_second(on_each: Play) -> None:
    async def scenario(ends: Ends) -> None:
        agent = await ends.connected(Backend(None))
        ends.visit()
        await asyncio.sleep(5.0)
        before = pings(agent)
        await asyncio.sleep(60.0)
        assert 100 <= pings(agent) - before <= 121

    on_each(scenario)


def test_very_many_links_are_pinged_seldom_and_their_death_is_known_as_soon(
    on_each: Play, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("quictunnel.client.keeper.PINGED_ALONE", 4)

    async def scenario(ends: Ends) -> None:
        agent = await grown(ends, 12)
        await asyncio.sleep(15.0)
        before = pings(agent)
        await asyncio.sleep(20.0)
        assert pings(agent) - before < 12 * 20 * 0.8
        ends.network.tells = False
        keepers = list(agent._keepers.values())
        assert not any(keeper.suspect for keeper in keepers)
        ends.kill_server()
        killed = ends.loop.time()
        await ends.until(lambda: all(keeper.suspect for keeper in keepers), 10.0)
        assert ends.loop.time() - killed < 3.0

    on_each(scenario)


def test_one_dead_link_of_many_does_not_make_the_others_suspect(on_each: Play) -> None:
    async def scenario(ends: Ends) -> None:
        agent = await grown(ends, 12)
        await asyncio.sleep(15.0)
        dead = ends.session().links[7]
        ends.part(dead)
        keeper = next(each for each in agent._keepers.values() if each.slot.number == 7)
        before = pings(agent)
        assert await ends.until(lambda: keeper.suspect, 10.0) < 4.0
        assert [each.slot.number for each in agent._keepers.values() if each.suspect] == [7]
        assert pings(agent) - before < 12 * 8, "the others were asked once, not for as long as it is dead"

    on_each(scenario)


# Which of them requests are given to


@pytest.mark.parametrize("links", [4, 12])
def test_requests_of_one_moment_leave_in_one_packet_however_many_links_there_are(on_each: Play, links: int) -> None:
    async def scenario(ends: Ends) -> None:
        await grown(ends, links)
        await asyncio.sleep(1.0)
        there = list(ends.session().links.values())
        before = [link.sent for link in there]
        visits = [ends.visit() for _ in range(8)]
        await asyncio.sleep(0)
        assert sorted(link.sent - sent for link, sent in zip(there, before, strict=True)) == [0] * (links - 1) + [1]
        await ends.until(lambda: all(visit.status == 200 for visit in visits))

    on_each(scenario)


def test_link_takes_no_more_of_one_moment_than_leaves_together(on_each: Play) -> None:
    async def scenario(ends: Ends) -> None:
        ends.server.registry.limits = RegistryLimits()
        await grown(ends, 12, Backend(None))
        burst = ends.server.links.engine.burst
        visits = [ends.visit() for _ in range(5 * burst + 1)]
        there = ends.session().links.values()
        assert sorted(link.active for link in there) == [0] * 6 + [1] + [burst] * 5
        await asyncio.sleep(1.0)
        assert not any(visit.status for visit in visits)

    on_each(scenario)


def test_requests_of_many_moments_are_spread_over_all_links(on_each: Play) -> None:
    async def scenario(ends: Ends) -> None:
        await grown(ends, 12, Backend(None))
        for _ in range(24):
            ends.visit()
            await asyncio.sleep(0.001)
        assert [link.active for link in ends.session().links.values()] == [2] * 12

    on_each(scenario)


def test_request_of_the_same_moment_avoids_a_link_that_is_refused_meanwhile(on_each: Play) -> None:
    async def scenario(ends: Ends) -> None:
        await grown(ends, 4, Backend(None))
        ends.visit()
        (taken,) = (link for link in ends.session().links.values() if link.active)
        taken.refused = True
        ends.visit()
        assert taken.active == 1

    on_each(scenario)


def test_who_finds_no_stream_is_told_what_to_raise(on_each: Play) -> None:
    async def scenario(ends: Ends) -> None:
        ends.server.registry.limits = RegistryLimits(in_flight=102, slot_wait=1.0)
        await ends.connected(Backend(None), max_links=1)
        visits = [ends.visit() for _ in range(102)]
        beyond = ends.visit()
        assert (beyond.status, beyond.error) == (503, "connection_limit_reached")
        assert "102 requests in flight" in beyond.answer
        assert "--max-in-flight" in beyond.answer
        await ends.until(lambda: sum(visit.status == 503 for visit in visits) == 2)
        late = next(visit for visit in visits if visit.status == 503)
        assert late.error == "connection_limit_reached"
        assert "on the 1 link of" in late.answer
        assert "--max-links" in late.answer

    on_each(scenario)
