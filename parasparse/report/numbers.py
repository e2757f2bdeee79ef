"""The numbers behind the pictures: masks in a few cells, scores in bins."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool1d

from parasparse.masks.protocol import has_mask
from parasparse.masks.soft_mask import SoftMask
from parasparse.scores.weights_alone import Score, magnitude
from parasparse.sharding.dtensors import full_tensor
from parasparse.targets.tensors import Target

_PIECE = 1 << 20  # entries that are looked at in one go


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
    kept: list[int]
    dropped: list[int]
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
    return None if mask is None else full_tensor(mask) != 0


@torch.no_grad()
def cells_of(target: Target, most: int) -> Tensor | None:
    """Return the mean of the mask of `target` over a grid of cells, None where it is not set.

    Rows are entries of dimension 0, columns those of all others; at most `most` of each.
    """
    mask = target.mask() if has_mask(target.masks()[0]) else kept_by(target)
    if mask is None:
        return None
    mask = full_tensor(mask)
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
        return score(full_tensor(stored), target.name).detach()
    if isinstance(module, SoftMask) and module.is_product:
        logits = full_tensor(module.logits.detach())
        return logits if module.pattern is None else module.pattern.spread(logits, stored.shape)
    return magnitude(full_tensor(stored))


@torch.no_grad()
def histogram_of(target: Target, score: Score | None, bins: int) -> Histogram | None:
    """Return how the scores of `target` are spread, None where its mask is not set.

    Scores that are not finite are left out, and dropped entries that are stored as 0: dynamic
    sparse training has nothing else there, and their column would dwarf all others.
    """
    kept = kept_by(target)
    if kept is None:
        return None
    scores = scores_of(target, score)
    if scores.shape != kept.shape:
        raise ValueError(
            f"`score` must return as many scores as entries; got {tuple(scores.shape)} for "
            f"{target.name!r} of shape {tuple(kept.shape)}."
        )
    finite, dropped = scores.isfinite(), ~kept
    if not isinstance(target.masks()[0], SoftMask):
        dropped &= full_tensor(target.stored()) != 0
    groups = [scores[kept & finite], scores[dropped & finite]]
    every = [group for group in groups if group.numel()]
    if not every:
        return Histogram([0.0, 1.0], [0], [0], None)
    low = min(float(group.min()) for group in every)
    high = max(float(group.max()) for group in every)
    high = high if high > low else low + max(1.0, abs(low))
    step = high / bins - low / bins or 1.0
    edges = [*(low + i * step for i in range(bins)), high]
    counts = [_counts(group, low, step, bins) for group in groups]
    lowest = float(groups[0].min()) if groups[0].numel() else None
    return Histogram(edges, counts[0], counts[1], lowest)


def _counts(values: Tensor, low: float, step: float, bins: int) -> list[int]:
    """Return how many of `values` lie in each bin: `torch.histc` counts in float32, to 2 ** 24."""
    total = torch.zeros(bins, dtype=torch.int64, device="cpu")
    for piece in values.split(_PIECE):
        places = ((piece.double() - low) / step).long().clamp(0, bins - 1)
        total += torch.bincount(places.cpu(), minlength=bins)
    return [int(number) for number in total.tolist()]
