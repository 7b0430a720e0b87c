"""What limits a tunnel: from figures to a sentence, without clock, process or socket.

The rules stand in the order of what they prove. A processor at its limit explains all that comes after it; a backend
that does no more when it is asked directly explains all that the tunnel could be blamed for; then come loss, flow
control and the path. What none of them explains is said to be not known.
"""

from collections.abc import Mapping
from typing import Final, NamedTuple

from quictunnel.bench.meter import Work
from quictunnel.wire.credit import MAXIMUM_WINDOW

__all__ = ["Bulk", "Rates", "Verdict", "judge_bulk", "judge_rates"]

BUSY: Final = 0.9
"share of a processor, or of all, from which it is at its limit: the rest is the scheduler's"

AS_GOOD: Final = 1.25
"times what came through the tunnel: a backend that does not do that much when asked directly is the limit"

NOT_GROWN: Final = 1.5
"times a lone request's latency: below it nothing queues, so more connections would do more"

LOST: Final = 0.005
"share of datagrams from which loss is told of as the limit"

MOSTLY: Final = 0.5
"share of the moments looked at"

NEAR: Final = 0.7
"of the largest window under way in a round trip: acknowledgement and credit take their part of the time"

GROWING: Final = 1.5
"times what the first half of a transfer moved from which it had not come to its end"

QUEUED: Final = 2.0
FLAT: Final = 1.3
"times the idle round trip: from the first on a queue was full, up to the second none was"

FEW: Final = 0.01
"share of the requests that failed from which that is the limit"

DISTANT: Final = 0.005
"seconds of round trip from which a wait for credit is the distance's fault, and below which the reader's"

_TOO_MUCH: Final = "connection_limit_reached"

# Whose processor it is, in a sentence.
_OWNERS: Final = {
    "server": "the server's processor",
    "client": "the client's processor",
    "backend": "the backend's processor",
    "bench": "the bench's own processor",
}


class Verdict(NamedTuple):
    """What limits, as a word for programs and a sentence for people."""

    limit: str
    """``processor`` (of one process), ``processors`` (of the machine), ``others`` (who have those), ``backend``,
    ``slots``, ``failures``, ``connections``, ``loss``, ``window``, ``reader``, ``time``, ``bandwidth``, ``path``, or
    ``unknown``"""

    text: str


class Rates(NamedTuple):
    """Small requests over so many connections, each of which asks again when it was answered. Times in seconds."""

    connections: int
    rate: float
    "answers a second"

    p50: float
    p99: float
    failures: Mapping[str, int]
    "by kind"

    answered: int
    work: Work
    lone_p50: float = 0.0
    "of a request that has the tunnel to itself; 0: not known"

    direct_rate: float | None = None
    "answers a second of the backend, asked directly over as many connections"


class Bulk(NamedTuple):
    """Bytes in one direction."""

    streams: int
    rate: float
    "bytes a second"

    bytes: int
    "in all, before those that count too"

    failures: Mapping[str, int]
    work: Work
    round_trip: float | None = None
    "of the link meanwhile, in seconds"

    on_credit: float | None = None
    "share of the moments looked at in which streams waited for credit and nothing else waited to be sent"

    on_path: float | None = None
    "share of the moments in which the client had bytes for QUIC to send that it held back"

    growth: float | None = None
    "what the second half of the time moved, as a multiple of the first"

    idle_trip: float | None = None
    "of the link when nothing else went over it, in seconds"

    direct_rate: float | None = None
    "bytes a second of the backend, asked directly"


def judge_rates(rates: Rates) -> Verdict:
    """What limits the requests a second."""
    found = _processor(rates.work)
    if found is not None:
        return found
    if rates.direct_rate is not None and rates.direct_rate <= AS_GOOD * rates.rate:
        text = f"the backend: asked directly, it answers {rates.direct_rate:,.0f} requests/s"
        return Verdict("backend", text)
    found = _failures(rates.failures, rates.answered)
    if found is not None:
        return found
    if rates.lone_p50 and 0 < rates.p50 <= NOT_GROWN * rates.lone_p50:
        text = (
            f"the number of connections: each waits {_ms(rates.p50)} for its answer, about as long as a lone one"
            f" ({_ms(rates.lone_p50)}); more of them would do more"
        )
        return Verdict("connections", text)
    return _unknown(rates.work)


def judge_bulk(bulk: Bulk) -> Verdict:
    """What limits the bytes a second."""
    found = _processor(bulk.work) or _failures(bulk.failures, 0)
    if found is not None:
        return found
    if bulk.direct_rate is not None and bulk.direct_rate < AS_GOOD * bulk.rate:
        return Verdict("backend", f"the backend: asked directly, it does {_mb(bulk.direct_rate)}")
    return _loss(bulk) or _credit(bulk) or _path(bulk) or _unknown(bulk.work)


# The rules


def _processor(work: Work) -> Verdict | None:
    known = {name: share for name, share in work.processes.items() if share is not None}
    worst = max(known, key=lambda name: known[name], default="")
    if worst and known[worst] >= BUSY:
        more = ": the tunnel may do more" if worst == "bench" else ""
        return Verdict("processor", f"{_OWNERS.get(worst, worst)} ({_share(known[worst])} of a core){more}")
    if work.machine is None or work.machine < BUSY * work.cores:
        return None
    others = {"other programs": work.machine - sum(known.values())}
    if others["other programs"] > sum(known.values()):
        ours = ", ".join(f"{name} {_share(share)}" for name, share in known.items())
        text = f"other programs, which have {_share(others['other programs'])} of this machine's"
        return Verdict("others", f"{text} {work.cores} cores ({ours})")
    parts = [
        f"{name} {_share(share)}"
        for name, share in sorted((known | others).items(), key=lambda item: -item[1])
        if share >= 0.05
    ]
    whose = "this machine's only core" if work.cores == 1 else f"this machine's {work.cores} cores, all busy"
    return Verdict("processors", f"{whose} ({', '.join(parts)})")


def _failures(failures: Mapping[str, int], answered: int) -> Verdict | None:
    failed = sum(failures.values())
    if not failed or failed < FEW * (failed + answered):
        return None
    kind = max(failures, key=lambda kind: failures[kind])
    what = f"{_share(failed / (failed + answered))} of the requests failed, most of them with {kind}"
    if _TOO_MUCH in kind:
        return Verdict("slots", f"the server's limits: {what} (--max-in-flight, --slot-wait, connect --max-links)")
    return Verdict("failures", f"failures: {what}")


def _loss(bulk: Bulk) -> Verdict | None:
    if bulk.work.lost is not None and bulk.work.lost >= LOST:
        text = (
            f"loss on this machine: {bulk.work.lost:.1%} of the datagrams found no room in a socket's buffer"
            " (net.core.rmem_max, net.core.wmem_max)"
        )
        return Verdict("loss", text)
    return None


def _credit(bulk: Bulk) -> Verdict | None:
    trip = bulk.round_trip
    if trip is not None and bulk.rate * trip >= NEAR * MAXIMUM_WINDOW * bulk.streams:
        text = (
            f"the window: {MAXIMUM_WINDOW >> 20} MiB for each stream, at a round trip of {_ms(trip)}"
            f" {_mb(MAXIMUM_WINDOW / trip)}; more streams at a time would do more"
        )
        return Verdict("window", text)
    if bulk.on_credit is None or bulk.on_credit < MOSTLY:
        return None
    waited = f"streams waited for credit in {_share(bulk.on_credit)} of the moments looked at"
    if trip is not None and trip >= DISTANT:
        text = f"the window, which has not grown to the distance: {waited}, at a round trip of {_ms(trip)}"
        return Verdict("window", f"{text}; serve --window-budget is what windows grow out of")
    return Verdict("reader", f"the receiving end, which takes no more: {waited}")


def _path(bulk: Bulk) -> Verdict | None:
    grows = bulk.growth is not None and bulk.growth >= GROWING
    is_held = bulk.on_path is not None and bulk.on_path >= MOSTLY
    trip, idle = bulk.round_trip, bulk.idle_trip
    held = f"QUIC held bytes back in {_share(bulk.on_path or 0.0)} of the moments looked at"
    unseen = "" if "server" in bulk.work.processes else "; how busy the server is cannot be seen from here"
    if is_held and trip is not None and idle is not None and trip >= QUEUED * idle and trip - idle >= DISTANT:
        text = f"the path's bandwidth: {held}, and its round trip grew from {_ms(idle)} to {_ms(trip)}, so a queue"
        return Verdict("bandwidth", f"{text} was full on the way{unseen}")
    if grows:
        more = f"{_share((bulk.growth or 1.0) - 1)} more in the second half than in the first"
        return Verdict("time", f"the time: it was still growing, {more}; a longer --duration shows more")
    if is_held and trip is not None and idle is not None and trip <= FLAT * idle:
        text = f"loss on the path: {held}, though its round trip of {_ms(idle)} has not grown ({_ms(trip)}): no queue"
        return Verdict("loss", f"{text} was full{unseen}")
    return Verdict("path", f"the path: its bandwidth, or loss on it, for {held}{unseen}") if is_held else None


def _unknown(work: Work) -> Verdict:
    known = {name: share for name, share in work.processes.items() if share is not None}
    worst = max(known, key=lambda name: known[name], default="")
    if not worst:
        return Verdict("unknown", "not known; this system does not tell how busy the processes are")
    busiest = f"the busiest process is the {worst} with {_share(known[worst])} of a core"
    return Verdict("unknown", f"not known; {busiest}")


def _share(value: float) -> str:
    return f"{value:.0%}".replace("%", " %")


def _ms(seconds: float) -> str:
    return f"{seconds * 1000:.1f} ms"


def _mb(rate: float) -> str:
    return f"{rate / 1e6:,.1f} MB/s"
