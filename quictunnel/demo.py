"""A small backend to try a tunnel with: an ASGI 3 application that needs no server.

    /            a page
    /json        the request as JSON
    /slow?ms=35  an answer after that many milliseconds (at most a minute)
    /bytes?n=…   that many bytes, streamed (at most a tebibyte)
    /echo        the request's body, streamed back as it comes
    /events      ``n`` server-sent events (3600), one every ``ms`` milliseconds (1000), until the visitor leaves

``quictunnel connect quictunnel.demo:app`` serves it.
"""

import asyncio
import html
import json
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any, Final, TypeAlias
from urllib.parse import parse_qs

__all__ = ["app"]

Scope: TypeAlias = MutableMapping[str, Any]
Message: TypeAlias = MutableMapping[str, Any]
Receive: TypeAlias = Callable[[], Awaitable[Message]]
Send: TypeAlias = Callable[[Message], Awaitable[None]]
Page: TypeAlias = Callable[[Scope, Receive, Send], Awaitable[None]]

BLOCK: Final = b"quictunnel demo\n" * 4096

_PAGE: Final = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>quictunnel demo</title>
<style>
  body {{ font: 17px/1.6 system-ui, sans-serif; max-width: 44rem; margin: 3rem auto; padding: 0 1rem; color: #223 }}
  h1 {{ font-size: 1.6rem }}
  code, td {{ font: 14px/1.5 ui-monospace, monospace }}
  table {{ border-collapse: collapse }}
  td {{ border-top: 1px solid #dde; padding: .2rem .8rem .2rem 0; vertical-align: top; overflow-wrap: anywhere }}
  #clock {{ color: #07a }}
</style>
<h1>It works.</h1>
<p>This page came through a QUIC tunnel from a small web application behind it. <span id="clock"></span></p>
<ul>
  <li><a href="/json">/json</a> this request as the application saw it</li>
  <li><a href="/slow?ms=35">/slow?ms=35</a> an answer that takes its time</li>
  <li><a href="/bytes?n=1000000">/bytes?n=1000000</a> a download</li>
  <li><a href="/events?n=10">/events?n=10</a> ten server-sent events</li>
  <li><code>curl --data-binary @file {base}/echo</code> an upload, sent back as it comes</li>
</ul>
<p>What the application was told:</p>
<table>{rows}</table>
<script>
  new EventSource("/events").onmessage = event =>
    document.getElementById("clock").textContent = "Event " + event.data + " just arrived.";
</script>
</html>
"""


async def app(scope: Scope, receive: Receive, send: Send) -> None:
    """The application; it takes ``http`` and ``lifespan``, and refuses ``websocket``."""
    match scope["type"]:
        case "http":
            await _http(scope, receive, send)
        case "lifespan":
            await _lifespan(receive, send)
        case "websocket":
            await receive()
            await send({"type": "websocket.close", "code": 1000})
        case other:
            raise NotImplementedError(f"ASGI scope {other!r}")


async def _lifespan(receive: Receive, send: Send) -> None:
    while True:
        message = await receive()
        await send({"type": f"{message['type']}.complete"})
        if message["type"] == "lifespan.shutdown":
            return


async def _http(scope: Scope, receive: Receive, send: Send) -> None:
    found = _PAGES.get(scope["path"])
    if found is None:
        await _text(scope, send, 404, f"There is nothing at {scope['path']}\n")
        return
    page, methods = found
    if methods and scope["method"] not in methods:
        await _text(scope, send, 405, "Another method is needed\n", (b"allow", ", ".join(methods).encode()))
        return
    try:
        await page(scope, receive, send)
    except _BadQuery as error:
        await _text(scope, send, 400, f"{error}\n")


# The pages


async def _index(scope: Scope, receive: Receive, send: Send) -> None:
    fields = _fields(scope)
    rows = "".join(f"<tr><td>{html.escape(name)}<td>{html.escape(value)}" for name, value in fields)
    base = f"{scope.get('scheme', 'http')}://{dict(fields).get('host', 'localhost')}"
    page = _PAGE.format(rows=rows, base=html.escape(base))
    await _whole(scope, send, 200, b"text/html; charset=utf-8", page.encode())


async def _json(scope: Scope, receive: Receive, send: Send) -> None:
    client = scope.get("client")
    content = {
        "method": scope["method"],
        "path": scope["path"],
        "query": scope.get("query_string", b"").decode("latin-1"),
        "http_version": scope.get("http_version"),
        "scheme": scope.get("scheme", "http"),
        "client": list(client) if client else None,
        "headers": _fields(scope),
    }
    await _whole(scope, send, 200, b"application/json", json.dumps(content, indent=2).encode() + b"\n")


async def _slow(scope: Scope, receive: Receive, send: Send) -> None:
    milliseconds = _number(scope, "ms", 35, 60_000)
    await asyncio.sleep(milliseconds / 1000)
    await _text(scope, send, 200, f"This took {milliseconds} ms\n")


async def _bytes(scope: Scope, receive: Receive, send: Send) -> None:
    left = _number(scope, "n", 1_000_000, 2**40)
    await _start(send, 200, b"application/octet-stream", (b"content-length", b"%d" % left))
    if scope["method"] == "HEAD":
        left = 0
    while left > len(BLOCK):
        await send({"type": "http.response.body", "body": BLOCK, "more_body": True})
        left -= len(BLOCK)
    await send({"type": "http.response.body", "body": BLOCK[:left]})


async def _echo(scope: Scope, receive: Receive, send: Send) -> None:
    given = dict(scope["headers"])
    length = [(name, given[name]) for name in (b"content-length",) if name in given]
    nosniff = (b"x-content-type-options", b"nosniff")  # what a stranger sent must not become a page
    await _start(send, 200, given.get(b"content-type", b"application/octet-stream"), nosniff, *length)
    more = True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            return
        more = message.get("more_body", False)
        # Nothing to say of an empty part, unless it is the last.
        if (body := message.get("body", b"")) or not more:
            await send({"type": "http.response.body", "body": body, "more_body": more})


async def _events(scope: Scope, receive: Receive, send: Send) -> None:
    count = _number(scope, "n", 3600, 1_000_000)
    pause = _number(scope, "ms", 1000, 60_000) / 1000
    await _start(send, 200, b"text/event-stream", (b"cache-control", b"no-store"))
    if scope["method"] == "HEAD":
        count = 0
    for number in range(count):
        await send(
            {"type": "http.response.body", "body": b"id: %d\ndata: %d\n\n" % (number, number), "more_body": True}
        )
        if number + 1 < count and await _disconnected(receive, pause):
            return
    await send({"type": "http.response.body", "body": b""})


_READ: Final = ("GET", "HEAD")

_PAGES: Final[dict[str, tuple[Page, tuple[str, ...]]]] = {
    "/": (_index, _READ),
    "/json": (_json, ()),
    "/slow": (_slow, ()),
    "/bytes": (_bytes, _READ),
    "/echo": (_echo, ()),
    "/events": (_events, _READ),
}


# Beneath the pages


class _BadQuery(Exception):
    """A parameter that cannot be; the text tells the visitor."""


def _number(scope: Scope, name: str, default: int, highest: int) -> int:
    """A whole number from the query."""
    try:
        query = parse_qs(scope.get("query_string", b"").decode("latin-1"), keep_blank_values=True, max_num_fields=16)
    except ValueError:
        raise _BadQuery("the query has too many fields") from None
    text = query[name][-1] if name in query else str(default)
    if not (text.isascii() and text.isdecimal() and len(text) < 16) or int(text) > highest:
        raise _BadQuery(f"{name} must be a whole number from 0 to {highest}")
    return int(text)


def _fields(scope: Scope) -> list[tuple[str, str]]:
    return [(name.decode("latin-1"), value.decode("latin-1")) for name, value in scope["headers"]]


async def _disconnected(receive: Receive, seconds: float) -> bool:
    """Wait so long; sooner, and true, if the visitor goes away."""
    try:
        async with asyncio.timeout(seconds):
            while (await receive())["type"] != "http.disconnect":
                pass
    except TimeoutError:
        return False
    return True


async def _start(send: Send, status: int, content_type: bytes, *fields: tuple[bytes, bytes]) -> None:
    headers = [(b"content-type", content_type), *fields]
    await send({"type": "http.response.start", "status": status, "headers": headers})


async def _whole(
    scope: Scope, send: Send, status: int, content_type: bytes, body: bytes, *fields: tuple[bytes, bytes]
) -> None:
    await _start(send, status, content_type, (b"content-length", b"%d" % len(body)), *fields)
    await send({"type": "http.response.body", "body": b"" if scope["method"] == "HEAD" else body})


async def _text(scope: Scope, send: Send, status: int, text: str, *fields: tuple[bytes, bytes]) -> None:
    await _whole(scope, send, status, b"text/plain; charset=utf-8", text.encode("utf-8", "replace"), *fields)
