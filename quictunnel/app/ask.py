"""Asking a running server at its owner's door, from a command without an event loop. See ``server.admin``."""

import json
import socket
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Final

from quictunnel.failures import CommandError
from quictunnel.server.admin import connect, doors

__all__ = ["Call", "NoAnswer", "calls"]

_PIECE: Final = 256 * 1024
_FILES: Final = 64

Line = dict[str, Any]


class NoAnswer(Exception):
    """The process does not answer, or not as one of ours does."""


class Call:
    """A conversation with one server process; ``limit`` is in seconds, for each answer."""

    def __init__(self, path: Path, limit: float) -> None:
        """Raises NoAnswer; ConnectionRefusedError and FileNotFoundError when nobody is there."""
        self.path = path
        self._limit = limit
        self._kept = b""
        try:
            self.socket = connect(path, limit)
        except (ConnectionRefusedError, FileNotFoundError):
            raise
        except OSError as error:
            raise NoAnswer(error.strerror or str(error)) from None

    def __enter__(self) -> "Call":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Hang up."""
        self.socket.close()

    def say(self, line: Line) -> None:
        """Say one line. Raises NoAnswer."""
        try:
            self.socket.sendall(json.dumps(line).encode("ascii") + b"\n")
        except OSError as error:
            raise NoAnswer(error.strerror or str(error)) from None

    def hear(self, limit: int = 1 << 20) -> Line:
        """The next line, of at most ``limit`` bytes. Raises NoAnswer."""
        return self._hear(limit, None)

    def hear_files(self, files: list[int]) -> Line:
        """The next line, and the open files that come with it. Raises NoAnswer."""
        return self._hear(1 << 20, files)

    def _hear(self, limit: int, files: list[int] | None) -> Line:
        deadline = time.monotonic() + self._limit
        pieces, size = [self._kept], len(self._kept)
        try:
            while b"\n" not in pieces[-1]:
                left = deadline - time.monotonic()
                if left <= 0 or size > limit:
                    raise NoAnswer("its answer does not end")
                self.socket.settimeout(left)
                if files is None:
                    data = self.socket.recv(_PIECE)
                else:
                    data, came, _, _ = socket.recv_fds(self.socket, _PIECE, _FILES)
                    files += came
                if not data:
                    raise NoAnswer("it hung up")
                pieces.append(data)
                size += len(data)
            line, _, self._kept = b"".join(pieces).partition(b"\n")
            found = json.loads(line)
        except TimeoutError:
            raise NoAnswer(f"no answer within {self._limit:g} s") from None
        except OSError as error:
            raise NoAnswer(error.strerror or str(error)) from None
        except (ValueError, RecursionError):
            raise NoAnswer("its answer is not JSON") from None
        if not isinstance(found, dict):
            raise NoAnswer("its answer is not as expected")
        return found


def calls(state_dir: Path, limit: float) -> tuple[list[Call], list[tuple[Path, str]]]:
    """A conversation with each process of the state directory's servers, and those that could not be had, with why.

    Raises CommandError when it is not this user's to ask.
    """
    try:
        paths = doors(state_dir)
    except OSError as error:
        raise CommandError(
            f"only the owner of the state directory may ask its server: {error.filename}: {error.strerror}"
        ) from None
    found: list[Call] = []
    silent: list[tuple[Path, str]] = []
    for path in paths:
        try:
            found.append(Call(path, limit))
        except (ConnectionRefusedError, FileNotFoundError):
            continue  # what a killed process left, or one that has just gone
        except NoAnswer as error:
            silent.append((path, str(error)))
    return found, silent
