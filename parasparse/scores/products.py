"""Weights times gradients, real and complex."""

from collections.abc import Callable

import torch
from torch import Tensor


def product(weight: Tensor, grad: Tensor) -> Tensor:
    """Return w g, or Re(conj(g) w) where they are complex: how the loss changes along w."""
    if weight.shape != grad.shape:
        raise ValueError(
            f"statistics must be of the same tensor; theirs has shape {tuple(grad.shape)}, this "
            f"one {tuple(weight.shape)}."
        )
    return (grad.conj() * weight).real if weight.is_complex() else weight * grad


def each_part(function: Callable[[Tensor], Tensor], tensor: Tensor) -> Tensor:
    """Return `function` of a real tensor, or of the real and of the imaginary part."""
    if tensor.is_complex():
        return torch.complex(function(tensor.real), function(tensor.imag))
    return function(tensor)


def wide(tensor: Tensor) -> Tensor:
    """Return `tensor` in 32 bits at least, so that sums do not lose small terms."""
    return tensor.float() if tensor.is_floating_point() and tensor.dtype.itemsize < 4 else tensor
