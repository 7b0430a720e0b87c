"""The processes that ``quictunnel bench`` starts: ``python -m quictunnel.app.bench_child ROLE``.

    backend   the bench's own backend
    server    what ``quictunnel serve`` runs
    client    what ``quictunnel connect`` runs, which also tells of its links

Each is told what to do by a line of JSON on its standard input (there are secrets in it, which command lines would
show), says that it is ready by one of its own, and then answers each line that comes. It ends when its input does: with
the bench, however that ends. It loads what its role needs and no more, so that its memory is a real one's.
"""

import asyncio
import json
import os
import signal
import sys
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any, Final, TypeAlias

from quictunnel import log
from quictunnel.app.beside import beside
from quictunnel.app.process import say
from quictunnel.app.running import run
from quictunnel.failures import CommandError, UsageError, reason
from quictunnel.trust.files import TrustError

__all__ = ["Converse", "Facts", "main"]

_LINE_LIMIT: Final = 65536

Facts: TypeAlias = dict[str, Any]

# Answers each line that comes by what is given, until there are no more.
Converse: TypeAlias = Callable[[Callable[[str], Facts]], Coroutine[Any, Any, None]]


def main(name: str) -> int:
    """Be one of the processes; the exit status."""
    role = _role(name)
    told = json.loads(sys.stdin.buffer.readline(_LINE_LIMIT) or b"null")
    if told is None:
        return 1  # whoever started it is gone already
    take_down = log.set_up("info", "text", Path(told["log"]))
    try:
        if name in ("server", "client"):
            told["settings"] = beside(lambda: _plain_settings(name, told["settings"]))()
        return run(role(told, _converse))
    except (CommandError, UsageError, TrustError, ValueError) as error:
        say(json.dumps({"failed": str(error)}))
    except OSError as error:
        say(json.dumps({"failed": reason(error)}))
    finally:
        take_down()
    return 1


def _plain_settings(name: str, given: Facts) -> Any:
    """Options as ``serve`` and ``connect`` have them. What reads them is loaded beside this process, as for those."""
    from quictunnel.options import load_settings, plain
    from quictunnel.settings import ConnectSettings, ServeSettings

    return plain(load_settings(ServeSettings if name == "server" else ConnectSettings, given))


def _role(name: str) -> Callable[[Facts, Converse], Coroutine[Any, Any, int]]:
    match name:
        case "backend":
            from quictunnel.app.bench_backend import backend

            return backend
        case "server":
            from quictunnel.app.serve import serve

            async def server(told: Facts, converse: Converse) -> int:
                conversation = asyncio.get_running_loop().create_task(converse(lambda line: {}))  # ended here
                try:
                    return await serve(told["settings"])
                finally:
                    conversation.cancel()

            return server
        case "client":
            from quictunnel.app.bench_client import client

            return client
    raise ValueError(name)


async def _converse(answer: Callable[[str], Facts]) -> None:
    """Answer each line of the standard input, and see to it that this process ends when there are no more."""
    reader = asyncio.StreamReader(_LINE_LIMIT)
    loop = asyncio.get_running_loop()
    transport, _ = await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    try:
        while line := await reader.readline():
            say(json.dumps(answer(line.decode().strip())))
    finally:
        transport.close()
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
