from hypothesis import given
from hypothesis import strategies as st

from quictunnel.quic.path_mtu import BASE, LARGEST, PathMtu


def search(carries: int, limit: int, lost: int = 0) -> tuple[PathMtu, list[list[int]]]:
    """A whole search on a path that carries so much and loses the first ``lost`` flights, and the flights it took."""
    path = PathMtu()
    path.begin(limit, 0.0)
    flights: list[list[int]] = []
    while path.due is not None and path.due < 100.0:
        sizes = path.probes(path.due, 1.0)
        if sizes:
            flights.append(sizes)
            if len(flights) > lost:
                for size in sizes:
                    if size <= carries:
                        path.acknowledged(size)
    return path, flights


def test_a_first_hop_that_carries_no_more_than_the_base_is_not_probed() -> None:
    path, flights = search(9000, BASE)
    assert (path.size, path.due, flights) == (BASE, None, [])


def test_a_path_as_wide_as_its_first_hop_takes_one_probe() -> None:
    path, flights = search(1472, 1472)
    assert (path.size, path.due, flights) == (1472, None, [[1472]])


def test_the_loopback_is_used_up_to_the_largest_size() -> None:
    path, flights = search(65_507, 65_507)
    assert (path.size, flights) == (LARGEST, [[LARGEST]])


def test_a_narrower_path_takes_two_flights_to_find_its_size() -> None:
    path, flights = search(1400, 1472)
    assert path.size == 1400
    assert flights[:2] == [[1472], [1472, 1452, 1400, 1352, 1232]]


def test_a_flight_that_was_lost_by_chance_is_repeated() -> None:
    assert search(1472, 1472, lost=1)[0].size == 1472
    assert search(1472, 1472, lost=2)[0].size == 1472


def test_what_was_too_large_is_tried_again_after_ten_minutes() -> None:
    path, _ = search(1400, 1472)
    assert path.due is not None
    assert path.due > 600.0
    assert path.probes(path.due, 1.0) == [1472]


def test_a_path_that_falls_is_searched_again_ever_later() -> None:
    path, _ = search(1472, 1472)
    pauses = []
    for _ in range(9):
        path.fell(1472, 1000.0)
        assert path.size == BASE
        assert path.due is not None
        pauses.append(path.due - 1000.0)
        assert path.probes(path.due, 1.0) == [1472]
    assert pauses == [10.0, 20.0, 40.0, 80.0, 160.0, 320.0, 600.0, 600.0, 600.0]


def test_a_path_that_falls_and_may_grow_no_more_is_left_alone() -> None:
    path, _ = search(1472, 1472)
    path.fell(BASE, 0.0)
    assert (path.size, path.due) == (BASE, None)


def test_another_path_begins_anew() -> None:
    path, _ = search(1472, 1472)
    path.fell(1472, 0.0)
    path.begin(1452, 5.0)
    assert (path.size, path.due) == (BASE, 5.0)
    assert path.probes(5.0, 1.0) == [1452]


@given(st.integers(BASE, 70_000), st.integers(0, 70_000))
def test_a_search_ends_with_a_size_that_the_path_carries(carries: int, limit: int) -> None:
    path, flights = search(carries, limit)
    assert BASE <= path.size <= max(min(carries, limit, LARGEST), BASE)
    assert len(flights) <= 3
    assert sum(map(len, flights)) <= 20
