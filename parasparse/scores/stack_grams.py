"""Gram matrices of stacks of matrices, such as fused experts: one for each matrix."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from parasparse.scores.layouts import Layout
from parasparse.scores.row_sums import RowSum


@dataclass(eq=False)
class StackGram:
    """The Gram matrices of a stack.

    Attributes:
        layout: of the stack.
        inputs: length of an input.
        device: of the sums.
        total: (matrices, in, in), float64.
        samples: how many inputs the matrices had, altogether.
    """

    layout: Layout
    inputs: int
    device: torch.device
    total: Tensor = field(init=False)
    samples: int = 0

    def __post_init__(self) -> None:
        with torch.inference_mode(mode=False):
            shape = self.layout.groups, self.inputs, self.inputs
            self.total = torch.zeros(shape, dtype=torch.float64, device=self.device)
            self._sums = [RowSum(part.unsqueeze(0)) for part in self.total]

    def add(self, rows: Mapping[int, Tensor]) -> None:
        """Add rows of each matrix, by its place in the stack."""
        for place, own in rows.items():
            self.samples += len(own)
            self._sums[place].add(own.unsqueeze(0))

    def finish(self) -> None:
        """Add the last rows: after that, `total` is complete."""
        for one in self._sums:
            one.finish()
