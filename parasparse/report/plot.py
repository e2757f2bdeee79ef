"""Pictures of masks and of the updates of a controller."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import nn

from parasparse.report.plot_bars import DROPPED, KEPT, MARK, blank_figure, sparsity_bars
from parasparse.report.plot_curves import update_curves
from parasparse.report.plot_labels import labels
from parasparse.report.plot_numbers import cells_of, histogram_of, kept_by
from parasparse.scores.weights_alone import Score
from parasparse.sharding.fsdp import reshard
from parasparse.targets.reach import Specs, masked_targets
from parasparse.targets.tensors import Target
from parasparse.text import listed

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


_CELLS = 48  # of a mask's picture, in each direction
_BINS = 50


def plot(
    subject: Any,
    *,
    kind: str | None = None,
    targets: Specs | None = None,
    score: Score | None = None,
    accuracy: Mapping[int, float] | None = None,
) -> Figure:
    """Return a picture of the masks of a model, or of the updates of a controller.

    pyplot does not manage the Figure, so it need not be closed. A notebook shows it as the value of
    a cell; elsewhere, call `figure.savefig(path)`.

    Args:
        subject: a masked model, or a controller that has made at least one update.
        kind: for a model, one of three. "sparsity" (the default): a bar for each tensor. "masks":
            each mask as a grey picture, where rows are entries of dimension 0, columns all other
            dimensions, and a cell shows the mean of its entries. "scores": histograms of the scores
            of kept and dropped entries, with the lowest kept score; dropped entries that are
            stored as 0 are left out. Learned masks are drawn as `binarize` would make them, except
            in "masks", which shows their values. For a controller, "history": sparsity of each
            tensor and in total, churn, and overlap with the first masks, by step, or by update if
            the steps start again in each round.
        targets: which masked tensors, as the left side of a rule or a list of these; None: all.
        score: for "scores"; None: the magnitude of the stored weights, or the logits of a gate.
        accuracy: for "history", by step, or by update (from 1) if the steps start again.

    Raises:
        ImportError: matplotlib is not installed.
        TypeError: `subject` is neither a model nor a controller; `accuracy` is not a mapping.
        ValueError: the model has no masks or is on the meta device; the controller has made no
            update; the kind is unknown, or an argument belongs to another kind; `score` returns
            another shape.

    Examples:
        >>> figure = plot(sparsify(nn.Linear(10, 10), 0.9))
        >>> [float(bar.get_width()) for bar in figure.axes[0].patches]
        [0.9]
    """
    if not isinstance(subject, nn.Module) and not hasattr(subject, "history"):
        raise TypeError(f"`subject` must be a model or a controller; got {type(subject).__name__}.")
    kinds = tuple(_KINDS) if isinstance(subject, nn.Module) else ("history",)
    kind = kinds[0] if kind is None else kind
    if kind not in kinds:
        raise ValueError(f"`kind` must be one of {listed(kinds)} here; got {kind!r}.")
    given = {"targets": targets, "score": score, "accuracy": accuracy}
    extra = [name for name, it in given.items() if it is not None and kind not in _OF[name]]
    if extra:
        raise ValueError(f'{listed(extra)} must not be given for kind="{kind}".')
    if accuracy is not None and not isinstance(accuracy, Mapping):
        raise TypeError(
            "`accuracy` must map steps to accuracies, such as {100: 0.5}; got "
            f"{type(accuracy).__name__}."
        )
    if kind == "history":
        return update_curves(list(subject.history), accuracy or {})
    reshard(subject)
    found = masked_targets(subject, targets)
    if not found:
        raise ValueError("`subject` must have masks; this model has none. Call `sparsify` first.")
    if any(target.stored().is_meta for target in found):
        raise ValueError("`subject` must have values; this model is on the meta device.")
    return _scores(found, score) if kind == "scores" else _KINDS[kind](found)


def _sparsity(targets: Sequence[Target]) -> Figure:
    masks = ((target, kept_by(target)) for target in targets)  # one at a time
    counts = {
        target.name: (None if mask is None else int(mask.sum()), target.stored().numel())
        for target, mask in masks
    }
    return sparsity_bars(counts, "masked entries")


def _masks(targets: Sequence[Target]) -> Figure:
    """Draw each mask, white where nothing is kept."""
    from matplotlib.colors import PowerNorm

    figure, places = _grid(targets)
    cells = [cells_of(target, _CELLS) for target in targets]
    highest = max([1.0, *(float(c.max()) for c in cells if c is not None)])
    norm = PowerNorm(0.5, 0.0, highest)  # makes 1% of the entries visible
    image = None
    for axes, mask in zip(places, cells, strict=True):
        if mask is None:
            _say_not_set(axes)
            continue
        image = axes.imshow(
            mask.numpy(), cmap="Greys", norm=norm, aspect="auto", interpolation="nearest"
        )
    if image is not None:
        bar = figure.colorbar(image, ax=places, fraction=0.02, aspect=40)
        bar.set_label("mean of the mask", fontsize=8)
        bar.ax.tick_params(labelsize=7)
    return figure


def _scores(targets: Sequence[Target], score: Score | None) -> Figure:
    """Draw the scores of each tensor, kept entries on top of dropped ones."""
    figure, places = _grid(targets)
    for axes, target in zip(places, targets, strict=True):
        found = histogram_of(target, score, _BINS)
        if found is None:
            _say_not_set(axes)
            continue
        axes.stairs(found.dropped, found.edges, fill=True, color=DROPPED, label="dropped")
        both = [a + b for a, b in zip(found.kept, found.dropped, strict=True)]
        axes.stairs(both, found.edges, baseline=found.dropped, fill=True, color=KEPT, label="kept")
        if found.lowest_kept is not None:
            axes.axvline(found.lowest_kept, color=MARK, linewidth=1, label="lowest kept")
        low, high = found.edges[0], found.edges[-1]
        ends = ["0" if abs(low) < abs(high) / 100 else f"{low:.2g}", f"{high:.2g}"]
        axes.set_xticks([low, high], ends, fontsize=6)
    handles = {h.get_label(): h for axes in places for h in axes.get_legend_handles_labels()[0]}
    figure.legend(
        list(handles.values()), [str(label) for label in handles], ncols=3, fontsize=8,
        loc="outside upper center", frameon=False,
    )  # fmt: skip
    return figure


def _say_not_set(axes: Axes) -> None:
    axes.text(0.5, 0.5, "not set", ha="center", va="center", fontsize=7)


def _grid(targets: Sequence[Target]) -> tuple[Figure, list[Axes]]:
    """Return a figure with small axes for each of `targets`, titled by its name."""
    columns = min(len(targets), max(4, math.ceil(math.sqrt(1.6 * len(targets)))))
    rows = math.ceil(len(targets) / columns)
    figure = blank_figure(max(4.0, 1.45 * columns + 0.8), max(2.5, 1.3 * rows + 0.5))
    places = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axes in places[len(targets) :]:
        axes.remove()
    names = [target.name for target in targets]
    if all(name.endswith(".weight") for name in names):
        names = [name.removesuffix(".weight") for name in names]
    for axes, name in zip(places, labels(names, 21), strict=False):
        axes.set_title(name, fontsize=6)
        axes.set_xticks([])
        axes.set_yticks([])
    return figure, places[: len(targets)]


_KINDS: dict[str, Callable[..., Figure]] = {
    "sparsity": _sparsity, "masks": _masks, "scores": _scores,
}  # fmt: skip
_OF = {"targets": tuple(_KINDS), "score": ("scores",), "accuracy": ("history",)}
