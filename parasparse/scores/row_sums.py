"""x x^T summed over rows, to the same bits however the rows come in batches."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

_ROWS, _NUMBERS = 512, 1 << 18  # multiplied at a time: at least so many rows or numbers
_PANEL = 256  # columns of the upper triangle at a time


@dataclass(eq=False)
class RowSum:
    """The sum of x x^T over rows x.

    Rows are multiplied in blocks of a fixed size, in order, so the last bits of the sum depend on
    the rows and not on batches.

    Attributes:
        total: (groups, in, in), float64, of full blocks; only the upper triangle until `finish`.
            None before the first row.
        rest: (groups, rows, in), rows that do not fill a block yet.
        samples: rows in both.
    """

    total: Tensor | None = None
    rest: Tensor | None = None
    samples: int = 0

    @torch.inference_mode(mode=False)
    @torch.no_grad()
    def add(self, rows: Tensor) -> None:
        """Add `rows` (groups, rows, in)."""
        self.samples += rows.shape[1]
        if self.rest is not None:
            rows = torch.cat((self.rest, rows), 1)
        size = max(_ROWS, _NUMBERS // max(rows.shape[0] * rows.shape[2], 1))
        full = rows.shape[1] // size * size
        for start in range(0, full, size):
            self._multiply(rows[:, start : start + size])
        self.rest = rows[:, full:].clone()

    @torch.inference_mode(mode=False)
    @torch.no_grad()
    def finish(self) -> None:
        """Add the rows that do not fill a block, and fill in the lower triangle."""
        if self.rest is None:
            return
        total, self.rest = self._multiply(self.rest), None
        for start, stop in _panels(total.shape[-1]):
            own = total[:, start:stop, start:stop]
            own.copy_(own.triu() + own.triu(1).mT)
            total[:, stop:, start:stop] = total[:, start:stop, stop:].mT

    def copy(self) -> RowSum:
        """Return a copy that goes on by itself."""
        total = None if self.total is None else self.total.clone()
        return RowSum(total, self.rest, self.samples)

    def _multiply(self, rows: Tensor) -> Tensor:
        """Add `rows` to the upper triangle, and return it."""
        # A copy: the bits of a product may depend on where in memory its factors lie.
        rows = rows.new_empty(rows.shape, dtype=torch.float64).copy_(rows)
        size = rows.shape[-1]
        if self.total is None:
            self.total = rows.new_zeros(len(rows), size, size)
        for start, stop in _panels(size):
            part = self.total[:, start:stop, start:]
            part.baddbmm_(rows[..., start:stop].mT, rows[..., start:])
        return self.total


def _panels(size: int) -> Iterator[tuple[int, int]]:
    for start in range(0, size, _PANEL):
        yield start, min(start + _PANEL, size)
