"""``quictunnel serve --takeover``: the new process's side. See ``server.handover`` for what is said.

``take_over`` needs no event loop. With workers their parent calls it first, for the sockets that it keeps and to learn
whether all of it is possible, and hangs up; then each worker takes over from the one of its number.
"""

import asyncio
import os
import socket
from pathlib import Path
from typing import Any, Final, NamedTuple, TypeAlias

from loguru import logger

from quictunnel.app.ask import Call, NoAnswer, calls
from quictunnel.failures import CommandError
from quictunnel.quic.succession import Predecessor
from quictunnel.server.admin import Conversation
from quictunnel.server.handover import PROTOCOL
from quictunnel.server.server import Known, Server, Sockets
from quictunnel.values import Address

__all__ = ["Addresses", "Inherited", "take_over"]

_ANSWER_TIME: Final = 10.0
"seconds: the process that is asked may be busy"

_MOVE_TIME: Final = 10.0
"seconds for the clients to come here before visitors do; those that have not been updated never come by themselves"

_KNOWN_LIMIT: Final = 64 * 1024 * 1024
"bytes"

_Address: TypeAlias = tuple[str, int]


class Addresses(NamedTuple):
    """Where a server is told to listen."""

    http: _Address
    https: _Address | None
    quic: _Address


class Inherited:
    """What one process of the running server leaves to one of the new server's."""

    def __init__(self, worker: int, process: int, sockets: Sockets, channel: socket.socket, call: Call) -> None:
        self.worker = worker
        self.process = process
        self.sockets = sockets
        self._channel = channel
        self._call = call

    def __repr__(self) -> str:
        return f"<Inherited of process {self.process}, worker {self.worker}>"

    def hang_up(self) -> Sockets:
        """Keep the sockets and leave it at that; the running server goes on as before."""
        self._call.close()
        self._channel.close()
        return self.sockets

    def close(self) -> None:
        """Keep nothing; the running server goes on as before."""
        for sock in (*self.sockets.http, *self.sockets.https, self.sockets.quic):
            sock.close()
        self.hang_up()

    async def begin(self, server: Server) -> None:
        """Start ``server`` in the other's place: its clients first, then visitors. Raises CommandError and OSError."""
        self._call.socket.setblocking(False)
        conversation = Conversation(self._call.socket, _KNOWN_LIMIT)
        told = await self._say(conversation, "links")
        try:
            handshakes = [bytes.fromhex(cid) for cid in told["handshakes"]]
            known = [Known(*each) for each in told["tunnels"]]
        except (KeyError, TypeError, ValueError) as error:
            raise CommandError(f"{self._who} says what is not known here: {error!r}") from None
        await server.start_links(self.sockets, Predecessor(self._channel, handshakes))
        missing = await server.succeed(known, _MOVE_TIME)
        if missing:
            logger.warning("{} sessions have not come within {:g} s; visitors do now", missing, _MOVE_TIME)
        await server.start_visitors(self.sockets)
        await self._say(conversation, "serving")
        self._call.close()
        logger.info("= took over from process {}, which finishes what it has begun", self.process)

    @property
    def _who(self) -> str:
        return f"the running server (process {self.process})"

    async def _say(self, conversation: Conversation, word: str) -> dict[str, Any]:
        try:
            async with asyncio.timeout(_ANSWER_TIME):
                await conversation.send({"say": word})
                answer = await conversation.receive()
        except ConnectionError:
            answer = None
        except (OSError, ValueError) as error:
            raise CommandError(f"{self._who} does not hand over: {str(error) or 'no answer'}") from None
        if answer is None:
            if self._lives():
                raise CommandError(f"{self._who} goes on by itself")
            # Killed in the middle of it: its sockets are here, and there is nobody else to serve.
            logger.warning("process {} ended while it was taken over from", self.process)
            return {"handshakes": [], "tunnels": []}
        return answer

    def _lives(self) -> bool:
        try:
            Call(self._call.path, _ANSWER_TIME).close()
        except (ConnectionRefusedError, FileNotFoundError):
            return False
        except NoAnswer:
            pass
        return True


def take_over(state_dir: Path, addresses: Addresses, workers: int = 1, *, only: int | None = None) -> list[Inherited]:
    """The sockets of the server that runs with the state directory, one item for each of ``workers``, in order.

    With ``only`` those of the worker of that number; empty if none runs. Raises CommandError when it cannot be taken
    over; then nothing of it has changed, nor does it change before ``Inherited.begin``.
    """
    found, silent = calls(state_dir, _ANSWER_TIME)
    inherited: list[Inherited] = []
    try:
        if silent:
            raise CommandError(f"the running server cannot be asked: {silent[0][0]}: {silent[0][1]}")
        running = _chosen([(call, _about(call)) for call in found], addresses, workers, only)
        for call, about in running:
            inherited.append(_asked_for(call.path, about))
        return inherited
    except BaseException:
        for each in inherited:
            each.close()
        raise
    finally:
        for call in found:
            call.close()


def _about(call: Call) -> dict[str, Any]:
    try:
        call.say({"ask": "about"})
        about = call.hear()
    except NoAnswer as error:
        raise CommandError(f"the running server cannot be asked: {call.path}: {error}") from None
    if "listens" not in about or "pid" not in about:
        raise CommandError(
            f"the running server ({call.path}) is of a version that cannot hand over: {about.get('error', 'no answer')}"
        )
    return about


_Asked: TypeAlias = list[tuple[Call, dict[str, Any]]]


def _chosen(found: _Asked, addresses: Addresses, workers: int, only: int | None) -> _Asked:
    """The processes of the server at these addresses, by worker, or that of one worker. Raises CommandError."""
    serving = [each for each in found if not each[1]["draining"]]
    matching = [each for each in serving if not _difference(each[1], addresses)]
    if only is not None:
        # Its siblings are there too, those of the running server and perhaps of this one.
        return [each for each in matching if each[1]["worker"] == only][:1]
    if not matching:
        if serving:
            raise CommandError(_difference(serving[0][1], addresses))
        for _, about in found:
            if not _difference(about, addresses):
                raise CommandError(f"the running server (process {about['pid']}) is stopping: start when it has gone")
        return []
    matching.sort(key=lambda each: each[1]["worker"])
    theirs = matching[0][1]["workers"]
    if theirs != workers:
        raise CommandError(
            f"the running server has {_counted(theirs)}, and this one is to have {_counted(workers)}: "
            "stop it first, or start with as many"
        )
    if [about["worker"] for _, about in matching] != list(range(workers)):
        raise CommandError(f"of the running server's {_counted(workers)} {len(matching)} can be asked: try again")
    return matching


def _counted(workers: int) -> str:
    return "1 worker" if workers == 1 else f"{workers} workers"


def _difference(about: dict[str, Any], addresses: Addresses) -> str:
    """What is wrong with the addresses, as a sentence; empty if nothing is."""
    for name, wanted in addresses._asdict().items():
        asked, bound = about["listens"].get(name), about.get(name)
        if wanted is None or asked is None:
            if wanted is None and asked is None:
                continue
        elif str(Address(*wanted)) in (asked, bound) or (wanted[1] == 0 and wanted[0] in (_host(asked), _host(bound))):
            continue
        here = "nowhere" if wanted is None else str(Address(*wanted))
        return (
            f"--{name} is {here}, and that of the running server (process {about['pid']}) is {asked or 'nowhere'}: "
            "a takeover needs the same addresses"
        )
    return ""


def _host(address: str | None) -> str:
    return "" if address is None else address.rpartition(":")[0].strip("[]")


def _asked_for(path: Path, about: dict[str, Any]) -> Inherited:
    """The sockets of one process. Raises CommandError."""
    who = f"the running server (process {about['pid']})"
    files: list[int] = []
    try:
        call = Call(path, _ANSWER_TIME)
    except (NoAnswer, OSError) as error:
        raise CommandError(f"{who} does not answer: {error}") from None
    try:
        try:
            call.say({"ask": "takeover", "protocol": PROTOCOL})
            answer = call.hear_files(files)
        except NoAnswer as error:
            raise CommandError(f"{who} does not hand over: {error}") from None
        http, https = answer.get("http"), answer.get("https")
        if not isinstance(http, int) or not isinstance(https, int) or len(files) != http + https + 2:
            raise CommandError(f"{who} does not hand over: {str(answer.get('error', 'not as expected'))[:200]}")
        for descriptor in files:
            os.set_inheritable(descriptor, False)
        opened = [socket.socket(fileno=descriptor) for descriptor in files]
        files.clear()
    except BaseException:
        call.close()
        for descriptor in files:
            os.close(descriptor)
        raise
    sockets = Sockets(opened[:http], opened[http : http + https], opened[-2])
    return Inherited(about["worker"], about["pid"], sockets, opened[-1], call)
