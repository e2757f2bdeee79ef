"""Numbers to draw: masks averaged into cells, scores counted in bins."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool1d

from parasparse.masks.protocol import has_mask
from parasparse.masks.soft_mask import SoftMask
from parasparse.scores.weights_alone import Score, magnitude
from parasparse.sharding.dtensors import full_tensor
from parasparse.targets.tensors import Target

_PIECE = 1 << 20  # entries that are counted at once


@dataclass(frozen=True)
class Histogram:
    """Numbers of kept and of dropped entries by bin of their score."""

    edges: list[float]  # one more than bins
    kept: list[int]
    dropped: list[int]
    lowest_kept: float | None  # None if no entry is kept


@torch.no_grad()
def kept_by(target: Target) -> Tensor | None:
    """Return where the mask of `target` is not 0, None if it is not set.

    A learned mask counts as `binarize` would make it.
    """
    module = target.masks()[0]
    if isinstance(module, SoftMask):
        hard = module.hardened(target.stored())
        return full_tensor(target.effective() if hard is None else hard) != 0
    mask = target.mask()
    return None if mask is None else full_tensor(mask) != 0


@torch.no_grad()
def cells_of(target: Target, most: int) -> Tensor | None:
    """Return means of the mask of `target` over a grid of cells, None if it is not set.

    Rows are entries of dimension 0, columns all other dimensions; there are `most` of each or less.
    """
    mask = target.mask() if has_mask(target.masks()[0]) else kept_by(target)
    if mask is None:
        return None
    mask = full_tensor(mask)
    mask = mask.reshape(1, -1) if mask.ndim < 2 else mask.flatten(1)
    if mask.numel() == 0:
        return torch.zeros(1, 1)
    # Band by band, because the whole mask in float would take four times the memory.
    bands = mask.tensor_split(min(most, mask.shape[0]))
    rows = torch.stack([band.sum(0, dtype=torch.float32) / len(band) for band in bands])
    return adaptive_avg_pool1d(rows, min(most, mask.shape[1])).cpu()


@torch.no_grad()
def scores_of(target: Target, score: Score | None) -> Tensor:
    """Return the scores of the stored entries.

    If `score` is None, they are the logits of a learned mask that multiplies, or magnitudes.
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
    """Return the histogram of the scores of `target`, None if its mask is not set.

    It leaves out scores that are not finite, and dropped entries that are stored as 0: dynamic
    sparse training stores 0 in all of them, so their bar would dwarf the others.
    """
    kept = kept_by(target)
    if kept is None:
        return None
    scores = scores_of(target, score)
    if scores.shape != kept.shape:
        raise ValueError(
            f"`score` must return one score per entry; got shape {tuple(scores.shape)} for "
            f'"{target.name}" of shape {tuple(kept.shape)}.'
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
    # torch.histc counts in float32, which stops at 2 ** 24.
    total = torch.zeros(bins, dtype=torch.int64, device="cpu")
    for piece in values.split(_PIECE):
        places = ((piece.double() - low) / step).long().clamp(0, bins - 1)
        total += torch.bincount(places.cpu(), minlength=bins)
    return [int(number) for number in total.tolist()]
