"""Dense gradients of weights that `fully_shard` shards, averaged over processes.

Layers compute with gathered copies of the weights, whose gradients belong to the batch of one
process. Only gradients of Parameters are averaged, so masks let the dense gradient pass, each
process reads its part of the average, and the dropped entries of `.grad` are then set to 0 again.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from parasparse.attach.stack import MaskedParametrizationList
from parasparse.masks.apply import apply_mask_
from parasparse.masks.mask import Mask
from parasparse.sharding.dtensors import laid_out_like


@contextmanager
def reduced(
    managed: Any, stacks: list[MaskedParametrizationList], add: Callable[[Tensor], None]
) -> Iterator[None]:
    """Call `add` with the unmasked gradient of each backward pass, averaged over processes.

    `managed` is the record of the Parameter in `managed_parameters`. A frozen one adds nothing.

    Raises:
        RuntimeError: a mask is not a plain bool mask; the gradient is being collected already; the
            block ends before its backward passes are reduced.
    """
    masks = [stack.mask for stack in stacks]
    plain = [mask for mask in masks if isinstance(mask, Mask) and mask.is_bool]
    if len(plain) < len(masks) or any(len(stack) > 1 for stack in stacks):
        raise RuntimeError(
            "under `fully_shard`, dense gradients can only be collected for weights with a plain "
            "bool mask and no other parametrization. `binarize` the masks, or collect before "
            "sharding."
        )
    if id(managed.sharded_param) in _collected:
        raise RuntimeError(COLLECTED_TWICE)
    if not managed.sharded_param.requires_grad:
        yield
        return
    collector = _Collector(managed, plain, add)
    collector.arm()
    try:
        yield
        collector.check_reduced()
    finally:
        collector.disarm()


class _Collector:
    """Passes on what each backward pass adds to the gradient of one Parameter."""

    def __init__(self, managed: Any, masks: list[Mask], add: Callable[[Tensor], None]) -> None:
        self._managed, self._masks, self._add = managed, masks, add
        self._parameter: Tensor = managed.sharded_param
        self._were_dense = [mask.dense_gradient for mask in masks]
        self._before: Tensor | None = None  # `.grad` before the latest reduction
        self._handles: list[Any] = []

    def arm(self) -> None:
        _collected.add(id(self._parameter))
        for mask in self._masks:
            mask.dense_gradient = True
        self._handles.append(self._parameter.register_post_accumulate_grad_hook(self._split))
        self._watch()

    def disarm(self) -> None:
        _collected.discard(id(self._parameter))
        for handle in self._handles:
            handle.remove()
        for mask, was_dense in zip(self._masks, self._were_dense, strict=True):
            mask.dense_gradient = was_dense

    def check_reduced(self) -> None:
        gathered, summed = self._gathered(), self._managed.unsharded_accumulated_grad
        if summed is not None or (gathered is not None and gathered.grad is not None):
            raise RuntimeError(
                "backward passes without synchronisation are pending at the end of the block that "
                "collects dense gradients. Let the last one synchronise inside the block "
                "(`set_requires_gradient_sync(True)`)."
            )

    def _gathered(self) -> Tensor | None:
        return getattr(self._managed, "_unsharded_param", None)

    def _watch(self) -> None:
        gathered = self._gathered()  # made in the first forward
        if gathered is not None and len(self._handles) < 2:
            self._handles.append(gathered.register_post_accumulate_grad_hook(self._keep))

    def _keep(self, _: Tensor) -> None:
        """Remember `.grad` before the new gradient is reduced and added to it."""
        grad = self._parameter.grad
        self._before = None if grad is None else grad.clone()

    def _split(self, parameter: Tensor) -> None:
        """Pass on the new part of `.grad`, and mask `.grad` again."""
        grad = parameter.grad
        assert grad is not None
        self._add(grad.clone() if self._before is None else grad - self._before)
        self._watch()
        if not all(self._were_dense):
            mask = self._masks[0].mask
            assert mask is not None
            apply_mask_(grad, laid_out_like(mask, grad))


_collected: set[int] = set()  # the ids of Parameters whose gradient is being collected
COLLECTED_TWICE = (
    "the dense gradient of a tensor must not be collected twice at a time: `dense_gradients` or "
    "`scores.collect` is open for this model, or a controller that grows by gradients is about to "
    "update."
)
