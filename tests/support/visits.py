"""Visitors on real sockets: whole requests by the standard library, and bytes of a test's own."""

import http.client
import socket
import time
from collections.abc import Iterable, Mapping
from types import TracebackType
from typing import Self

__all__ = ["Answer", "RawVisitor", "visit"]

LIMIT = 20.0
"seconds"


class Answer:
    """A whole answer."""

    def __init__(self, response: http.client.HTTPResponse) -> None:
        self.status = response.status
        self.version = response.version
        self.fields = [(name.lower(), value) for name, value in response.getheaders()]
        self.body = response.read()

    def __repr__(self) -> str:
        return f"<Answer {self.status} {self.fields} {self.body[:200]!r}>"

    def __getitem__(self, name: str) -> str:
        """A field's value, empty if it is not there; several lines of it are joined."""
        return ", ".join(value for key, value in self.fields if key == name)

    @property
    def error(self) -> str:
        """The error type of Proxy-Status, empty if the answer is the backend's own."""
        _, found, rest = self["proxy-status"].partition("quictunnel; error=")
        return rest.partition(";")[0] if found else ""


def visit(
    address: tuple[str, int],
    target: str = "/",
    *,
    host: str = "app.localhost",
    method: str = "GET",
    body: bytes | Iterable[bytes] | None = None,
    fields: Mapping[str, str] | None = None,
    limit: float = LIMIT,
) -> Answer:
    """One request on a connection of its own. An iterable body is sent in chunks. Raises what http.client does."""
    connection = http.client.HTTPConnection(*address, timeout=limit)
    try:
        connection.putrequest(method, target, skip_host=True, skip_accept_encoding=True)
        connection.putheader("Host", host)
        for name, value in (fields or {}).items():
            connection.putheader(name, value)
        if isinstance(body, bytes):
            connection.putheader("Content-Length", str(len(body)))
        elif body is not None:
            connection.putheader("Transfer-Encoding", "chunked")
        connection.endheaders(body, encode_chunked=not isinstance(body, bytes | None))
        return Answer(connection.getresponse())
    finally:
        connection.close()


class RawVisitor:
    """A connection on which a test sends what it likes."""

    def __init__(self, address: tuple[str, int], limit: float = LIMIT) -> None:
        self.sock = socket.create_connection(address, timeout=limit)
        # Kept for the connection's life: what it has read ahead belongs to the next answer.
        self._file = self.sock.makefile("rb")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        self._file.close()
        self.sock.close()

    def send(self, data: bytes) -> None:
        self.sock.sendall(data)

    def get(self, target: str = "/", *fields: str, host: str = "app.localhost") -> None:
        """Send a GET without a body."""
        self.send("\r\n".join([f"GET {target} HTTP/1.1", f"Host: {host}", *fields, "", ""]).encode("latin-1"))

    def read_answer(self, method: str = "GET") -> Answer:
        """The next answer. Raises what http.client does for one that is cut."""
        response = http.client.HTTPResponse(_Kept(self._file), method=method)  # type: ignore[arg-type]
        response.begin()
        return Answer(response)

    def read_line(self) -> bytes:
        return self._file.readline()

    def read(self, size: int) -> bytes:
        """So many bytes, fewer if the other side ends the connection."""
        return self._file.read(size)

    def read_all(self) -> bytes:
        """What comes until the other side ends the connection."""
        return self._file.read()

    def closed_after(self) -> float:
        """Seconds until the other side ends the connection; nothing may come before that."""
        began = time.monotonic()
        assert self._file.read(1) == b""
        return time.monotonic() - began


class _Kept:
    """As much of a socket as HTTPResponse wants, without its closing the file."""

    def __init__(self, file: object) -> None:
        self._file = file

    def makefile(self, mode: str) -> object:
        return _Unclosed(self._file)


class _Unclosed:
    def __init__(self, file: object) -> None:
        self._file = file

    def __getattr__(self, name: str) -> object:
        return getattr(self._file, name)

    def close(self) -> None:
        """The connection goes on."""

    def flush(self) -> None:
        """HTTPResponse asks for it when it is closed."""
