"""The parametrizations of a weight of which only the kept values exist.

module.parametrizations.weight.original        the kept values, one dimension
module.parametrizations.weight.0.starts        their places; see `Places`
module.parametrizations.weight.0.columns
"""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor, nn

from parasparse.acceleration.compact.weight import CompactWeight
from parasparse.attach.stack import MaskedParametrizationList
from parasparse.masks.places import Kept, Places


class CompactParametrizationList(MaskedParametrizationList):
    """Reads a `CompactWeight` of its kept values."""

    is_compact: ClassVar[bool] = True

    def __init__(self, values: nn.Parameter, places: Places, mask: Kept) -> None:
        super().__init__(values, places)
        self.add_module("1", mask)

    @property
    def places(self) -> Places:
        """Where the values are."""
        return self[0]  # type: ignore[return-value]

    def forward(self) -> Tensor:
        """Return the weight."""
        return CompactWeight(self.original, self.places)
