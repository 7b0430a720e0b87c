"""A network that loses, repeats, reorders, damages, delays and swallows packets, and changes addresses, under load.

The same faults, longer and with their figures: `python -m benchmarks.fleet`.
"""

from pathlib import Path
from typing import Any

import pytest

from tests.support import fleet

pytestmark = [pytest.mark.either, pytest.mark.timeout(300)]

MESS = {"duplicates": 0.3, "reorder": 0.2, "corrupt": 0.05, "loss": 0.01, "delay": 0.005}


def all_is_right(row: dict[str, Any]) -> None:
    assert (row["failed"], row["wrong"], row["damaged"], row["post_twice"], row["get_twice"]) == (0, 0, 0, 0, 0), row


@pytest.mark.slow
def test_packets_that_are_lost_repeated_reordered_and_damaged_change_no_request(
    engines: tuple[str, str], tmp_path: Path
) -> None:
    row = fleet.play(fleet.lossy(tmp_path, engines, MESS, count=60, size=5000, visitors=20))
    all_is_right(row)
    assert row["dropped"] > 0


@pytest.mark.slow
@pytest.mark.parametrize(
    "faults",
    [
        {"loss": 0.001, "delay": 0.1},
        {"loss": 0.02, "delay": 0.025},
        {"loss": 0.05, "delay": 0.005},
        {"duplicates": 0.3, "delay": 0.005},
        {"reorder": 0.2, "delay": 0.005},
        {"corrupt": 0.05, "delay": 0.005},
        {"delay": 0.02, "jitter": 0.02},
        {"delay": 0.02, "rate": 500_000.0, "queue": 64 * 1024},
        MESS,
    ],
    ids=lambda faults: ", ".join(f"{name} {value:g}" for name, value in faults.items()),
)
def test_requests_of_twenty_kilobytes_all_succeed_on_a_bad_network(
    faults: dict[str, float], engines: tuple[str, str], tmp_path: Path
) -> None:
    all_is_right(fleet.play(fleet.lossy(tmp_path, engines, faults, count=300, visitors=100, limit=150.0)))


@pytest.mark.slow
def test_packets_of_the_smallest_size_that_must_pass_are_all_that_is_needed(
    engines: tuple[str, str], tmp_path: Path
) -> None:
    # 1280 bytes of an IPv6 packet, less the 48 of its headers and UDP's.
    row = fleet.play(fleet.lossy(tmp_path, engines, {"mtu": 1232}, count=200, visitors=50))
    all_is_right(row)


@pytest.mark.slow
def test_port_that_changes_every_second_costs_no_request(engines: tuple[str, str], tmp_path: Path) -> None:
    row = fleet.play(fleet.rebinding(tmp_path, engines, seconds=8, rate=100))
    all_is_right(row)
    assert row["rebound"] == 8


@pytest.mark.slow
@pytest.mark.skipif(not fleet.offers("serve", "--hold"), reason="there is no --hold")
def test_network_that_is_gone_for_three_seconds_costs_no_request(engine: str, tmp_path: Path) -> None:
    row = fleet.play(fleet.blackhole(tmp_path, (engine, engine), seconds=3, after=8))
    all_is_right(row)


@pytest.mark.slow
def test_network_that_is_gone_for_longer_is_served_again_when_it_is_back(
    engines: tuple[str, str], tmp_path: Path
) -> None:
    row = fleet.play(fleet.blackhole(tmp_path, engines, seconds=12, after=20))
    assert (row["wrong"], row["post_twice"], row["failed_before"]) == (0, 0, 0), row
    assert row["first_success"] < 15.0, row


@pytest.mark.slow
def test_small_requests_are_not_held_up_by_a_download_on_a_lossy_path(engine: str, tmp_path: Path) -> None:
    row = fleet.play(fleet.bulk_beside(tmp_path, (engine, engine), rounds=2, each=200))
    all_is_right(row)
    assert row["p50_beside"] < 10 * row["p50_alone"], row
