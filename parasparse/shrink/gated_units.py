"""The units of `coupled` in one tensor, as the pattern of a gate."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False, repr=False)
class UnitsOfTensor:
    """The units in one tensor, for a gate that has one logit for each unit of all tensors.

    An entry that is part of two units, such as an output and an input channel, gets the product of
    their masks.

    Attributes:
        labels: the unit of each entry; -1: none. One label for each dimension with units.
        number: how many units there are in all tensors.
        shares_logits: whether other tensors have the same logits.
    """

    labels: tuple[Tensor, ...]
    number: int
    shares_logits: ClassVar[bool] = True

    def __repr__(self) -> str:
        return f"coupled({self.number} units)"

    def pool(self, scores: Tensor) -> Tensor:
        """Return the sum of the scores of each unit; 0 for those of other tensors."""
        total = scores.new_zeros(self.number)
        for label in self.labels:
            ids = label.to(scores.device).expand(scores.shape)
            total.index_add_(0, ids[ids >= 0], scores[ids >= 0])
        return total

    def spread(self, units: Tensor, shape: torch.Size) -> Tensor:
        """Return a tensor of `shape` whose entries have the product of their units."""
        spread = units.new_ones(shape)
        for label in self.labels:
            ids = label.to(units.device)
            spread = spread * units[ids.clamp(min=0)].masked_fill(ids < 0, 1)
        return spread
