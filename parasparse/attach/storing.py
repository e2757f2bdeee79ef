"""Gives a tensor values of another shape, so that whoever holds it goes on holding it."""

import torch
from torch import Tensor, nn


def give(tensor: Tensor, value: Tensor, grad: Tensor | None) -> None:
    """Give `tensor` a new value and gradient, which may have another shape."""
    tensor.grad = None  # torch wants the shape of the data
    if isinstance(tensor, nn.Parameter):
        # Not `.data`: as long as an earlier graph lives, autograd would expect the old shape
        # (test_training_goes_on_while_an_earlier_graph_lives).
        with torch.no_grad():
            tensor.set_(value)  # type: ignore[call-overload]
    else:
        tensor.data = value
    tensor.grad = grad
