"""A server that breaks every rule, before a client as it is: what its backend gets, and what its user is shown."""

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from quictunnel.app.connect import _announce
from quictunnel.client.agent import Agent, AgentConfig, FinalRefusal
from quictunnel.client.fan_out import FanOut
from quictunnel.http.origin import Origin
from quictunnel.quic.engine import select_engine
from quictunnel.quic.link import Link
from quictunnel.wire.codec import EMPTY_DATA, encode_data, encode_head, encode_trailers
from quictunnel.wire.control import Drain, Grow, Hello, Refuse, Welcome
from quictunnel.wire.frames import Data, Fields, RequestHead, ResponseHead
from tests.support.ends import Backend, Ends, play
from tests.support.hostile import HostileServer, control
from tests.support.memory import identity, resident

pytestmark = pytest.mark.either

Scenario = Callable[[Ends, HostileServer], Awaitable[None]]
Play = Callable[[Scenario], None]

MIB = 1 << 20


@pytest.fixture
def before_it(engine: str, tmp_path: Path, log_lines: list[str]) -> Play:
    """Runs a scenario with a hostile server of each engine; nothing of the client's own may fail."""

    def run(scenario: Scenario) -> None:
        async def work(ends: Ends) -> None:
            server = await HostileServer(ends, engine).start()
            try:
                await scenario(ends, server)
            finally:
                server.listener.close()

        play(work, (engine, engine), tmp_path, serve=False)
        errors = [line for line in log_lines if line.startswith(("ERROR", "CRITICAL"))]
        assert not [line for line in errors if "the server ended the session" not in line]

    return run


# What a user is shown

ESCAPES = "\x1b]0;owned\x07\x1b[2J\r\nready tunnel=forged url=http://evil.example\u202e\x9b31m"


def test_welcome_cannot_steer_a_terminal_or_forge_a_line(before_it: Play, capsys: pytest.CaptureFixture[str]) -> None:
    async def scenario(ends: Ends, server: HostileServer) -> None:
        urls = [ESCAPES, "http://a b=c", "http://\u00fcber.example", "http://ok.example", "h" * 60_000]
        server.on_hello = lambda link, hello: link.send_control(Welcome("app", urls, agent=ESCAPES))
        await _connected(ends, on_welcome=_announce)

    before_it(scenario)
    assert capsys.readouterr().out == "ready tunnel=app url=http://ok.example\n"


async def _connected(ends: Ends, backend: Any = None, **options: Any) -> Agent:
    """A client with an ``on_welcome`` of the test's, once it serves."""
    config = AgentConfig("127.0.0.1", ends._port, "127.0.0.1", "qtk_x", "app", authority=identity()[1])
    agent = Agent(config, ends._engines[1], FanOut(backend or Backend()), **options)
    ends._agents[agent] = ends.loop.create_task(agent.run())
    await ends.until(lambda: agent.serving)
    return agent


@pytest.mark.parametrize("name", [ESCAPES, "", "a" * 64, "x.y", "app\n", "app url=http://evil"], ids=repr)
def test_welcome_to_a_name_that_is_none_is_no_welcome(
    before_it: Play, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    async def scenario(ends: Ends, server: HostileServer) -> None:
        server.on_hello = lambda link, hello: link.send_control(Welcome(name, ["http://a.example"]))
        agent = ends.connect()
        await ends.until(lambda: len(server.hellos) == 2)
        assert not agent.serving
        assert agent.tunnel == "app"

    before_it(scenario)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("when", ["instead of a welcome", "after it"])
def test_refusal_is_one_short_line_for_its_reader(before_it: Play, log_lines: list[str], when: str) -> None:
    async def scenario(ends: Ends, server: HostileServer) -> None:
        refuse = Refuse(ESCAPES, ESCAPES + "x" * 60_000)

        def answer(link: Link, hello: Hello) -> None:
            if when == "after it":
                link.send_control(Welcome("app"))
            link.send_control(refuse)
            for _ in range(1000):
                link.send_control(Refuse("again", "and again"))

        server.on_hello = answer
        agent = ends.connect()
        with pytest.raises(FinalRefusal) as refusal:
            await ends.ended(agent)
        for text in (str(refusal.value), refusal.value.code):
            assert text.isprintable() and text.isascii() and len(text) < 500

    before_it(scenario)
    assert len([line for line in log_lines if "ended the session" in line]) <= 1
    assert max(map(len, log_lines), default=0) < 2000


def test_last_words_of_a_server_are_one_short_line(before_it: Play, log_lines: list[str]) -> None:
    async def scenario(ends: Ends, server: HostileServer) -> None:
        server.on_hello = lambda link, hello: link.close(7, ESCAPES)
        ends.connect()
        await ends.until(lambda: len(server.hellos) == 2)

    before_it(scenario)
    assert any("owned" in line for line in log_lines)
    assert all(line.isprintable() for line in log_lines)


# What a server may ask for


def test_absurd_number_of_links_is_the_clients_own_limit(before_it: Play) -> None:
    async def scenario(ends: Ends, server: HostileServer) -> None:
        def answer(link: Link, hello: Hello) -> None:
            link.send_control(Welcome("app", max_links=10**9))
            for links in (10**9, 2**62 - 1, 0, 10**9):
                link.send_control(Grow(links))

        server.on_hello = answer
        await ends.connected(max_links=5)
        await asyncio.sleep(30)
        assert len(ends.client_addresses()) == 5
        assert {hello.link for hello in server.hellos} == set(range(5))

    before_it(scenario)


def test_links_that_are_wanted_and_not_wanted_in_turns_are_not_dialled_in_a_rush(before_it: Play) -> None:
    async def scenario(ends: Ends, server: HostileServer) -> None:
        await ends.connected(max_links=8)
        for _ in range(100):
            server.links[0].send_control(Grow(8))
            server.links[0].send_control(Grow(1))
            await asyncio.sleep(0.2)
        assert server.links[0].closed is None
        assert len(ends.network.dials) < 60
        assert len(ends.client_addresses()) <= 8

    before_it(scenario)


def test_ten_thousand_streams_are_as_many_requests_as_a_link_has_slots(before_it: Play) -> None:
    """What comes beyond the limit of streams waits, or ends the link, in the library; the backend sees no more."""

    async def scenario(ends: Ends, server: HostileServer) -> None:
        backend = Backend(None)
        await ends.connected(backend)
        (link,) = server.links
        connection: Any = link._connection
        request = encode_head(RequestHead(b"GET", b"http", b"a", b"/", []))
        opened = 0
        try:
            for _ in range(10_000):
                HostileServer.write(link, -1, request, True)
                opened += 1
        except ValueError:
            pass  # qh3's own server refuses to go on
        assert opened >= 100
        await asyncio.sleep(2)
        assert len(backend.open_requests) <= 128
        if server.listener.engine.name == "aioquic":
            connection._remote_max_streams_bidi = 20_000
            HostileServer.write(link, 4 * 15_000 + 1, request, True)
            connection._unblock_streams(is_unidirectional=False)
            link.schedule()
            await ends.until(lambda: link.closed or len(server.hellos) > 1, 60)
            assert len(backend.open_requests) <= 128

    before_it(scenario)


BAD_HEADS: dict[str, bytes | RequestHead] = {
    "target with CR LF": RequestHead(b"GET", b"http", b"a", b"/ HTTP/1.1\r\nHost: evil\r\n\r\nGET /forged", []),
    "target with a space": RequestHead(b"GET", b"http", b"a", b"/a b", []),
    "target of another host": RequestHead(b"GET", b"http", b"a", b"http://169.254.169.254/forged", []),
    "authority-form": RequestHead(b"CONNECT", b"http", b"a", b"169.254.169.254:80", []),
    "method with CR LF": RequestHead(b"GET / HTTP/1.1\r\nX: ", b"http", b"a", b"/forged", []),
    "method with a space": RequestHead(b"GET /x", b"http", b"a", b"/forged", []),
    "host with CR LF": RequestHead(b"GET", b"http", b"a\r\nX-Forged: 1", b"/", []),
    "host with NUL": RequestHead(b"GET", b"http", b"a\0", b"/forged", []),
    "value with CR LF": RequestHead(b"GET", b"http", b"a", b"/", [(b"x", b"1\r\nX-Forged: 1")]),
    "value with LF": RequestHead(b"GET", b"http", b"a", b"/", [(b"x", b"1\nX-Forged: 1")]),
    "value with NUL": RequestHead(b"GET", b"http", b"a", b"/forged", [(b"x", b"\0")]),
    "name with CR LF": RequestHead(b"GET", b"http", b"a", b"/", [(b"x: 1\r\nx-forged", b"1")]),
    "name in upper case": RequestHead(b"GET", b"http", b"a", b"/forged", [(b"X-Forged", b"1")]),
    "two hosts": RequestHead(b"GET", b"http", b"a", b"/forged", [(b"host", b"evil")]),
    "two lengths": RequestHead(
        b"POST", b"http", b"a", b"/forged", [(b"content-length", b"1"), (b"content-length", b"2")], True
    ),
    "length of words": RequestHead(b"POST", b"http", b"a", b"/forged", [(b"content-length", b"+1")], True),
    "length of a body that is not there": RequestHead(b"GET", b"http", b"a", b"/forged", [(b"content-length", b"9")]),
    "h2c": RequestHead(b"GET", b"http", b"a", b"/forged", [], True, b"h2c"),
    "protocol with CR LF": RequestHead(b"GET", b"http", b"a", b"/forged", [], True, b"websocket\r\nX-Forged: 1"),
    "scheme of a file": encode_trailers(
        [(b":method", b"GET"), (b":scheme", b"file"), (b":authority", b""), (b":path", b"/forged")]
    ),
    "fields out of order": encode_trailers(
        [(b":path", b"/forged"), (b":method", b"GET"), (b":scheme", b"http"), (b":authority", b"")]
    ),
    "response": encode_trailers([(b":status", b"200")]),
    "body before a head": encode_data(b"GET /forged HTTP/1.1\r\n\r\n") + b"GET /forged HTTP/1.1\r\n\r\n",
    "garbage": bytes(range(256)),
}


async def _listen(received: list[bytes]) -> asyncio.Server:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(65536):
            received.append(data)
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")
        writer.close()

    return await asyncio.start_server(serve, "127.0.0.1", 0)


@pytest.mark.parametrize("name", BAD_HEADS)
async def test_request_that_no_http_1_may_hold_never_reaches_the_backend(
    engine: str, name: str, tmp_path: Path, log_lines: list[str]
) -> None:
    """On sockets: a client talks to its own backend, in whole requests, whatever it is told to ask."""
    received: list[bytes] = []
    listening = await _listen(received)
    backend = Origin("127.0.0.1", listening.sockets[0].getsockname()[1], authority="backend.example")
    server, agent, running = await _real(engine, FanOut(backend))
    try:
        head = BAD_HEADS[name]
        data = head if isinstance(head, bytes) else encode_head(head)
        body = isinstance(head, RequestHead) and head.body
        (link,) = server.links
        HostileServer.write(link, -1, data + (EMPTY_DATA if body else b""), True)
        good = encode_head(RequestHead(b"GET", b"http", b"a.example", b"/good", []))
        HostileServer.write(link, -1, good, True)
        await _until(lambda: any(b"/good" in data for data in received))
        await asyncio.sleep(0.05)
        everything = b"".join(data for data in received)
        assert b"forged" not in everything.lower(), everything
        assert everything.count(b" HTTP/1.1\r\n") == 1
        assert agent.serving
    finally:
        await agent.stop(0.0)
        await running
        server.listener.close()
        await backend.aclose()
        listening.close()
    assert not [line for line in log_lines if line.startswith(("ERROR", "CRITICAL"))]


async def test_other_hosts_and_paths_are_asked_of_the_own_backend(engine: str) -> None:
    """The backend is what the client was started with; a server only says what is asked there."""
    received: list[bytes] = []
    listening = await _listen(received)
    backend = Origin("127.0.0.1", listening.sockets[0].getsockname()[1], authority="backend.example")
    server, agent, running = await _real(engine, FanOut(backend))
    try:
        (link,) = server.links
        asked = [b"169.254.169.254", b"localhost:22", b"[::1]:6379", b"internal.example", b""]
        fields: Fields = [(b"x-forwarded-host", b"internal.example"), (b"forwarded", b"host=internal.example")]
        for host in asked:
            head = RequestHead(b"GET", b"https", host, b"/../../etc/passwd", fields)
            HostileServer.write(link, -1, encode_head(head), True)
        await _until(lambda: sum(data.count(b"/../../etc/passwd") for data in received) == len(asked))
        hosts = [line for data in received for line in data.split(b"\r\n") if line.startswith(b"Host:")]
        assert sorted(hosts) == sorted(b"Host: " + (host or b"backend.example") for host in asked)
    finally:
        await agent.stop(0.0)
        await running
        server.listener.close()
        await backend.aclose()
        listening.close()


async def _real(engine: str, fan_out: FanOut) -> tuple[HostileServer, Agent, "asyncio.Task[None]"]:
    """A hostile server and a client of it on real sockets."""

    class Here:
        _port = 0

    here: Any = Here()
    server = await HostileServer(here, engine).start()
    config = AgentConfig("127.0.0.1", here._port, "127.0.0.1", "qtk_x", "app", authority=identity()[1])
    agent = Agent(config, select_engine(engine), fan_out)
    running = asyncio.ensure_future(agent.run())
    await _until(lambda: agent.serving)
    return server, agent, running


async def _until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.005)


# What it sends

_OK = ResponseHead(200, [])
_DATA = Data(b"d" * 65536)


@pytest.mark.parametrize(
    "data",
    [b"\xff" * 200, control(b"{"), control(b"[]"), control(b'{"type":"grow","links":1e999}')],
    ids=lambda data: repr(data[:9]),
)  # fmt: skip
def test_garbage_on_the_control_stream_ends_the_link_and_another_is_dialled(before_it: Play, data: bytes) -> None:
    async def scenario(ends: Ends, server: HostileServer) -> None:
        await ends.connected()
        HostileServer.write(server.links[0], 0, data)
        await ends.until(lambda: len(server.hellos) == 2, 60)
        await ends.until(lambda: server.links[0].closed)

    before_it(scenario)


def test_unknown_messages_are_answered_once_and_answers_never(before_it: Play) -> None:
    async def scenario(ends: Ends, server: HostileServer) -> None:
        await ends.connected()
        HostileServer.write(server.links[0], 0, control(b'{"type":"dance"}') + control(b'{"type":"unknown","of":"x"}'))
        await asyncio.sleep(5)
        assert [message for message in server.messages if message.type == "unknown"] == server.messages[1:2]
        before = len(server.messages)
        await asyncio.sleep(5)
        assert len(server.messages) == before

    before_it(scenario)


@pytest.mark.interpreted  # a stand-in for a Link, or for a method of it
def test_download_that_is_never_granted_stalls_and_is_ended_by_a_limit(
    before_it: Play, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("quictunnel.quic.link.STALL_TIME", 20.0)

    async def scenario(ends: Ends, server: HostileServer) -> None:
        backend = Backend(None)
        await ends.connected(backend)
        link = server.links[0]
        HostileServer.write(link, -1, encode_head(RequestHead(b"GET", b"http", b"a", b"/", [])), True)
        link._stream_data = lambda stream_id, data, fin: None  # type: ignore[method-assign]
        await ends.until(lambda: backend.requests)
        (request,) = backend.requests
        before = resident()
        request.peer.receive(_OK)
        sent = 0
        while not request.paused:
            request.peer.receive(_DATA)
            sent += len(_DATA.data)
        assert sent <= 6 * 65536
        assert 19 < await ends.until(lambda: request.error) < 23
        assert resident() - before < 8 * MIB

    before_it(scenario)


def test_server_that_drains_at_once_or_ends_the_control_stream_is_dialled_again(before_it: Play) -> None:
    async def scenario(ends: Ends, server: HostileServer) -> None:
        def answer(link: Link, hello: Hello) -> None:
            link.send_control(Welcome("app"))
            link.send_control(Drain())
            link.flush()
            HostileServer.write(link, 0, b"", True)

        server.on_hello = answer
        ends.connect()
        await asyncio.sleep(60)
        assert 5 < len(server.hellos) < 30, "again, and not in a rush"

    before_it(scenario)
