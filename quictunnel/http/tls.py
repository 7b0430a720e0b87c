"""TLS for visitors: which certificate is shown, and what is kept of a handshake.

OpenSSL's users refuse a wildcard of two labels, ``*.localhost``. So where a server's domain is one label, each of its
tunnels is shown a certificate of its own, and custom hosts are everywhere. It is made when somebody first asks for the
tunnel by name (RFC 6066 section 3) and kept in memory; all hosts below a wildcard share one. Whoever asks for anything
else, or for nothing, is shown the server's certificate.
"""

import os
import ssl
import sys
import tempfile
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from ipaddress import ip_address
from pathlib import Path
from typing import Any, Final

from loguru import logger

__all__ = ["ALPN", "LEAVES", "VisitorSocket", "VisitorTls", "asked_host", "quiet_names"]

ALPN: Final = ("h2", "http/1.1")
"what visitors may speak (RFC 7301), the best first"

LEAVES: Final = 256
"certificates of single tunnels that are kept; each context takes some 20 kB"

# Forward secrecy and authenticated encryption: what RFC 9113 section 9.2.2 leaves of TLS 1.2. Those of TLS 1.3 all are.
_CIPHERS: Final = "ECDHE+AESGCM:ECDHE+CHACHA20"


class VisitorSocket(ssl.SSLObject):
    """The server's end of one handshake, and what the visitor said in it."""

    server_name: str = ""
    "the host asked for, in lower case; empty if none was, or an address"


def asked_host(ssl_object: object) -> str:
    """The host that a visitor asked for in its handshake, as ``VisitorSocket.server_name``; empty without TLS."""
    return ssl_object.server_name if isinstance(ssl_object, VisitorSocket) else ""


class VisitorTls:
    """What TLS needs of the server's certificate, present and future."""

    context: ssl.SSLContext
    "for the next handshake"

    def __init__(
        self,
        certificate: str,
        key: str,
        issue: Callable[[str], bytes] | None = None,
        name_of: Callable[[str], str] = lambda host: host,
    ) -> None:
        """``certificate`` and ``key`` are paths of PEM files. Raises OSError and ValueError if they cannot be used.

        ``issue`` makes a certificate for a name and its key, as PEM; empty for a name that has none of its own.
        ``name_of`` gives the name for a host, itself or a wildcard, empty for none.
        """
        # What ALPN offers is loaded before a visitor takes it up: 20 ms of the event loop's time.
        import quictunnel.http.http2_visitor  # noqa: F401

        self._name_of = name_of
        self._directory = str(Path(certificate).parent)
        self._leaves: OrderedDict[str, ssl.SSLContext] = OrderedDict()
        self.replace(certificate, key, issue)

    def __repr__(self) -> str:
        return f"<VisitorTls {self._certificate} and {len(self._leaves)} more>"

    def replace(self, certificate: str, key: str, issue: Callable[[str], bytes] | None = None) -> None:
        """Show these from now on. Raises OSError and ValueError and then changes nothing."""
        context = _context(certificate, key)
        context.sslobject_class = VisitorSocket
        context.sni_callback = self._asked
        self.context = context
        self._certificate = certificate
        self._issue = issue
        self._leaves.clear()

    def _asked(self, visitor: ssl.SSLObject, name: str | None, context: ssl.SSLContext) -> None:
        """A visitor has said whom it wants to reach."""
        host = _host(name)
        if host:
            visitor.server_name = host  # type: ignore[attr-defined]
            leaf = self._leaf(host)
            if leaf is not None:
                visitor.context = leaf

    def _leaf(self, host: str) -> ssl.SSLContext | None:
        leaves = self._leaves
        name = self._name_of(host)
        leaf = leaves.get(name)
        if leaf is None:
            # The server's certificate is the better answer than none: it says at least who is at fault.
            try:
                pem = self._issue(name) if self._issue is not None and name else b""
                if not pem:
                    return None
                leaf = leaves[name] = self._load(pem)
            except (OSError, ValueError) as error:
                logger.error("cannot make a certificate for {}: {}", name, error)
                return None
            if len(leaves) > LEAVES:
                leaves.popitem(last=False)
        else:
            leaves.move_to_end(name)
        return leaf

    def _load(self, pem: bytes) -> ssl.SSLContext:
        # Python's ssl takes files only: one that nobody else can read (mkstemp), for as long as reading it takes.
        descriptor, path = tempfile.mkstemp(prefix=".leaf.", dir=self._directory)
        try:
            with open(descriptor, "wb") as file:
                file.write(pem)
            return _context(path, path)
        finally:
            with suppress(FileNotFoundError):
                os.unlink(path)


@contextmanager
def quiet_names() -> Iterator[None]:
    """Keep server names outside ASCII off the process's standard error.

    Python refuses such a handshake before ``sni_callback`` is called, and prints a traceback that nobody can catch.
    """
    before = sys.unraisablehook

    def hook(raised: Any) -> None:
        if isinstance(raised.object, bytes) and isinstance(raised.exc_value, UnicodeDecodeError):
            logger.debug("= no TLS with a visitor: it asked for {!a}", raised.object[:80])
        else:
            before(raised)

    sys.unraisablehook = hook
    try:
        yield
    finally:
        sys.unraisablehook = before


def _context(certificate: str, key: str) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_ciphers(_CIPHERS)
    # A second handshake on a connection could ask for another host, and costs the server more than the visitor.
    context.options |= ssl.OP_NO_RENEGOTIATION | ssl.OP_CIPHER_SERVER_PREFERENCE
    context.set_alpn_protocols(list(ALPN))
    context.load_cert_chain(certificate, key, password=_no_password)
    return context


def _no_password(*_: Any) -> str:
    # Without this OpenSSL asks the terminal.
    raise ValueError("the key has a password; save it without: openssl pkcs8 -topk8 -nocrypt")


def _host(name: str | None) -> str:
    """The one form of a server name; empty for an address, which RFC 6066 section 3 does not allow there."""
    host = (name or "").lower().removesuffix(".")
    with suppress(ValueError):
        ip_address(host)
        return ""
    return host
