"""What is sparse already when pruning starts."""

from collections.abc import Mapping

import torch
from torch import Tensor

from parasparse.masks.kept_entries import KeptEntries
from parasparse.patterns import Pattern
from parasparse.patterns.blocks_channels_heads import has_units
from parasparse.rules.assignments import Assignment
from parasparse.sharding.dtensors import count_nonzero, full_tensor, laid_out_like

# The number of zeros of each tensor, and of its entries; of units, for patterns of units.
Present = Mapping[str, tuple[int, int]]


def kept_now(each: Assignment, *, reopen: bool) -> Tensor | KeptEntries:
    """Return which entries are kept now: those of the mask, or those that are not 0.

    All are with `reopen`, and in a tensor of zeros without a mask, because some layers start so.
    The result is laid out as the new mask, `each.result`.
    """
    entries = each.target.kept()
    if entries is not None:
        if reopen:
            raise ValueError(
                f'`reopen` must be False for compact weights, such as "{each.target.name}", of '
                "which other entries do not exist. Call parasparse.expand(model) first."
            )
        return entries
    mask = each.target.mask() if each.target.masks() else None
    kept = each.target.stored() != 0 if mask is None else mask != 0
    empty = mask is None and not kept.is_meta and not count_nonzero(kept)
    if reopen or empty:
        kept = torch.ones_like(kept)
    assert isinstance(each.result, Tensor)
    return laid_out_like(kept, each.result)


def counts_of(kept: Mapping[str, Tensor | KeptEntries], pattern: Pattern) -> Present:
    """Return the zeros of each mask; units across tensors are counted once, at the first mask."""
    some_are_compact = any(isinstance(mask, KeptEntries) for mask in kept.values())
    no_values = any(isinstance(mask, Tensor) and mask.is_meta for mask in kept.values())
    if not hasattr(pattern, "counted") or some_are_compact or no_values:
        return {name: counted(mask, pattern) for name, mask in kept.items()}
    return {**dict.fromkeys(kept, (0, 0)), next(iter(kept)): pattern.counted(kept)}


def counted(kept: Tensor | KeptEntries, pattern: Pattern) -> tuple[int, int]:
    """Return how many entries of a mask, or units of `pattern`, are 0, and how many there are."""
    if isinstance(kept, KeptEntries):
        return kept.numel() - len(kept), kept.numel()
    if kept.is_meta:  # values are still to come
        return 0, kept.numel()
    units = pattern.pool(full_tensor(kept).float()) > 0 if has_units(pattern) else kept
    return units.numel() - count_nonzero(units), units.numel()


def share_of_zeros(present: Present) -> float:
    """Return the share of zeros of all tensors together."""
    zeros, numel = (sum(counts) for counts in zip(*present.values(), strict=True))
    return zeros / numel if numel else 0.0
