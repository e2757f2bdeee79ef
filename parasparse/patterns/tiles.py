"""Tensors cut into tiles of one size: a value for each tile, and back to the entries."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from parasparse.patterns.selection.source import check_ranked


def pooled(scores: Tensor, tile: Sequence[int], norm: float | None) -> Tensor:
    """Return one score for each tile of `scores`: the mean or norm of its entries.

    Args:
        scores: any shape, no NaN.
        tile: the size of a tile along each dimension.
        norm: None: mean of s; inf: the largest s; else mean(s^norm)^(1/norm).

    Returns:
        float64; means that agree in their first 32 bits are equal.

    Raises:
        ValueError: NaN, or with a norm negative ones among the scores.
    """
    check_ranked(scores)
    values, scale = scores.detach().double(), 1.0  # squares neither overflow nor vanish
    if norm is not None:
        if bool((values < 0).any()):
            raise ValueError(
                f"scores must be >= 0 to take their norm; got {float(values.min()):g}. Use the "
                "mean, `norm=None`, or scores that are magnitudes."
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
    """Return `means` rounded, so that the order in which a sum was taken plays no part.

    Sums of the same numbers differ in their last bits with the number of threads and the place in
    memory; units that are equal must tie.

    Reference: Veltkamp's splitting, in Dekker, "A floating-point technique for extending the
        available precision", 1971, Numerische Mathematik 18, section 5.
    """
    wide = means * (2**21 + 1)
    rounded = wide - (wide - means)
    return torch.where(rounded.isfinite(), rounded, means)


def spread_out(units: Tensor, tile: Sequence[int], shape: Sequence[int]) -> Tensor:
    """Return a tensor of `shape` that has the value of its tile everywhere."""
    for dim, size in enumerate(tile):
        units = units.repeat_interleave(size, dim).narrow(dim, 0, shape[dim])
    return units.contiguous()


def tiled(values: Tensor, tile: Sequence[int], *, fill: float = 0.0) -> Tensor:
    """Return `values` as (tiles, entries) for each dimension in turn, the last ones with `fill`."""
    short = [-length % size for size, length in zip(tile, values.shape, strict=True)]
    if any(short):
        values = F.pad(values, [n for missing in reversed(short) for n in (0, missing)], value=fill)
    sizes = zip(values.shape, tile, strict=True)
    return values.reshape([n for length, size in sizes for n in (length // size, size)])
