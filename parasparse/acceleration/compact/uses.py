"""The uses of a compact weight between two steps, which give rows of its dense gradient.

y = x @ W.T    ->  dW = g.T @ x, where g is the gradient of y

Only g and x are kept, so any block of rows of dW can be computed when it is needed.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from parasparse.acceleration.weight.layers import is_transformed
from parasparse.attach.fsdp_gradients import COLLECTED_TWICE


@dataclass(frozen=True, eq=False)
class Uses:
    """The backward passes through a weight; its gradient is the sum of left.T @ right.

    Attributes:
        pairs: left, right and the first row of the weight that they are of.
        dense: gradients of the dense values, where other operations read these, and first rows.
    """

    pairs: list[tuple[Tensor, Tensor, int]] = field(default_factory=list)
    dense: list[tuple[Tensor, int]] = field(default_factory=list)

    def tensors(self) -> list[Tensor]:
        """Return what has been recorded."""
        return [*(t for pair in self.pairs for t in pair[:2]), *(g for g, _ in self.dense)]

    def add_rows(self, start: int, stop: int, block: Tensor) -> None:
        """Add rows `start` to `stop` of the gradient to `block`, (stop - start, inputs)."""
        for left, right, first in self.pairs:
            part = _overlap(start, stop, first, left.shape[1])
            if part is not None:
                of_block, of_left = part
                block[of_block].addmm_(left[:, of_left].t().to(block.dtype), right.to(block.dtype))
        for grad, first in self.dense:
            part = _overlap(start, stop, first, len(grad))
            if part is not None:
                block[part[0]] += grad[part[1]]


def _overlap(start: int, stop: int, first: int, count: int) -> tuple[slice, slice] | None:
    """Return the rows that `start` to `stop` and `first` to `first + count` share, in each."""
    low, high = max(start, first), min(stop, first + count)
    if low >= high:
        return None
    return slice(low - start, high - start), slice(low - first, high - first)


@dataclass(frozen=True)
class Recorder:
    """Records the uses of a weight, or of the part of it that starts at row `first`.

    Attributes:
        key: of the weight. It is a number, which torch.compile need not trace.
        first: see above.
    """

    key: int
    first: int = 0

    def part(self, first: int) -> Recorder:
        """Return the recorder of the part that starts at row `first` of this one."""
        return Recorder(self.key, self.first + first)

    def watched(self, result: Tensor, x: Tensor | None, *, transposed: bool = False) -> Tensor:
        """Return `result`, whose gradient will be recorded.

        `result` is x @ W.T, or x @ W if `transposed`, or the dense values of W if `x` is None.
        """
        if not result.requires_grad or is_transformed():
            return result
        watched: Tensor = _watched(result, x, self.key, self.first, transposed)
        return watched


_RECORDED: dict[int, Uses] = {}


@contextmanager
def recorded(stacks: list[Any]) -> Iterator[Uses]:
    """Yield the uses of a weight, which is read at all `stacks`, while the block lasts."""
    key = id(stacks[0])
    if key in _RECORDED:
        raise RuntimeError(COLLECTED_TWICE)
    uses = _RECORDED[key] = Uses()
    try:
        for stack in stacks:
            stack.recorder = Recorder(key)
        yield uses
    finally:
        del _RECORDED[key]
        for stack in stacks:
            # Not set to None, because compiled graphs guard on the absence of the attribute.
            stack.__dict__.pop("recorder", None)


# Custom operators, because torch.compile has no hooks on tensors inside of a graph.
@torch.library.custom_op("parasparse::watched", mutates_args=())
def _watched(result: Tensor, x: Tensor | None, key: int, first: int, transposed: bool) -> Tensor:
    return result.clone()


@torch.library.custom_op("parasparse::record", mutates_args=())
def _record(g: Tensor, x: Tensor | None, key: int, first: int, transposed: bool) -> Tensor:
    uses = _RECORDED.get(key)
    if uses is None:  # backward came too late
        return g.clone()
    # Copies: what is passed on may be changed in place.
    g_copy = g.detach().clone()
    if x is None:
        uses.dense.append((g_copy.flatten(1), first))
    else:
        x = x.detach().conj().resolve_conj()
        uses.pairs.append((x, g_copy, first) if transposed else (g_copy, x, first))
    return g.clone()


@_watched.register_fake
def _(result: Tensor, x: Tensor | None, key: int, first: int, transposed: bool) -> Tensor:
    return torch.empty_like(result)


@_record.register_fake
def _(g: Tensor, x: Tensor | None, key: int, first: int, transposed: bool) -> Tensor:
    return torch.empty_like(g)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    _, x, *ctx.more = inputs
    ctx.save_for_backward(*([] if x is None else [x]))


def _backward(ctx: Any, g: Tensor) -> tuple[Any, ...]:
    saved = ctx.saved_tensors  # read once, as checkpointed activations must be
    x = saved[0] if saved else None
    return _record(g, x, *ctx.more), None, None, None, None


_watched.register_autograd(_backward, setup_context=_keep)
