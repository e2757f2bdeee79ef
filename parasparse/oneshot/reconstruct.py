"""`reconstruct`: train the kept weights of each block towards the outputs of the dense model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from parasparse.acceleration.measure import undisturbed
from parasparse.oneshot.finding_blocks import blocks_of
from parasparse.oneshot.paused_run import Call
from parasparse.oneshot.placement import placed
from parasparse.oneshot.walk import Walk, batches_in
from parasparse.text import listed

_adam = partial(torch.optim.Adam, lr=1e-3)


def reconstruct(
    model: nn.Module,
    dense: nn.Module,
    batches: Iterable[Any],
    *,
    blocks: str | Sequence[str] | None = None,
    steps: int = 200,
    optimizer: Callable[[list[nn.Parameter]], torch.optim.Optimizer] = _adam,
    device: torch.device | str | None = None,
    storage: torch.device | str = "cpu",
    progress: Callable[[str, float, float], object] | None = None,
) -> nn.Module:
    """Train each block of a pruned `model` towards the outputs of `dense`; return the model.

    The masks stay. Block after block, the parameters of the block that require gradients take
    `steps` steps, one batch each, that lower the squared difference between its output and that of
    the same block of `dense`, relative to the squared output. Its inputs are those that it gets in
    `model`, after the blocks before it were trained; the outputs to reach are those that the dense
    model has. A block whose error over all batches does not fall gets its parameters back.

    Args:
        model: a masked module, not compiled; changed in place.
        dense: the same module before it was pruned; not changed.
        batches: inputs of both, as for `prune_blocks`.
        blocks: as for `prune_blocks`. The first floating point tensor that a block returns counts.
        steps: number of steps for each block.
        optimizer: from a list of parameters to an optimizer.
        device: as for `prune_blocks`.
        storage: as for `prune_blocks`.
        progress: called with the name of each block, and its error before and after.

    Raises:
        ValueError: the models do not have the same blocks, one of them is called more than once, or
            as for `prune_blocks`.

    Examples:
        >>> import copy
        >>> dense = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> model = sparsify(copy.deepcopy(dense), 0.5)
        >>> batches = [torch.rand(16, 4)]
        >>> model = reconstruct(model, dense, batches, blocks="*", steps=3)
        >>> model[0].weight.count_nonzero()
        tensor(16)

    Reference: "A Free Lunch in LLM Compression: Revisiting Retraining after Pruning", 2025,
        arXiv:2510.14444.
    """
    both = {"model": model, "dense": dense}
    inputs, walks, places = batches_in(batches), {}, {}
    with ExitStack() as stack:
        for which, module in both.items():
            found = blocks_of(module, blocks)
            walks[which] = Walk(module, found, inputs, device=device, storage=storage)
            stack.enter_context(undisturbed(module))
            places[which] = stack.enter_context(placed(module, found, device))
            stack.enter_context(walks[which].entered())
            walks[which].count()
        _check_alike(walks["model"], walks["dense"])
        for walk in walks.values():
            walk.start()
        for name in walks["model"].calls:
            with places["dense"][name].held():
                wanted = [_output(call).to(storage) for call in walks["dense"].at(name)]
                walks["dense"].leave(name)
            with places["model"][name].held():
                before, after = _trained(walks["model"].at(name), wanted, steps, optimizer)
                walks["model"].leave(name)
            if progress is not None:
                progress(name, before, after)
    return model


def _trained(
    calls: list[Call], wanted: list[Tensor], steps: int, optimizer: Callable[..., Any]
) -> tuple[float, float]:
    """Train the block of `calls`; return its error before and after."""
    block = calls[0].block
    parameters = [p for p in block.parameters() if p.requires_grad]
    old = [(parameter.detach().clone(), parameter.grad) for parameter in parameters]
    before = _mean_error(calls, wanted)
    if not parameters or steps < 1:
        return before, before
    after = before
    try:
        _train(calls, wanted, steps, optimizer(parameters))
        after = _mean_error(calls, wanted)
    finally:
        for parameter, (value, grad) in zip(parameters, old, strict=True):
            parameter.grad = grad
            if not after < before:
                parameter.copy_(value)
    return before, min(after, before)


def _train(calls: list[Call], wanted: list[Tensor], steps: int, optimizer: Any) -> None:
    for step in range(steps):
        number = step % len(calls)
        with torch.inference_mode(False), torch.enable_grad():
            optimizer.zero_grad()
            _error(calls[number], wanted[number]).backward()
            optimizer.step()


def _mean_error(calls: list[Call], wanted: list[Tensor]) -> float:
    errors = [_error(call, each) for call, each in zip(calls, wanted, strict=True)]
    return float(torch.stack(errors).mean())


def _error(call: Call, wanted: Tensor) -> Tensor:
    """Return the squared difference of the output from `wanted`, relative to `wanted`."""
    output = _output(call)
    wanted = wanted.to(output.device).float()
    return (output.float() - wanted).square().mean() / wanted.square().mean().clamp(min=1e-12)


def _output(call: Call) -> Tensor:
    """Return the first floating point tensor that the block returns."""
    with call.brought():
        leaves = tree_leaves(call.repeated())
    found = [t for t in leaves if isinstance(t, Tensor) and t.is_floating_point()]
    if not found:
        raise ValueError(
            f'a block must return a floating point tensor; "{call.name}" returns none.'
        )
    return found[0]


def _check_alike(walk: Walk, dense: Walk) -> None:
    """Raise ValueError if two models do not call the same blocks, each once."""
    if walk.model is dense.model:
        raise ValueError("`dense` must be another model than `model`: a copy from before pruning.")
    if not walk.calls or walk.calls != dense.calls:
        raise ValueError(
            f"`dense` must call the blocks that `model` calls, {listed(walk.calls)}; it calls "
            f"{listed(dense.calls)}."
        )
    again = [name for name, number in walk.calls.items() if number > 1]
    if again:
        raise ValueError(f"blocks must be called once; {listed(again)} are called more often.")
