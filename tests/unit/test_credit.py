import pytest
from hypothesis import given
from hypothesis import strategies as st

from quictunnel.wire.credit import INITIAL_WINDOW, MAXIMUM_WINDOW, ReceiveCredit, SendCredit, WindowBudget
from quictunnel.wire.errors import ProtocolError


def test_a_sender_stops_at_its_limit_and_goes_on_when_it_is_raised() -> None:
    credit = SendCredit()
    assert credit.spend(INITIAL_WINDOW + 5) == INITIAL_WINDOW
    assert credit.spend(1) == 0
    assert credit.raise_limit(INITIAL_WINDOW + 3)
    assert credit.spend(10) == 3


def test_a_limit_never_falls() -> None:
    credit = SendCredit()
    assert not credit.raise_limit(1)
    assert credit.limit == INITIAL_WINDOW


def test_an_absurd_limit_counts_up_to_the_largest_window() -> None:
    credit = SendCredit()
    credit.spend(100)
    assert credit.raise_limit(2**62 - 1)
    assert credit.limit == 100 + MAXIMUM_WINDOW


def test_a_sender_past_its_limit_is_a_protocol_error() -> None:
    credit = ReceiveCredit(WindowBudget(0))
    credit.receive(INITIAL_WINDOW)
    with pytest.raises(ProtocolError, match="under a limit"):
        credit.receive(1)


def test_a_small_answer_needs_no_grant() -> None:
    credit = ReceiveCredit(WindowBudget(0))
    credit.receive(INITIAL_WINDOW // 2 - 1)
    assert credit.grant(0.0, 0.01) is None


def take(credit: ReceiveCredit, now: float, seconds: float, round_trip: float) -> float:
    """Have as much come, in ``seconds``, as makes it time for a grant; the time after it."""
    credit.receive(credit.limit - credit.received - credit.window // 2)
    credit.grant(now + seconds, round_trip)
    return now + seconds


def test_a_window_doubles_while_it_is_taken_in_less_than_three_round_trips() -> None:
    budget = WindowBudget(100 * MAXIMUM_WINDOW)
    credit = ReceiveCredit(budget)
    now = take(credit, 0.0, 0.1, 0.1)
    assert credit.window == INITIAL_WINDOW
    now = take(credit, now, 0.14, 0.1)
    assert credit.window == 2 * INITIAL_WINDOW
    for _ in range(30):
        now = take(credit, now, 0.14, 0.1)
    assert credit.window == MAXIMUM_WINDOW
    assert budget.total - budget.left == MAXIMUM_WINDOW - INITIAL_WINDOW
    credit.release()
    credit.release()
    assert budget.left == budget.total


@pytest.mark.parametrize(
    ("rate", "round_trip", "window"),
    [(1e6, 0.02, INITIAL_WINDOW), (10e6, 0.02, 1 << 20), (60e6, 0.1, MAXIMUM_WINDOW), (200e6, 0.0003, 1 << 19)],
)
def test_a_window_comes_to_some_times_what_the_path_holds(rate: float, round_trip: float, window: int) -> None:
    """In bytes a second and seconds, from below and from above: a larger one would only make longer queues."""
    budget = WindowBudget(MAXIMUM_WINDOW)
    credit = ReceiveCredit(budget)
    now = 0.0
    for _ in range(50):
        now = take(credit, now, credit.window / 2 / rate, round_trip)
    assert credit.window == window
    assert window >= min(2 * rate * round_trip, MAXIMUM_WINDOW)
    for _ in range(50):
        now = take(credit, now, credit.window / 2 / 1e9, 1.0)
    assert credit.window == MAXIMUM_WINDOW
    for _ in range(50):
        now = take(credit, now, credit.window / 2 / rate, round_trip)
    assert window <= credit.window <= 2 * window
    assert budget.total - budget.left == credit.window - INITIAL_WINDOW


def test_a_pause_of_the_sender_costs_no_window() -> None:
    credit = ReceiveCredit(WindowBudget(MAXIMUM_WINDOW))
    now = 0.0
    for _ in range(20):
        now = take(credit, now, credit.window / 2 / 50e6, 0.05)
    before = credit.window
    assert before > 4 * INITIAL_WINDOW
    take(credit, now, 3600.0, 0.05)
    assert credit.window == before


def test_a_window_is_drained_when_nearly_all_has_come() -> None:
    credit = ReceiveCredit(WindowBudget(0))
    credit.receive(INITIAL_WINDOW * 7 // 8 - 1)
    assert not credit.is_drained
    credit.receive(1)
    assert credit.is_drained
    credit.grant(1.0, 0.1)
    assert not credit.is_drained


@pytest.mark.parametrize("round_trip", [None, 0.01])
def test_a_window_stays_where_the_path_is_slow_or_not_known(round_trip: float | None) -> None:
    credit = ReceiveCredit(WindowBudget(MAXIMUM_WINDOW))
    for turn in range(5):
        credit.receive(credit.limit - credit.received)
        credit.grant(turn * 1.0, round_trip)
    assert credit.window == INITIAL_WINDOW


def test_a_window_stays_when_the_budget_of_the_process_is_spent() -> None:
    credit = ReceiveCredit(WindowBudget(INITIAL_WINDOW - 1))
    for turn in range(5):
        credit.receive(credit.limit - credit.received)
        credit.grant(turn * 0.001, 1.0)
    assert credit.window == INITIAL_WINDOW


@given(
    st.lists(st.tuples(st.integers(1, 2_000_000), st.sampled_from([None, 0.001, 0.1, 9.0])), max_size=60),
    st.integers(0, 8 * MAXIMUM_WINDOW),
)
def test_no_more_is_under_way_than_the_window(steps: list[tuple[int, float | None]], total: int) -> None:
    """Whether it grows or falls: what is taken, after so many seconds or not at all, makes room."""
    budget = WindowBudget(total)
    sender, receiver = SendCredit(), ReceiveCredit(budget)
    untaken, now = 0, 0.0
    for size, takes in steps:
        sent = sender.spend(size)
        receiver.receive(sent)
        untaken += sent
        assert untaken <= receiver.window
        if takes is not None:
            untaken, now = 0, now + takes
            before = receiver.limit
            limit = receiver.grant(now, 0.1)
            if limit is not None:
                assert limit > before
                sender.raise_limit(limit)
    assert budget.total - budget.left == receiver.window - INITIAL_WINDOW


def test_limit_counts_from_what_has_left_and_not_from_what_was_written() -> None:
    credit = SendCredit()
    assert credit.raise_limit(2**62 - 1, 0)
    assert credit.spend(2**40) == MAXIMUM_WINDOW
    assert not credit.raise_limit(2**62 - 1, 3 * MAXIMUM_WINDOW)
    assert credit.raise_limit(2**62 - 1, MAXIMUM_WINDOW)
    assert credit.limit < 2 * MAXIMUM_WINDOW


@given(st.lists(st.integers(1, 100), min_size=1, max_size=50), st.data())
def test_limit_of_an_honest_receiver_is_never_cut(sizes: list[int], data: st.DataObject) -> None:
    """However small the frames are that wait, and whatever of them has left: what can be taken has left."""
    credit = SendCredit()
    credit.limit = 2**40
    for size in sizes:
        credit.spend(size)
    layout = [size + 2 for size in sizes]
    left = data.draw(st.integers(0, len(sizes)))
    queued = sum(layout[left:])
    credit.limit = 0
    honest = sum(sizes[:left]) + MAXIMUM_WINDOW
    assert credit.raise_limit(honest, queued)
    assert credit.limit == honest
