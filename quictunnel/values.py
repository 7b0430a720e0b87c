"""What a person types, read into plain values: addresses, durations, sizes, names.

Every function takes the text as typed (a TOML number or list where that makes sense) and raises ValueError with a
sentence that says what would be right; who calls adds which option it was.
"""

import ipaddress
import math
import os
import re
from pathlib import Path
from typing import Final, NamedTuple, TypeAlias

from quictunnel.wire.names import host_and_port, normalise_host

__all__ = [
    "Address",
    "Network",
    "Range",
    "parse_address",
    "parse_addresses",
    "parse_domain",
    "parse_duration",
    "parse_host_header",
    "parse_lines",
    "parse_listen_address",
    "parse_networks",
    "parse_path",
    "parse_processes",
    "parse_size",
    "parse_switch",
    "parse_target",
    "parse_text",
    "parse_whole",
    "parse_word",
    "parse_workers",
    "split_list",
]

Network: TypeAlias = ipaddress.IPv4Network | ipaddress.IPv6Network

LONGEST_DURATION: Final = 366 * 86400.0
"seconds; timers of the event loop take no more than a few years"

ADDRESSES_LIMIT: Final = 16
"of servers to choose from"

_UNITS: Final = {"": 1.0, "ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_DURATION: Final = re.compile(r"(\d+(?:\.\d+)?)\s*(ms|s|m|h|d|)", re.ASCII)

_SIZES: Final = {"": 1, "b": 1} | {
    letter + suffix: base**power
    for power, letter in enumerate("kmg", start=1)
    for suffix, base in (("", 1024), ("ib", 1024), ("b", 1000))
}
_SIZE: Final = re.compile(r"(\d+(?:\.\d+)?)\s*([a-z]*)", re.ASCII)

_TARGET: Final = re.compile(r"[!\"$-~]{1,2048}", re.ASCII)

_HOST_HEADER: Final = re.compile(r"[A-Za-z0-9._-]+(?::\d{1,5})?|\[[0-9A-Fa-f:.]+\](?::\d{1,5})?", re.ASCII)


class Address(NamedTuple):
    """A host and a port; the host is a name or an IP address without brackets."""

    host: str
    port: int

    def __str__(self) -> str:
        return host_and_port(self.host, self.port)


class Range(NamedTuple):
    """Two bounds, both allowed."""

    lowest: int
    highest: int

    def __str__(self) -> str:
        return str(self.lowest) if self.lowest == self.highest else f"{self.lowest}-{self.highest}"


MOST_PROCESSES: Final = 64
"of one command: each has a part of all limits, and a link to each of the other side's"


def parse_text(value: object) -> str:
    """A text that is not empty, without the white space around it; a list is joined by commas."""
    if isinstance(value, list | tuple):
        return ",".join(parse_text(item) for item in value)
    if isinstance(value, bool) or not isinstance(value, str | int | float | Path):
        raise ValueError("a text is needed")
    text = str(value).strip()
    if not text:
        raise ValueError("the value is empty")
    return text


def parse_word(value: object) -> str:
    """One of some fixed words, whatever its case."""
    return parse_text(value).lower()


def parse_lines(value: object) -> tuple[str, ...]:
    """The lines of a text, or the items of a list as they are."""
    items = value if isinstance(value, list | tuple) else str(value).split("\n")
    return tuple(parse_text(item) for item in items)


def parse_listen_address(text: object, default_host: str = "127.0.0.1") -> Address:
    """``HOST:PORT`` or a mere ``PORT`` to listen on; port 0 takes any free one."""
    if isinstance(text, Address):
        return text
    plain = parse_text(text)
    if re.fullmatch(r"\d+", plain, re.ASCII):
        return Address(default_host, _port(plain, lowest=0))
    host, port = _host_and_port(plain)
    if port is None:
        raise ValueError(f"a port is missing, as in {Address(host, 8080)}")
    return Address(host, _port(port, lowest=0))


def parse_address(text: object, default_port: int) -> Address:
    """``HOST[:PORT]`` to dial."""
    if isinstance(text, Address):
        return text
    host, port = _host_and_port(parse_text(text))
    return Address(host, default_port if port is None else _port(port, lowest=1))


def parse_addresses(value: object, default_port: int) -> tuple[Address, ...]:
    """Addresses to dial, each once; of a text what commas separate."""
    if isinstance(value, Address):
        return (value,)
    items = value if isinstance(value, list | tuple) else [value]
    texts = [each for item in items for each in ([item] if isinstance(item, Address) else split_list(item))]
    if items and not texts:
        raise ValueError("the value is empty")
    if len(texts) > ADDRESSES_LIMIT:
        raise ValueError(f"{len(texts)} addresses are too many: at most {ADDRESSES_LIMIT} are taken")
    found: dict[Address, None] = {}
    for text in texts:
        try:
            address = parse_address(text, default_port)
        except ValueError as error:
            raise ValueError(f"{text}: {error}" if len(texts) > 1 else str(error)) from None
        if address in found:
            raise ValueError(f"{address} stands there twice")
        found[address] = None
    return tuple(found)


def parse_duration(value: object) -> float:
    """Seconds from ``30``, ``30s``, ``500ms``, ``5m``, ``2h``, ``30d`` or a number; above zero and at most a year."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        seconds = float(value)
    elif found := _DURATION.fullmatch(parse_text(value)):
        seconds = float(found[1]) * _UNITS[found[2]]
    else:
        raise ValueError("a duration looks like 30s, 500ms, 5m, 2h or 30d")
    if not math.isfinite(seconds) or not 0 < seconds <= LONGEST_DURATION:
        raise ValueError("a duration is more than 0 and at most a year")
    return seconds


def parse_size(value: object, lowest: int = 1, highest: int = 2**50) -> int:
    """Bytes from ``65536``, ``64k``, ``64KiB`` (1024) or ``64kB`` (1000) or a number."""
    if isinstance(value, int) and not isinstance(value, bool):
        size = value
    elif found := _SIZE.fullmatch(parse_text(value).lower()):
        if found[2] not in _SIZES:
            raise ValueError("a size looks like 65536, 64k, 1MiB or 1MB")
        size = int(float(found[1]) * _SIZES[found[2]])
    else:
        raise ValueError("a size looks like 65536, 64k, 1MiB or 1MB")
    if not lowest <= size <= highest:
        raise ValueError(f"the size must be {lowest}..{highest} bytes")
    return size


def parse_whole(value: object, lowest: int, highest: int) -> int:
    """A whole number between two bounds, both allowed."""
    if isinstance(value, int) and not isinstance(value, bool):
        number = value
    elif re.fullmatch(r"-?\d{1,18}", text := parse_text(value), re.ASCII):
        number = int(text)
    else:
        raise ValueError(f"a whole number {lowest}..{highest} is needed")
    if not lowest <= number <= highest:
        raise ValueError(f"the number must be {lowest}..{highest}")
    return number


def parse_workers(value: object) -> int:
    """How many processes: a number, or ``auto`` for one on each processor."""
    if value == "auto":
        return _processors()
    try:
        return parse_whole(value, 1, MOST_PROCESSES)
    except ValueError:
        raise ValueError(f"a number 1..{MOST_PROCESSES}, or auto, is needed") from None


def parse_processes(value: object) -> Range:
    """How many processes: a number, two as in ``1-4``, or ``auto`` for one to as many as there are processors."""
    if isinstance(value, Range):
        return value
    if value == "auto":
        return Range(1, _processors())
    low, dash, high = (str(value) if isinstance(value, int) else parse_text(value)).partition("-")
    try:
        lowest = parse_whole(low, 1, MOST_PROCESSES)
        highest = parse_whole(high, lowest, MOST_PROCESSES) if dash else lowest
    except ValueError:
        raise ValueError(f"a number 1..{MOST_PROCESSES}, two such as 1-4, or auto is needed") from None
    return Range(lowest, highest)


def _processors() -> int:
    """Those that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return min(len(os.sched_getaffinity(0)), MOST_PROCESSES)
    return min(os.cpu_count() or 1, MOST_PROCESSES)


def parse_switch(value: object) -> bool:
    """On or off."""
    if isinstance(value, bool):
        return value
    match parse_text(value).lower():
        case "1" | "true" | "yes" | "on":
            return True
        case "0" | "false" | "no" | "off":
            return False
    raise ValueError("this is a switch: true or false")


def split_list(value: object) -> list[str]:
    """The items of a list; of a text, and of each item, what commas separate."""
    items = value if isinstance(value, list | tuple) else [value]
    return [part for item in items for part in (piece.strip() for piece in parse_text(item).split(",")) if part]


def parse_networks(value: object) -> tuple[Network, ...]:
    """IP addresses and networks in CIDR form."""
    if isinstance(value, tuple) and all(
        isinstance(item, ipaddress.IPv4Network | ipaddress.IPv6Network) for item in value
    ):
        return value
    return tuple(_network(item) for item in split_list(value))


def parse_domain(value: object) -> str:
    """A DNS name in lower case and without its final dot; an international one in its ``xn--`` form."""
    return normalise_host(parse_text(value))


def parse_host_header(value: object) -> str:
    """``preserve``, ``backend``, or the Host to send to the backend."""
    text = parse_text(value)
    if not _HOST_HEADER.fullmatch(text):
        raise ValueError("preserve, backend, or a host such as app.example.com is needed")
    return text


def parse_target(value: object) -> str:
    """A path and query to ask an HTTP server for."""
    text = parse_text(value)
    if not text.startswith("/"):
        raise ValueError("a path begins with /, as in /healthz")
    if not _TARGET.fullmatch(text):
        raise ValueError("a path has no white space, no # and nothing outside ASCII: write such characters as %20")
    return text


def parse_path(value: object) -> Path:
    """A path; ``~`` is the home directory."""
    if isinstance(value, Path):
        return value
    text = parse_text(value)
    if "\0" in text:
        raise ValueError("a path cannot hold a NUL")
    try:
        return Path(text).expanduser()
    except RuntimeError:
        raise ValueError(f"there is no such user's home: {text.partition('/')[0]}") from None


def _host_and_port(text: str) -> tuple[str, str | None]:
    if text.startswith("["):
        inside, bracket, rest = text[1:].partition("]")
        if not bracket or (rest and not rest.startswith(":")):
            raise ValueError("an IPv6 address and port look like [::1]:8080")
        return _ipv6(inside), rest[1:] if rest else None
    if text.count(":") > 1:
        return _ipv6(text), None
    host, colon, port = text.partition(":")
    if not host:
        raise ValueError("a host is missing, as in 127.0.0.1:8080, or 0.0.0.0:8080 for every address of this machine")
    if not re.fullmatch(r"[0-9.]+", host):
        host = normalise_host(host)
    elif not _is_ip(host):
        raise ValueError(f"{host!r} is not an IP address")
    return host, port if colon else None


def _ipv6(text: str) -> str:
    try:
        return str(ipaddress.IPv6Address(text))
    except ValueError:
        raise ValueError(f"{text!r} is not an IPv6 address") from None


def _is_ip(text: str) -> bool:
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return False
    return True


def _port(text: str, *, lowest: int) -> int:
    if not re.fullmatch(r"\d{1,5}", text, re.ASCII) or not lowest <= int(text) <= 65535:
        raise ValueError("the port must be 1..65535" + (", or 0 for any free one" if lowest == 0 else ""))
    return int(text)


def _network(text: str) -> Network:
    try:
        return ipaddress.ip_network(text)
    except ValueError as error:
        raise ValueError(f"{text!r} is not an IP address or network: {error}") from None
