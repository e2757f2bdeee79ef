"""The one operation of the library: a weight, with +0.0 where its mask is 0."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Proxy

_FIRST_VMAP: Any = torch._C._parse_dispatch_key("Batched")
_INTEGER_OF_SIZE = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def apply_mask(weight: Tensor, mask: Tensor) -> Tensor:
    """Return `weight` where `mask` is True and +0.0 elsewhere; times the mask if that is real.

    Kept entries of a bool mask pass bit for bit; masked ones are exactly +0.0 in the result and in
    the gradient, inf and NaN included. Differentiable any number of times, forward and backward.

    Args:
        weight: real or complex, any shape.
        mask: same shape; bool, or real.
    """
    if torch.compiler.is_compiling() or is_tracing() or isinstance(weight, Proxy):
        return _masked(weight, mask)
    result: Tensor = _ApplyMask.apply(weight, mask)
    return result


def is_tracing() -> bool:
    """Whether torch.jit.trace, or an exporter built on it, is watching."""
    return torch._C._get_tracing_state() is not None


def _masked(weight: Tensor, mask: Tensor) -> Tensor:
    if mask.dtype == torch.bool:
        return torch.where(mask, weight, 0)
    wide = weight.to(mask.dtype) if weight.dtype.itemsize == 1 else weight  # float8 has no product
    return torch.where(mask != 0, (wide * mask).to(weight.dtype), 0)


def _masked_by_bits(weight: Tensor, mask: Tensor) -> Tensor:
    """`where` in a third of its time on a CPU: True is the integer -1, all bits set."""
    integer = _INTEGER_OF_SIZE[weight.dtype.itemsize]
    bits = weight.resolve_conj().resolve_neg().view(integer)
    return mask.view(torch.uint8).to(integer).neg_().bitwise_and_(bits).view(weight.dtype)


def _masked_eagerly(weight: Tensor, mask: Tensor) -> Tensor:
    if weight.layout == torch.sparse_coo:  # the gradient of nn.Embedding(sparse=True)
        weight = weight.coalesce()
        indices = weight.indices()
        values = _masked_eagerly(weight.values(), mask[tuple(indices)])
        return torch.sparse_coo_tensor(
            indices, values, weight.shape, is_coalesced=True, check_invariants=False
        )
    plain = type(weight) in (Tensor, nn.Parameter) and weight.device.type == "cpu"
    if plain and mask.dtype == torch.bool and weight.dtype.itemsize in _INTEGER_OF_SIZE:
        return _masked_by_bits(weight, mask)
    return _masked(weight, mask)


def _derivative(tensor: Tensor, mask: Tensor) -> Tensor:
    """Return a gradient or tangent masked as the weight is."""
    if torch._C._dispatch_keys(tensor).has(_FIRST_VMAP):
        # `autograd.grad(is_grads_batched=True)` and `jacobian(vectorize=True)` run torch's first
        # vmap, which knows neither Functions nor views as integers
        # (test_gradcheck_once_and_twice_forward_and_backward).
        return _masked(tensor, mask)
    return apply_mask(tensor, mask)


class _ApplyMask(torch.autograd.Function):
    """Linear and its own adjoint: the gradient is masked as the weight is. Saves the mask only."""

    @staticmethod
    def forward(weight: Tensor, mask: Tensor) -> Tensor:
        return _masked_eagerly(weight, mask)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(inputs[1])
        ctx.save_for_forward(inputs[1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (mask,) = ctx.saved_tensors
        return _derivative(grad, mask), None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, _: None) -> Tensor:
        (mask,) = ctx.saved_tensors
        return _derivative(tangent, mask)

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[int | None, int | None], weight: Tensor, mask: Tensor
    ) -> tuple[Tensor, int]:
        weight, mask = (
            tensor.expand(info.batch_size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)
            for tensor, dim in zip((weight, mask), in_dims, strict=True)
        )
        return apply_mask(weight, mask), 0
