"""What the parent of several server processes binds, and what each of them may use of the whole's limits."""

import errno
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from quictunnel.app import workers
from quictunnel.app.identity import Identity
from quictunnel.app.reload import server_config
from quictunnel.app.workers import Ports
from quictunnel.options import CommandError
from quictunnel.quic.engine import ServerIdentity
from quictunnel.settings import ServeSettings
from quictunnel.values import Address

ANY = Address("127.0.0.1", 0)


def settings(**changes: object) -> ServeSettings:
    return ServeSettings(**({"http": ANY, "quic": ANY, "workers": 3} | changes))  # type: ignore[arg-type]


@pytest.fixture
def taken() -> Iterator[tuple[Address, Address]]:
    """A TCP and a UDP port that somebody has who would share them."""
    with socket.socket() as tcp, socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as udp:
        for sock in (tcp, udp):
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            sock.bind(("127.0.0.1", 0))
        tcp.listen()
        yield Address(*tcp.getsockname()), Address(*udp.getsockname())


def test_each_worker_has_sockets_at_the_same_ports() -> None:
    with Ports(settings(https=ANY)) as ports:
        assert ports.bound.http[1] != 0
        assert ports.bound.quic[1] != 0
        assert ports.bound.https is not None
        given = ports._workers
        assert len(given) == 3
        for worker in given:
            assert [sock.getsockname() for sock in worker.http] == [ports.bound.http]
            assert [sock.getsockname() for sock in worker.https] == [ports.bound.https]
            assert worker.quic.getsockname() == ports.bound.quic
    assert all(sock.fileno() == -1 for sock in ports._all)


def test_every_address_of_a_host_is_bound() -> None:
    found = {info[4][0] for info in socket.getaddrinfo("localhost", 0, type=socket.SOCK_STREAM)}
    with Ports(settings(http=Address("localhost", 0))) as ports:
        for worker in ports._workers:
            assert {sock.getsockname()[0] for sock in worker.http} == found


def test_child_keeps_what_is_its_own() -> None:
    with Ports(settings()) as ports:
        mine = ports.leave_to(1)
        assert {sock.fileno() >= 0 for sock in (mine.quic, *mine.http)} == {True}
        assert sum(sock.fileno() >= 0 for sock in ports._all) == 2


def test_visitors_are_refused_at_the_end_and_datagrams_keep_their_ways() -> None:
    with Ports(settings()) as ports:
        socket.create_connection(ports.bound.http, timeout=5).close()
        ports.listen_no_more()
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(ports.bound.http, timeout=5)
        assert all(worker.quic.fileno() >= 0 for worker in ports._workers)


@pytest.mark.parametrize("option", ["http", "https", "quic"])
def test_port_that_somebody_has_is_not_shared(option: str, taken: tuple[Address, Address]) -> None:
    place = taken[option == "quic"]
    with pytest.raises(OSError, match=f"--{option} {place}: Address already in use") as caught:
        Ports(settings(**{option: place}))
    assert caught.value.errno == errno.EADDRINUSE


def test_another_port_is_tried_when_the_free_one_was_taken_just_then(monkeypatch: pytest.MonkeyPatch) -> None:
    share, refused = Ports._share, []

    def refuse_twice(self: Ports, *args: object) -> list[socket.socket]:
        if len(refused) < 2:
            refused.append(args)
            raise OSError(errno.EADDRINUSE, "taken")
        return share(self, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(Ports, "_share", refuse_twice)
    with Ports(settings()) as ports:
        assert ports.bound.quic[1] != 0
    assert len(refused) == 2


def test_system_that_cannot_steer_is_told_in_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    def steer(sock: socket.socket, count: int) -> None:
        raise OSError(errno.ENOPROTOOPT, "Protocol not available")

    monkeypatch.setattr(workers, "steer", steer)
    with pytest.raises(CommandError, match=r"--workers: this system cannot lead .*; use 1"):
        Ports(settings())


def test_limits_of_the_whole_are_divided() -> None:
    identity = Identity(ServerIdentity("/certificate", "/key"), "", None, None)
    whole = settings(workers=1, max_visitors=100, max_in_flight=10, max_held=7, window_budget=1000, state_dir=Path("/"))
    part = server_config(whole.model_copy(update={"workers": 3}), identity, 2)
    assert (part.worker, part.workers) == (2, 3)
    assert part.visitors.connections == 34
    assert (part.registry.in_flight, part.registry.held, part.window_budget) == (4, 3, 334)
    alone = server_config(whole, identity)
    assert (alone.worker, alone.workers) == (0, 1)
    assert (alone.visitors.connections, alone.registry.in_flight, alone.window_budget) == (100, 10, 1000)
