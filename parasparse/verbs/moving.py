"""Moves the places of a compact weight, with its values, its gradient and its optimizer's state."""

from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from parasparse import optim
from parasparse.attach.storing import give
from parasparse.masks.kept_entries import KeptEntries, carrying
from parasparse.masks.places import Kept
from parasparse.targets.tensors import Target
from parasparse.text import listed


def check_movable(target: Target, optimizer: Any) -> None:
    """Raise an error if `move` cannot move the state of the optimizer; see `check_cuttable`."""
    if optimizer is not None:
        optim.check_cuttable(optimizer, target.originals())


def wrapper_of(model: nn.Module, target: Target) -> DistributedDataParallel | None:
    """Return the DistributedDataParallel around a weight of `model`, or None."""
    owners = {id(site.module) for site in target.sites}
    for module in model.modules():
        if isinstance(module, DistributedDataParallel) and any(
            id(inner) in owners for inner in module.modules()
        ):
            return module
    return None


def check_may_resize(model: nn.Module, targets: list[Target]) -> None:
    """Raise RuntimeError if the number of entries of a compact weight must not change."""
    wrapped = [t.name for t in targets if t.is_compact and wrapper_of(model, t) is not None]
    if wrapped:
        raise RuntimeError(
            f"the number of entries of {listed(wrapped)} must not change inside a "
            "DistributedDataParallel, which keeps the shapes of its Parameters. Use "
            '`DynamicSparsity` with `redistribution="none"` and a prune of each layer, or wrap the '
            "model again after each change."
        )


@torch.no_grad()
def move(target: Target, entries: KeptEntries, optimizer: Any = None) -> None:
    """Keep `entries` of a compact weight from now on.

    Values, gradient and states stay at entries that were kept before, and are 0 at the others. The
    Parameter stays the same object, and has the same memory if the number of entries stays. Time
    and memory are proportional to the number of entries. Call `check_movable` before.
    """
    (mask,), (parameter,) = target.masks(), target.originals()
    assert isinstance(mask, Kept)
    assert isinstance(parameter, nn.Parameter)
    old, new = mask.places.positions(), entries.positions
    if old.equal(new):
        return
    moved = carrying(old, new)
    if optimizer is not None:
        optim.cut(optimizer, parameter, moved)
    if len(old) == len(new):  # DistributedDataParallel holds this memory
        parameter.copy_(moved(parameter))
        if parameter.grad is not None:
            parameter.grad.copy_(moved(parameter.grad))
    else:
        grad = None if parameter.grad is None else moved(parameter.grad)
        give(parameter, moved(parameter), grad)
    mask.places.move_to(new)
