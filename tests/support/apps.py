"""ASGI applications for ``quictunnel connect tests.support.apps:app``."""

import os
import time
from collections.abc import Awaitable, Callable
from typing import Any, NamedTuple
from urllib.parse import parse_qs

from quictunnel.wire.frames import Fields
from tests.support.nonces import body_of

Event = dict[str, Any]

BIG_BODY = (bytes(range(256)) * 11_719)[:3_000_000]


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


async def heavy(
    scope: Event, receive: Callable[[], Awaitable[Event]], send: Callable[[Event], Awaitable[None]]
) -> None:
    """Answers a request of ``nonces.Load``; the time that it asks for is spent computing: one process is soon full."""
    assert scope["type"] == "http"
    nonce = scope["path"].lstrip("/")
    options = parse_qs(scope["query_string"].decode())
    body, more = b"", True
    while more:
        event = await receive()
        body += event.get("body", b"")
        more = event.get("more_body", False)
    until = time.thread_time() + int(options.get("wait", ["0"])[0]) / 1000
    while time.thread_time() < until:
        pass
    intact = body == body_of(f"{nonce}/up", int(options.get("up", ["0"])[0]))
    content = body_of(nonce, int(options.get("size", ["0"])[0]))
    headers = [
        (b"nonce", nonce.encode()),
        (b"served-by", b"%d" % os.getpid()),
        (b"content-length", b"%d" % len(content)),
    ]
    await send({"type": "http.response.start", "status": 200 if intact else 400, "headers": headers})
    await send({"type": "http.response.body", "body": content})


async def mirror(
    scope: Event, receive: Callable[[], Awaitable[Event]], send: Callable[[Event], Awaitable[None]]
) -> None:
    """Sends each part of a body back as it comes; ``/refuse`` answers 413 and reads nothing."""
    assert scope["type"] == "http"
    if scope["path"] == "/refuse":
        await send({"type": "http.response.start", "status": 413, "headers": []})
        await send({"type": "http.response.body", "body": b"too large"})
        return
    await send({"type": "http.response.start", "status": 200, "headers": []})
    more = True
    while more:
        event = await receive()
        more = event.get("more_body", False)
        await send({"type": "http.response.body", "body": event.get("body", b""), "more_body": more})


class Asked(NamedTuple):
    """A request as the application gets it."""

    method: str
    path: str
    body: bytes
    trailers: Fields


class Said(NamedTuple):
    """What the application answers."""

    status: int
    fields: Fields
    body: bytes
    trailers: Fields | None = None
    interim: int = 0
    "a status that goes before it"


def application(asked: Asked) -> Said:
    """Answers by the path; the same for every backend."""
    what = asked.path.strip("/")
    body = b"%b %b %d" % (asked.method.encode(), asked.path.encode(), len(asked.body))
    length = [(b"content-length", b"%d" % len(body))]
    match what:
        case "length":
            return Said(200, length, body)
        case "echo":
            return Said(200, [(b"content-length", b"%d" % len(asked.body))], asked.body)
        case "big":
            return Said(200, [], BIG_BODY)
        case "empty":
            return Said(200, [(b"content-length", b"0")], b"")
        case "nothing":
            return Said(200, [], b"")
        case "204" | "304":
            return Said(int(what), [(b"etag", b'"x"')], b"")
        case "trailers":
            return Said(200, [], body, [(b"x-sum", b"%d" % len(body)), (b"x-got", repr(asked.trailers).encode())])
        case "early":
            return Said(200, [], body, interim=103)
    return Said(200, [], body)


async def mixed(
    scope: Event, receive: Callable[[], Awaitable[Event]], send: Callable[[Event], Awaitable[None]]
) -> None:
    """The application of the mixes of HTTP versions."""
    if scope["type"] == "lifespan":
        while (await receive())["type"] != "lifespan.shutdown":
            await send({"type": "lifespan.startup.complete"})
        await send({"type": "lifespan.shutdown.complete"})
        return
    body, more = b"", True
    while more:
        event = await receive()
        body += event.get("body", b"")
        more = event.get("more_body", False)
    said = application(Asked(scope["method"], scope["path"], body, []))
    await send({"type": "http.response.start", "status": said.status, "headers": said.fields})
    await send({"type": "http.response.body", "body": said.body})
