"""From what a user names as BACKEND to the backend itself."""

import ssl
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quictunnel.backends.target import Target, parse_backend
from quictunnel.http.limits import OriginLimits
from quictunnel.http.origin import Origin
from quictunnel.wire.credit import WindowBudget

if TYPE_CHECKING:
    from quictunnel.backends.asgi import AsgiBackend
    from quictunnel.http.http2_origin import Http2Origin

__all__ = ["open_backend"]

# What speaks to a kind of backend is imported when there is one: a client should be there at once.


async def open_backend(
    text: str,
    *,
    ca: Path | None = None,
    insecure: bool = False,
    connect_time: float = 10.0,
    head_time: float = 60.0,
    body_idle_time: float | None = None,
    keep_alive: float = 30.0,
    http: str = "1.1",
    budget: WindowBudget | None = None,
) -> "Origin | Http2Origin | AsgiBackend":
    """The backend that ``text`` names, ready for exchanges; an application has been started, nothing has been dialled.

    ``http`` is the version that a backend on a socket speaks, ``1.1`` or ``2``; ``budget`` is what the windows of
    HTTP/2 grow out of. ``ca`` is a file of PEM certificates to trust instead of the system's, ``insecure`` takes any
    certificate. In seconds: ``connect_time`` to connect, ``head_time`` for an answer's head, ``body_idle_time`` for
    silence within its body (None for no limit, and for an application there is none), ``keep_alive`` for a connection
    that waits for its next request. Raises ValueError with a sentence for the user.
    """
    target = parse_backend(text)
    if target.kind != "https" and (ca is not None or insecure):
        raise ValueError(f"{target}: --backend-ca and --backend-insecure are for https:// backends")
    if target.kind == "asgi" and http != "1.1":
        raise ValueError(f"{target}: an application in this process speaks no HTTP: --backend-http is for the others")
    if target.kind == "asgi":
        return await _application(target, head_time)
    limits = OriginLimits(
        connect_time=connect_time, head_time=head_time, body_idle_time=body_idle_time, idle_keep_alive=keep_alive
    )
    tls = _tls(ca, insecure, "h2" if http == "2" else "http/1.1") if target.kind == "https" else None
    place: dict[str, Any] = (
        {"path": target.path} if target.kind == "unix" else {"host": target.host, "port": target.port}
    )
    if http == "2":
        from quictunnel.http.http2_origin import Http2Origin

        return Http2Origin(**place, tls=tls, authority=target.authority, limits=limits, budget=budget)
    return Origin(**place, tls=tls, authority=target.authority, limits=limits)


async def _application(target: Target, head_time: float) -> "AsgiBackend":
    from quictunnel.backends.asgi import AsgiBackend, load_application

    app = load_application(target.application)
    backend = AsgiBackend(app, name=target.application, authority=target.authority, head_time=head_time)
    await backend.start()
    return backend


def _tls(ca: Path | None, insecure: bool, alpn: str) -> ssl.SSLContext:
    if ca is not None and insecure:
        raise ValueError("--backend-ca and --backend-insecure contradict each other: give one")
    try:
        context = ssl.create_default_context(cafile=ca)
    except ssl.SSLError as error:
        raise ValueError(f"{ca}: no certificates (PEM) can be read from it: {error.reason or error}") from None
    except OSError as error:
        raise ValueError(f"{ca}: {error.strerror}") from None
    context.set_alpn_protocols([alpn])
    if insecure:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    return context
