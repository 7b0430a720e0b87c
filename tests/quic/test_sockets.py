"""The UDP socket under every link: real sockets on the loopback, on both event loops."""

import asyncio
import errno
import importlib.util
import itertools
import random
import socket
import struct
import sys
from collections import Counter
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest

from quictunnel.quic import sockets
from quictunnel.quic.sockets import QUOTED, DatagramSocket, Refusal, enlarge_buffers
from tests.support.crowd import until

Address = Any

LOOPS = [
    "asyncio",
    pytest.param(
        "uvloop",
        marks=pytest.mark.skipif(importlib.util.find_spec("uvloop") is None, reason="uvloop is not installed"),
    ),
]
HOSTS = ["127.0.0.1", "::1"]


@pytest.fixture(params=LOOPS)
def play(request: pytest.FixtureRequest) -> Callable[[Coroutine[Any, Any, None]], None]:
    """Runs a scenario on each event loop in turn."""

    def run(work: Coroutine[Any, Any, None]) -> None:
        factory: Any = asyncio.SelectorEventLoop
        if request.param == "uvloop":
            import uvloop

            factory = uvloop.new_event_loop
        with asyncio.Runner(loop_factory=factory) as runner:
            runner.run(work)

    return run


def bound(host: str = "127.0.0.1") -> socket.socket:
    """A UDP socket on a free port."""
    sock = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_DGRAM)
    sock.bind((host, 0))
    sock.settimeout(5)
    return sock


class Taken:
    """What a socket hands over."""

    def __init__(self, sock: socket.socket, *, asks: bool = False) -> None:
        self.datagrams: list[tuple[bytes, Address]] = []
        self.errors: list[OSError] = []
        self.refusals: list[list[Refusal]] = []
        self.socket = DatagramSocket(sock, self._received, self.errors.append, self.refusals.append if asks else None)
        self.on_datagram: Callable[[], None] = lambda: None

    def _received(self, datagrams: list[bytes], address: Address) -> None:
        for data in datagrams:
            self.datagrams.append((data, address))
            self.on_datagram()

    @property
    def refused(self) -> list[Refusal]:
        return list(itertools.chain.from_iterable(self.refusals))

    @property
    def data(self) -> list[bytes]:
        return [data for data, _ in self.datagrams]


class FullSocket:
    """A socket whose kernel buffer has room for ``room`` datagrams more; everything else is ``sock``'s."""

    def __init__(self, sock: socket.socket, room: int) -> None:
        self.sock = sock
        self.room = room

    def __getattr__(self, name: str) -> Any:
        return getattr(self.sock, name)

    def sendto(self, data: bytes, address: Address) -> int:
        if self.room == 0:
            raise BlockingIOError
        self.room -= 1
        return self.sock.sendto(data, address)


@pytest.mark.parametrize("host", HOSTS)
def test_datagrams_come_and_go_with_their_addresses(host: str, play: Callable[..., None]) -> None:
    async def work() -> None:
        server = Taken(bound(host))
        client_socket = bound(host)
        client_socket.connect(server.socket.sock.getsockname())
        client = Taken(client_socket)
        client.socket.send(b"up", None)
        await until(lambda: server.datagrams)
        assert server.datagrams == [(b"up", client_socket.getsockname())]
        server.socket.send(b"down", server.datagrams[0][1])
        await until(lambda: client.datagrams)
        assert client.datagrams == [(b"down", server.socket.sock.getsockname())]
        for each in (server, client):
            each.socket.close()
            each.socket.close()
            assert each.socket.sock.fileno() == -1
            assert not each.errors

    play(work())


def test_flood_leaves_others_their_turns(play: Callable[..., None]) -> None:
    async def work() -> None:
        taken = Taken(bound())
        turns: list[int] = []

        def turn() -> None:
            turns.append(len(taken.datagrams))
            if len(taken.datagrams) < 200:
                asyncio.get_running_loop().call_soon(turn)

        with bound() as sender:
            for number in range(200):
                sender.sendto(b"%d" % number, taken.socket.sock.getsockname())
        turn()
        await until(lambda: len(taken.datagrams) == 200)
        assert taken.data == [b"%d" % number for number in range(200)]
        steps = [after - before for before, after in itertools.pairwise(turns)]
        assert max(steps) == 32
        taken.socket.close()

    play(work())


def test_paused_socket_leaves_what_comes_to_another_process(play: Callable[..., None]) -> None:
    async def work() -> None:
        taken = Taken(bound())
        with bound() as peer:
            place = taken.socket.sock.getsockname()
            taken.socket.pause()
            peer.sendto(b"first", place)
            await asyncio.sleep(0.02)
            assert not taken.datagrams
            successor = Taken(taken.socket.sock.dup())
            await until(lambda: successor.datagrams)
            assert successor.datagrams == [(b"first", peer.getsockname())]
            taken.socket.send(b"still here", peer.getsockname())
            assert peer.recvfrom(100) == (b"still here", place)
            successor.socket.close()
            taken.socket.resume()
            peer.sendto(b"second", place)
            await until(lambda: taken.datagrams)
            assert taken.data == [b"second"]
        taken.socket.close()

    play(work())


@pytest.mark.parametrize("end", ["pause", "close"])
def test_no_datagram_is_read_once_reading_has_ended(end: str, play: Callable[..., None]) -> None:
    """What the kernel has handed over already is nobody else's: only a closed socket keeps it."""

    async def work() -> None:
        taken = Taken(bound())
        place = taken.socket.sock.getsockname()
        taken.on_datagram = getattr(taken.socket, end)
        with bound() as one, bound() as other:
            for number in range(50):
                (one if number < 20 else other).sendto(b"%d" % number, place)
        await until(lambda: taken.datagrams)
        await asyncio.sleep(0.02)
        assert taken.data == [b"%d" % number for number in range(20 if end == "close" else 32)]
        taken.socket.close()

    play(work())


@pytest.mark.parametrize("host", HOSTS)
def test_refusal_is_told_and_reading_goes_on(host: str, play: Callable[..., None]) -> None:
    """uvloop stops watching a socket after an error, without a word."""

    async def work() -> None:
        with bound(host) as peer:
            place = peer.getsockname()
            client_socket = bound(host)
            client_socket.connect(place)
            client = Taken(client_socket)
        for _ in range(3):  # the peer is gone
            client.errors.clear()
            client.socket.send(b"anyone?", None)
            client.socket.send(b"anyone?", None)  # meets the first one's refusal
            await until(lambda: client.errors)
            await asyncio.sleep(0.02)
            assert [type(error) for error in client.errors] == [ConnectionRefusedError] * len(client.errors)
            assert len(client.errors) <= 2
        with socket.socket(client_socket.family, socket.SOCK_DGRAM) as again:
            again.bind(place[:2])
            again.sendto(b"back", client_socket.getsockname())
            await until(lambda: client.datagrams)
        assert client.data == [b"back"]
        client.socket.close()

    play(work())


# Trains of datagrams

linux_only = pytest.mark.skipif(sys.platform != "linux", reason="only Linux sends and receives several in one call")


class Watched(FullSocket):
    """A socket whose calls are counted; ``refuses`` says with which error what is sent together is refused."""

    def __init__(self, sock: socket.socket) -> None:
        super().__init__(sock, room=1 << 30)
        self.calls: Counter[str] = Counter()
        self.refuses = 0

    def __getattr__(self, name: str) -> Any:
        found = getattr(self.sock, name)
        if name not in ("recv", "recvfrom", "recvmsg", "send", "sendmsg"):
            return found

        def counted(*arguments: Any) -> Any:
            self.calls[name] += 1
            if name == "sendmsg" and self.refuses:
                raise OSError(self.refuses, "no")
            return found(*arguments)

        return counted

    def sendto(self, data: bytes, address: Address) -> int:
        self.calls["sendto"] += 1
        return super().sendto(data, address)


async def trains(sender: DatagramSocket, taken: Taken) -> None:
    """Have both sockets of a pair know bursts of one size."""
    place = taken.socket.sock.getsockname()
    before = len(taken.datagrams)
    sender.send_all([(b"%03d" % number, place) for number in range(64)])
    await until(lambda: len(taken.datagrams) == before + 64)
    assert taken.data[before:] == [b"%03d" % number for number in range(64)]


@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize("connected", [False, True])
def test_datagrams_of_any_sizes_arrive_as_they_were_sent(host: str, connected: bool, play: Callable[..., None]) -> None:
    chance = random.Random(7)
    sizes = [0, 1, 2, 100, 1199, 1200, 1200, 1200, 1200, 1452, 8900]
    bursts = [
        [1200] * 64,
        [1200] * 65,
        [1200] * 10 + [7],
        [1200] * 5 + [7] * 5 + [1200],
        [8900] * 9,
        [65_507 if ":" not in host else 65_527] * 2,
        [0, 0, 1200, 0, 1200, 1200, 0],
        [1],
        [],
        *([chance.choice(sizes) for _ in range(chance.randrange(12))] for _ in range(30)),
    ]

    async def work() -> None:
        two = [Taken(bound(host)) for _ in range(2)]
        sock = bound(host)
        if connected:
            sock.connect(two[0].socket.sock.getsockname())
        sender = Taken(sock)
        for _ in range(2):  # before and after the receivers have met bursts
            for sizes in bursts:
                datagrams = [(chance.randbytes(size), two[not connected and chance.random() < 0.2]) for size in sizes]
                for each in two:
                    each.datagrams.clear()
                sender.socket.send_all([(data, to.socket.sock.getsockname()) for data, to in datagrams])
                await until(lambda: sum(len(each.datagrams) for each in two) == len(datagrams))  # noqa: B023
                for each in two:
                    assert each.data == [data for data, to in datagrams if to is each]
                    assert all(source == sock.getsockname() for _, source in each.datagrams)
            for each in two[: 2 - connected]:
                await trains(sender.socket, each)
        assert sender.socket.dropped == 0
        for each in (*two, sender):
            assert not each.errors
            each.socket.close()

    play(work())


@linux_only
def test_burst_takes_few_calls(play: Callable[..., None]) -> None:
    async def work() -> None:
        there, here = Watched(bound()), Watched(bound())
        taken, sender = Taken(there), Taken(here)  # type: ignore[arg-type]
        place = there.getsockname()
        await trains(sender.socket, taken)
        here.calls.clear()
        there.calls.clear()
        sender.socket.send_all([(b"x" * 1200, place)] * 54 + [(b"x", place)])
        await until(lambda: len(taken.datagrams) == 64 + 55)
        assert here.calls == {"sendmsg": 1, "sendto": 1}, "54 of them are what one call may carry"
        assert there.calls["recvmsg"] <= 2 * 2, "each wake-up ends with a call in vain"
        for each in (taken, sender):
            each.socket.close()

    play(work())


@pytest.mark.parametrize(
    ("number", "calls"),
    [
        (errno.EIO, 1),
        (errno.ENOPROTOOPT, 1),
        (errno.EOPNOTSUPP, 1),
        (errno.EINVAL, 3),
        (errno.EMSGSIZE, 3),
        (errno.EAGAIN, 3),
        (errno.ENOBUFS, 3),
        (errno.ECONNREFUSED, 3),
    ],
)
@linux_only
def test_burst_that_is_refused_as_one_goes_one_by_one(number: int, calls: int, play: Callable[..., None]) -> None:
    """For ever, where the kernel or the network device cannot do it at all."""

    async def work() -> None:
        here = Watched(bound())
        sender = Taken(here)  # type: ignore[arg-type]
        here.refuses = number
        with bound() as peer:
            for _ in range(3):
                sender.socket.send_all([(b"%d" % each, peer.getsockname()) for each in range(10)])
                assert [peer.recv(100) for _ in range(10)] == [b"%d" % each for each in range(10)]
        assert here.calls["sendmsg"] == calls
        assert sender.socket.dropped == 0
        await asyncio.sleep(0.01)
        assert [each.errno for each in sender.errors] == [number] * (number == errno.ECONNREFUSED)
        sender.socket.close()

    play(work())


@pytest.mark.parametrize("platform", ["darwin", "linux"])
def test_where_the_kernel_knows_no_trains_each_datagram_is_sent_and_read_by_itself(
    platform: str, play: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Old(Watched):
        def setsockopt(self, *option: Any) -> None:
            raise OSError(errno.ENOPROTOOPT, "Protocol not available")

        def getsockopt(self, *option: Any) -> int:
            if option[0] == socket.IPPROTO_UDP:
                raise OSError(errno.ENOPROTOOPT, "Protocol not available")
            return self.sock.getsockopt(*option)

    monkeypatch.setattr("sys.platform", platform)

    async def work() -> None:
        make = Old if platform == "linux" else Watched
        there, here = make(bound()), make(bound())
        taken, sender = Taken(there), Taken(here)  # type: ignore[arg-type]
        for _ in range(3):
            await trains(sender.socket, taken)
        assert here.calls["sendto"] == 3 * 64
        assert not here.calls["sendmsg"]
        assert not there.calls["recvmsg"]
        for each in (taken, sender):
            each.socket.close()

    play(work())


@linux_only
def test_socket_that_comes_back_from_another_process_is_read_in_trains_if_that_one_did(
    play: Callable[..., None],
) -> None:
    async def work() -> None:
        old, sender = Taken(bound()), Taken(bound())
        place = old.socket.sock.getsockname()
        old.socket.pause()
        successor = Taken(old.socket.sock.dup())
        await trains(sender.socket, successor)
        successor.socket.close()
        old.socket.resume()
        await trains(sender.socket, old)
        third = Taken(old.socket.sock.dup())
        old.socket.close()
        sender.socket.send_all([(b"%03d" % number, place) for number in range(20)])
        await until(lambda: len(third.datagrams) == 20)
        assert third.data == [b"%03d" % number for number in range(20)]
        for each in (third, sender):
            each.socket.close()

    play(work())


@linux_only
def test_lone_datagrams_and_those_of_many_sizes_do_not_bring_trains_about(play: Callable[..., None]) -> None:
    """A lone datagram costs more to read then."""

    async def work() -> None:
        there = Watched(bound())
        taken, sender = Taken(there), Taken(bound())  # type: ignore[arg-type]
        place = there.getsockname()
        for number in range(100):
            sender.socket.send(b"%d" % number, place)
            await until(lambda: len(taken.datagrams) == number + 1)  # noqa: B023
        sender.socket.send_all([(b"x" * (1 + number % 7), place) for number in range(64)])
        await until(lambda: len(taken.datagrams) == 164)
        assert not there.calls["recvmsg"]
        await trains(sender.socket, taken)
        sender.socket.send(b"last", place)
        await until(lambda: taken.data[-1] == b"last")
        assert there.calls["recvmsg"] > 0
        for each in (taken, sender):
            each.socket.close()

    play(work())


# Refusals on an unconnected socket

linux = pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells an unconnected socket of refusals")


def dead(host: str = "127.0.0.1") -> Address:
    """An address that nobody listens at any more."""
    with bound(host) as sock:
        address: Address = sock.getsockname()
        return address


@linux
@pytest.mark.parametrize(
    ("host", "peer"), [("127.0.0.1", "127.0.0.1"), ("::1", "::1"), ("::", "::1"), ("::", "::ffff:127.0.0.1")]
)
def test_unconnected_socket_is_told_what_was_refused(host: str, peer: str, play: Callable[..., None]) -> None:
    async def work() -> None:
        taken = Taken(bound(host), asks=True)
        gone = (peer, dead("::" if "ffff" in peer else peer)[1])
        for number in range(3):  # uvloop has to be woken again after each
            beginning = b"%d" % number * QUOTED
            taken.socket.send(beginning + b"the rest", gone)
            await until(lambda: taken.refusals)
            (refusal,) = taken.refused
            assert (refusal.quoted, refusal.address[:2]) == (beginning, gone)
            taken.refusals.clear()
        taken.socket.send(b"short", gone)
        await until(lambda: taken.refusals)
        assert taken.refused[0].quoted == b"short"
        with bound(peer if "ffff" not in peer else "::") as alive:
            alive.sendto(b"alive", (peer, taken.socket.sock.getsockname()[1]))
            await until(lambda: taken.datagrams)
            taken.socket.send(b"you too", taken.datagrams[0][1])
            assert alive.recv(100) == b"you too"
        taken.socket.close()

    play(work())


@linux
def test_dead_peer_costs_others_no_datagram(play: Callable[..., None]) -> None:
    """The kernel reports a refusal by failing the next datagram, whoever that is for."""

    async def work() -> None:
        taken = Taken(bound(), asks=True)
        alive = [bound() for _ in range(50)]  # first: a port that is free again may be given to the next who asks
        gone = [dead() for _ in range(5)]
        places = [sock.getsockname() for sock in alive]
        for number in range(40):
            for index, place in enumerate(places):
                if index % 3 == 0:
                    taken.socket.send(b"anyone?", gone[index % 5])
                taken.socket.send(b"%d" % number, place)
            await asyncio.sleep(0)  # the kernel keeps a hundred refusals for us
        for sock in alive:
            assert [sock.recv(100) for _ in range(40)] == [b"%d" % number for number in range(40)]
            sock.close()
        assert taken.socket.dropped == 0
        await until(lambda: len(taken.refused) == 40 * 17)
        assert {refusal.address for refusal in taken.refused} == set(gone)
        taken.socket.close()

    play(work())


@linux
def test_flood_of_refusals_leaves_others_their_turns(play: Callable[..., None]) -> None:
    async def work() -> None:
        taken = Taken(bound(), asks=True)
        gone = dead()
        before: list[int] = []
        taken.on_datagram = lambda: before.append(len(taken.refused))
        with bound() as alive:
            for _ in range(100):
                taken.socket.send(b"anyone?", gone)
            alive.sendto(b"alive", taken.socket.sock.getsockname())
            await until(lambda: len(taken.refused) == 100)
        assert max(map(len, taken.refusals)) <= 64
        assert before[0] <= 64, "what came had to wait"
        taken.socket.close()

    play(work())


@linux
def test_refusal_waits_until_all_is_read_that_came(play: Callable[..., None]) -> None:
    """What is behind may say that the peer has gone to another port, and is well."""

    async def work() -> None:
        taken = Taken(bound(), asks=True)
        with bound() as moved:
            gone = moved.getsockname()
            for number in range(100):
                moved.sendto(b"%d" % number, taken.socket.sock.getsockname())
        read: list[int] = []

        def answer() -> None:
            if len(taken.datagrams) < 5:
                taken.socket.send(b"welcome", gone)
            if taken.refusals:
                read.append(len(taken.datagrams))

        taken.on_datagram = answer
        await until(lambda: taken.refusals)
        assert not read, "it was told before all was read"
        assert len(taken.datagrams) == 100
        taken.socket.close()

    play(work())


def test_it_is_known_up_to_when_all_that_came_was_read(play: Callable[..., None]) -> None:
    async def work() -> None:
        taken = Taken(bound())
        loop = asyncio.get_running_loop()
        later = loop.time() + 1000.0
        known: list[float] = []
        taken.on_datagram = lambda: known.append(taken.socket.read_until(later))
        with bound() as sender:
            for _ in range(100):
                sender.sendto(b"x", taken.socket.sock.getsockname())
            await until(lambda: len(known) == 100)
            assert all(known[0] <= each <= loop.time() for each in known[:96])
            assert known[96:] == [later] * 4
            # What comes faster than it is read leaves it not known for ever: some time ago is known.
            known.clear()
            taken.socket._may_wait = 50_000

            def again() -> None:
                known.append(taken.socket.read_until(later))
                if len(known) < 2000:
                    sender.sendto(b"x", taken.socket.sock.getsockname())

            taken.on_datagram = again
            for _ in range(64):
                sender.sendto(b"x", taken.socket.sock.getsockname())
            await until(lambda: len(known) >= 2000)
            assert later not in known[:1900]
            assert len(set(known[:1900])) > 5
            assert known[:1900] == sorted(known[:1900])
            await until(lambda: len(known) == 2063)
            assert known[-1] == later
        taken.socket.close()

    play(work())


@linux
def test_refusals_that_the_kernel_does_not_tell_are_done_without(play: Callable[..., None]) -> None:
    class Old(FullSocket):
        def setsockopt(self, *option: Any) -> None:
            raise OSError(92, "Protocol not available")

    async def work() -> None:
        taken = Taken(Old(bound(), room=100), asks=True)  # type: ignore[arg-type]
        with bound() as alive:
            for _ in range(5):
                taken.socket.send(b"anyone?", dead())
                taken.socket.send(b"hello", alive.getsockname())
                assert alive.recv(100) == b"hello"
        await asyncio.sleep(0.02)
        assert not taken.refusals
        assert not taken.errors
        taken.socket.close()

    play(work())


@pytest.mark.parametrize(
    ("told", "is_refusal"),
    [
        ([(0, 11, struct.pack("=IBBBBII", 111, 2, 3, 3, 0, 0, 0) + bytes(16))], True),
        ([(41, 25, struct.pack("=IBBBBII", 111, 3, 1, 4, 0, 0, 0))], True),
        ([(0, 8, b"\0" * 12), (0, 11, struct.pack("=IBBBBII", 111, 2, 3, 3, 0, 0, 0))], True),
        ([(0, 11, struct.pack("=IBBBBII", 113, 2, 3, 1, 0, 0, 0))], False),  # no route to the host, for now
        ([(0, 11, struct.pack("=IBBBBII", 90, 2, 3, 4, 0, 1280, 0))], False),  # too large for the path
        ([(0, 11, struct.pack("=IBBBBII", 111, 1, 0, 0, 0, 0, 0))], False),  # an error of this host's
        ([(0, 11, b"\0" * 8)], False),
        ([(1, 11, struct.pack("=IBBBBII", 111, 2, 3, 3, 0, 0, 0))], False),
        ([], False),
    ],
)
def test_only_a_closed_port_is_a_refusal(told: list[tuple[int, int, bytes]], is_refusal: bool) -> None:
    assert sockets._is_refusal(told) is is_refusal


@linux
@pytest.mark.parametrize("host", HOSTS)
def test_burst_to_a_closed_port_is_refused_from_its_first_datagram_on(host: str, play: Callable[..., None]) -> None:
    """The kernel may quote the beginning of each of them, or of the first alone."""

    async def work() -> None:
        taken = Taken(bound(host), asks=True)
        gone = dead(host)
        for number in range(3):
            burst = [bytes([number, each]) * 600 for each in range(40)]
            taken.socket.send_all([(data, gone) for data in burst])
            await until(lambda: taken.refusals)
            quoted = [refusal.quoted for refusal in taken.refused]
            assert quoted[0] == burst[0][:QUOTED]
            assert set(quoted) <= {data[:QUOTED] for data in burst}
            assert {refusal.address[:2] for refusal in taken.refused} == {gone[:2]}
            taken.refusals.clear()
        taken.socket.close()

    play(work())


@linux
def test_bursts_to_a_dead_peer_cost_others_no_datagram(play: Callable[..., None]) -> None:
    async def work() -> None:
        taken = Taken(bound(), asks=True)
        alive = [bound() for _ in range(10)]
        gone = dead()
        places = [sock.getsockname() for sock in alive]
        for number in range(20):
            for place in places:
                taken.socket.send_all([(b"anyone?", gone)] * 4)
                taken.socket.send_all([(b"%02d" % number, place)] * 4)
            await asyncio.sleep(0)
        for sock in alive:
            assert [sock.recv(100) for _ in range(80)] == [b"%02d" % (number // 4) for number in range(80)]
            sock.close()
        assert taken.socket.dropped == 0
        taken.socket.close()

    play(work())


# What cannot be sent


def test_datagrams_that_the_kernel_has_no_room_for_are_dropped_and_counted(play: Callable[..., None]) -> None:
    async def work() -> None:
        full = FullSocket(bound(), room=2)
        taken = Taken(full)  # type: ignore[arg-type]
        with bound() as peer:
            for number in range(5):
                taken.socket.send(b"%d" % number, peer.getsockname())
            assert taken.socket.dropped == 3
            full.room = 1
            taken.socket.send(b"again", peer.getsockname())
            assert [peer.recv(100) for _ in range(3)] == [b"0", b"1", b"again"]
        await asyncio.sleep(0.01)
        assert not taken.errors, "it is no error"
        taken.socket.close()

    play(work())


def test_what_is_sent_after_the_end_is_dropped_in_silence(play: Callable[..., None]) -> None:
    async def work() -> None:
        taken = Taken(bound())
        taken.socket.close()
        taken.socket.send(b"too late", ("127.0.0.1", 9))
        taken.socket.resume()
        await asyncio.sleep(0.01)
        assert not taken.errors
        assert not taken.socket.reading

    play(work())


def test_datagram_that_cannot_be_sent_is_told_and_harms_no_other(play: Callable[..., None]) -> None:
    async def work() -> None:
        taken = Taken(bound())
        with bound() as peer:
            taken.socket.send(b"x", ("127.0.0.1", 0))
            assert not taken.errors, "never told within a call"
            taken.socket.send(b"small", peer.getsockname())
            assert peer.recv(100) == b"small"
            await until(lambda: taken.errors)
        assert taken.socket.dropped == 1
        taken.socket.close()

    play(work())


def test_datagram_that_is_too_large_for_the_first_hop_is_dropped_as_one_is_further_on(
    play: Callable[..., None],
) -> None:
    async def work() -> None:
        taken = Taken(bound())
        with bound() as peer:
            taken.socket.send(b"x" * 70_000, peer.getsockname())
            taken.socket.send(b"small", peer.getsockname())
            assert peer.recv(100) == b"small"
        await asyncio.sleep(0)
        assert (taken.socket.dropped, taken.errors) == (1, [])
        taken.socket.close()

    play(work())


@pytest.mark.parametrize(
    ("granted", "limits"),
    [
        ((212_992, 4 << 20), "net.core.rmem_max=4194304"),
        ((212_992, 212_992), "net.core.rmem_max=4194304 net.core.wmem_max=4194304"),
        ((4 << 20, 4 << 20), ""),
    ],
)
def test_small_kernel_buffers_are_told_once_with_their_remedy(
    granted: tuple[int, int], limits: str, log_lines: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Kernel:
        """One that lets nobody pass its limits."""

        def setsockopt(self, level: int, option: int, value: int) -> None:
            if option not in (socket.SO_RCVBUF, socket.SO_SNDBUF):
                raise PermissionError

        def getsockopt(self, level: int, option: int) -> int:
            return 2 * granted[option == socket.SO_SNDBUF]

    monkeypatch.setattr("sys.platform", "linux")
    sockets._tell_small.cache_clear()
    for _ in range(3):
        enlarge_buffers(Kernel())  # type: ignore[arg-type]
    sockets._tell_small.cache_clear()
    text = (
        "WARNING bursts of packets may be lost: the kernel gives a UDP socket 208 KiB of buffer where 4096 KiB are "
        f"asked for; sysctl -w {limits} allows it"
    )
    assert log_lines == ([text] if limits else [])


@linux
def test_what_a_kernel_gives_to_who_is_not_root_is_told(log_lines: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    limits = [int(Path(f"/proc/sys/net/core/{name}mem_max").read_text()) for name in "rw"]
    asked = 4 * max(limits)

    class Unprivileged(FullSocket):
        def setsockopt(self, level: int, option: int, value: int) -> None:
            if option in sockets._FORCED.values():
                raise PermissionError
            self.sock.setsockopt(level, option, value)

    monkeypatch.setattr(sockets, "_BUFFER_SIZE", asked)
    sockets._tell_small.cache_clear()
    with bound() as sock:
        enlarge_buffers(Unprivileged(sock, room=0))  # type: ignore[arg-type]
    sockets._tell_small.cache_clear()
    assert log_lines == [
        f"WARNING bursts of packets may be lost: the kernel gives a UDP socket {min(limits) // 1024} KiB of buffer "
        f"where {asked // 1024} KiB are asked for; "
        f"sysctl -w net.core.rmem_max={asked} net.core.wmem_max={asked} allows it"
    ]
