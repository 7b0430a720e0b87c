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

pytestmark = pytest.mark.either

Scenario = Callable[[Network, Link, Link], Awaitable[None]]


ONLY_FALLS = "qh3"
"whose datagrams never grow again once they had to become smaller, at a server's end not at all but on the loopback"


def expected(engines: tuple[str, str], size: int) -> list[int]:
    """What becomes of the datagrams of a client and a server on a path that is not the loopback."""
    return [size, BASE if engines[0] == ONLY_FALLS else size]


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


async def kept(link: Link, seconds: float, every: float = 2.0) -> None:
    """Let time pass on a link that is pinged, as its ends do it."""
    for _ in range(int(seconds / every)):
        link.ping()
        await asyncio.sleep(every)


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


def test_datagrams_stay_small_where_the_first_hop_is_not_known(
    engines: tuple[str, str], play: Callable[..., None]
) -> None:
    async def scenario(network: Network, client: Link, server: Link) -> None:
        echo(network)
        await exchanged(network, server)
        await kept(client, 700.0)
        # qh3's client has a search of its own, up to what an Ethernet carries.
        assert network.largest == {True: 1472 if engines[1] == "qh3" else BASE, False: BASE}

    play(scenario, first_hop=BASE)


@pytest.mark.parametrize(("mtu", "found"), [(1280, 1232), (1400, 1400), (1471, 1452)])
def test_a_hole_below_the_first_hop_is_found_and_nothing_fails(
    mtu: int, found: int, engines: tuple[str, str], play: Callable[..., None]
) -> None:
    async def scenario(network: Network, client: Link, server: Link) -> None:
        echo(network)
        await exchanged(network, server)
        await network.until(lambda: sizes(client, server) == expected(engines, found), 10.0)
        await exchanged(network, server)

    play(scenario, first_hop=1472, mtu=mtu)


@pytest.mark.parametrize("mtu", [1200, 1280, 1472, 8972])
def test_a_link_comes_up_and_works_where_the_loopback_is_not_one(
    mtu: int, engines: tuple[str, str], play: Callable[..., None]
) -> None:
    """As behind a proxy or a network of containers on the same machine."""

    if mtu < 1280 and engines[1] == ONLY_FALLS:
        pytest.skip("its handshake takes longer there than an attempt may")

    async def scenario(network: Network, client: Link, server: Link) -> None:
        echo(network)
        assert network.loop.time() < (1000.1 if mtu >= 1280 else 1008.0)
        await exchanged(network, server)
        found = next(size for size in (8952, 1472, 1232, 1200) if size <= mtu)
        await network.until(lambda: sizes(client, server) == [found, found], 10.0)
        await exchanged(network, server)

    play(scenario, mtu=mtu)


def test_a_path_that_has_become_wider_is_used_within_ten_minutes(
    engines: tuple[str, str], play: Callable[..., None]
) -> None:
    async def scenario(network: Network, client: Link, server: Link) -> None:
        await kept(client, 10.0)
        network.mtu = 1472
        await kept(client, 620.0)
        assert client.datagram_size == (1400 if engines[1] == ONLY_FALLS else 1472)
        assert server.datagram_size == (BASE if engines[0] == ONLY_FALLS else 1472)

    play(scenario, first_hop=1472, mtu=1400)


@pytest.mark.parametrize("first_hop", [1472, 65_507])
@pytest.mark.parametrize("hole", [1200, 1280])
def test_a_hole_that_opens_in_the_middle_of_a_transfer_makes_datagrams_small(
    hole: int, first_hop: int, engines: tuple[str, str], play: Callable[..., None]
) -> None:
    async def scenario(network: Network, client: Link, server: Link) -> None:
        echo(network)
        before = expected(engines, 1472) if first_hop == 1472 else [LARGEST, LARGEST]
        await network.until(lambda: sizes(client, server) == before, 2.0)
        _, visitor = opened(network, server, POST, Data(BODY))
        await network.until(lambda: len(visitor.body) > len(BODY) // 2)
        network.mtu = hole
        visitor.peer.receive(Data(BODY))
        visitor.peer.receive(End())
        began = network.loop.time()
        pinging = asyncio.gather(kept(client, 60.0, every=0.5), kept(server, 60.0, every=1.0))
        await network.until(lambda: visitor.ended or bool(visitor.errors))
        pinging.cancel()
        assert (visitor.body == BODY * 2, visitor.errors) == (True, [])
        assert network.loop.time() - began < 5.0
        assert server.datagram_size == BASE
        # What a client sends back may be in pieces as small as those in which it came.
        assert client.datagram_size in ([BASE] if before[1] > BASE else [BASE, before[0]])

    play(scenario, first_hop=first_hop)


def test_a_hole_is_found_while_small_exchanges_go_on(engines: tuple[str, str], play: Callable[..., None]) -> None:
    """What is acknowledged of them hides that nothing large is."""

    async def scenario(network: Network, client: Link, server: Link) -> None:
        echo(network)
        await network.until(lambda: sizes(client, server) == expected(engines, 1472), 2.0)
        network.mtu = 1280
        _, visitor = opened(network, server, POST, Data(BODY), End())
        pinging = asyncio.gather(kept(client, 60.0, every=0.5), kept(server, 60.0, every=1.0))
        while not visitor.ended:
            assert not visitor.errors
            assert network.loop.time() < 1010.0
            small = opened(network, server, POST, Data(b"small"), End())[1]
            await network.until(lambda small=small: small.ended or bool(small.errors), 5.0)  # type: ignore[misc]
            await asyncio.sleep(0.01)
        pinging.cancel()
        assert visitor.body == BODY

    play(scenario, first_hop=1472)


def test_datagrams_grow_again_when_the_hole_is_gone(engines: tuple[str, str], play: Callable[..., None]) -> None:
    async def scenario(network: Network, client: Link, server: Link) -> None:
        echo(network)
        before = expected(engines, 1472)
        await network.until(lambda: sizes(client, server) == before, 2.0)
        network.mtu = 1280
        pinging = asyncio.gather(kept(client, 60.0, every=0.5), kept(server, 60.0, every=1.0))
        await exchanged(network, server)
        pinging.cancel()
        network.mtu = 1472
        await kept(client, 30.0)
        after = [size if name == "aioquic" else BASE for size, name in zip(before, reversed(engines), strict=True)]
        assert sizes(client, server) == after

    play(scenario, first_hop=1472)


def test_losses_by_chance_do_not_make_datagrams_small(engines: tuple[str, str], play: Callable[..., None]) -> None:
    async def scenario(network: Network, client: Link, server: Link) -> None:
        echo(network)
        before = expected(engines, 1472)
        await network.until(lambda: sizes(client, server) == before, 2.0)
        count = 0

        def lose(data: bytes, to_server: bool) -> bool:
            nonlocal count
            count += 1
            return count % 12 == 0

        network.lose = lose
        for _ in range(5):
            await exchanged(network, server)
        assert sizes(client, server) == before

    play(scenario, first_hop=1472)


def test_a_link_whose_path_changes_measures_the_new_one(engines: tuple[str, str], play: Callable[..., None]) -> None:
    async def scenario(network: Network, client: Link, server: Link) -> None:
        echo(network)
        await network.until(lambda: sizes(client, server) == expected(engines, 1472), 2.0)
        network.mtu = 1280
        network.largest = {True: 0, False: 0}
        client.path_changed()
        assert client.datagram_size == BASE
        await exchanged(network, server)
        await network.until(lambda: client.datagram_size == 1232, 10.0)

    play(scenario, first_hop=1472)


def test_a_link_whose_datagrams_have_become_small_goes_on_from_another_address(play: Callable[..., None]) -> None:
    async def scenario(network: Network, client: Link, server: Link) -> None:
        echo(network)
        await kept(client, 4.0, 0.5)
        assert server.datagram_size == LARGEST
        server._path_fell()
        (home,) = network.clients
        for address in (("10.0.1.1", 60_001), home, ("10.0.1.1", 60_002)):
            network.clients = {address: client}
            client._send = lambda datagrams, source=address: [  # type: ignore[misc]
                network._carry(data, True, network.listener.datagram_received, source) for data, _ in datagrams
            ]
            await kept(client, 4.0, 0.5)
            assert client.silent_for() < 1.0
            assert server.address == address
            await exchanged(network, server)
        assert server.closed is None

    play(scenario)
