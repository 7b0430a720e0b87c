"""Names: what a tunnel may be called, which hosts may stand for it, and what a pattern of either covers.

Two spellings of one name must never be two names, or one client could take what another holds. So each kind of name has
one function that brings it into its only form, and every comparison is between such forms.

A pattern of tunnel names is a name in which ``*`` stands for any run of characters, none included: ``team-*`` covers
``team-a`` and ``team-a-b``, ``*`` covers all. There is no other special character. A pattern of hosts is a host name,
or ``*.`` and a host name: ``*.example.com`` covers ``a.example.com``, and neither ``example.com`` nor
``a.b.example.com`` (as in RFC 9525 section 6.3).
"""

import base64
import hashlib
import re
from typing import Final

__all__ = [
    "host_and_port",
    "host_matches",
    "made_up_word",
    "normalise_host",
    "normalise_host_pattern",
    "normalise_tunnel_name",
    "normalise_tunnel_pattern",
    "tunnel_matches",
]

LABEL_LIMIT: Final = 63
"characters of one DNS label (RFC 1035 section 2.3.4)"

HOST_LIMIT: Final = 253
"characters of a host name without its final dot (RFC 1035 section 2.3.4: 255 octets with first length and root)"

_LABEL: Final = re.compile(r"[a-z0-9](?:[a-z0-9-]*[a-z0-9])?")
_PATTERN: Final = re.compile(r"[a-z0-9*](?:[a-z0-9*-]*[a-z0-9*])?")


def normalise_tunnel_name(name: str) -> str:
    """The one form of a tunnel's name: a lower-case DNS label, 1 to 63 of a-z, 0-9 and inner dashes.

    RFC 1123 section 2.1. Raises ValueError with a sentence that says what is wrong.
    """
    return _label(name, "tunnel name", _LABEL, "a-z, 0-9 and -")


def normalise_tunnel_pattern(pattern: str) -> str:
    """The one form of a pattern of tunnel names. Raises ValueError."""
    form = _label(pattern, "tunnel pattern", _PATTERN, "a-z, 0-9, - and *")
    return re.sub(r"\*+", "*", form)


def tunnel_matches(pattern: str, name: str) -> bool:
    """Whether a pattern covers a name, both in their one form, in at most the product of their lengths of steps."""
    at = star = 0
    resume = -1
    position = 0
    while position < len(name):
        if at < len(pattern) and pattern[at] == "*":
            star, at, resume = at, at + 1, position
        elif at < len(pattern) and pattern[at] == name[position]:
            at, position = at + 1, position + 1
        elif resume >= 0:
            # The last star takes one character more: earlier stars never need to, they already took the least.
            resume += 1
            at, position = star + 1, resume
        else:
            return False
    return pattern[at:].strip("*") == ""


def normalise_host(host: str) -> str:
    """The one form of a DNS host name: lower case, no final dot, 1 to 253 characters in labels of 1 to 63.

    An international name is taken in its ``xn--`` form only. Raises ValueError, for an IP address too.
    """
    shown = _shown(host)
    form = _lower(host, "host name").removesuffix(".")
    if not 1 <= len(form) <= HOST_LIMIT:
        raise ValueError(f"the host name {shown} has {len(form)} characters; it needs 1 to {HOST_LIMIT}")
    labels = form.split(".")
    for label in labels:
        if len(label) > LABEL_LIMIT or not _LABEL.fullmatch(label):
            raise ValueError(
                f"{shown} is not a host name: each part between dots is 1 to {LABEL_LIMIT} of a-z, 0-9 and -, "
                "and neither begins nor ends with -"
            )
    if labels[-1].isdigit():
        raise ValueError(f"{shown} is not a host name: its last part is a number, as in an address")
    return form


def normalise_host_pattern(pattern: str) -> str:
    """The one form of a host name or of ``*.`` and a host name. Raises ValueError."""
    if pattern.startswith("*."):
        return "*." + normalise_host(pattern[2:])
    return normalise_host(pattern)


def host_and_port(host: str, port: int) -> str:
    """``HOST:PORT``, an IPv6 address in brackets (RFC 3986 section 3.2.2)."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def host_matches(pattern: str, host: str) -> bool:
    """Whether a host pattern covers a host, both in their one form; ``*.`` stands for exactly one label."""
    if pattern.startswith("*."):
        return host.partition(".")[2] == pattern[2:] and not host.startswith((".", "*"))
    return host == pattern


def made_up_word(session: str) -> str:
    """What stands for ``*`` in the name that a server gives to a session that asks for none: eight characters."""
    return base64.b32encode(hashlib.sha256(session.encode()).digest()[:5]).decode().lower()


def _label(text: str, what: str, allowed: re.Pattern[str], characters: str) -> str:
    form = _lower(text, what)
    if not form:
        raise ValueError(f"the {what} is empty")
    if len(form) > LABEL_LIMIT:
        raise ValueError(f"the {what} {_shown(text)} has {len(form)} characters; {LABEL_LIMIT} are allowed")
    if not allowed.fullmatch(form):
        raise ValueError(
            f"{_shown(text)} is not a {what}: it is one DNS label of {characters}, and neither begins nor ends with -"
        )
    return form


def _lower(text: str, what: str) -> str:
    # Before lower(): outside ASCII it maps some characters (the Kelvin sign) onto ASCII letters.
    if not text.isascii():
        raise ValueError(f"the {what} {_shown(text)} has characters outside ASCII; write it in its xn-- form")
    return text.lower()


def _shown(text: str) -> str:
    """Fit for a terminal and a log, whatever a peer sent."""
    return ascii(text if len(text) <= 80 else text[:77] + "...")
