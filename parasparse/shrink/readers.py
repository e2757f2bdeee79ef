"""Products that sum over channels: which inputs they need, and what becomes of constants."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

import torch
from torch import Tensor

from parasparse.shrink.facts import ZERO
from parasparse.shrink.labels import compact
from parasparse.shrink.products import Read
from parasparse.shrink.tracing import Trace
from parasparse.shrink.units import Units
from parasparse.text import quoted_module


class Reader:
    """A product, and what its outputs need of its inputs.

    A constant that is removed is added to the bias. Where there is no bias, or zeros are padded,
    one of the constant inputs stays, and its weights stand for those of all others.

    Args:
        read: the product.
        masked: by name of a parameter, its states: nothing can be added where a mask drops entries.
        has_bias: whether constants may be added to its bias.
        has_weights: whether its weights may be changed.

    Attributes:
        has_constants: whether one of its inputs is a constant other than 0.
    """

    def __init__(
        self, read: Read, masked: Mapping[str, Tensor], *, has_bias: bool, has_weights: bool
    ) -> None:
        self.read = read
        self.where = quoted_module(read.module)
        self._folds = has_bias and not read.padded
        self._masked_bias = masked.get(read.bias or "")
        self._masked_weight = masked.get(read.weight or "")
        self._collapses = has_weights
        self._known = ~read.constants.isnan()
        self._constant = self._known & (read.constants != 0)
        self._states: Tensor = read.states.unflatten(1, (read.columns.shape[1], -1))
        self.has_constants = bool(self._constant.any())
        self._has_known = bool(self._known.any())
        self._number = -1  # of rows for which `_needed` holds
        self._needed = torch.zeros(())

    def needed(self, units: Units) -> Tensor:
        """Return whether an output that matters depends on each of the columns."""
        live = units.matter(self.read.rows)
        if int(live.sum()) != self._number:  # rows that matter become more, never fewer
            self._number = int(live.sum())
            self._needed = self._needed_by(live)
        return self._needed

    def unknown(self, units: Units) -> Tensor:
        """Return the columns that are needed and are no constants that may go."""
        needed = self.needed(units)
        return (
            needed & (~self._known | units.stay(self.read.columns)) if self._has_known else needed
        )

    def loud(self, units: Units) -> Tensor:
        """Return the columns whose constants matter and cannot be added to the bias."""
        loud = self.needed(units) & self._constant
        if not self._folds:
            return loud
        if self._masked_bias is None:
            return torch.zeros_like(loud)
        return loud & self._needed_by(units.matter(self.read.rows) & (self._masked_bias == ZERO))

    def foldable(self, units: Units) -> Tensor:
        """Return the constants that go and are added to the bias; 0: none."""
        gone = ~units.stay(self.read.columns) & ~self.loud(units)
        return torch.where(gone, self.read.constants, 0.0).nan_to_num(0.0)

    def collapsing(self, units: Units) -> Tensor:
        """Return the columns that go and whose weights are added to those of another column."""
        return self.loud(units) & ~units.stay(self.read.columns)

    def heirs(self, units: Units) -> Tensor:
        """Return the columns that can stand for those that are `collapsing`, the best ones first.

        Their constants are not 0, nor tiny beside others, and no mask drops weights that change.
        """
        gone = self.collapsing(units)
        if not self._collapses or not bool(gone.any()):
            return torch.zeros(0, dtype=torch.long)
        gone, size = gone[0], self.read.constants[0].abs().nan_to_num(0.0)
        found = torch.argsort(size, descending=True, stable=True)
        found = found[size[found] > 1e-3 * size[gone].max()]
        if self._masked_weight is not None:
            rows = units.matter(self.read.rows) & (self._states[:, gone] != ZERO).flatten(1).any(1)
            masked = self._masked_weight.movedim(self.read.summed, 1)[rows][:, found]
            found = found[(masked != ZERO).transpose(0, 1).flatten(1).all(1)]
        return found

    def _needed_by(self, rows: Tensor) -> Tensor:
        if self.read.columns.shape[0] > 1:
            return (self._states != ZERO).any(2) & rows.unsqueeze(1)
        others = (~rows).to(torch.uint8).mul_(ZERO).view(-1, 1, 1)  # ZERO or UNKNOWN
        states = torch.maximum(compact(self._states), others)  # faster than picking rows
        needed: Tensor = states.amin(0).amin(1) != ZERO
        return needed.expand(self.read.columns.shape)


def readers_of(trace: Trace, masked: Mapping[str, Tensor]) -> list[Reader]:
    """Return the readers of a trace, the last ones first.

    Args:
        trace: a run of the model.
        masked: by name of a parameter, its states: ZERO where a mask drops an entry.
    """
    times = Counter(read.weight for read in trace.reads)

    def alone(read: Read, name: str | None) -> bool:
        """Whether a parameter can change for `read`, because nothing else reads it."""
        return name is not None and read.columns.shape[0] == 1 and trace.is_used_once(name)

    return [
        Reader(
            read,
            masked,
            has_bias=read.weight is not None and alone(read, read.bias),
            has_weights=alone(read, read.weight) and times[read.weight] == 1,
        )
        for read in reversed(trace.reads)
    ]
