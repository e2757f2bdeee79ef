"""Tensors cut into tiles of equal size: one value per tile, and back to the entries."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from parasparse.patterns.selection.scores import as_scores, check_scores


def pooled(scores: Tensor, tile: Sequence[int], norm: float | None) -> Tensor:
    """Return one float64 score for each tile of `scores`, the mean or norm of its entries s.

    That is mean(s) with norm None, max(s) with norm inf, else mean(s^norm)^(1/norm). Raises
    ValueError if scores are NaN, or negative with a norm.
    """
    check_scores(as_scores(scores))
    values, scale = scores.detach().double(), 1.0  # scaled, so powers neither overflow nor vanish
    if norm is not None:
        if bool((values < 0).any()):
            raise ValueError(
                f"scores must be >= 0 for a norm; got {float(values.min()):g}. Use the mean "
                "(`norm=None`), or scores that are magnitudes."
            )
        finite = torch.where(values.isinf(), 0.0, values)
        scale = (float(finite.max()) if values.numel() else 0.0) or 1.0
        values = values / scale if norm == math.inf else (values / scale) ** norm
    cells = tiled(values, tile)
    inner = list(range(1, cells.ndim, 2))
    if norm == math.inf:
        return cells.amax(inner) * scale
    mean = cells.sum(inner)
    for dim, (size, length) in enumerate(zip(tile, scores.shape, strict=True)):
        counts = torch.full((mean.shape[dim],), size, dtype=mean.dtype, device=mean.device)
        if length % size:
            counts[-1] = length % size
        mean = mean / counts.view([-1 if d == dim else 1 for d in range(mean.ndim)])
    return _to_32_bits(mean if norm is None else mean ** (1 / norm) * scale)


def _to_32_bits(means: Tensor) -> Tensor:
    """Round `means`, so equal units tie whatever the order in which their entries were added.

    Reference: Veltkamp's splitting, in Dekker, "A floating-point technique for extending the
        available precision", 1971, Numerische Mathematik 18, section 5.
    """
    wide = means * (2**21 + 1)
    rounded = wide - (wide - means)
    return torch.where(rounded.isfinite(), rounded, means)


def spread_out(units: Tensor, tile: Sequence[int], shape: Sequence[int]) -> Tensor:
    """Return a tensor of `shape` in which each entry has the value of its tile."""
    for dim, size in enumerate(tile):
        units = units.repeat_interleave(size, dim).narrow(dim, 0, shape[dim])
    return units.contiguous()


def tiled(values: Tensor, tile: Sequence[int], *, fill: float = 0.0) -> Tensor:
    """Return `values` with each dimension split into (tiles, entries), padded with `fill`."""
    short = [-length % size for size, length in zip(tile, values.shape, strict=True)]
    if any(short):
        values = F.pad(values, [n for missing in reversed(short) for n in (0, missing)], value=fill)
    sizes = zip(values.shape, tile, strict=True)
    return values.reshape([n for length, size in sizes for n in (length // size, size)])
