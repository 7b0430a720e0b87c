"""A leg that must await: one owned task for each exchange, with back-pressure between it and the frames.

The task takes the request by ``next_frame`` and answers by ``send_head``, ``send_data`` and ``send_end``. What passes
is checked in both directions as if a stranger had sent it: neither side's framing is taken on trust.
"""

import asyncio
import re
from collections import deque
from typing import Final

from loguru import logger

from quictunnel.backends.tasks import Tasks
from quictunnel.exchange import Leg
from quictunnel.wire.errors import ErrorCode, TunnelError
from quictunnel.wire.fields import check_fields, content_length, end_to_end, is_token, without_upgrade
from quictunnel.wire.frames import Data, End, Fields, Frame, RequestHead, ResponseHead

__all__ = ["TaskLeg"]

# Bytes of a request's body that may wait for the task before the peer is paused.
_INBOX_LIMIT: Final = 64 * 1024
# Bytes of an answer's body handed over at a time: in between the peer may say that it has enough.
_PIECE: Final = 256 * 1024
_END: Final = End()
_NOT_PLAIN: Final = re.compile(rb"[\x00-\x20\x7f]")


class TaskLeg(Leg):
    """One exchange that a task serves. A subclass says how: ``serve``."""

    __slots__ = (
        "_expects",
        "_gone",
        "_head_time",
        "_inbox",
        "_inbox_left",
        "_inbox_size",
        "_is_head",
        "_left",
        "_name",
        "_paused",
        "_peer_paused",
        "_since",
        "_taken",
        "_tasks",
        "_timer",
        "_waiters",
        "_waiting",
        "head_sent",
        "over",
        "task",
    )

    def __init__(self, tasks: Tasks, name: str, head_time: float) -> None:
        """``head_time``: seconds that the task has for the answer's head; waiting for the visitor does not count."""
        super().__init__()
        self._tasks = tasks
        self._name = name
        self._head_time = head_time
        self.task: asyncio.Task[None] | None = None
        self.over = False
        "the answer is complete, or one of the two sides is gone"
        self._gone = False  # the visitor left or got tired of waiting

        # the request
        self._inbox: deque[Data | End] = deque()
        self._inbox_size = 0
        self._peer_paused = False
        self._taken = False  # all of it has come
        self._inbox_left: int | None = None  # bytes of body still due, None if no length was announced
        self._expects = False  # the visitor waits for a 100 before it sends the body

        # the answer
        self.head_sent = False
        self._is_head = False
        self._left: int | None = None  # bytes of body still due, None if no length was announced
        self._paused = False

        # waiting
        self._waiters: list[asyncio.Future[None]] = []
        self._waiting = False  # for the visitor
        self._since = 0.0  # when it was the task's turn
        self._timer: asyncio.TimerHandle | None = None

    # What a subclass says

    async def serve(self, head: RequestHead) -> None:
        """Answer. A TunnelError is passed to the peer; any other error goes through ``translate``."""
        raise NotImplementedError

    def translate(self, error: Exception) -> TunnelError:
        """What an error of ``serve`` means to the visitor."""
        raise NotImplementedError

    def peer_gone(self) -> None:
        """The visitor is gone, or waited long enough: see that the task ends."""
        raise NotImplementedError

    # The four verbs

    def receive(self, frame: Frame) -> None:
        if self.over:
            return
        if type(frame) is RequestHead:
            self._begin(frame)
        elif self._taken:
            return
        elif type(frame) is Data:
            self._take(frame, len(frame.data))
        elif type(frame) is End:
            if self._inbox_left:
                self._refuse("its body is shorter than its content-length")
                return
            self._taken = True
            self._inbox.append(frame)
            self._wake()

    def pause(self) -> None:
        self._paused = True

    def resume(self) -> None:
        self._paused = False
        self._wake()

    def abort(self, error: TunnelError) -> None:
        if not self.over:
            self._gone = True
            self._leave()
            self.peer_gone()

    # What the task calls: the request

    async def next_frame(self) -> Data | End | None:
        """The next part of the request; None once the exchange is over. Nothing may follow an End."""
        while not self._inbox:
            if self.over:
                return None
            if self._expects and not self.head_sent:
                # Whoever asks for the body is who the visitor waits for (RFC 9110 section 10.1.1).
                self._expects = False
                self.peer.receive(ResponseHead(100, []))
                continue
            self._waiting = True
            await self._wait()
            self._waiting = False
            self._since = asyncio.get_running_loop().time()
        self._expects = False
        frame = self._inbox.popleft()
        if type(frame) is Data:
            self._inbox_size -= len(frame.data)
            if self._peer_paused and self._inbox_size < _INBOX_LIMIT // 2:
                self._peer_paused = False
                self.peer.resume()
        return frame

    def ends_next(self) -> bool:
        """Whether the End of the request is all that is left of it."""
        return bool(self._inbox) and type(self._inbox[0]) is End

    async def until_over(self) -> None:
        """Wait for the end of the exchange."""
        while not self.over:
            await self._wait()

    # What the task calls: the answer

    def send_head(self, status: int, fields: Fields) -> None:
        """Hand over the final head; names in lower case. Raises TunnelError for what no answer may hold."""
        if self.over:
            return
        kept = end_to_end(fields)
        try:
            check_fields(kept)
            self._left = content_length(kept)
        except ValueError as error:
            raise self._wrong(str(error)) from None
        if not 200 <= status <= 999:
            raise self._wrong(f"{status} is no final status")
        if status == 204:
            kept = [field for field in kept if field[0] != b"content-length"]
        elif status == 426:
            # RFC 9110 section 15.5.22: it must say to what.
            kept += [field for field in fields if field[0] == b"upgrade"]
        if self._is_head or status in (204, 304):
            self._left = 0
            self._is_head = True
        self.head_sent = True
        self._stop_timer()
        self.peer.receive(ResponseHead(status, kept))

    async def send_data(self, data: bytes) -> None:
        """Hand over some of the body as the peer can take it. Raises TunnelError for more than was announced."""
        if self._is_head:
            return
        if self._left is not None:
            self._left -= len(data)
            if self._left < 0:
                raise self._wrong("the body is longer than its content-length")
        for start in range(0, len(data), _PIECE):
            while self._paused and not self.over:
                await self._wait()
            if self.over:
                return
            self.peer.receive(Data(data if len(data) <= _PIECE else data[start : start + _PIECE]))

    def send_end(self, trailers: Fields | None = None) -> None:
        """The answer is complete. Raises TunnelError for less than was announced or for what no trailer may hold."""
        if self.over:
            return
        if self._left:
            raise self._wrong("the body is shorter than its content-length")
        kept = end_to_end(trailers or [])
        try:
            check_fields(kept)
        except ValueError as error:
            raise self._wrong(str(error)) from None
        self._leave().receive(End(kept) if kept else _END)

    # The acts

    def _begin(self, head: RequestHead) -> None:
        if self._tasks.closing:
            self._fail(TunnelError(ErrorCode.NOT_ACCEPTED))
            return
        try:
            head = without_upgrade(head, self._name)
        except TunnelError as error:
            self._fail(error)
            return
        if (wrong := self._check(head)) is not None:
            self._refuse(wrong)
            return
        if not head.body:
            self._taken = True
            self._inbox.append(_END)
        self._is_head = head.method == b"HEAD"
        self._expects = head.body and (b"expect", b"100-continue") in [(name, v.lower()) for name, v in head.fields]
        loop = asyncio.get_running_loop()
        self._since = loop.time()
        self._timer = loop.call_later(self._head_time, self._look)
        self.task = self._tasks.start(self._run(head), "exchange")
        self.task.add_done_callback(self._finished)

    def _check(self, head: RequestHead) -> str | None:
        if not is_token(head.method):
            return "its method is not a token"
        if _NOT_PLAIN.search(head.target + head.authority) is not None:
            return "its target or host holds what no request may hold"
        try:
            check_fields(head.fields)
            length = content_length(head.fields)
        except ValueError as error:
            return str(error)
        if length and not head.body:
            return "it announces a body and has none"
        self._inbox_left = length
        return None

    def _take(self, frame: Data, size: int) -> None:
        if self._inbox_left is not None:
            self._inbox_left -= size
            if self._inbox_left < 0:
                self._refuse("its body is longer than its content-length")
                return
        self._inbox.append(frame)
        self._inbox_size += size
        if self._inbox_size >= _INBOX_LIMIT and not self._peer_paused:
            self._peer_paused = True
            self.peer.pause()
        self._wake()

    def _refuse(self, what: str) -> None:
        self._gone = True
        self._fail(TunnelError(ErrorCode.BAD_REQUEST, f"the request is malformed: {what}"))
        self.peer_gone()

    async def _run(self, head: RequestHead) -> None:
        try:
            await self.serve(head)
        except TunnelError as error:
            self._fail(error)
        except Exception as error:
            if not self.over:
                self._fail(self.translate(error))
            elif self._gone:
                logger.debug("{}: {!r} after the visitor had left", self._name, error)
            else:
                logger.opt(exception=error).error("{} failed after its answer", self._name)

    def _finished(self, task: "asyncio.Task[None]") -> None:
        if task.cancelled():
            self._fail(TunnelError(ErrorCode.CONNECTION_TERMINATED, "the client is leaving"))
        else:
            self._fail(TunnelError(ErrorCode.CONNECTION_TERMINATED, "the backend ended without ending its answer"))

    def _fail(self, error: TunnelError) -> None:
        if not self.over:
            self._leave().abort(error)

    def _look(self) -> None:
        """Is the answer's head late? A task that waits for the visitor's body is not to blame."""
        if self.over or self.head_sent:
            return
        loop = asyncio.get_running_loop()
        left = self._head_time if self._waiting else self._since + self._head_time - loop.time()
        if left > 0:
            self._timer = loop.call_later(left, self._look)
            return
        what = f"the backend did not answer within {self._head_time:g} s"
        self._gone = True
        self._fail(TunnelError(ErrorCode.HTTP_RESPONSE_TIMEOUT, what))
        self.peer_gone()

    def _leave(self) -> Leg:
        peer = self.peer
        self.over = True
        self._inbox.clear()
        self._stop_timer()
        self.detach()
        self._wake()
        return peer

    async def _wait(self) -> None:
        # More than one at a time: an application may listen in one task and answer in another.
        waiter = asyncio.get_running_loop().create_future()
        self._waiters.append(waiter)
        await waiter

    def _wake(self) -> None:
        waiters, self._waiters = self._waiters, []
        for waiter in waiters:
            if not waiter.done():
                waiter.set_result(None)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _wrong(self, what: str) -> TunnelError:
        return TunnelError(ErrorCode.HTTP_PROTOCOL_ERROR, f"the backend broke HTTP: {what}")
