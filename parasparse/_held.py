"""Which patterns a mask keeps to, read off the mask itself."""

from __future__ import annotations

import math

from torch import Tensor


def held(mask: Tensor) -> list[str]:
    """Return the names of the patterns that a bool mask keeps to, exactly and everywhere.

    "dense"; "empty"; "channel(d)", "channel(d) in runs of k"; "block(a x b)", the largest;
    "n:m" along dimension 1 or "n:m along d", the sparsest, in all slices that hold anything;
    "nearly_diagonal(k)"; else "unstructured".
    """
    if mask.all():
        return ["dense"]
    if not mask.any():
        return ["empty"]
    groups = [_n_of_m(mask, dim) for dim in ((1, 0) if mask.ndim > 1 else range(mask.ndim))]
    found = [_units(mask), *groups, _band(mask)]
    return [name for name in found if name] or ["unstructured"]


def _units(mask: Tensor) -> str | None:
    """Name the largest tiles that are kept or dropped as a whole, if they are any."""
    tile = [_run(mask, dim) for dim in range(mask.ndim)]
    cut = [dim for dim in range(mask.ndim) if tile[dim] < mask.shape[dim]]
    if mask.ndim > 1 and len(cut) == 1 and math.prod(tile) > 1:
        run = tile[cut[0]]
        return f"channel({cut[0]})" + (f" in runs of {run}" if run > 1 else "")
    return f"block({' x '.join(map(str, tile))})" if math.prod(tile) > 1 else None


def _run(mask: Tensor, dim: int) -> int:
    """Return the length of the runs along `dim`, from index 0 on, in which nothing changes."""
    rows = mask.movedim(dim, 0).flatten(1) if mask.ndim > 1 else mask[:, None]
    changes = (rows[1:] != rows[:-1]).any(1).nonzero().flatten() + 1
    return math.gcd(*changes.tolist()) or len(rows)


def _n_of_m(mask: Tensor, dim: int) -> str | None:
    """Name the sparsest n:m for which each group along `dim` holds n, or lies in an empty slice.

    With two groups or more: any mask whose slices hold n each is n:(size of the dimension).
    """
    last = mask.movedim(dim, -1)
    if mask.ndim > 1 and dim != 0:
        last = last[last.flatten(1).any(1)]  # slices that `channel(0)` left
    size = last.shape[-1]
    best = (1.0, 0, 0)
    for m in range(2, min(32, size // 2) + 1):
        if size % m:
            continue
        groups = last.reshape(-1, m)
        n = int(groups[0].sum())
        # Few of the groups tell as a rule.
        equal = all(bool((some.sum(1) == n).all()) for some in (groups[:256], groups))
        if equal and n / m < best[0]:
            best = (n / m, n, m)
    along = "" if dim == 1 else f" along {dim}"
    return f"{best[1]}:{best[2]}{along}" if best[2] else None


def _band(mask: Tensor) -> str | None:
    """Name the band of diagonals that the mask is."""
    if mask.ndim < 2:
        return None
    kept = mask.nonzero()
    width = int((kept[:, 0] - kept[:, 1]).abs().max())
    flat = mask.flatten(2) if mask.ndim > 2 else mask[..., None]
    inside = sum(
        flat.diagonal(offset).numel()
        for offset in range(-width, width + 1)
        if -flat.shape[0] < offset < flat.shape[1]
    )
    full = inside == len(kept) and width < min(mask.shape[:2])
    return f"nearly_diagonal({2 * width + 1})" if full else None
