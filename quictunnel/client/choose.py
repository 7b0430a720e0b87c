"""From what a user names as BACKEND to the backend itself."""

import ssl
from pathlib import Path

from quictunnel.backends.asgi import AsgiBackend, load_application
from quictunnel.backends.target import Target, parse_backend
from quictunnel.http.origin import Origin, OriginLimits

__all__ = ["open_backend"]


async def open_backend(
    text: str,
    *,
    ca: Path | None = None,
    insecure: bool = False,
    connect_time: float = 10.0,
    head_time: float = 60.0,
    keep_alive: float = 30.0,
) -> Origin | AsgiBackend:
    """The backend that ``text`` names, ready for exchanges; an application has been started, nothing has been dialled.

    ``ca`` is a file of PEM certificates to trust instead of the system's, ``insecure`` takes any certificate. In
    seconds: ``connect_time`` to connect, ``head_time`` for an answer's head, ``keep_alive`` for a connection that waits
    for its next request. Raises ValueError with a sentence for the user.
    """
    target = parse_backend(text)
    if target.kind != "https" and (ca is not None or insecure):
        raise ValueError(f"{target}: --backend-ca and --backend-insecure are for https:// backends")
    if target.kind == "asgi":
        return await _application(target, head_time)
    limits = OriginLimits(connect_time=connect_time, head_time=head_time, idle_keep_alive=keep_alive)
    if target.kind == "unix":
        return Origin(path=target.path, authority=target.authority, limits=limits)
    tls = _tls(ca, insecure) if target.kind == "https" else None
    return Origin(target.host, target.port, tls=tls, authority=target.authority, limits=limits)


async def _application(target: Target, head_time: float) -> AsgiBackend:
    app = load_application(target.application)
    backend = AsgiBackend(app, name=target.application, authority=target.authority, head_time=head_time)
    await backend.start()
    return backend


def _tls(ca: Path | None, insecure: bool) -> ssl.SSLContext:
    if ca is not None and insecure:
        raise ValueError("--backend-ca and --backend-insecure contradict each other: give one")
    try:
        context = ssl.create_default_context(cafile=ca)
    except ssl.SSLError as error:
        raise ValueError(f"{ca}: no certificates (PEM) can be read from it: {error.reason or error}") from None
    except OSError as error:
        raise ValueError(f"{ca}: {error.strerror}") from None
    context.set_alpn_protocols(["http/1.1"])
    if insecure:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    return context
