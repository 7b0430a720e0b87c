"""The line between a tunnel's client and its server, made longer or lossy.

Datagrams go through the tests' ``UdpRelay``. TCP goes through a relay of its own, which is this file as a program: it
holds back every byte for the way's time, and the first ones for the round trip that the handshake would have taken. It
ends the connection on both sides, so loss cannot be put on it.
"""

import asyncio
import subprocess
import sys
from contextlib import ExitStack, suppress
from types import TracebackType
from typing import NamedTuple, Self

from benchmarks.sidebyside.processes import ROOT, Trouble
from tests.support.relay import UdpRelay

__all__ = ["Line", "Lines"]

AT_ONCE = 256 * 1024
UNDER_WAY = 256
"pieces of at most AT_ONCE bytes that a direction holds"


class Line(NamedTuple):
    """What a line is like."""

    round_trip: float = 0.0
    "seconds"

    loss: float = 0.0
    "the chance that a datagram is lost, each way"


class Lines:
    """Relays for the time of a ``with`` block; without a line, what is asked for is reached as it is."""

    def __init__(self, line: Line | None) -> None:
        self.line = line
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._stack.close()

    def udp(self, port: int) -> int:
        """The port by which a UDP port of the loopback is reached."""
        if self.line is None:
            return port
        relay = UdpRelay(port, delay=self.line.round_trip / 2, loss=self.line.loss)
        self._stack.callback(relay.close)
        return int(relay.address.rpartition(":")[2])

    def tcp(self, port: int, host: str = "127.0.0.1", listen: str = "127.0.0.1", on: int = 0) -> int:
        """The port (``on``, if it is given) of ``listen`` by which a TCP port is reached."""
        if self.line is None:
            return port
        if self.line.loss:
            raise Trouble("loss can only be put on datagrams here, and this goes over TCP")
        command = [sys.executable, "-m", "benchmarks.sidebyside.lines", host, str(port), listen, str(on)]
        command.append(str(self.line.round_trip / 2))
        relay = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True, cwd=ROOT)

        def end() -> None:
            relay.kill()
            relay.communicate()

        self._stack.callback(end)
        assert relay.stdout is not None
        said = relay.stdout.readline()
        if not said:
            raise Trouble("the relay did not start")
        return int(said)


async def carry(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, delay: float, earliest: float) -> None:
    """Pass one direction on, ``delay`` seconds late; nothing leaves before ``earliest``."""
    loop = asyncio.get_running_loop()
    under_way: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue(UNDER_WAY)

    async def take() -> None:
        while True:
            data = await reader.read(AT_ONCE)
            await under_way.put((max(loop.time() + delay, earliest), data))
            if not data:
                return

    async with asyncio.TaskGroup() as group:
        group.create_task(take())
        while True:
            due, data = await under_way.get()
            await asyncio.sleep(due - loop.time())
            if not data:
                if writer.can_write_eof():
                    writer.write_eof()
                return
            writer.write(data)
            await writer.drain()


async def serve(host: str, port: int, listen: str, on: int, delay: float) -> None:
    """Relay connections until the process is ended."""

    async def relay(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        # Here the handshake was over at once; over the line it takes a round trip, and only then can data leave.
        began = asyncio.get_running_loop().time()
        there: asyncio.StreamWriter | None = None
        with suppress(OSError, ExceptionGroup):
            answers, there = await asyncio.open_connection(host, port)
            async with asyncio.TaskGroup() as group:
                group.create_task(carry(reader, there, delay, began + 3 * delay))
                group.create_task(carry(answers, writer, delay, began + 2 * delay))
        for each in (writer, there):
            if each is not None:
                each.close()

    server = await asyncio.start_server(relay, listen, on, backlog=4096)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


if __name__ == "__main__":
    with suppress(KeyboardInterrupt):
        asyncio.run(serve(sys.argv[1], int(sys.argv[2]), sys.argv[3], int(sys.argv[4]), float(sys.argv[5])))
