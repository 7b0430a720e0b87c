"""The plots: made from the results alone, with matplotlib (pip install 'quictunnel[bench]')."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.sidebyside.figures import Block, spread
from benchmarks.sidebyside.report import Results

__all__ = ["plot"]


def plot(results: Results, directory: Path) -> list[Path]:
    """A PNG for each axis that has one; their paths. Raises ImportError without matplotlib."""
    drawn = {name: results.blocks[name] for name in DRAWN if name in results.blocks}
    drawn = {name: block for name, block in drawn.items() if any(sample.values for sample in block.samples)}
    if not drawn:
        return []
    import matplotlib

    matplotlib.use("Agg")
    directory.mkdir(parents=True, exist_ok=True)
    made = []
    for name, block in drawn.items():
        figure = DRAWN[name](results, block)
        figure.savefig(directory / f"{name}.png", dpi=110)
        made.append(directory / f"{name}.png")
    return made


# Colours: each product has one, its variants differ by the line.
COLOURS = {
    "direct": "#999999", "nginx": "#333333", "quictunnel-aioquic": "#1f77b4", "quictunnel-qh3": "#d62728",
    "frp": "#2ca02c", "rathole": "#9467bd", "bore": "#8c564b", "chisel": "#e377c2", "piko": "#bcbd22",
}  # fmt: skip


def colour(peer: str) -> str:
    names = [name for name in COLOURS if peer == name or peer.startswith(f"{name}-")]
    return COLOURS[max(names, key=len)] if names else "#17becf"


def dashed(peer: str) -> str:
    if peer.endswith("-plain"):
        return ":"
    return "--" if peer.rpartition("-")[2][:1].isdigit() or peer == "frp-quic" else "-"


def there(results: Results, block: Block, case: str, key: str) -> list[tuple[str, Any]]:
    """The peers with a value, and its spread."""
    found = [(peer, spread(block.of(peer, case), key)) for peer in results.peers]
    return [(peer, each) for peer, each in found if each is not None]


def requests(results: Results, block: Block) -> Any:
    """Requests a second and p99 against connections, for each size of answer."""
    import matplotlib.pyplot as plt
    from matplotlib.ticker import FuncFormatter

    groups = list(dict.fromkeys(case.group for case in block.cases))
    groups = [group for group in groups if sum(case.group == group for case in block.cases) > 1]
    figure, grid = plt.subplots(2, max(1, len(groups)), figsize=(5.4 * max(1, len(groups)), 8.4), squeeze=False)
    for column, group in enumerate(groups):
        cases = [case for case in block.cases if case.group == group]
        at = {case.name: int(case.label.replace(",", "")) for case in cases}
        for row, (key, text) in enumerate((("requests_per_s", "requests/s"), ("p99", "p99, ms"))):
            axes = grid[row][column]
            for peer in results.peers:
                spreads = [(at[case.name], spread(block.of(peer, case.name), key)) for case in cases]
                points = [(x, each) for x, each in spreads if each is not None]
                if not points:
                    continue
                xs = [x for x, _ in points]
                axes.plot(xs, [each.median for _, each in points], dashed(peer), color=colour(peer), marker="o",
                          markersize=4, label=results.peers[peer]["label"])  # fmt: skip
                axes.fill_between(xs, [each.least for _, each in points], [each.most for _, each in points],
                                  color=colour(peer), alpha=0.08, linewidth=0)  # fmt: skip
            axes.set_xscale("log")
            axes.set_yscale("log")
            axes.set_xticks(list(at.values()), [f"{x:,}" for x in at.values()])
            axes.minorticks_off()
            axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
            axes.set_xlabel("connections")
            axes.set_ylabel(text)
            axes.set_title(group.partition(",")[0], fontsize=11)
            axes.grid(True, alpha=0.3)
    columns = min(6, 2 * len(groups) or 1)
    handles, labels = grid[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncols=columns, frameon=False)
    figure.tight_layout(rect=(0, 0.01 + 0.025 * -(-len(labels) // columns), 1, 1))
    return figure


def bars(results: Results, axes: Any, block: Block, case: str, key: str, title: str, unit: str) -> None:
    """One horizontal bar for each peer, with its figure and its range."""
    found = there(results, block, case, key)
    places = range(len(found))
    medians = [each.median for _, each in found]
    axes.barh(places, medians, color=[colour(peer) for peer, _ in found],
              xerr=[[each.median - each.least for _, each in found], [each.most - each.median for _, each in found]],
              error_kw={"elinewidth": 1, "ecolor": "#555555"})  # fmt: skip
    axes.set_yticks(places, [results.peers[peer]["label"] for peer, _ in found], fontsize=8)
    axes.invert_yaxis()
    for place, (_, each) in zip(places, found, strict=True):
        text = f"  {each.median:,.0f}" if each.median >= 100 else f"  {each.median:.3g}"
        axes.text(max(each.most, each.median), place, text, va="center", fontsize=8)
    axes.margins(x=0.2)
    axes.set_title(title, fontsize=10)
    axes.set_xlabel(unit)
    axes.grid(True, axis="x", alpha=0.3)
    axes.set_axisbelow(True)


def panels(count: int, columns: int, rows_high: float) -> tuple[Any, list[Any]]:
    import matplotlib.pyplot as plt

    columns = max(1, min(columns, count))
    rows = -(-count // columns)
    figure, grid = plt.subplots(rows, columns, figsize=(5.2 * columns, rows_high * rows), squeeze=False)
    flat = [axes for row in grid for axes in row]
    for axes in flat[count:]:
        axes.set_visible(False)
    return figure, flat


def bulk(results: Results, block: Block) -> Any:
    """MB/s of each kind of transfer."""
    figure, flat = panels(len(block.cases), 4 if len(block.cases) > 4 else 2, 0.9 + 0.3 * len(results.peers))
    for axes, case in zip(flat, block.cases, strict=False):
        bars(results, axes, block, case.name, "megabytes_per_s", f"{case.group}, {case.label}", "MB/s")
    figure.tight_layout()
    return figure


def steady(results: Results, block: Block) -> Any:
    """p99 at fixed rates."""
    figure, flat = panels(len(block.cases), 2, 0.9 + 0.3 * len(results.peers))
    for axes, case in zip(flat, block.cases, strict=False):
        bars(results, axes, block, case.name, "p99", f"{case.label}, {case.group}", "p99, ms")
    figure.tight_layout()
    return figure


def cost(results: Results, block: Block) -> Any:
    """Memory and processor time."""
    wanted = (
        ("idle_server", "memory of the server, idle", "MB"),
        ("idle_client", "memory of the client, idle", "MB"),
        ("after_server", "memory of the server, after the load", "MB"),
        ("after_client", "memory of the client, after the load", "MB"),
        ("cpu_per_100k", "100,000 requests, server and client", "CPU s"),
        ("cpu_per_gb", "one GB down, server and client", "CPU s"),
    )
    figure, flat = panels(len(wanted), 2, 0.9 + 0.3 * len(results.peers))
    for axes, (key, title, unit) in zip(flat, wanted, strict=True):
        bars(results, axes, block, "cost", key, title, unit)
    figure.tight_layout()
    return figure


DRAWN: dict[str, Callable[[Results, Block], Any]] = {
    "requests": requests,
    "bulk": bulk,
    "steady": steady,
    "cost": cost,
}
