"""The log: set-up, what makes it safe to read on a terminal, and the line of each request.

Everything goes through loguru, the QUIC libraries' own logging too. A line is text or one JSON object:

    2026-01-31T09:30:00.123Z INFO  session registered tunnel=app
    {"time": "2026-01-31T09:30:00.123Z", "level": "INFO", "logger": "quictunnel.app", "message": "session ..."}

Names, targets and error texts come from the network. Characters that could steer a terminal, reorder what it shows or
begin a forged line are escaped here, once, for every sink.

``AccessLog`` writes the line of each request. It is on the way of every request, so it only keeps the record; the lines
of a tenth of a second are formatted and written together:

    2026-01-31T09:30:00.123Z INFO  GET /a?b=c 200 612B 35.2ms tunnel=app id=8f3a client=127.0.0.1 in=0B
"""

import asyncio
import fcntl
import logging
import os
import re
import select
import sys
import time
import traceback
from collections.abc import Callable
from json import dumps
from json.encoder import encode_basestring_ascii as _quoted
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal, NamedTuple, TypeAlias

from loguru import logger

if TYPE_CHECKING:
    from loguru import Record

__all__ = ["AccessLog", "AccessRecord", "Format", "escape", "set_up"]

Format: TypeAlias = Literal["text", "json"]

FILE_SIZE: Final = 50 * 1024 * 1024
FILES_KEPT: Final = 5

# C0 and DEL, C1, the marks that reorder text (UTS 55, "Trojan Source"), line separators, and lone surrogates, which no
# encoding can write.
_UNSAFE: Final = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
_UNSAFE_BUT_NEWLINE: Final = re.compile(_UNSAFE.pattern.replace("\x00-\x1f", "\x00-\x09\x0b-\x1f"))

# What each of our levels shows of the libraries: at INFO they say several lines a connection, at DEBUG one a packet.
_LIBRARIES: Final = ("quic", "http3", "httpx", "httpcore", "asyncio")
_LIBRARY_LEVELS: Final = {"trace": logging.DEBUG, "debug": logging.INFO}

_COLOURS: Final = {"WARNING": "\x1b[33m", "ERROR": "\x1b[31m", "CRITICAL": "\x1b[31m"}


def escape(text: str) -> str:
    r"""The text with unsafe characters as ``\x1b``, ``\n`` or ``\u202e``: one line that cannot steer a terminal."""
    return _UNSAFE.sub(_escaped, text) if _UNSAFE.search(text) else text


def _escaped(found: re.Match[str]) -> str:
    return found[0].encode("unicode_escape").decode("ascii")


# Set-up.


def set_up(
    level: str = "info", form: Format = "text", file: Path | None = None, *, shared: bool = False
) -> Callable[[], None]:
    """Log what is at least ``level`` to standard error, or to ``file``: rotated at 50 MiB, readable by its owner only.

    With ``shared`` this process is going to fork others, which log to the same place: lines of one are never mixed with
    those of another. A file may always have several writers.

    Returns what flushes and takes it all down again. Raises OSError if the file cannot be written.
    """
    logger.remove()
    logger.enable("quictunnel")
    logger.configure(patcher=_patch)
    if file is None:
        colour = sys.stderr.isatty() and "NO_COLOR" not in os.environ
        sink = _WholeLines(sys.stderr.fileno()) if shared else sys.stderr
        logger.add(sink, level=level.upper(), format=_format(form, colour=colour), colorize=False, backtrace=False)
    else:
        file.parent.mkdir(parents=True, exist_ok=True)
        logger.add(_File(file), level=level.upper(), format=_format(form, colour=False), backtrace=False)
    undo = _intercept(level)

    def take_down() -> None:
        undo()
        logger.remove()

    return take_down


class _File:
    """A log file that any number of processes may write, and rotate: workers, and a server that takes over.

    Each write appends whole lines by one system call, and looks first whether the name still means the file that is
    open. Whoever finds it full renames it under a lock on the file itself; who does not get the lock, or gets it too
    late, writes on into the file that the name means then. A lock is that of whoever opened the file, and a forked
    process would share its parent's: so each opens it for itself.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._descriptor = -1
        self._opened_by = 0
        self._open()

    def write(self, text: str) -> None:
        data = text.encode("utf-8")
        if self._opened_by != os.getpid() or not self._is_current():
            self._open()
        size = os.fstat(self._descriptor).st_size
        if size and size + len(data) > FILE_SIZE:
            self._rotate()
        _write_all(self._descriptor, data)

    def stop(self) -> None:
        """loguru's word for closing."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def _open(self) -> None:
        self.stop()
        self._descriptor = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
        self._opened_by = os.getpid()

    def _is_current(self) -> bool:
        try:
            return os.path.samestat(os.stat(self._path), os.fstat(self._descriptor))
        except FileNotFoundError:
            return False

    def _rotate(self) -> None:
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return
        if self._is_current():
            now = time.time()
            moment = f"{time.strftime('%Y-%m-%d_%H-%M-%S', time.localtime(now))}_{int(now % 1 * 1e6):06d}"
            self._path.rename(self._path.with_name(f"{self._path.stem}.{moment}{self._path.suffix}"))
            self._remove_old()
        self._open()  # and the lock is gone with the descriptor

    def _remove_old(self) -> None:
        name = re.escape(self._path.stem) + r"\.\d{4}-\d\d-\d\d_\d\d-\d\d-\d\d_\d{6}" + re.escape(self._path.suffix)
        rotated = sorted(each.name for each in self._path.parent.iterdir() if re.fullmatch(name, each.name))
        for old in rotated[:-FILES_KEPT]:
            self._path.with_name(old).unlink(missing_ok=True)


class _WholeLines:
    """A descriptor that several processes write to, a pipe perhaps: what is written at once stays together."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    def write(self, text: str) -> None:
        piece = b""
        for line in text.encode("utf-8", "backslashreplace").splitlines(keepends=True):
            if piece and len(piece) + len(line) > select.PIPE_BUF:
                _write_all(self._descriptor, piece)
                piece = b""
            piece += line
        _write_all(self._descriptor, piece)


def _write_all(descriptor: int, data: bytes) -> None:
    while data:
        try:
            data = data[os.write(descriptor, data) :]
        except BlockingIOError:
            # Standard error is a terminal or a pipe that somebody else has set to this.
            select.select([], [descriptor], [])


def _patch(record: "Record") -> None:
    if _BATCH not in record["extra"]:
        record["message"] = escape(record["message"])


def _format(form: Format, *, colour: bool) -> Callable[["Record"], str]:
    render = _json_line if form == "json" else _text_line

    def line(record: "Record") -> str:
        if _BATCH in record["extra"]:
            return ""  # written raw: the format is asked all the same
        text = render(record)
        paint = _COLOURS.get(record["level"].name) if colour else None
        record["extra"]["line"] = f"{paint}{text}\x1b[0m" if paint else text
        return "{extra[line]}\n"

    return line


def _text_line(record: "Record") -> str:
    extra = "".join(f" {key}={escape(str(value))}" for key, value in record["extra"].items() if key != "line")
    line = f"{_clock(record['time'].timestamp())} {record['level'].name:<5} {record['message']}{extra}"
    exception = _exception(record)
    return f"{line}\n{exception}" if exception else line


def _json_line(record: "Record") -> str:
    content: dict[str, Any] = {
        "time": _clock(record["time"].timestamp()),
        "level": record["level"].name,
        "logger": record["extra"].get("logger", record["name"]),
        "message": record["message"],
    }
    content |= {key: value for key, value in record["extra"].items() if key not in ("line", "logger")}
    exception = _exception(record)
    if exception:
        content["exception"] = exception
    return dumps(content, default=str).replace("\x7f", "\\u007f")


def _exception(record: "Record") -> str:
    """The traceback, without the values of variables: they may be secrets."""
    caught = record["exception"]
    if caught is None or caught.value is None:
        return ""
    text = "".join(traceback.format_exception(caught.type, caught.value, caught.traceback)).rstrip()
    return _UNSAFE_BUT_NEWLINE.sub(_escaped, text)


class _Intercepted(logging.Handler):
    """Hands what others log with the standard library to loguru."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            level: str | int = logger.level(record.levelname).name
        except ValueError:
            level = record.levelno
        # opt() before log(): the message is not a template, whatever braces it holds.
        logger.bind(logger=record.name).opt(exception=record.exc_info).log(level, "{}", record.getMessage())


def _intercept(level: str) -> Callable[[], None]:
    root = logging.getLogger()
    before = root.handlers[:], root.level, {name: logging.getLogger(name).level for name in _LIBRARIES}
    root.handlers[:] = [_Intercepted()]
    root.setLevel(logging.WARNING if level not in _LIBRARY_LEVELS else logging.INFO)
    for name in _LIBRARIES:
        # A QUIC library warns of each connection that its peer closes; our own line says so already, and says why.
        usual = logging.ERROR if name == "quic" else logging.WARNING
        logging.getLogger(name).setLevel(_LIBRARY_LEVELS.get(level, usual))

    def undo() -> None:
        root.handlers[:] = before[0]
        root.setLevel(before[1])
        for name, former in before[2].items():
            logging.getLogger(name).setLevel(former)

    return undo


# Requests.

_BATCH: Final = "batch"


class AccessRecord(NamedTuple):
    """What is told of one request, at its end."""

    time: float
    "seconds since the epoch"

    request_id: str
    tunnel: str
    "empty if the request named none that exists"

    method: bytes
    target: bytes
    status: int
    "0 if none was sent"

    received: int
    "bytes of the request's body"

    sent: int
    "bytes of the response's body"

    seconds: float
    "from the head's arrival to the end"

    client: str
    "the visitor's address"

    error: str
    "a word of RFC 9209 section 2.3, or empty"


class AccessLog:
    """The requests' lines, at level INFO, written in batches.

    ``limit`` records are kept at most: the next one writes them at once. ``close`` writes what is left.
    """

    def __init__(self, form: Format = "text", *, enabled: bool = True, delay: float = 0.1, limit: int = 1000) -> None:
        """``delay`` is the longest that a line waits, in seconds; ``enabled`` says whether INFO is logged at all."""
        self.change(form, enabled=enabled)
        self._delay = delay
        self._limit = limit
        self._records: list[AccessRecord] = []
        self._timer: asyncio.TimerHandle | None = None
        self._closed = False

    def change(self, form: Format, *, enabled: bool) -> None:
        """Go on in another form, or not."""
        self.enabled = enabled
        self._render = _access_json if form == "json" else _access_text

    def record(
        self,
        request_id: str,
        tunnel: str,
        method: bytes,
        target: bytes,
        status: int,
        received: int,
        sent: int,
        seconds: float,
        client: str,
        error: str = "",
    ) -> None:
        """Note one request, now over; the fields are those of AccessRecord. Called from the event loop."""
        if not self.enabled:
            return
        records = self._records
        records.append(
            AccessRecord(
                time.time(), request_id, tunnel, method, target, status, received, sent, seconds, client, error
            )
        )
        if self._timer is None and not self._closed:
            self._timer = asyncio.get_running_loop().call_later(self._delay, self.flush)
        elif len(records) >= self._limit or self._closed:
            self.flush()

    def flush(self) -> None:
        """Write what is kept."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if not self._records:
            return
        records, self._records = self._records, []
        text = _joined([self._render(record) for record in records])
        logger.bind(**{_BATCH: True}).opt(raw=True).info("{}", text)

    def close(self) -> None:
        """Write what is kept; a record that still comes is written at once."""
        self._closed = True
        self.flush()


def _joined(lines: list[str]) -> str:
    """The lines, each ended, none of them able to do more than be read."""
    text = "\n".join(lines)
    # One look at the batch instead of one at each line: what was checked at the door is clean already.
    if text.count("\n") >= len(lines) or _UNSAFE_BUT_NEWLINE.search(text):
        text = "\n".join(map(escape, lines))
    return text + "\n"


def _access_text(record: AccessRecord) -> str:
    at, request_id, tunnel, method, target, status, received, sent, seconds, client, error = record
    return (
        f"{_clock(at)} INFO  {_printable(method)} {_printable(target)} {status} {sent}B {seconds * 1000:.1f}ms "
        f"tunnel={tunnel or '-'} id={request_id} client={client} in={received}B"
    ) + (f" error={error}" if error else "")


def _access_json(record: AccessRecord) -> str:
    at, request_id, tunnel, method, target, status, received, sent, seconds, client, error = record
    return (
        f'{{"time": "{_clock(at)}", "level": "INFO", "logger": "quictunnel.access", "message": "request", '
        f'"id": {_quoted(request_id)}, "tunnel": {_quoted(tunnel)}, "method": {_quoted(_printable(method))}, '
        f'"target": {_quoted(_printable(target))}, "status": {status}, "received": {received}, "sent": {sent}, '
        f'"ms": {seconds * 1000:.3f}, "client": {_quoted(client)}, "error": {_quoted(error)}}}'
    )


def _printable(raw: bytes) -> str:
    return raw.decode("ascii", "backslashreplace") or "-"


_second = 0
_second_text = ""


def _clock(seconds: float) -> str:
    """UTC as in RFC 3339 section 5.6, to the millisecond. The text of a second is made once: many lines share it."""
    global _second, _second_text
    whole = int(seconds)
    if whole != _second:
        _second, _second_text = whole, time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(whole))
    return f"{_second_text}.{int((seconds - whole) * 1000):03d}Z"
