"""How late single pieces of a body are: `.venv/bin/python benchmarks/streaming.py [--engine aioquic,qh3]`.

A piece every 20 ms, 250 of them, each with the time at which it was written; the delay ends when it can be read on the
other end, by the same clock. Three ways: events of a backend, a chunked upload to it, and tokens of an ASGI application
in the client. A piece is merged when it comes in one chunk with another.

The machine's own delay is shown too: the same without a tunnel.
"""

import argparse
import asyncio
import json
import os
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

LIMIT = 30.0
"seconds that anything may take"
HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"


class Delays(NamedTuple):
    """How late the pieces were, in seconds, and how many came together with another."""

    seconds: list[float]
    merged: int

    def at(self, share: float) -> float:
        """The delay in milliseconds that this share of the pieces did not exceed."""
        ordered = sorted(self.seconds)
        return 1000 * ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def piece() -> bytes:
    """An event that says when it was made."""
    return b"data: %d\n\n" % time.monotonic_ns()


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


def chunks(sock: socket.socket) -> Iterator[tuple[int, bytes]]:
    """When each chunk of a body could be read, and its content; a head before them is skipped."""
    data, in_body = b"", False
    while True:
        received = sock.recv(65536)
        now = time.monotonic_ns()
        if not received:
            raise ConnectionResetError("the body was cut")
        data += received
        if not in_body:
            head, found, rest = data.partition(b"\r\n\r\n")
            if not found:
                continue
            if b"chunked" not in head.lower():
                raise ValueError(f"not a chunked body: {head!r}")
            data, in_body = rest, True
        while b"\r\n" in data:
            line, _, rest = data.partition(b"\r\n")
            size = int(line, 16)
            if len(rest) < size + 2:
                break
            data = rest[size + 2 :]
            if not size:
                return
            yield now, rest[:size]


def delays(sock: socket.socket) -> Delays:
    """Read a body of pieces to its end."""
    seconds, merged = [], 0
    for now, data in chunks(sock):
        times = [int(event.removeprefix(b"data: ")) for event in data.split(b"\n\n") if event]
        seconds += [(now - sent) / 1e9 for sent in times]
        merged += len(times) - 1
    return Delays(seconds, merged)


def paced(count: int, every: float) -> Iterator[int]:
    """Numbers, one at each tick of a clock that does not drift."""
    began = time.monotonic()
    for number in range(count):
        time.sleep(max(0.0, began + number * every - time.monotonic()))
        yield number


# The backends


class Pieces:
    """A backend on a socket: a GET of ``/COUNT/SECONDS`` gets events, a POST is timed and gets its delays."""

    def __init__(self) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self._thread = threading.Thread(target=self._accept, daemon=True, name="pieces")

    @property
    def target(self) -> str:
        """The BACKEND argument for it."""
        return f"http://127.0.0.1:{self.port}"

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._thread.join(LIMIT)
        self._listener.close()

    def _accept(self) -> None:
        while True:
            try:
                sock, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(sock,), daemon=True, name="pieces").start()

    def _serve(self, sock: socket.socket) -> None:
        with sock:
            sock.settimeout(LIMIT)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            line = sock.recv(65536, socket.MSG_PEEK).split(b"\r\n")[0].decode()
            if line.startswith("POST "):
                found = json.dumps(delays(sock)).encode()
                head = b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: %d\r\n\r\n"
                sock.sendall(head % len(found) + found)
                return
            _, count, every = line.split(" ")[1].split("/")
            sock.sendall(HEAD)
            for _ in paced(int(count), float(every)):
                sock.sendall(chunk(piece()))
            sock.sendall(b"0\r\n\r\n")


async def app(
    scope: dict[str, Any], receive: Callable[[], Awaitable[Any]], send: Callable[[dict[str, Any]], Awaitable[None]]
) -> None:
    """The same as an ASGI application: a GET of ``/COUNT/SECONDS`` gets tokens one by one."""
    assert scope["type"] == "http"
    _, count, every = scope["path"].split("/")
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/event-stream")]})
    loop = asyncio.get_running_loop()
    began = loop.time()
    for number in range(int(count)):
        await asyncio.sleep(began + number * float(every) - loop.time())
        await send({"type": "http.response.body", "body": piece(), "more_body": True})
    await send({"type": "http.response.body", "body": b""})


# The visitor


def download(address: tuple[str, int], host: str, count: int, every: float) -> Delays:
    """The delays of an answer's pieces."""
    with socket.create_connection(address, timeout=LIMIT) as sock:
        sock.sendall(f"GET /{count}/{every} HTTP/1.1\r\nHost: {host}\r\n\r\n".encode())
        return delays(sock)


def upload(address: tuple[str, int], host: str, count: int, every: float) -> Delays:
    """The delays of an upload's pieces."""
    with socket.create_connection(address, timeout=LIMIT) as sock:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        head = f"POST / HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\nTransfer-Encoding: chunked\r\n\r\n"
        sock.sendall(head.encode())
        for _ in paced(count, every):
            sock.sendall(chunk(piece()))
        sock.sendall(b"0\r\n\r\n")
        answer = b""
        while data := sock.recv(65536):
            answer += data
    return Delays(*json.loads(answer.partition(b"\r\n\r\n")[2]))


def main() -> int:
    """Measure and print."""
    from ends import tunnel

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine", default="aioquic,qh3")
    parser.add_argument("--count", type=int, default=250)
    parser.add_argument("--every", type=float, default=0.02, help="seconds between two pieces")
    arguments = parser.parse_args()
    # Where the client looks for the application.
    os.environ["PYTHONPATH"] = str(Path(__file__).parent)

    def show(way: str, engine: str, found: Delays) -> None:
        figures = " | ".join(f"{found.at(share):.2f}" for share in (0.5, 0.99, 1))
        print(f"| {way} | {engine} | {figures} | {found.merged} of {len(found.seconds)} |", flush=True)

    print("| | engine | p50 ms | p99 ms | max ms | merged |\n|---|---|---|---|---|---|", flush=True)
    with Pieces() as backend:
        for way, measure in (("events", download), ("upload", upload)):
            direct = ("127.0.0.1", backend.port)
            show(way, "no tunnel", measure(direct, "localhost", arguments.count, arguments.every))
        for engine in arguments.engine.split(","):
            for way, measure, target in (
                ("events", download, backend.target),
                ("upload", upload, backend.target),
                ("tokens of an application", download, "streaming:app"),
            ):
                with tempfile.TemporaryDirectory() as directory, tunnel(Path(directory), engine, target) as place:
                    host, port = place.address.rsplit(":", 1)
                    found = measure((host, int(port)), "bench.localhost", arguments.count, arguments.every)
                show(way, engine, found)
    return 0


if __name__ == "__main__":
    sys.exit(main())
