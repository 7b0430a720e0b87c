"""Two processes of which one has taken over the other's UDP socket, as two listeners in one."""

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from quictunnel.quic.engine import ClientTrust, select_engine
from quictunnel.quic.link import Link, LinkClosed
from quictunnel.quic.listen import LinkListener
from quictunnel.quic.sockets import DatagramSocket
from quictunnel.quic.stream import StreamLeg
from quictunnel.quic.succession import Predecessor, Successor, channel
from quictunnel.wire.credit import WindowBudget
from quictunnel.wire.frames import Data, End, RequestHead, ResponseHead
from tests.support.crowd import until
from tests.support.memory import HELLO, Owner, Recorder, identity

pytestmark = pytest.mark.either

ADDRESSES: list[Any] = [("127.0.0.1", 4242), ("::1", 4242, 0, 0), ("fe80::1%eth0", 1, 5, 3)]
BUDGET = WindowBudget(1 << 20)


# The channel


@pytest.mark.parametrize("address", ADDRESSES, ids=str)
async def test_a_datagram_comes_with_the_address_it_came_from(address: Any) -> None:
    ours, theirs = channel()
    came: list[tuple[bytes, Any]] = []
    before, after = Predecessor(theirs), Successor(ours, lambda data, source: came.append((data, source)))
    for data in (b"]", b"x" * 1452, bytes(range(256))):
        before.pass_on(data, address)
    await until(lambda: len(came) == 3)
    assert came == [(b"]", address), (b"x" * 1452, address), (bytes(range(256)), address)]
    before.close()
    after.close()


async def test_what_nobody_takes_is_dropped_and_holds_nobody_up() -> None:
    ours, theirs = channel()
    before = Predecessor(theirs)
    for _ in range(20_000):
        before.pass_on(b"x" * 1200, ADDRESSES[0])
    assert before.dropped > 0
    assert before.passed + before.dropped == 20_000
    assert not before.gone.is_set()
    before.close()
    ours.close()


async def test_the_end_of_the_old_process_is_the_end_of_passing_on() -> None:
    ours, theirs = channel()
    before = Predecessor(theirs)
    ours.close()
    async with asyncio.timeout(5):
        await before.gone.wait()
    before.pass_on(b"x", ADDRESSES[0])
    assert before.passed == 0


async def test_the_end_of_the_new_process_leaves_the_old_one_alone() -> None:
    ours, theirs = channel()
    after = Successor(ours, lambda data, source: None)
    theirs.close()
    await until(lambda: after._closed)
    after.close()


# Two listeners


class Relay:
    """One server socket, an old listener on it and, later, a new one; any number of clients."""

    def __init__(self, engine: str, retry: str) -> None:
        self.engine = select_engine(engine)
        self.retry = retry
        self.old_owner, self.new_owner, self.client_owner = Owner(), Owner(), Owner()
        self.old = self._listener(self.old_owner)
        self.new = self._listener(self.new_owner)
        self.sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self.sock.bind(("127.0.0.1", 0))
        self.address = self.sock.getsockname()
        self.clients: list[tuple[Link, DatagramSocket]] = []
        self.client_owner.on_request = self._answer

    def _listener(self, owner: Owner) -> LinkListener:
        return LinkListener(self.engine, identity()[0], owner, BUDGET, retry=self.retry)

    @staticmethod
    def _answer(leg: StreamLeg, head: RequestHead, backend: Recorder) -> None:
        for frame in (ResponseHead(200, []), Data(head.target), End()):
            leg.receive(frame)

    def dial(self) -> Link:
        sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        sock.connect(self.address)
        link: Link
        datagrams = DatagramSocket(sock, lambda data, address: link.datagrams_received(data, address))
        link = Link(
            self.engine, self.engine.dial(ClientTrust("localhost", identity()[1]), 1200), datagrams.send_all,
            self.client_owner, BUDGET, is_client=True,
        )  # fmt: skip
        self.clients.append((link, datagrams))
        link.connect(self.address)
        return link

    async def joined(self, owner: Owner) -> tuple[Link, Link]:
        """A client's and the server's end of a new link that comes to ``owner``, its hello said."""
        count = len(owner.messages)
        client = self.dial()
        await until(lambda: client.ready)
        client.send_control(HELLO)
        await until(lambda: len(owner.messages) > count)
        return client, owner.links[-1]

    def hand_over(self) -> None:
        """All that two processes say to each other."""
        ours, theirs = channel()
        handshakes = self.old.let_go(ours)
        self.new.predecessor = Predecessor(theirs, handshakes)

    async def start_new(self) -> None:
        await self.new.start("", 0, sock=self.sock.dup())


@asynccontextmanager
async def relay(engine: str, retry: str = "auto") -> AsyncIterator[Relay]:
    it = Relay(engine, retry)
    await it.old.start("", 0, sock=it.sock.dup())
    try:
        yield it
    finally:
        for link, datagrams in it.clients:
            link.close()
            link.abandon(LinkClosed(0, ""))
            datagrams.close()
        it.old.close()
        it.new.close()
        it.sock.close()


async def ask(server: Link, target: bytes) -> None:
    """A request of the server's on the link is answered."""
    leg = StreamLeg(BUDGET, 65536, is_opener=True)
    visitor = Recorder()
    leg.peer, visitor.peer = visitor, leg
    await until(server.has_slot)
    server.attach(leg)
    leg.receive(RequestHead(b"GET", b"http", b"app.localhost", target, []))
    leg.receive(End())
    await until(lambda: visitor.ended)
    assert visitor.body == target


async def test_the_old_process_keeps_its_links_and_the_new_one_gets_those_that_come(engine: str) -> None:
    async with relay(engine) as it:
        client, server = await it.joined(it.old_owner)
        await ask(server, b"/before")
        it.hand_over()
        await it.start_new()
        for number in range(5):
            await ask(server, b"/after%d" % number)
        other, fresh = await it.joined(it.new_owner)
        await ask(fresh, b"/new")
        await ask(server, b"/still")
        assert (client.closed, other.closed) == (None, None)
        assert len(it.old_owner.links) == 1 == len(it.new_owner.links)
        before = it.new.predecessor
        assert before is not None
        assert before.passed > 5
        it.old.close()
        await until(before.gone.is_set)
        await until(lambda: client.closed)  # it was told, by the old process's copy of the socket
        await ask(fresh, b"/alone")


@pytest.mark.parametrize("moment", [1, 2, 3])
async def test_a_handshake_under_way_comes_to_its_end_in_one_process_or_the_other(engine: str, moment: int) -> None:
    """The first so many datagrams of the client's come to the old process."""
    async with relay(engine) as it:
        count = 0
        take = it.old.datagram_received

        def counted(datagrams: list[bytes], address: Any) -> None:
            nonlocal count
            for data in datagrams:
                count += 1
                take(data, address)
                if count == moment:
                    it.hand_over()

        assert it.old.socket is not None
        it.old.socket._received = counted
        client = it.dial()
        await until(lambda: count >= moment)
        await it.start_new()
        await until(lambda: client.ready, 5.0)
        client.send_control(HELLO)
        await until(lambda: HELLO in it.old_owner.messages + it.new_owner.messages, 5.0)


async def test_a_client_that_was_asked_to_prove_its_address_by_the_old_process_needs_no_second_time(
    engine: str,
) -> None:
    """Only the old one can read its own token."""
    async with relay(engine, retry="always") as it:
        take = it.old.datagrams_received

        def once(datagrams: list[bytes], address: Any) -> None:
            take(datagrams, address)
            it.hand_over()
            assert it.old.socket is not None
            it.old.socket._received = take

        assert it.old.socket is not None
        it.old.socket._received = once
        client = it.dial()
        await until(lambda: it.old.successor is not None)
        await it.start_new()
        began = asyncio.get_running_loop().time()
        await until(lambda: client.ready, 5.0)
        print(f"ready after {asyncio.get_running_loop().time() - began:.3f} s")
        client.send_control(HELLO)
        await until(lambda: HELLO in it.old_owner.messages)
        # Whoever comes now is asked by the new one.
        await it.joined(it.new_owner)


async def test_a_third_process_reaches_the_first_by_way_of_the_second(engine: str) -> None:
    async with relay(engine) as it:
        _, first = await it.joined(it.old_owner)
        it.hand_over()
        await it.start_new()
        _, second = await it.joined(it.new_owner)
        third = it._listener(owner := Owner())
        ours, theirs = channel()
        third.predecessor = Predecessor(theirs, it.new.let_go(ours))
        await third.start("", 0, sock=it.sock.dup())
        try:
            for server, target in ((first, b"/1"), (second, b"/2")):
                await ask(server, target)
            _, own = await it.joined(owner)
            await ask(own, b"/3")
        finally:
            third.close()


async def test_the_old_process_takes_the_socket_back_when_the_new_one_does_not_come(engine: str) -> None:
    async with relay(engine) as it:
        _, server = await it.joined(it.old_owner)
        it.hand_over()
        assert it.new.predecessor is not None
        it.new.predecessor.close()
        it.old.take_back()
        await ask(server, b"/again")
        await it.joined(it.old_owner)


async def test_strangers_get_nothing_more_by_it(engine: str) -> None:
    """Garbage is passed on to where it is dropped; the start of a new connection is never."""
    async with relay(engine) as it:
        it.hand_over()
        await it.start_new()
        before = it.new.predecessor
        assert before is not None
        stranger = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        stranger.connect(it.address)
        stranger.setblocking(False)
        handshake = b"\xe0\0\0\0\1\x08" + bytes(8) + b"\x08" + bytes(8) + bytes(1200)
        for data in (b"\x40" + bytes(40), handshake):
            stranger.send(data)
        await until(lambda: before.passed == 2)
        other_version = b"\xc0\0\0\0\2\x08" + bytes(8) + b"\x08" + bytes(8) + bytes(1200)
        stranger.send(other_version)
        await asyncio.sleep(0.05)
        assert before.passed == 2
        assert stranger.recv(2000)[1:5] == bytes(4), "a Version Negotiation, by the new one"
        stranger.close()
        assert len(it.old.links) == 0
