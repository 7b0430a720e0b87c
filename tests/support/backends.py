"""Backends that a tunnel may have to put up with, on real sockets: a raw one that does as a test says, and httpbin.

Each runs in threads of the test's process and is ended by its ``with`` block.
"""

import logging
import socket
import ssl
import struct
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from quictunnel.wire.frames import Fields

__all__ = ["Connection", "HttpbinBackend", "RawBackend", "answer", "echo"]

LIMIT = 30.0
"seconds that a backend waits for anything"


class _HandlerChanged(Exception):
    """A kept connection got a request that is for another handler than the one that waits for it."""


class Connection:
    """One connection that a RawBackend has accepted."""

    def __init__(self, sock: socket.socket, backend: "RawBackend") -> None:
        self.sock = sock
        self.backend = backend
        self._handler = backend.handler
        self._read = b""

    def run(self) -> None:
        """Have the backend's handler do its work."""
        while True:
            try:
                self._handler(self)
                return
            except _HandlerChanged:
                self._handler = self.backend.handler

    def head(self) -> bytes:
        """A request's head with its empty line, noted in ``backend.requests``; empty when there is no other one."""
        while b"\r\n\r\n" not in self._read:
            data = self.sock.recv(65536)
            if not data:
                return b""
            self._read += data
        if self._handler is not self.backend.handler:
            raise _HandlerChanged
        head, mark, self._read = self._read.partition(b"\r\n\r\n")
        self.backend.requests.append(head + mark)
        return head + mark

    def body(self, head: bytes) -> bytes:
        """The body that a head announces, without its framing."""
        fields = head.lower()
        if b"\r\ntransfer-encoding: chunked\r\n" in fields:
            return b"".join(self.chunks())
        _, found, rest = fields.partition(b"\r\ncontent-length: ")
        return self.read(int(rest.split(b"\r\n")[0])) if found else b""

    def read(self, size: int) -> bytes:
        """So many bytes."""
        parts, self._read = [self._read], b""
        have = len(parts[0])
        while have < size:
            data = self.sock.recv(65536)
            if not data:
                raise ConnectionResetError("the body ended early")
            parts.append(data)
            have += len(data)
        whole = b"".join(parts)
        self._read = whole[size:]
        return whole[:size]

    def send(self, *parts: bytes) -> None:
        """Each part in a packet of its own, as far as that can be had."""
        for part in parts:
            self.sock.sendall(part)

    def answer(self, status: int = 200, body: bytes = b"", *fields: bytes) -> None:
        """A whole answer with a length."""
        lines = [b"HTTP/1.1 %d Answer" % status, *fields, b"Content-Length: %d" % len(body), b"", body]
        self.send(b"\r\n".join(lines))

    def reset(self) -> None:
        """End it with RST."""
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.sock.close()

    def gone(self) -> None:
        """Wait until the other side has ended it."""
        with suppress(ConnectionResetError):
            while self.sock.recv(65536):
                pass

    def chunks(self, trailers: Fields | None = None) -> list[bytes]:
        """The chunks of a body; its trailer fields are added to ``trailers``."""
        parts = []
        while size := int(self.line().split(b";")[0], 16):
            parts.append(self.read(size))
            self.read(2)
        while line := self.line():
            if trailers is not None:
                name, _, value = line.partition(b": ")
                trailers.append((name.lower(), value))
        return parts

    def line(self) -> bytes:
        """The next line, without its end."""
        while b"\r\n" not in self._read:
            data = self.sock.recv(65536)
            if not data:
                raise ConnectionResetError("a line ended early")
            self._read += data
        line, _, self._read = self._read.partition(b"\r\n")
        return line


Handler = Callable[[Connection], None]


def answer(status: int = 200, body: bytes = b"ok", *fields: bytes) -> Handler:
    """A handler that gives each request this answer."""

    def handle(connection: Connection) -> None:
        while head := connection.head():
            connection.body(head)
            connection.answer(status, b"" if head.startswith(b"HEAD ") else body, *fields)

    return handle


def echo(connection: Connection) -> None:
    """A handler that answers each request with its own bytes, head and decoded body."""
    while head := connection.head():
        connection.answer(200, head + connection.body(head))


class RawBackend:
    """A socket that hands each connection to ``handler`` in a thread of its own; closed when the handler returns.

    ``handler`` may be changed at any time: the next request on any connection is for the new one. It listens on a
    free port of 127.0.0.1, or on the unix socket ``path``; with ``tls`` it speaks TLS.
    """

    def __init__(self, handler: Handler, *, path: Path | None = None, tls: ssl.SSLContext | None = None) -> None:
        self.handler = handler
        self.requests: list[bytes] = []
        "heads, in the order in which they came"
        self.connections = 0
        "accepted so far"
        self._tls = tls
        self._path = path
        self._open: set[socket.socket] = set()
        self._threads: list[threading.Thread] = []
        self._closed = False
        self._lock = threading.Lock()
        if path is None:
            self._listener = socket.create_server(("127.0.0.1", 0), backlog=1024)
        else:
            self._listener = socket.socket(socket.AF_UNIX)
            self._listener.bind(str(path))
            self._listener.listen(1024)

    @property
    def port(self) -> int:
        port: int = self._listener.getsockname()[1]
        return port

    @property
    def target(self) -> str:
        """The BACKEND argument for it."""
        if self._path is not None:
            return f"unix:{self._path}"
        return f"{'https' if self._tls else 'http'}://127.0.0.1:{self.port}"

    def __enter__(self) -> Self:
        self._start(self._accept)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    @property
    def open(self) -> int:
        """Connections that are open now."""
        with self._lock:
            return len(self._open)

    def cut(self) -> None:
        """Cut every connection, and wait until the last of them is over."""
        with self._lock:
            open_now = list(self._open)
            for sock in open_now:
                with suppress(OSError):
                    sock.shutdown(socket.SHUT_RDWR)
        for thread in list(self._threads[1:]):
            thread.join(LIMIT)
        del self._threads[1:]

    def close(self) -> None:
        """Cut every connection and listen no more."""
        if self._closed:
            return
        self._closed = True
        with self._lock:
            # Shutting down is what wakes a thread that waits in accept() or recv().
            for sock in (self._listener, *self._open):
                with suppress(OSError):
                    sock.shutdown(socket.SHUT_RDWR)
        for thread in list(self._threads):
            thread.join(LIMIT)
        self._listener.close()

    def _start(self, work: Callable[..., None], *args: Any) -> None:
        thread = threading.Thread(target=work, args=args, daemon=True, name=f"backend {self.target}")
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        while not self._closed:
            try:
                sock, _ = self._listener.accept()
            except OSError:
                return
            with self._lock:
                self.connections += 1
                self._open.add(sock)
            self._start(self._serve, sock)

    def _serve(self, sock: socket.socket) -> None:
        try:
            sock.settimeout(LIMIT)
            if self._tls is not None:
                with self._lock:
                    self._open.discard(sock)
                    sock = self._tls.wrap_socket(sock, server_side=True, do_handshake_on_connect=False)
                    self._open.add(sock)
                sock.do_handshake()
            Connection(sock, self).run()
        except OSError:
            pass  # the other side went away, or the test is over
        finally:
            with self._lock:
                self._open.discard(sock)
                sock.close()


class HttpbinBackend:
    """httpbin under waitress, a real WSGI server."""

    def __init__(self, threads: int = 8) -> None:
        import waitress
        from httpbin import app

        logging.getLogger("waitress").setLevel(logging.ERROR)
        listener = socket.create_server(("127.0.0.1", 0), backlog=1024)
        self.port: int = listener.getsockname()[1]
        self._map: dict[int, Any] = {}
        self._server = waitress.create_server(app, sockets=[listener], threads=threads, map=self._map)
        self._thread = threading.Thread(target=self._serve, daemon=True, name="httpbin")

    @property
    def target(self) -> str:
        """The BACKEND argument for it."""
        return f"http://127.0.0.1:{self.port}"

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        import waitress.wasyncore

        self._ended = True
        self._server.pull_trigger()
        self._thread.join(LIMIT)
        self._server.task_dispatcher.shutdown()
        waitress.wasyncore.close_all(self._map)

    _ended = False

    def _serve(self) -> None:
        import waitress.wasyncore

        while not self._ended:
            waitress.wasyncore.loop(timeout=1.0, map=self._map, count=1)
