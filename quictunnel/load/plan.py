"""What a load test is asked to do: options read from text, checked at the door.

Every parser raises ValueError with a sentence that can be shown as it is.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, NamedTuple
from urllib.parse import urlsplit

from quictunnel.load.figures import requests_of

__all__ = [
    "LoadOptions",
    "MaxErrors",
    "Request",
    "Target",
    "make_options",
    "make_request",
    "parse_header",
    "parse_max_errors",
    "parse_max_p99",
    "parse_stages",
    "parse_target",
]

MAXIMUM_STAGES: Final = 1000
MAXIMUM_RATE: Final = 1_000_000.0
MAXIMUM_BODY: Final = 2**30
MAXIMUM_HEADERS: Final = 100
MAXIMUM_CONNECTIONS: Final = 60_000

BLOCK: Final = 65536
"bytes handed to a socket at a time: what one slow upload may hold"

_NUMBER: Final = re.compile(r"\d+(?:\.\d+)?", re.ASCII)
_TOKEN: Final = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+", re.ASCII)  # RFC 9110 section 5.6.2
_VALUE: Final = re.compile(r"[\t\x20-\x7e\x80-\xff]*")  # RFC 9110 section 5.5
_TARGET: Final = re.compile(r"[\x21-\x7e]*")
_HOST: Final = re.compile(r"[A-Za-z0-9._:-]+", re.ASCII)

# The generator frames its requests itself and speaks HTTP/1.1 only.
_OWN_HEADERS: Final = frozenset({"content-length", "transfer-encoding", "upgrade"})


class Target(NamedTuple):
    """Where the requests go."""

    secure: bool
    host: str
    "a name in ASCII, or an IP address without brackets"

    port: int
    authority: str
    "as in the Host field"

    path: str
    "with the query"

    @property
    def label(self) -> str:
        """The URL without its query, which may hold a secret."""
        path, mark, _ = self.path.partition("?")
        return f"{'https' if self.secure else 'http'}://{self.authority}{path}{'?…' if mark else ''}"


@dataclass(frozen=True, slots=True)
class MaxErrors:
    """How many requests may fail: ``count`` in the whole run, or ``share`` (0 to 1) of each stage."""

    text: str
    count: int | None = None
    share: float | None = None


class Request(NamedTuple):
    """The bytes of one request; every request of a run is the same."""

    head: bytes
    body: bytes
    "all of it, or the block that ``size`` bytes are made of"

    size: int
    "bytes of the body"

    is_head: bool
    "whether the method is HEAD: its answer has no body (RFC 9110 section 9.3.2)"

    def block(self, offset: int) -> bytes:
        """The bytes of the body from ``offset`` on, at most ``BLOCK`` of them."""
        size = min(BLOCK, self.size - offset)
        if len(self.body) == self.size:
            return self.body[offset : offset + size]
        return self.body[:size]


@dataclass(frozen=True, slots=True)
class LoadOptions:
    """A whole load test; made by ``make_options``, or directly from values known to be sound."""

    target: Target
    stages: tuple[float, ...]
    "requests a second, one stage after the other"

    duration: float = 30.0
    "seconds of each stage"

    timeout: float = 30.0
    "seconds from a request's scheduled time after which it has failed"

    method: str = "GET"
    headers: tuple[tuple[str, str], ...] = field(default=(), repr=False)
    body: bytes = field(default=b"", repr=False)
    body_size: int | None = None
    "bytes of a made-up body, instead of ``body``"

    connections: int = 4096
    "open at a time, at most"

    ca: Path | None = None
    insecure: bool = False
    max_errors: MaxErrors | None = None
    max_p99: float | None = None
    "milliseconds"

    json: bool = False


def make_options(
    url: str,
    *,
    stages: str = "20,50,100,200,500,1000",
    duration: float = 30.0,
    timeout: float = 30.0,
    method: str = "GET",
    header: Iterable[str] = (),
    body: str | None = None,
    body_size: int | None = None,
    connections: int = 4096,
    ca: Path | None = None,
    insecure: bool = False,
    max_errors: str | None = None,
    max_p99: str | None = None,
    json: bool = False,
) -> LoadOptions:
    """Options from what a user typed; raises ValueError. ``body`` may be ``@FILE``."""
    target = parse_target(url)
    if (ca is not None or insecure) and not target.secure:
        raise ValueError("--ca and --insecure are for an https:// URL")
    if ca is not None and insecure:
        raise ValueError("--ca and --insecure contradict each other: give one")
    if body is not None and body_size is not None:
        raise ValueError("--body and --body-size contradict each other: give one")
    if body_size is not None and not 0 <= body_size <= MAXIMUM_BODY:
        raise ValueError(f"--body-size must be 0 to {MAXIMUM_BODY} bytes")
    if not 1 <= connections <= MAXIMUM_CONNECTIONS:
        raise ValueError(f"--connections must be 1 to {MAXIMUM_CONNECTIONS}")
    for name, seconds in (("--duration", duration), ("--timeout", timeout)):
        if not 0 < seconds <= 86400:
            raise ValueError(f"{name} must be more than 0 and at most a day")
    rates = parse_stages(stages)
    for rate in rates:
        if requests_of(rate, duration) < 1:
            raise ValueError(f"a stage of {rate:g} requests a second for {duration:g} s has no request")
    return LoadOptions(
        target=target,
        stages=rates,
        duration=duration,
        timeout=timeout,
        method=_parse_method(method),
        headers=_parse_headers(header),
        body=_parse_body(body),
        body_size=body_size,
        connections=connections,
        ca=ca,
        insecure=insecure,
        max_errors=None if max_errors is None else parse_max_errors(max_errors),
        max_p99=None if max_p99 is None else parse_max_p99(max_p99),
        json=json,
    )


def make_request(options: LoadOptions) -> Request:
    """The request's bytes (RFC 9112 section 3); fields that the user gave replace the default ones."""
    size = len(options.body) if options.body_size is None else options.body_size
    fields = {
        "host": ("Host", options.target.authority),
        "user-agent": ("User-Agent", "quictunnel-load"),
        "accept": ("Accept", "*/*"),
    }
    if size or options.method in ("POST", "PUT", "PATCH"):  # RFC 9110 section 8.6
        fields["content-length"] = ("Content-Length", str(size))
    given = {name.lower() for name, _ in options.headers}
    lines = [f"{name}: {value}" for key, (name, value) in fields.items() if key not in given]
    lines += [f"{name}: {value}" for name, value in options.headers]
    head = "\r\n".join([f"{options.method} {options.target.path} HTTP/1.1", *lines, "", ""]).encode("latin-1")
    body = options.body if options.body_size is None else b"x" * min(size, BLOCK)
    return Request(head, body, size, options.method == "HEAD")


def parse_stages(text: str) -> tuple[float, ...]:
    """Requests a second of each stage, from ``20,50,100``."""
    items = [item.strip() for item in text.split(",")]
    if len(items) > MAXIMUM_STAGES:
        raise ValueError(f"at most {MAXIMUM_STAGES} stages are possible")
    rates = []
    for item in items:
        if not _NUMBER.fullmatch(item) or not 0 < float(item) <= MAXIMUM_RATE:
            raise ValueError(
                f"stages are requests a second such as 20,50,100, each above 0 and at most {MAXIMUM_RATE:.0f};"
                f" {item!r} is not"
            )
        rates.append(float(item))
    return tuple(rates)


def parse_target(url: str) -> Target:
    """An ``http://`` or ``https://`` URL; path and query are kept byte-exact."""
    scheme, separator, rest = url.partition("://")
    if not separator or scheme.lower() not in ("http", "https"):
        raise ValueError("the URL must begin with http:// or https://")
    rest = rest.partition("#")[0]
    cut = min((place for place in (rest.find("/"), rest.find("?")) if place >= 0), default=len(rest))
    path = rest[cut:] if rest[cut:].startswith("/") else "/" + rest[cut:]
    if not _TARGET.fullmatch(path):
        raise ValueError("the URL has characters that must be percent-encoded")
    secure = scheme.lower() == "https"
    host, port = _parse_authority(rest[:cut])
    shown = f"[{host}]" if ":" in host else host
    default = 443 if secure else 80
    return Target(secure, host, default if port is None else port, shown if port is None else f"{shown}:{port}", path)


def parse_header(line: str) -> tuple[str, str]:
    """A field from ``Name: value``."""
    name, colon, value = line.partition(":")
    value = value.strip(" \t")
    if not colon or not _TOKEN.fullmatch(name) or not _VALUE.fullmatch(value):
        raise ValueError("a header looks like 'Name: value'")
    if name.lower() in _OWN_HEADERS:
        raise ValueError(f"the header {name} is made by the load test itself")
    return name, value


def parse_max_errors(text: str) -> MaxErrors:
    """``5``: requests of the whole run; ``0.1%``: of each stage's requests."""
    plain = text.strip()
    if re.fullmatch(r"\d{1,12}", plain, re.ASCII):
        return MaxErrors(plain, count=int(plain))
    number = plain.removesuffix("%").rstrip()
    if plain.endswith("%") and _NUMBER.fullmatch(number) and float(number) <= 100:
        return MaxErrors(plain, share=float(number) / 100)
    raise ValueError("--max-errors is a number of requests such as 5, or a share such as 0.1%")


def parse_max_p99(text: str) -> float:
    """Milliseconds from ``60`` or ``60ms``."""
    number = text.strip().removesuffix("ms").rstrip()
    if not _NUMBER.fullmatch(number) or not 0 < float(number) < 1e9:
        raise ValueError("--max-p99 is a number of milliseconds such as 60")
    return float(number)


def _parse_authority(text: str) -> tuple[str, int | None]:
    if "@" in text:
        raise ValueError("the URL must not hold a user name or password: use --header 'Authorization: …'")
    try:
        parts = urlsplit("//" + text)
        host, port = parts.hostname or "", parts.port
    except ValueError:
        raise ValueError(f"{text!r} is not a host and port") from None
    if not host.isascii():
        try:
            host = host.encode("idna").decode("ascii")
        except UnicodeError:
            raise ValueError(f"{host!r} is not a host name") from None
    if not _HOST.fullmatch(host) or port == 0:
        raise ValueError(f"{text!r} is not a host and port")
    return host, port


def _parse_method(text: str) -> str:
    method = text.strip()
    if not _TOKEN.fullmatch(method) or method.upper() == "CONNECT":
        raise ValueError("--method is a method such as GET or POST, and not CONNECT")
    return method.upper() if method.upper() in ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS") else method


def _parse_headers(lines: Iterable[str]) -> tuple[tuple[str, str], ...]:
    headers = tuple(parse_header(line) for line in lines)
    if len(headers) > MAXIMUM_HEADERS:
        raise ValueError(f"at most {MAXIMUM_HEADERS} headers are possible")
    return headers


def _parse_body(text: str | None) -> bytes:
    if text is None:
        return b""
    if not text.startswith("@"):
        return text.encode()
    try:
        with Path(text[1:]).expanduser().open("rb") as file:
            body = file.read(MAXIMUM_BODY + 1)
    except OSError as error:
        raise ValueError(f"--body: {text[1:]} cannot be read: {error.strerror}") from None
    if len(body) > MAXIMUM_BODY:
        raise ValueError(f"--body: {text[1:]} is larger than {MAXIMUM_BODY} bytes")
    return body
