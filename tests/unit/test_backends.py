"""What a user may name as a backend, and those that are called, not dialled: ASGI applications, httpx transports."""

import asyncio
import errno
import socket
import ssl
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, MutableMapping
from pathlib import Path
from typing import Any

import httpx
import pytest

from quictunnel.backends.asgi import ApplicationError, AsgiBackend, load_application
from quictunnel.backends.target import Target, parse_backend
from quictunnel.backends.transport import TransportBackend
from quictunnel.client.choose import open_backend
from quictunnel.http.origin import Origin
from quictunnel.wire.errors import ErrorCode, TunnelError
from quictunnel.wire.frames import Data, End, Frame, RequestHead, ResponseHead
from tests.support.backend import END, Visitor, request, turns
from tests.support.clock import run

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

UPLOAD = request(b"POST", body=True)


# Targets

TARGETS = {
    "3000": (Target("http", "localhost", 3000), "localhost:3000"),
    ":3000": (Target("http", "localhost", 3000), "localhost:3000"),
    " 3000\n": (Target("http", "localhost", 3000), "localhost:3000"),
    "localhost:3000": (Target("http", "localhost", 3000), "localhost:3000"),
    "127.0.0.1:80": (Target("http", "127.0.0.1", 80), "127.0.0.1"),
    "my_service:8000": (Target("http", "my_service", 8000), "my_service:8000"),
    "[::1]:3000": (Target("http", "::1", 3000), "[::1]:3000"),
    "[fe80::1%eth0]:3000": (Target("http", "fe80::1%eth0", 3000), "[fe80::1]:3000"),
    "http://localhost": (Target("http", "localhost", 80), "localhost"),
    "http://localhost:3000/": (Target("http", "localhost", 3000), "localhost:3000"),
    "HTTP://Example.com:81": (Target("http", "Example.com", 81), "Example.com:81"),
    "https://example.com": (Target("https", "example.com", 443), "example.com"),
    "https://[::1]:8443": (Target("https", "::1", 8443), "[::1]:8443"),
    "unix:/run/app.sock": (Target("unix", path="/run/app.sock"), "localhost"),
    "unix:///run/app.sock": (Target("unix", path="/run/app.sock"), "localhost"),
    "unix:app.sock": (Target("unix", path="app.sock"), "localhost"),
    "main:app": (Target("asgi", application="main:app"), "localhost"),
    "my_pkg.web.main:site.app": (Target("asgi", application="my_pkg.web.main:site.app"), "localhost"),
    "main:make_app()": (Target("asgi", application="main:make_app()"), "localhost"),
}


@pytest.mark.parametrize("text", TARGETS)
def test_backend_is_read_as(text: str) -> None:
    target, authority = TARGETS[text]
    assert parse_backend(text) == target
    assert target.authority == authority
    assert parse_backend(str(target)) == target


WRONG = {
    "": "no backend",
    "0": "from 1 to 65535",
    "65536": "from 1 to 65535",
    "999999999999": "from 1 to 65535",
    "localhost": "port is missing",
    "example.com": "port or an application is missing",
    "localhost:": "neither HOST:PORT",
    "localhost:http": None,  # names of Python, so an application
    "localhost:-1": "neither HOST:PORT",
    "localhost:3000/path": "no path",
    "localhost:3000?x": "no path",
    "::1:3000": "brackets",
    "[::1]": "port",
    "[::1:3000": "port",
    "[nonsense]:3000": "not an IPv6 address",
    "-x:3000": "not a host name",
    "a b:3000": "not a host name",
    "http://": "host is missing",
    "http://:80": "host is missing",
    "http://localhost:": "port after the colon is missing",
    "http://localhost:x": "from 1 to 65535",
    "http://localhost:70000": "from 1 to 65535",
    "http://localhost/path": "no path",
    "http://localhost?x=1": "no path",
    "http://localhost#x": "no path",
    "http://user:secret@localhost:80": "user name or password",
    "user:secret@localhost:80": "user name or password",
    "ws://localhost:80": "WebSockets pass through http://",
    "ftp://localhost": "unknown",
    "unix:": "path of the socket is missing",
    "unix://host/run/x": "full path after unix:",
    "unix:/" + "x" * 107: "107 bytes",
    "main:": "neither HOST:PORT",
    "main:app.": "neither HOST:PORT",
    "main:9app": "neither HOST:PORT",
    "a\x1b[2J:1": "control characters",
    "x" * 3000: "too long",
}


@pytest.mark.parametrize("text", WRONG)
def test_wrong_backend_is_refused_with_a_reason(text: str) -> None:
    reason = WRONG[text]
    if reason is None:
        assert parse_backend(text).kind == "asgi"
        return
    with pytest.raises(ValueError, match=reason) as caught:
        parse_backend(text)
    assert "secret" not in str(caught.value)


async def test_backend_is_opened_by_its_kind(tmp_path: Path) -> None:
    plain = await open_backend("3000", connect_time=1, head_time=2, body_idle_time=4, keep_alive=3)
    assert isinstance(plain, Origin)
    limits = plain.limits
    assert (limits.connect_time, limits.head_time, limits.idle_keep_alive, limits.body_idle_time) == (1, 2, 3, 4)
    assert (plain.name, plain.authority) == ("http://localhost:3000", "localhost:3000")
    unix = await open_backend(f"unix:{tmp_path}/app.sock")
    assert unix.name == f"unix:{tmp_path}/app.sock"
    secure = await open_backend("https://example.com")
    assert (secure.name, secure.authority) == ("https://example.com:443", "example.com")
    app = await open_backend("quictunnel.demo:app")
    assert isinstance(app, AsgiBackend)
    for backend in (plain, unix, secure, app):
        await backend.aclose()


@pytest.mark.parametrize(
    ("text", "options", "reason"),
    [
        ("3000", {"insecure": True}, "for https:// backends"),
        ("main:app", {"ca": Path("x")}, "for https:// backends"),
        ("https://a", {"ca": Path("x"), "insecure": True}, "contradict"),
        ("https://a", {"ca": Path("missing.pem")}, "missing.pem: No such file"),
        ("https://a", {"ca": Path(__file__)}, "no certificates"),
        ("no_such_module_of_ours:app", {}, "there is no module 'no_such_module_of_ours'"),
    ],
)
async def test_backend_that_cannot_be_opened_says_why(text: str, options: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        await open_backend(text, **options)


# Loading an application


@pytest.fixture
def modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory for modules."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        if name.startswith("loaded_"):
            del sys.modules[name]


def test_application_is_found_in_the_working_directory(modules: Path) -> None:
    (modules / "loaded_one.py").write_text(
        "async def app(scope, receive, send): ...\nclass site: inner = app\ndef make(): return app\n"
    )
    app = load_application("loaded_one:app")
    assert callable(app)
    assert load_application("loaded_one:site.inner") is app
    assert load_application("loaded_one:make()") is app


@pytest.mark.parametrize(
    ("text", "code", "reason"),
    [
        ("loaded_none:app", None, "there is no module 'loaded_none'"),
        ("loaded_a.b:app", "", "there is no module 'loaded_a.b'"),
        ("loaded_b:app", "import no_such_thing", "importing loaded_b failed: No module named 'no_such_thing'"),
        ("loaded_c:app", "1 / 0", "importing loaded_c failed: ZeroDivisionError"),
        ("loaded_d:app", "def (", "importing loaded_d failed: SyntaxError"),
        ("loaded_e:app", "", "loaded_e has no attribute 'app'"),
        ("loaded_f:app", "app = 5", "this is 'int', not an ASGI application"),
        ("loaded_g:app()", "app = 5", "cannot be called: leave out the"),
        ("loaded_h:app()", "def app(): 1 / 0", "it raised ZeroDivisionError"),
        ("loaded_i:app()", "def app(): return 5", "this is 'int', not an ASGI application"),
    ],
)
def test_application_that_cannot_be_loaded_says_why(modules: Path, text: str, code: str | None, reason: str) -> None:
    if code is not None:
        (modules / f"{text.partition(':')[0].partition('.')[0]}.py").write_text(code)
    with pytest.raises(ApplicationError, match=reason):
        load_application(text)


# ASGI: one request


async def ask(backend: Any, head: RequestHead | None = None, *rest: Frame) -> Visitor:
    visitor = Visitor().ask(backend.open(), head or request(), *rest)
    await turns()
    return visitor


def start(status: int = 200, *headers: tuple[bytes, bytes], **more: Any) -> Message:
    return {"type": "http.response.start", "status": status, "headers": list(headers), **more}


def body(data: bytes = b"", more: bool = False) -> Message:
    return {"type": "http.response.body", "body": data, "more_body": more}


def saying(*messages: Message) -> AsgiBackend:
    """A backend whose application sends these and returns."""

    async def app(scope: Message, receive: Receive, send: Send) -> None:
        for message in messages:
            await send(message)

    return AsgiBackend(app, lifespan="off")


async def scope_of(head: RequestHead, **options: Any) -> Message:
    scopes: list[Message] = []

    async def app(scope: Message, receive: Receive, send: Send) -> None:
        scopes.append(scope)
        await send(start())
        await send(body())

    backend = AsgiBackend(app, lifespan="off", **options)
    assert (await ask(backend, head)).statuses == [200]
    await backend.aclose()
    return scopes[0]


async def test_scope_says_what_the_visitor_asked() -> None:
    fields = [(b"x-forwarded-for", b"10.0.0.9, 192.0.2.1"), (b"cookie", b"1"), (b"cookie", b"2")]
    scope = await scope_of(
        RequestHead(b"PATCH", b"https", b"App.Example:8443", b"/a%20b/%C3%A9//../c?q=%20&", fields, False)
    )
    assert scope["type"] == "http"
    assert scope["asgi"]["version"] == "3.0"
    assert scope["http_version"] == "1.1"
    assert scope["method"] == "PATCH"
    assert scope["scheme"] == "https"
    assert scope["path"] == "/a b/é//../c"
    assert scope["raw_path"] == b"/a%20b/%C3%A9//../c"
    assert scope["query_string"] == b"q=%20&"
    assert scope["root_path"] == ""
    assert scope["headers"] == [(b"host", b"App.Example:8443"), *fields]
    assert scope["client"] == ("192.0.2.1", 0)
    assert scope["server"] == ("app.example", 8443)


async def test_scope_without_a_host_or_an_address() -> None:
    scope = await scope_of(request(authority=b"", fields=[(b"x-forwarded-for", b"unknown")]), root_path="/api")
    assert scope["headers"][0] == (b"host", b"localhost")
    assert scope["client"] is None
    assert scope["server"] == ("localhost", 80)
    assert (scope["path"], scope["raw_path"], scope["root_path"]) == ("/api/", b"/api/", "/api")


ANSWERS: dict[str, tuple[bytes, list[Message], list[Frame]]] = {
    "a body": (b"GET", [start(), body(b"hello")], [ResponseHead(200, []), Data(b"hello"), END]),
    "pieces": (
        b"GET",
        [start(), body(b"a", True), body(b"", True), body(b"b", True), body()],
        [ResponseHead(200, []), Data(b"a"), Data(b"b"), END],
    ),
    "fields": (
        b"GET",
        [start(404, (b"Set-Cookie", b"1"), (b"set-cookie", b"2"), (b"Connection", b"close")), body()],
        [ResponseHead(404, [(b"set-cookie", b"1"), (b"set-cookie", b"2")]), END],
    ),
    "length": (
        b"GET",
        [start(200, (b"content-length", b"5")), body(b"he", True), body(b"llo")],
        [ResponseHead(200, [(b"content-length", b"5")]), Data(b"he"), Data(b"llo"), END],
    ),
    "framing is not the application's": (
        b"GET",
        [start(200, (b"transfer-encoding", b"chunked")), body(b"a")],
        [ResponseHead(200, []), Data(b"a"), END],
    ),
    "HEAD": (
        b"HEAD",
        [start(200, (b"content-length", b"5")), body(b"hello")],
        [ResponseHead(200, [(b"content-length", b"5")]), END],
    ),
    "204": (b"GET", [start(204, (b"content-length", b"0")), body()], [ResponseHead(204, []), END]),
    "304": (
        b"GET",
        [start(304, (b"content-length", b"5")), body()],
        [ResponseHead(304, [(b"content-length", b"5")]), END],
    ),
    "trailers": (
        b"GET",
        [
            start(trailers=True),
            body(b"a"),
            {"type": "http.response.trailers", "headers": [(b"X-Sum", b"1")], "more_trailers": True},
            {"type": "http.response.trailers", "headers": [(b"y", b"2")]},
        ],
        [ResponseHead(200, []), Data(b"a"), End([(b"x-sum", b"1"), (b"y", b"2")])],
    ),
}


@pytest.mark.parametrize("case", ANSWERS)
async def test_what_an_application_sends_becomes(case: str) -> None:
    method, messages, frames = ANSWERS[case]
    backend = saying(*messages)
    visitor = await ask(backend, request(method))
    assert visitor.error is None
    assert visitor.frames == frames
    assert backend.in_flight == 0
    await backend.aclose()


BROKEN: dict[str, tuple[list[Message], ErrorCode, bool]] = {
    # name: messages, code, whether a head has gone out before
    "nothing": ([], ErrorCode.CONNECTION_TERMINATED, False),
    "a start alone": ([start()], ErrorCode.CONNECTION_TERMINATED, False),
    "a body alone": ([body(b"a")], ErrorCode.CONNECTION_TERMINATED, False),
    "two starts": ([start(), start()], ErrorCode.CONNECTION_TERMINATED, False),
    "unknown message": ([{"type": "websocket.accept"}], ErrorCode.CONNECTION_TERMINATED, False),
    "line end in a value": ([start(200, (b"a", b"b\r\nc: d")), body()], ErrorCode.HTTP_PROTOCOL_ERROR, False),
    "bad name": ([start(200, (b"a b", b"c")), body()], ErrorCode.HTTP_PROTOCOL_ERROR, False),
    "text for bytes": ([start(200, ("a", "b")), body()], ErrorCode.CONNECTION_TERMINATED, False),  # type: ignore[arg-type]
    "two lengths": (
        [start(200, (b"content-length", b"1"), (b"content-length", b"2")), body(b"a")],
        ErrorCode.HTTP_PROTOCOL_ERROR,
        False,
    ),
    "status 99": ([start(99), body()], ErrorCode.HTTP_PROTOCOL_ERROR, False),
    "status 101": ([start(101), body()], ErrorCode.HTTP_PROTOCOL_ERROR, False),
    "end missing": ([start(), body(b"a", True)], ErrorCode.CONNECTION_TERMINATED, True),
    "too long": ([start(200, (b"content-length", b"1")), body(b"ab")], ErrorCode.HTTP_PROTOCOL_ERROR, True),
    "too short": ([start(200, (b"content-length", b"2")), body(b"a")], ErrorCode.HTTP_PROTOCOL_ERROR, True),
    "trailers missing": ([start(trailers=True), body(b"a")], ErrorCode.CONNECTION_TERMINATED, True),
    "line end in a trailer": (
        [start(trailers=True), body(), {"type": "http.response.trailers", "headers": [(b"a", b"\r\n")]}],
        ErrorCode.HTTP_PROTOCOL_ERROR,
        True,
    ),
}


@pytest.mark.parametrize("case", BROKEN)
async def test_broken_application_is_never_complete(case: str) -> None:
    messages, code, begun = BROKEN[case]
    backend = saying(*messages)
    visitor = await ask(backend)
    assert visitor.code is code
    assert not visitor.ended
    assert visitor.statuses == ([200] if begun else [])
    assert backend.in_flight == 0


async def test_exception_before_the_head_is_a_502_that_does_not_tell_its_text(log_lines: list[str]) -> None:
    async def app(scope: Message, receive: Receive, send: Send) -> None:
        raise LookupError("password=secret")

    visitor = await ask(AsgiBackend(app, lifespan="off"))
    assert visitor.error is not None
    assert visitor.error.fault.status == 502
    assert visitor.error.details == "the application raised LookupError"
    assert any("LookupError" in line for line in log_lines)


async def test_exception_within_the_body_cuts() -> None:
    async def app(scope: Message, receive: Receive, send: Send) -> None:
        await send(start())
        await send(body(b"a", True))
        raise LookupError

    visitor = await ask(AsgiBackend(app, lifespan="off"))
    assert visitor.body == b"a"
    assert not visitor.ended
    assert visitor.code is ErrorCode.CONNECTION_TERMINATED


async def echo(scope: Message, receive: Receive, send: Send) -> None:
    await send(start())
    more = True
    while more:
        message = await receive()
        more = message.get("more_body", False)
        await send(body(message.get("body", b""), more))


async def test_body_is_streamed_both_ways_as_it_comes() -> None:
    backend = AsgiBackend(echo, lifespan="off")
    visitor = await ask(backend, UPLOAD)
    assert visitor.frames == []
    for piece in (b"a", b"b"):
        visitor.peer.receive(Data(piece))
        await turns()
        assert visitor.frames[-1] == Data(piece)
    visitor.peer.receive(END)
    await turns()
    assert visitor.frames == [ResponseHead(200, []), Data(b"a"), Data(b"b"), END]


async def test_last_piece_of_a_body_says_that_it_is_the_last() -> None:
    messages: list[Message] = []

    async def app(scope: Message, receive: Receive, send: Send) -> None:
        messages.extend([await receive(), await receive()])
        await send(start())
        await send(body())
        messages.append(await receive())

    backend = AsgiBackend(app, lifespan="off")
    await ask(backend, UPLOAD, Data(b"a"), Data(b"b"), END)
    assert [(each["body"], each["more_body"]) for each in messages[:2]] == [(b"a", True), (b"b", False)]
    assert messages[2] == {"type": "http.disconnect"}


async def test_upload_that_the_application_does_not_read_pauses_the_peer() -> None:
    going = asyncio.Event()

    async def app(scope: Message, receive: Receive, send: Send) -> None:
        await going.wait()
        await echo(scope, receive, send)

    backend = AsgiBackend(app, lifespan="off")
    visitor = await ask(backend, UPLOAD, *[Data(b"x" * 16384)] * 3)
    assert not visitor.paused
    visitor.peer.receive(Data(b"x" * 16384))
    assert visitor.paused
    going.set()
    await turns(30)
    assert not visitor.paused
    visitor.peer.receive(END)
    await visitor.over()
    assert len(visitor.body) == 65536


async def test_application_waits_while_the_peer_cannot_take_more() -> None:
    sent = 0

    async def app(scope: Message, receive: Receive, send: Send) -> None:
        nonlocal sent
        await send(start())
        for _ in range(4):
            await send(body(b"x" * 1000, True))
            sent += 1
        await send(body(b"y" * 600_000))

    backend = AsgiBackend(app, lifespan="off")
    visitor = Visitor()
    leg = backend.open()
    leg.pause()
    visitor.ask(leg, request())
    await turns()
    assert (sent, visitor.body) == (0, b"")
    leg.resume()
    await turns()
    assert sent == 4
    assert visitor.ended
    assert len(visitor.body) == 604_000
    assert max(len(frame.data) for frame in visitor.frames if isinstance(frame, Data)) <= 262_144


async def test_expectation_is_met_when_the_application_asks_for_the_body() -> None:
    going = asyncio.Event()

    async def app(scope: Message, receive: Receive, send: Send) -> None:
        await going.wait()
        await echo(scope, receive, send)

    head = request(b"POST", [(b"expect", b"100-Continue")], body=True)
    visitor = await ask(AsgiBackend(app, lifespan="off"), head)
    assert visitor.frames == []
    going.set()
    await turns()
    assert visitor.frames == [ResponseHead(100, [])]
    visitor.peer.receive(Data(b"a"))
    visitor.peer.receive(END)
    await turns()
    assert visitor.statuses == [100, 200]
    assert visitor.body == b"a"


async def test_refusal_without_reading_asks_for_no_body() -> None:
    head = request(b"POST", [(b"expect", b"100-continue")], body=True)
    visitor = await ask(saying(start(413), body()), head)
    assert visitor.statuses == [413]
    assert visitor.ended


async def test_websocket_is_not_implemented() -> None:
    visitor = await ask(saying(start(), body()), request(protocol=b"websocket", body=True))
    assert visitor.code is ErrorCode.NOT_IMPLEMENTED


async def test_other_protocols_are_ignored() -> None:
    backend = AsgiBackend(echo, lifespan="off")
    visitor = await ask(backend, request(protocol=b"foo", body=True), Data(b"meant for foo"))
    assert visitor.frames == [ResponseHead(200, []), END]


MALFORMED: dict[str, tuple[RequestHead, list[Frame]]] = {
    "line end in a value": (request(fields=[(b"a", b"b\r\n")]), []),
    "bad method": (request(b"G T"), []),
    "line end in the target": (request(target=b"/\r\n"), []),
    "two lengths": (request(b"POST", [(b"content-length", b"1")] * 2, body=True), []),
    "length without a body": (request(fields=[(b"content-length", b"1")]), []),
    "too long": (request(b"POST", [(b"content-length", b"1")], body=True), [Data(b"ab")]),
    "too short": (request(b"POST", [(b"content-length", b"2")], body=True), [Data(b"a"), END]),
}


@pytest.mark.parametrize("kind", ["asgi", "transport"])
@pytest.mark.parametrize("case", MALFORMED)
async def test_malformed_request_is_refused(case: str, kind: str) -> None:
    head, rest = MALFORMED[case]
    app = AsgiBackend(echo, lifespan="off", leave_time=0)
    backend = app if kind == "asgi" else TransportBackend(Sleeping())
    visitor = await ask(backend, head, *rest)
    assert visitor.code is ErrorCode.BAD_REQUEST
    await backend.aclose()
    assert backend.in_flight == 0


# ASGI: endings and time


async def test_application_is_told_at_once_that_the_visitor_left() -> None:
    messages: list[Message] = []

    async def app(scope: Message, receive: Receive, send: Send) -> None:
        await receive()
        messages.append(await receive())
        with pytest.raises(OSError, match="left"):
            await send(start())

    backend = AsgiBackend(app, lifespan="off")
    visitor = await ask(backend)
    visitor.peer.abort(TunnelError(ErrorCode.CANCELLED))
    await turns()
    assert messages == [{"type": "http.disconnect"}]
    assert backend.in_flight == 0
    assert visitor.error is None


async def test_application_that_waits_for_the_body_is_told_that_the_visitor_left() -> None:
    messages: list[Message] = []

    async def app(scope: Message, receive: Receive, send: Send) -> None:
        messages.append(await receive())

    backend = AsgiBackend(app, lifespan="off")
    visitor = await ask(backend, UPLOAD)
    visitor.peer.abort(TunnelError(ErrorCode.CANCELLED))
    await turns()
    assert messages == [{"type": "http.disconnect"}]
    assert backend.in_flight == 0


async def test_sender_that_waits_for_a_visitor_who_leaves_goes_on_to_its_end() -> None:
    backend = saying(start(), body(b"a"))
    leg = backend.open()
    leg.pause()
    visitor = Visitor().ask(leg, request())
    await turns()
    assert backend.in_flight == 1
    leg.abort(TunnelError(ErrorCode.CANCELLED))
    await turns()
    assert backend.in_flight == 0
    assert visitor.statuses == [200]
    assert not visitor.ended


def test_application_that_does_not_care_is_cancelled_in_the_end() -> None:
    async def work() -> None:
        ends: list[float] = []
        loop = asyncio.get_running_loop()

        async def app(scope: Message, receive: Receive, send: Send) -> None:
            try:
                await asyncio.sleep(10_000)
            finally:
                ends.append(loop.time() - begun)

        backend = AsgiBackend(app, lifespan="off", leave_time=30, head_time=1000)
        begun = loop.time()
        visitor = await ask(backend)
        visitor.peer.abort(TunnelError(ErrorCode.CANCELLED))
        await asyncio.sleep(40)
        assert [round(end) for end in ends] == [30]
        assert backend.in_flight == 0

    run(work())


def test_application_that_does_not_answer_is_a_504() -> None:
    async def work() -> None:
        async def app(scope: Message, receive: Receive, send: Send) -> None:
            await asyncio.sleep(10_000)

        backend = AsgiBackend(app, lifespan="off", head_time=60, leave_time=1)
        visitor = await ask(backend)
        await asyncio.sleep(59)
        assert visitor.error is None
        await asyncio.sleep(3)
        assert visitor.code is ErrorCode.HTTP_RESPONSE_TIMEOUT
        assert backend.in_flight == 0

    run(work())


def test_application_is_not_to_blame_for_a_slow_upload() -> None:
    async def work() -> None:
        async def app(scope: Message, receive: Receive, send: Send) -> None:
            while (await receive()).get("more_body"):
                pass
            await asyncio.sleep(50)
            await send(start())
            await send(body())

        backend = AsgiBackend(app, lifespan="off", head_time=60)
        visitor = await ask(backend, UPLOAD)
        for _ in range(5):
            await asyncio.sleep(100)
            visitor.peer.receive(Data(b"a"))
        visitor.peer.receive(END)
        await asyncio.sleep(51)
        assert visitor.statuses == [200]
        assert visitor.ended

    run(work())


def test_closing_lets_background_work_finish_and_cancels_what_does_not() -> None:
    async def work() -> None:
        done: list[str] = []

        async def app(scope: Message, receive: Receive, send: Send) -> None:
            await send(start())
            await send(body())
            await asyncio.sleep(float(scope["path"][1:]))
            done.append(scope["path"])

        backend = AsgiBackend(app, lifespan="off")
        visitors = [await ask(backend, request(target=target)) for target in (b"/5", b"/500")]
        assert all(visitor.ended for visitor in visitors)
        assert backend.in_flight == 2
        await backend.aclose(10)
        assert done == ["/5"]
        assert backend.in_flight == 0
        assert (await ask(backend)).code is ErrorCode.NOT_ACCEPTED

    run(work())


async def test_closing_cuts_an_exchange_that_has_just_begun() -> None:
    backend = AsgiBackend(echo, lifespan="off")
    visitor = Visitor().ask(backend.open(), UPLOAD)
    await backend.aclose()
    assert visitor.code is ErrorCode.CONNECTION_TERMINATED
    assert backend.in_flight == 0


# ASGI: lifespan


def with_lifespan(events: list[str], startup: Message | Exception, shutdown: Message | None = None) -> Any:
    async def app(scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            await send(start(200, (b"x-state", str(scope["state"]).encode())))
            await send(body())
            return
        events.append((await receive())["type"])
        if isinstance(startup, Exception):
            raise startup
        scope["state"]["db"] = 1
        await send(startup)
        events.append((await receive())["type"])
        await send(shutdown or {"type": "lifespan.shutdown.complete"})

    return app


COMPLETE: Message = {"type": "lifespan.startup.complete"}


async def test_lifespan_is_run_and_its_state_given_to_requests() -> None:
    events: list[str] = []
    backend = AsgiBackend(with_lifespan(events, COMPLETE))
    await backend.start()
    assert events == ["lifespan.startup"]
    visitor = await ask(backend)
    assert visitor.head.fields == [(b"x-state", b"{'db': 1}")]
    await backend.aclose()
    assert events == ["lifespan.startup", "lifespan.shutdown"]


@pytest.mark.parametrize("message", ["no database", ""])
async def test_failed_startup_is_told(message: str) -> None:
    backend = AsgiBackend(with_lifespan([], {"type": "lifespan.startup.failed", "message": message}))
    with pytest.raises(ApplicationError, match=message or "did not say why"):
        await backend.start()
    await backend.aclose()


async def test_application_that_knows_no_lifespan_is_served() -> None:
    async def app(scope: Message, receive: Receive, send: Send) -> None:
        assert scope["type"] == "http"
        await send(start())
        await send(body())

    backend = AsgiBackend(app)
    await backend.start()
    assert (await ask(backend)).ended
    await backend.aclose()
    with pytest.raises(ApplicationError, match="raised AssertionError"):
        await AsgiBackend(app, lifespan="on").start()


def test_startup_has_a_limit() -> None:
    async def work() -> None:
        async def app(scope: Message, receive: Receive, send: Send) -> None:
            await asyncio.sleep(10_000)

        backend = AsgiBackend(app, start_time=60)
        with pytest.raises(ApplicationError, match="did not end within 60 s"):
            await backend.start()
        await backend.aclose()
        assert len(asyncio.all_tasks()) == 1

    run(work())


async def test_failed_shutdown_is_logged(log_lines: list[str]) -> None:
    backend = AsgiBackend(with_lifespan([], COMPLETE, {"type": "lifespan.shutdown.failed", "message": "stuck"}))
    await backend.start()
    await backend.aclose()
    assert any("stuck" in line for line in log_lines)


# httpx transports


class Sleeping(httpx.AsyncBaseTransport):
    """Never answers."""

    def __init__(self) -> None:
        self.closed = False

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        await asyncio.Event().wait()
        raise AssertionError

    async def aclose(self) -> None:
        self.closed = True


class Pieces(httpx.AsyncByteStream):
    def __init__(self, *pieces: bytes | Exception) -> None:
        self.pieces = pieces
        self.closed = False

    async def __aiter__(self) -> AsyncIterator[bytes]:
        for piece in self.pieces:
            if isinstance(piece, Exception):
                raise piece
            yield piece

    async def aclose(self) -> None:
        self.closed = True


def mock(answer: httpx.Response | Exception) -> tuple[TransportBackend, list[httpx.Request]]:
    requests: list[httpx.Request] = []

    async def handler(request: httpx.Request) -> httpx.Response:
        requests.append(request)
        if isinstance(answer, Exception):
            raise answer
        return answer

    return TransportBackend(httpx.MockTransport(handler), "https://backend.example:8443"), requests


async def test_transport_gets_the_request_as_it_is() -> None:
    backend, requests = mock(httpx.Response(200))
    fields = [(b"x", b"\xff"), (b"cookie", b"1"), (b"cookie", b"2"), (b"connection", b"close")]
    visitor = await ask(backend, request(b"pAtCh", fields, target=b"/a/../b/%2e?x=a|b&c#"))
    assert visitor.statuses == [200]
    sent = requests[0]
    assert sent.method == "pAtCh"
    assert sent.url.raw_path == sent.extensions["target"] == b"/a/../b/%2e?x=a|b&c#"
    assert (sent.url.scheme, sent.url.host, sent.url.port) == ("https", "backend.example", 8443)
    assert sent.headers.raw == [(b"Host", b"app.example"), *fields[:3]]
    await backend.aclose()


@pytest.mark.parametrize("target", [b"*", b"//x//y", b"/\xff\xfe?\xff", b"/[]?[]", b"/%zz", b"/?", b"/a:b@c"])
async def test_transport_gets_any_target(target: bytes) -> None:
    backend, requests = mock(httpx.Response(200))
    assert (await ask(backend, request(b"OPTIONS", target=target))).statuses == [200]
    assert requests[0].url.raw_path == target


async def test_transport_gets_the_body_framed() -> None:
    backend, requests = mock(httpx.Response(200))
    await ask(backend, UPLOAD, Data(b"hel"), Data(b"lo"), END)
    await ask(backend, request(b"PUT", [(b"content-length", b"1")], body=True), Data(b"!"), END)
    assert [each.content for each in requests] == [b"hello", b"!"]
    assert requests[0].headers["transfer-encoding"] == "chunked"
    assert "transfer-encoding" not in requests[1].headers


async def test_answer_of_a_transport_is_passed_on_undecoded() -> None:
    stream = Pieces(b"\x1f\x8b", b"", b"rest")
    headers = [(b"Set-Cookie", b"1"), (b"set-cookie", b"\xff"), (b"Content-Encoding", b"gzip"), (b"Connection", b"x")]
    backend, _ = mock(httpx.Response(203, headers=headers, stream=stream))
    visitor = await ask(backend)
    assert visitor.frames == [
        ResponseHead(203, [(b"set-cookie", b"1"), (b"set-cookie", b"\xff"), (b"content-encoding", b"gzip")]),
        Data(b"\x1f\x8b"),
        Data(b"rest"),
        END,
    ]
    assert stream.closed
    assert backend.in_flight == 0


async def test_httpx_and_an_application_behind_a_transport() -> None:
    backend = TransportBackend(httpx.ASGITransport(echo))
    visitor = await ask(backend, UPLOAD, Data(b"hello"), END)
    await visitor.over()
    assert visitor.body == b"hello"
    assert visitor.ended
    await backend.aclose()


def caused(error: Exception, cause: Exception) -> Exception:
    error.__cause__ = cause
    return error


FAILURES: dict[str, tuple[Exception, ErrorCode]] = {
    "refused": (httpx.ConnectError("no"), ErrorCode.CONNECTION_REFUSED),
    "unknown name": (caused(httpx.ConnectError("no"), socket.gaierror(-2, "no")), ErrorCode.DNS_ERROR),
    "no route": (
        caused(httpx.ConnectError("no"), OSError(errno.EHOSTUNREACH, "")),
        ErrorCode.DESTINATION_IP_UNROUTABLE,
    ),
    "untrusted": (
        caused(httpx.ConnectError("no"), ssl.SSLCertVerificationError(1, "no")),
        ErrorCode.TLS_CERTIFICATE_ERROR,
    ),
    "handshake": (caused(httpx.ConnectError("no"), ssl.SSLError(1, "no")), ErrorCode.TLS_ERROR),
    "connect time-out": (httpx.ConnectTimeout("no"), ErrorCode.CONNECTION_TIMEOUT),
    "read time-out": (httpx.ReadTimeout("no"), ErrorCode.HTTP_RESPONSE_TIMEOUT),
    "no connection free": (httpx.PoolTimeout("no"), ErrorCode.CONNECTION_LIMIT_REACHED),
    "lost": (httpx.ReadError("no"), ErrorCode.CONNECTION_TERMINATED),
    "closed": (httpx.RemoteProtocolError("Server disconnected"), ErrorCode.CONNECTION_TERMINATED),
    "garbage": (httpx.RemoteProtocolError("illegal status line"), ErrorCode.HTTP_PROTOCOL_ERROR),
    "refused by us": (httpx.LocalProtocolError("no"), ErrorCode.BAD_REQUEST),
    "anything else": (LookupError("secret"), ErrorCode.INTERNAL_ERROR),
}


@pytest.mark.parametrize("when", ["before the head", "within the body"])
@pytest.mark.parametrize("case", FAILURES)
async def test_failure_of_a_transport_is_told_as(case: str, when: str) -> None:
    error, code = FAILURES[case]
    stream = Pieces(b"a", error)
    backend, _ = mock(error if when == "before the head" else httpx.Response(200, stream=stream))
    visitor = await ask(backend)
    assert visitor.error is not None
    assert visitor.error.code is code
    assert "secret" not in visitor.error.details
    assert not visitor.ended
    assert backend.in_flight == 0
    assert stream.closed == (when == "within the body")


@pytest.mark.parametrize("length", [b"1", b"3"])
async def test_answer_of_a_transport_that_belies_its_length_is_cut(length: bytes) -> None:
    backend, _ = mock(httpx.Response(200, headers=[(b"content-length", length)], stream=Pieces(b"ab")))
    visitor = await ask(backend)
    assert visitor.code is ErrorCode.HTTP_PROTOCOL_ERROR
    assert not visitor.ended


async def test_transport_is_cancelled_at_once_when_the_visitor_leaves() -> None:
    transport = Sleeping()
    backend = TransportBackend(transport)
    visitor = await ask(backend)
    assert backend.in_flight == 1
    visitor.peer.abort(TunnelError(ErrorCode.CANCELLED))
    await turns()
    assert backend.in_flight == 0
    assert visitor.error is None
    await backend.aclose()
    assert transport.closed


def test_transport_that_does_not_answer_is_a_504() -> None:
    async def work() -> None:
        backend = TransportBackend(Sleeping(), head_time=60)
        visitor = await ask(backend)
        await asyncio.sleep(61)
        assert visitor.code is ErrorCode.HTTP_RESPONSE_TIMEOUT
        assert backend.in_flight == 0
        await backend.aclose()

    run(work())


@pytest.mark.parametrize("url", ["ftp://a", "http://a/path", "http://u:p@a", "http://a?b", "//a"])
def test_transport_needs_a_plain_base(url: str) -> None:
    with pytest.raises(ValueError, match="and nothing else"):
        TransportBackend(Sleeping(), url)
