"""A session before several servers, and before a server of several processes; how it leaves them."""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path

import pytest

from quictunnel.client.reach import Place
from quictunnel.quic.link import Link
from quictunnel.wire.codec import EMPTY_DATA, StreamDecoder, encode_head
from quictunnel.wire.control import PROBE_CAPABILITY, Drain, Drained, Grow, Hello, Refuse, Welcome
from quictunnel.wire.errors import ErrorCode
from quictunnel.wire.frames import PROBE, End, RequestHead, ResponseHead
from tests.support.ends import Backend, Ends, play
from tests.support.hostile import HostileServer, Workers

pytestmark = pytest.mark.either

Play = Callable[[Callable[[Ends], Awaitable[None]]], None]

GET = encode_head(RequestHead(b"GET", b"http", b"app.localhost", b"/", []))


@pytest.fixture
def alone(engine: str, tmp_path: Path) -> Play:
    """Runs a scenario without a real server on each engine."""
    return lambda scenario: play(scenario, (engine, engine), tmp_path, serve=False)  # type: ignore[arg-type]


def open_links(server: HostileServer) -> list[Link]:
    return [link for link in server.links if link.closed is None]


# Several servers


class Two:
    """Two servers, and a client that is told of both."""

    def __init__(self, ends: Ends, engine: str) -> None:
        self.ends = ends
        self.first, self.second = HostileServer(ends, engine), HostileServer(ends, engine)

    async def start(self) -> "Two":
        await self.second.start()
        self.others = (Place("127.0.0.1", self.ends._port, "127.0.0.1"),)
        self.ends._port = 0
        await self.first.start()
        return self


def test_first_server_that_answers_is_stayed_with(alone: Play, engine: str) -> None:
    async def scenario(ends: Ends) -> None:
        two = await Two(ends, engine).start()
        first = ends.network.endpoints.pop(ends.quic_address)  # nobody listens there
        agent = ends.connect(others=two.others)
        assert await ends.until(lambda: agent.serving) < 0.3
        assert (len(two.first.hellos), len(two.second.hellos)) == (0, 1)
        ends.network.endpoints[ends.quic_address] = first
        two.second.links[0].close()
        await ends.until(lambda: len(two.second.hellos) == 2, 5)
        await asyncio.sleep(10)
        assert (len(two.first.hellos), len(open_links(two.second))) == (0, 1)

    alone(scenario)


def test_next_server_is_tried_when_one_is_silent_and_the_first_again_after_the_last(alone: Play, engine: str) -> None:
    async def scenario(ends: Ends) -> None:
        two = await Two(ends, engine).start()
        first, second = ends.quic_address, ("127.0.0.1", two.others[0].port)
        lost = {first}
        ends.network.lose = lambda source, destination: bool(lost & {source, destination})
        agent = ends.connect(others=two.others)
        assert await ends.until(lambda: agent.serving) < 1.2
        assert len(two.second.hellos) == 1
        lost.symmetric_difference_update((first, second))
        await ends.until(lambda: two.first.hellos, 7)
        assert agent.serving

    alone(scenario)


def test_server_that_drains_is_left_for_the_next_one_with_what_is_under_way(alone: Play, engine: str) -> None:
    async def scenario(ends: Ends) -> None:
        two = await Two(ends, engine).start()
        backend = Backend(None)
        agent = await ends.connected(backend, others=two.others)
        (old,) = two.first.links
        two.first.write(old, -1, GET, True)
        await ends.until(lambda: backend.requests)
        old.send_control(Drain())
        assert await ends.until(lambda: two.second.hellos) < 0.3
        # That server's visitors may still ask for something: the link is its own to close.
        await asyncio.sleep(20)
        assert old.closed is None
        assert Drain() not in two.first.messages
        assert agent.serving
        backend.requests[0].answer()
        two.first.write(old, -1, GET, True)
        await ends.until(lambda: len(backend.requests) == 2)
        backend.requests[1].answer()
        await asyncio.sleep(1)
        old.close()
        assert len(two.first.hellos) == len(open_links(two.second)) == 1
        two.second.links[0].send_control(Drain())  # and around again
        assert await ends.until(lambda: len(two.first.hellos) == 2) < 0.3

    alone(scenario)


def test_server_whose_place_another_process_takes_is_dialled_again(alone: Play, engine: str) -> None:
    async def scenario(ends: Ends) -> None:
        two = await Two(ends, engine).start()
        agent = await ends.connected(others=two.others)
        two.first.links[0].send_control(Drain(again=True))
        assert await ends.until(lambda: len(two.first.hellos) == 2) < 0.3
        await asyncio.sleep(5)
        assert (len(two.second.hellos), agent.serving) == (0, True)

    alone(scenario)


def test_only_server_that_drains_is_dialled_anew_at_once(alone: Play, engine: str) -> None:
    async def scenario(ends: Ends) -> None:
        server = await HostileServer(ends, engine).start()
        agent = await ends.connected()
        server.links[0].send_control(Drain())
        assert await ends.until(lambda: len(server.hellos) == 2) < 0.3
        await asyncio.sleep(10)
        assert server.links[0].closed is None
        server.links[0].close()
        await asyncio.sleep(1)
        assert (agent.serving, len(server.hellos)) == (True, 2)
        assert server.hellos[0].session == server.hellos[1].session

    alone(scenario)


def test_server_that_refuses_because_it_drains_is_asked_again_soon(alone: Play, engine: str) -> None:
    async def scenario(ends: Ends) -> None:
        two = await Two(ends, engine).start()
        for server in (two.first, two.second):
            server.on_hello = lambda link, hello: link.send_control(Refuse("draining", "stopping", False, 1.0))
        ends.connect(others=two.others)
        await asyncio.sleep(30)
        assert 15 < len(two.first.hellos) < 70
        assert abs(len(two.second.hellos) - len(two.first.hellos)) <= 1

    alone(scenario)


def test_token_is_refused_by_one_server_for_all(alone: Play, engine: str) -> None:
    async def scenario(ends: Ends) -> None:
        two = await Two(ends, engine).start()
        two.first.on_hello = lambda link, hello: link.send_control(Refuse("token_unknown", "no"))
        agent = ends.connect(others=two.others)
        with pytest.raises(Exception, match="no"):
            await ends.ended(agent)

    alone(scenario)


# Several processes of one server


def test_session_has_a_link_to_each_process(alone: Play, engine: str) -> None:
    async def scenario(ends: Ends) -> None:
        workers = await Workers(ends, engine, 4).start()
        agent = ends.connect()
        assert await ends.until(lambda: agent.serving) < 0.5
        assert workers.numbers == [[0]] * 4
        assert sum(len(each.hellos) for each in workers.servers) == 4
        assert len({each.hellos[0].session for each in workers.servers}) == 1

    alone(scenario)


def test_links_are_counted_and_dialled_again_for_the_process_that_they_go_to(alone: Play, engine: str) -> None:
    async def scenario(ends: Ends) -> None:
        workers = await Workers(ends, engine, 3).start()
        await ends.connected(max_links=12)
        busy = workers.servers[1]
        busy.links[0].send_control(Grow(9))
        await ends.until(lambda: workers.numbers == [[0], [0, 1, 2, 3], [0]], 5)  # a third of what the client allows
        busy.links[2].close()
        await ends.until(lambda: len(busy.hellos) == 5, 2)
        await ends.until(lambda: workers.numbers == [[0], [0, 1, 2, 3], [0]], 2)
        assert [len(each.hellos) for each in workers.servers] == [1, 5, 1]

    alone(scenario)


def test_session_is_served_though_one_process_is_not_reached(alone: Play, engine: str) -> None:
    async def scenario(ends: Ends) -> None:
        workers = Workers(ends, engine, 4)
        workers.lost = {2}
        await workers.start()
        agent = ends.connect()
        await ends.until(lambda: any(workers.numbers), 4)
        assert 1.8 < await ends.until(lambda: agent.serving, 4) < 2.1
        assert workers.numbers == [[0], [0], [], [0]]
        workers.lost = set()
        assert await ends.until(lambda: workers.numbers == [[0]] * 4, 5) < 1.2

    alone(scenario)


def test_processes_that_are_reached_by_chance_are_all_reached_in_the_end(alone: Play, engine: str) -> None:
    async def scenario(ends: Ends) -> None:
        workers = await Workers(ends, engine, 4, steers=False).start()
        agent = await ends.connected()
        await ends.until(lambda: all(0 in numbers for numbers in workers.numbers), 120)
        await asyncio.sleep(60)
        assert all(0 in numbers for numbers in workers.numbers)
        assert agent.serving
        assert sum(len(each.hellos) for each in workers.servers) < 150

    alone(scenario)


@pytest.mark.parametrize("after", [1, 2, 5])
def test_server_that_is_replaced_by_one_of_other_processes_has_links_to_each_of_them(
    alone: Play, engine: str, after: int
) -> None:
    async def scenario(ends: Ends) -> None:
        workers = await Workers(ends, engine, 3).start()
        await ends.connected()
        workers.stop()
        await asyncio.sleep(2)
        others = await Workers(ends, engine, after).start()
        await ends.until(lambda: others.numbers == [[0]] * after, 5)
        await asyncio.sleep(5)
        assert sum(len(each.hellos) for each in others.servers) <= after + 1

    alone(scenario)


@pytest.mark.parametrize(("worker", "workers"), [(0, 0), (4, 4), (0, 257), (0, 2**61)])
def test_processes_that_cannot_be_are_no_welcome(alone: Play, engine: str, worker: int, workers: int) -> None:
    async def scenario(ends: Ends) -> None:
        server = await HostileServer(ends, engine).start()
        server.on_hello = lambda link, hello: link.send_control(Welcome("app", worker=worker, workers=workers))
        agent = ends.connect()
        await asyncio.sleep(5)
        assert not agent.serving
        assert 2 < len(server.hellos) < 10

    alone(scenario)


# How a client leaves


def test_client_that_stops_serves_what_was_on_its_way_when_it_said_so(alone: Play, engine: str) -> None:
    async def scenario(ends: Ends) -> None:
        server = await HostileServer(ends, engine).start()
        backend = Backend()
        agent = await ends.connected(backend)
        (link,) = server.links
        stopping = asyncio.ensure_future(agent.stop(30.0))
        await ends.until(lambda: Drain() in server.messages)
        link.send_control(Drained(3))
        await asyncio.sleep(5)
        assert not stopping.done()
        for _ in range(3):
            server.write(link, -1, GET, True)
        await ends.until(stopping.done, 1)
        await ends.ended(agent)
        assert len(backend.requests) == 3
        assert not backend.open_requests

    alone(scenario)


@pytest.mark.parametrize("answers", [True, False])
def test_idle_client_stops_soon_whether_or_not_its_server_knows_the_last_word(
    alone: Play, engine: str, answers: bool
) -> None:
    async def scenario(ends: Ends) -> None:
        server = await HostileServer(ends, engine).start()
        agent = await ends.connected()
        began = ends.loop.time()
        stopping = asyncio.ensure_future(agent.stop(30.0))
        await ends.until(lambda: Drain() in server.messages)
        if answers:
            server.links[0].send_control(Drained(0))
        await stopping
        await ends.ended(agent)
        took = ends.loop.time() - began
        assert took < 0.5 if answers else 2 < took < 3

    alone(scenario)


def test_client_stops_at_once_while_it_has_no_server(alone: Play, engine: str) -> None:
    async def scenario(ends: Ends) -> None:
        await HostileServer(ends, engine).start()
        ends.kill_server()
        agent = ends.connect()
        await asyncio.sleep(300)
        began = ends.loop.time()
        await agent.stop(30.0)
        await ends.ended(agent)
        assert ends.loop.time() - began < 0.01

    alone(scenario)


def test_client_that_stops_dials_nothing_anew(alone: Play, engine: str) -> None:
    async def scenario(ends: Ends) -> None:
        server = await HostileServer(ends, engine).start()
        backend = Backend(None)
        agent = await ends.connected(backend)
        server.write(server.links[0], -1, GET, True)
        await ends.until(lambda: backend.requests)
        stopping = asyncio.ensure_future(agent.stop(10.0))
        await asyncio.sleep(1)
        server.links[0].send_control(Drain())
        server.links[0].send_control(Grow(5))
        await asyncio.sleep(1)
        server.links[0].close()
        await ends.until(stopping.done, 3)
        await ends.ended(agent)
        assert len(server.hellos) == len(ends.network.dials) == 1

    alone(scenario)


@pytest.mark.interpreted  # a stand-in for a Link, or for a method of it
def test_request_that_has_not_come_whole_when_the_grace_is_over_was_not_accepted(alone: Play, engine: str) -> None:
    async def scenario(ends: Ends) -> None:
        server = await HostileServer(ends, engine).start()
        codes: list[int] = []
        backend = Backend(None)
        agent = await ends.connected(backend)
        (link,) = server.links
        link._stream_cut = lambda stream, code, was_reset: codes.append(code)  # type: ignore[method-assign]
        server.write(link, -1, GET + EMPTY_DATA)  # taken up, though it has not ended
        server.write(link, -1, GET[:20])
        await ends.until(lambda: backend.requests)
        await agent.stop(1.0)
        await ends.ended(agent)
        await ends.until(lambda: link.closed, 3)
        assert set(codes) == {ErrorCode.NOT_ACCEPTED}
        assert len(backend.requests) == 1
        assert backend.requests[0].error is not None

    alone(scenario)


# Other options for a running client


def test_other_options_are_said_on_new_links_while_the_old_ones_finish(alone: Play, engine: str) -> None:
    async def scenario(ends: Ends) -> None:
        server = await HostileServer(ends, engine).start()
        backend = Backend(None)
        agent = await ends.connected(backend)
        (old,) = server.links
        server.write(old, -1, GET, True)
        await ends.until(lambda: backend.requests)
        agent.reconfigure(replace(ends.config(), weight=5, hosts=("app.example.com",)), None)
        await ends.until(lambda: len(server.hellos) == 2, 1)
        first, second = server.hellos
        assert (first.weight, second.weight, second.hosts) == (1, 5, ["app.example.com"])
        assert second.session != first.session  # so that a server need not change what it has
        await ends.until(lambda: Drain() in server.messages)
        old.send_control(Drained(1))
        await asyncio.sleep(10)
        assert old.closed is None
        backend.answer_all()
        await ends.until(lambda: old.closed, 2)
        assert agent.serving
        assert open_links(server) == [server.links[1]]

    alone(scenario)


def test_options_that_are_the_same_change_nothing(alone: Play, engine: str) -> None:
    async def scenario(ends: Ends) -> None:
        server = await HostileServer(ends, engine).start()
        agent = await ends.connected()
        agent.reconfigure(ends.config(), None)
        await asyncio.sleep(10)
        assert len(server.hellos) == 1

    alone(scenario)


def test_options_that_the_server_refuses_are_taken_back(alone: Play, engine: str) -> None:
    async def scenario(ends: Ends) -> None:
        server = await HostileServer(ends, engine).start()
        agent = await ends.connected()
        server.on_hello = lambda link, hello: link.send_control(Refuse("token_scope", "not this host"))
        agent.reconfigure(replace(ends.config(), hosts=("other.example.com",)), None)
        await ends.until(lambda: len(server.hellos) == 2, 1)
        await asyncio.sleep(10)
        assert agent.serving
        assert open_links(server)[0] is server.links[0]
        assert len(server.hellos) == 2
        assert Drain() not in server.messages
        server.on_hello = lambda link, hello: link.send_control(Welcome("app"))
        server.links[0].close()
        await ends.until(lambda: len(server.hellos) == 3, 2)
        assert server.hellos[2] == server.hellos[0]

    alone(scenario)


def test_other_server_is_gone_to_and_the_old_one_left_when_it_is_reached(alone: Play, engine: str) -> None:
    async def scenario(ends: Ends) -> None:
        two = await Two(ends, engine).start()
        agent = await ends.connected()
        second = ends.network.endpoints.pop(("127.0.0.1", two.others[0].port))
        agent.reconfigure(replace(ends.config(), port=two.others[0].port), None)
        await asyncio.sleep(10)
        assert agent.serving
        assert len(open_links(two.first)) == 1
        ends.network.endpoints[("127.0.0.1", two.others[0].port)] = second
        await ends.until(lambda: two.second.hellos, 2)
        await ends.until(lambda: not open_links(two.first), 5)
        assert agent.serving

    alone(scenario)


# What a hello says


def test_hello_says_what_the_tunnel_is_to_be(alone: Play, engine: str) -> None:
    async def scenario(ends: Ends) -> None:
        server = await HostileServer(ends, engine).start()
        await ends.connected(
            hosts=("app.example.com", "*.example.com"), weight=7, sticky="ip", capabilities=("connect",)
        )
        hello: Hello = server.hellos[0]
        assert (hello.hosts, hello.weight, hello.sticky) == (["app.example.com", "*.example.com"], 7, "ip")
        assert hello.capabilities == [PROBE_CAPABILITY, "connect"]

    alone(scenario)


@pytest.mark.interpreted  # a stand-in for a Link, or for a method of it
def test_probe_is_answered_by_the_client_itself(alone: Play, engine: str) -> None:
    async def scenario(ends: Ends) -> None:
        server = await HostileServer(ends, engine).start()
        backend = Backend(None)
        await ends.connected(backend)
        (link,) = server.links
        came: list[tuple[bytes, bool]] = []
        before = link._stream_data

        def stream_data(stream: int, data: bytes, fin: bool) -> None:
            if stream:
                came.append((data, fin))
            else:
                before(stream, data, fin)

        link._stream_data = stream_data  # type: ignore[method-assign]
        server.write(link, -1, encode_head(PROBE), True)
        assert await ends.until(lambda: came and came[-1][1]) < 0.1
        decoder = StreamDecoder(is_request=False, head_limit=1000)
        assert list(decoder.feed(b"".join(data for data, _ in came), True)) == [ResponseHead(204, []), End()]
        assert not backend.requests

    alone(scenario)
