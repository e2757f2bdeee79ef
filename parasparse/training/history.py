"""The record of a controller: its first masks, and one `Update` for each change."""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from parasparse.sharding.dtensors import count_nonzero, laid_out_like
from parasparse.targets.reach import masked_targets
from parasparse.text import listed

Masks = Mapping[str, Tensor]


@dataclass(frozen=True)
class Update:
    """One change of masks.

    Attributes:
        step: number of `step()` calls so far.
        sparsity: share of zeros of each tensor, by name.
        total: share of zeros of all tensors together.
        churn: share of all entries whose mask changed.
        overlap: share of the entries kept now that were also kept at the start.
        missing: number of connections that growth could not add; the next update adds them.
    """

    step: int
    sparsity: dict[str, float]
    total: float
    churn: float
    overlap: float
    missing: int = 0


def update_of(step: int, before: Masks, after: Masks, start: Masks, missing: int = 0) -> Update:
    """Return the `Update` from `before` to `after`, where `start` are the first masks."""
    numel = sum(mask.numel() for mask in after.values())
    kept = {n: count_nonzero(m) for n, m in after.items()}
    changed = sum(count_nonzero(m ^ before[n]) for n, m in after.items())
    stayed = sum(count_nonzero(m & laid_out_like(start[n], m)) for n, m in after.items())
    every = sum(kept.values())
    return Update(
        step=step,
        sparsity={n: 1 - kept[n] / m.numel() if m.numel() else 0.0 for n, m in after.items()},
        total=1 - every / numel if numel else 0.0,
        churn=changed / numel if numel else 0.0,
        overlap=stayed / every if every else 1.0,
        missing=missing,
    )


def masks_of(model: nn.Module, names: Collection[str]) -> dict[str, Tensor]:
    """Return the masks of the tensors `names`, not copied; raise RuntimeError if one is gone."""
    found = {t.name: t.mask() for t in masked_targets(model) if t.name in names}
    masks = {name: mask for name, mask in found.items() if mask is not None}
    if len(masks) < len(names):
        raise masks_lost([name for name in names if name not in masks])
    return masks


def check_shapes(masks: Masks, start: Masks) -> None:
    """Raise RuntimeError if `masks` do not have the shapes that they had at the `start`."""
    other = [
        f"{name} {tuple(mask.shape)}" for name, mask in masks.items()
        if mask.shape != start[name].shape
    ]  # fmt: skip
    if other:
        raise RuntimeError(
            "the masks of a controller must keep their shapes; others have "
            f"{listed(other)}. Create a new controller after `shrink` or `unshrink`."
        )


def copied(masks: Masks) -> dict[str, Tensor]:
    """Return copies of `masks`."""
    return {name: torch.clone(mask) for name, mask in masks.items()}


def masks_lost(names: Iterable[str]) -> RuntimeError:
    """Return the error for masks of a controller that the user has removed."""
    return RuntimeError(
        f"the masks of a controller must stay on its model; those of {listed(names)} were removed, "
        "unset or replaced. Create a new controller."
    )


def saved(history: Iterable[Update], start: Masks) -> dict[str, Any]:
    """Return the entries of a controller's state for its updates and its first masks."""
    # A tuple: torch.distributed.checkpoint splits lists and loads only as many items as are there.
    return {"history": tuple(asdict(update) for update in history), "start": copied(start)}


def loaded(state_dict: Mapping[str, Any], start: Masks) -> tuple[list[Update], dict[str, Tensor]]:
    """Return the updates and the first masks in a controller's state, checked against `start`."""
    first = laid_out_as(start, state_dict["start"])
    return [Update(**update) for update in state_dict["history"]], first


def laid_out_as(own: Masks, masks: Masks) -> dict[str, Tensor]:
    """Return copies of the loaded `masks`, placed and sharded like `own`.

    Raises ValueError if names or shapes differ.
    """
    theirs, ours = (
        [f"{name} {tuple(mask.shape)}" for name, mask in each.items()] for each in (masks, own)
    )
    if theirs != ours:
        raise ValueError(
            "`state_dict` must be from a controller with the same rules; it has the tensors "
            f"{listed(theirs)}, this controller {listed(ours)}."
        )
    return {
        name: laid_out_like(mask, own[name]).to(own[name].device).clone()
        for name, mask in masks.items()
    }
