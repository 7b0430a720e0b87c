"""The load test against servers on the loopback: what is success, what is which failure, and when requests leave."""

import asyncio
import datetime
import io
import ipaddress
import json
import socket
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from quictunnel.load import connections
from quictunnel.load.plan import make_options
from quictunnel.load.run import run_load

pytestmark = pytest.mark.usefixtures("no_task_left")

OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"


class Backend:
    """A server that answers each request with what ``answer`` writes; it counts."""

    def __init__(self) -> None:
        self.answer: Callable[[Backend, asyncio.StreamWriter], Awaitable[None] | None] = lambda _, writer: writer.write(
            OK
        )
        self.requests: list[bytes] = []
        self.bodies: list[int] = []
        self.connections = 0
        self.url = ""
        self.read_body = True
        self._open: set[asyncio.Task[None]] = set()
        self._server: asyncio.Server | None = None

    async def start(self, context: ssl.SSLContext | None = None) -> None:
        self._server = await asyncio.start_server(self._connected, "127.0.0.1", 0, ssl=context)
        port = self._server.sockets[0].getsockname()[1]
        self.url = f"{'https' if context else 'http'}://127.0.0.1:{port}/"

    async def stop(self) -> None:
        assert self._server is not None
        self._server.close()
        for task in self._open:
            task.cancel()
        await asyncio.gather(*self._open, return_exceptions=True)

    def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        task = asyncio.get_running_loop().create_task(self._serve(reader, writer))
        self._open.add(task)
        task.add_done_callback(self._open.discard)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while not writer.is_closing():
                head = await reader.readuntil(b"\r\n\r\n")
                self.requests.append(head)
                if self.read_body:
                    self.bodies.append(await self._skip_body(reader, head))
                answered = self.answer(self, writer)
                if answered is not None:
                    await answered
        except (asyncio.IncompleteReadError, OSError):
            pass
        finally:
            writer.transport.abort()

    @staticmethod
    async def _skip_body(reader: asyncio.StreamReader, head: bytes) -> int:
        _, found, rest = head.lower().partition(b"content-length: ")
        left = size = int(rest.split(b"\r\n")[0]) if found else 0
        while left:
            data = await reader.read(min(left, 65536))
            if not data:
                raise asyncio.IncompleteReadError(b"", left)
            left -= len(data)
        return size


@pytest.fixture
async def backend(no_task_left: None) -> AsyncIterator[Backend]:
    backend = Backend()
    await backend.start()
    yield backend
    await backend.stop()


async def load(url: str, **changes: Any) -> dict[str, Any]:
    """Run a load test and return its JSON, with ``err`` and ``status`` beside it."""
    values: dict[str, Any] = {"stages": "50", "duration": 0.2, "timeout": 2.0} | changes
    out, err = io.StringIO(), io.StringIO()
    status = await run_load(make_options(url, json=True, **values), out, err)
    told: dict[str, Any] = json.loads(out.getvalue()) if out.getvalue() else {}
    return told | {"status": status, "err": err.getvalue()}


def answering(*parts: bytes, close: bool = False) -> Callable[[Backend, asyncio.StreamWriter], Awaitable[None]]:
    """Write ``parts`` one by one."""

    async def answer(_: Backend, writer: asyncio.StreamWriter) -> None:
        for part in parts:
            writer.write(part)
            await writer.drain()
            await asyncio.sleep(0)
        if close:
            writer.close()
            await writer.wait_closed()

    return answer


# Success


@pytest.mark.parametrize(
    "parts",
    [
        pytest.param((OK,), id="length"),
        pytest.param((OK[:9], OK[9:30], OK[30:]), id="in parts"),
        pytest.param(
            (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", b"2\r\nok\r\n", b"0\r\n\r\n"), id="chunked"
        ),
        pytest.param(
            (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", b"2\r\nok\r\n0\r\nx: y\r\n\r\n"), id="trailers"
        ),
        pytest.param((b"HTTP/1.1 302 Found\r\nLocation: /\r\nContent-Length: 0\r\n\r\n",), id="redirect"),
        pytest.param((b"HTTP/1.1 204 No Content\r\n\r\n",), id="no content"),
        pytest.param((b"HTTP/1.1 304 Not Modified\r\nContent-Length: 7\r\n\r\n",), id="not modified"),
        pytest.param(
            (b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\nA: b\r\n\r\n", OK), id="informational"
        ),
    ],
)
async def test_complete_answers_succeed_on_kept_connections(backend: Backend, parts: tuple[bytes, ...]) -> None:
    backend.answer = answering(*parts)
    told = await load(backend.url, connections=5)
    assert told["total"] == {"scheduled": 10, "sent": 10, "succeeded": 10, "failed": 0, "failures": {}}
    assert len(backend.requests) == 10
    assert backend.connections <= 5


@pytest.mark.parametrize(
    "head", [b"HTTP/1.1 200 OK\r\n\r\n", b"HTTP/1.0 200 OK\r\n\r\n", b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n"]
)
async def test_answers_that_end_with_their_connection_succeed(backend: Backend, head: bytes) -> None:
    backend.answer = answering(head, b"some", b"thing", close=True)
    told = await load(backend.url)
    assert told["total"]["succeeded"] == backend.connections == 10
    assert told["stages"][0]["received_bytes"] == 90


async def test_connection_is_not_used_again_after_connection_close(backend: Backend) -> None:
    backend.answer = answering(OK.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n"))
    told = await load(backend.url)
    assert told["total"]["succeeded"] == backend.connections == 10


async def test_connection_is_not_used_again_after_an_answer_too_many(backend: Backend) -> None:
    backend.answer = answering(OK + OK)
    told = await load(backend.url)
    assert told["total"]["succeeded"] == backend.connections == 10


async def test_answer_to_head_has_no_body_and_keeps_the_connection(backend: Backend) -> None:
    backend.answer = answering(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n")
    told = await load(backend.url, method="HEAD", connections=5)
    assert told["total"]["succeeded"] == 10
    assert backend.connections <= 5


async def test_bodies_are_sent_whole(backend: Backend) -> None:
    told = await load(backend.url, method="POST", body_size=6_000_001, duration=0.1)
    assert told["total"]["succeeded"] == 5
    assert backend.bodies == [6_000_001] * 5


async def test_answer_before_the_upload_has_ended_succeeds(backend: Backend) -> None:
    backend.read_body = False
    backend.answer = answering(OK)
    told = await load(backend.url, method="POST", body_size=8_000_000, duration=0.1)
    assert told["total"]["succeeded"] == backend.connections == 5


async def test_name_under_localhost_is_this_machine(backend: Backend) -> None:
    told = await load(backend.url.replace("127.0.0.1", "some.name.localhost"))
    assert told["total"]["succeeded"] == 10
    assert b"\r\nHost: some.name.localhost:" in backend.requests[0]


async def test_stages_follow_one_another(backend: Backend) -> None:
    told = await load(backend.url, stages="20,100", duration=0.1, max_errors="0", max_p99="1000")
    assert [stage["sent"] for stage in told["stages"]] == [2, 10]
    assert told["status"] == told["exit_status"]
    assert "100/s" in told["err"]


async def test_table_goes_out_when_json_is_not_asked_for(backend: Backend) -> None:
    out = io.StringIO()
    await run_load(make_options(backend.url, stages="50", duration=0.1), out, io.StringIO())
    assert "5 of 5 requests succeeded" in out.getvalue()


async def test_terminal_sees_progress_on_one_line(backend: Backend) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    err = Terminal()
    await run_load(make_options(backend.url, stages="50", duration=0.3), io.StringIO(), err)
    assert err.getvalue().startswith("\r\x1b[K50/s")
    assert "\n" not in err.getvalue()


# An open loop


async def test_requests_leave_on_schedule_though_none_is_answered(backend: Backend) -> None:
    all_here = asyncio.Event()

    async def hold(backend: Backend, writer: asyncio.StreamWriter) -> None:
        if len(backend.requests) == 40:
            all_here.set()
        await all_here.wait()
        writer.write(OK)

    backend.answer = hold
    told = await load(backend.url, stages="200", timeout=10.0)
    assert told["total"]["succeeded"] == backend.connections == 40


async def test_latency_counts_from_the_scheduled_time(backend: Backend) -> None:
    """A server that does nothing for 0.3 s of 0.4 s is charged for all that came in that time."""
    start = asyncio.get_running_loop().time()

    async def stalled(_: Backend, writer: asyncio.StreamWriter) -> None:
        await asyncio.sleep(start + 0.3 - asyncio.get_running_loop().time())
        writer.write(OK)

    backend.answer = stalled
    told = await load(backend.url, stages="100", duration=0.4)
    latency = told["stages"][0]["latency_ms"]
    assert latency["max"] >= 250
    assert 80 <= latency["p50"] <= 250


async def test_bound_of_connections_holds_and_is_said(backend: Backend) -> None:
    async def slow(_: Backend, writer: asyncio.StreamWriter) -> None:
        await asyncio.sleep(0.03)
        writer.write(OK)

    backend.answer = slow
    told = await load(backend.url, stages="200", connections=2)
    assert backend.connections == 2
    assert told["total"]["succeeded"] == 40
    assert (
        told["stages"][0]["latency_ms"]["max"] >= 300
    )  # 40 requests, 2 at a time, 30 ms each, minus the stage's 200 ms
    assert told["fell_behind"]
    assert told["status"] == 3


async def test_requests_that_find_no_connection_in_time_fail(backend: Backend) -> None:
    async def never(_: Backend, writer: asyncio.StreamWriter) -> None:
        await asyncio.Event().wait()

    backend.answer = never
    told = await load(backend.url, connections=1, timeout=0.3)
    failures = told["total"]["failures"]
    assert sum(failures.values()) == 10
    assert failures["no_connection_free"] >= 7
    assert told["status"] == 1


# Failures


@pytest.mark.parametrize(
    ("parts", "kind"),
    [
        pytest.param((), "closed_before_answer", id="nothing"),
        pytest.param((OK[:20],), "incomplete_answer", id="half a head"),
        pytest.param((OK[:-1],), "incomplete_answer", id="short of its length"),
        pytest.param(
            (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nok\r\n",), "incomplete_answer", id="no end"
        ),
        pytest.param((b"HTTP/1.1 100 Continue\r\n\r\n",), "incomplete_answer", id="only informational"),
        pytest.param((b"ICY 200 OK\r\n\r\n",), "protocol_error", id="garbage"),
        pytest.param(
            (b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\nConnection: upgrade\r\n\r\n",),
            "protocol_error",
            id="101",
        ),
        pytest.param((b"HTTP/1.1 200 OK\r\nX: " + b"x" * 300_000,), "protocol_error", id="endless line"),
        pytest.param(
            (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nContent-Length: 2\r\n\r\n2\r\nok\r\n0\r\n\r\n",),
            "protocol_error",
            id="two lengths",
        ),
        pytest.param((b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n",), "status_404", id="404"),
        pytest.param(
            (b"HTTP/1.1 503 No\r\nProxy-Status: q; error=destination_unavailable\r\nContent-Length: 0\r\n\r\n",),
            "status_503 destination_unavailable",
            id="503",
        ),
    ],
)
async def test_failures_are_told_apart(backend: Backend, parts: tuple[bytes, ...], kind: str) -> None:
    backend.answer = answering(*parts, close=True)
    told = await load(backend.url)
    assert told["total"]["failures"] == {kind: 10}
    assert told["status"] == 1


async def test_answer_cut_by_a_reset_is_incomplete_though_it_has_no_length(backend: Backend) -> None:
    async def reset(_: Backend, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\n\r\nsome")
        await asyncio.sleep(0.02)
        linger = b"\1\0\0\0\0\0\0\0"
        writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        writer.transport.abort()

    backend.answer = reset
    told = await load(backend.url)
    assert told["total"]["failures"] == {"incomplete_answer": 10}


async def test_kept_connection_that_closes_has_a_kind_of_its_own(backend: Backend) -> None:
    async def only_once(_: Backend, writer: asyncio.StreamWriter) -> None:
        backend.answer = answering(close=True)
        writer.write(OK)

    backend.answer = only_once
    told = await load(backend.url, stages="10", connections=1)
    assert told["total"]["failures"] == {"closed_before_answer_on_reused_connection": 1}


async def test_connection_that_idled_too_long_is_not_used_again(
    backend: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connections, "IDLE_LIMIT", 0.0)
    told = await load(backend.url)
    assert told["total"]["succeeded"] == backend.connections == 10


@pytest.mark.parametrize("late", [b"", b"HTTP/1.1 408 Request Timeout\r\nContent-Length: 0\r\n\r\n"])
async def test_connection_that_the_server_ends_while_idle_is_not_used_again(backend: Backend, late: bytes) -> None:
    async def then_end(_: Backend, writer: asyncio.StreamWriter) -> None:
        writer.write(OK)
        await asyncio.sleep(0.02)
        writer.write(late)
        writer.close()

    backend.answer = then_end
    told = await load(backend.url, stages="5", duration=0.6)
    assert told["total"]["succeeded"] == backend.connections == 3


async def test_silent_server_is_a_time_out(backend: Backend) -> None:
    async def never(_: Backend, writer: asyncio.StreamWriter) -> None:
        await asyncio.Event().wait()

    backend.answer = never
    told = await load(backend.url, timeout=0.4)
    assert told["total"]["failures"] == {"response_timeout": 10}


async def test_body_that_stops_is_a_time_out_of_its_own(backend: Backend) -> None:
    async def half(_: Backend, writer: asyncio.StreamWriter) -> None:
        writer.write(OK[:-1])
        await asyncio.Event().wait()

    backend.answer = half
    told = await load(backend.url, timeout=0.4)
    assert told["total"]["failures"] == {"timeout_in_body": 10}


async def test_closed_port_refuses(backend: Backend) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        told = await load(f"http://127.0.0.1:{unused.getsockname()[1]}/")
    assert told["total"]["failures"] == {"connection_refused": 10}


async def test_connection_that_is_never_accepted_is_a_time_out() -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        with socket.socket() as first:  # fills the queue; what comes then gets no answer
            first.connect(listener.getsockname())
            told = await load(f"http://127.0.0.1:{listener.getsockname()[1]}/", timeout=0.3, duration=0.1)
    assert told["total"]["failures"].get("connection_timeout", 0) >= 4
    assert told["total"]["failed"] == 5


async def test_server_that_comes_back_is_used_again(backend: Backend) -> None:
    """Every third request is cut: the others succeed."""

    async def third(backend: Backend, writer: asyncio.StreamWriter) -> None:
        if len(backend.requests) % 3 == 0:
            writer.close()
        else:
            writer.write(OK)

    backend.answer = third
    told = await load(backend.url, stages="150")
    assert told["total"]["succeeded"] == 20
    assert told["total"]["failed"] == 10


# TLS


def make_certificate(directory: Path) -> tuple[Path, ssl.SSLContext]:
    """A self-signed certificate for 127.0.0.1 and a server's context with it."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "test")])
    now = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), critical=False)
        .sign(key, hashes.SHA256())
    )
    path = directory / "certificate.pem"
    path.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    private = directory / "key.pem"
    private.write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(path, private)
    return path, context


@pytest.fixture
async def secure(no_task_left: None, tmp_path: Path) -> AsyncIterator[tuple[Backend, Path]]:
    certificate, context = make_certificate(tmp_path)
    backend = Backend()
    await backend.start(context)
    yield backend, certificate
    await backend.stop()


async def test_https_is_verified(secure: tuple[Backend, Path]) -> None:
    backend, certificate = secure
    assert (await load(backend.url, ca=certificate))["total"]["succeeded"] == 10
    assert (await load(backend.url, insecure=True))["total"]["succeeded"] == 10
    told = await load(backend.url)
    assert told["total"]["failures"] == {"tls_error": 10}


# What cannot start, and what is interrupted


async def test_ca_that_is_none_is_said(tmp_path: Path) -> None:
    empty = tmp_path / "empty.pem"
    empty.write_text("nothing")
    for path in (empty, tmp_path / "missing.pem"):
        told = await load("https://127.0.0.1:1/", ca=path)
        assert told["status"] == 2
        assert str(path) in told["err"]


async def test_name_that_does_not_resolve_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    async def unknown(*_: Any, **__: Any) -> list[Any]:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(asyncio.get_running_loop(), "getaddrinfo", unknown)
    told = await load("http://nowhere.invalid/")
    assert told["status"] == 2
    assert told["err"] == "quictunnel load: nowhere.invalid: Name or service not known\n"


async def test_interrupted_run_tells_what_it_has(backend: Backend) -> None:
    enough = asyncio.Event()

    async def note(_: Backend, writer: asyncio.StreamWriter) -> None:
        writer.write(OK)
        enough.set()

    backend.answer = note
    err = io.StringIO()
    run = asyncio.get_running_loop().create_task(run_load(make_options(backend.url), io.StringIO(), err))
    await enough.wait()
    run.cancel()
    with pytest.raises(asyncio.CancelledError):
        await run
    assert "interrupted; so far:" in err.getvalue()
    assert "FELL BEHIND" not in err.getvalue()
