"""An ASGI 3 application in this process as a backend: called directly, without a server between.

What an application sees is what it would see behind a server on HTTP/1.1: the visitor's Host, target and address in the
scope, its body as it comes, ``http.disconnect`` at once when the visitor leaves. WebSockets are not served: they would
need a codec of their own, and an application that has them can be run on a port.
"""

import asyncio
import importlib
import sys
from collections.abc import Awaitable, Callable, MutableMapping
from pathlib import Path
from typing import Any, Final, Literal, TypeAlias, cast
from urllib.parse import unquote_to_bytes

from loguru import logger

from quictunnel.backends.task_leg import TaskLeg
from quictunnel.backends.tasks import Tasks
from quictunnel.wire.errors import ErrorCode, TunnelError
from quictunnel.wire.fields import members, parse_host
from quictunnel.wire.frames import Data, Fields, RequestHead

__all__ = ["Application", "ApplicationError", "AsgiBackend", "load_application"]

Scope: TypeAlias = MutableMapping[str, Any]
Message: TypeAlias = MutableMapping[str, Any]
Receive: TypeAlias = Callable[[], Awaitable[Message]]
Send: TypeAlias = Callable[[Message], Awaitable[None]]
Application: TypeAlias = Callable[[Scope, Receive, Send], Awaitable[None]]

# 2.3: from 2.4 on, frameworks learn of a visitor's leaving only when they next send.
_ASGI: Final = {"version": "3.0", "spec_version": "2.3"}
_LIFESPAN_ASGI: Final = {"version": "3.0", "spec_version": "2.0"}
_PORTS: Final = {b"http": 80, b"https": 443}


class ApplicationError(ValueError):
    """The application cannot be loaded or does not start; the text is for the user."""


class Disconnected(OSError):
    """What an application gets that goes on sending to a visitor who has left."""


# Loading


def load_application(name: str) -> Application:
    """The application that ``module:attribute`` names, or that ``module:function()`` makes.

    The working directory is searched first. Raises ApplicationError.
    """
    module_name, _, attribute = name.partition(":")
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        found: Any = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise ApplicationError(f"{name}: importing {module_name} failed: {error}") from error
        raise ApplicationError(f"{name}: there is no module {error.name!r} in {here} or where Python looks") from None
    except Exception as error:
        raise ApplicationError(f"{name}: importing {module_name} failed: {type(error).__name__}: {error}") from error
    for part in attribute.removesuffix("()").split("."):
        try:
            found = getattr(found, part)
        except AttributeError:
            raise ApplicationError(f"{name}: {module_name} has no attribute {attribute.removesuffix('()')!r}") from None
    if attribute.endswith("()"):
        found = _make(name, found)
    if not callable(found):
        raise ApplicationError(
            f"{name}: this is {type(found).__name__!r}, not an ASGI application, which can be called"
        )
    return cast(Application, found)


def _make(name: str, function: Any) -> Any:
    if not callable(function):
        raise ApplicationError(f"{name}: this is {type(function).__name__!r}, which cannot be called: leave out the ()")
    try:
        return function()
    except Exception as error:
        raise ApplicationError(f"{name}: it raised {type(error).__name__}: {error}") from error


# The backend


class AsgiBackend:
    """Legs to an application. ``start`` it before the first exchange."""

    def __init__(
        self,
        app: Application,
        *,
        lifespan: Literal["auto", "on", "off"] = "auto",
        root_path: str = "",
        name: str = "",
        authority: str = "localhost",
        head_time: float = 60.0,
        start_time: float = 60.0,
        leave_time: float = 30.0,
    ) -> None:
        """``lifespan``: whether the application is told of start and end; "auto" takes an error for not knowing of it.

        In seconds: ``head_time`` for an answer's head, ``start_time`` for the lifespan's start-up, ``leave_time`` for a
        call to end by itself after its visitor has left, before it is cancelled.
        """
        self.name = name or f"asgi:{getattr(app, '__module__', '?')}"
        self.authority = authority
        self.app = app
        self.root_path = root_path
        self.state: dict[str, Any] = {}
        "what the lifespan's start-up left for every request"
        self.leave_time = leave_time
        self._head_time = head_time
        self._start_time = start_time
        self._tasks = Tasks()
        self._lifespan = None if lifespan == "off" else _Lifespan(app, self.state, required=lifespan == "on")

    def __repr__(self) -> str:
        return f"<AsgiBackend {self.name} in_flight={self.in_flight}>"

    @property
    def in_flight(self) -> int:
        """Calls of the application that have not returned, background work after an answer included."""
        return len(self._tasks)

    async def start(self) -> None:
        """Run the lifespan's start-up. Raises ApplicationError if it fails or takes too long."""
        if self._lifespan is not None:
            await self._lifespan.start(self._start_time)

    def open(self) -> "AsgiLeg":
        """A fresh leg: join it, then let it receive a RequestHead."""
        return AsgiLeg(self, self._tasks, self._head_time)

    async def aclose(self, grace: float = 0.0) -> None:
        """Take no new request, let what runs end within ``grace`` seconds, cancel the rest, end the lifespan."""
        await self._tasks.aclose(grace)
        if self._lifespan is not None:
            await self._lifespan.stop(max(grace, 1.0))


class AsgiLeg(TaskLeg):
    """One call of the application."""

    __slots__ = ("_backend", "_body_read", "_start", "_trailers", "_trailers_due")

    def __init__(self, backend: AsgiBackend, tasks: Tasks, head_time: float) -> None:
        super().__init__(tasks, backend.name, head_time)
        self._backend = backend
        self._body_read = False
        self._start: tuple[int, Fields] | None = None  # held until the first of the body (ASGI HTTP, "Response Start")
        self._trailers: Fields = []
        self._trailers_due = False

    async def serve(self, head: RequestHead) -> None:
        await self._backend.app(_scope(head, self._backend), self._receive, self._send)

    def translate(self, error: Exception) -> TunnelError:
        logger.opt(exception=error).error("{} raised {}", self._backend.name, type(error).__name__)
        return TunnelError(ErrorCode.CONNECTION_TERMINATED, f"the application raised {type(error).__name__}")

    def peer_gone(self) -> None:
        task = self.task
        if task is not None and not task.done():
            timer = asyncio.get_running_loop().call_later(self._backend.leave_time, task.cancel)
            task.add_done_callback(lambda _: timer.cancel())

    async def _receive(self) -> Message:
        if self._body_read:
            await self.until_over()
            return {"type": "http.disconnect"}
        frame = await self.next_frame()
        if frame is None:
            return {"type": "http.disconnect"}
        if type(frame) is not Data:
            self._body_read = True
            return {"type": "http.request", "body": b"", "more_body": False}
        if self.ends_next():
            self._body_read = True
        return {"type": "http.request", "body": frame.data, "more_body": not self._body_read}

    async def _send(self, message: Message) -> None:
        if self.over:
            raise Disconnected("the visitor has left, or has its answer already")
        kind = message["type"]
        if kind == "http.response.start" and self._start is None:
            self._start = int(message["status"]), [(bytes(n).lower(), bytes(v)) for n, v in message.get("headers", ())]
            self._trailers_due = bool(message.get("trailers", False))
        elif kind == "http.response.body" and self._start is not None:
            await self._send_body(bytes(message.get("body", b"")), bool(message.get("more_body", False)))
        elif kind == "http.response.trailers" and self._trailers_due and self.head_sent:
            self._trailers += [(bytes(name).lower(), bytes(value)) for name, value in message.get("headers", ())]
            if not message.get("more_trailers", False):
                self.send_end(self._trailers)
        else:
            raise RuntimeError(f"the ASGI message {kind!r} is unknown or out of order")

    async def _send_body(self, body: bytes, more: bool) -> None:
        if not self.head_sent:
            assert self._start is not None
            self.send_head(*self._start)
        if body:
            await self.send_data(body)
        if not more and not self._trailers_due:
            self.send_end()


def _scope(head: RequestHead, backend: AsgiBackend) -> Scope:
    raw_path, _, query = head.target.partition(b"?")
    host = head.authority or backend.authority.encode("ascii")
    return {
        "type": "http",
        "asgi": dict(_ASGI),
        "http_version": "1.1",
        "method": head.method.decode("ascii", "replace"),
        "scheme": head.scheme.decode("ascii", "replace"),
        "path": backend.root_path + unquote_to_bytes(raw_path).decode("utf-8", "replace"),
        "raw_path": backend.root_path.encode() + raw_path,
        "query_string": query,
        "root_path": backend.root_path,
        "headers": [(b"host", host), *head.fields],
        "client": _client(head.fields),
        "server": _server(host, head.scheme),
        "state": backend.state.copy(),
        "extensions": {"http.response.trailers": {}},
    }


def _client(fields: Fields) -> tuple[str, int] | None:
    # The last one is the address that the tunnel's server saw itself; the ones before it are hearsay.
    addresses = members(fields, b"x-forwarded-for")
    if not addresses or addresses[-1] == b"unknown":
        return None
    return addresses[-1].decode("ascii", "replace"), 0


def _server(authority: bytes, scheme: bytes) -> tuple[str, int | None]:
    try:
        host, port = parse_host(authority)
    except ValueError:
        return authority.decode("latin-1"), None
    return host, port or _PORTS.get(scheme)


# Start and end


class _Lifespan:
    """The application's lifespan call: one task from start-up to shutdown (ASGI Lifespan 2.0)."""

    def __init__(self, app: Application, state: dict[str, Any], *, required: bool) -> None:
        self._app = app
        self._state = state
        self._required = required
        self._inbox: asyncio.Queue[Message] = asyncio.Queue()
        self._task: asyncio.Task[None] | None = None
        self._error: Exception | None = None
        self._answer = asyncio.Event()
        self._failure: str | None = None

    async def start(self, limit: float) -> None:
        """Raises ApplicationError."""
        task = self._task = asyncio.get_running_loop().create_task(self._run(), name="lifespan")  # ended by stop
        try:
            failure = await self._tell("lifespan.startup", limit)
        except TimeoutError:
            failure = f"it did not end within {limit:g} s"
        if failure is not None:
            await self._end()
            raise ApplicationError(f"the application's start-up failed: {failure}")
        if not task.done():
            return
        self._task = None
        if self._required:
            what = "returned" if self._error is None else f"raised {type(self._error).__name__}: {self._error}"
            raise ApplicationError(f"the application {what} when told of its start (lifespan)")
        if self._error is not None:
            logger.debug("the application does not know the lifespan protocol: {!r}", self._error)

    async def stop(self, limit: float) -> None:
        if self._task is None:
            return
        try:
            failure = await self._tell("lifespan.shutdown", limit)
        except TimeoutError:
            failure = f"it did not end within {limit:g} s"
        if failure is None and self._error is not None:
            failure = repr(self._error)
        if failure is not None:
            logger.error("the application's shutdown failed: {}", failure)
        await self._end()

    async def _tell(self, event: str, limit: float) -> str | None:
        """Send an event; why it failed, or None. Raises TimeoutError."""
        self._answer.clear()
        self._failure = None
        if self._task is None or self._task.done():
            return None
        self._inbox.put_nowait({"type": event})
        async with asyncio.timeout(limit):
            await self._answer.wait()
        return self._failure

    async def _end(self) -> None:
        task, self._task = self._task, None
        if task is not None:
            task.cancel()
            await asyncio.wait([task], timeout=1.0)

    async def _run(self) -> None:
        try:
            await self._app(
                {"type": "lifespan", "asgi": dict(_LIFESPAN_ASGI), "state": self._state}, self._receive, self._send
            )
        except Exception as error:
            self._error = error
        finally:
            self._answer.set()

    async def _receive(self) -> Message:
        return await self._inbox.get()

    async def _send(self, message: Message) -> None:
        kind = message["type"]
        if kind not in (
            "lifespan.startup.complete",
            "lifespan.startup.failed",
            "lifespan.shutdown.complete",
            "lifespan.shutdown.failed",
        ):
            raise RuntimeError(f"the ASGI message {kind!r} is unknown or out of order")
        if kind.endswith(".failed"):
            self._failure = str(message.get("message", "")) or "it did not say why"
        self._answer.set()
