"""Recognise the patterns of a mask from its entries."""

import math

import torch
from torch import Tensor


def recognised(mask: Tensor) -> list[str]:
    """Return the names of the patterns that all entries of a bool mask follow.

    "dense"; "empty"; "channel(d)" or "channel(d) in runs of k"; "block(a x b)" with the largest
    block; the sparsest "n:m" (dimension 1) or "n:m along d", channels that are dropped as a whole
    aside; "nearly_diagonal(k)"; else "unstructured".
    """
    if mask.all():
        return ["dense"]
    if not mask.any():
        return ["empty"]
    dims = sorted(range(mask.ndim), key=lambda dim: dim != min(1, mask.ndim - 1))  # inputs first
    groups = [_n_of_m(mask, dim) for dim in dims]
    found = [_units(mask), *groups, _band(mask)]
    return [name for name in found if name] or ["unstructured"]


def _units(mask: Tensor) -> str | None:
    """Name the largest tiles that are kept or dropped as a whole, if larger than an entry."""
    tile = [_run(mask, dim) for dim in range(mask.ndim)]
    cut = [dim for dim in range(mask.ndim) if tile[dim] < mask.shape[dim]]
    if mask.ndim > 1 and len(cut) == 1 and math.prod(tile) > 1:
        run = tile[cut[0]]
        return f"channel({cut[0]})" + (f" in runs of {run}" if run > 1 else "")
    return f"block({' x '.join(map(str, tile))})" if math.prod(tile) > 1 else None


def _run(mask: Tensor, dim: int) -> int:
    """Return the length of the runs along `dim`, from index 0 on, whose slices are equal."""
    rows = mask.movedim(dim, 0).flatten(1) if mask.ndim > 1 else mask[:, None]
    changes = (rows[1:] != rows[:-1]).any(1).nonzero().flatten() + 1
    return math.gcd(*changes.tolist()) or len(rows)


def _n_of_m(mask: Tensor, dim: int) -> str | None:
    """Name the sparsest n:m with exactly n in each group along `dim` outside empty slices.

    There must be at least two groups, or every row with n entries would be n:(its length).
    """
    for other in {0, 1} - {dim} if mask.ndim > 1 else ():
        filled = mask.movedim(other, 0).flatten(1).any(1)  # without dropped channels
        mask = mask.movedim(other, 0)[filled].movedim(0, other)
    last = mask.movedim(dim, -1)
    size = last.shape[-1]
    best = (1.0, 0, 0)
    for m in range(2, min(32, size // 2) + 1):
        if size % m:
            continue
        groups = last.unflatten(-1, (size // m, m)).flatten(0, -2)
        n = int(groups[0].sum())
        # A few groups are usually enough to rule n:m out.
        equal = all(bool((some.sum(1) == n).all()) for some in (groups[:256], groups))
        if equal and n / m < best[0]:
            best = (n / m, n, m)
    along = "" if dim == 1 else f" along {dim}"
    return f"{best[1]}:{best[2]}{along}" if best[2] else None


def _band(mask: Tensor) -> str | None:
    """Name the band of diagonals that the mask keeps, if it is one."""
    if mask.ndim < 2:
        return None
    flat = mask.flatten(2)[..., 0] if mask.ndim > 2 else mask
    width = int(flat[0].sum()) - 1  # row 0 of a band holds columns 0 to width
    if not 0 <= width < min(flat.shape):
        return None
    band = torch.ones_like(flat).tril(width).triu(-width)
    full = bool((mask == band.view(*band.shape, *[1] * (mask.ndim - 2))).all())
    return f"nearly_diagonal({2 * width + 1})" if full else None
