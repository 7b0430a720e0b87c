"""What the tests of one file share, made when the first of them asks for it. A file with other needs makes its own."""

from collections.abc import Iterator

import pytest

from quictunnel.quic.dial import Way
from tests.support.backends import RawBackend, echo
from tests.support.namespaces import Namespace, can_make_namespaces, two_namespaces
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


@pytest.fixture
def cable(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Namespace, Namespace]]:
    """Where the server's and where the client's sockets for links are."""
    if not can_make_namespaces():
        pytest.skip("network namespaces need root")
    with two_namespaces() as (here, there):
        original = Way.open

        def open_there(way: Way) -> None:
            with there.entered():
                original(way)

        monkeypatch.setattr(Way, "open", open_there)
        yield here, there
