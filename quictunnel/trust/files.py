"""Files that hold secrets: readable by their owner alone, and always either the old or the new one, whole."""

import fcntl
import os
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

__all__ = ["TrustError", "give_to_owner_of", "locked", "private_directory", "read_bounded", "write_private"]

LOCK_WAIT: Final = 10.0
"seconds to wait for another process that is writing; a write takes milliseconds"

LOCK_POLL: Final = 0.01
"seconds between two attempts: flock has no time-out of its own"


class TrustError(Exception):
    """A file of keys, certificates or tokens cannot be used. The message says what, where, and what to do."""


def read_bounded(path: Path, limit: int) -> bytes:
    """The bytes of a file of at most ``limit`` bytes. Raises TrustError; FileNotFoundError when there is none."""
    try:
        with path.open("rb") as file:
            data = file.read(limit + 1)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise TrustError(f"cannot read {path}: {_reason(error)}") from None
    if len(data) > limit:
        raise TrustError(f"{path} is larger than {limit} bytes: it is not what it should be")
    return data


def private_directory(path: Path) -> None:
    """Make the directory, mode 0700, if it is not there. Raises TrustError."""
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise TrustError(f"cannot make the directory {path}: {_reason(error)}") from None


def write_private(path: Path, data: bytes) -> None:
    """Put ``data`` at ``path``, mode 0600, at once: readers see the old file or the new one. Raises TrustError."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    try:
        try:
            _write_new(temporary, data)
            temporary.replace(path)
            _sync_directory(path.parent)
        finally:
            with suppress(FileNotFoundError):
                temporary.unlink()
    except OSError as error:
        raise TrustError(f"cannot write {path}: {_reason(error)}") from None


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the lock file ``path``, so that one process at a time reads, changes and writes. Raises TrustError.

    It ends with the process, however that ends. The file stays: were it removed, two processes could each lock a file
    of that name.
    """
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    except OSError as error:
        raise TrustError(f"cannot open the lock {path}: {_reason(error)}") from None
    try:
        give_to_owner_of(path.parent, descriptor)
        _lock(descriptor, path)
        yield
    finally:
        os.close(descriptor)


def give_to_owner_of(directory: Path, descriptor: int) -> None:
    """Have what root makes belong to whom its directory belongs to, who has to read it. Raises TrustError."""
    if os.geteuid() != 0:
        return
    try:
        owner, file = os.stat(directory), os.fstat(descriptor)
        if (owner.st_uid, owner.st_gid) != (file.st_uid, file.st_gid):
            os.fchown(descriptor, owner.st_uid, owner.st_gid)
    except OSError as error:
        raise TrustError(f"cannot give a file in {directory} to the directory's owner: {_reason(error)}") from None


def _lock(descriptor: int, path: Path) -> None:
    deadline = time.monotonic() + LOCK_WAIT
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise TrustError(f"another process has held {path} for {LOCK_WAIT:.0f} s; try again") from None
            time.sleep(LOCK_POLL)
        except OSError as error:
            raise TrustError(f"cannot lock {path}: {_reason(error)}") from None


def _write_new(path: Path, data: bytes) -> None:
    # O_EXCL and O_NOFOLLOW: nobody who can write to the directory can have put a link there beforehand.
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    with open(descriptor, "wb") as file:
        os.fchmod(descriptor, 0o600)
        give_to_owner_of(path.parent, descriptor)
        file.write(data)
        file.flush()
        os.fsync(descriptor)


def _sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _reason(error: OSError) -> str:
    return error.strerror or type(error).__name__
