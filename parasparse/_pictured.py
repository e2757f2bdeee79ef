"""The numbers behind the pictures: masks in a few cells, scores in bins."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool1d

from parasparse._parts import whole
from parasparse._tensors import Target
from parasparse.scores.entries import Score, magnitude
from parasparse.soft_mask import SoftMask


@dataclass(frozen=True)
class Histogram:
    """How many entries have which score.

    Attributes:
        edges: of the bins, ascending, one more than bins.
        kept: entries that the mask keeps, by bin.
        dropped: the others.
        lowest_kept: the lowest score of all that are kept; None if none is.
    """

    edges: list[float]
    kept: list[float]
    dropped: list[float]
    lowest_kept: float | None


@torch.no_grad()
def kept_by(target: Target) -> Tensor | None:
    """Return where the mask of `target` is not 0, None where it is not set.

    A learned mask counts as `binarize` would make it.
    """
    module, mask = target.masks()[0], None
    if isinstance(module, SoftMask):
        mask = module.hardened(target.stored())
        mask = target.effective() if mask is None else mask
    else:
        mask = target.mask()
    return None if mask is None else whole(mask) != 0


@torch.no_grad()
def cells_of(target: Target, most: int) -> Tensor | None:
    """Return the mean of the mask of `target` over a grid of cells, None where it is not set.

    Rows are entries of dimension 0, columns those of all others; at most `most` of each.
    """
    mask = target.mask() if hasattr(target.masks()[0], "mask") else kept_by(target)
    if mask is None:
        return None
    mask = whole(mask)
    mask = mask.reshape(1, -1) if mask.ndim < 2 else mask.flatten(1)
    if mask.numel() == 0:
        return torch.zeros(1, 1)
    # Band by band: the whole mask in float would be four times as large.
    bands = mask.tensor_split(min(most, mask.shape[0]))
    rows = torch.stack([band.sum(0, dtype=torch.float32) / len(band) for band in bands])
    return adaptive_avg_pool1d(rows, min(most, mask.shape[1])).cpu()


@torch.no_grad()
def scores_of(target: Target, score: Score | None) -> Tensor:
    """Return the scores of the stored entries, of the shape of the tensor.

    None: magnitude; the logits of a learned mask that multiplies.
    """
    module = target.masks()[0]
    stored = target.stored()
    if score is not None:
        return score(whole(stored), target.name).detach()
    if isinstance(module, SoftMask) and module.is_product:
        logits = whole(module.logits.detach())
        return logits if module.pattern is None else module.pattern.spread(logits, stored.shape)
    return magnitude(whole(stored))


@torch.no_grad()
def histogram_of(target: Target, score: Score | None, bins: int) -> Histogram | None:
    """Return how the scores of `target` are spread, None where its mask is not set.

    Scores that are not finite are left out, and dropped entries that are stored as 0: dynamic
    sparse training has nothing else there, and their column would dwarf all others.
    """
    kept = kept_by(target)
    if kept is None:
        return None
    scores = scores_of(target, score).float().cpu()
    finite, kept = scores.isfinite(), kept.cpu()
    dropped = ~kept
    if not isinstance(target.masks()[0], SoftMask):
        dropped &= whole(target.stored()).cpu() != 0
    groups = [scores[kept & finite], scores[dropped & finite]]
    every = [group for group in groups if group.numel()]
    if not every:
        return Histogram([0.0, 1.0], [0.0], [0.0], None)
    low = min(float(group.min()) for group in every)
    high = max(float(group.max()) for group in every)
    high = high if high > low else low + 1.0
    edges = torch.linspace(low, high, bins + 1).tolist()
    counts = [torch.histc(group, bins, low, high).tolist() for group in groups]
    lowest = float(groups[0].min()) if groups[0].numel() else None
    return Histogram(edges, counts[0], counts[1], lowest)
