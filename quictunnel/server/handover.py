"""How a server leaves its sockets to a process that takes over: the verb ``takeover`` at the owner's door.

    successor                                          this process
    {"ask": "takeover"}                                checks that it may
                                                       {"handing": …} and the sockets: all goes on as before
    {"say": "links"}        has everything ready       reads the UDP socket no more, tells its clients to dial anew
                                                       {"handshakes": …, "tunnels": …}; visitors still come here
    {"say": "serving"}      its clients are there,     accepts no more visitors, and drains
                            it accepts visitors        {"draining": true}

Whatever goes wrong before ``serving``, the end of the successor among it, makes this process go on as before. Visitors
come to the successor only when its clients have: no request finds a tunnel without them.
"""

import asyncio
import json
from collections.abc import Callable
from typing import Final

from loguru import logger

from quictunnel.quic.succession import channel
from quictunnel.server.admin import Conversation, Line
from quictunnel.server.server import Server

__all__ = ["PROTOCOL", "Handover"]

PROTOCOL: Final = 1
"of the conversation; a process that speaks another one cannot be taken over"

_STEP_TIME: Final = 60.0
"seconds that the successor may take for each step: it starts other processes, and waits for clients"

_SLICE: Final = 500
"tunnels that are told of between other work"


class Handover:
    """Answers ``takeover``; at most one at a time, and one in all that comes to its end."""

    def __init__(self, server: Server, done: Callable[[], None]) -> None:
        """``done`` is called when visitors come to the successor: what is left here is to be finished."""
        self._server = server
        self._done = done
        self._busy = False

    async def answer(self, conversation: Conversation, question: Line) -> None:
        """One takeover. Raises OSError and ValueError when the successor is not up to it."""
        refusal = self._refusal(question)
        if refusal:
            await conversation.send({"error": refusal})
            return
        self._busy = True
        try:
            await self._hand_over(conversation)
        finally:
            self._busy = False

    def _refusal(self, question: Line) -> str:
        if self._server.draining:
            return "it is stopping already"
        if self._busy:
            return "another process is taking over from it just now"
        if question.get("protocol") != PROTOCOL:
            return f"it hands over by version {PROTOCOL}, and was asked for {str(question.get('protocol'))[:20]}"
        return ""

    async def _hand_over(self, conversation: Conversation) -> None:
        server = self._server
        quic = server.links.socket
        assert quic is not None
        http, https = server.visitors.sockets(tls=False), server.visitors.sockets(tls=True)
        ours, theirs = channel()
        let_go = False
        try:
            with theirs:
                await conversation.send_files(
                    {"handing": True, "http": len(http), "https": len(https)},
                    [*http, *https, quic.sock.fileno(), theirs.fileno()],
                )
            if not await _says(conversation, "links"):
                return
            handshakes = server.links.let_go(ours)
            let_go = True
            logger.info("= another process takes the links over")
            server.gate.drain_all(again=True)
            await self._tell(conversation, handshakes)
            if await _says(conversation, "serving"):
                let_go = False  # for good
                logger.info("= another process serves now")
                self._done()
                await conversation.send({"draining": True})
        finally:
            if let_go:
                server.links.take_back()
                server.gate.go_on()
                logger.warning("the process that was taking over has gone before it served: going on without it")
            elif server.links.successor is None:
                ours.close()

    async def _tell(self, conversation: Conversation, handshakes: list[bytes]) -> None:
        said = {"handshakes": [cid.hex() for cid in handshakes]}
        await conversation.send_bytes(json.dumps(said)[:-1].encode("ascii") + b', "tunnels": [')
        known = self._server.known()
        for start in range(0, len(known), _SLICE):
            piece = json.dumps(known[start : start + _SLICE])[1:-1].encode("ascii")
            await conversation.send_bytes((b"," if start else b"") + piece)
            await asyncio.sleep(0)
        await conversation.send_bytes(b"]}\n")


async def _says(conversation: Conversation, word: str) -> bool:
    """Whether the successor says that next; False if it has gone. Raises OSError and ValueError."""
    async with asyncio.timeout(_STEP_TIME):
        line = await conversation.receive()
    if line is None:
        return False
    if line.get("say") != word:
        raise ValueError(f"the process that takes over says {str(line.get('say'))[:20]!r}, not {word!r}")
    return True
