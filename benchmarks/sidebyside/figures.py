"""What was measured: samples, and what is said of several of them."""

import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

__all__ = ["EVERY", "Block", "Case", "Sample", "Spread", "View", "ratios", "spread"]

EVERY = "*"
"in place of a case's name: all of them"


@dataclass(frozen=True)
class Case:
    """One thing that is asked of every peer; cases of one group stand in one table."""

    name: str
    group: str
    label: str


@dataclass(frozen=True)
class View:
    """A column, or a table, of the report."""

    title: str
    keys: tuple[str, ...]
    "the values that it shows; the range is that of the last"

    digits: int = 0
    ratio: bool = False
    "whether it is compared with the baseline"


@dataclass
class Sample:
    """What one peer came to in one case, once."""

    peer: str
    case: str
    repeat: int
    values: dict[str, float] = field(default_factory=dict)
    errors: dict[str, int] = field(default_factory=dict)
    "requests that failed, by kind"

    failed: str = ""
    "why there is nothing"

    load: float = 0.0
    "the machine's load average (of one minute) when it was over"


@dataclass
class Block:
    """All that was measured on one axis."""

    name: str
    title: str
    note: str
    views: list[View]
    cases: list[Case] = field(default_factory=list)
    samples: list[Sample] = field(default_factory=list)
    cannot: dict[str, dict[str, str]] = field(default_factory=dict)
    "why a peer has no samples of a case, or of EVERY case"

    peers: list[str] = field(default_factory=list)
    repeats: int = 0
    began: str = ""
    seconds: float = 0.0

    def of(self, peer: str, case: str) -> list[Sample]:
        """The samples of one cell."""
        return [sample for sample in self.samples if sample.peer == peer and sample.case == case]

    def reason(self, peer: str, case: str) -> str:
        """Why there are none, empty if nothing is known."""
        reasons = self.cannot.get(peer, {})
        return reasons.get(case) or reasons.get(EVERY, "")

    def refuse(self, peer: str, why: str, case: str = EVERY) -> None:
        """Say why there will be none."""
        self.cannot.setdefault(peer, {})[case] = why

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "Block":
        """What as_dict made. Raises KeyError or TypeError for anything else."""
        views = [View(**each | {"keys": tuple(each["keys"])}) for each in data["views"]]
        cases = [Case(**each) for each in data["cases"]]
        samples = [Sample(**each) for each in data["samples"]]
        return cls(**data | {"views": views, "cases": cases, "samples": samples})


@dataclass(frozen=True)
class Spread:
    """Several measurements of one value."""

    median: float
    least: float
    most: float
    count: int


def spread(samples: Sequence[Sample], key: str) -> Spread | None:
    """The middle and the ends of a value; None if no sample has it."""
    found = [sample.values[key] for sample in samples if key in sample.values]
    return Spread(statistics.median(found), min(found), max(found), len(found)) if found else None


def ratios(samples: Sequence[Sample], baseline: Sequence[Sample], key: str) -> Spread | None:
    """The spread of the ratios to the baseline, each within its own repeat; None where there are none."""
    whole = {sample.repeat: sample.values[key] for sample in baseline if sample.values.get(key)}
    found = [
        sample.values[key] / whole[sample.repeat]
        for sample in samples
        if key in sample.values and sample.repeat in whole
    ]
    return Spread(statistics.median(found), min(found), max(found), len(found)) if found else None


def errors(samples: Sequence[Sample]) -> Counter[str]:
    """All failed requests, by kind."""
    found: Counter[str] = Counter()
    for sample in samples:
        found.update(sample.errors)
    return found
