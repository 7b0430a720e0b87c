"""How many round trips an exchange takes, on each engine, by a clock that the test turns: nobody waits for a timer."""

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from quictunnel.quic.link import Link
from quictunnel.quic.path_mtu import LARGEST
from quictunnel.quic.stream import StreamLeg
from quictunnel.wire.frames import Data, End, Frame, RequestHead, ResponseHead
from tests.support.clock import run
from tests.support.memory import Network, Recorder, opened

GET = RequestHead(b"GET", b"http", b"app.localhost", b"/", [])
POST = RequestHead(b"POST", b"http", b"app.localhost", b"/", [], True)

ROUND_TRIP = 0.05
ETHERNET = 1472
"bytes of a datagram"

Scenario = Callable[["Distance"], Awaitable[None]]


class Distance:
    """A link at a distance, whose client answers each request at once."""

    def __init__(self, network: Network, server: Link) -> None:
        self.network = network
        self.server = server
        self.size = 100
        self.wait = 0.0  # of the backend
        network.client_owner.on_request = self._requested

    def _requested(self, leg: StreamLeg, head: RequestHead, backend: Recorder) -> None:
        def on_frame(frame: Frame) -> None:
            if isinstance(frame, End):
                asyncio.get_running_loop().call_later(self.wait, answer)

        def answer() -> None:
            for each in (ResponseHead(200, []), Data(b"x" * self.size), End()):
                leg.receive(each)

        backend.on_frame = on_frame

    def ask(self, upload: int = 0) -> "asyncio.Future[tuple[float, float]]":
        """Send a request; its round trips until the first and the last of the answer has come."""
        loop = asyncio.get_running_loop()
        came: asyncio.Future[tuple[float, float]] = loop.create_future()
        began, times = loop.time(), list[float]()

        def on_frame(frame: Frame) -> None:
            times.append((loop.time() - began) / ROUND_TRIP)
            if isinstance(frame, End):
                came.set_result((times[0], times[-1]))

        head = (POST, Data(b"y" * upload)) if upload else (GET,)
        _, visitor = opened(self.network, self.server, *head, End())
        visitor.on_frame = on_frame
        return came


@pytest.fixture
def play(engine: str) -> Callable[..., None]:
    """Runs a scenario on a link that has just come up, on a path that carries datagrams of so many bytes."""

    def play(scenario: Scenario, size: int) -> None:
        async def work() -> None:
            network = Network(engine, engine, delay=ROUND_TRIP / 2)
            network.first_hop = network.mtu = size
            client, server = await network.joined()
            try:
                await scenario(Distance(network, server))
                assert (client.closed, server.closed) == (None, None)
            finally:
                await network.close()

        run(work())

    return play


@pytest.mark.parametrize(("size", "since"), [(ETHERNET, 0.0), (LARGEST, 1.0)])
def test_a_lone_request_takes_one_round_trip(size: int, since: float, play: Callable[..., None]) -> None:
    """The first on a link, one after the other, and after pauses.

    Where datagrams are large a link's own first words are a window's worth of them, by qh3's count.
    """

    async def scenario(distance: Distance) -> None:
        took = []
        for pause in (since, *[0.0] * 10, 1.0, 0.0, 5.0, 0.0, 0.0, 0.0):
            await asyncio.sleep(pause)
            took.append((await distance.ask())[1])
        assert [round(each, 3) for each in took] == [1.0] * len(took)

    play(scenario, size)


def test_a_request_that_was_acknowledged_before_its_answer_takes_one_round_trip(play: Callable[..., None]) -> None:
    async def scenario(distance: Distance) -> None:
        wait = distance.wait = 0.004
        await asyncio.sleep(1.0)
        took = [(await distance.ask())[1] for _ in range(10)]
        assert [round(each, 3) for each in took] == [round(1.0 + wait / ROUND_TRIP, 3)] * len(took)

    play(scenario, ETHERNET)


def test_a_lone_request_and_its_answer_are_a_datagram_each(engine: str, play: Callable[..., None]) -> None:
    """With qh3: each takes the acknowledgement of the one before with it, and says that streams have ended."""

    async def scenario(distance: Distance) -> None:
        await asyncio.sleep(1.0)
        await distance.ask()
        network = distance.network
        network.datagrams = {True: 0, False: 0}
        for _ in range(10):
            await distance.ask()
        most = {"qh3": 11, "aioquic": 30}[engine]  # with a ping among them
        assert (network.datagrams[True] <= most, network.datagrams[False] <= most) == (True, True), network.datagrams

    play(scenario, ETHERNET)


def test_requests_that_overlap_do_not_wait_for_each_other(play: Callable[..., None]) -> None:
    async def scenario(distance: Distance) -> None:
        under_way = []
        for _ in range(50):
            under_way.append(distance.ask())
            await asyncio.sleep(ROUND_TRIP / 5)
        took = [(await each)[1] for each in under_way]
        assert [round(each, 3) for each in took] == [1.0] * len(took)

    play(scenario, ETHERNET)


@pytest.mark.parametrize(
    ("size", "most"),
    [(10_000, 1.5), (100_000, 4.5), pytest.param(1_000_000, 9.5, marks=pytest.mark.slow)],
)
def test_a_body_takes_the_round_trips_of_slow_start(size: int, most: float, play: Callable[..., None]) -> None:
    """In either direction, on a link that has carried nothing yet; the first byte takes one. RFC 9002's window of
    14,720 bytes, doubled each time, is 4 round trips for 100 kB and 7 for 1 MB; qh3 is given 0.7 of it."""

    async def scenario(distance: Distance) -> None:
        await asyncio.sleep(1.0)
        distance.size = size
        first, whole = await distance.ask()
        assert round(first, 3) == 1.0
        distance.size = 100
        await asyncio.sleep(1.0)
        _, sent = await distance.ask(size)
        assert (whole <= most, sent <= most) == (True, True), (whole, sent)

    play(scenario, ETHERNET)
