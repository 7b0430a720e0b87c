"""What a server shows of itself: its certificate, and who vouches for it."""

import socket
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Final, NamedTuple

from loguru import logger

from quictunnel.quic.engine import ServerIdentity
from quictunnel.trust.certificates import Issuer, check_pair, ensure_server_certificate, load_authorities, show

if TYPE_CHECKING:
    from quictunnel.settings import ServeSettings

__all__ = ["WILDCARDS", "Identity", "identity_of", "outward_address"]

WILDCARDS: Final = ("0.0.0.0", "::", "")


class Identity(NamedTuple):
    """What a server shows of itself."""

    files: ServerIdentity
    authority: str
    "PEM, empty when its clients rely on the system's trust"

    pin: bytes | None

    issuer: Issuer | None
    "of certificates for single tunnels and custom hosts, which the server's own cannot be for"


def identity_of(settings: "ServeSettings", quic_host: str) -> Identity:
    """The certificate of the settings, or the state directory's own, made or renewed if need be. Raises TrustError."""
    now = datetime.now(UTC)
    if settings.cert is None or settings.key is None:
        ensured = ensure_server_certificate(settings.state_dir, _names(settings, quic_host), now)
        if ensured.changed:
            logger.info("issued the server certificate {}: {}", ensured.certificate, ensured.reason)
        files = ServerIdentity(str(ensured.certificate), str(ensured.key))
        issuer = Issuer(settings.state_dir, now) if settings.https is not None else None
        return Identity(files, ensured.authority.read_text("ascii"), ensured.pin, issuer)
    described = check_pair(settings.cert, settings.key, now)
    if described.days_left < 14:
        logger.warning("the certificate {} has {} days left", settings.cert, described.days_left)
    files = ServerIdentity(str(settings.cert), str(settings.key))
    if settings.ca is None:
        return Identity(files, "", None, None)
    return Identity(files, load_authorities(settings.ca, now).decode("ascii"), show(settings.ca)[0].pin, None)


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
