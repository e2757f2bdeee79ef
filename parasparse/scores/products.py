"""Weights times gradients, real and complex."""

from collections.abc import Callable

import torch
from torch import Tensor


def product(weight: Tensor, grad: Tensor) -> Tensor:
    """Return w g, or Re(conj(g) w) if complex: how the loss changes along w."""
    if weight.shape != grad.shape:
        raise ValueError(
            f"the tensor must have the shape that the statistics have, {tuple(grad.shape)}; got "
            f"{tuple(weight.shape)}. Collect statistics of this model."
        )
    return (grad.conj() * weight).real if weight.is_complex() else weight * grad


def each_part(function: Callable[[Tensor], Tensor], tensor: Tensor) -> Tensor:
    """Return `function` of a real tensor, or of both components of a complex one."""
    if tensor.is_complex():
        return torch.complex(function(tensor.real), function(tensor.imag))
    return function(tensor)


def wide(tensor: Tensor) -> Tensor:
    """Return `tensor` in at least 32 bits, so sums do not lose small terms."""
    return tensor.float() if tensor.is_floating_point() and tensor.dtype.itemsize < 4 else tensor
