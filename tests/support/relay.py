"""A network between clients and a server that goes wrong as a test says: slow, lossy, out of order, cut, re-addressed.

It is a process of its own, so that thousands of datagrams a second neither wait for the test nor hold it up. This file
is also that process's program, and needs nothing but the standard library.
"""

import heapq
import json
import random
import selectors
import socket
import subprocess
import sys
import threading
import time
from contextlib import suppress
from types import TracebackType
from typing import Any, Self

__all__ = ["Path", "UdpRelay"]

DEFAULTS: dict[str, Any] = {
    "drops": False,
    "delay": 0.0,
    "jitter": 0.0,
    "loss": 0.0,
    "duplicates": 0.0,
    "reorder": 0.0,
    "reorder_by": 0.01,
    "corrupt": 0.0,
    "rate": 0.0,
    "queue": 256 * 1024,
    "mtu": 0,
}

CONTROL_LIMIT = 10.0
"seconds for an answer of the process"

IN_ONE_GO = 128
"datagrams that are taken from one socket before the others have their turn"

BUFFER = 4 * 1024 * 1024

SNDBUFFORCE, RCVBUFFORCE = 32, 33
"Linux's numbers, for which Python has no names: with them root is not held to net.core.rmem_max"


class Path:
    """One direction: what becomes of each datagram. Knows no sockets and no clock."""

    def __init__(self, faults: dict[str, Any], chance: random.Random) -> None:
        """``faults`` is looked at for each datagram, so it may be changed at any time."""
        self.faults = faults
        self.counts = dict.fromkeys(
            ("received", "bytes", "sent", "blackholed", "lost", "too_large", "overflowed", "duplicated", "reordered",
             "corrupted"), 0
        )  # fmt: skip
        self._chance = chance
        self._idle_from = 0.0  # when the line has sent all that it was given
        self._latest = 0.0  # when the last datagram that keeps its place comes out

    def take(self, data: bytes, now: float) -> list[tuple[float, bytes]]:
        """When which datagrams come out at the other end for one that goes in."""
        counts, faults, chance = self.counts, self.faults, self._chance
        counts["received"] += 1
        counts["bytes"] += len(data)
        if faults["drops"]:
            counts["blackholed"] += 1
            return []
        if faults["mtu"] and len(data) > faults["mtu"]:
            counts["too_large"] += 1
            return []
        if faults["loss"] and chance.random() < faults["loss"]:
            counts["lost"] += 1
            return []
        due = now
        rate = faults["rate"]
        if rate:
            begin = max(now, self._idle_from)
            if (begin - now) * rate + len(data) > faults["queue"]:
                counts["overflowed"] += 1
                return []
            due = self._idle_from = begin + len(data) / rate
        due += faults["delay"]
        if faults["jitter"]:
            due += chance.random() * faults["jitter"]
        if faults["corrupt"] and data and chance.random() < faults["corrupt"]:
            counts["corrupted"] += 1
            place = chance.randrange(len(data))
            data = data[:place] + bytes((data[place] ^ chance.randrange(1, 256),)) + data[place + 1 :]
        if faults["reorder"] and chance.random() < faults["reorder"]:
            # It is late by itself; those behind it do not wait.
            counts["reordered"] += 1
            due = max(due, self._latest) + chance.uniform(0.1, 1.0) * faults["reorder_by"]
        else:
            # Jitter alone keeps the order, as a queue in a router does.
            due = self._latest = max(due, self._latest)
        counts["sent"] += 1
        if faults["duplicates"] and chance.random() < faults["duplicates"]:
            counts["duplicated"] += 1
            return [(due, data), (due, data)]
        return [(due, data)]


class _Way:
    """A client's own socket towards the server, which tells clients apart by it."""

    def __init__(self, client: tuple[str, int], server: tuple[str, int]) -> None:
        self.client = client
        self.server = server
        self.sock = _connected(server)


class _Network:
    """The process: sockets, a heap of what is under way, and orders from the test."""

    def __init__(self, control: socket.socket, host: str, server: tuple[str, int], seed: int) -> None:
        self.faults = dict(DEFAULTS)
        self.up = Path(self.faults, random.Random(seed))
        self.down = Path(self.faults, random.Random(seed + 1))
        self._server = server
        self._control = control
        self._orders = b""
        self._inside = _bound(host)
        self._ways: dict[tuple[str, int], _Way] = {}
        self._heap: list[tuple[float, int, _Way, bool, bytes]] = []
        self._count = 0
        self._rebound = 0
        self._selector = selectors.DefaultSelector()
        self._selector.register(control, selectors.EVENT_READ, self._order)
        self._selector.register(self._inside, selectors.EVENT_READ, self._from_clients)

    def run(self) -> None:
        """Until the test closes its end."""
        self._say({"address": self._inside.getsockname()[:2]})
        while True:
            wait = None if not self._heap else max(0.0, self._heap[0][0] - time.monotonic())
            for key, _ in self._selector.select(wait):
                if isinstance(key.data, _Way):
                    self._from_server(key.data)
                elif key.data() is False:
                    return
            self._release(time.monotonic())

    def _from_clients(self) -> None:
        for _ in range(IN_ONE_GO):
            try:
                data, client = self._inside.recvfrom(65536)
            except OSError:
                return
            way = self._ways.get(client)
            if way is None:
                way = self._ways[client] = _Way(client, self._server)
                self._selector.register(way.sock, selectors.EVENT_READ, way)
            self._pass(self.up, way, True, data)

    def _from_server(self, way: _Way) -> None:
        for _ in range(IN_ONE_GO):
            try:
                data = way.sock.recv(65536)
            except ConnectionRefusedError:
                continue  # a port that nobody listens on is told here; the ends have to find it out by themselves
            except OSError:
                return
            self._pass(self.down, way, False, data)

    def _pass(self, path: Path, way: _Way, upwards: bool, data: bytes) -> None:
        now = time.monotonic()
        for due, what in path.take(data, now):
            if due <= now and not self._heap:
                self._send(way, upwards, what)
            else:
                self._count += 1
                heapq.heappush(self._heap, (due, self._count, way, upwards, what))

    def _release(self, now: float) -> None:
        heap = self._heap
        while heap and heap[0][0] <= now:
            _, _, way, upwards, data = heapq.heappop(heap)
            self._send(way, upwards, data)

    def _send(self, way: _Way, upwards: bool, data: bytes) -> None:
        # What the kernel will not take is lost, as on any line.
        with suppress(OSError):
            if upwards:
                way.sock.send(data)
            else:
                self._inside.sendto(data, way.client)

    def _order(self) -> bool:
        data = self._control.recv(65536)
        if not data:
            return False
        self._orders += data
        *lines, self._orders = self._orders.split(b"\n")
        for line in lines:
            order = json.loads(line)
            self.faults.update(order.get("set", {}))
            if order.get("rebind"):
                self._rebind()
            self._say(self._state())
        return True

    def _rebind(self) -> None:
        self._rebound += 1
        for way in self._ways.values():
            self._selector.unregister(way.sock)
            fresh = _connected(way.server)  # before the old one is closed, or it could get the same port
            way.sock.close()
            way.sock = fresh
            self._selector.register(way.sock, selectors.EVENT_READ, way)

    def _state(self) -> dict[str, Any]:
        return {
            "faults": self.faults,
            "up": self.up.counts,
            "down": self.down.counts,
            "ways": len(self._ways),
            "rebound": self._rebound,
            "under_way": len(self._heap),
        }

    def _say(self, what: dict[str, Any]) -> None:
        self._control.sendall(json.dumps(what).encode() + b"\n")


def _bound(host: str) -> socket.socket:
    sock = _made()
    sock.bind((host, 0))
    return sock


def _connected(server: tuple[str, int]) -> socket.socket:
    sock = _made()
    sock.connect(server)
    return sock


def _made() -> socket.socket:
    sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    sock.setblocking(False)
    for plain, force in ((socket.SO_RCVBUF, RCVBUFFORCE), (socket.SO_SNDBUF, SNDBUFFORCE)):
        try:
            sock.setsockopt(socket.SOL_SOCKET, force, BUFFER)
        except OSError:
            sock.setsockopt(socket.SOL_SOCKET, plain, BUFFER)
    return sock


class UdpRelay:
    """Forwards datagrams to ``port`` of the loopback and back, until its ``with`` block ends.

    Each fault is an attribute that may be set at any time, and is so when the assignment returns; ``set`` sets several
    at once. Chances are from 0 to 1 and times in seconds; each direction has them all.

    ``drops``: everything is dropped, both ways. ``delay``: of each way, so the round trip takes twice as long;
    ``jitter``: so much more at most, in order. ``loss``, ``duplicates``, ``corrupt``: chances. ``reorder``: the chance
    to come later than those behind it, by ``reorder_by`` at most. ``rate``: bytes a second, with at most ``queue``
    bytes waiting and the rest dropped. ``mtu``: what is larger is dropped without a word. 0 switches each of them off.
    """

    def __init__(self, port: int, *, seed: int = 0, **faults: Any) -> None:
        self._faults = faults
        self._lock = threading.Lock()
        self._control, other = socket.socketpair()
        self._control.settimeout(CONTROL_LIMIT)
        with other:
            self._process = subprocess.Popen(
                [sys.executable, "-I", "-S", __file__, str(other.fileno()), "127.0.0.1", str(port), str(seed)],
                pass_fds=(other.fileno(),),
                stdin=subprocess.DEVNULL,
            )
        self._answers = self._control.makefile("rb")
        try:
            self._address: tuple[str, int] = tuple(self._answer()["address"])
            if faults:
                self.set(**faults)
        except BaseException:
            self.close()
            raise

    @property
    def address(self) -> str:
        """What clients dial."""
        return f"{self._address[0]}:{self._address[1]}"

    @property
    def pid(self) -> int:
        return self._process.pid

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """End the network: everything on the way is lost."""
        self._answers.close()
        self._control.close()
        try:
            self._process.wait(CONTROL_LIMIT)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def set(self, **faults: Any) -> None:
        """Change some faults, all in the same moment."""
        unknown = faults.keys() - DEFAULTS.keys()
        if unknown:
            raise TypeError(f"there is no such fault: {', '.join(sorted(unknown))}")
        self._ask({"set": faults})

    def heal(self) -> None:
        """Switch all faults off."""
        self.set(**DEFAULTS)

    def rebind(self) -> None:
        """Give each client another port: from now on the server sees all its datagrams come from there."""
        self._ask({"rebind": True})

    def counts(self) -> dict[str, Any]:
        """What went through and what became of it, by direction; ``ways`` is how many client ports there have been."""
        return self._ask({})

    @property
    def dropped(self) -> int:
        """Datagrams that came in and did not come out, for whatever reason."""
        state = self.counts()
        causes = ("blackholed", "lost", "too_large", "overflowed")
        return sum(int(state[way][cause]) for way in ("up", "down") for cause in causes)

    def __getattr__(self, name: str) -> Any:
        if name in DEFAULTS:
            return self._ask({})["faults"][name]
        raise AttributeError(name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in DEFAULTS:
            self.set(**{name: value})
        else:
            super().__setattr__(name, value)

    def _ask(self, order: dict[str, Any]) -> dict[str, Any]:
        with self._lock:
            self._control.sendall(json.dumps(order).encode() + b"\n")
            return self._answer()

    def _answer(self) -> dict[str, Any]:
        line = self._answers.readline()
        if not line:
            raise RuntimeError(f"the relay's process is gone: exit status {self._process.poll()}")
        answer: dict[str, Any] = json.loads(line)
        return answer


def main() -> None:
    """The process: FD HOST PORT SEED."""
    descriptor, host, port, seed = sys.argv[1:]
    with socket.socket(fileno=int(descriptor)) as control, suppress(KeyboardInterrupt, ConnectionError):
        _Network(control, host, (host, int(port)), int(seed)).run()


if __name__ == "__main__":
    main()
