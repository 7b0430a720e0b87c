"""How a backend is reached: a socket, TLS over it, and what it means to a visitor when there is none to be had."""

import asyncio
import errno
import ipaddress
import re
import socket
import ssl
from collections.abc import Callable
from typing import Any, Final, TypeVar

from quictunnel.wire.errors import ErrorCode, TunnelError

__all__ = ["Dialler"]

# RFC 8305 section 8
_SECOND_ADDRESS_DELAY: Final = 0.25
# Seconds for a TLS connection to say goodbye.
_TLS_GOODBYE: Final = 5.0

_BY_ERRNO: Final = {
    errno.ECONNREFUSED: ErrorCode.CONNECTION_REFUSED,
    errno.ENOENT: ErrorCode.CONNECTION_REFUSED,  # no such unix socket
    errno.EACCES: ErrorCode.CONNECTION_REFUSED,  # a unix socket of somebody else
    errno.ENOTSOCK: ErrorCode.CONNECTION_REFUSED,
    errno.EAGAIN: ErrorCode.CONNECTION_REFUSED,  # a unix socket whose backlog is full
    errno.ETIMEDOUT: ErrorCode.CONNECTION_TIMEOUT,
    errno.ENETUNREACH: ErrorCode.DESTINATION_IP_UNROUTABLE,
    errno.EHOSTUNREACH: ErrorCode.DESTINATION_IP_UNROUTABLE,
    errno.EADDRNOTAVAIL: ErrorCode.DESTINATION_IP_UNROUTABLE,
    errno.EMFILE: ErrorCode.CONNECTION_LIMIT_REACHED,
    errno.ENFILE: ErrorCode.CONNECTION_LIMIT_REACHED,
}

_P = TypeVar("_P", bound=asyncio.Protocol)


class Dialler:
    """Makes connections to one backend."""

    def __init__(
        self,
        host: str = "localhost",
        port: int = 80,
        *,
        path: str | None = None,
        tls: ssl.SSLContext | None = None,
        server_hostname: str | None = None,
        authority: str = "",
        connect_time: float = 10.0,
    ) -> None:
        """Dial ``host`` and ``port``, or the unix socket at ``path``, within ``connect_time`` seconds, TLS included.

        ``server_hostname`` is the name that the backend's certificate must hold, ``host`` if None. ``authority`` is the
        Host that the backend knows itself by.
        """
        self._address = (host, port)
        self._path = path
        self.tls = tls
        self._server_hostname = server_hostname
        self._connect_time = connect_time
        place = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        self.name = f"unix:{path}" if path else f"{'https' if tls else 'http'}://{place}"
        self.authority = authority or ("localhost" if path else place)

    async def dial(self, protocol: Callable[[], _P]) -> _P:
        """A connection that ``protocol`` speaks on. Raises TunnelError."""
        try:
            async with asyncio.timeout(self._connect_time):
                return await self.connect(protocol)
        except Exception as error:
            raise self._translate(error) from error

    async def connect(self, protocol: Callable[[], _P]) -> _P:
        """As ``dial``, without its limit and with whatever errors there are."""
        loop = asyncio.get_running_loop()
        options: dict[str, Any] = {}
        if self.tls is not None:
            options["ssl"] = self.tls
            options["server_hostname"] = self._server_hostname or self._address[0]
            options["ssl_handshake_timeout"] = 2 * self._connect_time  # never the first to fire
            options["ssl_shutdown_timeout"] = _TLS_GOODBYE
        if self._path is not None:
            _, connection = await loop.create_unix_connection(protocol, self._path, **options)
            return connection
        host, port = self._address
        # Not where it can't help: asyncio's race leaves sockets to the garbage collector when it is cancelled, as
        # visitors who go away cancel it. uvloop has none, and tries one address after the other.
        if isinstance(loop, asyncio.BaseEventLoop) and host != "localhost" and not _is_address(host):
            options["happy_eyeballs_delay"] = _SECOND_ADDRESS_DELAY
        try:
            _, connection = await loop.create_connection(protocol, host, port, **options)
        except OSError as error:
            if host != "localhost" or _errno(error) != errno.ECONNREFUSED:
                raise
            # The name means both loopbacks (RFC 6761 section 6.3), but many hosts files know one of them only, and many
            # a development server listens on the other.
            _, connection = await loop.create_connection(protocol, "::1", port, **options)
        return connection

    def _translate(self, error: Exception) -> TunnelError:
        if isinstance(error, TimeoutError):
            return TunnelError(ErrorCode.CONNECTION_TIMEOUT)
        if isinstance(error, socket.gaierror):
            return TunnelError(ErrorCode.DNS_ERROR)
        if isinstance(error, ssl.SSLCertVerificationError):
            return TunnelError(ErrorCode.TLS_CERTIFICATE_ERROR)
        if isinstance(error, ssl.SSLError):
            return TunnelError(ErrorCode.TLS_ERROR)
        if isinstance(error, OSError):
            code = _BY_ERRNO.get(_errno(error))
            if code is ErrorCode.CONNECTION_LIMIT_REACHED:
                return TunnelError(code, "The tunnel's client can open no more files (ulimit -n).")
            if code is not None:
                return TunnelError(code)
            # The connection stood when it was lost, so it is the handshake that failed.
            return TunnelError(ErrorCode.TLS_ERROR if self.tls else ErrorCode.CONNECTION_TERMINATED)
        return TunnelError(ErrorCode.INTERNAL_ERROR, f"dialling the backend failed with {type(error).__name__}")


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def _errno(error: OSError) -> int:
    # Several addresses that fail each in its own way come as one error without a number, its text made of theirs.
    found = re.search(r"\[Errno (\d+)\]", str(error))
    return error.errno or (int(found[1]) if found else 0)
