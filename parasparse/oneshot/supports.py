"""Which entries are kept: by row, tensor, or all tensors together, or by a pattern."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from parasparse.counts import num_kept
from parasparse.oneshot.problem import Problem
from parasparse.patterns import Pattern, jointly, unstructured
from parasparse.patterns.blocks_channels_heads import has_units
from parasparse.patterns.ranked import chain

Scope = Literal["row", "tensor", "global"]


@dataclass(frozen=True)
class Support:
    """How many entries are kept, and where.

    Attributes:
        sparsity: share of zeros; None if the pattern decides.
        pattern: as of `Prune`.
        scope: what is ranked together.
    """

    sparsity: float | None
    pattern: Pattern
    scope: Scope

    @property
    def by_row(self) -> bool:
        """Whether each output keeps the same number."""
        return self.scope == "row" and self.pattern is unstructured

    def masks(self, scores: Mapping[str, Tensor], problems: list[Problem]) -> dict[str, Tensor]:
        """Return the masks (groups, out, in) of the highest `scores` by name, of the same shape."""
        lowered = {p.name: self._lowered(scores[p.name], p.held) for p in problems}
        if self.by_row:
            masks = {name: highest_in_rows(s, self.kept_in_rows(s)) for name, s in lowered.items()}
        else:
            masks = self._of_tensors(lowered, problems)
        return {
            p.name: masks[p.name] if p.held is None else masks[p.name] & p.held for p in problems
        }

    def kept_in_rows(self, scores: Tensor) -> int:
        """Return how many entries each row of `scores` keeps."""
        return num_kept(scores.shape[-1], self.sparsity or 0.0)

    def _of_tensors(self, scores: dict[str, Tensor], problems: list[Problem]) -> dict[str, Tensor]:
        tensors = {p.name: p.restored(scores[p.name]) for p in problems}
        share = () if self.sparsity is None else (self.sparsity,)
        if self.scope == "global":
            found = jointly(tensors, *share, pattern=self.pattern)
        else:
            found = {name: self.pattern(tensor, *share) for name, tensor in tensors.items()}
        for name, mask in found.items():
            shape = tensors[name].shape
            if not isinstance(mask, Tensor) or (mask.dtype, mask.shape) != (torch.bool, shape):
                got = f"{mask.dtype} {tuple(mask.shape)}" if isinstance(mask, Tensor) else mask
                raise ValueError(
                    f"`pattern` must return a bool tensor of shape {tuple(shape)} for {name!r}; "
                    f"got {got}."
                )
        return {p.name: p.layout.matrices(found[p.name]) for p in problems}

    def _lowered(self, scores: Tensor, held: Tensor | None) -> Tensor:
        """Return `scores` with entries that are dropped already below all others."""
        if bool(scores.isnan().any()):
            raise ValueError("scores must not be NaN.")
        if held is None:
            return scores
        # A mean over a unit with -inf would say nothing of its other entries.
        pooled = has_units(self.pattern) or isinstance(self.pattern, chain)
        return torch.where(held, scores, 0.0 if pooled else -math.inf)


def highest_in_rows(scores: Tensor, kept: int) -> Tensor:
    """Return the mask of the `kept` highest of each row; of equal ones, those of lower index."""
    size = scores.shape[-1]
    if kept == 0 or kept == size:
        return torch.full_like(scores, kept > 0, dtype=torch.bool)
    least = scores.kthvalue(size - kept + 1, dim=-1, keepdim=True).values
    mask = scores > least
    missing = kept - mask.sum(-1, keepdim=True)
    equal = scores == least
    if bool((equal.sum(-1, keepdim=True) > missing).any()):
        equal &= equal.cumsum(-1) <= missing
    return mask | equal
