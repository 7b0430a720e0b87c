"""Work that another process does, and what it leaves behind."""

import os
import signal
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from quictunnel.app.beside import beside
from quictunnel.app.identity import begin_identity, identity_of
from quictunnel.options import load_settings, plain
from quictunnel.settings import ServeSettings
from quictunnel.trust.certificates import TrustError


def children() -> str:
    return Path(f"/proc/self/task/{os.getpid()}/children").read_text()


def test_the_result_comes_back_and_nothing_stays() -> None:
    before = children()
    finish = beside(os.getpid)
    assert finish() != os.getpid()
    assert children() == before


def test_what_it_raised_is_raised_here() -> None:
    def fail() -> None:
        raise TrustError("ca.pem is no CA")

    with pytest.raises(TrustError, match=r"ca\.pem is no CA"):
        beside(fail)()


def test_one_that_is_killed_is_told_of() -> None:
    before = children()
    finish = beside(lambda: os.kill(os.getpid(), signal.SIGKILL))
    with pytest.raises(OSError, match="ended with status -9"):
        finish()
    assert children() == before


def test_a_server_certificate_is_the_same_whoever_looked(tmp_path: Path) -> None:
    settings = plain(load_settings(ServeSettings, {"state_dir": str(tmp_path)}))
    made = begin_identity(settings, "127.0.0.1")()
    assert made == identity_of(settings, "127.0.0.1")
    assert Path(made.files.certificate).exists()


def test_a_certificate_is_looked_at_when_it_is_due_or_another(tmp_path: Path) -> None:
    settings = plain(load_settings(ServeSettings, {"state_dir": str(tmp_path)}))
    identity = identity_of(settings, "127.0.0.1")
    now = datetime.now(UTC)
    assert not identity.is_due(now)
    assert not identity.is_due(now + timedelta(days=59))
    assert identity.is_due(now + timedelta(days=61)), "a third of its 90 days is left"
    os.utime(identity.files.certificate, (1, 1))
    assert identity.is_due(now)
    Path(identity.files.certificate).unlink()
    assert identity.is_due(now)
