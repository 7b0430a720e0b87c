"""A UDP path between clients and a server that can be cut: packets go through, or are dropped without a word."""

import select
import socket
import threading
from contextlib import suppress
from types import TracebackType
from typing import Self

__all__ = ["UdpRelay"]


class UdpRelay:
    """Forwards datagrams to ``port`` of the loopback and back, in a thread, until its ``with`` block ends."""

    def __init__(self, port: int) -> None:
        self.drops = False
        "whether everything is dropped, both ways; may be set at any time"
        self.dropped = 0
        "datagrams"
        self._server = ("127.0.0.1", port)
        self._inside = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self._inside.bind(("127.0.0.1", 0))
        self._ways: dict[tuple[str, int], socket.socket] = {}
        self._clients: dict[socket.socket, tuple[str, int]] = {}
        self._end, self._ended = socket.socketpair()
        self._thread = threading.Thread(target=self._run, daemon=True, name="relay")

    @property
    def address(self) -> str:
        """What clients dial."""
        return f"127.0.0.1:{self._inside.getsockname()[1]}"

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._end.close()
        self._thread.join()
        for sock in (self._inside, self._ended, *self._clients):
            sock.close()

    def _run(self) -> None:
        while True:
            ready, _, _ = select.select([self._ended, self._inside, *self._clients], [], [])
            if self._ended in ready:
                return
            for sock in ready:
                # A port that nobody listens on is told here; the ends have to find it out by themselves.
                with suppress(ConnectionRefusedError):
                    self._forward(sock)

    def _forward(self, sock: socket.socket) -> None:
        data, source = sock.recvfrom(65536)
        if self.drops:
            self.dropped += 1
        elif sock is self._inside:
            self._way(source).send(data)
        else:
            self._inside.sendto(data, self._clients[sock])

    def _way(self, client: tuple[str, int]) -> socket.socket:
        """A client's own socket towards the server, which tells clients apart by it."""
        way = self._ways.get(client)
        if way is None:
            way = self._ways[client] = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
            way.connect(self._server)
            self._clients[way] = client
        return way
