"""Conversations of HTTP/2 with frames broken at random, against both ends: nothing escapes, nothing is left behind."""

import asyncio
from random import Random
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from quictunnel.exchange import VOID
from quictunnel.http.http2_visitor import Http2VisitorConnection
from quictunnel.wire.errors import ErrorCode, TunnelError
from quictunnel.wire.frames import Data, End, Frame, ResponseHead
from tests.support.backend import END, MemoryHttp2Origin, Visitor, request, turns
from tests.support.http2 import (
    DATA,
    GOAWAY,
    PING,
    RST_STREAM,
    WINDOW_UPDATE,
    Wire,
    frame,
    settings_frame,
)
from tests.support.visitors import Peer, edge

SEEDS = st.integers(0, 2**32 - 1)
STREAMS = (1, 1, 3, 5, 7, 9)
STATUSES = (b"200", b"204", b"304", b"100", b"103", b"101")
PAYLOADS = (b"hello", b"", b"\x02abcde\0\0", bytes(16_384))
GOODBYES = (bytes(8), b"\x7f\xff\xff\xff" + bytes(4), (1).to_bytes(4, "big") + bytes(4))


class Chaos:
    """What one seed makes."""

    def __init__(self, seed: int) -> None:
        self.random = Random(seed)
        self.pick = self.random.choice

    def chance(self, of: float) -> bool:
        return self.random.random() < of

    def damaged(self, data: bytes) -> bytes:
        """Some bytes changed, added or left out."""
        made = bytearray(data)
        for _ in range(self.pick([1, 1, 2, 4])):
            place = self.random.randrange(len(made) + 1)
            match self.random.randrange(3):
                case 0:
                    made[place : place + 1] = bytes([self.pick([0, 1, 128, 255])])
                case 1:
                    made[place:place] = self.random.randbytes(3)
                case _:
                    del made[place : place + 4]
        return bytes(made)

    def bent(self, data: bytes) -> bytes:
        """The frame, or one like it; its length is true."""
        kind, flags, number, payload = data[3], data[4], int.from_bytes(data[5:9], "big"), data[9:]
        if self.chance(0.3):
            payload = self.damaged(payload)[:16_384]
        if self.chance(0.15):
            flags ^= 1 << self.random.randrange(8)
        if self.chance(0.15):
            number = self.pick([0, 1, 2, 3, 99, 2**31 - 1])
        if self.chance(0.05):
            kind = self.random.randrange(12)
        return frame(kind, flags, number, payload)

    def conversation(self, wire: Wire) -> bytes:
        """What one side says after its greeting."""
        parts = [self.bent(self._part(wire)) for _ in range(self.random.randrange(1, 25))]
        data = wire.hello({self.pick([3, 4]): self.pick([0, 1, 10, 65_535])}) + b"".join(parts)
        return self.damaged(data) if self.chance(0.2) else data

    def pieces(self, data: bytes) -> list[bytes]:
        found = []
        while data:
            size = self.pick([1, 9, 50, 1000, 100_000])
            found.append(data[:size])
            data = data[size:]
        return found

    def _part(self, wire: Wire) -> bytes:
        number = self.pick(STREAMS)
        length = self.pick([[], [(b"content-length", b"5")], [(b"x", b"y")]])
        match self.random.randrange(12):
            case 0 | 1 | 2 | 3 if wire.is_client:
                method = self.pick([b"GET", b"POST", b"HEAD"])
                return wire.get(self.pick([b"/", b"*", b"bad"]), *length, method=method, end=self.chance(0.6))
            case 0 | 1 | 2 | 3:
                status = (b":status", self.pick(STATUSES))
                return wire.head([status, *length], end=self.chance(0.4), stream_id=number)
            case 4 | 5:
                return frame(DATA, self.pick([0, 1, 8, 9]), number, self.pick(PAYLOADS))
            case 6:
                return frame(RST_STREAM, 0, number, self.random.randrange(14).to_bytes(4, "big"))
            case 7:
                size = self.random.randrange(1, 70_000)
                return frame(WINDOW_UPDATE, 0, self.pick([0, number]), size.to_bytes(4, "big"))
            case 8:
                return settings_frame({self.random.randrange(1, 9): self.pick([0, 1, 100, 16_384, 2**31 - 1])})
            case 9:
                return frame(PING, self.pick([0, 1]), 0, bytes(8))
            case 10:
                return frame(GOAWAY, 0, 0, self.pick(GOODBYES))
            case _:
                return wire.head([(b"x-late", b"1")], stream_id=number)

    def answers(self, peer: Peer) -> None:
        """Something that a peer leg may do now."""
        if peer.errors or peer.peer is VOID or self.chance(0.4):
            return
        match self.random.randrange(6):
            case 0:
                peer.reply()
            case 1:
                peer.answer(ResponseHead(200, []), Data(bytes(self.pick([1, 100_000]))))
            case 2:
                leg = peer.peer
                peer.detach()
                leg.abort(TunnelError(ErrorCode.CONNECTION_REFUSED))
            case 3:
                peer.peer.pause()
            case 4:
                peer.peer.resume()
            case _:
                peer.answer(ResponseHead(103, []))


def attended(work: Any) -> None:
    """Run it; what the loop was left to report is a failure too."""

    async def watch() -> None:
        escaped: list[dict[str, Any]] = []
        asyncio.get_running_loop().set_exception_handler(lambda loop, context: escaped.append(context))
        await work
        assert not escaped, escaped

    asyncio.run(watch())


@given(SEEDS)
@settings(max_examples=300)
def test_a_visitors_connection_survives_whatever_is_said(seed: int) -> None:
    attended(_visitor(Chaos(seed)))


async def _visitor(chaos: Chaos) -> None:
    with edge() as site:
        site.on_open = lambda peer: setattr(peer, "on_frame", lambda frame: chaos.answers(peer))
        _, transport = site.connect()
        for piece in chaos.pieces(chaos.conversation(Wire())):
            if transport.closed:
                break
            protocol: Any = transport.protocol
            protocol.data_received(piece)
            if chaos.chance(0.3):
                await asyncio.sleep(0)
            protocol = transport.protocol  # another one, once the preface is there
            if chaos.chance(0.05) and isinstance(protocol, Http2VisitorConnection):
                protocol.resume_writing() if protocol.is_stuck else protocol.pause_writing()
            if chaos.chance(0.05):
                protocol.expire(asyncio.get_running_loop().time() + chaos.pick([0, 100, 500]))
        await turns()
        if not transport.closed:
            transport.abort()
        await turns()
        assert (len(site.listener), site.listener.in_flight) == (0, 0)


@given(SEEDS)
@settings(max_examples=300)
def test_a_backends_connection_survives_whatever_is_said(seed: int) -> None:
    attended(_backend(Chaos(seed)))


async def _backend(chaos: Chaos) -> None:
    origin = MemoryHttp2Origin()
    visitors: list[Visitor] = []

    def ask() -> None:
        body = chaos.chance(0.5)
        rest: list[Frame] = [Data(bytes(chaos.pick([1, 100_000])))] if body else []
        if not body or chaos.chance(0.5):
            rest.append(END)
        head = request(chaos.pick([b"GET", b"POST", b"HEAD"]), body=body)
        visitors.append(Visitor().ask(origin.open(), head, *rest))

    for _ in range(chaos.random.randrange(1, 6)):
        ask()
    await turns()
    socket = origin.sockets[0]
    for piece in chaos.pieces(chaos.conversation(Wire(is_client=False))):
        socket.says(piece)
        if chaos.chance(0.3):
            await asyncio.sleep(0)
        if chaos.chance(0.1):
            ask()
        visitor = chaos.pick(visitors)
        if chaos.chance(0.1) and not visitor.ended and visitor.error is None:
            leg = visitor.peer
            visitor.detach()
            leg.abort(TunnelError(ErrorCode.CANCELLED))
        if chaos.chance(0.1):
            visitor.peer.pause()
        elif chaos.chance(0.1):
            visitor.peer.resume()
        if not socket.closing and chaos.chance(0.1):
            chaos.pick([socket.protocol.pause_writing, socket.protocol.resume_writing])()
    await turns()
    await origin.aclose()
    await turns()
    assert origin.counts == (0, 0, 0, 0)
    assert origin.budget.left == origin.budget.total
    assert all(not visitor.ended or isinstance(visitor.frames[-1], End) for visitor in visitors)
