"""The bench's own backend as a process."""

import asyncio
import json
from typing import TYPE_CHECKING

from quictunnel.app.process import calm_collector, raise_file_limit, say, stop_signals
from quictunnel.bench.backend import Backend
from quictunnel.quic.sockets import settle

if TYPE_CHECKING:
    from quictunnel.app.bench_child import Converse, Facts

__all__ = ["backend"]


async def backend(told: "Facts", converse: "Converse") -> int:
    """Answer until told to stop; ``told`` has the ``mark``. Raises OSError."""
    raise_file_limit()
    served = Backend(told["mark"])
    port = await served.start()
    conversation = asyncio.get_running_loop().create_task(  # ended here
        converse(lambda line: {"requests": served.requests, "received": served.received})
    )
    try:
        with stop_signals() as stopped:
            calm_collector()
            say(json.dumps({"port": port}))
            await stopped.wait()
    finally:
        # uvloop waits for ever in its own close for a server that is still open then.
        served.close()
        conversation.cancel()
        await settle()
    return 0
