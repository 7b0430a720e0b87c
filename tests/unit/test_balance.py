"""The order of sessions by load and weight, and who belongs to whom by address."""

import random
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quictunnel.server.balance import Balance, rendezvous


class Session:
    """What the order needs of a session."""

    def __init__(self, weight: int = 1) -> None:
        self.in_flight = 0
        self.weight = weight
        self.place = 0

    @property
    def load(self) -> float:
        return self.in_flight / self.weight


def offered(*weights: int) -> tuple[Balance[Session], list[Session]]:
    balance: Balance[Session] = Balance()
    sessions = [Session(weight) for weight in weights]
    for session in sessions:
        balance.offer(session)
    return balance, sessions


def take(balance: Balance[Session]) -> Session:
    session = balance.first()
    assert session is not None
    session.in_flight += 1
    balance.offer(session)
    return session


@given(st.data())
def test_first_is_always_one_of_those_with_the_least_load(data: st.DataObject) -> None:
    balance, sessions = offered(*data.draw(st.lists(st.integers(1, 5), min_size=1, max_size=6)))
    there, parked = set(sessions), set[Session]()
    for step in data.draw(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 9)), max_size=60)):
        session = sessions[step[1] % len(sessions)]
        match step[0] % 4:
            case 0 if balance.first() is not None:
                take(balance)
            case 1 if session.in_flight and session in there:
                session.in_flight -= 1
                balance.offer(session)
                parked.discard(session)
            case 2 if session in there and session is balance.first():
                balance.park(session)
                parked.add(session)
            case 3:
                balance.withdraw(session)
                there.discard(session)
                parked.discard(session)
        assert balance.parked == parked
        free = there - parked
        first = balance.first()
        assert (first is None) == (not free)
        if first is not None:
            assert first in free
            assert first.load == min(each.load for each in free)


def test_equals_take_turns() -> None:
    balance, sessions = offered(1, 1, 1)
    assert [take(balance) for _ in range(6)] == sessions * 2


def test_weights_share_the_load() -> None:
    balance, sessions = offered(1, 2, 7)
    for _ in range(1000):
        take(balance)
    assert [session.in_flight for session in sessions] == pytest.approx([100, 200, 700], abs=2)


def test_newcomer_has_its_share_at_once_and_who_leaves_takes_none_with_it() -> None:
    balance, sessions = offered(1, 1)
    for _ in range(10):
        take(balance)
    late = Session()
    balance.offer(late)
    assert {take(balance) for _ in range(5)} == {late}
    balance.withdraw(sessions[0])
    for _ in range(50):
        take(balance)
    assert sessions[0].in_flight == 5
    assert abs(sessions[1].in_flight - late.in_flight) <= 1


def test_what_is_kept_stays_in_proportion_to_the_sessions() -> None:
    balance, sessions = offered(*[1] * 20)
    for _ in range(10_000):
        session = random.choice(sessions)
        session.in_flight = random.randrange(1, 100)
        balance.offer(session)
    assert len(balance) <= 4 * 20 + 65


def test_visitors_are_spread_by_weight_and_only_those_concerned_move() -> None:
    candidates = {"a": 1, "b": 1, "c": 2}
    visitors = [f"192.0.2.{number}" for number in range(4000)]
    before = {visitor: rendezvous(visitor, candidates.items()) for visitor in visitors}
    count = Counter(before.values())
    assert [count[key] / 1000 for key in "abc"] == pytest.approx([1, 1, 2], rel=0.15)
    without = {visitor: rendezvous(visitor, [("a", 1), ("c", 2)]) for visitor in visitors}
    assert all(without[visitor] == key for visitor, key in before.items() if key != "b")
    assert set(without.values()) == {"a", "c"}


def test_nobody_belongs_to_nobody() -> None:
    assert rendezvous("192.0.2.1", []) is None
