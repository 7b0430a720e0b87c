"""Clients and servers come and go under load: what may fail, fails; nothing else does, and nothing is delivered twice.

The same stories, longer and with their figures: `python -m benchmarks.fleet`.
"""

from pathlib import Path
from typing import Any

import pytest

from tests.support import fleet
from tests.support.namespaces import can_make_namespaces

pytestmark = [pytest.mark.either, pytest.mark.timeout(240)]


def nothing_is_amiss(row: dict[str, Any]) -> None:
    """Whatever failed: no answer was another's, no upload was damaged, no POST came to a backend twice."""
    assert (row["wrong"], row["damaged"], row["post_twice"]) == (0, 0, 0), row


def test_client_that_is_stopped_and_started_again_costs_no_request(engine: str, tmp_path: Path) -> None:
    row = fleet.play(fleet.clients_leave(tmp_path, (engine, engine), kill=False, times=1, rate=40))
    nothing_is_amiss(row)
    assert row["failed"] == 0, row
    assert row["get_twice"] == 0
    assert row["sent"] > 80


@pytest.mark.slow
def test_clients_that_are_stopped_over_and_over_cost_no_request(engines: tuple[str, str], tmp_path: Path) -> None:
    row = fleet.play(fleet.clients_leave(tmp_path, engines, kill=False, times=4, rate=150))
    nothing_is_amiss(row)
    assert row["failed"] == 0, row


@pytest.mark.slow
def test_killed_client_costs_only_posts_that_it_had_already_got(engines: tuple[str, str], tmp_path: Path) -> None:
    row = fleet.play(fleet.clients_leave(tmp_path, engines, kill=True, times=3, rate=150))
    nothing_is_amiss(row)
    assert row["failed_get"] == 0, row
    # What came to its socket and no further is the same to the server as what came to its backend: a few each time.
    assert row["failed_post_undelivered"] <= 5 * 3, row


@pytest.mark.slow
@pytest.mark.skipif(not fleet.offers("serve", "--takeover"), reason="there is no --takeover")
def test_server_that_is_taken_over_costs_no_request(engine: str, tmp_path: Path) -> None:
    row = fleet.play(fleet.takeover(tmp_path, (engine, engine), times=3, rate=100))
    nothing_is_amiss(row)
    assert row["failed"] == row["closed_kept_post"], row
    # A POST on a kept connection that is being closed is the visitor's risk: it is told by the ledger that none came.
    assert row["failed_post_delivered"] == 0, row


@pytest.mark.slow
def test_every_request_gets_its_own_answer_while_clients_are_killed_at_random(
    engines: tuple[str, str], tmp_path: Path
) -> None:
    row = fleet.play(fleet.nonces(tmp_path, engines, count=3000, rate=150))
    nothing_is_amiss(row)
    assert row["killed"] >= 4
    # An answer that has begun cannot be repeated by anybody but its visitor.
    cut = row["kinds"].get("cut within the answer", 0)
    assert row["failed_get"] <= cut, row


@pytest.mark.slow
def test_clients_serve_again_soon_after_their_server_was_killed_and_started_again(
    engines: tuple[str, str], tmp_path: Path
) -> None:
    row = fleet.play(fleet.server_killed(tmp_path, engines, times=3, clients=3))
    assert row["longest"] < 10.0, row


@pytest.mark.slow
def test_request_to_one_of_many_tunnels_is_answered_by_it(engine: str, tmp_path: Path) -> None:
    row = fleet.play(fleet.many_clients(tmp_path, (engine, engine), count=200, requests=100))
    nothing_is_amiss(row)
    assert row["failed"] == 0, row
    assert row["kb_per_session"] < 500, row


@pytest.mark.slow
@pytest.mark.skipif(not can_make_namespaces(), reason="needs root and network namespaces")
def test_client_whose_address_changes_or_whose_link_goes_down_is_back_by_itself(engine: str, tmp_path: Path) -> None:
    for row in fleet.play(fleet.moving_client(tmp_path, (engine, engine))):
        nothing_is_amiss(row)
        assert row["first_success"] < 15.0, row
        # Only what was under way on the old address may fail.
        assert row["failed"] < row["sent"] / 4, row
