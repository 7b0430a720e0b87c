"""The demo's backend: each page, driven as an ASGI server would."""

import asyncio
import json
from typing import Any

import pytest

from quictunnel.demo import app

DISCONNECT = {"type": "http.disconnect"}
EMPTY = {"type": "http.request", "body": b"", "more_body": False}


class Visit:
    """One request to the application, and what it sent."""

    def __init__(self, target: str, *, method: str = "GET", headers: Any = (), messages: Any = (EMPTY,)) -> None:
        path, _, query = target.partition("?")
        self.scope = {
            "type": "http",
            "method": method,
            "path": path,
            "query_string": query.encode(),
            "http_version": "1.1",
            "scheme": "https",
            "client": ("192.0.2.1", 5),
            "headers": [(b"host", b"demo.localhost"), *headers],
        }
        self.messages = list(messages)
        self.sent: list[Any] = []
        self.asked = 0

    async def receive(self) -> Any:
        if not self.messages:
            await asyncio.Event().wait()
        self.asked += 1
        return self.messages.pop(0)

    async def send(self, message: Any) -> None:
        self.sent.append(message)

    async def run(self) -> "Visit":
        await asyncio.wait_for(app(self.scope, self.receive, self.send), 5)
        return self

    @property
    def status(self) -> int:
        return int(self.sent[0]["status"])

    @property
    def headers(self) -> dict[bytes, bytes]:
        return dict(self.sent[0]["headers"])

    @property
    def parts(self) -> list[bytes]:
        return [message["body"] for message in self.sent[1:]]

    @property
    def body(self) -> bytes:
        return b"".join(self.parts)

    @property
    def complete(self) -> bool:
        return not self.sent[-1].get("more_body", False) and len(self.sent) > 1


async def test_page_shows_what_the_application_was_told() -> None:
    visit = await Visit("/", headers=[(b"x-thing", b"<script>")]).run()
    assert visit.status == 200
    assert visit.headers[b"content-type"].startswith(b"text/html")
    assert int(visit.headers[b"content-length"]) == len(visit.body)
    assert b"https://demo.localhost/echo" in visit.body
    assert b"<td>&lt;script&gt;" in visit.body


async def test_json_tells_the_request() -> None:
    visit = await Visit("/json?a=1", method="PUT", headers=[(b"x", b"\xe4"), (b"x", b"2")]).run()
    told = json.loads(visit.body)
    assert (told["method"], told["path"], told["query"], told["client"]) == ("PUT", "/json", "a=1", ["192.0.2.1", 5])
    assert told["headers"] == [["host", "demo.localhost"], ["x", "\xe4"], ["x", "2"]]


async def test_slow_takes_its_time() -> None:
    clock = asyncio.get_running_loop().time
    start = clock()
    visit = await Visit("/slow?ms=30").run()
    assert clock() - start >= 0.029
    assert visit.body == b"This took 30 ms\n"


@pytest.mark.parametrize("size", [0, 1, 65536, 65537, 200_000])
async def test_bytes_are_as_many_as_asked_for_in_bounded_parts(size: int) -> None:
    visit = await Visit(f"/bytes?n={size}").run()
    assert len(visit.body) == size == int(visit.headers[b"content-length"])
    assert max(map(len, visit.parts)) <= 65536
    assert visit.complete


@pytest.mark.parametrize("path", ["/", "/json", "/slow?ms=0", "/bytes?n=70000", "/events"])
async def test_head_has_fields_and_no_body(path: str) -> None:
    visit = await Visit(path, method="HEAD").run()
    assert visit.status == 200
    assert visit.body == b""
    assert visit.complete


async def test_echo_sends_each_part_back_before_the_next_is_read() -> None:
    parts = [b"one", b"", b"two", b""]
    messages = [{"type": "http.request", "body": part, "more_body": number < 3} for number, part in enumerate(parts)]
    visit = Visit("/echo", method="POST", headers=[(b"content-type", b"text/x")], messages=messages)
    asked_at = []
    send = visit.send

    async def noting(message: Any) -> None:
        asked_at.append(visit.asked)
        await send(message)

    await app(visit.scope, visit.receive, noting)
    assert visit.headers[b"content-type"] == b"text/x"
    assert visit.parts == [b"one", b"two", b""]
    assert asked_at == [0, 1, 3, 4]


async def test_echo_keeps_the_length_that_was_announced() -> None:
    messages = [{"type": "http.request", "body": b"hello"}]
    visit = await Visit("/echo", method="POST", headers=[(b"content-length", b"5")], messages=messages).run()
    assert (visit.headers[b"content-length"], visit.body) == (b"5", b"hello")


async def test_echo_of_a_visitor_who_left_is_not_ended_as_complete() -> None:
    messages = [{"type": "http.request", "body": b"half", "more_body": True}, DISCONNECT]
    visit = await Visit("/echo", method="POST", messages=messages).run()
    assert not visit.complete


async def test_events_come_one_by_one() -> None:
    visit = await Visit("/events?n=3&ms=1").run()
    assert visit.headers[b"content-type"] == b"text/event-stream"
    assert visit.parts == [b"id: 0\ndata: 0\n\n", b"id: 1\ndata: 1\n\n", b"id: 2\ndata: 2\n\n", b""]


async def test_events_stop_when_the_visitor_leaves() -> None:
    visit = await Visit("/events?ms=60000", messages=[EMPTY, DISCONNECT]).run()
    assert len(visit.parts) == 1


@pytest.mark.parametrize(
    "target", ["/slow?ms=x", "/slow?ms=-1", "/slow?ms=", "/slow?ms=60001", "/bytes?n=9e9", "/bytes?" + "&" * 20]
)
async def test_bad_parameters_are_told(target: str) -> None:
    visit = await Visit(target).run()
    assert visit.status == 400


async def test_unknown_path_is_404_and_wrong_method_405() -> None:
    assert (await Visit("/nothing/\ud800").run()).status == 404
    visit = await Visit("/bytes", method="POST").run()
    assert (visit.status, visit.headers[b"allow"]) == (405, b"GET, HEAD")


async def test_lifespan_starts_and_stops() -> None:
    visit = Visit("/", messages=[{"type": "lifespan.startup"}, {"type": "lifespan.shutdown"}])
    await app({"type": "lifespan"}, visit.receive, visit.send)
    assert visit.sent == [{"type": "lifespan.startup.complete"}, {"type": "lifespan.shutdown.complete"}]


async def test_websocket_is_refused() -> None:
    visit = Visit("/", messages=[{"type": "websocket.connect"}])
    await app({"type": "websocket"}, visit.receive, visit.send)
    assert [message["type"] for message in visit.sent] == ["websocket.close"]
