"""Files that hold secrets."""

import os
import stat
from pathlib import Path

import pytest

from quictunnel.trust import files
from quictunnel.trust.files import TrustError, locked, private_directory, read_bounded, write_private


def test_a_file_is_its_owners_alone_whatever_the_umask(tmp_path: Path) -> None:
    for mask in (0o000, 0o777):
        old = os.umask(mask)
        try:
            write_private(tmp_path / "secret", b"x")
        finally:
            os.umask(old)
        assert stat.S_IMODE((tmp_path / "secret").stat().st_mode) == 0o600


def test_writing_replaces_the_file_and_leaves_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "secret"
    path.write_bytes(b"old")
    path.chmod(0o644)
    with path.open("rb") as reader:
        write_private(path, b"new")
        assert reader.read() == b"old"  # who has the old one open goes on reading the old one
    assert path.read_bytes() == b"new"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert os.listdir(tmp_path) == ["secret"]


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "secret"
    write_private(path, b"old")

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(TrustError, match=r"cannot write .*secret: No space left"):
        write_private(path, b"new")
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["secret"]


def test_a_link_is_replaced_not_followed(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").write_bytes(b"untouched")
    (tmp_path / "secret").symlink_to(tmp_path / "elsewhere")
    write_private(tmp_path / "secret", b"new")
    assert (tmp_path / "elsewhere").read_bytes() == b"untouched"
    assert not (tmp_path / "secret").is_symlink()


def test_a_directory_is_made_for_its_owner_alone(tmp_path: Path) -> None:
    private_directory(tmp_path / "a" / "b")
    private_directory(tmp_path / "a" / "b")
    assert stat.S_IMODE((tmp_path / "a" / "b").stat().st_mode) == 0o700
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(TrustError, match="cannot make the directory"):
        private_directory(tmp_path / "file")


def test_reading_is_bounded(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"12345")
    assert read_bounded(path, 5) == b"12345"
    with pytest.raises(TrustError, match="larger than 4 bytes"):
        read_bounded(path, 4)
    with pytest.raises(TrustError, match=r"cannot read .*Is a directory"):
        read_bounded(tmp_path, 5)
    with pytest.raises(FileNotFoundError):
        read_bounded(tmp_path / "none", 5)


def test_a_lock_that_is_held_is_waited_for_only_so_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "LOCK_WAIT", 0.02)
    path = tmp_path / ".lock"
    with locked(path), pytest.raises(TrustError, match="another process has held"), locked(path):
        raise AssertionError("two hold the lock")
    with locked(path):
        pass
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    with pytest.raises(TrustError, match="cannot open the lock"), locked(tmp_path / "none" / ".lock"):
        pass
