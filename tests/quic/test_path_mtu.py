"""How large datagrams become on a path, and what becomes of a link whose path carries less than it did."""

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from quictunnel.quic.link import Link
from quictunnel.quic.path_mtu import BASE, LARGEST
from quictunnel.wire.frames import Data, End, RequestHead, ResponseHead
from tests.support.clock import run
from tests.support.memory import Network, Recorder, opened

POST = RequestHead(b"POST", b"http", b"app.localhost", b"/", [], True)
OK = ResponseHead(200, [])
BODY = bytes(range(256)) * 400

Scenario = Callable[[Network, Link, Link], Awaitable[None]]


@pytest.fixture
def engines() -> tuple[str, str]:
    """On aioquic: qh3 has its own search, of which only its client's end takes part."""
    return "aioquic", "aioquic"


@pytest.fixture
def play(engines: tuple[str, str]) -> Callable[[Scenario], None]:
    """Runs a scenario on a link that is ready, on a path of which only the ends know so far."""

    def play(scenario: Scenario, *, first_hop: int = 65_507, mtu: int = 65_507) -> None:
        async def work() -> None:
            network = Network(*engines)
            network.first_hop, network.mtu = first_hop, mtu
            client, server = await network.joined()
            try:
                await scenario(network, client, server)
                assert (client.closed, server.closed) == (None, None)
            finally:
                await network.close()

        run(work())

    return play


def sizes(*links: Link) -> list[int]:
    return [link.datagram_size for link in links]


def echo(network: Network) -> None:
    """Have the client's backend send back what it gets."""

    def on_request(leg: object, head: RequestHead, backend: Recorder) -> None:
        backend.peer.receive(OK)

        def on_frame(frame: object) -> None:
            if isinstance(frame, Data | End):
                backend.peer.receive(frame)

        backend.on_frame = on_frame

    network.client_owner.on_request = on_request


async def kept(client: Link, seconds: float) -> None:
    """Let time pass on a link that is pinged as its client does it."""
    for _ in range(int(seconds / 2.0)):
        client.ping()
        await asyncio.sleep(2.0)


async def exchanged(network: Network, server: Link) -> None:
    """A body crosses there and back."""
    _, visitor = opened(network, server, POST, Data(BODY), End())
    await network.until(lambda: visitor.ended or bool(visitor.errors))
    assert (visitor.body, visitor.errors) == (BODY, [])


def test_datagrams_grow_to_what_the_loopback_carries(play: Callable[..., None]) -> None:
    async def scenario(network: Network, client: Link, server: Link) -> None:
        echo(network)
        await network.until(lambda: sizes(client, server) == [LARGEST, LARGEST], 2.0)
        network.largest = {True: 0, False: 0}
        await exchanged(network, server)
        assert min(network.largest.values()) > LARGEST - 200

    play(scenario)


def test_datagrams_stay_at_1200_bytes_where_the_first_hop_is_not_known(play: Callable[..., None]) -> None:
    async def scenario(network: Network, client: Link, server: Link) -> None:
        echo(network)
        await exchanged(network, server)
        await kept(client, 700.0)
        assert max(network.largest.values()) == BASE

    play(scenario, first_hop=BASE)


@pytest.mark.parametrize(("mtu", "found"), [(1280, 1232), (1400, 1400), (1471, 1452), (1472, 1472)])
def test_a_hole_below_the_first_hop_is_found_and_nothing_fails(mtu: int, found: int, play: Callable[..., None]) -> None:
    async def scenario(network: Network, client: Link, server: Link) -> None:
        echo(network)
        await exchanged(network, server)
        await network.until(lambda: sizes(client, server) == [found, found], 10.0)
        await exchanged(network, server)
        network.mtu = 1472
        await kept(client, 620.0)
        assert sizes(client, server) == [1472, 1472]

    play(scenario, first_hop=1472, mtu=mtu)


@pytest.mark.parametrize("hole", [1200, 1280])
def test_a_hole_that_opens_in_the_middle_of_a_transfer_makes_datagrams_small(
    hole: int, play: Callable[..., None]
) -> None:
    async def scenario(network: Network, client: Link, server: Link) -> None:
        echo(network)
        await network.until(lambda: sizes(client, server) == [1472, 1472], 2.0)
        _, visitor = opened(network, server, POST, Data(BODY))
        await network.until(lambda: len(visitor.body) > len(BODY) // 2)
        network.mtu = hole
        visitor.peer.receive(Data(BODY))
        visitor.peer.receive(End())
        began = network.loop.time()
        await network.until(lambda: visitor.ended or bool(visitor.errors))
        assert (visitor.body == BODY * 2, visitor.errors) == (True, [])
        assert network.loop.time() - began < 4.0  # before the link is suspect
        assert sizes(client, server) == [BASE, BASE]

    play(scenario, first_hop=1472)


def test_datagrams_grow_again_when_the_hole_is_gone(play: Callable[..., None]) -> None:
    async def scenario(network: Network, client: Link, server: Link) -> None:
        echo(network)
        await network.until(lambda: sizes(client, server) == [1472, 1472], 2.0)
        network.mtu = 1280
        await exchanged(network, server)
        network.mtu = 1472
        await network.until(lambda: sizes(client, server) == [1472, 1472], 30.0)

    play(scenario, first_hop=1472)


def test_losses_by_chance_do_not_make_datagrams_small(play: Callable[..., None]) -> None:
    async def scenario(network: Network, client: Link, server: Link) -> None:
        echo(network)
        await network.until(lambda: sizes(client, server) == [1472, 1472], 2.0)
        count = 0

        def lose(data: bytes, to_server: bool) -> bool:
            nonlocal count
            count += 1
            return count % 12 == 0

        network.lose = lose
        for _ in range(5):
            await exchanged(network, server)
        assert sizes(client, server) == [1472, 1472]

    play(scenario, first_hop=1472)


def test_a_link_whose_path_changes_measures_the_new_one(play: Callable[..., None]) -> None:
    async def scenario(network: Network, client: Link, server: Link) -> None:
        echo(network)
        await network.until(lambda: sizes(client, server) == [1472, 1472], 2.0)
        network.mtu = 1280
        network.largest = {True: 0, False: 0}
        client.path_changed()
        await exchanged(network, server)
        await network.until(lambda: client.datagram_size == 1232, 10.0)

    play(scenario, first_hop=1472)
