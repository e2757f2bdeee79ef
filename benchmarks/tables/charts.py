"""The bar charts at the top of docs/performance.md and docs/payoff.md.

Each is an SVG whose description holds the numbers that it shows, so a test can compare them with
the results without drawing.
"""

from __future__ import annotations

import html
import io
import json
import re
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from benchmarks.tables.losses import COMPARED, quotients
from benchmarks.tables.markdown import Content, asked, times

FASTER, SLOWER = "#00796b", "#c75b12"
SHADES = ("#b2dfdb", "#4db6ac", "#00897b", "#004d40")
# Comparisons with other tools, and of masked networks with dense ones.
ON_PERFORMANCE = [
    (compared, peer)
    for compared in COMPARED
    if compared.file not in ("payoff", "packing", "packed_sizes", "runtimes")
    for peer in compared.theirs
    if peer != "dense" or compared.what == "networks with masks"
]
STYLE = {"svg.hashsalt": "parasparse", "svg.fonttype": "none", "font.size": 8,
         "axes.spines.top": False, "axes.spines.right": False}  # fmt: skip
Data = list[list[Any]]


def ratios(contents: dict[str, Content]) -> Data:
    """Return for each comparison its name, the other tool, and least, median and worst ratio."""
    rows: Data = []
    for compared, peer in ON_PERFORMANCE:
        if found := quotients(contents.get(compared.file, {}), compared, peer).values():
            numbers = [min(found), statistics.median(found), max(found)]
            rows.append([compared.what, peer, *(round(number, 3) for number in numbers)])
    return rows


def drawn_ratios(rows: Data) -> Figure:
    figure = Figure(figsize=(8, 0.2 * len(rows) + 1.3), layout="constrained")
    axes = figure.add_subplot()
    place, places, labels, last = 0.0, [], [], None
    for what, peer, least, median, most in rows:
        place += 1.0 if what == last else 1.6
        color = FASTER if median <= 1 else SLOWER
        axes.barh(place, median - 1, left=1, color=color, height=0.7)
        axes.plot([least, most], [place, place], color="#333333", linewidth=1)
        axes.annotate(times(median), (max(most, 1), place), (3, 0), textcoords="offset points",
                      va="center")  # fmt: skip
        labels.append(f"{what}: {peer}")
        places.append(place)
        last = what
    axes.set_yticks(places, labels)
    axes.set_ylim(place + 0.8, 0.8)
    axes.set_xscale("log")
    axes.set_xlim(0.01, 30)
    marks = [0.01, 0.1, 0.5, 1, 2, 10]
    axes.set_xticks(marks, [f"{mark:g}" for mark in marks])
    axes.minorticks_off()
    axes.axvline(1, color="#333333", linewidth=0.8)
    axes.set_xlabel("parasparse / other, time or bytes (below 1: parasparse is faster or smaller)")
    return figure


def payoffs(contents: dict[str, Content]) -> Data:
    """Return the rows of both charts: what, sparsity, and speed on two threads or size of file."""
    rows: Data = []
    pattern = r"(.*), (\d+%), 2 thread\(s\), .* of the ceiling"
    for (name, zeros), ts in asked(contents.get("payoff", {"results": {}}), pattern):
        rows.append(["times faster", name, zeros, round(1 / ts["accelerated"]["ratio"], 3)])
    for question, share in contents.get("packing", {}).get("sizes", {}).items():
        kind, dtype, zeros, suffix = question.replace("torch.", "").split(", ")
        if suffix == ".pt":
            rows.append(["size", f"{kind}, {dtype}", zeros, round(share, 3)])
    return rows


def drawn_payoffs(rows: Data) -> Figure:
    figure = Figure(figsize=(6, 7.2), layout="constrained")
    titles = {
        "times faster": "Speed on a CPU, unstructured zeros, two threads (1 = dense)",
        "size": "Size of a packed file (1 = dense)",
    }
    for axes, (kind, title) in zip(figure.subplots(2, 1), titles.items(), strict=True):
        own = [row[1:] for row in rows if row[0] == kind]
        names = list(dict.fromkeys(row[0] for row in own))
        sparsities = list(dict.fromkeys(row[1] for row in own))
        for i, (zeros, color) in enumerate(zip(sparsities, SHADES, strict=True)):
            values = [value for name in names for n, z, value in own if (n, z) == (name, zeros)]
            places = [j + 0.2 * (i - 1.5) for j in range(len(names))]
            bars = axes.barh(places, values, height=0.18, color=color, label=f"{zeros} zeros")
            axes.bar_label(bars, [f"{value:.2f}" for value in values], padding=2, fontsize=6.5)
        axes.set_yticks(range(len(names)), [name.replace(", ", "\n", 1) for name in names])
        axes.invert_yaxis()
        axes.margins(x=0.12)
        axes.set_title(title, fontsize=8)
        if kind == "times faster":
            axes.axvline(1, color="#333333", linewidth=0.8)
            axes.legend(frameon=False, loc="lower right")
    return figure


CHARTS: dict[str, tuple[Callable[[dict[str, Content]], Data], Callable[[Data], Figure]]] = {
    "performance": (ratios, drawn_ratios),
    "payoff": (payoffs, drawn_payoffs),
}


def svg(name: str, contents: dict[str, Content]) -> bytes:
    """Return the chart; the same bytes for the same results and version of matplotlib."""
    data, draw = CHARTS[name]
    rows, file = data(contents), io.BytesIO()
    about = {"Date": None, "Creator": None, "Description": json.dumps(rows)}
    with matplotlib.rc_context(STYLE):
        draw(rows).savefig(file, format="svg", metadata=about)
    return re.sub(rb" +\n", b"\n", file.getvalue())


def is_current(path: Path, contents: dict[str, Content]) -> bool:
    """Return whether the chart at `path` shows the results."""
    found = re.search(r"<dc:description>(.*?)</dc:description>", path.read_text(), re.DOTALL)
    data, _ = CHARTS[path.stem]
    return found is not None and json.loads(html.unescape(found[1])) == data(contents)
