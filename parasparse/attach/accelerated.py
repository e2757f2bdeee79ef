"""The sparse weights of accelerated models, and the check that refuses changes meanwhile."""

import torch
from torch import Tensor, nn


class StandIn(torch.Tensor):
    """A tensor that replaces a weight and implements its own multiplication."""

    def plain(self) -> Tensor:
        """Return the dense values as a plain tensor."""
        raise NotImplementedError


def is_accelerated(model: nn.Module) -> bool:
    """Whether `accelerate` has replaced a weight of `model`."""
    return any(
        isinstance(tensor, StandIn)
        for module in model.modules()
        for tensor in (*module._parameters.values(), module.__dict__.get("stand_in"))
    )


def check_not_accelerated(model: nn.Module) -> None:
    """Raise RuntimeError if `model` is accelerated, because its sparse weights are copies."""
    if is_accelerated(model):
        raise RuntimeError(
            "the masks and weights of an accelerated model must not change. Call "
            "parasparse.restore(model) first."
        )
