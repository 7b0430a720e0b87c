"""The bench's own backend: answers at once, and counts.

    /            100 bytes that begin with this backend's mark
    /bytes?n=…   that many bytes
    /sink        takes a body of any length and says how long it was

It checks nothing that a tunnel has not checked already: only a tunnel of the bench's own leads to it.
"""

import asyncio
from typing import Final, cast

import httptools

__all__ = ["Backend"]

_SMALL: Final = 100
"bytes of the small answer"

_BLOCK: Final = bytes(65536)
_HIGHEST: Final = 2**40


class Backend:
    """Listens on the loopback; ``mark`` is what its small answers begin with."""

    def __init__(self, mark: str) -> None:
        self.requests = 0
        self.received = 0
        "bytes of requests' bodies"

        self.small = _answer(mark.encode("ascii").ljust(_SMALL, b"."))
        self._server: asyncio.Server | None = None

    async def start(self) -> int:
        """Listen on a free port; which. Raises OSError."""
        self._server = await asyncio.get_running_loop().create_server(lambda: _Connection(self), "127.0.0.1", 0)
        port: int = self._server.sockets[0].getsockname()[1]
        return port

    def close(self) -> None:
        """Take no more connections."""
        if self._server is not None:
            self._server.close()


class _Connection(asyncio.Protocol):
    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self._parser = httptools.HttpRequestParser(self)
        self._transport: asyncio.Transport | None = None
        self._target = b""
        self._taken = 0
        self._left = 0  # bytes of an answer that have not been written
        self._paused = False

    # asyncio's side

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None

    def data_received(self, data: bytes) -> None:
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade):
            self._close()

    def pause_writing(self) -> None:
        self._paused = True

    def resume_writing(self) -> None:
        self._paused = False
        self._write()

    # httptools' side

    def on_message_begin(self) -> None:
        self._target = b""
        self._taken = 0

    def on_url(self, url: bytes) -> None:
        self._target += url

    def on_body(self, body: bytes) -> None:
        self._taken += len(body)
        self._backend.received += len(body)

    def on_message_complete(self) -> None:
        self._backend.requests += 1
        if self._transport is None:
            return
        path, _, query = self._target.partition(b"?")
        if path == b"/":
            self._transport.write(self._backend.small)
        elif path == b"/sink":
            self._transport.write(_answer(b"%d" % self._taken))
        elif path == b"/bytes" and query[:2] == b"n=" and query[2:].isdigit() and int(query[2:]) <= _HIGHEST:
            self._left = int(query[2:])
            self._transport.write(_head(200, self._left))
            self._write()
        else:
            self._transport.write(_head(404, 0))
        if not self._parser.should_keep_alive() and not self._left:
            self._transport.close()

    def _write(self) -> None:
        transport = self._transport
        # What is written to a lost connection is dropped without a pause: it would go on for as long as there is any.
        while self._left and not self._paused and transport is not None and not transport.is_closing():
            size = min(self._left, len(_BLOCK))
            self._left -= size
            transport.write(_BLOCK[:size])

    def _close(self) -> None:
        if self._transport is not None:
            self._transport.abort()


def _head(status: int, length: int) -> bytes:
    return b"HTTP/1.1 %d %s\r\nContent-Length: %d\r\n\r\n" % (status, b"OK" if status == 200 else b"No", length)


def _answer(body: bytes) -> bytes:
    return _head(200, len(body)) + body
