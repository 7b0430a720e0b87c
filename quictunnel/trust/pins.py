"""What a client needs to know of its server's CA: whether it is the one that was pinned, and good today.

It needs no more than the standard library: what reads and makes certificates is eight megabytes.
"""

import base64
import binascii
import hashlib
import hmac
import re
import ssl
from datetime import UTC, datetime
from typing import Any, Final

from quictunnel.trust.files import TrustError

__all__ = ["FILE_LIMIT", "check_dates", "pinned_authority"]

FILE_LIMIT: Final = 1024 * 1024
"bytes of a PEM file; a system's bundle of all public CAs has about 200 kB"

_CERTIFICATE: Final = re.compile(rb"-----BEGIN CERTIFICATE-----([^-]*)-----END CERTIFICATE-----")


def pinned_authority(pem: bytes, pin: bytes, now: datetime) -> bytes:
    """The PEM of the CA certificate that a stranger handed over, once it is seen to be the one that was pinned.

    ``pin`` is 32 bytes. Nothing but that one certificate is returned, however much came. Raises TrustError.
    """
    found = _CERTIFICATE.findall(pem[:FILE_LIMIT])
    if not found:
        raise TrustError("the server sent no CA certificate; is it a quictunnel server?")
    for text in found:
        try:
            der = base64.b64decode(text)
        except binascii.Error:
            continue
        if hmac.compare_digest(hashlib.sha256(der).digest(), pin):
            start, end = _validity_of_authority(der)
            check_dates(start, end, "the server's CA", now, "make a new CA on the server and a new join string")
            return ssl.DER_cert_to_PEM_cert(der).encode("ascii")
    raise TrustError(
        "the server's CA is not the one in the join string: either the server was set up anew (get a new join string), "
        "or something else answers at its address"
    )


def check_dates(start: datetime, end: datetime, what: str, now: datetime, advice: str) -> None:
    """Whether a certificate, told of as ``what``, is valid now. Raises TrustError, with ``advice`` if it is over."""
    if now > end:
        raise TrustError(f"{what} expired on {end:%Y-%m-%d %H:%M} UTC; {advice}")
    if now < start:
        raise TrustError(f"{what} is not valid before {start:%Y-%m-%d %H:%M} UTC; is the clock right?")


def _validity_of_authority(der: bytes) -> tuple[datetime, datetime]:
    """From when and until when a CA's certificate is valid. Raises TrustError for any other."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    try:
        context.load_verify_locations(cadata=der)
        certificate: dict[str, Any] = dict(context.get_ca_certs()[0])  # which lists CAs only
    except (ssl.SSLError, IndexError):
        certificate = {}
    if certificate.get("version") != 3:  # those of version 1 have no word for what they may be used for
        raise TrustError("the pinned certificate is not a CA's; get a new join string from the server")
    start, end = (ssl.cert_time_to_seconds(certificate[name]) for name in ("notBefore", "notAfter"))
    return datetime.fromtimestamp(start, UTC), datetime.fromtimestamp(end, UTC)
