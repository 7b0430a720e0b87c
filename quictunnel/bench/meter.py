"""What processes and the machine have used until now, as the system tells it.

Linux tells all of it in /proc. Elsewhere only this process's own time is known; what is not known is None, not zero.
"""

import os
import time
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Final, NamedTuple

__all__ = ["Meter", "Reading", "Work", "cores", "parse_machine", "parse_memory", "parse_process", "parse_udp", "work"]

_PROC: Final = Path("/proc")
_IDLE: Final = (3, 4)  # idle and iowait, among the figures of /proc/stat's first line
_GUEST: Final = 8  # from here on they are counted within the others already


class Reading(NamedTuple):
    """One look. Times are in seconds."""

    at: float
    processes: Mapping[str, float | None]
    "processor time that each has used"

    machine: float | None
    "processor time that all that runs on this machine has used, what was stolen by others included"

    taken: int | None
    "UDP datagrams that came to sockets of this machine"

    dropped: int | None
    "UDP datagrams that were dropped because a socket's buffer was full, in either direction"


class Work(NamedTuple):
    """What was used between two looks."""

    seconds: float
    processes: Mapping[str, float | None]
    "share of one processor, by process; None: not known"

    machine: float | None
    "processors that were busy on this machine"

    cores: int
    "processors that this machine has for us"

    lost: float | None
    "share of the UDP datagrams that came to this machine, or should have left it, and found no room in a buffer"


class Meter:
    """Looks at processes, this one among them."""

    def __init__(self, pids: Mapping[str, int]) -> None:
        self._pids = dict(pids)

    @property
    def names(self) -> list[str]:
        """Of the processes."""
        return list(self._pids)

    def read(self) -> Reading:
        """Look now."""
        udp = _read("net/snmp"), _read("net/snmp6")
        counts = [parse_udp(text) for text in udp if text is not None]
        known = [each for each in counts if each is not None]
        return Reading(
            time.monotonic(),
            {name: self._cpu(pid) for name, pid in self._pids.items()},
            None if (text := _read("stat")) is None else parse_machine(text, _ticks()),
            sum(taken for taken, _ in known) if known else None,
            sum(dropped for _, dropped in known) if known else None,
        )

    def memory(self, name: str) -> tuple[int, int] | None:
        """Bytes of resident memory that a process has now, and the most that it has had."""
        text = _read(f"{self._pids[name]}/status")
        return None if text is None else parse_memory(text)

    def _cpu(self, pid: int) -> float | None:
        if pid == os.getpid():
            return time.process_time()  # finer than ticks, and known everywhere
        text = _read(f"{pid}/stat")
        return None if text is None else parse_process(text, _ticks())


def work(before: Reading, after: Reading, count: int | None = None) -> Work:
    """What was used between two looks; ``count`` are the machine's processors, by default those that it has."""
    seconds = max(after.at - before.at, 1e-9)

    def rate(now: float | None, then: float | None) -> float | None:
        return None if now is None or then is None else max(0.0, now - then) / seconds

    lost = None
    if None not in (after.dropped, before.dropped, after.taken, before.taken):
        dropped = after.dropped - before.dropped  # type: ignore[operator]
        taken = after.taken - before.taken  # type: ignore[operator]
        lost = dropped / max(1, taken + dropped)
    processes = {name: rate(now, before.processes.get(name)) for name, now in after.processes.items()}
    return Work(seconds, processes, rate(after.machine, before.machine), count or cores(), lost)


def cores() -> int:
    """Processors that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def parse_process(text: str, ticks: int) -> float | None:
    """Seconds of processor time in a /proc/PID/stat; ``ticks`` are in one second."""
    fields = text.rpartition(")")[2].split()  # a process's name may hold blanks and brackets
    try:
        return (int(fields[11]) + int(fields[12])) / ticks
    except (IndexError, ValueError):
        return None


def parse_machine(text: str, ticks: int) -> float | None:
    """Seconds of processor time in /proc/stat that were not idle."""
    name, _, rest = text.partition("\n")[0].partition(" ")
    if name != "cpu":
        return None
    try:
        figures = [int(field) for field in rest.split()[:_GUEST]]
    except ValueError:
        return None
    return sum(figure for place, figure in enumerate(figures) if place not in _IDLE) / ticks


def parse_memory(text: str) -> tuple[int, int] | None:
    """Bytes of VmRSS and VmHWM in a /proc/PID/status."""
    found: dict[str, int] = {}
    for line in text.splitlines():
        name, _, rest = line.partition(":")
        size = rest.strip().removesuffix(" kB")
        if name in ("VmRSS", "VmHWM") and size.isdigit():
            found[name] = int(size) * 1024
    return (found["VmRSS"], found["VmHWM"]) if len(found) == 2 else None


def parse_udp(text: str) -> tuple[int, int] | None:
    """Datagrams taken and dropped, of IPv4 in /proc/net/snmp or of IPv6 in /proc/net/snmp6."""
    figures: dict[str, str] = {}
    lines = text.splitlines()
    for head, values in pairwise(lines):
        if head.startswith("Udp: ") and values.startswith("Udp: "):
            figures = dict(zip(head.split(), values.split(), strict=False))
            break
    else:
        figures = {words[0].removeprefix("Udp6"): words[1] for line in lines if len(words := line.split()) == 2}
    try:
        return int(figures["InDatagrams"]), int(figures["RcvbufErrors"]) + int(figures["SndbufErrors"])
    except (KeyError, ValueError):
        return None


def _read(name: str) -> str | None:
    try:
        return (_PROC / name).read_text("ascii", "replace")
    except OSError:
        return None


def _ticks() -> int:
    return os.sysconf("SC_CLK_TCK")
