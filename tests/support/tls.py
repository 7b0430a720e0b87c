"""TLS clients and servers in memory and on sockets: a CA of one's own, and handshakes that are shown step by step."""

import asyncio
import importlib.util
import ssl
from collections.abc import Callable
from pathlib import Path

import pytest

__all__ = ["LOOPS", "client_context", "client_hello", "handshake"]


def _loops() -> dict[str, Callable[[], asyncio.AbstractEventLoop]]:
    if importlib.util.find_spec("uvloop") is None:
        return {"asyncio": asyncio.SelectorEventLoop}
    import uvloop

    return {"asyncio": asyncio.SelectorEventLoop, "uvloop": uvloop.new_event_loop}


LOOPS = [pytest.param(make, id=name) for name, make in _loops().items()]
"ways to make an event loop, as parameters of a test"


def client_context(authority: Path | str, *alpn: str) -> ssl.SSLContext:
    """A client that trusts that CA's file alone, and checks names."""
    context = ssl.create_default_context(cafile=str(authority))
    if alpn:
        context.set_alpn_protocols(list(alpn))
    return context


def handshake(
    server_side: ssl.SSLContext, client_side: ssl.SSLContext, name: str | None
) -> tuple[ssl.SSLObject, ssl.SSLObject]:
    """Shake hands in memory: the server's object and the client's. Raises ssl.SSLError for either."""
    upward, downward = ssl.MemoryBIO(), ssl.MemoryBIO()
    server = server_side.wrap_bio(upward, downward, server_side=True)
    client = client_side.wrap_bio(downward, upward, server_hostname=name)
    left = [client, server]
    while left:
        for each in list(left):
            try:
                each.do_handshake()
                left.remove(each)
            except ssl.SSLWantReadError:
                pass
    return server, client


def client_hello(name: str) -> bytes:
    """The first bytes of a client that asks for that name."""
    upward = ssl.MemoryBIO()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    with pytest.raises(ssl.SSLWantReadError):
        context.wrap_bio(ssl.MemoryBIO(), upward, server_hostname=name).do_handshake()
    return upward.read()
