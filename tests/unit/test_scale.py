"""What one of very many costs: what is done for a request, a session or a link must not grow with how many there are.

Operations are counted, not timed: lines of the package that are executed. What may grow is a heap's depth.
"""

import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import Any, Final

import pytest

import quictunnel
from quictunnel.quic.engine import select_engine
from quictunnel.quic.link import LinkOwner
from quictunnel.quic.listen import LinkListener
from quictunnel.quic.sockets import QUOTED, Refusal
from quictunnel.server.balance import LinkOrder
from quictunnel.server.registry import Registry, RegistryLimits, Session
from quictunnel.wire.credit import WindowBudget
from quictunnel.wire.errors import ErrorCode
from tests.support.memory import identity
from tests.unit.test_gate import Door
from tests.unit.test_registry import FakeLeg, FakeLink, asked, joined, session_of

pytestmark = pytest.mark.interpreted  # lines of Python are counted, and stand-ins for Link

_PACKAGE: Final = str(Path(quictunnel.__file__).parent)
_ROOM: Final = 2.0
"how much more may be done among thirty times as many: a heap of them is deeper, and a list is made larger"


def lines_of(work: Callable[[], object]) -> int:
    """How many lines of the package are executed; those of comprehensions count each time."""
    count = 0

    def trace(frame: FrameType, event: str, value: Any) -> Any:
        nonlocal count
        if not frame.f_code.co_filename.startswith(_PACKAGE):
            return None
        count += event == "line"
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        work()
    finally:
        sys.settrace(before)
    return count


Prepare = Callable[[int], Callable[[], object]]
"""Prepares so many of something, and returns what is to be counted then."""


def _registry(**limits: Any) -> Registry:
    return Registry(RegistryLimits(in_flight=10**6, max_links=2000, sessions=2000, **limits))


def a_request_that_names_no_tunnel(count: int) -> Callable[[], object]:
    registry = _registry()
    for number in range(count):
        joined(registry, f"s{number}", tunnel=f"t{number}")
    return registry.only_tunnel


def a_request_to_a_session_of_links(count: int) -> Callable[[], object]:
    registry = _registry()
    for index in range(count):
        joined(registry, index=index)
    for leg in asked(registry, 5 * count)[::2]:
        leg.end(registry)

    def work() -> None:
        for leg in asked(registry, 20):
            leg.end(registry)

    return work


def a_request_to_a_session_whose_links_are_all_full(count: int) -> Callable[[], object]:
    registry = _registry()
    for index in range(count):
        joined(registry, index=index, slots=2)
    legs = asked(registry, 3 * count)  # a third of them wait
    legs[0].end(registry)  # that each link is full is found out once in a while

    def work() -> None:
        for leg in legs[1:20]:
            leg.end(registry)

    return work


def a_request_to_a_tunnel_of_sessions(count: int) -> Callable[[], object]:
    registry = _registry()
    for number in range(count):
        joined(registry, f"s{number}")
    legs = asked(registry, 3 * count)

    def work() -> None:
        for leg in legs[:20]:
            leg.end(registry)
        asked(registry, 20)

    return work


def a_request_to_a_tunnel_whose_sessions_are_all_full(count: int) -> Callable[[], object]:
    registry = _registry()
    for number in range(count):
        joined(registry, f"s{number}", slots=2)
    legs = asked(registry, 3 * count)

    def work() -> None:
        for leg in legs[:20]:
            leg.end(registry)

    return work


def a_session_that_comes_to_a_tunnel(count: int) -> Callable[[], object]:
    registry = _registry()
    for number in range(count):
        joined(registry, f"s{number}")
    return lambda: joined(registry, "another")


def a_session_that_goes(count: int) -> Callable[[], object]:
    registry = _registry()
    links = [joined(registry, f"s{number}") for number in range(count)]
    return lambda: links[count // 2].close(0, "gone")


def a_client_that_says_how_its_backend_is(count: int) -> Callable[[], object]:
    registry = _registry()
    links = [joined(registry, f"s{number}") for number in range(count)]

    def work() -> None:
        for healthy in (False, True):
            registry.health(session_of(links[count // 2]), healthy, "")

    return work


def a_client_that_drains(count: int) -> Callable[[], object]:
    registry = _registry()
    links = [joined(registry, f"s{number}") for number in range(count)]
    return lambda: registry.drain(links[count // 2])  # type: ignore[arg-type]


def a_request_whose_backend_could_not_be_connected_to(count: int) -> Callable[[], object]:
    registry = _registry()
    links = [joined(registry, f"s{number}") for number in range(count)]
    asked(registry, count)

    def work() -> None:
        leg = FakeLeg()
        leg.tried = frozenset((session_of(links[0]),))
        assert registry.dispatch_again(registry.tunnels["app"], leg, 0.0, may_wait=False)  # type: ignore[arg-type]

    return work


@pytest.mark.parametrize(
    "prepare",
    [
        a_request_that_names_no_tunnel,
        a_request_to_a_session_of_links,
        a_request_to_a_session_whose_links_are_all_full,
        a_request_to_a_tunnel_of_sessions,
        a_request_to_a_tunnel_whose_sessions_are_all_full,
        a_session_that_comes_to_a_tunnel,
        a_session_that_goes,
        a_client_that_says_how_its_backend_is,
        a_client_that_drains,
        a_request_whose_backend_could_not_be_connected_to,
    ],
    ids=lambda prepare: prepare.__name__,
)
def test_cost_does_not_grow_with_how_many_there_are(prepare: Prepare) -> None:
    few, many = lines_of(prepare(10)), lines_of(prepare(300))
    assert few
    assert many <= _ROOM * few + 10


async def test_hello_costs_no_more_among_many_sessions(tmp_path: Path) -> None:
    door = Door(tmp_path)
    cost = []
    for number in range(200):
        name = f"session-{number:020}"
        if number in (10, 199):
            cost.append(lines_of(lambda name=name: door.hello(session=name)))
        else:
            door.hello(session=name)
    door.close()
    assert cost[1] <= _ROOM * cost[0]


async def test_tokens_that_have_not_changed_cost_the_sessions_nothing(tmp_path: Path) -> None:
    door = Door(tmp_path)
    for number in range(100):
        door.hello(session=f"session-{number:020}")
    door.gate.recheck_tokens()
    assert lines_of(door.gate.recheck_tokens) < 30
    door.tokens.create(["other"], None, door.now)
    assert lines_of(door.gate.recheck_tokens) > 100, "another file is held against all of them"
    door.close()


async def test_session_ends_in_time_though_its_token_expires_before_those_that_were_there(tmp_path: Path) -> None:
    door = Door(tmp_path)
    door.hello()
    door.gate.recheck_tokens()
    brief = door.tokens.create(["brief"], timedelta(hours=1), door.now)
    door.hello(tunnel="brief", session="t" * 24, token=brief.secret)
    door.gate.recheck_tokens()
    door.now += timedelta(minutes=59)
    door.gate.recheck_tokens()
    assert len(door.registry.sessions()) == 2
    door.now += timedelta(minutes=1)
    door.gate.recheck_tokens()
    assert [session.tunnel.name for session in door.registry.sessions()] == ["app"]
    door.close()


class _Addressed:
    """A link as its listener sees it when its client's port is closed."""

    def __init__(self, number: int) -> None:
        self.address = ("192.0.2.1", number)
        self.beginning = number.to_bytes(QUOTED, "big")
        self.unreached: list[int] = []

    def number_of(self, quoted: bytes) -> int | None:
        return 7 if quoted == self.beginning else None

    def unreachable(self, number: int) -> None:
        self.unreached.append(number)


async def test_refusal_finds_its_link_among_many_at_once(engine: str) -> None:
    listener = LinkListener(select_engine(engine), identity()[0], LinkOwner(), WindowBudget(0))
    links: list[Any] = [_Addressed(number) for number in range(1000)]
    cost = []
    for count in (10, 1000):
        for link in links[:count]:
            if not listener._at.get(link.address):
                listener._address(link, None)
        link = links[count // 2]
        cost.append(lines_of(lambda link=link: listener._refused([Refusal(link.beginning, link.address)])))
        assert link.unreached == [7]
    assert cost[0] == cost[1]
    before, moved = links[0].address, links[0]
    moved.address = ("192.0.2.2", 1)
    listener._address(moved, before)
    listener._refused([Refusal(moved.beginning, before)])
    assert not moved.unreached, "it is not there any more"
    listener._refused([Refusal(moved.beginning, moved.address)])
    assert moved.unreached == [7]
    for link in links:
        listener._terminated(link)
    assert not listener._at


def test_requests_that_many_sessions_have_refused_are_looked_at_once_in_a_turn() -> None:
    registry = _registry(held=5000, slot_wait=60.0)
    small, full = joined(registry, "s1", slots=1), joined(registry, "s2", slots=1)
    asked(registry, 2)
    tunnel = registry.tunnels["app"]
    for _ in range(500):
        leg = FakeLeg()
        leg.tried = frozenset((session_of(small),))
        assert registry.dispatch_again(tunnel, leg, 0.0, may_wait=True)  # type: ignore[arg-type]
    looks = 0
    choose = tunnel.choose_session

    def counted(now: float, leg: Any = None) -> Any:
        nonlocal looks
        looks += 1
        return choose(now, leg)

    type(tunnel).choose_session, original = lambda self, now, leg=None: counted(now, leg), type(tunnel).choose_session  # type: ignore[method-assign,assignment]
    try:
        small.legs[0].end(registry)
    finally:
        type(tunnel).choose_session = original  # type: ignore[method-assign]
    assert looks <= 2
    assert len(tunnel.waiting) == 500
    assert full.active == 1


# The order of many links


def test_many_links_are_chosen_as_few_are() -> None:
    registry = _registry()
    links = [joined(registry, index=index) for index in range(40)]
    asked(registry, 400)
    assert {link.active for link in links} == {10}
    for leg in links[7].legs[:5]:
        leg.end(registry)
    asked(registry, 5)
    assert {link.active for link in links} == {10}


def test_first_of_many_links_has_one_request_after_the_other() -> None:
    """What its congestion window has learnt is not learnt anew by each of the others."""
    registry = _registry()
    links = [joined(registry, index=index) for index in range(40)]
    for _ in range(100):
        asked(registry, 1)
        links[0].legs[-1].end(registry)
    assert [len(link.legs) for link in links[1:]] == [0] * 39


def test_suspect_link_of_many_is_passed_over_until_it_is_heard() -> None:
    registry = _registry()
    links = [joined(registry, index=index) for index in range(20)]
    links[3].silence = 60.0
    asked(registry, 190)
    assert (links[3].active, {link.active for link in links if link is not links[3]}) == (0, {10})
    links[3].silence = 0.0
    asked(registry, 10, now=0.2)
    assert {link.active for link in links} == {10}


def test_closed_and_drained_links_of_many_get_nothing() -> None:
    registry = _registry()
    links = [joined(registry, index=index) for index in range(20)]
    asked(registry, 20)
    links[0].close(0, "gone")
    registry.drain(links[1])  # type: ignore[arg-type]
    asked(registry, 180)
    assert (links[0].active, links[1].active) == (1, 1)
    assert {link.active for link in links[2:]} == {11}


def test_full_link_of_many_is_chosen_again_as_soon_as_a_slot_is_free() -> None:
    registry = _registry(slot_wait=60.0)
    links = [joined(registry, index=index, slots=3) for index in range(20)]
    legs = asked(registry, 61)
    assert legs[60].link is None
    legs[17].end(registry)
    assert legs[60].link is legs[17].link
    assert [link.active for link in links] == [3] * 20


def test_order_keeps_no_entry_of_links_that_are_emptied_again_and_again() -> None:
    links: list[Any] = [FakeLink(_registry()) for _ in range(20)]
    order = LinkOrder(links)
    for turn in range(10_000):
        order.offer(links[turn % 3])
    assert len(order._heap) <= 4 * 20 + 64
    assert order.choose(0.0, lambda link: link is links[5]) is links[5]


def test_session_that_is_put_aside_after_its_end_is_not_remembered() -> None:
    registry = _registry()
    gone = joined(registry, "s1")
    joined(registry, "s2")
    joined(registry, "s3")
    session: Session = session_of(gone)
    gone.close(ErrorCode.NO_ERROR, "gone")
    for _ in range(5):
        session.fails(0.0)
    assert not registry.tunnels["app"].aside
