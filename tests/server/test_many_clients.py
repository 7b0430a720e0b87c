"""Several clients of one tunnel that come, go and fail, in memory and under a turned clock: what visitors notice."""

import asyncio

import pytest

from quictunnel.client.agent import Agent
from quictunnel.server.registry import Session
from quictunnel.wire.control import PROBE_CAPABILITY, Health
from quictunnel.wire.errors import ErrorCode, TunnelError
from quictunnel.wire.frames import Data, ResponseHead
from tests.server.conftest import Play
from tests.support.ends import Backend, Ends, Request, Visit

pytestmark = pytest.mark.either


class Refusing(Backend):
    """A backend that fails each request with one error."""

    def __init__(self, code: ErrorCode) -> None:
        super().__init__(None)
        self.code = code

    def on_request(self, request: Request) -> None:
        self.open_requests.discard(request)
        peer = request.peer
        request.detach()
        peer.abort(TunnelError(self.code))


def session_of(ends: Ends, agent: Agent) -> Session:
    """A client's session as the server has it."""
    for session in ends.server.registry.sessions():
        if session.id == agent._session:
            return session
    raise AssertionError("it has none")


def addresses_of(ends: Ends, agent: Agent) -> set[tuple[str, int]]:
    return {link.address[:2] for link in session_of(ends, agent).links.values()}


def vanish(ends: Ends, agent: Agent, *, tells: bool) -> None:
    """A client is gone, and has told nobody; its host does if it ``tells``."""
    gone = addresses_of(ends, agent)
    ends.network.tells = tells
    for address in gone:
        ends.network.endpoints[address].close()
    task = ends._agents.pop(agent)
    task.cancel()


async def all_answered(ends: Ends, visits: list[Visit], seconds: float = 60.0) -> list[int]:
    await ends.until(lambda: all(visit.status for visit in visits), seconds)
    return [visit.status for visit in visits]


def body_of(request: Request) -> bytes:
    return b"".join(frame.data for frame in request.frames if isinstance(frame, Data))


# What is given again


@pytest.mark.parametrize(("tells", "seconds"), [(False, 6.0), (True, 4.5)], ids=["silent", "refused"])
def test_gets_in_flight_at_a_client_that_vanishes_are_answered_by_another(
    on_all: Play, tells: bool, seconds: float
) -> None:
    async def scenario(ends: Ends) -> None:
        lost, other = Backend(None), Backend(None)
        agent = await ends.connected(lost)
        visits = [ends.visit() for _ in range(10)]
        await ends.until(lambda: len(lost.requests) == 10)
        await ends.connected(other)
        vanish(ends, agent, tells=tells)
        other.answer_all()
        # As soon as the silence is suspect, which is long before the link's time-out; or soon after what the server
        # asks then, at the latest, is refused.
        assert await all_answered(ends, visits, seconds) == [200] * 10
        assert len(other.requests) == 10

    on_all(scenario)


def test_post_that_may_have_reached_a_backend_is_not_given_again(on_all: Play) -> None:
    async def scenario(ends: Ends) -> None:
        lost, other = Backend(None), Backend()
        agent = await ends.connected(lost)
        post = ends.visit("/", "Content-Length: 3", method="POST")
        post.send(b"abc")
        await ends.until(lambda: len(lost.requests) == 1)
        await ends.connected(other)
        vanish(ends, agent, tells=False)
        assert await all_answered(ends, [post], 60.0) == [502]
        assert post.error == "connection_terminated"
        assert not other.requests

    on_all(scenario)


def test_request_that_a_client_does_not_accept_goes_to_another_whatever_its_method(on_all: Play) -> None:
    async def scenario(ends: Ends) -> None:
        refusing, other = Refusing(ErrorCode.NOT_ACCEPTED), Backend()
        await ends.connected(refusing)
        await ends.connected(other)
        visits = []
        for _ in range(10):
            visit = ends.visit("/", "Content-Length: 5", method="POST")
            visit.send(b"hel")
            visit.send(b"lo")
            visits.append(visit)
        assert await all_answered(ends, visits) == [200] * 10
        assert [body_of(request) for request in other.requests] == [b"hello"] * 10
        assert refusing.requests

    on_all(scenario)


@pytest.mark.parametrize(
    ("code", "error"),
    [(ErrorCode.CONNECTION_REFUSED, "connection_refused"), (ErrorCode.TLS_CERTIFICATE_ERROR, "tls_certificate_error")],
)
def test_client_whose_backend_is_away_is_passed_over_and_after_three_times_put_aside(
    on_each: Play, code: ErrorCode, error: str
) -> None:
    async def scenario(ends: Ends) -> None:
        away, there = Refusing(code), Backend()
        agent = await ends.connected(away)
        alone = ends.visit("/", "Content-Length: 0", method="POST")
        assert await all_answered(ends, [alone]) == [502]
        assert alone.error == error, "the only one's error is told as it is"
        await ends.connected(there)
        for _ in range(40):
            assert (await ends.visited()).status == 200
        assert len(away.requests) in range(3, 6)
        assert session_of(ends, agent).aside_until > ends.loop.time()
        await asyncio.sleep(1.1)
        away.on_request = lambda request: request.answer()  # type: ignore[method-assign]
        before = len(away.requests)
        for _ in range(10):
            assert (await ends.visited()).status == 200
        assert len(away.requests) >= before + 4, "it takes its share again"
        assert session_of(ends, agent).failures == 0

    on_each(scenario)


def test_request_that_every_client_refuses_ends_with_that_error(on_each: Play) -> None:
    async def scenario(ends: Ends) -> None:
        backends = [Refusing(ErrorCode.CONNECTION_REFUSED) for _ in range(3)]
        for backend in backends:
            await ends.connected(backend)
        visit = await ends.visited()
        assert (visit.status, visit.error) == (502, "connection_refused")
        assert [len(backend.requests) for backend in backends] == [1, 1, 1]

    on_each(scenario)


def test_get_whose_backend_cuts_the_connection_is_asked_of_one_other_and_a_post_is_not(on_each: Play) -> None:
    async def scenario(ends: Ends) -> None:
        cutting, there = Refusing(ErrorCode.CONNECTION_TERMINATED), Backend()
        await ends.connected(cutting)
        await ends.connected(there)
        gets = [await ends.visited() for _ in range(6)]
        assert {visit.status for visit in gets} == {200}
        posts = []
        for _ in range(6):
            posts.append(ends.visit("/", "Content-Length: 0", method="POST"))
            await all_answered(ends, posts)
        assert sorted(visit.status for visit in posts) == [200] * 3 + [502] * 3
        assert len(there.requests) == 9

    on_each(scenario)


def test_answer_that_has_begun_is_never_begun_again(on_each: Play) -> None:
    async def scenario(ends: Ends) -> None:
        lost, other = Backend(None), Backend()
        agent = await ends.connected(lost)
        visit = ends.visit()
        await ends.until(lambda: lost.requests)
        lost.requests[0].peer.receive(ResponseHead(200, [(b"content-length", b"100")]))
        lost.requests[0].peer.receive(Data(b"half"))
        await ends.until(lambda: visit.answer.endswith("half"))
        await ends.connected(other)
        vanish(ends, agent, tells=False)
        await ends.until(lambda: visit.transport.closed, 60.0)
        assert visit.answer.endswith("half")
        assert not other.requests

    on_each(scenario)


def test_upload_that_is_too_large_to_be_kept_is_not_given_again(on_each: Play) -> None:
    async def scenario(ends: Ends) -> None:
        refusing, other = Refusing(ErrorCode.NOT_ACCEPTED), Backend()
        await ends.connected(refusing)
        visit = ends.visit("/", "Content-Length: 100000", method="POST")
        visit.send(b"x" * 99_999)
        await ends.until(lambda: refusing.requests)
        await ends.connected(other)
        visit.send(b"x")
        assert await all_answered(ends, [visit]) == [503]
        assert not other.requests

    on_each(scenario)


def test_bodies_are_kept_within_a_bound_and_given_back(on_each: Play) -> None:
    async def scenario(ends: Ends) -> None:
        memory = ends.server.entry._memory
        memory.limit = 100_000
        waiting, other = Backend(None), Backend()
        agent = await ends.connected(waiting)
        visits = []
        for _ in range(8):
            visits.append(ends.visit("/", "Content-Length: 20000", method="PUT"))
            visits[-1].send(b"x" * 20_000)
        await ends.until(lambda: len(waiting.requests) == 8)
        assert memory.used == 100_000
        visits[0].leave()
        visits[7].leave()
        await ends.until(lambda: memory.used == 80_000)
        await ends.connected(other)
        vanish(ends, agent, tells=False)
        # Five were whole; of those one has left. The others may have been answered, and nobody can ask them again.
        assert sorted(await all_answered(ends, visits[1:7], 60.0)) == [200] * 4 + [502] * 2
        assert [len(body_of(request)) for request in other.requests] == [20_000] * 4
        assert memory.used == 0

    on_each(scenario)


# Waiting for a client


def test_requests_wait_for_the_only_client_to_come_back(on_all: Play) -> None:
    async def scenario(ends: Ends) -> None:
        first = await ends.connected(Backend())
        await first.stop(1.0)
        await ends.ended(first)
        visits = [ends.visit() for _ in range(5)]
        visits += [ends.visit("/", "Content-Length: 0", method="POST") for _ in range(5)]
        await asyncio.sleep(1.0)
        assert not any(visit.status for visit in visits)
        second = Backend()
        await ends.connected(second)
        assert await all_answered(ends, visits, 1.0) == [200] * 10
        assert len(second.requests) == 10

    on_all(scenario)


def test_get_in_flight_at_the_only_client_waits_for_the_next_and_keeps_its_error(on_each: Play) -> None:
    async def scenario(ends: Ends) -> None:
        agent = await ends.connected(Backend(None))
        visit = ends.visit()
        await ends.until(lambda: session_of(ends, agent).in_flight == 1)
        for link in list(session_of(ends, agent).links.values()):
            link.close(ErrorCode.INTERNAL_ERROR, "cut by the test")
        agent._fan_out.backend.answer_all()  # type: ignore[attr-defined]
        assert await all_answered(ends, [visit], 2.0) == [200]

    on_each(scenario)


# Health


def test_session_that_says_it_is_not_well_takes_nothing_until_it_is(on_each: Play) -> None:
    async def scenario(ends: Ends) -> None:
        backends = [Backend(), Backend()]
        agents = [await ends.connected(backend) for backend in backends]

        def say(agent: Agent, healthy: bool) -> None:
            for link in agent.links:
                link.send_control(Health(healthy, "" if healthy else "500 on /healthz"))

        say(agents[0], False)
        await ends.until(lambda: not session_of(ends, agents[0]).healthy)
        for _ in range(10):
            assert (await ends.visited()).status == 200
        assert [len(backend.requests) for backend in backends] == [0, 10]
        say(agents[1], False)
        await ends.until(lambda: not session_of(ends, agents[1]).healthy)
        visit = await ends.visited()
        assert (visit.status, visit.error) == (503, "destination_unavailable")
        assert "500 on /healthz" in visit.answer
        say(agents[0], True)
        await ends.until(lambda: session_of(ends, agents[0]).healthy)
        assert (await ends.visited()).status == 200
        assert len(backends[0].requests) == 1

    on_each(scenario)


def test_link_that_is_heard_but_serves_nobody_is_dropped_within_ten_seconds(on_each: Play) -> None:
    async def scenario(ends: Ends) -> None:
        dead, there = Backend(None), Backend()
        agent = await ends.connected(dead)
        agent._fan_out.open_exchange = lambda head, leg: head  # type: ignore[method-assign]
        session = session_of(ends, agent)
        session.capabilities |= {PROBE_CAPABILITY}
        link = session.links[0]
        visit = ends.visit()
        await asyncio.sleep(0.1)
        await ends.connected(there)
        assert await ends.until(lambda: link.closed, 12.0) < 10
        assert "probe" in str(link.closed)
        assert await all_answered(ends, [visit], 2.0) == [200], "and what it held is given to another"

    on_each(scenario)


# Whose visitor it is


def test_cookie_keeps_a_visitor_at_its_client_as_long_as_it_is_there(on_each: Play) -> None:
    async def scenario(ends: Ends) -> None:
        backends = [Backend(), Backend(), Backend()]
        agents = [await ends.connected(backend) for backend in backends]
        ends.server.registry.tunnels["app"].sticky = "cookie"
        first = await ends.visited()
        line = next(line for line in first.answer.split("\r\n") if line.lower().startswith("set-cookie:"))
        assert line.endswith("; Path=/; HttpOnly; SameSite=Lax")
        cookie = line.partition(":")[2].strip().partition(";")[0]
        mine = next(backend for backend in backends if backend.requests)
        for _ in range(8):
            again = await ends.visited("/", f"Cookie: a=b; {cookie}; c=d")
            assert "set-cookie" not in again.answer.lower()
        assert len(mine.requests) == 9
        agent = agents[backends.index(mine)]
        await agent.stop(1.0)
        await ends.ended(agent)
        moved = await ends.visited("/", f"Cookie: {cookie}")
        assert (moved.status, "set-cookie" in moved.answer.lower()) == (200, True)
        assert cookie not in moved.answer

    on_each(scenario)


def test_address_keeps_a_visitor_at_its_client(on_each: Play) -> None:
    async def scenario(ends: Ends) -> None:
        backends = [Backend(), Backend(), Backend()]
        for backend in backends:
            await ends.connected(backend)
        ends.server.registry.tunnels["app"].sticky = "ip"
        for _ in range(9):
            await ends.visited()
        assert sorted(len(backend.requests) for backend in backends) == [0, 0, 9]

    on_each(scenario)


def test_weights_share_what_is_in_flight(on_each: Play) -> None:
    async def scenario(ends: Ends) -> None:
        backends = [Backend(None), Backend(None)]
        agents = [await ends.connected(backend) for backend in backends]
        session_of(ends, agents[1]).weight = 3
        visits = [ends.visit() for _ in range(40)]
        await ends.until(lambda: sum(len(backend.requests) for backend in backends) == 40)
        assert [len(backend.requests) for backend in backends] == pytest.approx([10, 30], abs=1)
        for backend in backends:
            backend.answer_all()
        assert await all_answered(ends, visits) == [200] * 40

    on_each(scenario)
