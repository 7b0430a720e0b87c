"""What the tests of one file share, made when the first of them asks for it. A file with other needs makes its own."""

from collections.abc import Iterator

import pytest

from tests.support.backends import RawBackend, echo
from tests.support.processes import Processes


@pytest.fixture(scope="module")
def processes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Processes]:
    """Starts commands, which all end with the file's last test."""
    with Processes(tmp_path_factory.mktemp("processes")) as processes:
        yield processes


@pytest.fixture(scope="module")
def raw() -> Iterator[RawBackend]:
    """A backend whose handler each test sets."""
    with RawBackend(echo) as backend:
        yield backend
