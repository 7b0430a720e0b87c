"""A process that does not run for a while, as its machine sleeps, is busy or stops it: nothing open is lost by it."""

import asyncio

import pytest

from quictunnel.server.probes import PROBE_EVERY
from tests.server.conftest import Play
from tests.support.ends import Backend, Ends, Visit

pytestmark = pytest.mark.either


async def waiting(ends: Ends, backend: Backend, count: int, method: str) -> list[Visit]:
    """Visitors whose requests wait at the backend."""
    visits = [ends.visit(f"/{number}", "Content-Length: 0", method=method) for number in range(count)]
    await ends.until(lambda: len(backend.requests) == count)
    await asyncio.sleep(3.0)
    return visits


async def answered(ends: Ends, backend: Backend, visits: list[Visit]) -> None:
    """Have all answered, and find that each request came once."""
    assert len(backend.requests) == len(visits), "none was sent twice"
    assert len(backend.open_requests) == len(visits), "none was given up"
    backend.answer_all()
    await ends.until(lambda: all(visit.status for visit in visits), 5)
    assert {visit.status for visit in visits} == {200}


def test_server_that_reads_late_all_that_came_loses_no_exchange(on_all: Play) -> None:
    async def scenario(ends: Ends) -> None:
        backend = Backend(None)
        agent = await ends.connected(backend)
        # What may not be asked twice: this server's own clock goes on, and it could have given others to other links.
        visits = await waiting(ends, backend, 20, "POST")
        links = agent.links
        ends.network.hold(ends.quic_address)
        await asyncio.sleep(20.0)
        await ends.network.release(ends.quic_address)
        await asyncio.sleep(15.0)
        assert {link for link in links if link.closed is None} == set(links)
        assert all(link.silent_for() < 2.0 for link in links)
        await answered(ends, backend, visits)

    on_all(scenario)


def test_server_that_reads_late_again_and_again_loses_no_exchange(on_all: Play) -> None:
    async def scenario(ends: Ends) -> None:
        backend = Backend(None)
        await ends.connected(backend)
        visits = await waiting(ends, backend, 10, "POST")
        for _ in range(5):
            ends.network.hold(ends.quic_address)
            await asyncio.sleep(4.0)
            await ends.network.release(ends.quic_address)
            await asyncio.sleep(7.0)
        await answered(ends, backend, visits)

    on_all(scenario)


def test_machine_that_sleeps_concludes_nothing_from_it(on_each: Play, log_lines: list[str]) -> None:
    async def scenario(ends: Ends) -> None:
        backend = Backend(None)
        agent = await ends.connected(backend, max_links=3)
        agent._grow(0, 3)
        await ends.until(lambda: len(ends.session().links) == 3)
        visits = await waiting(ends, backend, 10, "GET")
        links, dials = agent.links, len(ends.network.dials)
        for _ in range(4):
            await asyncio.sleep(1.3)
            ends.loop.now += 20.0
        await asyncio.sleep(10.0)
        assert set(agent.links) <= set(links), "but for one that is not needed, none has ended"
        assert len(ends.network.dials) == dials, "no other socket was opened"
        await answered(ends, backend, visits)

    on_each(scenario)
    assert not [line for line in log_lines if "suspect" in line]


def test_probe_that_was_under_way_when_the_server_was_held_up_ends_no_link(on_each: Play) -> None:
    async def scenario(ends: Ends) -> None:
        backend = Backend(None)
        agent = await ends.connected(backend)
        visits = await waiting(ends, backend, 10, "GET")
        (link,) = agent.links
        prober = ends.server.prober
        await ends.until(lambda: prober._asked, 2 * PROBE_EVERY)
        # Its answer is behind much else, of which the first is read at once.
        ends.network.delay = 2.0
        ends.loop.now += 20.0
        ends.server.links.links[0].heard_at = ends.loop.time()
        await asyncio.sleep(1.0)
        ends.network.delay = 0.005
        await asyncio.sleep(10.0)
        assert link.closed is None
        await answered(ends, backend, visits)

    on_each(scenario)


# What a client does with a server that says nothing


def test_link_goes_over_one_other_socket_while_the_server_is_not_heard_at_all(on_each: Play) -> None:
    async def scenario(ends: Ends) -> None:
        backend = Backend(None)
        agent = await ends.connected(backend)
        visits = await waiting(ends, backend, 1, "POST")
        (link,) = agent.links
        way = agent._keepers[link].way
        first = way._socket
        ends.network.hold(ends.quic_address)
        await asyncio.sleep(20.0)
        assert way.sockets == 2
        assert first is not None
        assert not first.closed
        await ends.network.release(ends.quic_address)
        await ends.until(lambda: way.sockets == 1, 10)
        assert first.closed
        await answered(ends, backend, visits)

    on_each(scenario)


def test_link_that_alone_is_not_heard_goes_over_a_second_socket(on_each: Play) -> None:
    async def scenario(ends: Ends) -> None:
        backend = Backend(None)
        agent = await ends.connected(backend)
        visits = await waiting(ends, backend, 10, "POST")
        (link,) = agent.links
        way = agent._keepers[link].way
        lost = ends.client_addresses()
        # The way from its first socket is dead for good, and that from its second: it began when nothing went through.
        ends.network.lose = lambda source, destination: True
        await ends.until(lambda: way.sockets == 2, 4)
        lost |= ends.client_addresses()
        ends.network.lose = lambda source, destination: bool(lost & {source, destination})
        await ends.until(lambda: way.sockets == 3, 10)
        await ends.until(lambda: link.silent_for() < 0.5, 1)
        await answered(ends, backend, visits)

    on_each(scenario)
