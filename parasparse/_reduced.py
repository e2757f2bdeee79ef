"""Gradients as `fully_shard` has averaged them over processes, of masked entries as well.

While it computes, weights are gathered ones of its own, and each process sees the gradient of its
own batch. What it reduces are gradients of Parameters: so masks let the dense one pass, each
process gets its part of the average, and what is masked is taken out of `.grad` again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from parasparse._parts import fill_, spread_like
from parasparse._stack import MaskedParametrizationList
from parasparse.parametrizations import Mask


@contextmanager
def reduced(
    parameter: Tensor, stacks: list[MaskedParametrizationList], add: Callable[[Tensor], None]
) -> Iterator[None]:
    """Call `add` with what each backward pass adds to `parameter.grad`, as if it had no mask.

    Args:
        parameter: one that `fully_shard` manages.
        stacks: the places where it is masked.
        add: gets a tensor that is its own.

    Raises:
        RuntimeError: what masks it is no plain bool mask.
    """
    masks = [stack.mask for stack in stacks]
    plain = [mask for mask in masks if isinstance(mask, Mask) and _is_bool(mask)]
    if len(plain) < len(masks) or any(len(stack) > 1 for stack in stacks):
        raise RuntimeError(
            "under `fully_shard` the dense gradient must be collected of weights under plain bool "
            "masks, with nothing else underneath. Collect it before sharding, or `binarize`."
        )
    was_dense = [mask.dense_gradient for mask in plain]
    held: Tensor | None = None  # .grad as the last backward pass left it
    values: Tensor | None = None

    def split(parameter: Tensor) -> None:
        nonlocal held, values
        grad = parameter.grad
        assert grad is not None
        add(grad - values if grad is held and values is not None else grad.clone())
        if plain and not all(was_dense):
            fill_(grad, ~_mask_like(plain[0], grad), 0.0)
        held, values = grad, grad.clone()

    if parameter.grad is not None:
        held, values = parameter.grad, parameter.grad.clone()
    for mask in plain:
        mask.dense_gradient = True
    handle = parameter.register_post_accumulate_grad_hook(split)
    try:
        yield
    finally:
        handle.remove()
        for mask, dense in zip(plain, was_dense, strict=True):
            mask.dense_gradient = dense


def _is_bool(mask: Mask) -> bool:
    return mask.mask is not None and mask.mask.dtype == torch.bool


def _mask_like(mask: nn.Module, tensor: Tensor) -> Tensor:
    return spread_like(mask.mask, tensor)  # type: ignore[arg-type]
