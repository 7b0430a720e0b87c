"""Tunnels, sessions and links without a network: who is chosen, who waits, who is asked to grow."""

import random
from collections import deque
from collections.abc import Callable
from typing import Any

import pytest

from quictunnel.quic.link import SLOTS, SUSPECT_AFTER
from quictunnel.server.registry import Registry, RegistryLimits, Session, Tunnel
from quictunnel.trust.tokens import Grant
from quictunnel.wire.control import Grow
from quictunnel.wire.errors import ErrorCode, TunnelError

pytestmark = pytest.mark.interpreted  # a stand-in for Link

HALF = SLOTS // 2


class FakeLink:
    """A link as the registry sees it."""

    def __init__(self, registry: Registry, slots: int = SLOTS) -> None:
        self._registry = registry
        self.slots = slots
        self.active = 0
        self.session: Any = None
        self.draining = False
        self.closed: object = None
        self.silence = 0.0
        self.filling = False
        self.legs: list[FakeLeg] = []
        self.messages: list[object] = []
        self.on_attach: Callable[[], None] = lambda: None

    def has_slot(self) -> bool:
        return self.active < self.slots and not self.draining and self.closed is None

    def silent_for(self) -> float:
        return self.silence

    def attach(self, leg: "FakeLeg") -> None:
        assert self.has_slot()
        assert leg.link is None, "given two slots"
        leg.link = self
        self.active += 1
        self.legs.append(leg)
        self.on_attach()

    def send_control(self, message: object) -> None:
        self.messages.append(message)

    def close(self, code: int, reason: str) -> None:
        if self.closed is None:
            self.closed = reason
            self._registry.unregister(self, 0.0)  # type: ignore[arg-type]


class FakeLeg:
    """A stream leg as the registry sees it."""

    def __init__(self) -> None:
        self.link: FakeLink | None = None
        self.ended = False
        self.peer = self
        self.tried: frozenset[Session] = frozenset()
        self.prefers: Session | None = None
        self.session: Session | None = None
        self.failure: TunnelError | None = None
        self.errors: list[ErrorCode] = []

    def abort(self, error: TunnelError) -> None:
        self.errors.append(error.code)
        self.ended = True

    def end(self, registry: Registry) -> None:
        self.ended = True
        link = self.link
        assert link is not None
        link.active -= 1
        registry.slot_freed(link.session, link, 0.0)  # type: ignore[arg-type]


def grant(tunnel: str = "app") -> Grant:
    return Grant("id", tunnel, (), None, b"digest")


def joined(
    registry: Registry, session: str = "s1", index: int = 0, tunnel: str = "app", slots: int = SLOTS
) -> FakeLink:
    """A link of a session, registered."""
    link = FakeLink(registry, slots)
    registry.register(grant(tunnel), session, "agent", index, link, 0.0)  # type: ignore[arg-type]
    return link


def asked(registry: Registry, count: int = 1, now: float = 0.0, tunnel: str = "app") -> list[FakeLeg]:
    """Requests for a tunnel."""
    legs = [FakeLeg() for _ in range(count)]
    for leg in legs:
        registry.dispatch(registry.tunnels[tunnel], leg, now)  # type: ignore[arg-type]
    return legs


@pytest.fixture
def registry() -> Registry:
    return Registry(RegistryLimits(in_flight=1000, slot_wait=2.0, hold=1.0, held=600, max_links=4, tunnels=3))


def session_of(link: FakeLink) -> Session:
    session = link.session
    assert isinstance(session, Session)
    return session


def test_request_goes_to_the_link_with_the_most_room(registry: Registry) -> None:
    links = [joined(registry, index=index) for index in range(3)]
    asked(registry, 30)
    assert [link.active for link in links] == [10, 10, 10]
    for leg in links[1].legs[:5]:
        leg.end(registry)
    asked(registry, 5)
    assert [link.active for link in links] == [10, 10, 10]


def test_full_link_takes_nothing_more_though_others_leave_on_it(registry: Registry) -> None:
    links = [joined(registry, index=index, slots=3) for index in range(3)]
    for link in links:
        link.filling = True
    asked(registry, 8)
    assert sorted(link.active for link in links) == [2, 3, 3]


def test_request_goes_to_the_session_with_the_fewest_in_flight(registry: Registry) -> None:
    one, other = joined(registry, "s1"), joined(registry, "s2")
    joined(registry, "s1", 1)
    asked(registry, 20)
    assert (session_of(one).in_flight, session_of(other).in_flight) == (10, 10)


def test_session_without_a_slot_is_passed_over(registry: Registry) -> None:
    small, large = joined(registry, "s1", slots=2), joined(registry, "s2")
    asked(registry, 10)
    assert (small.active, large.active) == (2, 8)


def test_request_waits_rather_than_go_to_a_suspect_link(registry: Registry) -> None:
    suspect, sound = joined(registry), joined(registry, index=1)
    suspect.silence = SUSPECT_AFTER + 1
    asked(registry, 10)
    assert (suspect.active, sound.active) == (0, 10)
    sound.silence = SUSPECT_AFTER + 1
    asked(registry, 10)
    assert (suspect.active, sound.active) == (0, 10)
    suspect.silence = 0.0
    registry.look_again(0.1)
    assert (suspect.active, sound.active) == (10, 10)


def test_request_that_waited_for_a_suspect_session_is_told_that_no_client_is_there(registry: Registry) -> None:
    joined(registry).silence = SUSPECT_AFTER + 1
    legs = asked(registry, 2)
    registry.look_again(2.1)
    # Both ends of the exchange are told.
    assert [leg.errors for leg in legs] == [[ErrorCode.DESTINATION_UNAVAILABLE] * 2] * 2


def test_request_for_a_client_that_leaves_waits_for_the_next(registry: Registry) -> None:
    leaving = joined(registry)
    leaving.draining = True
    asked(registry)
    staying = joined(registry, "s2")
    registry.look_again(0.5)
    assert (leaving.active, staying.active) == (0, 1)


@pytest.mark.parametrize(("hold", "away", "held"), [(1.0, 29.0, True), (1.0, 31.0, False), (0.0, 0.0, False)])
def test_request_is_held_while_a_client_may_come_back_any_moment(hold: float, away: float, held: bool) -> None:
    registry = Registry(RegistryLimits(hold=hold))
    joined(registry).close(0, "gone")
    if not held:
        with pytest.raises(TunnelError) as found:
            asked(registry, now=away)
        assert found.value.code == ErrorCode.DESTINATION_UNAVAILABLE
        assert registry.tunnels["app"].in_flight == 0
        return
    come, late = asked(registry, 2, away)
    back = joined(registry, slots=1)
    registry.look_again(away + 0.9)
    assert (come.link, late.errors) == (back, [])
    registry.look_again(away + 1.1)
    assert late.errors == [ErrorCode.CONNECTION_LIMIT_REACHED] * 2


def test_only_so_many_requests_wait_for_a_client(registry: Registry) -> None:
    joined(registry).close(0, "gone")
    asked(registry, 600)
    with pytest.raises(TunnelError) as found:
        asked(registry)
    assert found.value.code == ErrorCode.DESTINATION_UNAVAILABLE
    assert registry.tunnels["app"].in_flight == 600


def test_suspect_session_is_passed_over(registry: Registry) -> None:
    suspect, sound = joined(registry, "s1"), joined(registry, "s2")
    suspect.silence = SUSPECT_AFTER + 1
    asked(registry, 7)
    assert (suspect.active, sound.active) == (0, 7)


def test_load_asks_for_links_before_the_slots_run_out(registry: Registry) -> None:
    link = joined(registry)
    asked(registry, HALF - 1)
    assert not link.messages
    asked(registry)
    assert link.messages == [Grow(2)]
    asked(registry, HALF - 1)
    assert link.messages == [Grow(2)], "asked once"
    asked(registry)
    assert link.messages == [Grow(2), Grow(3)]


def test_no_more_links_are_asked_for_than_a_session_may_have(registry: Registry) -> None:
    link = joined(registry)
    asked(registry, 900)
    assert link.messages[-1] == Grow(4)


def test_links_are_given_up_one_at_a_time_when_the_peak_has_passed(registry: Registry) -> None:
    links = [joined(registry, index=index) for index in range(3)]
    session = session_of(links[0])
    legs = asked(registry, 2 * HALF)
    assert session.wanted_links == 3
    session.retire_links()
    for leg in legs:
        leg.end(registry)
    session.retire_links()
    assert not any(link.draining for link in links), "the peak is not over before a whole look without it"
    session.retire_links()
    assert [link.draining for link in links] == [False, False, True]
    assert links[2].closed == "no longer needed"
    assert links[0].messages[-1] == Grow(2)
    session.retire_links()
    session.retire_links()
    assert [link.closed is None for link in links] == [True, False, False]
    assert session.links == {0: links[0]}


def test_retired_link_is_closed_by_the_end_of_its_last_exchange(registry: Registry) -> None:
    links = [joined(registry, index=index) for index in range(2)]
    session = session_of(links[0])
    legs = asked(registry, HALF)
    for leg in legs[:-1]:
        leg.end(registry)
    last = legs[-1]
    assert last.link is links[1]
    session.retire_links()
    session.retire_links()
    assert (links[1].draining, links[1].closed) == (True, None)
    last.end(registry)
    assert links[1].closed == "no longer needed"
    assert not session.lingering


def test_link_of_the_same_number_replaces_its_ghost_and_the_session_goes_on(registry: Registry) -> None:
    ghost = joined(registry)
    session = session_of(ghost)
    link = joined(registry)
    assert ghost.closed == "no longer needed"
    assert session_of(link) is session
    assert registry.sessions() == [session]
    assert session.links == {0: link}
    asked(registry)
    assert link.active == 1


def test_ghost_keeps_its_exchanges_and_gets_no_new_ones(registry: Registry) -> None:
    ghost = joined(registry)
    (old,) = asked(registry)
    link = joined(registry)
    (new,) = asked(registry)
    assert (old.link, new.link, ghost.closed) == (ghost, link, None)
    old.end(registry)
    assert ghost.closed == "no longer needed"
    assert session_of(link).in_flight == 1


def test_session_ends_with_its_last_link(registry: Registry) -> None:
    links = [joined(registry, index=index) for index in range(2)]
    session = session_of(links[0])
    assert registry.unregister(links[0], 0.0) is None  # type: ignore[arg-type]
    assert registry.unregister(links[1], 0.0) is session  # type: ignore[arg-type]
    assert registry.unregister(links[1], 0.0) is None  # type: ignore[arg-type]
    assert registry.unregister(FakeLink(registry), 0.0) is None  # type: ignore[arg-type]
    assert not registry.sessions()
    with pytest.raises(TunnelError) as error:
        asked(registry, now=60.0)
    assert error.value.code == ErrorCode.DESTINATION_UNAVAILABLE


def test_waiting_requests_get_freed_slots_in_order(registry: Registry) -> None:
    link = joined(registry, slots=2)
    first = asked(registry, 2)
    waiting = asked(registry, 3)
    assert [leg.link for leg in waiting] == [None] * 3
    first[0].end(registry)
    assert [leg.link for leg in waiting] == [link, None, None]
    joined(registry, index=1, slots=1)
    registry.serve_waiting(registry.tunnels["app"], 0.0)
    assert [leg.link is None for leg in waiting] == [False, False, True]


def test_newcomer_does_not_overtake_those_who_wait(registry: Registry) -> None:
    joined(registry, slots=1)
    asked(registry)
    (waiting,) = asked(registry)
    other = joined(registry, index=1, slots=1)
    (late,) = asked(registry)
    registry.serve_waiting(registry.tunnels["app"], 0.0)
    assert (waiting.link, late.link) == (other, None)


def test_waiting_is_over_when_its_time_is(registry: Registry) -> None:
    joined(registry, slots=1)
    asked(registry)
    (early,), (late,) = asked(registry, now=10.0), asked(registry, now=11.0)
    registry.look_again(11.9)
    assert not early.errors
    registry.look_again(12.0)
    assert (early.errors[:1], late.errors) == ([ErrorCode.CONNECTION_LIMIT_REACHED], [])


def test_visitors_who_left_the_queue_are_not_kept_in_it(registry: Registry) -> None:
    joined(registry, slots=1)
    _, *waiting = asked(registry, 5)
    for leg in waiting[:3]:
        leg.ended = True
    registry.look_again(0.1)
    assert [leg for _, leg in registry.tunnels["app"].waiting] == waiting[3:]
    assert [leg.errors for leg in waiting] == [[]] * 4


def test_waiting_is_over_when_the_last_session_is(registry: Registry) -> None:
    link = joined(registry, slots=1)
    asked(registry)
    (waiting,) = asked(registry)
    link.close(0, "gone")
    registry.look_again(1.9)
    assert not waiting.errors, "another may come"
    registry.look_again(2.1)
    assert waiting.errors[0] == ErrorCode.DESTINATION_UNAVAILABLE


def test_slot_that_is_freed_while_one_is_given_goes_to_the_next(registry: Registry) -> None:
    link = joined(registry, slots=2)
    first = asked(registry, 2)
    waiting = asked(registry, 2)

    def free() -> None:
        link.on_attach = lambda: None
        first[1].end(registry)

    link.on_attach = free  # the write of one request may find that another has ended
    first[0].end(registry)
    assert link.legs == first + waiting
    assert (link.active, session_of(link).in_flight) == (2, 2)


def test_tunnel_has_no_more_in_flight_than_it_may(registry: Registry) -> None:
    joined(registry)
    asked(registry, 1000)
    with pytest.raises(TunnelError) as error:
        asked(registry)
    assert error.value.code == ErrorCode.CONNECTION_LIMIT_REACHED
    tunnel = registry.tunnels["app"]
    registry.finished(tunnel)
    asked(registry)
    assert tunnel.in_flight == 1000


def test_name_nobody_serves_makes_room_for_a_new_one(registry: Registry) -> None:
    links = [joined(registry, f"s{name}", tunnel=name) for name in ("a", "b", "c")]
    with pytest.raises(TunnelError) as error:
        joined(registry, "sd", tunnel="d")
    assert error.value.code == ErrorCode.CONNECTION_LIMIT_REACHED
    links[1].close(0, "gone")
    joined(registry, "sd", tunnel="d")
    assert sorted(registry.tunnels) == ["a", "c", "d"]


def test_only_tunnel_is_the_one_that_is_served_or_ever_was(registry: Registry) -> None:
    assert registry.only_tunnel() is None
    a = joined(registry, "sa", tunnel="a")
    assert registry.only_tunnel() is registry.tunnels["a"]
    b = joined(registry, "sb", tunnel="b")
    assert registry.only_tunnel() is None
    b.close(0, "gone")
    assert registry.only_tunnel() is registry.tunnels["a"]
    a.close(0, "gone")
    assert registry.only_tunnel() is None


@pytest.mark.parametrize("seed", range(20))
def test_counts_add_up_whatever_happens(seed: int) -> None:
    chance = random.Random(seed)
    registry = Registry(RegistryLimits(in_flight=400, slot_wait=2.0, max_links=4))
    tunnel, links, legs = registry.tunnels.setdefault("app", Tunnel("app")), deque[FakeLink](), list[FakeLeg]()
    for now in range(600):
        match chance.randrange(12):
            case 0:
                links.append(joined(registry, f"s{chance.randrange(3)}", chance.randrange(3), slots=10))
                registry.serve_waiting(tunnel, 0.0)
            case 1 if links:
                link = links.popleft()
                if link.closed is None:
                    link.closed = "lost"
                    for leg in [leg for leg in link.legs if not leg.ended]:
                        leg.end(registry)
                    registry.unregister(link, now)  # type: ignore[arg-type]
            case 2 | 3 | 4 | 5:
                running = [leg for leg in legs if leg.link is not None and not leg.ended]
                for leg in chance.sample(running, min(len(running), 5)):
                    leg.end(registry)
            case 6:
                registry.look_again(now / 10)
            case 7 if links:
                session_of(links[-1]).retire_links()
            case 8 if tunnel.waiting:
                tunnel.waiting[len(tunnel.waiting) // 2][1].ended = True
            case _ if tunnel.sessions:
                legs += asked(registry, chance.randrange(15), now / 10)
        for leg in [leg for leg in legs if leg.ended]:
            legs.remove(leg)
            registry.finished(tunnel)
        running = [leg for leg in legs if leg.link is not None]
        assert tunnel.in_flight == len(legs)
        # Also of links that were replaced: their session is theirs until they end.
        sessions = {id(leg.link.session): leg.link.session for leg in running if leg.link}
        assert sum(session.in_flight for session in sessions.values()) == len(running)
        assert all(session.in_flight == 0 for session in registry.sessions() if id(session) not in sessions)
        registry.serve_waiting(tunnel, 0.0)
        assert not tunnel.waiting or not any(link.has_slot() for s in registry.sessions() for link in s.links.values())
