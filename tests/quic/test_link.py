"""Two ends of a link in memory, on each engine and on both mixes of them, under a turned clock."""

import asyncio
import random
from collections.abc import Awaitable, Callable

import pytest

from quictunnel.quic.engine import ClientTrust
from quictunnel.quic.link import SLOTS, Link
from quictunnel.quic.stream import StreamLeg
from quictunnel.wire.control import Grow, Hello
from quictunnel.wire.credit import INITIAL_WINDOW
from quictunnel.wire.errors import ErrorCode, TunnelError
from quictunnel.wire.frames import Data, End, Frame, RequestHead, ResponseHead
from tests.support.clock import run
from tests.support.memory import Network, Recorder, opened

pytestmark = pytest.mark.either

GET = RequestHead(b"GET", b"http", b"app.localhost", b"/a/../b?c=%20", [(b"accept", b"*/*")])
POST = RequestHead(b"POST", b"http", b"app.localhost", b"/", [(b"content-type", b"text/plain")], True)
OK = ResponseHead(200, [(b"set-cookie", b"a=1"), (b"set-cookie", b"b=2")])

Scenario = Callable[[Network, Link, Link], Awaitable[None]]


@pytest.fixture
def play(engines: tuple[str, str]) -> Callable[[Scenario], None]:
    """Runs a scenario on a link that is ready."""

    def play(scenario: Scenario) -> None:
        async def work() -> None:
            network = Network(*engines)
            client, server = await network.joined()
            try:
                await scenario(network, client, server)
            finally:
                await network.close()

        run(work())

    return play


def answer(*frames: Frame) -> Callable[[StreamLeg, RequestHead, Recorder], None]:
    """A backend that answers when the request has ended."""

    def on_request(leg: StreamLeg, head: RequestHead, backend: Recorder) -> None:
        def on_frame(frame: Frame) -> None:
            if isinstance(frame, End):
                for each in frames:
                    backend.peer.receive(each)

        backend.on_frame = on_frame

    return on_request


def test_a_request_and_its_answer_cross_unchanged(play: Callable[[Scenario], None]) -> None:
    async def scenario(network: Network, client: Link, server: Link) -> None:
        network.client_owner.on_request = answer(ResponseHead(103, [(b"link", b"</a>")]), OK, Data(b"hello"), End())
        leg, visitor = opened(network, server, GET, End())
        await network.until(lambda: visitor.ended)
        assert visitor.frames == [ResponseHead(103, [(b"link", b"</a>")]), OK, Data(b"hello"), End()]
        assert network.client_owner.legs[0].frames == [GET, End()]
        await network.until(lambda: client.exchanges == 0)
        assert (server.active, server.exchanges, network.server_owner.free, leg.ended) == (0, 0, 1, True)

    play(scenario)


def test_bodies_and_trailers_cross_both_ways(play: Callable[[Scenario], None]) -> None:
    async def scenario(network: Network, client: Link, server: Link) -> None:
        body = bytes(range(256)) * 300
        network.client_owner.on_request = answer(OK, Data(body), End([(b"grpc-status", b"0")]))
        _, visitor = opened(network, server, POST, Data(body), Data(b"x"), End([(b"checksum", b"7")]))
        await network.until(lambda: visitor.ended)
        backend = network.client_owner.legs[0]
        assert (backend.frames[0], backend.body, backend.frames[-1]) == (POST, body + b"x", End([(b"checksum", b"7")]))
        assert (visitor.body, visitor.frames[-1]) == (body, End([(b"grpc-status", b"0")]))

    play(scenario)


def test_a_thousand_requests_in_turn_reuse_the_slots(play: Callable[[Scenario], None]) -> None:
    async def scenario(network: Network, client: Link, server: Link) -> None:
        network.client_owner.on_request = answer(OK, Data(b"x" * 100), End())
        done = started = 0
        while done < 1000:
            visitors = []
            while server.has_slot() and started < 1000:
                visitors.append(opened(network, server, GET, End())[1])
                started += 1
            assert server.active <= SLOTS
            await network.until(lambda visitors=visitors: all(visitor.ended for visitor in visitors))
            done += len(visitors)
            await network.until(server.has_slot)
        assert server.closed is None
        assert (server.active, server.exchanges) == (0, 0)

    play(scenario)


def test_a_visitor_who_leaves_is_known_at_the_backend_in_one_flight(play: Callable[[Scenario], None]) -> None:
    async def scenario(network: Network, client: Link, server: Link) -> None:
        network.client_owner.on_request = lambda leg, head, backend: leg.receive(OK)
        leg, visitor = opened(network, server, POST, Data(b"part"))
        await network.until(lambda: bool(visitor.frames))
        then = network.loop.time()
        leg.abort(TunnelError(ErrorCode.CANCELLED))
        await network.until(lambda: bool(network.client_owner.legs[0].errors))
        assert network.loop.time() - then < 2 * network.delay
        assert network.client_owner.legs[0].errors[0].code == ErrorCode.CANCELLED
        assert (client.exchanges, server.exchanges, server.active) == (0, 0, 0)

    play(scenario)


@pytest.mark.parametrize(
    "code", [ErrorCode.CONNECTION_REFUSED, ErrorCode.HTTP_RESPONSE_TIMEOUT, ErrorCode.NOT_ACCEPTED]
)
def test_a_backend_that_fails_is_known_to_the_visitor_with_its_reason(
    play: Callable[[Scenario], None], code: ErrorCode
) -> None:
    async def scenario(network: Network, client: Link, server: Link) -> None:
        network.client_owner.on_request = lambda leg, head, backend: leg.abort(TunnelError(code))
        _, visitor = opened(network, server, GET, End())
        await network.until(lambda: bool(visitor.errors))
        assert [error.code for error in visitor.errors] == [code]
        assert (client.exchanges, server.exchanges, server.active) == (0, 0, 0)

    play(scenario)


def test_an_answer_may_end_before_the_upload_has(play: Callable[[Scenario], None]) -> None:
    async def scenario(network: Network, client: Link, server: Link) -> None:
        def early(leg: StreamLeg, head: RequestHead, backend: Recorder) -> None:
            for frame in (ResponseHead(413, []), Data(b"too much"), End()):
                leg.receive(frame)

        network.client_owner.on_request = early
        leg, visitor = opened(network, server, POST, Data(b"x" * 1000))
        await network.until(lambda: visitor.ended)
        leg.receive(Data(b"more"))
        leg.receive(End())
        await asyncio.sleep(1)
        assert visitor.body == b"too much"
        assert not visitor.errors
        assert (client.exchanges, server.exchanges, server.active) == (0, 0, 0)

    play(scenario)


def test_a_reader_that_stops_stops_the_sender_at_the_window(play: Callable[[Scenario], None]) -> None:
    async def scenario(network: Network, client: Link, server: Link) -> None:
        total = 12 * INITIAL_WINDOW
        sent = 0

        def offer(leg: StreamLeg, head: RequestHead, backend: Recorder) -> None:
            leg.receive(OK)
            network.loop.call_soon(push, backend)

        def push(backend: Recorder) -> None:
            nonlocal sent
            while not backend.paused and sent < total:
                backend.peer.receive(Data(b"x" * 65536))
                sent += 65536
            if sent < total:
                network.loop.call_later(0.01, push, backend)
            else:
                backend.peer.receive(End())

        network.client_owner.on_request = offer
        leg, visitor = opened(network, server, GET, End())
        leg.pause()
        await asyncio.sleep(20)
        assert len(visitor.body) == INITIAL_WINDOW
        assert sent <= INITIAL_WINDOW + 2 * 65536
        leg.resume()
        await network.until(lambda: visitor.ended, 600)
        assert len(visitor.body) == total
        assert network.server_budget.left == network.server_budget.total
        assert (client.exchanges, server.exchanges, server.active) == (0, 0, 0)

    play(scenario)


def test_body_larger_than_a_frame_is_not_copied_until_it_leaves(play: Callable[[Scenario], None]) -> None:
    async def scenario(network: Network, client: Link, server: Link) -> None:
        data = b"x" * (3 * INITIAL_WINDOW)
        leg, _ = opened(network, server, GET._replace(body=True), Data(data))
        views = [part for part in (*leg._out, *(leg._held or ())) if isinstance(part, memoryview)]
        assert sum(len(view) for view in views) == len(data)
        assert all(view.obj is data for view in views)

    play(scenario)


def test_one_stopped_reader_does_not_hold_up_the_others(play: Callable[[Scenario], None]) -> None:
    async def scenario(network: Network, client: Link, server: Link) -> None:
        network.client_owner.on_request = answer(OK, Data(b"y" * 3_000_000), End())
        stuck, _ = opened(network, server, GET, End())
        stuck.pause()
        await asyncio.sleep(5)
        network.client_owner.on_request = answer(OK, Data(b"quick"), End())
        visitors = [opened(network, server, GET, End())[1] for _ in range(50)]
        then = network.loop.time()
        await network.until(lambda: all(visitor.ended for visitor in visitors))
        assert network.loop.time() - then < 0.5

    play(scenario)


def test_a_lost_link_aborts_what_was_under_way_on_both_sides(play: Callable[[Scenario], None]) -> None:
    async def scenario(network: Network, client: Link, server: Link) -> None:
        _, visitor = opened(network, server, POST, Data(b"x"))
        await network.until(lambda: bool(network.client_owner.legs))
        client.close(ErrorCode.NO_ERROR, "bye")
        await network.until(lambda: bool(visitor.errors))
        assert visitor.errors[0].code == ErrorCode.CONNECTION_TERMINATED
        assert network.client_owner.legs[0].errors
        assert [str(why) for why in network.server_owner.closed] == ["bye"]
        await network.until(lambda: not network.listener.links)

    play(scenario)


def test_silence_ends_a_link_at_its_idle_time_out(play: Callable[[Scenario], None]) -> None:
    async def scenario(network: Network, client: Link, server: Link) -> None:
        network.lose = lambda data, to_server: True
        then = network.loop.time()
        await network.until(lambda: client.closed is not None and server.closed is not None, 200)
        assert 20 < network.loop.time() - then < 100
        assert client.silent_for() > 20

    play(scenario)


def test_pings_measure_the_round_trip(play: Callable[[Scenario], None]) -> None:
    async def scenario(network: Network, client: Link, server: Link) -> None:
        network.delay = 0.05
        client.ping()
        await network.until(lambda: client.round_trip is not None)
        assert client.round_trip == pytest.approx(0.1, abs=0.03)
        assert client.silent_for() < 0.2

    play(scenario)


def test_control_messages_cross_and_unknown_ones_are_answered(play: Callable[[Scenario], None]) -> None:
    async def scenario(network: Network, client: Link, server: Link) -> None:
        hello = Hello(1, "app", "s" * 20, "qtk_x")
        client.send_control(hello)
        await network.until(lambda: network.server_owner.messages == [hello])
        server.send_control(Grow(3))
        await network.until(lambda: network.client_owner.messages == [Grow(3)])

    play(scenario)


def test_a_lossy_path_loses_nothing(play: Callable[[Scenario], None]) -> None:
    async def scenario(network: Network, client: Link, server: Link) -> None:
        chance = random.Random(7)
        network.lose = lambda data, to_server: chance.random() < 0.05
        body = bytes(range(256)) * 800
        network.client_owner.on_request = answer(OK, Data(body), End())
        visitors = [opened(network, server, POST, Data(body), End())[1] for _ in range(10)]
        await network.until(lambda: all(visitor.ended for visitor in visitors), 600)
        assert all(visitor.body == body for visitor in visitors)
        assert all(backend.body == body for backend in network.client_owner.legs)

    play(scenario)


def test_a_certificate_of_another_authority_is_refused(engines: tuple[str, str]) -> None:
    async def work() -> None:
        network = Network(*engines)
        link = network.dial(ClientTrust("elsewhere.example", network.authority))
        await network.until(lambda: bool(network.client_owner.closed))
        assert 0x100 <= network.client_owner.closed[0].code < 0x200
        assert not link.ready
        await network.close()

    run(work())


@pytest.mark.parametrize("retry", ["auto", "always"])
def test_many_clients_at_once_all_get_in(engines: tuple[str, str], retry: str) -> None:
    async def work() -> None:
        network = Network(*engines, retry=retry)
        links = [network.dial() for _ in range(100)]
        await network.until(lambda: all(link.ready for link in links))
        await network.close()

    run(work())


def test_a_handshake_without_a_hello_is_ended(engines: tuple[str, str]) -> None:
    async def work() -> None:
        network = Network(*engines)
        network.listener._sweep()
        link = network.dial()
        await network.until(lambda: link.ready)
        await network.until(lambda: link.closed is not None, 30)
        assert not network.listener._half_open
        await network.close()

    run(work())
