"""The record of a controller: its first masks, and one `Update` for each change."""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from parasparse.masks.kept_entries import KeptEntries, number_in_both, number_kept
from parasparse.sharding.dtensors import laid_out_like
from parasparse.targets.reach import masked_targets
from parasparse.text import listed

Masks = Mapping[str, Tensor | KeptEntries]  # of compact weights, the kept entries


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
    kept = {n: number_kept(m) for n, m in after.items()}
    every = sum(kept.values())
    unchanged = sum(number_in_both(m, before[n]) for n, m in after.items())
    changed = every + sum(map(number_kept, before.values())) - 2 * unchanged
    stayed = sum(number_in_both(m, start[n]) for n, m in after.items())
    return Update(
        step=step,
        sparsity={n: 1 - kept[n] / m.numel() if m.numel() else 0.0 for n, m in after.items()},
        total=1 - every / numel if numel else 0.0,
        churn=changed / numel if numel else 0.0,
        overlap=stayed / every if every else 1.0,
        missing=missing,
    )


def masks_of(model: nn.Module, names: Collection[str]) -> dict[str, Tensor | KeptEntries]:
    """Return the masks of the tensors `names`, not copied; raise RuntimeError if one is gone."""
    found = {
        t.name: t.kept() if t.is_compact else t.mask()
        for t in masked_targets(model)
        if t.name in names
    }
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


def copied(masks: Masks) -> dict[str, Tensor | KeptEntries]:
    """Return copies of `masks`. Kept entries are never changed."""
    return {n: m if isinstance(m, KeptEntries) else torch.clone(m) for n, m in masks.items()}


def masks_lost(names: Iterable[str]) -> RuntimeError:
    """Return the error for masks of a controller that the user has removed."""
    return RuntimeError(
        f"the masks of a controller must stay on its model; those of {listed(names)} were removed, "
        "unset or replaced. Create a new controller."
    )


def saved(history: Iterable[Update], start: Masks) -> dict[str, Any]:
    """Return the entries of a controller's state for its updates and its first masks."""
    # A tuple: torch.distributed.checkpoint splits lists and loads only as many items as are there.
    first = {
        name: mask.saved() if isinstance(mask, KeptEntries) else torch.clone(mask)
        for name, mask in start.items()
    }
    return {"history": tuple(asdict(update) for update in history), "start": first}


def loaded(
    state_dict: Mapping[str, Any], start: Masks
) -> tuple[list[Update], dict[str, Tensor | KeptEntries]]:
    """Return the updates and the first masks in a controller's state, checked against `start`."""
    first = laid_out_as(start, state_dict["start"])
    return [Update(**update) for update in state_dict["history"]], first


def laid_out_as(
    own: Masks, masks: Mapping[str, Tensor | Mapping[str, Any]]
) -> dict[str, Tensor | KeptEntries]:
    """Return copies of the loaded `masks`, placed, sharded and stored like `own`.

    Raises ValueError if names or shapes differ.
    """
    theirs = [f"{name} {saved_shape(mask)}" for name, mask in masks.items()]
    ours = [f"{name} {tuple(mask.shape)}" for name, mask in own.items()]
    if theirs != ours:
        raise ValueError(
            "`state_dict` must be from a controller with the same rules; it has the tensors "
            f"{listed(theirs)}, this controller {listed(ours)}."
        )
    return {name: _laid_out_as(own[name], mask) for name, mask in masks.items()}


def saved_shape(mask: Tensor | Mapping[str, Any]) -> tuple[int, ...]:
    """Return the shape of a mask in a controller's state."""
    return tuple(mask.shape if isinstance(mask, Tensor) else mask["shape"])


def saved_number(mask: Tensor | Mapping[str, Any]) -> int:
    """Return how many entries a mask in a controller's state keeps."""
    return number_kept(mask) if isinstance(mask, Tensor) else len(mask["positions"])


def _laid_out_as(
    own: Tensor | KeptEntries, mask: Tensor | Mapping[str, Any]
) -> Tensor | KeptEntries:
    if isinstance(own, KeptEntries):
        return KeptEntries.loaded(mask, own.positions.device)
    if not isinstance(mask, Tensor):  # it was saved by a run with compact weights
        entries = KeptEntries.loaded(mask, own.device)
        flat = torch.zeros(entries.numel(), dtype=torch.bool, device=own.device)
        mask = flat.index_fill_(0, entries.positions, True).view(entries.shape)
    return laid_out_like(mask, own).to(own.device).clone()
