"""Gradients as `fully_shard` has averaged them over processes, of masked entries as well.

While it computes, weights are gathered ones of its own, and each process sees the gradient of its
own batch. What it reduces are gradients of Parameters: so masks let the dense one pass, each
process gets its part of the average, and what is masked is taken out of `.grad` again.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from parasparse.attach.stack import MaskedParametrizationList
from parasparse.masks.apply import apply_mask_
from parasparse.masks.mask import Mask
from parasparse.sharding.dtensors import laid_out_like


@contextmanager
def reduced(
    managed: Any, stacks: list[MaskedParametrizationList], add: Callable[[Tensor], None]
) -> Iterator[None]:
    """Call `add` with what each backward pass adds to `.grad`, as if there were no mask.

    Args:
        managed: what `fully_shard` keeps of a Parameter, from `managed_parameters`. Of one that
            requires no gradient, nothing is added.
        stacks: the places where it is masked.
        add: gets a tensor that is its own.

    Raises:
        RuntimeError: what masks it is no plain bool mask; it is collected already; backward passes
            in the block have not been reduced when it ends.
    """
    parameter = managed.sharded_param
    masks = [stack.mask for stack in stacks]
    plain = [mask for mask in masks if isinstance(mask, Mask) and _is_bool(mask)]
    if len(plain) < len(masks) or any(len(stack) > 1 for stack in stacks):
        raise RuntimeError(
            "under `fully_shard` the dense gradient must be collected of weights under plain bool "
            "masks, with nothing else underneath. Collect it before sharding, or `binarize`."
        )
    if id(parameter) in _collected:
        raise RuntimeError(COLLECTED_TWICE)
    if not parameter.requires_grad:
        yield
        return
    was_dense = [mask.dense_gradient for mask in plain]
    before: Tensor | None = None
    handles: list[Any] = []

    def keep(_: Tensor) -> None:  # called before the gradient is reduced and added to `.grad`
        nonlocal before
        before = None if parameter.grad is None else parameter.grad.clone()

    def watch() -> None:  # what is gathered is made at the first forward: no gradient before it
        leaf = getattr(managed, "_unsharded_param", None)
        if leaf is not None and len(handles) < 2:
            handles.append(leaf.register_post_accumulate_grad_hook(keep))

    def split(parameter: Tensor) -> None:
        grad = parameter.grad
        assert grad is not None
        add(grad.clone() if before is None else grad - before)
        watch()
        if plain and not all(was_dense):
            mask = plain[0].mask
            assert mask is not None
            apply_mask_(grad, laid_out_like(mask, grad))

    for mask in plain:
        mask.dense_gradient = True
    _collected.add(id(parameter))
    handles.append(parameter.register_post_accumulate_grad_hook(split))
    watch()
    try:
        yield
        leaf = getattr(managed, "_unsharded_param", None)
        pending = managed.unsharded_accumulated_grad, None if leaf is None else leaf.grad
        if any(grad is not None for grad in pending):
            raise RuntimeError(
                "the block that collects dense gradients must end after they are reduced; backward "
                "passes without synchronisation are pending. Let the last one synchronise "
                "(`set_requires_gradient_sync(True)`) inside it."
            )
    finally:
        _collected.discard(id(parameter))
        for handle in handles:
            handle.remove()
        for mask, dense in zip(plain, was_dense, strict=True):
            mask.dense_gradient = dense


_collected: set[int] = set()  # the Parameters of which it is collected now
COLLECTED_TWICE = (
    "the dense gradient of a tensor must not be collected twice at a time: `dense_gradients` or "
    "`scores.collect` is open for this model, or a controller that grows by gradients is about to "
    "update."
)


def _is_bool(mask: Mask) -> bool:
    return mask.mask is not None and mask.mask.dtype == torch.bool
