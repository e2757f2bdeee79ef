"""What a controller did, update by update."""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from parasparse.sharding.dtensors import count_nonzero, laid_out_like
from parasparse.targets.tensors import Target
from parasparse.text import listed

Masks = Mapping[str, Tensor]


@dataclass(frozen=True)
class Update:
    """One change of masks.

    Attributes:
        step: how many times `step()` had been called.
        sparsity: share of zeros of each tensor, by name.
        total: share of zeros of all of them together.
        churn: share of all entries whose mask changed.
        overlap: share of what is kept now that was kept at the start.
        missing: connections that growth fell short of; the next update makes up for them.
    """

    step: int
    sparsity: dict[str, float]
    total: float
    churn: float
    overlap: float
    missing: int = 0


def update_of(step: int, before: Masks, after: Masks, start: Masks, missing: int = 0) -> Update:
    """Return what changed from `before` to `after`; `start` are the first masks.

    Examples:
        >>> old, new = torch.tensor([True, True, False]), torch.tensor([True, False, True])
        >>> update_of(5, {"w": old}, {"w": new}, {"w": old}).overlap
        0.5
    """
    numel = sum(mask.numel() for mask in after.values())
    kept = {name: count_nonzero(mask) for name, mask in after.items()}
    changed = sum(count_nonzero(mask ^ before[name]) for name, mask in after.items())
    stayed = sum(
        count_nonzero(mask & laid_out_like(start[name], mask)) for name, mask in after.items()
    )
    every = sum(kept.values())
    return Update(
        step=step,
        sparsity={n: 1 - kept[n] / m.numel() if m.numel() else 0.0 for n, m in after.items()},
        total=1 - every / numel if numel else 0.0,
        churn=changed / numel if numel else 0.0,
        overlap=stayed / every if every else 1.0,
        missing=missing,
    )


def saved(history: Iterable[Update]) -> tuple[dict[str, Any], ...]:
    """Return `history` as a controller's `state_dict` holds it.

    A tuple, since torch.distributed.checkpoint takes lists apart and fills in only what is there.
    """
    return tuple(asdict(update) for update in history)


def masks_of(targets: Iterable[Target]) -> dict[str, Tensor]:
    """Return the masks of `targets` that are set, the live ones, by name."""
    masks = {target.name: target.mask() for target in targets}
    return {name: mask for name, mask in masks.items() if mask is not None}


def copied(masks: Masks) -> dict[str, Tensor]:
    """Return copies of `masks`."""
    return {name: torch.clone(mask) for name, mask in masks.items()}


def first_masks_of(state_dict: Mapping[str, Any], own: Masks) -> dict[str, Tensor]:
    """Return the first masks in the state of a controller, where `own` are.

    Raises:
        ValueError: it was of other tensors.
    """
    start: Masks = state_dict["start"]
    theirs, ours = (
        [f"{name} {tuple(mask.shape)}" for name, mask in masks.items()] for masks in (start, own)
    )
    if theirs != ours:
        raise ValueError(
            f"`state_dict` must be of the same rules; it has the tensors {listed(theirs)}, this "
            f"controller {listed(ours)}."
        )
    return {
        name: laid_out_like(mask, own[name]).to(own[name].device).clone()
        for name, mask in start.items()
    }
