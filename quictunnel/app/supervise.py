"""A parent and its child processes: it forks them, replaces those that die, and passes signals on.

The parent has neither event loop nor thread, so a fork copies nothing that is half done, and a replacement is there
within milliseconds: all modules are loaded already. Each child makes its own event loop. What is between the two:

- a pipe of each child's for messages (a JSON object a line: that it is ready, why it cannot go on, measurements);
- one pipe in which nothing is ever written: its end tells the children that the parent is gone;
- signals: SIGTERM and SIGINT of the parent are SIGTERM to the children, a second one is SIGKILL, SIGHUP is passed on.
  A child does not mind SIGINT, because Ctrl-C in a terminal is for the whole process group: the parent has it too.
"""

import json
import os
import selectors
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from math import inf
from types import FrameType
from typing import Any, Final, NoReturn

from loguru import logger

from quictunnel.failures import CommandError, reason
from quictunnel.trust.files import TrustError

__all__ = ["Hopeless", "Parent", "Supervisor", "one_of_many"]

FIRST_RETRY: Final = 0.1
LONGEST_RETRY: Final = 10.0
"seconds until a child that died is replaced; a child that lived longer than the longest begins anew with the first"

MESSAGE_LIMIT: Final = 4096
"bytes of one message: a pipe takes so many as one piece or not at all (PIPE_BUF of Linux)"

_READ_SIZE: Final = 65536

_SIGNALS: Final = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGCHLD)

Message = dict[str, Any]


class Hopeless(CommandError):
    """No child can do the work, now or later: the whole is to end."""


class Parent:
    """The parent, as a child sees it."""

    def __init__(self, messages: int, life: int) -> None:
        self._messages = messages
        self.life = life
        "a descriptor that becomes readable when the parent is gone"

    def tell(self, kind: str, **facts: Any) -> bool:
        """Send a message; False if it is lost, because the parent is gone or does not read."""
        data = json.dumps({"kind": kind, **facts}).encode() + b"\n"
        if len(data) > MESSAGE_LIMIT:
            raise ValueError(f"a message of {len(data)} bytes: {kind}")
        try:
            os.write(self._messages, data)
        except (BlockingIOError, BrokenPipeError):
            return False
        return True

    def is_ready(self, **facts: Any) -> None:
        """This child does its work from now on."""
        self.tell("ready", **facts)

    def give_up(self, text: str) -> None:
        """No child can do this work: the whole is to end, with this text for the user."""
        self.tell("failed", text=text[: MESSAGE_LIMIT // 8])

    def leave(self) -> None:
        """This child ends soon and is not to be replaced: another process has taken its work over."""
        self.tell("leaving")


class _Child:
    """One running process."""

    def __init__(self, index: int, pid: int, messages: int, now: float) -> None:
        self.index = index
        self.pid = pid
        self.messages = messages
        self.since = now
        self.leaves = False
        "was told to end, or said that it will: it is not replaced"
        self.kill_at = inf
        self.unread = b""


class Supervisor:
    """Keeps children running; each has an index, which its replacement inherits."""

    def __init__(
        self,
        main: Callable[[int, Parent], int],
        *,
        word: str,
        on_message: Callable[[int, Message], None] = lambda index, message: None,
        on_tick: Callable[[], None] | None = None,
        tick: float = 0.5,
        on_hangup: Callable[[], None] = lambda: None,
        on_stop: Callable[[], None] = lambda: None,
        stop_time: float = 60.0,
    ) -> None:
        """``main`` is called in each child and returns its exit status; ``word`` is what logs call a child.

        ``on_tick`` is called every ``tick`` seconds, ``on_hangup`` at SIGHUP, ``on_stop`` once when all children are
        about to be told to end. A child that has not ended ``stop_time`` seconds after it was told is killed.
        """
        self._main = main
        self._word = word
        self._on_message = on_message
        self._on_tick = on_tick
        self._tick = tick
        self._next_tick = time.monotonic() + tick
        self._on_hangup = on_hangup
        self._on_stop = on_stop
        self._stop_time = stop_time
        self._children: dict[int, _Child] = {}  # by pid
        self._due: dict[int, float] = {}  # when an index is to be started again
        self._delays: dict[int, float] = {}
        self._failure = ""
        self._hung_up = False
        self._killed_by: int = 0
        self.stopping = False
        self._selector = selectors.DefaultSelector()
        self._life = os.pipe()
        self._woken, self._waker = socket.socketpair()
        self._woken.setblocking(False)
        self._waker.setblocking(False)
        self._selector.register(self._woken, selectors.EVENT_READ)

    # What its owner asks

    @property
    def indices(self) -> list[int]:
        """Of the children that are to run, the oldest first; not those that have been told to end."""
        running = [child.index for child in self._children.values() if not child.leaves]
        return running + list(self._due)

    def pid(self, index: int) -> int:
        """The process that runs under an index, 0 if none does now."""
        return next((each.pid for each in self._children.values() if each.index == index and not each.leaves), 0)

    def start(self, index: int) -> None:
        """Start a child that is replaced whenever it dies."""
        self._due[index] = time.monotonic()

    def stop(self, index: int) -> None:
        """Tell a child to finish what it does and end."""
        self._due.pop(index, None)
        for child in self._children.values():
            if child.index == index:
                self._tell_to_end(child)

    def run(self) -> int:
        """Until the last child has ended; the exit status. Raises CommandError with what a child gave up for."""
        try:
            with self._signals():
                self._start_due()
                while self._children or self._due:
                    self._wait()
        finally:
            self._close()
        if self._killed_by:
            # As a process without children would have ended.
            signal.signal(self._killed_by, signal.SIG_DFL)
            os.kill(os.getpid(), self._killed_by)
        if self._failure:
            raise CommandError(self._failure)
        return 0

    # Time and signals

    @contextmanager
    def _signals(self) -> Iterator[None]:
        before = {number: signal.signal(number, _noticed) for number in _SIGNALS}
        wakeup = signal.set_wakeup_fd(self._waker.fileno(), warn_on_full_buffer=False)
        try:
            yield
        finally:
            signal.set_wakeup_fd(wakeup)
            for number, handler in before.items():
                signal.signal(number, handler)

    def _wait(self) -> None:
        now = time.monotonic()
        moments = [*self._due.values(), *(each.kill_at for each in self._children.values() if each.kill_at < inf)]
        if self._on_tick is not None:
            moments.append(self._next_tick)
        timeout = max(0.0, min(moments) - now) if moments else None
        for key, _ in self._selector.select(timeout):
            if key.data is None:
                self._signalled()
            else:
                self._read(key.data)
        self._reap()
        self._kill_late()
        self._start_due()
        if self._on_tick is not None and time.monotonic() >= self._next_tick:
            self._next_tick = time.monotonic() + self._tick
            if not self.stopping:
                self._on_tick()

    def _signalled(self) -> None:
        with suppress(BlockingIOError):
            for number in self._woken.recv(_READ_SIZE):
                if number == signal.SIGHUP:
                    self._hung_up = True
                    self._on_hangup()
                    self._signal_all(signal.SIGHUP)
                elif number in (signal.SIGTERM, signal.SIGINT):
                    if self.stopping:
                        self._killed_by = number
                        self._signal_all(signal.SIGKILL)
                    else:
                        self._stop_all()

    def _stop_all(self) -> None:
        self.stopping = True
        self._due.clear()
        self._on_stop()
        for child in self._children.values():
            self._tell_to_end(child)

    def _tell_to_end(self, child: _Child) -> None:
        if child.kill_at == inf:
            child.leaves = True
            child.kill_at = time.monotonic() + self._stop_time
            with suppress(ProcessLookupError):
                os.kill(child.pid, signal.SIGTERM)

    def _signal_all(self, number: int) -> None:
        for child in self._children.values():
            with suppress(ProcessLookupError):
                os.kill(child.pid, number)

    # Birth and death

    def _start_due(self) -> None:
        now = time.monotonic()
        for index in [index for index, at in self._due.items() if at <= now]:
            del self._due[index]
            self._fork(index, now)

    def _fork(self, index: int, now: float) -> None:
        reading, writing = os.pipe()
        os.set_blocking(reading, False)
        os.set_blocking(writing, False)
        sys.stdout.flush()
        sys.stderr.flush()
        # A signal between the fork and the child's own handlers would be written into the parent's socket.
        signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
        pid = os.fork()
        if pid == 0:
            self._become_child(index, reading, writing)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
        os.close(writing)
        child = _Child(index, pid, reading, now)
        self._children[pid] = child
        self._selector.register(reading, selectors.EVENT_READ, child)

    def _become_child(self, index: int, reading: int, writing: int) -> NoReturn:
        status = 1
        try:
            signal.set_wakeup_fd(-1)
            for number in (signal.SIGTERM, signal.SIGCHLD):
                signal.signal(number, signal.SIG_DFL)
            for number in (signal.SIGINT, signal.SIGHUP):
                # Not SIG_IGN, which programs that the child starts would inherit.
                signal.signal(number, _noticed)
            os.close(reading)
            os.close(self._life[1])
            for child in self._children.values():
                if child.messages >= 0:
                    os.close(child.messages)
            self._selector.close()
            self._woken.close()
            self._waker.close()
            logger.configure(extra={self._word: index})
            signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
            parent = Parent(writing, self._life[0])
            try:
                status = self._main(index, parent)
            except (CommandError, TrustError) as error:
                parent.give_up(str(error))
            except OSError as error:
                parent.give_up(reason(error))
        except SystemExit as way_out:
            status = way_out.code if isinstance(way_out.code, int) else 1
        except BaseException as error:
            logger.opt(exception=error).error("{!r}", error)
        finally:
            with suppress(Exception):
                sys.stdout.flush()
                sys.stderr.flush()
            os._exit(status)  # what the parent would still do at its end is not the child's

    def _reap(self) -> None:
        for child in list(self._children.values()):
            try:
                pid, status = os.waitpid(child.pid, os.WNOHANG)
            except ChildProcessError:
                pid, status = child.pid, 0  # somebody else has waited for it
            if pid:
                self._ended(child, status)

    def _kill_late(self) -> None:
        now = time.monotonic()
        for child in self._children.values():
            if child.kill_at <= now:
                child.kill_at = now + LONGEST_RETRY  # asked again, should it ever be needed
                logger.warning("{} {} (process {}) does not end: it is killed", self._word, child.index, child.pid)
                with suppress(ProcessLookupError):
                    os.kill(child.pid, signal.SIGKILL)

    def _ended(self, child: _Child, status: int) -> None:
        self._read(child)  # its last words
        if child.messages >= 0:
            self._drop_pipe(child)
        del self._children[child.pid]
        if child.leaves or self.stopping:
            return
        now = time.monotonic()
        delay = self._delays.get(child.index, FIRST_RETRY) if now - child.since < LONGEST_RETRY else FIRST_RETRY
        self._delays[child.index] = min(2 * delay, LONGEST_RETRY)
        self._due[child.index] = now + delay
        logger.warning(
            "{} {} (process {}) {}: another is started in {:g} s",
            self._word, child.index, child.pid, _how_it_ended(status), delay,
        )  # fmt: skip

    # Messages

    def _read(self, child: _Child) -> None:
        if child.messages < 0:
            return
        try:
            data = os.read(child.messages, _READ_SIZE)
        except BlockingIOError:
            return
        if not data:
            self._drop_pipe(child)
            return
        *lines, child.unread = (child.unread + data).split(b"\n")
        if len(child.unread) > MESSAGE_LIMIT:
            child.unread = b""
        for line in lines:
            try:
                message = json.loads(line)
                kind = message["kind"]
            except (ValueError, TypeError, KeyError):
                # A library of an application's may have written into a descriptor that is not its own.
                logger.warning("{} {} says what is no message", self._word, child.index)
                continue
            self._message(child, kind, message)

    def _message(self, child: _Child, kind: object, message: Message) -> None:
        if kind == "failed":
            self._failure = self._failure or str(message.get("text"))
            child.leaves = True
            if not self.stopping:
                self._stop_all()
        elif kind == "leaving":
            child.leaves = True
        else:
            if kind == "ready" and self._hung_up:
                # What it was born with may be older than what the others have read since.
                with suppress(ProcessLookupError):
                    os.kill(child.pid, signal.SIGHUP)
            if not self.stopping:
                self._on_message(child.index, message)

    def _drop_pipe(self, child: _Child) -> None:
        self._selector.unregister(child.messages)
        os.close(child.messages)
        child.messages = -1

    def _close(self) -> None:
        self._selector.close()
        self._woken.close()
        self._waker.close()
        for descriptor in self._life:
            os.close(descriptor)


def one_of_many(work: Callable[[], int], *, others_work: bool) -> int:
    """Do a child's work; if it cannot begin and others do theirs, it is to try again, and the whole goes on.

    A file that cannot be read just now, or an application that does not load since it was changed, is no reason for
    the others to end. Raises what ``work`` does, but then only Hopeless.
    """
    try:
        return work()
    except Hopeless:
        raise
    except (CommandError, TrustError, OSError) as error:
        if not others_work:
            raise
        logger.error("cannot start: {}", reason(error) if isinstance(error, OSError) else error)
        return 1


def _how_it_ended(status: int) -> str:
    code = os.waitstatus_to_exitcode(status)
    if code >= 0:
        return f"ended with status {code}"
    try:
        return f"was killed by {signal.Signals(-code).name}"
    except ValueError:
        return f"was killed by signal {-code}"


def _noticed(number: int, frame: FrameType | None) -> None:
    """A signal's handler that does nothing: whoever waits is woken by its number in a socket."""
