"""What a server process says of itself: its tunnels, sessions and links, and nothing that is a secret.

A session is known by a digest of its id, because the id itself lets whoever knows it take the session's place. The
digest is the same in every process of a server, so that what several of them say can be put together.
"""

import asyncio
import hashlib
import json
import os
import time
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from typing import Any, Final

from quictunnel.quic.link import Link
from quictunnel.server.admin import Conversation, Line
from quictunnel.server.registry import Session, Tunnel
from quictunnel.server.server import Server
from quictunnel.wire.names import host_and_port

__all__ = ["Status"]

_ANSWER_TIME: Final = 10.0
"seconds that whoever asks may take to read the answer"

# Between visitors' requests only so much is done of it, in seconds and bytes.
_SLICE: Final = 0.001
_PIECE: Final = 32 * 1024


class Status:
    """Answers the question ``status``."""

    def __init__(self, server: Server, facts: Mapping[str, Any]) -> None:
        """``facts`` are said as they are: worker, workers, version, engine, domain, listens."""
        self._server = server
        self._facts = dict(facts)
        self._loop = asyncio.get_running_loop()
        self._started = self._loop.time()

    async def answer(self, conversation: Conversation, question: Line) -> None:
        """Say it, in slices: other work goes on between them. Raises OSError, TimeoutError among them."""
        async with asyncio.timeout(_ANSWER_TIME):
            pieces: list[bytes] = []
            size = 0
            began = self._loop.time()
            for piece in self._pieces():
                pieces.append(piece)
                size += len(piece)
                if size >= _PIECE or self._loop.time() - began > _SLICE:
                    await conversation.send_bytes(b"".join(pieces))
                    await asyncio.sleep(0)
                    pieces, size, began = [], 0, self._loop.time()
            await conversation.send_bytes(b"".join(pieces) + b"\n")

    async def answer_about(self, conversation: Conversation, question: Line) -> None:
        """Answer ``about``: the process alone. Raises OSError."""
        await conversation.send(self.about())

    def about(self) -> Line:
        """What it says of the process itself."""
        server = self._server
        return {
            "pid": os.getpid(),
            **self._facts,
            "started": self._clock(self._started),
            "draining": server.draining,
            "http": host_and_port(*server.http_address),
            "https": None if server.https_address is None else host_and_port(*server.https_address),
            "quic": host_and_port(*server.quic_address),
            "visitors": len(server.visitors),
            "in_flight": server.visitors.in_flight,
        }

    def _pieces(self) -> Iterator[bytes]:
        yield _encoded(self.about())[:-1] + b',"tunnels":['
        comma = b""
        for tunnel in list(self._server.registry.tunnels.values()):
            yield comma + _encoded(self._tunnel(tunnel))[:-1] + b',"sessions":['
            comma = b""
            for session in list(tunnel.sessions.values()):
                yield comma + _encoded(self._session(session))
                comma = b","
            comma = b","
            yield b"]}"
        yield b"]}"

    def _tunnel(self, tunnel: Tunnel) -> Line:
        lost_at = tunnel.lost_at
        hosts = sorted({host for session in tunnel.sessions.values() for host in session.hosts})
        return {
            "name": tunnel.name,
            "urls": self._server.public_urls(tunnel.name, hosts),
            "token": None if tunnel.owner is None else tunnel.owner.token_id,
            "sticky": tunnel.sticky,
            "in_flight": tunnel.in_flight,
            "waiting": len(tunnel.waiting),
            "lost": None if lost_at is None or tunnel.sessions else self._clock(lost_at),
        }

    def _session(self, session: Session) -> Line:
        links = list(session.links.values())
        trips = [link.round_trip for link in links if link.round_trip is not None]
        return {
            "id": hashlib.sha256(b"quictunnel status " + session.id.encode()).hexdigest()[:12],
            "number": session.number,
            "agent": session.agent,
            "address": _place(links[0]) if links else "",
            "token": session.grant.token_id,
            "hosts": list(session.hosts),
            "weight": session.weight,
            "health": self._health(session),
            "health_text": session.health_text,
            "since": self._clock(session.since),
            "links": len(links),
            "lingering": len(session.lingering),
            "in_flight": session.in_flight,
            "served": session.served,
            "round_trip_ms": round(min(trips) * 1000, 2) if trips else None,
        }

    def _health(self, session: Session) -> str:
        if self._server.draining or session.is_leaving():
            return "draining"
        if session.is_suspect():
            return "suspect"
        if session.aside_until > self._loop.time():
            return "put aside"
        return "healthy" if session.healthy else "unhealthy"

    def _clock(self, at: float) -> str:
        """A time of the event loop's clock as one of the wall."""
        return datetime.fromtimestamp(time.time() - self._loop.time() + at, UTC).isoformat(timespec="seconds")


def _encoded(line: Line) -> bytes:
    return json.dumps(line, separators=(",", ":")).encode("ascii")


def _place(link: Link) -> str:
    return "" if link.address is None else host_and_port(*link.address[:2])
