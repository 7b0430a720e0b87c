"""How far a sender may be ahead, over a path that carries so much and no more, under a turned clock."""

import pytest

from quictunnel.exchange import VOID
from quictunnel.wire.frames import Data, End, Frame, RequestHead, ResponseHead
from tests.support.clock import run
from tests.support.memory import Network, Recorder, opened

pytestmark = pytest.mark.either

GET = RequestHead(b"GET", b"http", b"app.localhost", b"/", [])
PIECE = bytes(50_000)


class Endless(Recorder):
    """A visitor that takes all of a long answer, and keeps none of it."""

    def receive(self, frame: Frame) -> None:
        if isinstance(frame, Data):
            self.taken += len(frame.data)

    taken = 0


async def download(network: Network) -> Endless:
    """A download that never ends, from the client's backend to a visitor; begun, and no more."""
    _, server = await network.joined()
    leg, _ = opened(network, server, GET, End())
    visitor = Endless()
    leg.peer, visitor.peer = visitor, leg
    await network.until(lambda: bool(network.client_owner.legs))
    backend = network.client_owner.legs[0]
    backend.peer.receive(ResponseHead(200, []))

    def go_on() -> None:
        while not backend.paused and backend.peer is not VOID:
            backend.peer.receive(Data(PIECE))

    def resume() -> None:
        backend.paused = False
        network.loop.call_soon(go_on)

    backend.resume = resume  # type: ignore[method-assign]
    go_on()
    return visitor


@pytest.mark.parametrize("rate", [500_000, 1_000_000])
def test_transfer_without_a_pause_keeps_no_longer_queue_than_it_began_with(rate: int, engines: tuple[str, str]) -> None:
    """The round trip that its own queue makes does not make it longer, however long it goes on."""

    async def work() -> None:
        network = Network(*engines, delay=0.005)
        network.first_hop = 16_000
        network.rate = rate
        visitor = await download(network)
        began = network.loop.time()
        await network.until(lambda: visitor.taken > 45 * rate, 60.0)
        assert network.server_budget.left == network.server_budget.total
        assert network.loop.time() - began < 52.0
        assert 0.01 <= (network.server_owner.links[0].least_round_trip or 0.0) < 0.1
        await network.close()

    run(work())


def test_window_grows_to_what_the_path_carries(engines: tuple[str, str]) -> None:
    async def work() -> None:
        network = Network(*engines, delay=0.05)
        network.first_hop = 16_000
        network.rate = 20_000_000
        visitor = await download(network)
        await network.until(lambda: visitor.taken > 20_000_000)
        began, taken = network.loop.time(), visitor.taken
        await network.until(lambda: visitor.taken - taken > 40_000_000)
        assert network.loop.time() - began < 2.6
        await network.close()

    run(work())
