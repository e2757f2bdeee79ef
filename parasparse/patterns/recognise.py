"""Which patterns a mask keeps to, read off the mask itself."""

import math

import torch
from torch import Tensor


def recognised(mask: Tensor) -> list[str]:
    """Return the names of the patterns that a bool mask keeps to, exactly and everywhere.

    "dense"; "empty"; "channel(d)", "channel(d) in runs of k"; "block(a x b)", the largest;
    "n:m" along dimension 1 or "n:m along d", exactly n, the sparsest; what the first two dimensions
    drop as a whole does not count;
    "nearly_diagonal(k)"; else "unstructured".
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
    for other in {0, 1} - {dim} if mask.ndim > 1 else ():
        filled = mask.movedim(other, 0).flatten(1).any(1)  # not what `channel(other)` dropped
        mask = mask.movedim(other, 0)[filled].movedim(0, other)
    last = mask.movedim(dim, -1)
    size = last.shape[-1]
    best = (1.0, 0, 0)
    for m in range(2, min(32, size // 2) + 1):
        if size % m:
            continue
        groups = last.unflatten(-1, (size // m, m)).flatten(0, -2)
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
    flat = mask.flatten(2)[..., 0] if mask.ndim > 2 else mask
    width = int(flat[0].sum()) - 1  # row 0 of a band holds columns 0 to width
    if not 0 <= width < min(flat.shape):
        return None
    band = torch.ones_like(flat).tril(width).triu(-width)
    full = bool((mask == band.view(*band.shape, *[1] * (mask.ndim - 2))).all())
    return f"nearly_diagonal({2 * width + 1})" if full else None
