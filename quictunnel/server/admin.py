"""The owner's door: a unix socket in the state directory, by which a running server is asked and told.

Each process of a server has its own, ``run/<pid>.sock``, in a directory that only its owner may enter. A conversation
begins with one question, a JSON object on a line with the verb in ``ask``; how it goes on is the verb's affair, and
``status`` answers it with one line. Whoever hangs on, or says too much, is left: a conversation takes memory of a few
kilobytes, and there are few at a time.
"""

import asyncio
import errno
import json
import os
import socket
import struct
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Final, TypeAlias

from loguru import logger

__all__ = ["Admin", "Conversation", "Line", "Verb", "connect", "doors"]

_DIRECTORY: Final = "run"
_BACKLOG: Final = 16
_CONVERSATIONS: Final = 16
"at a time; who comes beyond them is turned away"

_QUESTION_TIME: Final = 5.0
"seconds for the question to come"

_LINE_LIMIT: Final = 64 * 1024
"bytes of what a peer says at once"

_PATH_LIMIT: Final = 107
"bytes of a unix socket's address, without the zero at its end"

_FDS_LIMIT: Final = 64
"files that one line may bring along"

Line: TypeAlias = dict[str, Any]
Verb: TypeAlias = Callable[["Conversation", Line], Awaitable[None]]


class Conversation:
    """What passes between a server and one who asks; the asynchronous end of it."""

    def __init__(self, sock: socket.socket, limit: int = _LINE_LIMIT) -> None:
        """``limit`` is that of a line of the peer's, in bytes."""
        self._sock = sock
        self._limit = limit
        self._loop = asyncio.get_running_loop()
        self._kept = b""

    async def receive(self) -> Line | None:
        """The next line; None at the end. Raises OSError, and ValueError for what is no JSON object."""
        while b"\n" not in self._kept:
            if len(self._kept) > self._limit:
                raise ValueError("the line is too long")
            data = await self._loop.sock_recv(self._sock, _LINE_LIMIT)
            if not data:
                return None
            self._kept += data
        line, _, self._kept = self._kept.partition(b"\n")
        return _read(line)

    async def send(self, line: Line) -> None:
        """One line. Raises OSError."""
        await self.send_bytes(_written(line))

    async def send_bytes(self, data: bytes) -> None:
        """A piece of a line. Raises OSError."""
        await self._loop.sock_sendall(self._sock, data)

    async def send_files(self, line: Line, files: Iterable[int]) -> None:
        """One line, and with it these open files. Raises OSError."""
        # Small, and nothing is on its way before it: the socket's buffer takes it whole.
        data = _written(line)
        sent = socket.send_fds(self._sock, [data], list(files))
        if sent < len(data):
            await self.send_bytes(data[sent:])


class Admin:
    """Listens at the owner's door. Its verbs are handed to it."""

    def __init__(self, state_dir: Path, verbs: Mapping[str, Verb]) -> None:
        """Make it within a running event loop."""
        self._directory = state_dir / _DIRECTORY
        self._verbs = verbs
        self._loop = asyncio.get_running_loop()
        self._sock: socket.socket | None = None
        self._path: Path | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    def start(self) -> None:
        """Listen. Raises OSError."""
        directory = self._directory
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        if directory.stat().st_mode & 0o777 != 0o700:
            directory.chmod(0o700)
        _sweep(directory)
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        # A name of its own until it listens: others take a socket that nobody answers at for a dead process's.
        early = directory / f".{os.getpid()}"
        try:
            sock.setblocking(False)
            early.unlink(missing_ok=True)
            before = os.umask(0o177)
            try:
                with _short(early) as name:
                    sock.bind(name)
            finally:
                os.umask(before)
            sock.listen(_BACKLOG)
            self._path = _free(directory)
            early.rename(self._path)
        except BaseException:
            sock.close()
            early.unlink(missing_ok=True)
            raise
        self._sock = sock
        self._loop.add_reader(sock, self._accept)

    def close(self) -> None:
        """Listen no more, and leave all conversations."""
        sock, self._sock = self._sock, None
        if sock is not None:
            self._loop.remove_reader(sock)
            sock.close()
        if self._path is not None:
            with suppress(OSError):
                self._path.unlink(missing_ok=True)
        for task in self._tasks:
            task.cancel()

    def _accept(self) -> None:
        if self._sock is None:
            return
        try:
            connection, _ = self._sock.accept()
        except OSError:
            return  # it has gone again, or files are short: then it is asked again
        if len(self._tasks) >= _CONVERSATIONS or not _is_owner(connection):
            connection.close()
            return
        connection.setblocking(False)
        task = self._loop.create_task(self._converse(connection))
        self._tasks.add(task)

        def done(task: asyncio.Task[None]) -> None:
            self._tasks.discard(task)
            connection.close()

        task.add_done_callback(done)

    async def _converse(self, connection: socket.socket) -> None:
        conversation = Conversation(connection)
        try:
            async with asyncio.timeout(_QUESTION_TIME):
                question = await conversation.receive()
                if question is None:
                    return
                verb = self._verbs.get(str(question.get("ask")))
                if verb is None:
                    await conversation.send({"error": f"unknown question: {str(question.get('ask'))[:80]}"})
                    return
            await verb(conversation, question)
        except (OSError, ValueError) as error:
            logger.debug("= admin: {!r}", error)
        except Exception as error:
            # A fault of ours in an answer must not be more than no answer.
            logger.opt(exception=error).error("admin: {!r}", error)


# The other end, for commands; it has no event loop.


def doors(state_dir: Path) -> list[Path]:
    """The sockets of the processes that may be running with this state directory. Raises OSError, save for none."""
    try:
        names = sorted(os.listdir(state_dir / _DIRECTORY))
    except FileNotFoundError:
        return []
    return [state_dir / _DIRECTORY / name for name in names if name.endswith(".sock")]


def connect(path: Path, limit: float) -> socket.socket:
    """A connection to the process at ``path``; each of its calls takes up to ``limit`` seconds. Raises OSError."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        sock.settimeout(limit)
        with _short(path) as name:
            sock.connect(name)
    except BaseException:
        sock.close()
        raise
    return sock


# Both.


def _written(line: Line) -> bytes:
    return json.dumps(line, separators=(",", ":")).encode("ascii") + b"\n"


def _read(line: bytes) -> Line:
    try:
        found = json.loads(line)
    except RecursionError:
        raise ValueError("the line is nested too deep") from None
    if not isinstance(found, dict):
        raise ValueError("the line is no JSON object")
    return found


@contextmanager
def _short(path: Path) -> Iterator[str]:
    """A name of ``path`` that fits into a socket's address. Raises OSError."""
    if len(os.fsencode(path)) <= _PATH_LIMIT:
        yield str(path)
        return
    descriptor = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        way = f"/proc/self/fd/{descriptor}"
        if not os.path.isdir(way):
            raise OSError(errno.ENAMETOOLONG, f"a socket's path may have {_PATH_LIMIT} bytes", str(path))
        yield f"{way}/{path.name}"
    finally:
        os.close(descriptor)


def _free(directory: Path) -> Path:
    """The name of this process's socket; where containers share a directory there may be another of its number."""
    path = directory / f"{os.getpid()}.sock"
    number = 2
    while path.exists():
        path = directory / f"{os.getpid()}-{number}.sock"
        number += 1
    return path


def _sweep(directory: Path) -> None:
    """Remove what processes left that were killed."""
    for path in directory.glob("*.sock"):
        try:
            connect(path, 0.1).close()
        except ConnectionRefusedError:
            path.unlink(missing_ok=True)
        except OSError:
            continue  # it is busy, or not ours to judge


def _is_owner(connection: socket.socket) -> bool:
    """Whether the peer is this process's user, or root: the file's mode says so too, where systems heed it."""
    option = getattr(socket, "SO_PEERCRED", None)
    if option is None:
        return True
    _, user, _ = struct.unpack("3i", connection.getsockopt(socket.SOL_SOCKET, option, 12))
    return user in (0, os.geteuid())
