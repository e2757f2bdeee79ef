"""Sparsities as bars, drawn for `plot` and for the command line."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

from parasparse.report.plot_labels import labels
from parasparse.text import needs

if TYPE_CHECKING:
    from matplotlib.figure import Figure

KEPT, DROPPED, MARK = "#3b6fb5", "#c9ced6", "#c2452d"
_ROWS = 50  # bars in a column


def blank_figure(width: float, height: float) -> Figure:
    """Return an empty Figure; raise ImportError if matplotlib is not installed."""
    try:
        from parasparse.report.plot_figure import Picture
    except ImportError as error:
        error.add_note(needs("`plot`", "matplotlib", "plot"))
        raise
    return Picture(figsize=(width, height), dpi=100, layout="constrained")


def sparsity_bars(counts: Mapping[str, tuple[int | None, int]], counted: str) -> Figure:
    """Return a picture with a bar for each tensor, and the total sparsity as a line and title.

    `counts` are the numbers of kept entries (None if the mask is not set) and of all entries by
    name, and `counted` is the plural noun for the entries in the title.
    """
    known = {name: number for name, number in counts.items() if number[0] is not None}
    size = sum(numel for _, numel in known.values())
    total = 1 - sum(kept or 0 for kept, _ in known.values()) / size if size else 0.0
    columns = max(1, math.ceil(len(counts) / _ROWS))
    rows = math.ceil(len(counts) / columns)
    bars = list(zip(labels(list(counts), 60), counts.values(), strict=True))
    width = columns * (2.8 + 0.062 * max((len(name) for name, _ in bars), default=0))
    figure = blank_figure(max(width, 6.0), 1.0 + 0.17 * max(rows, 6))
    figure.suptitle(f"{total:.2%} of {size:,} {counted} are zero", fontsize=10)
    for column, axes in enumerate(figure.subplots(1, columns, squeeze=False)[0]):
        part = bars[column * rows : (column + 1) * rows]
        shares = [1 - kept / n if kept is not None and n else 0.0 for _, (kept, n) in part]
        axes.axvline(total, color=MARK, linewidth=1, linestyle=":")
        axes.barh(range(len(part)), shares, color=KEPT, height=0.7)
        axes.set_yticks(range(len(part)), [name for name, _ in part], fontsize=7)
        for y, (share, (_, (kept, _))) in enumerate(zip(shares, part, strict=True)):
            text = "not set" if kept is None else _percent(share)
            box = {"color": "white", "pad": 0.5}  # hides the line of the total
            axes.text(share + 0.01, y, text, va="center", fontsize=7, bbox=box)
        axes.set_xlim(0, 1.16)
        axes.set_ylim(rows - 0.4, -0.6)  # the first tensor on top; all columns equally tall
        axes.set_xticks([0, 0.5, 1], ["0", "50%", "100%"], fontsize=7)
        axes.set_xlabel("sparsity", fontsize=8)
        axes.spines[["top", "right"]].set_visible(False)
    return figure


def _percent(share: float) -> str:
    text = f"{share:.1%}"
    return "> 99.9%" if text == "100.0%" and share < 1 else text
