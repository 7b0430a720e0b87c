"""Many clients in one process, by the Python interface: SERVER CA BACKEND ENGINE AT_ONCE FIRST STOP STEP.

It says ``loaded``, waits for a line, says ``serving`` when all of them are, and ends when its input does.
"""

import asyncio
import gc
import os
import resource
import sys

import quictunnel
from quictunnel.app.loop import loop_factory


async def main(server: str, ca: str, backend: str, engine: str, at_once: str, *numbers: str) -> None:
    """Serve the tunnels ``agentN`` of those numbers."""
    tunnels = [
        quictunnel.connect(
            backend,
            server=server,
            ca=ca,
            token=os.environ["QUICTUNNEL_TOKEN"],
            tunnel=f"agent{number}",
            engine=engine,
            grace="1s",
        )
        for number in range(*map(int, numbers))
    ]
    print("loaded", flush=True)
    await asyncio.to_thread(sys.stdin.readline)
    room = asyncio.Semaphore(int(at_once))

    async def enter(tunnel: quictunnel.Tunnel) -> None:
        async with room:
            await tunnel.__aenter__()

    await asyncio.gather(*(enter(tunnel) for tunnel in tunnels))
    gc.freeze()  # as the command does
    print("serving", flush=True)
    await asyncio.to_thread(sys.stdin.readline)
    await asyncio.gather(*(tunnel.close() for tunnel in tunnels))


if __name__ == "__main__":
    resource.setrlimit(resource.RLIMIT_NOFILE, (resource.getrlimit(resource.RLIMIT_NOFILE)[1],) * 2)
    with asyncio.Runner(loop_factory=loop_factory()) as runner:  # the command's own event loop
        runner.run(main(*sys.argv[1:]))
