"""A whole server and whole clients in memory, on each engine and on both mixes of them, under a turned clock."""

import asyncio
import errno
import hashlib
import itertools
import socket
import ssl
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from quictunnel.client.agent import FinalRefusal
from quictunnel.quic.link import SLOTS
from quictunnel.server.registry import RegistryLimits
from quictunnel.trust.certificates import ensure_server_certificate
from tests.support.ends import Backend, Ends, play
from tests.support.memory import identity

pytestmark = pytest.mark.either

Scenario = Callable[[Ends], Awaitable[None]]
Play = Callable[..., None]


@pytest.fixture
def on_all(engines: tuple[str, str], tmp_path: Path) -> Play:
    """Runs a scenario on each pair of engines."""
    return lambda scenario, **options: play(scenario, engines, tmp_path, **options)


@pytest.fixture
def on_each(engine: str, tmp_path: Path) -> Play:
    """Runs a scenario on each engine."""
    return lambda scenario, **options: play(scenario, (engine, engine), tmp_path, **options)


# Registration


def test_request_reaches_the_backend_and_its_answer_the_visitor(on_all: Play) -> None:
    async def scenario(ends: Ends) -> None:
        backend = Backend()
        await ends.connected(backend)
        visit = await ends.visited("/a?b=%20")
        assert visit.status == 200
        assert visit.answer.endswith("ok")
        assert (backend.requests[0].head.target, backend.requests[0].head.authority) == (b"/a?b=%20", b"app.localhost")
        session = ends.session()
        assert (session.in_flight, session.tunnel.in_flight, len(session.links)) == (0, 0, 1)

    on_all(scenario)


def test_pin_of_the_authority_is_enough_to_trust_a_server(on_all: Play) -> None:
    async def scenario(ends: Ends) -> None:
        await ends.connected(
            authority=None, pin=hashlib.sha256(ssl.PEM_cert_to_DER_cert(identity()[1].decode())).digest()
        )
        assert (await ends.visited()).status == 200

    on_all(scenario)


def test_server_gives_a_name_to_a_client_that_asks_for_none(on_each: Play) -> None:
    async def scenario(ends: Ends) -> None:
        agent = await ends.connected(tunnel="")
        assert agent.tunnel
        assert (await ends.visited(host=f"{agent.tunnel}.localhost")).status == 200

    on_each(scenario)


def test_requests_of_a_name_nobody_serves_are_told_so(on_each: Play) -> None:
    async def scenario(ends: Ends) -> None:
        agent = await ends.connected()
        unknown = await ends.visited(host="other.localhost")
        assert (unknown.status, unknown.error) == (404, "destination_not_found")
        await agent.stop(1.0)
        await ends.ended(agent)
        await ends.until(lambda: not ends.server.registry.sessions())
        gone = await ends.visited()
        assert (gone.status, gone.error) == (503, "destination_unavailable")
        assert "retry-after:" in gone.answer.lower()

    on_each(scenario)


def test_two_clients_share_a_tunnel_by_requests_in_flight(on_all: Play) -> None:
    async def scenario(ends: Ends) -> None:
        backends = [Backend(None), Backend(None)]
        for backend in backends:
            await ends.connected(backend)
        visits = [ends.visit() for _ in range(20)]
        await ends.until(lambda: sum(len(backend.requests) for backend in backends) == 20)
        assert [len(backend.requests) for backend in backends] == [10, 10]
        for request in list(backends[0].open_requests):
            request.answer()
        await ends.until(lambda: sum(visit.status == 200 for visit in visits) == 10)
        visits += [ends.visit() for _ in range(10)]
        await ends.until(lambda: len(backends[0].requests) == 20)
        for backend in backends:
            backend.answer_all()
        await ends.until(lambda: all(visit.status == 200 for visit in visits))

    on_all(scenario)


# Refusals


@pytest.mark.parametrize("what", ["unknown", "expired", "revoked", "scope"])
def test_token_that_is_no_good_is_refused_for_ever_and_says_why(on_each: Play, what: str) -> None:
    async def scenario(ends: Ends) -> None:
        long_ago = datetime.now(UTC) - timedelta(days=9)
        pattern = "other" if what == "scope" else "*"
        token = ends.tokens.create([pattern], timedelta(days=1) if what == "expired" else None, long_ago)
        if what == "revoked":
            ends.tokens.revoke(token.id, long_ago)
        secret = "qtk_nobody_" + "x" * 43 if what == "unknown" else token.secret
        agent = ends.connect(token=secret)
        with pytest.raises(FinalRefusal) as refusal:
            await ends.ended(agent)
        assert refusal.value.code == f"token_{what}"
        assert not ends.server.registry.tunnels
        # A refused client has a moment to read why, then its link is closed.
        await ends.until(lambda: not ends.server.links.links, 30)

    on_each(scenario)


def test_name_of_another_token_is_refused(on_each: Play) -> None:
    async def scenario(ends: Ends) -> None:
        await ends.connected()
        other = ends.tokens.create(["app"], None, datetime.now(UTC))
        with pytest.raises(FinalRefusal) as refusal:
            await ends.ended(ends.connect(token=other.secret))
        assert refusal.value.code == "name_taken"
        assert (await ends.visited()).status == 200

    on_each(scenario)


def test_name_is_free_again_when_its_token_is_revoked(on_each: Play) -> None:
    async def scenario(ends: Ends) -> None:
        agent = await ends.connected()
        ends.tokens.revoke(ends.token.id, datetime.now(UTC))
        with pytest.raises(FinalRefusal):
            await ends.ended(agent)
        other = ends.tokens.create(["app"], None, datetime.now(UTC))
        await ends.connected(token=other.secret)
        assert (await ends.visited()).status == 200

    on_each(scenario)


def test_revoked_token_ends_its_session_within_five_seconds(on_all: Play) -> None:
    async def scenario(ends: Ends) -> None:
        agent = await ends.connected()
        ends.tokens.revoke(ends.token.id, datetime.now(UTC))
        began = ends.loop.time()
        with pytest.raises(FinalRefusal) as refusal:
            await ends.ended(agent)
        assert refusal.value.code == "token_revoked"
        assert ends.loop.time() - began < 5
        assert (await ends.visited()).status == 503

    on_all(scenario)


@pytest.mark.parametrize("how", ["authority", "pin", "name"])
def test_server_that_is_not_the_trusted_one_gets_no_token(on_each: Play, how: str, tmp_path: Path) -> None:
    async def scenario(ends: Ends) -> None:
        if how == "name":
            agent = ends.connect(server_name="elsewhere.example")
        elif how == "pin":
            agent = ends.connect(authority=None, pin=b"\0" * 32)
        else:
            agent = ends.connect(authority=_another_authority(tmp_path / "other"))
        with pytest.raises(FinalRefusal) as refusal:
            await ends.ended(agent)
        assert refusal.value.code == "untrusted"
        assert not ends.server.registry.tunnels

    on_each(scenario)


def _another_authority(directory: Path) -> bytes:
    return ensure_server_certificate(directory, ["localhost"], datetime.now(UTC)).authority.read_bytes()


# Links


def test_links_grow_with_the_load_and_every_request_is_answered(on_all: Play) -> None:
    async def scenario(ends: Ends) -> None:
        backend = Backend(0.5)
        await ends.connected(backend)
        began = ends.loop.time()
        visits = [ends.visit() for _ in range(3 * SLOTS)]
        await ends.until(lambda: all(visit.status == 200 for visit in visits))
        assert ends.loop.time() - began < 2
        assert 3 <= len(ends.session().links) <= 8
        assert (ends.session().in_flight, ends.session().tunnel.in_flight) == (0, 0)

    on_all(scenario)


def test_links_no_longer_needed_are_retired_without_a_lost_request(on_all: Play) -> None:
    async def scenario(ends: Ends) -> None:
        backend = Backend(0.5)
        agent = await ends.connected(backend)
        visits = [ends.visit() for _ in range(3 * SLOTS)]
        await ends.until(lambda: all(visit.status == 200 for visit in visits))
        session = ends.session()
        await ends.until(lambda: all(not link.active and link.has_slot() for link in session.links.values()))
        most = len(session.links)
        backend.after = None
        kept = []
        for _ in range(most):  # one on each link: those of one moment would go together
            kept.append(ends.visit())
            await asyncio.sleep(0.002)
        await ends.until(lambda: len(backend.open_requests) == most)
        await ends.until(lambda: len(session.links) == 1, 200)
        assert len(session.lingering) == most - 1
        backend.answer_all()
        await ends.until(lambda: all(visit.status == 200 for visit in kept))
        await ends.until(lambda: len(ends.server.links.links) == 1 and len(ends.client_addresses()) == 1, 30)
        assert agent.serving
        assert (await ends.visited()).status == 200
        assert ends.session() is session

    on_all(scenario)


def test_session_has_no_more_links_than_the_client_allows(on_each: Play) -> None:
    async def scenario(ends: Ends) -> None:
        await ends.connected(Backend(0.2), max_links=2)
        visits = [ends.visit() for _ in range(5 * SLOTS)]
        await ends.until(lambda: all(visit.status == 200 for visit in visits))
        assert len(ends.session().links) == 2

    on_each(scenario)


def test_request_waits_for_a_slot_in_order_and_then_is_told_to_come_back(on_all: Play) -> None:
    async def scenario(ends: Ends) -> None:
        backend = Backend(None)
        await ends.connected(backend, max_links=1)
        first = [ends.visit("/first") for _ in range(SLOTS)]
        await ends.until(lambda: len(backend.requests) == SLOTS)
        late = [ends.visit(f"/{number}") for number in range(20)]
        for request in list(backend.open_requests)[:10]:
            request.answer()
        await ends.until(lambda: len(backend.requests) == SLOTS + 10)
        assert {request.head.target for request in backend.requests[SLOTS:]} == {b"/%d" % n for n in range(10)}
        took = await ends.until(lambda: all(visit.status == 503 for visit in late[10:]))
        assert 1.8 < took < 2.3
        assert {visit.error for visit in late[10:]} == {"connection_limit_reached"}
        assert all("retry-after:" in visit.answer.lower() for visit in late[10:])
        backend.answer_all()
        await ends.until(lambda: all(visit.status == 200 for visit in first + late[:10]))
        assert (ends.session().in_flight, ends.session().tunnel.in_flight) == (0, 0)

    on_all(scenario)


def test_visitor_who_leaves_while_waiting_gives_its_place_away(on_each: Play) -> None:
    async def scenario(ends: Ends) -> None:
        backend = Backend(None)
        await ends.connected(backend, max_links=1)
        first = [ends.visit() for _ in range(SLOTS)]
        impatient = [ends.visit("/impatient") for _ in range(5)]
        patient = ends.visit("/patient")
        await ends.until(lambda: len(backend.requests) == SLOTS)
        for visit in impatient:
            visit.leave()
        await asyncio.sleep(0.1)
        backend.answer_all()
        await ends.until(lambda: all(visit.status == 200 for visit in [*first, patient]))
        assert b"/impatient" not in [request.head.target for request in backend.requests]
        assert (ends.session().in_flight, ends.session().tunnel.in_flight) == (0, 0)

    on_each(scenario)


def test_tunnel_takes_no_more_requests_than_it_may(on_each: Play) -> None:
    async def scenario(ends: Ends) -> None:
        ends.limits = RegistryLimits(in_flight=10)
        await ends.serve()
        backend = Backend(None)
        await ends.connected(backend)
        visits = [ends.visit() for _ in range(10)]
        refused = await ends.visited()
        assert (refused.status, refused.error) == (503, "connection_limit_reached")
        backend.answer_all()
        await ends.until(lambda: all(visit.status == 200 for visit in visits))
        assert (await ends.visited()).status == 200

    on_each(scenario, serve=False)


def test_visitors_who_leave_free_their_slots_and_are_known_at_the_backend(on_all: Play) -> None:
    async def scenario(ends: Ends) -> None:
        backend = Backend(None)
        await ends.connected(backend)
        visits = [ends.visit() for _ in range(50)]
        await ends.until(lambda: len(backend.open_requests) == 50)
        for visit in visits:
            visit.leave()
        assert await ends.until(lambda: not backend.open_requests) < 0.1
        assert (ends.session().in_flight, ends.session().tunnel.in_flight) == (0, 0)
        assert ends.server.visitors.in_flight == 0
        assert [link.active for link in ends.server.links.links] == [0] * len(ends.server.links.links)

    on_all(scenario)


# A path that fails


def test_silent_link_is_replaced_beside_and_its_late_answers_still_count(on_all: Play) -> None:
    async def scenario(ends: Ends) -> None:
        backend = Backend(None)
        await ends.connected(backend)
        (old,) = ends.server.links.links
        slow = ends.visit("/slow")
        await ends.until(lambda: len(backend.requests) == 1)
        session = ends.session()
        join = ends.part(old)
        await ends.until(lambda: len(session.lingering) == 1, 10)
        assert ends.session() is session
        quick = ends.visit("/quick")
        await ends.until(lambda: len(backend.requests) == 2, 1)
        backend.requests[1].answer()
        await ends.until(lambda: quick.status == 200, 1)
        join()
        backend.requests[0].answer()
        await ends.until(lambda: slow.status == 200, 20)
        await ends.until(lambda: not session.lingering, 20)
        assert (session.in_flight, session.tunnel.in_flight) == (0, 0)

    on_all(scenario)


def test_session_outlives_an_idle_link_that_is_replaced(on_all: Play) -> None:
    async def scenario(ends: Ends) -> None:
        await ends.connected()
        (old,) = ends.server.links.links
        ends.part(old)
        await ends.until(lambda: ends.session().links[0] is not old, 10)
        assert (await ends.visited()).status == 200
        await asyncio.sleep(60)
        assert (await ends.visited()).status == 200
        assert len(ends.session().links) == 1

    on_all(scenario)


@pytest.mark.parametrize("told", [False, True], ids=["silent", "told"])
def test_link_whose_local_address_is_gone_goes_on_from_another_with_its_streams(on_all: Play, told: bool) -> None:
    async def scenario(ends: Ends) -> None:
        backend = Backend(None)
        agent = await ends.connected(backend)
        (old,) = ends.client_addresses()
        (link,) = agent.links
        visits = [ends.visit(f"/{number}") for number in range(20)]
        await ends.until(lambda: len(backend.requests) == 20)
        ends.network.lose = lambda source, destination: old in (source, destination)
        if told:  # by the kernel, when the address was bound to an interface that is gone
            ends.network.endpoints[old].fail(OSError(errno.ENETUNREACH, "unreachable"))
        await ends.until(lambda: len(ends.network.dials) == 2, 0.05 if told else 4)
        await ends.until(lambda: link.silent_for() < 0.1, 0.5)
        backend.answer_all()
        await ends.until(lambda: all(visit.status == 200 for visit in visits), 5)
        assert agent.links == [link]
        assert len(ends.server.links.links) == 1
        await ends.until(lambda: old not in ends.client_addresses(), 5)
        assert len(ends.client_addresses()) == 1

    on_all(scenario)


@pytest.mark.parametrize("method", ["GET", "POST"])
def test_nat_that_forgets_again_and_again_costs_no_request(on_all: Play, method: str) -> None:
    async def scenario(ends: Ends) -> None:
        backend = Backend(0.1)
        await ends.connected(backend)
        visits = []
        for _ in range(12):
            for address in ends.client_addresses():
                ends.network.rebind(address)
            for _ in range(10):
                visits.append(ends.visit("/", "Content-Length: 0", method=method))
                await asyncio.sleep(0.1)
        await ends.until(lambda: all(visit.status for visit in visits), 40)
        assert {visit.status for visit in visits} == {200}
        assert len(backend.requests) == len(visits), "each reached the backend once"

    on_all(scenario)


def test_client_without_a_route_tries_again_and_makes_no_fuss(
    on_each: Play, monkeypatch: pytest.MonkeyPatch, log_lines: list[str]
) -> None:
    connect = socket.socket.connect

    def unreachable(sock: socket.socket, address: object) -> None:
        raise OSError(errno.ENETUNREACH, "Network is unreachable")

    async def scenario(ends: Ends) -> None:
        monkeypatch.setattr(socket.socket, "connect", unreachable)
        agent = ends.connect()
        await asyncio.sleep(10)
        assert not agent.serving
        monkeypatch.setattr(socket.socket, "connect", connect)
        assert await ends.until(lambda: agent.serving) < 1.1

    on_each(scenario)
    assert [line for line in log_lines if "cannot send there: Network is unreachable" in line]
    assert not [line for line in log_lines if line.startswith("ERROR")]


def test_first_route_that_is_dead_is_given_up_at_once(on_each: Play) -> None:
    async def scenario(ends: Ends) -> None:
        ends.network.lose = lambda source, destination: True
        agent = ends.connect()
        await ends.until(ends.client_addresses)
        (first,) = ends.client_addresses()
        ends.network.endpoints[first].fail(OSError(errno.ENETUNREACH, "unreachable"))
        ends.network.lose = lambda source, destination: False
        assert await ends.until(lambda: agent.serving) < 0.5

    on_each(scenario)


def test_client_dials_beside_within_seconds_of_silence(on_each: Play) -> None:
    async def scenario(ends: Ends) -> None:
        await ends.connected()
        (old,) = ends.server.links.links
        await asyncio.sleep(10)
        ends.part(old)
        took = await ends.until(lambda: ends.session().links[0] is not old, 10)
        assert 0.4 < took < 4.2  # silence counts from the last answer, to a ping of up to 1.5 s ago

    on_each(scenario)


def test_requests_go_to_the_client_that_is_heard(on_each: Play) -> None:
    async def scenario(ends: Ends) -> None:
        silent, heard = Backend(), Backend(None)
        await ends.connected(silent)
        (address,) = ends.client_addresses()
        await ends.connected(heard)
        # What the first client tries to come back by is lost too.
        known = ends.client_addresses()
        ends.network.lose = lambda source, destination: (
            address in (source, destination) or not {source, destination} <= known | {ends.quic_address}
        )
        await asyncio.sleep(6)
        visits = [ends.visit() for _ in range(20)]
        await ends.until(lambda: len(heard.requests) == 20, 2)
        heard.answer_all()
        await ends.until(lambda: all(visit.status == 200 for visit in visits), 2)

    on_each(scenario)


def test_killed_server_that_comes_back_is_found_by_its_silence(on_all: Play) -> None:
    async def scenario(ends: Ends) -> None:
        await ends.connected()
        await asyncio.sleep(5)
        ends.kill_server()
        await asyncio.sleep(0.5)
        await ends.serve()
        assert await ends.until(lambda: ends.server.registry.sessions(), 10) < 6
        assert (await ends.visited()).status == 200

    on_all(scenario)


def test_killed_server_that_stays_away_a_while_is_found_as_soon_as_it_is_back(on_all: Play) -> None:
    async def scenario(ends: Ends) -> None:
        agent = await ends.connected()
        ends.kill_server()
        await asyncio.sleep(40)
        assert not agent.serving
        await ends.serve()
        assert await ends.until(lambda: agent.serving, 30) < 16
        assert (await ends.visited()).status == 200

    on_all(scenario)


@pytest.mark.parametrize("outage", [3.0, 10.0, 40.0])
def test_client_serves_again_within_a_second_or_two_of_its_path(on_all: Play, outage: float) -> None:
    async def scenario(ends: Ends) -> None:
        await ends.connected()

        def heard() -> bool:
            links = [link for session in ends.server.registry.sessions() for link in session.links.values()]
            return any(link.silent_for() < 0.1 and link.closed is None for link in links)

        for shift in (0.1, 0.35, 0.6, 0.85):
            await asyncio.sleep(20 + shift)
            ends.network.lose = lambda source, destination: True
            await asyncio.sleep(outage + shift)
            ends.network.lose = lambda source, destination: False
            assert await ends.until(heard, 10) < (1.1 if outage < 40 else 2.0)
            assert (await ends.visited()).status == 200

    on_all(scenario)


@pytest.mark.parametrize("away", [3.0, 40.0])
def test_client_serves_again_within_a_second_or_two_of_its_server(on_each: Play, away: float) -> None:
    async def scenario(ends: Ends) -> None:
        await ends.connected()
        ends.kill_server()
        await asyncio.sleep(away)
        await ends.serve()
        assert await ends.until(lambda: ends.server.registry.sessions(), 10) < 1.2
        assert (await ends.visited()).status == 200

    on_each(scenario)


def test_name_that_cannot_be_resolved_is_asked_for_until_it_can(on_each: Play) -> None:
    async def scenario(ends: Ends) -> None:
        resolve = ends.loop.getaddrinfo

        async def fails(host: object, port: object, **options: object) -> object:
            raise socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")

        ends.loop.getaddrinfo = fails  # type: ignore[method-assign]
        agent = ends.connect()
        await asyncio.sleep(100)
        assert not agent.serving
        ends.loop.getaddrinfo = resolve  # type: ignore[method-assign]
        assert await ends.until(lambda: agent.serving, 20) < 1.1

    on_each(scenario)


def test_attempts_go_on_beside_each_other_and_one_link_comes_of_them(on_all: Play) -> None:
    async def scenario(ends: Ends) -> None:
        ends.network.lose = lambda source, destination: destination == ends.quic_address
        agent = ends.connect()
        await asyncio.sleep(20)
        assert 18 <= len(ends.network.dials) <= 30
        assert len(ends.client_addresses()) <= 4
        ends.network.lose = lambda source, destination: False
        assert await ends.until(lambda: agent.serving, 10) < 1.1
        await ends.until(lambda: len(ends.server.links.links) == 1 and len(ends.client_addresses()) == 1, 40)
        assert len(agent.links) == 1

    on_all(scenario)


def test_server_that_is_slow_to_shake_hands_is_not_dialled_by_one_client_twice(on_each: Play) -> None:
    async def scenario(ends: Ends) -> None:
        ends.network.delay = 0.45  # so that a handshake takes up to two seconds, and is answered in less than one
        agent = ends.connect()
        await ends.until(lambda: agent.serving, 10)
        assert len(ends.network.dials) <= 2

    on_each(scenario)


def test_link_that_is_heard_again_keeps_its_place(on_all: Play) -> None:
    async def scenario(ends: Ends) -> None:
        agent = await ends.connected()
        (old,) = agent.links
        ends.network.lose = lambda source, destination: True
        await ends.until(lambda: len(ends.network.dials) > 2, 10)
        ends.network.lose = lambda source, destination: source != ends.quic_address  # attempts hear nothing, but
        (there,) = ends.server.links.links
        there.ping()  # the link does
        await asyncio.sleep(0.5)
        dials = len(ends.network.dials)
        ends.network.lose = lambda source, destination: False
        await asyncio.sleep(5)
        assert (await ends.visited()).status == 200
        assert agent.links == [old]
        assert len(ends.network.dials) == dials

    on_all(scenario)


@pytest.mark.parametrize("age", [0.0, 20.0], ids=["young", "old"])
def test_link_that_the_server_closes_is_dialled_again_at_once(on_each: Play, age: float) -> None:
    async def scenario(ends: Ends) -> None:
        await ends.connected()
        await asyncio.sleep(age)
        (link,) = ends.server.links.links
        link.close(0, "as asked")
        took = await ends.until(lambda: len(ends.network.dials) == 2)
        # The libraries tell of a closed connection when it has drained, after three times their estimate of the
        # round trip (RFC 9000 section 10.2).
        assert took < (0.2 if age else 0.6)
        await ends.until(lambda: [each for each in ends.server.registry.sessions() if each.links], 1)
        assert (await ends.visited()).status == 200

    on_each(scenario)


@pytest.mark.parametrize("tells", [True, False], ids=["refused", "silent"])
def test_client_tries_for_ever_and_never_waits_longer_than_fifteen_seconds(on_each: Play, tells: bool) -> None:
    async def scenario(ends: Ends) -> None:
        ends.network.tells = tells
        await ends.serve()
        ends.kill_server()
        began = ends.loop.time()
        agent = ends.connect()
        await asyncio.sleep(600)
        attempts = ends.network.dials
        assert attempts[0] - began < 0.01
        waits = [later - earlier for earlier, later in itertools.pairwise(attempts)]
        assert waits[0] < (0.21 if tells else 1.01)
        early = [wait for wait, at in zip(waits, attempts, strict=False) if at - began < 110]
        assert 0.3 < max(early) < 1.02
        assert 7 < max(waits) < 15.1
        ends.network.tells = True
        await ends.serve()
        assert await ends.until(lambda: agent.serving, 30) < 15.1
        assert (await ends.visited()).status == 200

    on_each(scenario, serve=False)


def test_client_that_is_thrown_out_again_and_again_does_not_dial_in_a_rush(on_each: Play) -> None:
    async def scenario(ends: Ends) -> None:
        ends.server.gate.on_accepted = lambda link: ends.loop.call_later(0.02, link.close, 0, "out")
        agent = await ends.connected()
        await asyncio.sleep(60)
        assert 4 <= len(ends.network.dials) < 30
        ends.server.gate.on_accepted = ends.server.links.accepted
        await asyncio.sleep(16)
        assert agent.serving
        assert (await ends.visited()).status == 200

    on_each(scenario)


def test_client_that_is_asked_to_come_back_much_later_comes_sooner(on_each: Play) -> None:
    async def scenario(ends: Ends) -> None:
        ends.limits = RegistryLimits(max_links=0)  # refused for a minute
        await ends.serve()
        ends.connect()
        await asyncio.sleep(50)
        assert len(ends.network.dials) >= 3

    on_each(scenario, serve=False)


def test_exchanges_of_a_dead_client_are_answered_when_it_is_known(on_all: Play) -> None:
    async def scenario(ends: Ends) -> None:
        backend = Backend(None)
        await ends.connected(backend)
        visits = [ends.visit() for _ in range(5)]
        await ends.until(lambda: len(backend.requests) == 5)
        ends.network.lose = lambda source, destination: True
        await ends.until(lambda: all(visit.status for visit in visits), 100)
        assert {(visit.status, visit.error) for visit in visits} == {(502, "connection_terminated")}
        assert ends.server.registry.tunnels["app"].in_flight == 0

    on_all(scenario)


# The end


def test_client_that_stops_finishes_what_it_has_and_takes_nothing_new(on_all: Play) -> None:
    async def scenario(ends: Ends) -> None:
        backend = Backend(3.0)
        agent = await ends.connected(backend)
        visits = [ends.visit() for _ in range(20)]
        await ends.until(lambda: len(backend.requests) == 20)
        began = ends.loop.time()
        stopping = asyncio.ensure_future(agent.stop(30.0))
        await asyncio.sleep(0.1)
        late = ends.visit()
        await ends.until(lambda: late.status, 10)
        assert late.status == 503
        await stopping
        await ends.ended(agent)
        assert ends.loop.time() - began < 4
        assert [visit.status for visit in visits] == [200] * 20
        assert len(backend.requests) == 20

    on_all(scenario)


def test_client_that_stops_waits_no_longer_than_its_grace(on_each: Play) -> None:
    async def scenario(ends: Ends) -> None:
        backend = Backend(None)
        agent = await ends.connected(backend)
        visit = ends.visit()
        await ends.until(lambda: len(backend.requests) == 1)
        began = ends.loop.time()
        await agent.stop(2.0)
        await ends.ended(agent)
        assert ends.loop.time() - began < 2.5
        # A GET may be asked again: it is held for a client to come.
        await ends.until(lambda: visit.status, 4)
        assert (visit.status, visit.error) == (502, "connection_terminated")

    on_each(scenario)


def test_server_that_stops_finishes_what_it_has(on_all: Play) -> None:
    async def scenario(ends: Ends) -> None:
        backend = Backend(3.0)
        agent = await ends.connected(backend)
        visits = [ends.visit() for _ in range(20)]
        await ends.until(lambda: len(backend.requests) == 20)
        began = ends.loop.time()
        await ends.server.stop(30.0)
        assert ends.loop.time() - began < 4
        assert [visit.status for visit in visits] == [200] * 20
        await ends.until(lambda: not agent.serving, 10)

    on_all(scenario)


def test_server_that_is_replaced_has_its_clients_back(on_all: Play) -> None:
    async def scenario(ends: Ends) -> None:
        agent = await ends.connected()
        await ends.server.stop(30.0)
        await ends.until(lambda: not agent.serving, 10)
        await asyncio.sleep(20)
        await ends.serve()
        assert await ends.until(lambda: ends.server.registry.sessions(), 30) < 16
        assert (await ends.visited()).status == 200

    on_all(scenario)


def test_nothing_is_left_when_all_have_gone(on_all: Play) -> None:
    async def scenario(ends: Ends) -> None:
        agents = [await ends.connected(Backend(0.1)) for _ in range(3)]
        visits = [ends.visit() for _ in range(4 * SLOTS)]
        await ends.until(lambda: all(visit.status == 200 for visit in visits))
        for agent in agents:
            await agent.stop(1.0)
            await ends.ended(agent)
        await ends.until(lambda: not ends.server.links.links, 60)
        assert not ends.client_addresses()
        assert not ends.server.registry.sessions()
        assert ends.server.registry.tunnels["app"].in_flight == 0

    on_all(scenario)
