"""How many processes a pool decides to have: each reason to grow, to shrink, and to leave it as it is."""

from collections.abc import Callable, Iterable
from itertools import pairwise

import pytest

from quictunnel.app.scaling import COMPARABLE, IDLE_TIME, Decision, Sample, Scaling

STEP = 0.5


def sample(cpu: float = 0.0, lag: float = 0.001, served: float = 100.0, worst: float = 0.0) -> Sample:
    return Sample(cpu, lag, worst or 2 * lag, served)


BUSY = sample(0.95)
LATE = sample(0.1, lag=0.05)
HALF = sample(0.5)
IDLE = sample(0.01)


class Pool:
    """A pool whose processes do as it decides, a step after."""

    def __init__(self, lowest: int = 1, highest: int = 4, count: int = 1) -> None:
        self.scaling = Scaling(lowest, highest)
        self.now = 100.0
        self.count = count
        self.decisions: list[Decision] = []

    def run(self, seconds: float, each: Sample | Callable[[int], Sample], *, obey: bool = True) -> list[int]:
        """Let time pass under a load, or under what ``each`` says of so many processes; the numbers decided on."""
        before = len(self.decisions)
        for _ in range(round(seconds / STEP)):
            self.now += STEP
            one = each(self.count) if callable(each) else each
            decision = self.scaling.observe(self.now, dict.fromkeys(range(self.count), one))
            if decision is not None:
                self.decisions.append(decision)
                if obey:
                    self.count = decision.processes
        return [decision.processes for decision in self.decisions[before:]]

    @property
    def text(self) -> str:
        return self.decisions[-1].text


def shared(work: float, served: float, best: int = 100) -> Callable[[int], Sample]:
    """A load of ``work`` processors; of more than ``best`` processes none serves more."""

    def each(count: int) -> Sample:
        return sample(min(1.0, work / count), served=served * min(count, best) / count)

    return each


# Growing


@pytest.mark.parametrize(
    ("load", "text"),
    [
        (sample(0.93, worst=0.041), "1 -> 2 processes: 93% busy for 2.0 s, worst lag 41 ms"),
        (sample(0.2, lag=0.035, worst=0.12), "1 -> 2 processes: event loop 35 ms late for 2.0 s, worst lag 120 ms"),
    ],
)
def test_grows_when_it_has_been_busy_for_two_seconds(load: Sample, text: str) -> None:
    pool = Pool()
    pool.run(10, IDLE)
    assert pool.run(2, load) == []
    assert pool.run(STEP, load) == [2]
    assert pool.text == text


@pytest.mark.parametrize("load", [IDLE, HALF, sample(0.8), sample(0.1, lag=0.03)])
def test_does_not_grow_without_need(load: Sample) -> None:
    assert Pool().run(60, load) == []


def test_short_bursts_are_no_reason_to_grow() -> None:
    pool = Pool()
    for _ in range(20):
        assert pool.run(2, BUSY) == []
        assert pool.run(STEP, HALF) == []


def test_grows_step_by_step_and_lets_each_process_take_its_part_first() -> None:
    pool = Pool()
    pool.run(10, IDLE)
    grown_at = []
    for count in (2, 3, 4):
        while pool.count < count:
            pool.run(STEP, shared(3.5, 1000))
        grown_at.append(pool.now)
    assert [later - earlier for earlier, later in pairwise(grown_at)] == [4.5, 4.5]
    assert pool.run(60, shared(2.8, 1000)) == [], "now it is enough"


def test_never_goes_past_its_bounds_and_says_so_once() -> None:
    pool = Pool(1, 2)
    assert pool.run(120, shared(9, 1000)) == [2, 2]
    assert pool.text.startswith("staying at 2 processes, the most there may be: 100% busy")
    pool.run(40, HALF)
    assert pool.run(10, shared(9, 1000)) == [2], "and again when it is another load"


def test_fixed_number_never_changes() -> None:
    pool = Pool(3, 3, count=3)
    pool.run(60, IDLE)
    assert pool.run(20, BUSY) == [3]
    assert pool.count == 3


def test_average_counts_not_the_busiest() -> None:
    scaling = Scaling(1, 4)
    for step in range(40):
        assert scaling.observe(step * STEP, {0: sample(1.0), 1: sample(0.5)}) is None


# Where growth ends


def test_stops_growing_when_one_more_did_not_raise_what_is_achieved() -> None:
    pool = Pool()
    assert pool.run(60, shared(9, 1000, best=2)) == [2, 3, 3]
    assert pool.text.startswith(
        "staying at 3 processes: 2,000 requests/s, and 2,000 with one less: more would not help"
    )
    assert pool.run(300, shared(9, 1000, best=2)) == [], "for as long as the load stays"


def test_another_load_is_tried_anew() -> None:
    pool = Pool()
    pool.run(60, shared(9, 1000, best=2))
    pool.run(40, HALF)
    pool.run(COMPARABLE, HALF)
    assert pool.run(10, shared(9, 1000))[0] == 4


def test_what_was_achieved_long_ago_says_nothing() -> None:
    pool = Pool()
    pool.run(5, shared(9, 1000))
    assert pool.count == 2
    pool.run(COMPARABLE, sample(0.6))
    assert pool.run(5, sample(0.99, served=1.0)) == [3], "requests may be a hundred times as large by now"


def test_load_without_requests_is_no_reason_not_to_grow() -> None:
    pool = Pool()
    assert pool.run(60, sample(0.9, served=0.0))[:3] == [2, 3, 4], "long answers and WebSockets are work too"


# Shrinking


def test_shrinks_when_its_work_has_fitted_into_one_less_for_ten_seconds() -> None:
    pool = Pool(count=2)
    pool.run(20, sample(0.5))
    assert pool.run(IDLE_TIME, sample(0.2)) == []
    assert pool.run(STEP, sample(0.2)) == [1]
    assert pool.text == "2 -> 1 process: with one less 40% busy, for 10 s"
    assert pool.run(60, IDLE) == []


@pytest.mark.parametrize(("count", "cpu", "after"), [(4, 0.36, 3), (4, 0.38, 4), (2, 0.24, 1), (2, 0.26, 2)])
def test_one_less_must_be_less_than_half_busy(count: int, cpu: float, after: int) -> None:
    pool = Pool(count=count)
    pool.run(IDLE_TIME + 3, sample(cpu))
    assert pool.count == after


def test_moment_of_work_begins_the_wait_anew() -> None:
    pool = Pool(count=2)
    for _ in range(5):
        assert pool.run(9, IDLE) == []
        assert pool.run(1, HALF) == []


def test_falls_back_to_the_lower_bound_step_by_step() -> None:
    pool = Pool(2, 4, count=4)
    assert pool.run(120, IDLE) == [3, 2]


def test_late_event_loops_are_no_idle_ones() -> None:
    assert Pool(1, 2, count=2).run(60, LATE) == [2], "staying"


def test_pool_that_had_to_grow_again_waits_longer_each_time() -> None:
    pool = Pool(1, 2)
    waits = []
    for _ in range(8):
        while pool.count == 1:
            pool.run(STEP, shared(1.0, 1000))
        began = pool.now
        while pool.count == 2:
            pool.run(STEP, IDLE)
        waits.append(round(pool.now - began))
    settled = waits[0] - IDLE_TIME
    assert [wait - settled for wait in waits] == [10, 20, 40, 80, 160, 300, 300, 300]
    pool.run(COMPARABLE, IDLE)
    while pool.count == 1:
        pool.run(STEP, shared(1.0, 1000))
    began = pool.now
    while pool.count == 2:
        pool.run(STEP, IDLE)
    assert pool.now - began - settled == pytest.approx(IDLE_TIME, abs=1), "after a longer rest it begins anew"


# What it does not know


@pytest.mark.parametrize("load", [BUSY, IDLE])
@pytest.mark.parametrize("silent", [(0,), (1,), (0, 1)])
def test_decides_nothing_while_one_is_silent(load: Sample, silent: Iterable[int]) -> None:
    scaling = Scaling(1, 4)
    for step in range(100):
        samples: dict[int, Sample | None] = {0: load, 1: load} | dict.fromkeys(silent)
        assert scaling.observe(step * STEP, samples) is None


def test_silence_begins_every_wait_anew() -> None:
    pool = Pool()
    pool.run(10, IDLE)
    pool.run(2, BUSY)
    assert pool.scaling.observe(pool.now + STEP, {0: None}) is None
    pool.now += 2 * STEP
    assert pool.run(2, BUSY) == []
    assert pool.run(STEP, BUSY) == [2]


def test_no_process_is_nothing_to_decide_on() -> None:
    assert Scaling(1, 4).observe(1.0, {}) is None
