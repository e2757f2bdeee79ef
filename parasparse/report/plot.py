"""Pictures of masks, and of what a controller did."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import nn

from parasparse.report.labels import labels
from parasparse.report.numbers import cells_of, histogram_of, kept_by
from parasparse.scores.weights_alone import Score
from parasparse.sharding.fsdp import reshard
from parasparse.targets.reach import Specs, masked_targets
from parasparse.targets.tensors import Target
from parasparse.text import listed
from parasparse.training.history import Update

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


_KEPT, _DROPPED, _MARK = "#3b6fb5", "#c9ced6", "#c2452d"
_ROWS = 50  # bars above each other, before a further column starts
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
    """Return a picture of the masks of a model, or of what a controller did.

    The Figure is not one of pyplot's: nothing is left open, and nothing is shown by itself. A
    notebook shows it as the value of a cell; elsewhere there is `figure.savefig(path)`.

    Args:
        subject: a masked model, or a controller that has made one update or more.
        kind: of a model: "sparsity" (the default), a bar for each tensor; "masks", the mask of each
            as a grey picture: rows are entries of dimension 0, columns all others, a cell the mean
            of its entries; "scores", how the scores of each are spread, kept and dropped, and the
            lowest that is kept; dropped entries that are stored as 0 are left out. A learned mask
            counts as `binarize` would make it; in "masks" it is shown as it is. Of a controller:
            "history", sparsity of each tensor and of all, churn, and overlap with the first masks,
            by step; by update where steps start anew.
        targets: which masked tensors, as the left side of a rule or a list of these; None: all.
        score: for "scores"; None: magnitude of what is stored, or the logits of a gate.
        accuracy: for "history", by step (by update, from 1, where steps start anew).

    Raises:
        ImportError: matplotlib is not there.
        TypeError: `subject` is neither; `accuracy` is no mapping.
        ValueError: it has no masks, or no update yet; there is no such kind; an argument belongs to
            another kind; the model is on the meta device; `score` returns another shape.

    Examples:
        >>> from parasparse import sparsify
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
        return _history(list(subject.history), accuracy or {})
    reshard(subject)
    found = masked_targets(subject, targets)
    if not found:
        raise ValueError("`subject` must have masks; this model has none. Call `sparsify` first.")
    if any(target.stored().is_meta for target in found):
        raise ValueError("`subject` must have values; this model is on the meta device.")
    return _scores(found, score) if kind == "scores" else _KINDS[kind](found)


def _figure(width: float, height: float) -> Figure:
    try:
        from parasparse.report.figure import Picture
    except ImportError as error:
        error.add_note('`plot` needs matplotlib: pip install "parasparse[plot]"')
        raise
    return Picture(figsize=(width, height), dpi=100, layout="constrained")


def _sparsity(targets: Sequence[Target]) -> Figure:
    """Draw a bar for each tensor, in columns of at most `_ROWS`."""
    counts = [_count(target) for target in targets]
    kept = [number for number, _ in counts]
    sizes = [0 if number is None else size for number, size in counts]
    shares = [1 - k / n if k is not None and n else 0.0 for k, n in zip(kept, sizes, strict=True)]
    names = labels([target.name for target in targets], 60)
    columns = math.ceil(len(targets) / _ROWS)
    rows = math.ceil(len(targets) / columns)
    width = columns * (2.8 + 0.062 * max(map(len, names)))
    figure = _figure(max(width, 6.0), 1.0 + 0.17 * max(rows, 6))
    total = 1 - sum(k or 0 for k in kept) / max(1, sum(sizes))
    figure.suptitle(f"{total:.2%} of {sum(sizes):,} masked entries are zero", fontsize=10)
    for column, axes in enumerate(figure.subplots(1, columns, squeeze=False)[0]):
        part = slice(column * rows, (column + 1) * rows)
        places = range(len(names[part]))
        axes.axvline(total, color=_MARK, linewidth=1, linestyle=":")
        axes.barh(places, shares[part], color=_KEPT, height=0.7)
        axes.set_yticks(places, names[part], fontsize=7)
        for y, share, number in zip(places, shares[part], kept[part], strict=True):
            text = "not set" if number is None else _percent(share)
            box = {"color": "white", "pad": 0.5}  # over the line of the total
            axes.text(share + 0.01, y, text, va="center", fontsize=7, bbox=box)
        axes.set_xlim(0, 1.16)
        axes.set_ylim(rows - 0.4, -0.6)  # the first tensor on top; as many rows in each column
        axes.set_xticks([0, 0.5, 1], ["0", "50 %", "100 %"], fontsize=7)
        axes.set_xlabel("sparsity", fontsize=8)
        axes.spines[["top", "right"]].set_visible(False)
    return figure


def _count(target: Target) -> tuple[int | None, int]:
    """Return how many entries are kept, None where the mask is not set, and of how many."""
    mask = kept_by(target)
    return (None if mask is None else int(mask.sum())), target.stored().numel()


def _masks(targets: Sequence[Target]) -> Figure:
    """Draw each mask, white where nothing is kept."""
    from matplotlib.colors import PowerNorm

    figure, places = _grid(targets)
    cells = [cells_of(target, _CELLS) for target in targets]
    highest = max([1.0, *(float(c.max()) for c in cells if c is not None)])
    norm = PowerNorm(0.5, 0.0, highest)  # one entry in a hundred is grey as well
    image = None
    for axes, mask in zip(places, cells, strict=True):
        if mask is None:
            axes.text(0.5, 0.5, "not set", ha="center", va="center", fontsize=7)
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
    """Draw the scores of each tensor, kept over dropped, and the lowest that is kept."""
    figure, places = _grid(targets)
    for axes, target in zip(places, targets, strict=True):
        found = histogram_of(target, score, _BINS)
        if found is None:
            axes.text(0.5, 0.5, "not set", ha="center", va="center", fontsize=7)
            continue
        axes.stairs(found.dropped, found.edges, fill=True, color=_DROPPED, label="dropped")
        both = [a + b for a, b in zip(found.kept, found.dropped, strict=True)]
        axes.stairs(both, found.edges, baseline=found.dropped, fill=True, color=_KEPT, label="kept")
        if found.lowest_kept is not None:
            axes.axvline(found.lowest_kept, color=_MARK, linewidth=1, label="lowest kept")
        low, high = found.edges[0], found.edges[-1]
        ends = ["0" if abs(low) < abs(high) / 100 else f"{low:.2g}", f"{high:.2g}"]
        axes.set_xticks([low, high], ends, fontsize=6)
    handles = {h.get_label(): h for axes in places for h in axes.get_legend_handles_labels()[0]}
    figure.legend(
        list(handles.values()), [str(label) for label in handles], ncols=3, fontsize=8,
        loc="outside upper center", frameon=False,
    )  # fmt: skip
    return figure


def _grid(targets: Sequence[Target]) -> tuple[Figure, list[Axes]]:
    """Return a figure with a small picture for each of `targets`, under its name."""
    columns = min(len(targets), max(4, math.ceil(math.sqrt(1.6 * len(targets)))))
    rows = math.ceil(len(targets) / columns)
    figure = _figure(max(4.0, 1.45 * columns + 0.8), max(2.5, 1.3 * rows + 0.5))
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


def _history(history: Sequence[Update], accuracy: Mapping[int, float]) -> Figure:
    """Draw sparsity, churn and overlap, and accuracy if it is given, one above the other."""
    if not history:
        raise ValueError(
            "`subject` must have made an update; its history is empty. Call its `step()` after "
            "each `optimizer.step()`."
        )
    steps = [update.step for update in history]
    anew = any(b <= a for a, b in itertools.pairwise(steps))
    steps = list(range(1, len(steps) + 1)) if anew else steps
    panels = 3 if accuracy else 2
    figure = _figure(8.0, 1.0 + 2.1 * panels)
    top, middle, *bottom = figure.subplots(panels, 1, sharex=True)
    names = list(history[0].sparsity)
    shown = labels(names, 40)
    from matplotlib import colormaps

    for number, name in enumerate(names):
        values = [update.sparsity[name] for update in history]
        colour = colormaps["viridis"](number / max(1, len(names) - 1))
        named = len(names) <= 8 or number in (0, len(names) - 1)
        label = shown[number] if named else None
        top.plot(steps, values, color=colour, linewidth=1, alpha=0.8, marker=".", label=label)
    totals = [update.total for update in history]
    top.plot(steps, totals, color="black", linewidth=2, label="all together")
    middle.plot(steps, [u.churn for u in history], color=_MARK, marker=".", label="churn")
    overlap = [update.overlap for update in history]
    middle.plot(steps, overlap, color=_KEPT, marker=".", label="overlap with the first masks")
    for axes in bottom:
        reached = [float(value) for value in accuracy.values()]
        axes.plot(list(accuracy), reached, color="black", marker=".")
        axes.set_ylabel("accuracy", fontsize=8)
    top.set_ylabel("sparsity", fontsize=8)
    middle.set_ylabel("share of entries", fontsize=8)
    (bottom[0] if bottom else middle).set_xlabel("update" if anew else "step", fontsize=8)
    for axes in (top, middle):
        axes.set_ylim(-0.03, 1.03)
        axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    for axes in (top, middle, *bottom):
        axes.tick_params(labelsize=7)
        axes.grid(alpha=0.3)
    return figure


def _percent(share: float) -> str:
    text = f"{share:.1%}"
    return "> 99.9%" if text == "100.0%" and share < 1 else text


_KINDS: dict[str, Callable[..., Figure]] = {
    "sparsity": _sparsity, "masks": _masks, "scores": _scores,
}  # fmt: skip
_OF = {"targets": tuple(_KINDS), "score": ("scores",), "accuracy": ("history",)}
