"""A client's UDP socket and the link on it."""

import asyncio
import socket
from typing import Any

from loguru import logger

from quictunnel.quic.engine import ClientTrust, Engine
from quictunnel.quic.link import Link, LinkClosed, LinkOwner
from quictunnel.quic.sockets import DATAGRAM_SIZE, DatagramSocket, enlarge_buffers
from quictunnel.wire.credit import WindowBudget
from quictunnel.wire.errors import ErrorCode

__all__ = ["DialError", "dial"]

# TLS alerts as QUIC errors (RFC 9001 section 4.8, RFC 8446 section 6.2).
_CRYPTO_ERROR = 0x100
_CERTIFICATE_ALERTS = {42, 43, 44, 45, 46, 48, 49}


class DialError(Exception):
    """The server could not be reached, or is not the one that is trusted: then ``untrusted`` is True."""

    def __init__(self, text: str, *, untrusted: bool = False) -> None:
        self.untrusted = untrusted
        super().__init__(text)


class _Dialled:
    """Between a connected UDP socket and its link."""

    def __init__(self, sock: socket.socket, address: Any) -> None:
        self.address = address
        self.link: Link | None = None
        self.socket = DatagramSocket(sock, self._received, self._failed)

    def _received(self, data: bytes, address: Any) -> None:
        if self.link is not None:
            self.link.datagram_received(data, self.address)

    def _failed(self, error: OSError) -> None:
        # ICMP says that nobody listens there: a hint that comes long before any time-out. It may be forged, so it
        # only makes suspect.
        logger.debug("= QUIC socket to {}: {!r}", self.address, error)
        if self.link is not None and isinstance(error, ConnectionRefusedError):
            self.link.refused = True
            self.link.owner.link_refused(self.link)

    def terminated(self, link: Link) -> None:
        self.socket.close()


class _Waiter(LinkOwner):
    """Owns a link until its handshake is done."""

    def __init__(self, future: asyncio.Future[None]) -> None:
        self.future = future

    def link_ready(self, link: Link) -> None:
        if not self.future.done():
            self.future.set_result(None)

    def link_refused(self, link: Link) -> None:
        self._fail(DialError("nobody listens there (UDP)"))

    def link_closed(self, link: Link, why: LinkClosed) -> None:
        self._fail(why)

    def _fail(self, error: Exception) -> None:
        if not self.future.done():
            self.future.set_exception(error)


async def dial(
    engine: Engine, host: str, port: int, trust: ClientTrust, owner: LinkOwner, budget: WindowBudget, *, timeout: float
) -> Link:
    """Open a link to a server and verify it; ``timeout`` in seconds bounds the whole. Raises DialError."""
    loop = asyncio.get_running_loop()
    deadline = loop.time() + timeout
    try:
        async with asyncio.timeout_at(deadline):
            infos = await loop.getaddrinfo(host, port, type=socket.SOCK_DGRAM)
    except TimeoutError:
        raise DialError(f"resolving {host} took longer than {timeout:g} s") from None
    except OSError as error:
        raise DialError(f"cannot resolve {host}: {error.strerror or error}") from None
    failure = DialError(f"{host} has no address")
    for index, (family, _, _, _, address) in enumerate(infos[:4]):
        # Each further address gets an equal share of what is left, so that a dead one does not eat it all.
        share = (deadline - loop.time()) / (len(infos[:4]) - index)
        try:
            return await _dial_address(engine, family, address, trust, owner, budget, share)
        except DialError as error:
            failure = error
            if error.untrusted:
                break
    raise failure


async def _dial_address(
    engine: Engine,
    family: int,
    address: Any,
    trust: ClientTrust,
    owner: LinkOwner,
    budget: WindowBudget,
    timeout: float,
) -> Link:
    loop = asyncio.get_running_loop()
    place = f"{address[0]}:{address[1]}"
    sock = socket.socket(family, socket.SOCK_DGRAM)
    try:
        enlarge_buffers(sock)
        sock.connect(address)
    except OSError as error:
        sock.close()
        raise DialError(f"cannot send to {place}: {error.strerror or error}") from None
    dialled = _Dialled(sock, address)
    done: asyncio.Future[None] = loop.create_future()
    link = Link(engine, engine.dial(trust, DATAGRAM_SIZE), dialled.socket.send, _Waiter(done), budget, is_client=True)
    link.on_terminated = dialled.terminated
    dialled.link = link
    try:
        link.connect(address)
        async with asyncio.timeout(timeout):
            await done
        link.owner = owner
        return link
    except TimeoutError:
        raise DialError(f"{place}: no answer within {timeout:.1f} s (is UDP let through?)") from None
    except DialError as error:
        raise DialError(f"{place}: {error}") from None
    except LinkClosed as why:
        alert = why.code - _CRYPTO_ERROR
        raise DialError(f"{place}: {_explain(why)}", untrusted=alert in _CERTIFICATE_ALERTS) from None
    finally:
        if link.owner is not owner:
            link.close(ErrorCode.NO_ERROR, "")
            link.abandon(LinkClosed(0, ""))


def _explain(why: LinkClosed) -> str:
    if _CRYPTO_ERROR <= why.code < 2 * _CRYPTO_ERROR:
        return f"TLS failed: {why.reason or f'alert {why.code - _CRYPTO_ERROR}'}"
    return str(why)
