"""What follows a convolution directly: a sum and an activation, which `fuse` makes part of it."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": torch.relu_,
    "relu6": lambda x: F.hardtanh_(x, 0, 6),
    "hardsigmoid": lambda x: F.hardsigmoid(x, inplace=True),
    "hardswish": lambda x: F.hardswish(x, inplace=True),
}


class Following(NamedTuple):
    """activation(convolution + added)."""

    added: Any = None
    in_place: bool = False  # `y += added`, which keeps the dtype of the convolution
    last: bool = False  # nothing reads `added` afterwards
    activation: str | None = None

    def of(self, result: Tensor) -> Tensor:
        """Return activation(result + added); `result` may be overwritten."""
        if self.in_place:
            result += self.added
        elif self.added is not None:
            result = result + self.added
        return result if self.activation is None else ACTIVATIONS[self.activation](result)


NOTHING = Following()
