"""The load test's HTTP/1.1 client: callbacks only, no task per request, a bounded number of connections.

A **shot** is one request on its way. It takes an idle connection, or waits in order while one is dialled; whichever
connection becomes free first takes the shot that has waited longest. Nothing is sent twice: what a server does to a
connection that was kept alive is a failure like any other, counted under a name of its own.
"""

import asyncio
import re
import ssl
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from errno import EADDRNOTAVAIL, EMFILE, ENFILE
from typing import Final, cast

import httptools

from quictunnel.load.figures import Tally
from quictunnel.load.plan import Request, Target

__all__ = ["Connections", "Shot"]

# Kinds of failure; ``status`` gives those of complete answers.
CONNECTION_REFUSED: Final = "connection_refused"
CONNECTION_TIMEOUT: Final = "connection_timeout"
CONNECTION_FAILED: Final = "connection_failed"
TLS_ERROR: Final = "tls_error"
TOO_MANY_FILES: Final = "too_many_open_files"
NO_LOCAL_PORT: Final = "no_local_port"
NO_CONNECTION_FREE: Final = "no_connection_free"
CLOSED: Final = "closed_before_answer"
CLOSED_REUSED: Final = "closed_before_answer_on_reused_connection"
INCOMPLETE: Final = "incomplete_answer"
PROTOCOL_ERROR: Final = "protocol_error"
TIMEOUT: Final = "response_timeout"
TIMEOUT_IN_BODY: Final = "timeout_in_body"

PARSER_LIMIT: Final = 1 << 18
"bytes that the parser may take without telling of anything: a head line or chunk line longer than this is an attack"

# Servers close what idles, most of them after 5 s or more; not to be surprised by that is the client's part.
IDLE_LIMIT: Final = 4.0

CLOSE_LIMIT: Final = 5.0
"seconds that the sockets' own endings may take"

_QUOTED: Final = re.compile(rb'"(?:[^"\\]|\\.)*"')
_PROXY_ERROR: Final = re.compile(rb";\s*error\s*=\s*([a-z][a-z0-9_]{0,39})")  # RFC 9209 section 2.1.1

# What a closed connection holds in place of its parser, which would hold the connection.
_SPENT: Final = httptools.HttpResponseParser(object())


class Shot:
    """One request on its way."""

    __slots__ = ("connection", "due", "left", "tally")

    def __init__(self, due: float, tally: Tally) -> None:
        self.due = due
        "its scheduled time"

        self.tally = tally
        self.left = False
        "whether a connection was there for it, or was dialled for it"

        self.connection: Connection | None = None


class Connection(asyncio.Protocol):
    """One connection: sends a request, reads its answer, gives itself back."""

    __slots__ = (
        "_answered",
        "_framed",
        "_keep",
        "_offset",
        "_parser",
        "_paused",
        "_pool",
        "_proxy_status",
        "_reused",
        "_silent",
        "_status",
        "idle_since",
        "shot",
        "transport",
    )

    def __init__(self, pool: "Connections") -> None:
        self._pool = pool
        self._parser = httptools.HttpResponseParser(self)
        self._paused = False
        self._reused = False
        self.transport: asyncio.Transport | None = None
        self.idle_since = 0.0
        self.shot: Shot | None = None
        self._prepare()

    def _prepare(self) -> None:
        self._offset = 0
        self._silent = 0  # bytes since the parser last told of something; anything but 0 once there were any
        self._status = 0
        "of the final answer, once its head is complete"

        self._framed = False
        self._proxy_status = b""
        self._answered = False
        self._keep = False

    # The pool's side

    def start(self, shot: Shot) -> None:
        """Send the request; the connection must be free."""
        assert self.transport is not None
        self._prepare()
        self.shot = shot
        shot.connection = self
        request = self._pool.request
        if request.size <= len(request.body):
            self._offset = len(request.block(0))
            self.transport.write(request.head + request.block(0))
        else:
            self.transport.write(request.head)
        if self._offset < request.size:
            self._upload()

    def expire(self) -> None:
        """The answer has not come in time."""
        self._fail(TIMEOUT_IN_BODY if self._status else TIMEOUT)

    def close(self) -> None:
        """Close at once; connection_lost follows."""
        self._pool.forget(self)
        if self.transport is not None:
            self.transport.abort()

    def _upload(self) -> None:
        request = self._pool.request
        while self.shot is not None and not self._paused and self._offset < request.size:
            block = request.block(self._offset)
            self._offset += len(block)
            cast(asyncio.Transport, self.transport).write(block)

    def _fail(self, kind: str) -> None:
        shot, self.shot = self.shot, None
        if shot is not None:
            self._pool.failed(shot, kind)
        self.close()

    def _finish(self) -> None:
        shot, self.shot = cast(Shot, self.shot), None
        self._pool.answered(shot, self._status, self._proxy_status)
        if not self._keep or self._offset < self._pool.request.size:
            self.close()
            return
        if self._pool.request.is_head:  # the parser waits for a body that never comes
            self._parser = httptools.HttpResponseParser(self)
        self._reused = True
        self._pool.release(self)

    # asyncio's side

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        self._pool.open.add(self)

    def data_received(self, data: bytes) -> None:
        if self.shot is None:
            self.close()  # nobody asked
            return
        self._silent += len(data)
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade):  # the second is not one of the first
            self._keep = False
            if not self._answered:
                self._fail(PROTOCOL_ERROR)
                return
        if self._answered:
            self._finish()
        elif self._silent > PARSER_LIMIT:
            self._fail(PROTOCOL_ERROR)

    def eof_received(self) -> None:
        shot = self.shot
        if shot is None:
            return
        # RFC 9112 section 6.3: without a length the answer ends where the connection does.
        if self._status and not self._framed:
            self._finish()
        else:
            self._fail(self._cut())

    def connection_lost(self, exc: Exception | None) -> None:
        self.transport = None
        self._parser = _SPENT
        self._pool.open.discard(self)
        if self.shot is not None:
            self._fail(TLS_ERROR if isinstance(exc, ssl.SSLError) else self._cut())
        self._pool.lost(self)

    def pause_writing(self) -> None:
        self._paused = True

    def resume_writing(self) -> None:
        self._paused = False
        self._upload()

    def _cut(self) -> str:
        if self._status or self._silent:
            return INCOMPLETE
        return CLOSED_REUSED if self._reused else CLOSED

    # httptools' side

    def on_message_begin(self) -> None:
        if self._answered:
            self._keep = False  # a second answer to one request
            raise ValueError

    def on_header(self, name: bytes, value: bytes) -> None:
        self._silent = 1
        if self._status:
            return  # a trailer
        key = name.lower()
        if key in (b"content-length", b"transfer-encoding"):
            self._framed = True
        elif key == b"proxy-status":
            self._proxy_status = value[:1024]

    def on_headers_complete(self) -> None:
        self._silent = 1
        status = self._parser.get_status_code()
        if status < 200:  # RFC 9110 section 15.2: one or more of these may come before the answer
            self._framed = False
            self._proxy_status = b""
            return
        self._status = status
        if self._pool.request.is_head:
            self._keep = self._parser.should_keep_alive()
            self._answered = True

    def on_body(self, body: bytes) -> None:
        self._silent = 1
        if self._pool.request.is_head:
            self._keep = False
        elif self.shot is not None:
            self.shot.tally.received += len(body)

    def on_chunk_complete(self) -> None:
        self._silent = 1

    def on_message_complete(self) -> None:
        if self._status:
            self._answered = True
            self._keep = self._parser.should_keep_alive()  # the parser forgets it with the message


class Connections:
    """All connections to one target, never more than ``limit`` open or being dialled.

    Requests that wait for a connection are bounded by what is scheduled within ``timeout`` seconds, for then they have
    failed. ``addresses`` are (host, port) in numbers; ``clock`` gives monotonic seconds.
    """

    def __init__(
        self,
        target: Target,
        addresses: Sequence[tuple[str, int]],
        request: Request,
        *,
        context: ssl.SSLContext | None,
        limit: int,
        timeout: float,
        clock: Callable[[], float],
    ) -> None:
        self.request = request
        self.open: set[Connection] = set()
        self._target = target
        self._addresses = list(addresses)
        self._context = context
        self._limit = limit
        self._timeout = timeout
        self._clock = clock
        self._loop = asyncio.get_running_loop()
        self._idle: dict[Connection, None] = {}  # the one used last is last
        self._waiting: deque[Shot] = deque()
        self._flying: dict[Shot, None] = {}  # in the order they are due
        self._dialling = 0
        self._dials: set[asyncio.Task[None]] = set()
        self._quiet: asyncio.Future[None] | None = None
        self._gone: asyncio.Future[None] | None = None
        self._closing = False

    # Shots

    def send(self, shot: Shot) -> None:
        """Send now, or as soon as there is a connection; shots come in the order they are due."""
        self._flying[shot] = None
        connection = self._fresh()
        if connection is not None:
            self._launch(connection, shot)
            return
        self._waiting.append(shot)
        if self._top_up():
            self._mark_left(shot)

    def expire(self, now: float) -> None:
        """Fail what was due ``timeout`` seconds before ``now``; to be called every now and then."""
        while self._flying:
            shot = next(iter(self._flying))
            if shot.due + self._timeout > now:
                return
            if shot.connection is not None:
                shot.connection.expire()
                continue
            # Both lists are in the order of due times: of those waiting, this one is the first.
            self._waiting.popleft()
            self.failed(shot, CONNECTION_TIMEOUT if shot.left else NO_CONNECTION_FREE)

    async def drained(self) -> None:
        """Wait until no request is on its way; ``expire`` bounds the time."""
        if self._flying:
            self._quiet = self._loop.create_future()
            await self._quiet

    async def close(self) -> None:
        """Give up what is under way and close every connection."""
        self._closing = True
        for dial in self._dials:
            dial.cancel()
        await asyncio.gather(*self._dials, return_exceptions=True)
        for connection in tuple(self.open):
            connection.close()
        if self.open:
            self._gone = self._loop.create_future()
            with suppress(TimeoutError):
                async with asyncio.timeout(CLOSE_LIMIT):
                    await self._gone

    # What connections tell

    def answered(self, shot: Shot, status: int, proxy_status: bytes) -> None:
        """A complete answer came."""
        if 200 <= status < 400:
            shot.tally.succeed(self._clock() - shot.due)
        else:
            shot.tally.fail(status_kind(status, proxy_status))
        self._end(shot)

    def failed(self, shot: Shot, kind: str) -> None:
        """No complete answer will come."""
        if not shot.left:
            self._mark_left(shot)
        shot.tally.fail(kind)
        self._end(shot)

    def release(self, connection: Connection) -> None:
        """A connection is free."""
        if self._closing:
            connection.close()
        elif self._waiting:
            self._launch(connection, self._waiting.popleft())
        else:
            connection.idle_since = self._clock()
            self._idle[connection] = None

    def forget(self, connection: Connection) -> None:
        """A connection is about to close."""
        self._idle.pop(connection, None)

    def lost(self, connection: Connection) -> None:
        """A connection is closed."""
        self.forget(connection)
        self._top_up()
        if not self.open and self._gone is not None and not self._gone.done():
            self._gone.set_result(None)

    def _launch(self, connection: Connection, shot: Shot) -> None:
        if not shot.left:
            self._mark_left(shot)
        connection.start(shot)

    def _mark_left(self, shot: Shot) -> None:
        shot.left = True
        shot.tally.left(self._clock() - shot.due)

    def _end(self, shot: Shot) -> None:
        del self._flying[shot]
        if not self._flying and self._quiet is not None and not self._quiet.done():
            self._quiet.set_result(None)

    def _fresh(self) -> Connection | None:
        """The free connection that was used last, unless it has idled for too long: then all the others have too."""
        while self._idle:
            connection, _ = self._idle.popitem()
            if self._clock() - connection.idle_since < IDLE_LIMIT:
                return connection
            connection.close()
        return None

    # Dialling

    def _top_up(self) -> bool:
        """Dial for those who wait, within the limit; whether every one of them has its dial."""
        while self._dialling < len(self._waiting) and not self._closing:
            if self._dialling + len(self.open) >= self._limit:
                return False
            self._dialling += 1
            dial = self._loop.create_task(self._dial())
            self._dials.add(dial)  # close() awaits them
            dial.add_done_callback(self._dials.discard)
        return True

    async def _dial(self) -> None:
        kind = ""
        connection = None
        try:
            async with asyncio.timeout(self._timeout):
                connection = await self._connect()
        except OSError as error:  # TimeoutError and SSLError are OSErrors too
            kind = connection_kind(error)
        finally:
            self._dialling -= 1
        if connection is not None and connection.transport is not None:
            self.release(connection)
        elif self._waiting:
            self.failed(self._waiting.popleft(), kind or CLOSED)
        self._top_up()

    async def _connect(self) -> Connection:
        """A connection to the first address that takes one; the next dial begins there."""
        failure = OSError("the host has no address")
        for host, port in tuple(self._addresses):
            try:
                _, connection = await self._loop.create_connection(
                    lambda: Connection(self),
                    host,
                    port,
                    ssl=self._context,
                    server_hostname=self._target.host if self._context else None,
                )
            except ssl.SSLError:
                raise
            except OSError as error:
                failure = error
            else:
                if self._addresses[0] != (host, port):
                    self._addresses.remove((host, port))
                    self._addresses.insert(0, (host, port))
                return connection
        raise failure


def status_kind(status: int, proxy_status: bytes = b"") -> str:
    """``status_503``, with the error of a Proxy-Status field (RFC 9209): ``status_503 destination_unavailable``."""
    found = _PROXY_ERROR.search(_QUOTED.sub(b'""', proxy_status))
    return f"status_{status} {found[1].decode('ascii')}" if found else f"status_{status}"


def connection_kind(error: OSError) -> str:
    """The kind of a dial's failure."""
    if isinstance(error, ssl.SSLError):
        return TLS_ERROR
    if isinstance(error, TimeoutError):
        return CONNECTION_TIMEOUT
    if isinstance(error, ConnectionRefusedError):
        return CONNECTION_REFUSED
    if error.errno in (EMFILE, ENFILE):
        return TOO_MANY_FILES
    return NO_LOCAL_PORT if error.errno == EADDRNOTAVAIL else CONNECTION_FAILED
