"""Two tunnels of two tokens on one server: whatever a visitor or a client says, it gets nothing of the other's."""

import asyncio
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from quictunnel.quic.dial import dial, resolve
from quictunnel.quic.engine import ClientTrust, select_engine
from quictunnel.quic.link import Link, LinkClosed, LinkOwner
from quictunnel.quic.sockets import settle
from quictunnel.quic.stream import StreamLeg
from quictunnel.trust.join import JoinString
from quictunnel.wire.control import ControlMessage, Hello, Refuse, Welcome, encode_credit
from quictunnel.wire.credit import WindowBudget
from quictunnel.wire.frames import RequestHead
from tests.support.backends import Connection, RawBackend
from tests.support.processes import Client, Processes, Server, poll
from tests.support.visits import Answer, RawVisitor, visit

pytestmark = pytest.mark.either

SECRETS = {"red": b"the secret of red", "blue": b"the secret of blue"}
OTHER = {"red": "blue", "blue": "red"}


class Pair:
    """A server, and for each of two tunnels a token, a client and a backend that answers with its own secret."""

    def __init__(self, processes: Processes, engine: str) -> None:
        self.engine = engine
        self.server: Server = processes.server("--no-default-tunnel", engine=engine)
        self.backends = {name: RawBackend(_tells(secret)) for name, secret in SECRETS.items()}
        self.tokens = {name: self.server.token(name) for name in SECRETS}
        self.clients: dict[str, Client] = {}
        for name, backend in self.backends.items():
            backend.__enter__()
            self.clients[name] = processes.client(
                self.server, backend.target, "--token", self.tokens[name], tunnel=name, engine=engine
            )

    def close(self) -> None:
        for backend in self.backends.values():
            backend.close()

    def forget(self) -> None:
        for backend in self.backends.values():
            backend.requests.clear()

    def seen(self, name: str) -> list[bytes]:
        """What the backend of a tunnel was asked."""
        return self.backends[name].requests


def _tells(secret: bytes) -> Any:
    def handle(connection: Connection) -> None:
        while head := connection.head():
            connection.body(head)
            connection.answer(200, b"" if head.startswith(b"HEAD ") else secret)

    return handle


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Pair]]:
    made: dict[str, Pair] = {}
    with Processes(tmp_path_factory.mktemp("isolation")) as processes:
        made["processes"] = processes  # type: ignore[assignment]
        yield made
    del made["processes"]
    for pair in made.values():
        pair.close()


@pytest.fixture
def pair(engine: str, pairs: dict[str, Pair]) -> Pair:
    if engine not in pairs:
        pairs[engine] = Pair(pairs["processes"], engine)  # type: ignore[arg-type]
    pairs[engine].forget()
    return pairs[engine]


# By a request

# Each is sent on a connection of its own; the statuses are those that are right. None of these may reach blue.
REQUESTS: list[tuple[str, str, tuple[int, ...]]] = [
    ("session header beside a host", "GET / HTTP/1.1\r\nHost: red.localhost\r\nX-Tunnel-Session: blue\r\n\r\n", (200,)),
    ("session header twice", "GET / HTTP/1.1\r\nHost: red.localhost\r\nX-Tunnel-Session: blue\r\n"
     "X-Tunnel-Session: blue\r\n\r\n", (200, 400)),
    ("session headers that differ", "GET / HTTP/1.1\r\nHost: elsewhere.example\r\nX-Tunnel-Session: red\r\n"
     "X-Tunnel-Session: blue\r\n\r\n", (400, 404)),
    ("list in the session header",
     "GET / HTTP/1.1\r\nHost: elsewhere.example\r\nX-Tunnel-Session: red, blue\r\n\r\n", (404,)),
    ("session header with an underscore",
     "GET / HTTP/1.1\r\nHost: red.localhost\r\nX_Tunnel_Session: blue\r\n\r\n", (200,)),
    ("session header that Connection names", "GET / HTTP/1.1\r\nHost: red.localhost\r\n"
     "Connection: X-Tunnel-Session, Host\r\nX-Tunnel-Session: blue\r\n\r\n", (200, 400)),
    ("path of the other", "GET /blue/../blue HTTP/1.1\r\nHost: red.localhost\r\n\r\n", (200,)),
    ("path that looks like a URL", "GET //blue.localhost/ HTTP/1.1\r\nHost: red.localhost\r\n\r\n", (200,)),
    ("user information", "GET / HTTP/1.1\r\nHost: blue.localhost@red.localhost\r\n\r\n", (400,)),
    ("user information the other way", "GET / HTTP/1.1\r\nHost: red.localhost@blue.localhost\r\n\r\n", (400,)),
    ("two hosts", "GET / HTTP/1.1\r\nHost: red.localhost\r\nHost: blue.localhost\r\n\r\n", (400,)),
    ("list of hosts", "GET / HTTP/1.1\r\nHost: red.localhost, blue.localhost\r\n\r\n", (400,)),
    ("folded host", "GET / HTTP/1.1\r\nHost: red.localhost\r\n blue.localhost\r\n\r\n", (400,)),
    ("host with a tab", "GET / HTTP/1.1\r\nHost: blue.localhost\tred.localhost\r\n\r\n", (400,)),
    ("absolute-form and a host that differ",
     "GET http://red.localhost/ HTTP/1.1\r\nHost: blue.localhost\r\n\r\n", (200, 400)),
    ("absolute-form with the session header", "GET http://red.localhost/ HTTP/1.1\r\nHost: red.localhost\r\n"
     "X-Tunnel-Session: blue\r\n\r\n", (200,)),
    ("absolute-form with user information",
     "GET http://blue.localhost@red.localhost/ HTTP/1.1\r\nHost: red.localhost\r\n\r\n",
     (200, 400)),
    ("authority-form", "CONNECT blue.localhost:80 HTTP/1.1\r\nHost: red.localhost\r\n\r\n", (400, 405, 501)),
    ("forwarded host", "GET / HTTP/1.1\r\nHost: red.localhost\r\nX-Forwarded-Host: blue.localhost\r\n"
     "Forwarded: host=blue.localhost\r\nX-Host: blue.localhost\r\nX-Original-URL: http://blue.localhost/\r\n"
     "X-HTTP-Host-Override: blue.localhost\r\n\r\n", (200,)),
    ("deeper host", "GET / HTTP/1.1\r\nHost: x.blue.localhost\r\n\r\n", (404,)),
    ("deeper host of both", "GET / HTTP/1.1\r\nHost: red.blue.localhost\r\n\r\n", (404,)),
    ("deeper host of both, turned", "GET / HTTP/1.1\r\nHost: blue.red.localhost\r\n\r\n", (404,)),
    ("deeper host with the session header",
     "GET / HTTP/1.1\r\nHost: x.red.localhost\r\nX-Tunnel-Session: blue\r\n\r\n", (404,)),
    ("empty label", "GET / HTTP/1.1\r\nHost: .blue.localhost\r\n\r\n", (400, 404)),
    ("dot upon dot", "GET / HTTP/1.1\r\nHost: blue..localhost\r\n\r\n", (400, 404)),
    ("longer domain", "GET / HTTP/1.1\r\nHost: blue.localhost.example\r\n\r\n", (404,)),
    ("domain glued on", "GET / HTTP/1.1\r\nHost: bluelocalhost\r\n\r\n", (404,)),
    ("prefix", "GET / HTTP/1.1\r\nHost: blu.localhost\r\n\r\n", (404,)),
    ("domain alone", "GET / HTTP/1.1\r\nHost: localhost\r\n\r\n", (404,)),
    ("no host at all", "GET / HTTP/1.0\r\n\r\n", (404,)),
    ("empty host", "GET / HTTP/1.1\r\nHost: \r\n\r\n", (400, 404)),
    ("host in percent", "GET / HTTP/1.1\r\nHost: %62lue.localhost\r\n\r\n", (400, 404)),
    ("host in wide letters", "GET / HTTP/1.1\r\nHost: \uff42lue.localhost\r\n\r\n", (400,)),
    ("host in UTF-8", "GET / HTTP/1.1\r\nHost: bl\u00fce.localhost\r\n\r\n", (400,)),
    ("host with NUL", "GET / HTTP/1.1\r\nHost: blue.localhost\0red.localhost\r\n\r\n", (400,)),
    ("port that is a host", "GET / HTTP/1.1\r\nHost: red.localhost:blue.localhost\r\n\r\n", (400,)),
    ("smuggled by lengths",
     "POST / HTTP/1.1\r\nHost: red.localhost\r\nContent-Length: 4\r\nTransfer-Encoding: chunked\r\n\r\n"
     "0\r\n\r\nGET / HTTP/1.1\r\nHost: blue.localhost\r\n\r\n", (400,)),
    ("smuggled in a body", "POST / HTTP/1.1\r\nHost: red.localhost\r\nContent-Length: 42\r\n\r\n"
     "GET / HTTP/1.1\r\nHost: blue.localhost\r\n\r\nxx", (200,)),
]  # fmt: skip


@pytest.mark.parametrize(("request_text", "statuses"), [row[1:] for row in REQUESTS], ids=[row[0] for row in REQUESTS])
def test_request_that_is_not_plainly_for_a_tunnel_reaches_nothing_of_it(
    pair: Pair, request_text: str, statuses: tuple[int, ...]
) -> None:
    with RawVisitor(pair.server.http) as visitor:
        visitor.send(request_text.encode())
        answer = visitor.read_answer()
    assert answer.status in statuses
    assert SECRETS["blue"] not in answer.body
    assert pair.seen("blue") == []
    if answer.status == 200:
        assert answer.body == SECRETS["red"]


SPELLINGS = [
    "red.localhost",
    "RED.localhost",
    "Red.LocalHost",
    "red.localhost.",
    "red.localhost:80",
    "red.localhost.:1",
]


@pytest.mark.parametrize("name", SECRETS)
def test_every_spelling_of_a_host_is_the_same_tunnel(pair: Pair, name: str) -> None:
    for spelling in SPELLINGS:
        host = spelling.replace("red", name).replace("RED", name.upper()).replace("Red", name.title())
        answer = visit(pair.server.http, host=host)
        assert (answer.status, answer.body) == (200, SECRETS[name]), host
    answer = visit(pair.server.http, host="elsewhere.example", fields={"X-Tunnel-Session": name.upper()})
    assert (answer.status, answer.body) == (200, SECRETS[name])
    assert pair.seen(OTHER[name]) == []


def test_session_header_is_no_backends_business(pair: Pair) -> None:
    visit(pair.server.http, host="elsewhere.example", fields={"X-Tunnel-Session": "red"})
    assert b"tunnel-session" not in pair.seen("red")[0].lower()


def test_hosts_in_turns_on_one_connection_are_told_apart(pair: Pair) -> None:
    turns = ["red", "blue", "blue", "red", "blue", "red"] * 20
    with RawVisitor(pair.server.http) as visitor:
        for turn, name in enumerate(turns):
            visitor.get(f"/{turn}", host=f"{name}.localhost")
            assert visitor.read_answer().body == SECRETS[name]
    for name in SECRETS:
        assert all(b"Host: %b.localhost" % name.encode() in head for head in pair.seen(name))


def test_hosts_in_turns_in_one_packet_are_told_apart(pair: Pair) -> None:
    turns = ["red", "blue", "blue", "red", "x.red", "blue", "none", "red"] * 10
    with RawVisitor(pair.server.http) as visitor:
        visitor.send(b"".join(b"GET / HTTP/1.1\r\nHost: %b.localhost\r\n\r\n" % name.encode() for name in turns))
        answers = [visitor.read_answer() for _ in turns]
    for name, answer in zip(turns, answers, strict=True):
        if name in SECRETS:
            assert (answer.status, answer.body) == (200, SECRETS[name])
        else:
            assert answer.status == 404
            assert not any(secret in answer.body for secret in SECRETS.values())


def test_many_at_once_get_each_its_own(pair: Pair) -> None:
    wrong: list[Answer] = []

    def visiting(name: str) -> None:
        for _ in range(30):
            answer = visit(pair.server.http, host=f"{name}.localhost")
            if answer.body != SECRETS[name]:
                wrong.append(answer)

    threads = [threading.Thread(target=visiting, args=(name,)) for name in [*SECRETS] * 6]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not wrong


# By a client


class Intruder(LinkOwner):
    """A client of one tunnel that tries to be of the other."""

    def __init__(self) -> None:
        self.messages: list[ControlMessage] = []
        self.asked: list[RequestHead] = []

    def link_control(self, link: Link, message: ControlMessage) -> None:
        self.messages.append(message)

    def link_request(self, link: Link, leg: StreamLeg, head: RequestHead) -> RequestHead:
        self.asked.append(head)
        return super().link_request(link, leg, head)


@asynccontextmanager
async def intruder(pair: Pair) -> AsyncIterator[tuple[Link, Intruder]]:
    join = JoinString.parse(pair.server.join)
    authority = next(pair.server.state.rglob("ca.pem")).read_bytes()
    owner = Intruder()
    engine = select_engine(pair.engine)
    trust = ClientTrust(join.host, authority)
    (endpoint,) = await resolve(join.host, join.port, 10)
    link = (await dial(engine, endpoint, trust, owner, WindowBudget(1 << 20), timeout=10)).link
    try:
        yield link, owner
    finally:
        link.close()
        link.abandon(LinkClosed(0, ""))
        await settle()


async def _answer(owner: Intruder) -> ControlMessage:
    async with asyncio.timeout(10):
        while not owner.messages:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    return owner.messages[0]


@pytest.mark.parametrize(
    "wish", ["blue", "BLUE", "blue.", "x.blue", "red.blue", "blue\0", "*", "bl*", "..", "blue.localhost"]
)
async def test_token_of_one_tunnel_opens_no_spelling_of_the_other(pair: Pair, wish: str) -> None:
    async with intruder(pair) as (link, owner):
        link.send_control(Hello(1, wish, "i" * 32, pair.tokens["red"]))
        answer = await _answer(owner)
        assert isinstance(answer, Refuse)
        assert answer.code == "token_scope"
        visits = [await asyncio.to_thread(visit, pair.server.http, host="blue.localhost") for _ in range(5)]
        assert [answer.body for answer in visits] == [SECRETS["blue"]] * 5
        assert not owner.asked


async def test_crafted_control_messages_reach_no_other_tunnel(pair: Pair) -> None:
    """A link that serves red says everything there is to say, of blue too; only red's requests ever come to it."""
    async with intruder(pair) as (link, owner):
        link.send_control(Hello(1, "red", "i" * 32, pair.tokens["red"]))
        assert isinstance(await _answer(owner), Welcome)
        raw = [encode_credit(stream, 2**62 - 1) for stream in (0, 1, 5, 9, 13, 4000)]
        link._control_out += raw
        link.send_control(Welcome("blue", ["http://blue.localhost"]))
        link.send_control(Refuse("token_revoked", "blue", True))
        await asyncio.sleep(0.1)
        answers = [await asyncio.to_thread(visit, pair.server.http, host="blue.localhost") for _ in range(20)]
        assert [answer.body for answer in answers] == [SECRETS["blue"]] * 20
        assert not owner.asked
        link.send_control(Hello(1, "blue", "i" * 32, pair.tokens["red"]))
        async with asyncio.timeout(10):
            while link.closed is None:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        answer = await asyncio.to_thread(visit, pair.server.http, host="blue.localhost")
        assert answer.body == SECRETS["blue"]


def test_revoking_one_leaves_the_other_alone(engine: str, tmp_path: Path) -> None:
    with Processes(tmp_path) as processes:
        pair = Pair(processes, engine)
        try:
            wrong: list[Answer] = []
            stopped = threading.Event()

            def visiting() -> None:
                while not stopped.is_set():
                    answer = visit(pair.server.http, host="blue.localhost")
                    if (answer.status, answer.body) != (200, SECRETS["blue"]):
                        wrong.append(answer)

            visitor = threading.Thread(target=visiting)
            visitor.start()
            pair.server.revoke(pair.tokens["red"])
            assert pair.clients["red"].process.exited(10) == 1
            assert visit(pair.server.http, host="red.localhost").status == 503
            poll(lambda: b"/" in b"".join(pair.seen("blue")[-1:]))
            stopped.set()
            visitor.join(30)
            assert not wrong
            assert pair.clients["blue"].process.running
        finally:
            pair.close()
