"""x x^T summed over rows, to the same bits however the rows come in batches."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

_ROWS, _NUMBERS = 512, 1 << 18  # multiplied at a time: at least so many rows or numbers
_PANEL = 256  # columns of the upper triangle at a time
_MANY = 512  # inputs whose products are in 32 bits
_MEANS = 16  # blocks whose means wait
_FEWER = ("tf32", "bf16")  # precisions of float32 products


@dataclass(eq=False)
class RowSum:
    """The sum of x x^T over rows x.

    Rows are multiplied in blocks of a fixed size, in order, so the last bits of the sum depend on
    the rows and not on batches.

    Sums are in 64 bits. Products of many inputs are in 32, which takes half of the time: the errors
    are those of a block, and do not grow with the number of blocks. The mean of a block is
    subtracted first, and what it adds to the product is added in 64 bits: where inputs are far
    from 0, their products in 32 bits would hide how they differ.

    Attributes:
        total: (groups, in, in), float64, of full blocks; only the upper triangle until `finish`.
            None before the first row.
        rest: (groups, rows, in), rows that do not fill a block yet.
        samples: rows in both.
        means: (groups, 1, in), float64, pairs a and b whose a^T b are to be added to `total`.
    """

    total: Tensor | None = None
    rest: Tensor | None = None
    samples: int = 0
    means: list[tuple[Tensor, Tensor]] = field(default_factory=list)

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
        self._add_means(total)
        for start, stop in _panels(total.shape[-1]):
            own = total[:, start:stop, start:stop]
            own.copy_(own.triu() + own.triu(1).mT)
            total[:, stop:, start:stop] = total[:, start:stop, stop:].mT

    def copy(self) -> RowSum:
        """Return a copy that goes on by itself."""
        total = None if self.total is None else self.total.clone()
        return RowSum(total, self.rest, self.samples, list(self.means))

    def _multiply(self, rows: Tensor) -> Tensor:
        """Add `rows` to the upper triangle, and return it."""
        # A copy: the bits of a product may depend on where in memory its factors lie.
        rows = rows.new_empty(rows.shape, dtype=_dtype_of_products(rows)).copy_(rows)
        size = rows.shape[-1]
        if self.total is None:
            self.total = rows.new_zeros(len(rows), size, size, dtype=torch.float64)
        if rows.dtype == torch.float32:
            self._subtract_mean(rows)
        for start, stop in _panels(size):
            self.total[:, start:stop, start:] += rows[..., start:stop].mT @ rows[..., start:]
        if len(self.means) >= 2 * _MEANS:
            self._add_means(self.total)
        return self.total

    def _subtract_mean(self, rows: Tensor) -> None:
        """Subtract the mean of `rows` in place, and note what it would have added."""
        number, whole = rows.shape[1], rows.sum(1, keepdim=True, dtype=torch.float64)
        mean = (whole / max(number, 1)).float()
        rows.sub_(mean)
        mean = mean.double()
        # x x^T = (x - m) (x - m)^T + m x^T + (x - m) m^T
        self.means += [(mean, whole), (whole - number * mean, mean)]

    def _add_means(self, total: Tensor) -> None:
        if self.means:
            columns, rows = (torch.cat(each, 1) for each in zip(*self.means, strict=True))
            total.baddbmm_(columns.mT, rows)
            self.means = []


def _dtype_of_products(rows: Tensor) -> torch.dtype:
    """Return float32 for many inputs, unless they have more bits or torch would use fewer."""
    backend = torch.backends.cuda if rows.is_cuda else torch.backends.mkldnn
    has_more, has_fewer = rows.dtype == torch.float64, backend.matmul.fp32_precision in _FEWER
    is_small = rows.shape[-1] < _MANY
    return torch.float64 if is_small or has_more or has_fewer else torch.float32


def _panels(size: int) -> Iterator[tuple[int, int]]:
    for start in range(0, size, _PANEL):
        yield start, min(start + _PANEL, size)
