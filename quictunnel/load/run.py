"""The load test itself: an open loop.

Request i of a stage leaves at start + i/rate, whether or not earlier ones have returned, and its latency counts from
that scheduled time. So a target that stalls is charged for every request that it kept waiting, not only for the one it
was busy with. One timer of the event loop sends all that are due.
"""

import asyncio
import json
import resource
import socket
import ssl
import time
from collections.abc import Callable
from typing import Final, TextIO

from quictunnel.load import report
from quictunnel.load.connections import Connections, Shot
from quictunnel.load.figures import Tally
from quictunnel.load.plan import LoadOptions, Target, make_request

__all__ = ["Pacer", "resolve", "run_load"]

TICK: Final = 0.001
"seconds: event loops count their timers in milliseconds, so a shorter wait would only spin"

EARLY: Final = TICK / 2
"seconds before its time that a request may leave; its latency then counts from there. It centres the timers' error"

BATCH: Final = 256
"requests sent in one go by a generator that is behind: answers must be read too, or its lateness passes for theirs"

WATCH: Final = 0.1
"seconds between two looks at time-outs"

RESOLVE_LIMIT: Final = 10.0

SPARE_FILES: Final = 64
"descriptors that are not connections"


async def run_load(options: LoadOptions, out: TextIO, err: TextIO) -> int:
    """Run all stages; the result goes to ``out``, progress and warnings to ``err``. Returns a ``report.ExitStatus``.

    When cancelled it writes what it has so far to ``err`` as a table, and raises CancelledError.
    """
    try:
        addresses = await resolve(options.target)
        context = _tls_context(options)
    except OSError as error:
        err.write(f"quictunnel load: {error}\n")
        return report.ExitStatus.USAGE
    connections = Connections(
        options.target,
        addresses,
        make_request(options),
        context=context,
        limit=_allow_connections(options.connections, err),
        timeout=options.timeout,
        clock=time.monotonic,
    )
    tallies: list[Tally] = []
    try:
        await _run_stages(options, connections, tallies, err)
    except asyncio.CancelledError:
        if tallies:
            tallies[-1].finished = time.monotonic()
            tallies[-1].scheduled = tallies[-1].sent  # what was not due yet is not missing
            err.write(f"\ninterrupted; so far:\n{report.as_text(options, tallies)}")
        raise
    finally:
        await connections.close()
    if options.json:
        json.dump(report.as_json(options, tallies), out, indent=2)
        out.write("\n")
    else:
        out.write(report.as_text(options, tallies))
    out.flush()
    return report.exit_status(options, tallies)


# One stage


class Pacer:
    """Sends the requests of one stage when they are due."""

    def __init__(self, tally: Tally, send: Callable[[Shot], None], timeout: float) -> None:
        self._loop = asyncio.get_running_loop()
        self.done: asyncio.Future[None] = self._loop.create_future()
        "set when the last request is under way"

        self._tally = tally
        self._send = send
        self._timeout = timeout
        self._timer: asyncio.TimerHandle | asyncio.Handle | None = None

    def start(self) -> None:
        """Begin: the first request is due now."""
        self._tally.started = self._tally.last_left = time.monotonic()
        self._tick()

    def stop(self) -> None:
        """Send nothing more."""
        if self._timer is not None:
            self._timer.cancel()

    def _tick(self) -> None:
        tally = self._tally
        now = time.monotonic()
        due = min(tally.scheduled, int((now + EARLY - tally.started) * tally.rate) + 1)
        batch = min(due, tally.sent + BATCH)
        if batch > tally.sent:
            tally.last_left = now
        for number in range(tally.sent, batch):
            tally.sent += 1
            self._send(Shot(min(tally.started + number / tally.rate, now), tally))
        if tally.sent == tally.scheduled or now > tally.started + tally.scheduled / tally.rate + self._timeout:
            self.done.set_result(None)
        elif tally.sent < due:
            self._timer = self._loop.call_soon(self._tick)
        else:
            wait = tally.started + tally.sent / tally.rate - EARLY - time.monotonic()
            self._timer = self._loop.call_later(max(wait, TICK), self._tick)


async def _run_stages(options: LoadOptions, connections: Connections, tallies: list[Tally], err: TextIO) -> None:
    for rate in options.stages:
        tallies.append(Tally(rate, options.duration))
        async with asyncio.TaskGroup() as group:
            watcher = group.create_task(_watch(tallies[-1], connections, err))
            await _run_stage(tallies[-1], connections, options)
            watcher.cancel()
        if not err.isatty():
            err.write(report.progress(tallies[-1], tallies[-1].seconds) + "\n")
            err.flush()


async def _run_stage(tally: Tally, connections: Connections, options: LoadOptions) -> None:
    """Send on schedule, then wait for the stragglers."""
    pacer = Pacer(tally, connections.send, options.timeout)
    cpu = time.process_time()
    pacer.start()
    try:
        # Each part bounds itself; this holds should one of them be wrong.
        async with asyncio.timeout(options.duration + 2 * options.timeout + 10):
            await pacer.done
            await connections.drained()
    finally:
        pacer.stop()
        tally.finished = time.monotonic()
        tally.cpu = time.process_time() - cpu


async def _watch(tally: Tally, connections: Connections, err: TextIO) -> None:
    """Look after time-outs and, on a terminal, tell once a second how it goes."""
    shown = 0.0
    try:
        while True:
            await asyncio.sleep(WATCH)
            now = time.monotonic()
            connections.expire(now)
            if now - shown >= 1 and err.isatty():
                shown = now
                err.write(f"\r\x1b[K{report.progress(tally, now - tally.started)}")
                err.flush()
    finally:
        if shown:
            err.write("\r\x1b[K")
            err.flush()


# Before the first stage


async def resolve(target: Target) -> list[tuple[str, int]]:
    """The target's addresses in numbers; raises OSError."""
    host = target.host
    if host == "localhost" or host.endswith(".localhost"):
        host = "localhost"  # RFC 6761 section 6.3: such names are this machine, whether or not the resolver knows it
    loop = asyncio.get_running_loop()
    try:
        async with asyncio.timeout(RESOLVE_LIMIT):
            found = await loop.getaddrinfo(host, target.port, type=socket.SOCK_STREAM)
    except TimeoutError:
        raise OSError(f"{target.host}: the name was not resolved in {RESOLVE_LIMIT:g} s") from None
    except (OSError, UnicodeError) as error:
        raise OSError(f"{target.host}: {getattr(error, 'strerror', None) or error}") from None
    # An IPv6 address may carry a scope; with the port it is the only part of the tuple that a dial needs.
    addresses = dict.fromkeys((str(address[0]), target.port) for *_, address in found)
    return list(addresses)


def _tls_context(options: LoadOptions) -> ssl.SSLContext | None:
    """TLS as the options ask for it; raises OSError when the CA's file is of no use."""
    if not options.target.secure:
        return None
    try:
        context = ssl.create_default_context(cafile=options.ca)
    except ssl.SSLError:
        raise OSError(f"{options.ca}: holds no certificate") from None
    except OSError as error:
        raise OSError(f"{options.ca}: {error.strerror}") from None
    context.set_alpn_protocols(["http/1.1"])
    if options.insecure:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    return context


def _allow_connections(wanted: int, err: TextIO) -> int:
    """Raise the process's own limit of open files for ``wanted`` connections; returns how many it allows."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = wanted + SPARE_FILES
    if soft == resource.RLIM_INFINITY or soft >= needed:
        return wanted
    highest = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (highest, hard))
    except (OSError, ValueError):
        highest = soft
    if highest >= needed:
        return wanted
    allowed = max(1, highest - SPARE_FILES)
    err.write(
        f"quictunnel load: this system allows {highest} open files, so at most {allowed} connections instead of"
        f" {wanted}; raise it with ulimit -n {needed}\n"
    )
    return allowed
