"""What takes the place of a weight to multiply in its own way, and what is refused meanwhile."""

import torch
from torch import nn


class StandIn(torch.Tensor):
    """A tensor that takes the place of a weight and multiplies in its own way."""


def is_accelerated(model: nn.Module) -> bool:
    """Whether `accelerate` has put weights that multiply sparsely into any module of `model`."""
    return any(
        isinstance(tensor, StandIn)
        for module in model.modules()
        for tensor in (*module._parameters.values(), module.__dict__.get("stand_in"))
    )


def check_not_accelerated(model: nn.Module) -> None:
    """Refuse what would change weights or masks under the formats that multiply."""
    if is_accelerated(model):
        raise RuntimeError(
            "`model` must not be accelerated while its masks or weights change. Call "
            "parasparse.restore(model) first."
        )
