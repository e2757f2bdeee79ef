"""Which entries of a tensor are kept, by position: a mask in memory proportional to what it keeps.

Positions are int64, in the flattened tensor, sorted.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

from parasparse.masks.random_places import random_positions
from parasparse.sharding.dtensors import count_nonzero, laid_out_like


@dataclass(frozen=True, eq=False)
class KeptEntries:
    """The kept entries of a tensor of `shape`."""

    positions: Tensor
    shape: torch.Size

    def __len__(self) -> int:
        return len(self.positions)

    def numel(self) -> int:
        """Return the number of entries of the tensor, kept or not."""
        return self.shape.numel()

    def saved(self) -> dict[str, Any]:
        """Return a copy for a state dict."""
        return {"positions": self.positions.clone(), "shape": tuple(self.shape)}

    @classmethod
    def loaded(cls, saved: Mapping[str, Any] | Tensor, device: torch.device) -> Self:
        """Return what `saved` has given, or the kept entries of a mask."""
        if isinstance(saved, Tensor):
            return cls(saved.flatten().nonzero().flatten().to(device), saved.shape)
        return cls(saved["positions"].to(device, copy=True), torch.Size(saved["shape"]))


def number_kept(mask: Tensor | KeptEntries) -> int:
    """Return the number of kept entries."""
    return len(mask) if isinstance(mask, KeptEntries) else count_nonzero(mask)


def number_in_both(mask: Tensor | KeptEntries, other: Tensor | KeptEntries) -> int:
    """Return the number of entries that both masks keep."""
    if isinstance(mask, Tensor) and isinstance(other, Tensor):
        return count_nonzero(mask & laid_out_like(other, mask))
    if isinstance(mask, Tensor):
        mask, other = other, mask
    assert isinstance(mask, KeptEntries)
    if isinstance(other, Tensor):
        return int(other.flatten()[mask.positions].count_nonzero())
    return int(_find(mask.positions, other.positions)[1].count_nonzero())


def carrying(old: Tensor, new: Tensor) -> Callable[[Tensor], Tensor]:
    """Return the function from values at positions `old` to those at `new`, 0 where none was.

    Examples:
        >>> move = carrying(torch.tensor([1, 4]), torch.tensor([0, 4]))
        >>> move(torch.tensor([5.0, 6.0])).tolist()
        [0.0, 6.0]
    """
    at, is_there = _find(new, old)
    if not len(old):
        return lambda values: values.new_zeros(len(new))
    is_new = ~is_there
    return lambda values: values[at].masked_fill_(is_new, 0)


def draw_free(
    kept: Tensor, numel: int, count: int, *, generator: torch.Generator | None = None
) -> Tensor:
    """Return `count` positions, drawn uniformly from those of `numel` entries that are not kept.

    Time and memory are proportional to `count` and to the number of kept entries.

    Examples:
        >>> draw_free(torch.tensor([0, 2]), 5, 3).tolist()
        [1, 3, 4]
    """
    drawn = random_positions(count, numel - len(kept), kept.device, generator)
    # The free entries are numbered; the n-th follows as many kept ones as have n free ones or fewer
    # before them.
    before = kept - torch.arange(len(kept), device=kept.device)
    return drawn + torch.searchsorted(before, drawn, right=True)


def _find(positions: Tensor, among: Tensor) -> tuple[Tensor, Tensor]:
    """Return where each of `positions` is in `among`, and whether it is there."""
    if not len(among):
        return torch.zeros_like(positions), torch.zeros_like(positions, dtype=torch.bool)
    at = torch.searchsorted(among, positions).clamp_(max=len(among) - 1)
    return at, among[at] == positions
