"""TLS clients and servers in memory and on sockets: a CA of one's own, and handshakes that are shown step by step."""

import ssl
from pathlib import Path

__all__ = ["client_context", "handshake"]


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
