"""What a load test counts: latencies in bounded memory, and the outcomes of one stage."""

from array import array
from collections import Counter
from typing import Final

__all__ = ["LATE", "Histogram", "Tally", "requests_of"]

# 128 buckets to each power of two: a bucket is at most 1/128 of its values wide, and its middle is off by half of that.
_PRECISION_BITS: Final = 7
_PRECISION: Final = 1 << _PRECISION_BITS
_HIGHEST: Final = (1 << 32) - 1
"microseconds, a little over an hour; what is above counts as this"

LATE: Final = 0.02
"seconds behind its schedule from which a request has left late: above what timers and a busy neighbour cause"

_MAXIMUM_KINDS: Final = 64
"of failures in a tally: half of each name is the target's own words"

OTHER: Final = "other"


class Histogram:
    """Durations in buckets that grow with the value: percentiles within 0.4 %, 25 kB whatever the number of values."""

    __slots__ = ("_buckets", "_sum", "count", "maximum", "minimum")

    def __init__(self) -> None:
        self._buckets = array("Q", bytes(8 * (_index(_HIGHEST) + 1)))
        self._sum = 0.0
        self.count = 0
        self.minimum = 0.0
        "seconds, exact; 0 if nothing was added"

        self.maximum = 0.0
        "seconds, exact"

    def add(self, seconds: float) -> None:
        """Count one duration; one below zero counts as zero."""
        seconds = max(seconds, 0.0)
        self._buckets[_index(min(int(seconds * 1e6), _HIGHEST))] += 1
        self._sum += seconds
        if seconds < self.minimum or not self.count:
            self.minimum = seconds
        if seconds > self.maximum:
            self.maximum = seconds
        self.count += 1

    def percentile(self, percent: float) -> float:
        """Seconds that ``percent`` (0 to 100) of all values are not above (nearest rank); 0 if there is none."""
        # In integers: 99.9 % of 1000 must be 999 and not the 1000 that float error makes of it.
        rank = max(1, -(-self.count * round(percent * 1e6) // 100_000_000))
        seen = 0
        for index, count in enumerate(self._buckets):
            seen += count
            if count and seen >= rank:
                return min(max(_middle(index) / 1e6, self.minimum), self.maximum)
        return 0.0

    @property
    def mean(self) -> float:
        """Seconds; 0 if nothing was added."""
        return self._sum / self.count if self.count else 0.0


class Tally:
    """What became of the requests of one stage. Times are seconds of one monotonic clock, set by who runs the stage."""

    __slots__ = (
        "cpu",
        "failures",
        "finished",
        "last_left",
        "late",
        "latency",
        "lateness",
        "rate",
        "received",
        "scheduled",
        "sent",
        "started",
        "succeeded",
    )

    def __init__(self, rate: float, duration: float) -> None:
        self.rate = rate
        self.scheduled = requests_of(rate, duration)
        "requests; what ``sent`` lacks of it at the end was given up because the generator was too late"

        self.sent = 0
        self.succeeded = 0
        self.failures: Counter[str] = Counter()
        self.latency = Histogram()
        "of the successful ones, from the scheduled time to the answer's last byte"

        self.lateness = Histogram()
        "from the scheduled time to when a connection was there for the request, or was dialled for it"

        self.late = 0
        "requests that left more than ``LATE`` behind their schedule"

        self.received = 0
        "bytes of bodies"

        self.started = 0.0
        self.last_left = 0.0
        self.finished = 0.0
        self.cpu = 0.0
        "seconds of processor time that the generator used"

    def left(self, lateness: float) -> None:
        """A request went to its connection, ``lateness`` seconds after it should have."""
        self.lateness.add(lateness)
        if lateness > LATE:
            self.late += 1

    def succeed(self, latency: float) -> None:
        """A complete answer with a status of success came ``latency`` seconds after the scheduled time."""
        self.succeeded += 1
        self.latency.add(latency)

    def fail(self, kind: str) -> None:
        """A request failed; kinds beyond the first 64 are counted as one."""
        known = kind in self.failures or len(self.failures) < _MAXIMUM_KINDS
        self.failures[kind if known else OTHER] += 1

    @property
    def failed(self) -> int:
        """Requests that were sent and failed."""
        return self.failures.total()

    @property
    def in_flight(self) -> int:
        """Requests that were sent and whose end is not known yet."""
        return self.sent - self.succeeded - self.failed

    @property
    def unsent(self) -> int:
        """Requests that were never made."""
        return self.scheduled - self.sent

    @property
    def seconds(self) -> float:
        """From the first scheduled time to the last outcome, at least the time that was asked for."""
        return max(self.finished - self.started, self.scheduled / self.rate)

    @property
    def offered_rate(self) -> float:
        """Requests a second that really left."""
        # The last request leaves one interval before the stage's end, hence the one added.
        return self.sent / max(self.last_left - self.started + 1 / self.rate, self.scheduled / self.rate)

    @property
    def achieved_rate(self) -> float:
        """Successful answers a second."""
        return self.succeeded / self.seconds

    @property
    def cpu_share(self) -> float:
        """How much of one core the generator used, 0 to 1."""
        return self.cpu / max(self.finished - self.started, 1e-9)

    @property
    def fell_behind(self) -> bool:
        """Whether the stage was not the load asked for: requests not made, or more than 1 in 100 (and 1) left late."""
        return self.unsent > 0 or self.late > 1 + self.sent // 100


def requests_of(rate: float, duration: float) -> int:
    """How many requests leave in ``duration`` seconds at ``rate`` a second."""
    return int(rate * duration + 1e-6)  # 0.7 a second for 10 s are 7 requests, though 0.7 * 10 is a hair less


def _index(value: int) -> int:
    if value < _PRECISION:
        return value
    shift = value.bit_length() - 1 - _PRECISION_BITS
    return (shift << _PRECISION_BITS) + (value >> shift)


def _middle(index: int) -> float:
    """The middle, in microseconds, of a bucket."""
    if index < _PRECISION:
        return index + 0.5
    shift = (index >> _PRECISION_BITS) - 1
    lowest = ((index & (_PRECISION - 1)) + _PRECISION) << shift
    return lowest + (1 << shift) / 2
