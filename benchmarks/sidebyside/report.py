"""The results as Markdown and as JSON."""

import json
import os
import platform
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.sidebyside.figures import Block, Case, Sample, View, errors, ratios, spread
from benchmarks.sidebyside.peers import BASELINE, DIRECT

__all__ = ["Results", "as_markdown", "glance", "machine", "read", "write"]

FORMAT = 1
"of the JSON; members are only ever added"


@dataclass
class Results:
    """All of a run."""

    date: str
    machine: dict[str, Any]
    versions: dict[str, str]
    "of what is used to measure"

    options: str
    "the command's"

    peers: dict[str, dict[str, str]]
    "by name: label, about, version, missing (why it did not take part, empty if it did)"

    blocks: dict[str, Block] = field(default_factory=dict)
    unmeasured: dict[str, str] = field(default_factory=dict)
    "axes that could not be, with the reason"

    def as_dict(self) -> dict[str, Any]:
        axes = {name: block.as_dict() for name, block in self.blocks.items()}
        return {"format": FORMAT, **vars(self), "blocks": axes}


def read(path: Path) -> Results:
    """What ``write`` wrote. Raises OSError, or ValueError for a file that is something else."""
    try:
        data = json.loads(path.read_text())
        if data.pop("format") != FORMAT:
            raise ValueError(f"{path.name} has another format")
        blocks = {name: Block.from_dict(block) for name, block in data.pop("blocks").items()}
        return Results(**data, blocks=blocks)
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path.name} is no result of this: {error}") from None


def write(results: Results, directory: Path) -> None:
    """latest.json and latest.md."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "latest.json").write_text(json.dumps(results.as_dict(), indent=1) + "\n")
    (directory / "latest.md").write_text(as_markdown(results))


def machine() -> dict[str, Any]:
    """What the figures depend on; nothing that names this machine."""
    info = Path("/proc/cpuinfo").read_text()
    model = re.search(r"^model name\s*:\s*(.*)$", info, re.M)
    total = re.search(r"^MemTotal:\s+(\d+) kB", Path("/proc/meminfo").read_text(), re.M)
    kernel = re.match(r"\d+\.\d+", platform.release())
    return {
        "processor": model[1].strip() if model else platform.machine(),
        "processors": len(os.sched_getaffinity(0)),
        "memory_gb": round(int(total[1]) * 1024 / 1e9, 1) if total else 0,
        "kernel": f"{platform.system()} {kernel[0] if kernel else ''}".strip(),
    }


# Markdown


def as_markdown(results: Results) -> str:
    """The whole report."""
    plots = [f"![{name}]({name}.png)" for name in results.blocks if name in PLOTTED]
    parts = [
        "# Side by side",
        f"Made by `make bench`{f' with `{results.options}`' if results.options else ''}, {results.date}.",
        about(results),
        "Each cell is the median of the repeats, which took turns among the peers, and their range; in brackets the "
        "median of the ratios to nginx's reverse proxy in the same repeat. Every answer's status was checked; requests "
        "that failed are counted in the cell.",
        peers_table(results),
        *([glance(results)] if results.blocks else []),
        *(f"**{name}** was not measured: {why}." for name, why in results.unmeasured.items()),
        *(block_text(results, block) for block in results.blocks.values()),
        *(["## Plots", *plots] if plots else []),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


PLOTTED = ("requests", "bulk", "steady", "cost")


def about(results: Results) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in results.versions.items())
    of = results.machine
    return (
        f"{of['processors']} of {of['processor']}, {of['memory_gb']} GB, {of['kernel']}; {versions}. "
        "Load, peers and backends share the machine over loopback."
    )


def label(results: Results, peer: str) -> str:
    return results.peers.get(peer, {}).get("label", peer)


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def peers_table(results: Results) -> str:
    rows = [
        (each["label"], each["version"] or "", each["about"], each["missing"] or "yes")
        for each in results.peers.values()
    ]
    return table(("peer", "version", "between server and client; what it reads", "took part"), rows)


def number(value: float, digits: int) -> str:
    """A figure for people: no digits that mean nothing."""
    return f"{value:,.{0 if abs(value) >= 1000 else digits}f}"


def cell(block: Block, peer: str, case: Case, view: View) -> str:
    """What a peer came to, or in a word why it did not: the reasons stand below the tables."""
    samples = block.of(peer, case.name)
    if not samples:
        return short(block.reason(peer, case.name) or "not measured")
    spreads = [spread(samples, key) for key in view.keys]
    found = [each for each in spreads if each is not None]
    if len(found) < len(spreads):
        return "" if any(sample.values for sample in samples) else "failed"
    text = " / ".join(number(each.median, view.digits) for each in found)
    last = found[-1]
    if last.count > 1:
        text += f" ({number(last.least, view.digits)}-{number(last.most, view.digits)})"
    if view.ratio and peer not in (BASELINE, DIRECT):
        ratio = ratios(samples, block.of(BASELINE, case.name), view.keys[0])
        text += f" [{ratio.median:.2f}]" if ratio else ""
    return text


def short(why: str) -> str:
    """A reason as it stands in a cell."""
    return why.partition(":")[0]


def trouble(samples: Sequence[Sample]) -> str:
    """What went wrong in samples that have figures all the same."""
    said = [f"{count:,} {kind}" for kind, count in errors(samples).most_common()]
    if any(sample.values.get("whole") == 0 for sample in samples):
        said.append("cut")
    if any(sample.values.get("behind") for sample in samples):
        said.append("load fell behind")
    broken = sum(bool(sample.failed) for sample in samples)
    if 0 < broken < len(samples):
        said.append(f"{broken} of {len(samples)} failed")
    return "".join(f"; {each}" for each in said)


def reasons(results: Results, block: Block) -> list[str]:
    """The whole of what kept peers from having figures, each once."""
    found: dict[str, dict[str, None]] = {}
    for peer in block.peers:
        if results.peers.get(peer, {}).get("missing"):
            continue
        for why in block.cannot.get(peer, {}).values():
            if ":" in why:
                found.setdefault(why, {})[label(results, peer)] = None
        for sample in block.samples:
            if sample.peer == peer and sample.failed:
                found.setdefault(f"failed: {sample.failed}", {})[label(results, peer)] = None
    return [f"- {', '.join(peers)}: {why}" for why, peers in found.items()]


def block_text(results: Results, block: Block) -> str:
    """One axis."""
    loads = [sample.load for sample in block.samples]
    when = f"{block.repeats} repeat{'s' if block.repeats > 1 else ''}, {block.began}, {block.seconds:.0f} s"
    if loads:
        when += f", load average {min(loads):.1f}-{max(loads):.1f}"
    parts = [f"## {block.title}", block.note, f"`{block.name}`: {when}."]
    absent = [peer for peer in block.peers if results.peers.get(peer, {}).get("missing")]
    peers = [peer for peer in block.peers if peer not in absent]
    groups: dict[str, list[Case]] = {}
    for case in block.cases:
        groups.setdefault(case.group, []).append(case)
    for group, cases in groups.items():
        if len(cases) == 1:
            rows = []
            for peer in peers:
                cells = [cell(block, peer, cases[0], view) for view in block.views]
                if not any(sample.values for sample in block.of(peer, cases[0].name)):
                    cells[1:] = [""] * (len(cells) - 1)  # the reason once, not in each column
                cells[0] += trouble(block.of(peer, cases[0].name))
                rows.append([label(results, peer), *cells])
            heading = ", ".join(word for word in (group, cases[0].label) if word)
            parts += [heading, table(("", *(view.title for view in block.views)), rows)]
            continue
        for view in block.views:
            rows = []
            for peer in peers:
                cells = [cell(block, peer, case, view) for case in cases]
                if view is block.views[0]:
                    cells = [text + trouble(block.of(peer, case.name)) for text, case in zip(cells, cases, strict=True)]
                rows.append([label(results, peer), *cells])
            parts += [f"{view.title}: {group}", table(("", *(case.label for case in cases)), rows)]
    if why := reasons(results, block):
        parts.append("\n".join(why))
    if absent:
        parts.append(f"Not there: {', '.join(label(results, peer) for peer in absent)}.")
    return "\n\n".join(part for part in parts if part)


# At a glance

GLANCE = (
    # heading, axis, case, value, digits, compared with the baseline
    ("requests/s, 64 connections", "requests", "100B-64", "requests_per_s", 0, True),
    ("requests/s, 1,000 connections", "requests", "100B-1000", "requests_per_s", 0, True),
    ("MB/s, one 100 MB download", "bulk", "100MB-down-1", "megabytes_per_s", 0, False),
    ("p99 ms, 1,000/s, 35 ms backend", "steady", "35ms-1000", "p99", 1, False),
    ("ms added to a lone request", "lone", "lone", "added", 2, False),
    ("p99 beside a download, 2 % loss, times", "beside", "2", "times", 2, False),
    ("MB idle, server + client", "cost", "cost", "idle_server+idle_client", 0, False),
    ("CPU s per 100,000 requests", "cost", "cost", "cpu_per_100k", 1, False),
    ("MB at so many WebSockets, server + client", "idle", "sockets", "server_mb+client_mb", 0, False),
    ("ms to the first answer", "start", "start", "milliseconds", 0, False),
)


def glance(results: Results) -> str:
    """The few figures that people ask for first, of those that were measured."""
    columns = [each for each in GLANCE if each[1] in results.blocks]
    columns = [each for each in columns if any(case.name == each[2] for case in results.blocks[each[1]].cases)]
    if not columns:
        return ""
    rows = []
    for name, peer in results.peers.items():
        if peer["missing"]:
            continue
        cells = [glance_cell(results.blocks[axis], name, case, key, digits, compared)
                 for _, axis, case, key, digits, compared in columns]  # fmt: skip
        rows.append([peer["label"], *cells])
    says = "`!`: some failed, see below." if any("!" in text for row in rows for text in row) else ""
    return "## At a glance\n\n" + (f"{says}\n\n" if says else "") + table(("", *(each[0] for each in columns)), rows)


def glance_cell(block: Block, peer: str, case: str, key: str, digits: int, compared: bool) -> str:
    """One of them: the median, and the ratio."""
    samples = block.of(peer, case)
    spreads = [spread(samples, each) for each in key.split("+")]
    if any(each is None for each in spreads):
        spreads = spreads[:1]  # nginx has no client
    found = [each.median for each in spreads if each is not None]
    if not found:
        return ""
    text = number(sum(found), digits)
    if compared and peer not in (BASELINE, DIRECT):
        ratio = ratios(samples, block.of(BASELINE, case), key)
        text += f" [{ratio.median:.2f}]" if ratio else ""
    return text + (" !" if errors(samples) or any(sample.failed for sample in samples) else "")
