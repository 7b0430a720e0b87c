"""ASGI applications for ``quictunnel connect tests.support.apps:app``."""

from collections.abc import Awaitable, Callable
from typing import Any

Event = dict[str, Any]


async def app(scope: Event, receive: Callable[[], Awaitable[Event]], send: Callable[[Event], Awaitable[None]]) -> None:
    """Answers with the method, the target, the Host and the body, in three pieces; knows that its lifespan ran."""
    if scope["type"] == "lifespan":
        while (await receive())["type"] != "lifespan.shutdown":
            await send({"type": "lifespan.startup.complete"})
        print("application stopped", flush=True)
        await send({"type": "lifespan.shutdown.complete"})
        return
    body, more = b"", True
    while more:
        event = await receive()
        body += event.get("body", b"")
        more = event.get("more_body", False)
    if scope["path"] == "/raise":
        raise RuntimeError("as asked")
    host = dict(scope["headers"]).get(b"host", b"")
    target = scope["raw_path"] + (b"?" + scope["query_string"] if scope["query_string"] else b"")
    await send({"type": "http.response.start", "status": 200, "headers": [(b"x-app", b"1"), (b"x-app", b"2")]})
    for part in (scope["method"].encode() + b" " + target, b" " + host, b" " + body):
        await send({"type": "http.response.body", "body": part, "more_body": True})
    await send({"type": "http.response.body", "body": b""})
