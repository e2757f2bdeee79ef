"""The updates of a controller as curves."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from parasparse.report.plot_bars import KEPT, MARK, blank_figure
from parasparse.report.plot_labels import labels
from parasparse.training.history import Update

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def update_curves(history: Sequence[Update], accuracy: Mapping[int, float]) -> Figure:
    """Return panels with sparsity, with churn and overlap, and with accuracy if it is given."""
    if not history:
        raise ValueError(
            "`subject` must have made an update; its history is empty. Call its `step()` after "
            "each `optimizer.step()`."
        )
    steps, unit = [update.step for update in history], "step"
    if any(b <= a for a, b in itertools.pairwise(steps)):
        steps, unit = list(range(1, len(steps) + 1)), "update"
    number = 3 if accuracy else 2
    figure = blank_figure(8.0, 1.0 + 2.1 * number)
    top, middle, *bottom = panels = figure.subplots(number, 1, sharex=True)
    _draw_sparsities(top, steps, history)
    churn, overlap = [update.churn for update in history], [update.overlap for update in history]
    middle.plot(steps, churn, color=MARK, marker=".", label="churn")
    middle.plot(steps, overlap, color=KEPT, marker=".", label="overlap with the first masks")
    middle.set_ylabel("share of entries", fontsize=8)
    for axes in (top, middle):
        axes.set_ylim(-0.03, 1.03)
        axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    for axes in bottom:
        reached = [float(value) for value in accuracy.values()]
        axes.plot(list(accuracy), reached, color="black", marker=".")
        axes.set_ylabel("accuracy", fontsize=8)
    for axes in panels:
        axes.tick_params(labelsize=7)
        axes.grid(alpha=0.3)
    panels[-1].set_xlabel(unit, fontsize=8)
    return figure


def _draw_sparsities(axes: Axes, steps: Sequence[int], history: Sequence[Update]) -> None:
    """Draw a line for each tensor and one for all of them; label at most eight tensors."""
    from matplotlib import colormaps

    names = list(history[0].sparsity)
    last = len(names) - 1
    for number, (name, label) in enumerate(zip(names, labels(names, 40), strict=True)):
        axes.plot(
            steps, [update.sparsity[name] for update in history], linewidth=1, alpha=0.8,
            marker=".", color=colormaps["viridis"](number / max(1, last)),
            label=label if len(names) <= 8 or number in (0, last) else None,
        )  # fmt: skip
    totals = [update.total for update in history]
    axes.plot(steps, totals, color="black", linewidth=2, label="all together")
    axes.set_ylabel("sparsity", fontsize=8)
