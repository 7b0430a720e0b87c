"""The bench's load and its backend, in this process: what is counted, and that nothing goes on after its time."""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator

import pytest

from quictunnel.bench import measure
from quictunnel.bench.backend import Backend
from quictunnel.bench.measure import Marks, Place, ask, closed_loop, download, on_schedule, upload
from quictunnel.load.plan import parse_target

pytestmark = pytest.mark.usefixtures("no_task_left")

HUGE = 2**40


@pytest.fixture
async def backend(no_task_left: None) -> AsyncIterator[tuple[Backend, Place]]:
    backend = Backend("mark")
    port = await backend.start()
    yield backend, place(port)
    backend.close()


def place(port: int) -> Place:
    target = parse_target(f"http://app.localhost:{port}/")
    return Place(target, (("127.0.0.1", port),))


async def stub(answer: bytes) -> tuple[asyncio.Server, Place]:
    """A server that gives this answer whenever something comes, and closes nothing; without one it cuts."""

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while await reader.read(65536) and answer:
            writer.write(answer)
        writer.transport.abort()

    server = await asyncio.start_server(connected, "127.0.0.1", 0)
    return server, place(server.sockets[0].getsockname()[1])


async def test_a_closed_loop_has_as_many_requests_under_way_as_connections(backend: tuple[Backend, Place]) -> None:
    served, where = backend
    told: list[tuple[str, int]] = []

    async def begin() -> None:
        told.append(("begin", served.requests))

    async def end() -> None:
        told.append(("end", served.requests))

    found = await closed_loop(where, "/", 4, 0.2, Marks(begin, end))
    assert [word for word, _ in told] == ["begin", "end"]
    assert 4 <= told[0][1] < told[1][1]
    assert abs(found.answered - (told[1][1] - told[0][1])) <= 8
    assert found.latency.count >= found.answered > 0
    assert found.failures == Counter()


async def test_requests_on_schedule_are_as_many_as_asked_for(backend: tuple[Backend, Place]) -> None:
    served, where = backend
    found = await on_schedule(where, "/", 100.0, 0.2)
    assert (found.answered, served.requests, found.failures) == (20, 20, Counter())


async def test_a_transfer_ends_with_its_time(backend: tuple[Backend, Place]) -> None:
    """The backend has a tebibyte to send, and stops when its visitor has gone."""
    served, where = backend
    down = await download(where, 2, 0.1, HUGE)
    assert down.bytes > 0
    assert down.rate > 0

    async def received() -> int:
        return served.received

    up = await upload(where, 2, 0.1, HUGE, received)
    assert 0 < up.bytes <= served.received
    assert down.failures == up.failures == Counter()
    assert (await ask(where, "/"))[0] == 200


async def test_a_transfer_ends_with_its_bytes(backend: tuple[Backend, Place]) -> None:
    served, where = backend

    async def received() -> int:
        return served.received

    async with asyncio.timeout(20):
        assert (await download(where, 4, 60.0, 1_000_000))[1:] == (1_000_000, Counter(), None)
        assert (await upload(where, 4, 60.0, 1_000_000, received))[1:] == (1_000_000, Counter(), None)


async def test_failures_are_counted_and_end_a_loop_that_has_no_hope() -> None:
    server, where = await stub(b"HTTP/1.1 503 No\r\nContent-Length: 0\r\n\r\n")
    async with server:
        found = await closed_loop(where, "/", 2, 0.1)
        assert found.answered == 0
        assert set(found.failures) == {"status_503"}
        assert 20 <= found.failures.total() <= 44  # of each of the two parts of its time so many in a row
        transfer = await download(where, 2, 60.0, 1000)
        assert (transfer.bytes, transfer.failures) == (0, Counter({"status_503": 2}))


async def test_what_is_cut_at_the_end_has_not_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    server, where = await stub(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\nx")
    async with server:
        transfer = await download(where, 2, 0.05, 1000)
        assert 1 <= transfer.bytes <= 2
        assert transfer.failures == Counter()
    monkeypatch.setattr(measure, "ANSWER_TIME", 0.05)
    server, where = await stub(b"HTTP/1.1 100 Continue\r\n\r\n")
    async with server:
        transfer = await download(where, 2, 0.01, 1000)
        assert transfer.bytes == 0
        assert set(transfer.failures) <= {"response_timeout", "connection_timeout"}


async def test_one_request_is_read_to_its_end_and_no_further(backend: tuple[Backend, Place]) -> None:
    _, where = backend
    status, body = await ask(where, "/")
    assert (status, body[:5], len(body)) == (200, b"mark.", 100)
    assert (await ask(where, "/nothing"))[0] == 404
    assert (await ask(where, "/bytes?n=99999999"))[1] == bytes(4096)
    assert (await ask(where, "/bytes?n=x"))[0] == 404


@pytest.mark.parametrize(
    ("answer", "status", "body"),
    [
        (b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok", 200, b"ok"),
        (b"HTTP/1.1 103 Hints\r\n\r\nHTTP/1.1 404 No\r\nContent-Length: 0\r\n\r\n", 404, b""),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n\r\n", 200, b"ok"),
    ],
)
async def test_answers_of_other_servers_are_read(answer: bytes, status: int, body: bytes) -> None:
    server, where = await stub(answer)
    async with server:
        assert await ask(where, "/") == (status, body)


@pytest.mark.parametrize(
    ("answer", "said"),
    [(b"SSH-2.0-x\r\n\r\n", "does not speak HTTP"), (b"", "closed before an answer|reset by peer")],
)
async def test_what_is_no_answer_is_said(answer: bytes, said: str) -> None:
    server, where = await stub(answer)
    async with server:
        with pytest.raises(OSError, match=said):
            await ask(where, "/")


async def test_silence_is_a_timeout() -> None:
    server, where = await stub(b"HTTP/1.1 200 OK\r\n")
    async with server:
        with pytest.raises(TimeoutError):
            await ask(where, "/", 0.05)
