"""The units of a trace, and which of them stay."""

from __future__ import annotations

import torch
from torch import Tensor

from parasparse.shrink.labels import compact
from parasparse.shrink.tracing import Trace


class Units:
    """The units of a trace, and which of them stay, with the reason.

    Attributes:
        of: the unit of each id.
        kept: whether each unit stays. Unit 0, of what is never removed, does.
        matters: whether the outputs depend on the values of each unit. Others may stay as well,
            for the sake of shapes: what they read may be removed.
    """

    def __init__(self, trace: Trace) -> None:
        self.of = trace.ties.units()
        self.kept = torch.zeros(len(self.of), dtype=torch.bool)
        self.kept[0] = True
        self.matters = self.kept.clone()
        self._reasons = ["it meets a tensor whose size stays"]  # of unit 0
        self._reason = torch.full((len(self.of),), -1)
        self._reason[0] = 0

    def keep(self, ids: Tensor, reason: str) -> bool:
        """Keep the units of `ids`; return whether one of them was not kept before."""
        units = self.of.take(compact(ids))
        new = units[~self.kept[units]]
        if not len(new):
            return False
        self.kept[new] = True
        self._reason[new] = len(self._reasons)
        self._reasons.append(reason)
        return True

    def need(self, ids: Tensor, reason: str) -> bool:
        """Keep the units of `ids` and their values; return whether that is new for one of them."""
        units = self.of.take(compact(ids))
        if bool(self.matters[units].all()):
            return False
        self.matters[units] = True
        self.keep(ids, reason)
        return True

    def stay(self, ids: Tensor) -> Tensor:
        """Return whether each of `ids` stays."""
        return self.kept.take(self.of.take(ids))

    def matter(self, ids: Tensor) -> Tensor:
        """Return whether the outputs depend on each of `ids`."""
        return self.matters.take(self.of.take(ids))

    def reason(self, unit: int) -> str:
        """Return why a unit stays."""
        number = int(self._reason[unit])
        return self._reasons[number] if number >= 0 else ""
