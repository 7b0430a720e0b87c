"""What a user may name as BACKEND, read into plain values.

3000   :3000   localhost:3000   [::1]:3000      HTTP on a port
http://host[:port]   https://host[:port]        HTTP, in clear text or over TLS
unix:/path/to/socket                            HTTP on a unix socket
package.module:app   package.module:make()      an ASGI application, or a function that makes one, in this process
"""

import ipaddress
import re
from dataclasses import dataclass
from typing import Final, Literal

__all__ = ["Target", "parse_backend"]

_PORTS: Final = {"http": 80, "https": 443}
_NAME: Final = re.compile(r"[A-Za-z0-9_](?:[A-Za-z0-9_.-]{0,251}[A-Za-z0-9_.])?", re.ASCII)
_APPLICATION: Final = re.compile(r"[^\W\d]\w*(?:\.[^\W\d]\w*)*:[^\W\d]\w*(?:\.[^\W\d]\w*)*(?:\(\))?")
# Bytes of a unix socket's path: sun_path less its final NUL on Linux; other systems have a few less.
_PATH_LIMIT: Final = 107
_TEXT_LIMIT: Final = 2048
_EXAMPLES: Final = "give a port, HOST:PORT, http://HOST:PORT, https://HOST:PORT, unix:/PATH or MODULE:APP"


@dataclass(frozen=True, slots=True)
class Target:
    """A backend by kind; only the values of its kind are set."""

    kind: Literal["http", "https", "unix", "asgi"]

    host: str = ""
    "``http`` and ``https``: a name, or an IP address without brackets"

    port: int = 0
    "``http`` and ``https``"

    path: str = ""
    "``unix``: the socket"

    application: str = ""
    "``asgi``: ``module:attribute``, with ``()`` at its end for a function to be called first"

    @property
    def authority(self) -> str:
        """The Host that the backend knows itself by."""
        if self.kind not in _PORTS:
            return "localhost"
        host = self.host.partition("%")[0]  # a zone means nothing to the other end (RFC 9844 section 6)
        host = f"[{host}]" if ":" in host else host
        return host if self.port == _PORTS[self.kind] else f"{host}:{self.port}"

    def __str__(self) -> str:
        if self.kind == "unix":
            return f"unix:{self.path}"
        if self.kind == "asgi":
            return self.application
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{self.kind}://{host}:{self.port}"


def parse_backend(text: str) -> Target:
    """Read a BACKEND. Raises ValueError with a sentence that says what is wrong with it and what would be right."""
    text = text.strip()
    if not text:
        raise ValueError(f"no backend: {_EXAMPLES}")
    if len(text) > _TEXT_LIMIT or not text.isprintable():
        raise ValueError("the backend is too long or holds control characters")
    if text.startswith("unix:"):
        return _unix(text)
    scheme, mark, rest = text.partition("://")
    if mark:
        return _url(text, scheme.lower(), rest)
    if _is_port(text):
        return Target("http", "localhost", _port(text, text))
    if not _is_port(text.rpartition(":")[2]) and _APPLICATION.fullmatch(text):
        return Target("asgi", application=text)
    return _host_and_port(text)


def _unix(text: str) -> Target:
    path = text.removeprefix("unix:")
    if path.startswith("//"):
        # unix:///run/app.sock, the form of other tools; with a host in it, it would be a path that nobody meant.
        path = path[2:]
        if not path.startswith("/"):
            raise ValueError(f"{text!r}: write unix:/path/to/socket, with a full path after unix:")
    if not path:
        raise ValueError(f"{text!r}: the path of the socket is missing, as in unix:/run/app.sock")
    if len(path.encode()) > _PATH_LIMIT:
        raise ValueError(f"{text!r}: the path of a unix socket may have {_PATH_LIMIT} bytes, this one has more")
    return Target("unix", path=path)


def _url(text: str, scheme: str, rest: str) -> Target:
    if scheme not in ("http", "https"):
        hint = " (WebSockets pass through http:// and https:// backends)" if scheme in ("ws", "wss") else ""
        raise ValueError(f"{text!r}: the scheme {scheme!r} is unknown, use http:// or https://{hint}")
    place = re.split(r"[/?#]", rest, maxsplit=1)[0]
    tail = rest[len(place) :]
    if "@" in place:
        # Not shown again: what stands before the @ is a password more often than not.
        raise ValueError("the backend's URL holds a user name or password: leave out everything up to the @")
    if tail not in ("", "/"):
        raise ValueError(
            f"{scheme}://{place}: a backend has no path, query or fragment, for visitors' targets pass unchanged: "
            f"leave out {tail!r}"
        )
    host, colon, port = _split(place)
    if colon and not port:
        raise ValueError(f"{text!r}: the port after the colon is missing")
    number = _port(port, text) if port else _PORTS[scheme]
    return Target("https" if scheme == "https" else "http", _host(host, text), number)


def _host_and_port(text: str) -> Target:
    if "@" in text:
        raise ValueError("the backend holds a user name or password: leave out everything up to the @")
    host, colon, port = _split(text)
    if "/" in text or "?" in text or "#" in text:
        raise ValueError(f"{text!r}: a backend has no path, query or fragment: {_EXAMPLES}")
    if not colon:
        what = "a port is missing, as in localhost:3000" if "." not in text else "a port or an application is missing"
        raise ValueError(f"{text!r}: {what}: {_EXAMPLES}")
    if not _is_port(port):
        raise ValueError(f"{text!r}: neither HOST:PORT (the port is digits) nor MODULE:APP (Python names): {_EXAMPLES}")
    return Target("http", _host(host or "localhost", text), _port(port, text))


def _split(place: str) -> tuple[str, str, str]:
    """Host, colon and port, each as it stands there."""
    if place.startswith("["):
        host, _, rest = place.partition("]")
        return host + "]", rest[:1], rest[1:]
    if place.count(":") > 1:
        raise ValueError(f"{place!r}: put an IPv6 address into brackets, as in [::1]:3000")
    return place.partition(":")


def _host(host: str, text: str) -> str:
    if host.startswith("["):
        try:
            ipaddress.IPv6Address(host[1:-1])
        except ValueError:
            raise ValueError(f"{text!r}: {host!r} is not an IPv6 address in brackets") from None
        return host[1:-1]
    if not host:
        raise ValueError(f"{text!r}: the host is missing")
    if not _NAME.fullmatch(host):
        raise ValueError(f"{text!r}: {host!r} is not a host name")
    return host


def _is_port(text: str) -> bool:
    return text.isascii() and text.isdigit()


def _port(digits: str, text: str) -> int:
    if not _is_port(digits) or len(digits) > 5 or not 1 <= int(digits) <= 65535:
        raise ValueError(f"{text!r}: the port must be a number from 1 to 65535, not {digits!r}")
    return int(digits)
