"""The log: its lines, what it lets through to a terminal, and the requests' batches."""

import asyncio
import json
import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from loguru import logger

from quictunnel import log
from quictunnel.log import AccessLog, escape

TEXT_LINE = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z (TRACE|DEBUG|INFO |WARNING|ERROR) (.*)")


@pytest.fixture
def log_file(tmp_path: Path) -> Iterator[Path]:
    yield tmp_path / "logs" / "quictunnel.log"
    logger.remove()
    logger.configure(patcher=lambda record: None)


def request(access: AccessLog, **changes: Any) -> None:
    values: dict[str, Any] = {
        "request_id": "8f3a",
        "tunnel": "app",
        "method": b"GET",
        "target": b"/a?b=c",
        "status": 200,
        "received": 0,
        "sent": 612,
        "seconds": 0.03521,
        "client": "127.0.0.1",
    }
    access.record(**(values | changes))


# Lines.


def test_a_line_of_text(log_file: Path) -> None:
    take_down = log.set_up(file=log_file)
    logger.bind(tunnel="app").info("session registered")
    logger.debug("not shown at info")
    take_down()
    [line] = log_file.read_text().splitlines()
    found = TEXT_LINE.fullmatch(line)
    assert found is not None
    assert found.groups() == ("INFO ", "session registered tunnel=app")


def test_a_line_of_json(log_file: Path) -> None:
    take_down = log.set_up("debug", "json", log_file)
    logger.bind(tunnel="app").debug("é {}", "\x7f\u202e")
    take_down()
    line = json.loads(log_file.read_text())
    assert line.pop("time").endswith("Z")
    assert line.pop("logger").endswith("test_log")
    assert line == {"level": "DEBUG", "message": "é \\x7f\\u202e", "tunnel": "app"}


def test_standard_error_without_a_file(capsys: pytest.CaptureFixture[str], log_file: Path) -> None:
    take_down = log.set_up("warning")
    logger.info("quiet")
    logger.warning("heard")
    take_down()
    assert capsys.readouterr().err.endswith("WARNING heard\n")


def test_only_the_owner_reads_the_file(log_file: Path) -> None:
    take_down = log.set_up(file=log_file)
    logger.info("x")
    take_down()
    assert log_file.stat().st_mode & 0o777 == 0o600


def test_an_exception_shows_its_traceback_and_no_variables(log_file: Path) -> None:
    take_down = log.set_up(file=log_file)
    secret = "qtk_hush"
    try:
        raise ValueError("from the network: \x1b[31m" + str(len(secret)))
    except ValueError:
        logger.exception("it failed")
    take_down()
    text = log_file.read_text()
    assert "Traceback" in text
    assert r"\x1b[31m8" in text
    assert "\x1b" not in text
    assert "qtk_hush'" not in text.replace('secret = "qtk_hush"', "")


# Control characters.


@pytest.mark.parametrize(
    ("raw", "shown"),
    [
        ("plain / text?é=✓", "plain / text?é=✓"),
        ("\x1b[2J", r"\x1b[2J"),
        ("a\nINFO forged", r"a\nINFO forged"),
        ("a\r\tb\0", r"a\r\tb\x00"),
        ("\x7f\x85\x9b31m", r"\x7f\x85\x9b31m"),
        ("\u202eevil\u2066", r"\u202eevil\u2066"),
        ("\u2028\ud800", r"\u2028\ud800"),
    ],
)
def test_escape(raw: str, shown: str) -> None:
    assert escape(raw) == shown


@given(st.text(st.characters(exclude_categories=[])))
def test_escaped_text_is_one_line_that_any_terminal_takes(raw: str) -> None:
    shown = escape(raw)
    assert not log._UNSAFE.search(shown)
    assert len((shown + "x").splitlines()) == 1
    shown.encode()


@pytest.mark.parametrize("form", ["text", "json"])
def test_messages_and_fields_cannot_steer_the_terminal(log_file: Path, form: log.Format) -> None:
    take_down = log.set_up("info", form, log_file)
    logger.bind(host="\x1b]0;evil\x07").warning("Host {} refused", "\x1b[2J\nforged")
    logging.getLogger("quic").error("peer said %s {braces}", "\x9b2J")
    take_down()
    text = log_file.read_bytes().decode()
    assert text.count("\n") == 2
    assert not log._UNSAFE_BUT_NEWLINE.search(text)
    assert "{braces}" in text


# What the libraries say.


@pytest.mark.parametrize(("level", "heard"), [("info", 1), ("debug", 3), ("trace", 4)])
def test_the_quic_libraries_join_in_one_step_quieter(log_file: Path, level: str, heard: int) -> None:
    take_down = log.set_up(level, file=log_file)
    library = logging.getLogger("quic")
    library.error("one")
    library.warning("two")
    library.info("three")
    library.debug("four")
    take_down()
    lines = log_file.read_text().splitlines()
    assert len(lines) == heard
    assert lines[0].endswith("one logger=quic")


def test_taking_down_puts_the_standard_log_back() -> None:
    root, library = logging.getLogger(), logging.getLogger("quic")
    before = root.handlers[:], root.level, library.level
    log.set_up("trace")()
    assert (root.handlers[:], root.level, library.level) == before


# Requests.


async def test_requests_are_written_together_and_soon(log_file: Path) -> None:
    take_down = log.set_up(file=log_file)
    written = asyncio.Event()
    logger.add(lambda _: written.set())
    access = AccessLog(delay=0.01)
    request(access)
    request(access, tunnel="", status=404, error="destination_not_found", method=b"POST", received=5)
    assert log_file.read_text() == ""
    async with asyncio.timeout(5):
        await written.wait()
    take_down()
    first, second = [line[25:] for line in log_file.read_text().splitlines()]
    assert first == "INFO  GET /a?b=c 200 612B 35.2ms tunnel=app id=8f3a client=127.0.0.1 in=0B"
    assert second == (
        "INFO  POST /a?b=c 404 612B 35.2ms tunnel=- id=8f3a client=127.0.0.1 in=5B error=destination_not_found"
    )


async def test_requests_as_json(log_file: Path) -> None:
    take_down = log.set_up("info", "json", log_file)
    access = AccessLog("json")
    request(access, target=b'/"quoted"\\', error="dns_error")
    access.close()
    take_down()
    line = json.loads(log_file.read_text())
    assert line.pop("time").endswith("Z")
    assert line == {
        "level": "INFO",
        "logger": "quictunnel.access",
        "message": "request",
        "id": "8f3a",
        "tunnel": "app",
        "method": "GET",
        "target": '/"quoted"\\',
        "status": 200,
        "received": 0,
        "sent": 612,
        "ms": 35.21,
        "client": "127.0.0.1",
        "error": "dns_error",
    }


@pytest.mark.parametrize("form", ["text", "json"])
async def test_a_request_cannot_forge_a_line(log_file: Path, form: log.Format) -> None:
    take_down = log.set_up("info", form, log_file)
    access = AccessLog(form)
    request(access, target=b"/\x1b[2J\xff\xc2\x9b", client="::1\nforged", tunnel="\u202ex")
    request(access, target=b"/{braces}<red>")
    access.close()
    take_down()
    text = log_file.read_bytes().decode()
    assert text.count("\n") == 2
    assert not log._UNSAFE_BUT_NEWLINE.search(text)
    assert "/{braces}<red>" in text


async def test_what_is_kept_is_bounded(log_file: Path) -> None:
    take_down = log.set_up(file=log_file)
    access = AccessLog(delay=60, limit=10)
    for _ in range(25):
        request(access)
    assert len(log_file.read_text().splitlines()) == 20
    access.close()
    assert len(log_file.read_text().splitlines()) == 25
    request(access)
    assert len(log_file.read_text().splitlines()) == 26
    take_down()


async def test_nothing_is_kept_when_requests_are_not_logged(log_file: Path) -> None:
    take_down = log.set_up("warning", file=log_file)
    access = AccessLog(enabled=False)
    request(access)
    assert access._records == []
    assert access._timer is None
    access.close()
    take_down()
    assert log_file.read_text() == ""


# Files. tests/unit/test_log_shared.py has those of several writers.


def test_full_file_is_rotated_and_the_oldest_are_removed(log_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log, "FILE_SIZE", 1000)
    stranger = log_file.with_name("quictunnel.old.log")
    take_down = log.set_up(file=log_file)
    stranger.write_text("somebody else's")
    for number in range(100):
        logger.info("{:04} {}", number, "x" * 300)
    take_down()
    rotated = sorted(set(log_file.parent.iterdir()) - {log_file, stranger})
    assert len(rotated) == log.FILES_KEPT
    assert stranger.exists()
    assert all(file.stat().st_mode & 0o777 == 0o600 and file.stat().st_size <= 1000 for file in rotated)
    text = "".join(file.read_text() for file in (*rotated, log_file))
    assert re.findall(r"INFO  (\d{4})", text) == [f"{number:04}" for number in range(100 - text.count("\n"), 100)]


def test_file_that_was_moved_away_is_made_anew(log_file: Path) -> None:
    take_down = log.set_up(file=log_file)
    logger.info("before")
    log_file.rename(log_file.with_suffix(".1"))
    logger.info("after")
    take_down()
    assert "after" in log_file.read_text()
    assert "before" in log_file.with_suffix(".1").read_text()
