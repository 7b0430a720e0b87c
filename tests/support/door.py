"""A listener before strangers: what is sent to anybody else than a client of the test is kept and counted."""

import asyncio
import functools
import random
from collections import Counter
from collections.abc import Callable, Coroutine
from typing import Any

from quictunnel.quic.engine import ClientTrust, select_engine
from quictunnel.quic.link import Link
from quictunnel.wire.frames import Data, End, RequestHead, ResponseHead
from tests.support.clock import run
from tests.support.memory import SERVER, Network, identity, opened

__all__ = ["STRANGER", "Door", "answered", "at_door", "first_flight", "garbage", "is_retry", "recorded"]

STRANGER = ("192.0.2.9", 4242)
GET = RequestHead(b"GET", b"http", b"app.localhost", b"/", [])


class Door(Network):
    """A listener before strangers too: what is sent to anybody else than a client is kept."""

    def __init__(self, server_engine: str, client_engine: str = "", *, retry: str = "auto") -> None:
        super().__init__(server_engine, client_engine or server_engine, retry=retry)
        self.replies: list[bytes] = []
        self.asked: Counter[Any] = Counter()
        self.told: Counter[Any] = Counter()
        "bytes from and to each stranger's address"
        self.listener._sweep()

    def _to_client(self, data: bytes, address: Any) -> None:
        if tuple(address[:2]) in self.clients:
            super()._to_client(data, address)
        else:
            self.replies.append(data)
            self.told[address] += len(data)

    def knock(self, *datagrams: bytes, address: tuple[str, int] = STRANGER) -> list[bytes]:
        """Hand datagrams of a stranger's to the listener; what it answered at once."""
        before = len(self.replies)
        for data in datagrams:
            self.asked[address] += len(data)
            self.listener.datagram_received(data, address)
        return self.replies[before:]

    @property
    def amplification(self) -> float:
        """Bytes sent to strangers for each byte of theirs; nobody has shown that these addresses are their own."""
        return sum(self.told.values()) / max(1, sum(self.asked.values()))

    @property
    def worst(self) -> float:
        """The same of the one address that got the most for its bytes."""
        return max((told / self.asked[address] for address, told in self.told.items()), default=0.0)

    @property
    def tables(self) -> tuple[int, int, int]:
        """Links, connection ids, handshakes under way."""
        listener = self.listener
        return len(listener._ids), len(listener._links), len(listener._half_open)


@functools.cache
def _client_configuration(engine: str) -> Any:
    """Read once: floods need thousands of clients."""
    return select_engine(engine).dial(ClientTrust("localhost", identity()[1]), 1200).configuration  # type: ignore[attr-defined]


def first_flight(engine: str) -> list[bytes]:
    """A client's first datagrams."""
    connection = select_engine(engine).connection(configuration=_client_configuration(engine))
    connection.connect(SERVER, now=0.0)
    return [bytes(data) for data, _ in connection.datagrams_to_send(now=0.0)]


def at_door(
    work: Callable[[Door], Coroutine[Any, Any, None]], server: str, client: str = "", *, retry: str = "auto"
) -> None:
    """Run ``work`` before a door under the turned clock."""

    async def playing() -> None:
        door = Door(server, client, retry=retry)
        try:
            await work(door)
        finally:
            await door.close()

    run(playing())


def is_retry(data: bytes) -> bool:
    """Whether a datagram is a Retry."""
    return data[0] >> 4 == 0xF and data[1:5] == b"\0\0\0\1"


async def recorded(door: Door, client: Link, server: Link) -> list[bytes]:
    """Datagrams of a connection at work, towards the server."""
    kept: list[bytes] = []

    def note(data: bytes, to_server: bool) -> bool:
        if to_server:
            kept.append(data)
        return False

    door.lose = note
    await answered(door, server)
    other = door.dial()
    await door.until(lambda: other.ready)
    other.close()
    await asyncio.sleep(5)
    door.lose = lambda data, to_server: False
    assert len(kept) > 4
    return kept


async def answered(door: Door, server: Link) -> None:
    """A request crosses and its answer comes back."""

    def answer(leg: Any, head: RequestHead, backend: Any) -> None:
        for frame in (ResponseHead(200, []), Data(b"x" * 3000), End()):
            leg.receive(frame)

    door.client_owner.on_request = answer
    _, visitor = opened(door, server, GET, End())
    await door.until(lambda: visitor.ended)
    assert visitor.body == b"x" * 3000


def garbage(chance: random.Random, seeds: list[bytes], ids: list[bytes]) -> bytes:
    """A datagram that was made up, or is a true one that something happened to."""
    seed = chance.choice(seeds)
    match chance.randrange(12):
        case 0:
            return chance.randbytes(chance.randrange(1500))
        case 1:  # a short header for a connection that is there
            return bytes([0x40 | chance.randrange(64)]) + chance.choice(ids) + chance.randbytes(chance.randrange(1300))
        case 2:  # a long header of version 1 with a known or an unknown id
            cid = chance.choice([chance.choice(ids), chance.randbytes(chance.randrange(25))])
            start = bytes([0xC0 | chance.randrange(64)]) + b"\0\0\0\1" + bytes([len(cid)]) + cid
            return start + chance.randbytes(chance.randrange(1400))
        case 3:  # an Initial with a token of any size, which may be longer than the datagram
            token = chance.randbytes(chance.choice([0, 1, 11, 12, 60, 1100]))
            said = chance.choice([len(token), len(token), chance.randrange(1 << 14)]) | 0x4000
            ids_part = b"\x08" + chance.randbytes(8) + b"\x08" + chance.randbytes(8)
            start = b"\xc0\0\0\0\1" + ids_part + said.to_bytes(2, "big") + token + b"\x44\xb0"
            return start + chance.randbytes(chance.choice([0, 30, 1200]))
        case 4:  # another version
            version = chance.choice(
                [b"\0\0\0\0", b"\0\0\0\2", b"\x6b\x33\x43\xcf", b"\xff\0\0\x1d", chance.randbytes(4)]
            )
            return seed[:1] + version + seed[5:]
        case 5:
            return seed[: chance.randrange(len(seed) + 1)]
        case 6:
            return seed + chance.choice([chance.choice(seeds), chance.randbytes(chance.randrange(300))])
        case 7:
            return seed  # again, from whom it may
        case 8:  # one bit
            data = bytearray(seed)
            data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
            return bytes(data)
        case 9:  # another's connection id in it
            cid = chance.choice(ids)
            return seed[:1] + cid + seed[9:] if not seed[0] & 0x80 else seed[:6] + cid + seed[14:]
        case _:
            data = bytearray(seed)
            for _ in range(chance.choice([1, 3, 20, 200])):
                data[chance.randrange(min(len(data), chance.choice([20, 60, 1500])))] = chance.randrange(256)
            return bytes(data)
