"""The fuzz targets hold for their seeds and for some thousands of edits of them; ``python -m tests.fuzz`` goes on."""

import random

import pytest

from tests.fuzz.__main__ import NAMES, mutate
from tests.fuzz.targets import SEEDS, TARGETS


def test_every_target_has_a_name_and_seeds() -> None:
    assert set(NAMES) == set(TARGETS) == set(SEEDS)


@pytest.mark.parametrize("name", NAMES)
def test_nothing_is_found_within_a_moment(name: str) -> None:
    rng = random.Random(name)
    for seed in SEEDS[name]:
        TARGETS[name](seed)
    for _ in range(1000):
        data = mutate(rng.choice(SEEDS[name]), rng)
        try:
            TARGETS[name](data)
        except Exception as error:
            raise AssertionError(f"{name}: {data!r}") from error
