"""What a datagram costs between two UDP sockets of this machine: `.venv/bin/python benchmarks/datagrams.py`.

Pairs of ``DatagramSocket`` on the loopback, as both ends of a link have them, with datagrams of several sizes in bursts
of several lengths: one by one, sent together (GSO), and also received together (GRO). CPU time of the process and calls
of the kernel, each for one datagram; the variants take turns, medians. DatagramSocket itself sends bursts of fewer than
four one by one; here they are sent together, to show why.
"""

import argparse
import asyncio
import importlib.util
import socket
import statistics
import sys
import time
from collections.abc import Callable, Coroutine
from typing import Any

from quictunnel.quic import sockets
from quictunnel.quic.sockets import DatagramSocket, enlarge_buffers

WAYS = ("one by one", "sent together", "and received together")


class Counted:
    """A socket whose calls of the kernel are counted."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self.calls = 0
        for name in ("recv", "recvfrom", "recvmsg", "send", "sendto", "sendmsg"):
            setattr(self, name, self._counted(getattr(sock, name)))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._sock, name)

    def _counted(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*arguments: Any) -> Any:
            self.calls += 1
            return call(*arguments)

        return counted


class Pair:
    """A connected sender and the receiver, as the client's and the server's socket are."""

    def __init__(self, way: str, count_calls: bool) -> None:
        receiver = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        receiver.bind(("127.0.0.1", 0))
        sender = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        sender.connect(receiver.getsockname())
        for sock in (receiver, sender):
            enlarge_buffers(sock)
        self.came = 0
        self.ends: list[Any] = [Counted(sock) if count_calls else sock for sock in (receiver, sender)]
        self.receiver = DatagramSocket(self.ends[0], self._received)
        self.sender = DatagramSocket(self.ends[1], lambda datagrams, address: None)
        self.sender._segments &= way != WAYS[0]
        if way == WAYS[2]:
            self.receiver._ask_for_trains([b""] * 32)
        else:
            self.receiver._ask_for_trains = lambda burst: None  # type: ignore[method-assign]

    def _received(self, datagrams: list[bytes], address: Any) -> None:
        self.came += len(datagrams)

    async def carry(self, burst: list[tuple[bytes, Any]], times: int) -> float:
        """Send the burst so often; CPU seconds."""
        before = time.process_time()
        for _ in range(times):
            aim = self.came + len(burst)
            self.sender.send_all(burst)
            while self.came < aim:  # noqa: ASYNC110
                await asyncio.sleep(0)
        return time.process_time() - before

    def close(self) -> None:
        self.receiver.close()
        self.sender.close()


async def measure(size: int, length: int, repeats: int, times: int) -> list[tuple[float, float]]:
    """CPU microseconds and calls a datagram, by each way."""
    burst = [(bytes([number]) * size, None) for number in range(length)]
    costs: dict[str, list[float]] = {way: [] for way in WAYS}
    pairs = {way: Pair(way, False) for way in WAYS}
    for _ in range(repeats):
        for way, pair in pairs.items():
            costs[way].append(1e6 * await pair.carry(burst, times) / (times * length))
    found: list[tuple[float, float]] = []
    for way, pair in pairs.items():
        pair.close()
        counted = Pair(way, True)
        await counted.carry(burst, times)
        calls = sum(each.calls for each in counted.ends) / (times * length)
        counted.close()
        found.append((statistics.median(costs[way]), calls))
    await asyncio.sleep(0.01)
    return found


async def table(arguments: argparse.Namespace) -> None:
    """All sizes and bursts."""
    print("| bytes | in a burst | " + " | ".join(WAYS) + " |\n|---|---|---|---|---|")
    for size in arguments.sizes:
        for length in arguments.bursts:
            times = max(5, arguments.datagrams // length)
            cells = [
                f"{cpu:.1f} us, {calls:.2f}" for cpu, calls in await measure(size, length, arguments.repeats, times)
            ]
            print(f"| {size:,} | {length} | " + " | ".join(cells) + " |", flush=True)


def numbers(text: str) -> list[int]:
    return [int(each) for each in text.split(",")]


def main() -> int:
    """Measure on uvloop where it is installed, as the tunnel does."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=numbers, default=[100, 1200, 1452, 8900, 16000])
    parser.add_argument("--bursts", type=numbers, default=[1, 2, 4, 16, 64])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--datagrams", type=int, default=1000, help="in each repeat")
    arguments = parser.parse_args()
    vars(sockets)["_FEWEST_SEGMENTS"] = 2
    factory: Any = None
    if importlib.util.find_spec("uvloop") is not None:
        import uvloop

        factory = uvloop.new_event_loop
    work: Coroutine[Any, Any, None] = table(arguments)
    with asyncio.Runner(loop_factory=factory) as runner:
        runner.run(work)
    return 0


if __name__ == "__main__":
    sys.exit(main())
