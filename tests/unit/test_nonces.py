"""The load that counts lost and repeated requests finds them: without a tunnel, before backends that do it wrong."""

import asyncio
import re
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import pytest

from quictunnel.quic.sockets import settle
from tests.support.nonces import (
    CLOSED,
    CLOSED_KEPT,
    CUT,
    REFUSED,
    TIMEOUT,
    Ledger,
    Load,
    body_of,
    figures,
    nonce_backend,
)


async def test_every_request_gets_its_own_answer_from_the_backend_itself() -> None:
    ledger = Ledger()
    async with nonce_backend(ledger) as backend:
        load = Load(("127.0.0.1", backend.port), size=lambda chance: chance.randrange(50_000))
        records = await load.at_rate(1000, count=300)
    found = figures(records, ledger)
    assert (found.sent, found.failed, found.wrong, found.post_twice, found.damaged) == (300, 0, 0, 0, 0)
    assert {record.method for record in records} == {"GET", "POST"}
    assert sum(ledger.heads.values()) == 300 == sum(ledger.whole.values())


async def test_so_many_visitors_in_turn_ask_so_many_times() -> None:
    ledger = Ledger()
    async with nonce_backend(ledger) as backend:
        load = Load(("127.0.0.1", backend.port), post=0.0, wait=lambda chance: 5)
        records = await load.in_turn(40, 8)
    assert [record.ok for record in records] == [True] * 40
    assert len(ledger.heads) == 40


Wrong = Callable[[int, str, asyncio.StreamWriter], Awaitable[None]]


@asynccontextmanager
async def wrong_backend(answer: Wrong, ledger: Ledger) -> AsyncIterator[tuple[str, int]]:
    """Does with each request, whose number on its connection and nonce it knows, what it should not."""

    writers: list[asyncio.StreamWriter] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writers.append(writer)
        number = 0
        while head := await _head(reader):
            number += 1
            nonce = head.split(b"?")[0].rpartition(b"/")[2].decode()
            ledger.heads[nonce] += 1
            found = re.search(rb"content-length: (\d+)", head, re.I)
            await reader.readexactly(int(found[1]) if found else 0)
            await answer(number, nonce, writer)
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    try:
        yield server.sockets[0].getsockname()[:2]
    finally:
        server.close()
        for writer in writers:
            writer.transport.abort()
        await settle()


async def _head(reader: asyncio.StreamReader) -> bytes:
    try:
        return await reader.readuntil(b"\r\n\r\n")
    except (asyncio.IncompleteReadError, ConnectionError):
        return b""


def whole(nonce: str, body: bytes) -> bytes:
    return b"HTTP/1.1 200 OK\r\nNonce: %b\r\nContent-Length: %d\r\n\r\n%b" % (nonce.encode(), len(body), body)


async def another_nonce(number: int, nonce: str, writer: asyncio.StreamWriter) -> None:
    writer.write(whole(nonce + "0", body_of(nonce, 100)))


async def another_body(number: int, nonce: str, writer: asyncio.StreamWriter) -> None:
    writer.write(whole(nonce, body_of(nonce, 99) + b"\0"))


async def half(number: int, nonce: str, writer: asyncio.StreamWriter) -> None:
    writer.write(whole(nonce, body_of(nonce, 100))[:-50])
    writer.close()


async def nothing(number: int, nonce: str, writer: asyncio.StreamWriter) -> None:
    writer.close()


async def silence(number: int, nonce: str, writer: asyncio.StreamWriter) -> None:
    pass


async def refusal(number: int, nonce: str, writer: asyncio.StreamWriter) -> None:
    writer.write(
        b"HTTP/1.1 503 No\r\nProxy-Status: quictunnel; error=destination_unavailable; details=x\r\n"
        b"Content-Length: 0\r\n\r\n"
    )


@pytest.mark.parametrize(
    ("answer", "kind", "is_wrong"),
    [
        (another_nonce, "", True),
        (another_body, "", True),
        (half, CUT, False),
        (nothing, CLOSED, False),
        (silence, TIMEOUT, False),
        (refusal, "503 destination_unavailable", False),
    ],
)
async def test_answer_that_is_not_the_requests_own_is_no_success(answer: Wrong, kind: str, is_wrong: bool) -> None:
    ledger = Ledger()
    async with wrong_backend(answer, ledger) as address:
        load = Load(address, limit=0.5)
        records = await load.in_turn(4, 4)
    found = figures(records, ledger)
    assert (found.failed, found.wrong) == (4, 4 if is_wrong else 0)
    assert found.kinds == {kind or "wrong answer": 4}
    assert found.failed_get + found.failed_post_delivered == 4


async def test_nobody_listening_is_told_from_an_answer_that_does_not_come() -> None:
    ledger = Ledger()
    async with wrong_backend(nothing, ledger) as address:
        pass
    records = await Load(address, post=1.0).in_turn(2, 1)
    found = figures(records, ledger)
    assert found.kinds == {REFUSED: 2}
    assert found.failed_post_undelivered == 2


async def closes_the_second(number: int, nonce: str, writer: asyncio.StreamWriter) -> None:
    if number == 1:
        writer.write(whole(nonce, body_of(nonce, 100)))
    else:
        writer.close()


async def test_get_on_a_kept_connection_that_is_closed_is_repeated_and_counted_and_a_post_is_not() -> None:
    ledger = Ledger()
    async with wrong_backend(closes_the_second, ledger) as address:
        gets = await Load(address, post=0.0).in_turn(6, 1)
        posts = await Load(address, post=1.0).in_turn(6, 1)
    found = figures(gets, ledger)
    # The one that is repeated is the first on its connection, so every other one after the first is.
    assert (found.failed, found.repeated_get, found.get_twice) == (0, 5, 0)
    found = figures(posts, ledger)
    assert (found.failed, found.closed_kept_post, found.failed_post_delivered) == (3, 3, 3)
    assert found.kinds == {CLOSED_KEPT: 3}


async def test_delivery_of_a_post_to_two_backends_is_seen() -> None:
    ledger = Ledger()
    async with nonce_backend(ledger) as one, nonce_backend(ledger, "two") as two:
        load = Load(("127.0.0.1", one.port), post=1.0)
        records = await load.in_turn(3, 1)
        reader, writer = await asyncio.open_connection("127.0.0.1", two.port)
        writer.write(f"POST /{records[1].nonce}?size=0 HTTP/1.1\r\nContent-Length: 0\r\n\r\n".encode())
        assert await reader.readuntil(b"\r\n\r\n")
        writer.transport.abort()
    await settle()
    assert figures(records, ledger).post_twice == 1
