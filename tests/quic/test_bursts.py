"""Datagrams that come in one go, on each engine: they are taken together, and answered together."""

import asyncio
import random
from collections.abc import Callable
from typing import Any

import pytest

from quictunnel.quic.link import Link
from quictunnel.quic.stream import StreamLeg
from quictunnel.wire.frames import Data, End, RequestHead, ResponseHead
from tests.support.clock import run
from tests.support.memory import SERVER, Network, Recorder, opened

pytestmark = pytest.mark.either

GET = RequestHead(b"GET", b"http", b"app.localhost", b"/", [])
BODY = random.Random(3).randbytes(200_000)


class Trains(Network):
    """What one end sends within ``delay`` comes to the other in one go, as to a process that is busy meanwhile."""

    def __init__(self, server_engine: str, client_engine: str) -> None:
        super().__init__(server_engine, client_engine)
        self.stray: Callable[[list[bytes]], list[bytes]] = lambda datagrams: datagrams
        self._trains: dict[Any, list[bytes]] = {}
        self.longest = 0

    def _carry(self, data: bytes, to_server: bool, receive: Callable[[bytes, Any], None], source: Any) -> None:
        self.datagrams[to_server] += 1
        key = (receive, source)
        if key not in self._trains:
            self._trains[key] = []
            many = getattr(receive.__self__, "datagrams_received")  # type: ignore[attr-defined]  # noqa: B009
            self.loop.call_later(self.delay, self._arrive, key, many, source)
        self._trains[key].append(data)

    def _arrive(self, key: Any, receive: Callable[[list[bytes], Any], None], source: Any) -> None:
        train = self._trains.pop(key)
        self.longest = max(self.longest, len(train))
        receive(self.stray(train), source)


async def download(network: Trains) -> tuple[Link, Link, bytes, tuple[int, int]]:
    """Both ends of a link on which a body has come; the body, and datagrams to the server and back meanwhile."""

    def on_request(leg: StreamLeg, head: RequestHead, backend: Recorder) -> None:
        for frame in (ResponseHead(200, []), Data(BODY), End()):
            leg.receive(frame)

    network.client_owner.on_request = on_request
    client, server = await network.joined()
    before = dict(network.datagrams)
    _, visitor = opened(network, server, GET, End())
    await network.until(lambda: visitor.ended)
    counts = network.datagrams[True] - before[True], network.datagrams[False] - before[False]
    return client, server, visitor.body, counts


def test_burst_is_taken_together_and_answered_by_few_packets(engine: str) -> None:
    async def work() -> None:
        network = Trains(engine, engine)
        _, server, body, (up, down) = await download(network)
        assert body == BODY
        assert network.longest >= 8
        assert down <= up / 4, "RFC 9000 section 13.2.2: a receiver may take all that is there before it acknowledges"
        assert server.closed is None
        await network.close()

    run(work())


def test_burst_is_taken_one_by_one_where_several_are_too_many(engine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    async def work() -> None:
        network = Trains(engine, engine)
        client, server = await network.joined()
        for link in (client, server):
            monkeypatch.setattr(link._connection, "may_take_several", lambda: False)
            monkeypatch.setattr(link._connection, "receive_many_datagrams", None)
        _, visitor = opened(network, server, GET, End())
        network.client_owner.on_request = lambda leg, head, backend: [  # type: ignore[assignment]
            leg.receive(frame) for frame in (ResponseHead(200, []), Data(BODY), End())
        ]
        await network.until(lambda: visitor.ended)
        assert visitor.body == BODY
        await network.close()

    run(work())


def test_strangers_datagrams_within_a_burst_harm_no_other(engine: str) -> None:
    async def work() -> None:
        chance = random.Random(1)
        network = Trains(engine, engine)

        def stray(train: list[bytes]) -> list[bytes]:
            if len(train) < 3:
                return train
            known = train[1]  # forged: the id is a link's, the rest is noise
            forged = known[:9] + chance.randbytes(len(known) - 9)
            return [train[0], forged, b"", known[:5], known[:12], *train[1:], chance.randbytes(40)]

        network.stray = stray
        client, server, body, _ = await download(network)
        assert body == BODY
        assert network.longest >= 8
        assert client.closed is None
        assert server.closed is None
        await network.close()

    run(work())


def test_burst_from_several_links_comes_to_each_its_own(engine: str) -> None:
    """Links of one client differ in their ports, but for the time of a NAT they may not."""

    async def work() -> None:
        network = Trains(engine, engine)
        pairs = [await network.joined() for _ in range(3)]
        kept: list[bytes] = []
        for client, _ in pairs:
            client._send = lambda datagrams: kept.extend(data for data, _ in datagrams)
            for _ in range(3):
                client.ping()
                await asyncio.sleep(0.001)
        random.Random(2).shuffle(kept)
        heard = [server.heard_at for _, server in pairs]
        await asyncio.sleep(1)
        network.listener.datagrams_received([*kept[:4], b"\xc0stranger", *kept[4:]], SERVER)
        assert all(server.heard_at > before for before, (_, server) in zip(heard, pairs, strict=True))
        await network.close()

    run(work())


def test_qh3_takes_several_while_nothing_is_under_way_on_streams_that_end() -> None:
    """What it asks of its core is private; a repetition that waits must not become needless unseen."""
    pytest.importorskip("qh3")

    async def work() -> None:
        network = Trains("qh3", "qh3")
        client, server = await network.joined()
        connection: Any = server._connection
        await network.until(connection.may_take_several)
        server.ping()
        server.flush()
        assert connection._core.bytes_in_flight > 0
        assert connection.may_take_several(), "pings and the control stream do not end"
        opened(network, server, GET, End())
        server.flush()
        assert not connection.may_take_several()
        await network.until(connection.may_take_several)
        assert client.begun == 1
        await network.close()

    run(work())
