"""Any ``httpx.AsyncBaseTransport`` as a backend: an HTTP/2 origin, a WSGI application, a mock, whatever a user brings.

For plain HTTP/1.1 there is ``quictunnel.http.origin``, which costs a hundredth of it.
"""

import errno
import socket
import ssl
from collections.abc import AsyncIterable, AsyncIterator
from typing import Final
from urllib.parse import quote

import httpx
from loguru import logger

from quictunnel.backends.task_leg import TaskLeg
from quictunnel.backends.tasks import Tasks
from quictunnel.wire.errors import ErrorCode, TunnelError
from quictunnel.wire.fields import end_to_end
from quictunnel.wire.frames import Data, Fields, RequestHead

__all__ = ["TransportBackend"]

# The first that fits, the narrower before the wider.
_BY_TYPE: Final[tuple[tuple[type[Exception], ErrorCode], ...]] = (
    (httpx.ConnectTimeout, ErrorCode.CONNECTION_TIMEOUT),
    (httpx.PoolTimeout, ErrorCode.CONNECTION_LIMIT_REACHED),
    (httpx.TimeoutException, ErrorCode.HTTP_RESPONSE_TIMEOUT),
    (httpx.ConnectError, ErrorCode.CONNECTION_REFUSED),
    (httpx.ProxyError, ErrorCode.CONNECTION_REFUSED),
    (httpx.NetworkError, ErrorCode.CONNECTION_TERMINATED),
    (httpx.LocalProtocolError, ErrorCode.BAD_REQUEST),
    (httpx.RemoteProtocolError, ErrorCode.HTTP_PROTOCOL_ERROR),
    (httpx.DecodingError, ErrorCode.HTTP_PROTOCOL_ERROR),
)
_UNROUTABLE: Final = frozenset({errno.ENETUNREACH, errno.EHOSTUNREACH, errno.EADDRNOTAVAIL})


class TransportBackend:
    """Legs to a transport, which this closes when it is closed."""

    def __init__(
        self,
        transport: httpx.AsyncBaseTransport,
        base_url: str = "http://localhost",
        *,
        name: str = "",
        connect_time: float = 10.0,
        head_time: float = 60.0,
    ) -> None:
        """``base_url``: scheme, host and port that the transport is to reach; targets come from the visitors.

        ``connect_time`` and ``head_time`` are seconds, for a connection and for an answer's head. Raises ValueError.
        """
        url = httpx.URL(base_url)
        if url.scheme not in ("http", "https") or not url.host or url.raw_path not in (b"/", b"") or url.userinfo:
            raise ValueError(f"{base_url!r}: a backend is http:// or https://, a host and a port, and nothing else")
        self.name = name or str(url.copy_with(raw_path=b"/")).removesuffix("/")
        self.authority = url.netloc.decode("ascii")
        self._transport = transport
        self._base = url
        self._head_time = head_time
        # What is no wait for a head is the visitor's: silence within a body has no limit here, as elsewhere.
        self._timeout = {"connect": connect_time, "pool": connect_time, "read": None, "write": None}
        self._tasks = Tasks()

    def __repr__(self) -> str:
        return f"<TransportBackend {self.name} in_flight={self.in_flight}>"

    @property
    def in_flight(self) -> int:
        """Exchanges whose task has not ended."""
        return len(self._tasks)

    async def start(self) -> None:
        """Nothing is dialled before the first request."""

    def open(self) -> "TransportLeg":
        """A fresh leg: join it, then let it receive a RequestHead."""
        return TransportLeg(self, self._tasks, self._head_time)

    async def aclose(self, grace: float = 0.0) -> None:
        """Take no new request, let what runs end within ``grace`` seconds, cancel the rest, close the transport."""
        await self._tasks.aclose(grace)
        await self._transport.aclose()

    async def send(self, head: RequestHead, body: httpx.AsyncByteStream) -> httpx.Response:
        """The transport's answer to a request, its body unread."""
        method = head.method.decode("ascii")
        extensions = {"timeout": dict(self._timeout), "target": head.target}
        request = httpx.Request(method, self._base, headers=self._headers(head), stream=body, extensions=extensions)
        # httpx would write the method in capitals and normalise the target.
        request.method = method
        request.url = _TargetURL(self._base, head.target)
        return await self._transport.handle_async_request(request)

    def _headers(self, head: RequestHead) -> Fields:
        host = head.authority or self.authority.encode("ascii")
        # The transport would send the body at once, so that nothing is left of the expectation.
        fields = [field for field in end_to_end(head.fields) if field[0] not in (b"expect", b"host")]
        headers = [(b"Host", host), *fields]
        if head.body and not any(name == b"content-length" for name, _ in fields):
            headers.append((b"Transfer-Encoding", b"chunked"))
        return headers


class TransportLeg(TaskLeg):
    """One request of the transport."""

    __slots__ = ("_backend",)

    def __init__(self, backend: TransportBackend, tasks: Tasks, head_time: float) -> None:
        super().__init__(tasks, backend.name, head_time)
        self._backend = backend

    async def serve(self, head: RequestHead) -> None:
        body = _Body(self) if head.body else httpx.ByteStream(b"")
        response = await self._backend.send(head, body)
        stream = response.stream
        if not isinstance(stream, AsyncIterable):
            raise TypeError("the transport's answer is no asynchronous stream")
        try:
            self.send_head(response.status_code, [(name.lower(), value) for name, value in response.headers.raw])
            # As it came: decoding would belie the fields.
            async for chunk in stream:
                if chunk:
                    await self.send_data(chunk)
            self.send_end()
        finally:
            await response.aclose()

    def translate(self, error: Exception) -> TunnelError:
        code = _code(error)
        if code is ErrorCode.INTERNAL_ERROR:
            logger.opt(exception=error).error("{} raised {}", self._backend.name, type(error).__name__)
            return TunnelError(code, f"the backend's transport raised {type(error).__name__}")
        return TunnelError(code)

    def peer_gone(self) -> None:
        if self.task is not None:
            self.task.cancel()


class _Body(httpx.AsyncByteStream):
    """A request's body as the transport asks for it."""

    def __init__(self, leg: TransportLeg) -> None:
        self._leg = leg

    async def __aiter__(self) -> AsyncIterator[bytes]:
        while type(frame := await self._leg.next_frame()) is Data:
            yield frame.data
        if frame is None:
            raise httpx.WriteError("the visitor left within its request")


class _TargetURL(httpx.URL):
    """A URL whose target is byte for byte what the visitor sent."""

    def __init__(self, base: httpx.URL, target: bytes) -> None:
        near = quote(target if target.startswith(b"/") else b"/", safe="/?%:@!$&'()*+,;=~")
        super().__init__(base.copy_with(raw_path=near.encode("ascii")))
        self._target = target

    @property
    def raw_path(self) -> bytes:
        return self._target


def _code(error: Exception) -> ErrorCode:
    """What an error of a transport means. httpx names the act that failed, its causes tell why."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, socket.gaierror):
            return ErrorCode.DNS_ERROR
        if isinstance(cause, ssl.SSLCertVerificationError):
            return ErrorCode.TLS_CERTIFICATE_ERROR
        if isinstance(cause, ssl.SSLError):
            return ErrorCode.TLS_ERROR
        if isinstance(cause, OSError) and cause.errno in _UNROUTABLE:
            return ErrorCode.DESTINATION_IP_UNROUTABLE
        cause = cause.__cause__ or cause.__context__
    if isinstance(error, httpx.RemoteProtocolError) and "disconnected" in str(error):
        return ErrorCode.CONNECTION_TERMINATED
    return next((code for kind, code in _BY_TYPE if isinstance(error, kind)), ErrorCode.INTERNAL_ERROR)
