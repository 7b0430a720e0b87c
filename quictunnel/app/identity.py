"""What a server shows of itself: its certificate, and who vouches for it.

What reads and makes certificates takes 8 MB. A server on qh3 needs it for nothing else, so it is asked by a process
beside at the start, and loaded into this one when the certificate is due, or at SIGHUP.
"""

import os
import socket
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Final, NamedTuple

from loguru import logger

from quictunnel.app.beside import beside
from quictunnel.quic.engine import ServerIdentity

if TYPE_CHECKING:
    from quictunnel.settings import ServeSettings
    from quictunnel.trust.certificates import Issuer

__all__ = ["WILDCARDS", "Identity", "begin_identity", "identity_of", "outward_address"]

WILDCARDS: Final = ("0.0.0.0", "::", "")

_WARNING_DAYS: Final = 14
"before a certificate that somebody else has to renew expires"


class Identity(NamedTuple):
    """What a server shows of itself."""

    files: ServerIdentity
    authority: str
    "PEM, empty when its clients rely on the system's trust"

    pin: bytes | None

    issuer: "Issuer | None"
    "of certificates for single tunnels and custom hosts, which the server's own cannot be for"

    good_until: datetime = datetime.min.replace(tzinfo=UTC)
    "when it is to be looked at again, to be renewed or warned of"

    stamps: tuple[tuple[Path, tuple[int, ...]], ...] = ()
    "the files that it is of, and how they were"

    def is_due(self, now: datetime) -> bool:
        """Whether it may be another by now, or is soon to be."""
        return now >= self.good_until or any(_stamp(path) != stamp for path, stamp in self.stamps)


def begin_identity(settings: "ServeSettings", quic_host: str) -> Callable[[], Identity]:
    """Begin to find the certificate of the settings. What is returned does as ``identity_of`` does.

    To be called before this process has threads.
    """
    work = partial(identity_of, settings, quic_host)
    if settings.https is not None or not hasattr(os, "fork"):
        return work  # an issuer of certificates is to stay
    return beside(work)


def identity_of(settings: "ServeSettings", quic_host: str) -> Identity:
    """The certificate of the settings, or the state directory's own, made or renewed if need be. Raises TrustError."""
    from quictunnel.trust.certificates import Issuer, check_pair, ensure_server_certificate, load_authorities, show

    now = datetime.now(UTC)
    if settings.cert is None or settings.key is None:
        ensured = ensure_server_certificate(settings.state_dir, _names(settings, quic_host), now)
        if ensured.changed:
            logger.info("issued the server certificate {}: {}", ensured.certificate, ensured.reason)
        files = ServerIdentity(str(ensured.certificate), str(ensured.key))
        issuer = Issuer(settings.state_dir, now) if settings.https is not None else None
        stamps = _stamps(ensured.certificate, ensured.key, ensured.authority)
        shown = show(ensured.certificate)[0]
        due = shown.not_after - (shown.not_after - shown.not_before) / 3  # as ensure_server_certificate has it
        return Identity(files, ensured.authority.read_text("ascii"), ensured.pin, issuer, due, stamps)
    described = check_pair(settings.cert, settings.key, now)
    if described.days_left < _WARNING_DAYS:
        logger.warning("the certificate {} has {} days left", settings.cert, described.days_left)
    files = ServerIdentity(str(settings.cert), str(settings.key))
    due = described.not_after - timedelta(days=_WARNING_DAYS)
    if settings.ca is None:
        return Identity(files, "", None, None, due, _stamps(settings.cert, settings.key))
    stamps = _stamps(settings.cert, settings.key, settings.ca)
    pin = show(settings.ca)[0].pin
    return Identity(files, load_authorities(settings.ca, now).decode("ascii"), pin, None, due, stamps)


def _stamps(*paths: Path) -> tuple[tuple[Path, tuple[int, ...]], ...]:
    return tuple((path, _stamp(path)) for path in paths)


def _stamp(path: Path) -> tuple[int, ...]:
    try:
        found = path.stat()
    except OSError:
        return ()
    return found.st_mtime_ns, found.st_size, found.st_ino


def _names(settings: "ServeSettings", quic_host: str) -> list[str]:
    """What the server's certificate is for: every name and address that clients, and visitors by TLS, may dial."""
    names = ["localhost", "127.0.0.1", "::1"]
    if settings.domain != "localhost":
        names.append(settings.domain)
    if "." in settings.domain:
        names.append(f"*.{settings.domain}")
    if settings.advertise is not None:
        names.append(settings.advertise[0])
    hosts = [quic_host] if settings.https is None else [quic_host, settings.https.host]
    names += [host if host not in WILDCARDS else outward_address() for host in hosts]
    return list(dict.fromkeys(names))


def outward_address() -> str:
    """This machine's address on the way out; nothing is sent to find it."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        try:
            sock.connect(("192.0.2.1", 9))  # TEST-NET-1 (RFC 5737): routed like any address, and nobody's
            return str(sock.getsockname()[0])
        except OSError:
            return "127.0.0.1"
