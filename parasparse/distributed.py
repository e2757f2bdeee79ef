"""Masks of a model that several processes train."""

import hashlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from parasparse.files.bits import buffer
from parasparse.masks.mask import Mask
from parasparse.sharding.dtensors import is_dtensor, sharding_dims, to_local
from parasparse.sharding.fsdp import is_sharded
from parasparse.targets.reach import masked_targets
from parasparse.text import listed


def digest(mask: Tensor | None) -> str:
    """Return the digest of the part of `mask` that this process holds."""
    if mask is None:
        return "unset"
    data = to_local(mask).cpu().contiguous()
    found = hashlib.blake2b(str((data.dtype, tuple(mask.shape))).encode(), digest_size=16)
    if data.numel():
        held = data.flatten().view(torch.uint8)
        found.update(buffer(held))
    return found.hexdigest()


__all__ = ["check", "shard_masks"]

_MOST = 8  # names in a message
_SHARDS_BOOL = "2.12"


def check(model: nn.Module, group: Any = None) -> None:
    """Raise if the masks of `model` are not the same in all processes.

    Each process reduces each of its masks to 16 bytes, and these are compared; of a sharded mask,
    parts that should be equal are. All processes of `group` must call this.

    Args:
        model: with masks or without.
        group: a process group of torch.distributed; None: all processes.

    Raises:
        RuntimeError: masks differ, in all processes alike; it names them and where they differ.

    Examples:
        >>> from parasparse import sparsify
        >>> check(sparsify(nn.Linear(4, 4), 0.5))  # alone: nothing to compare
    """
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return
    own = {key: digest(mask) for key, mask in _masks(model)}
    every: list[Any] = [None] * torch.distributed.get_world_size(group)
    torch.distributed.all_gather_object(every, own, group=group)
    differing = []
    for name in sorted({name for digests in every for name, _ in digests}):
        parts: dict[tuple[int, ...], dict[str, list[int]]] = {}  # who has which, part by part
        for rank, digests in enumerate(every):
            found = {part: told for (of, part), told in digests.items() if of == name}
            for part, told in found.items() or [((), "none")]:
                parts.setdefault(part, {}).setdefault(told, []).append(rank)
        for ranks in parts.values():
            if len(ranks) > 1 or "none" in ranks:
                where = " and ".join(str(some) for some in ranks.values())
                differing.append(f'"{name}" (processes {where})')
    if differing:
        rest = len(differing) - _MOST
        raise RuntimeError(
            f"masks must be the same in all {len(every)} processes; these differ: "
            f"{', '.join(differing[:_MOST])}{f' and {rest} more' if rest > 0 else ''}. Update "
            "masks in every process, from what all of them share: reduced gradients, the same "
            "seed. `deploy_masks` puts one set of masks everywhere."
        )


def shard_masks(model: nn.Module) -> nn.Module:
    """Let `fully_shard`, called afterwards, shard masks with their weights; return the model.

    Each process then holds its part of a mask, and gathers it with the weight when a layer runs:
    1 byte an entry, in memory over the number of processes, and sent at each gathering. Otherwise
    every process holds all of it. For this the masks become Parameters that require no gradient, of
    the same names in `state_dict`; `model.parameters()` yields them too, `requires_grad_(True)` on
    all of these fails, and averaged models (EMA) average them: `deploy_masks(average, masks)` puts
    the masks of the model back.

    Args:
        model: with masks that are set, not yet sharded; changed in place.

    Raises:
        RuntimeError: `model` is sharded already; a mask is not set; torch is older than 2.12. The
            model is as it was.

    Examples:
        >>> from parasparse import sparsify
        >>> model = sparsify(nn.Linear(4, 4, bias=False), 0.5)
        >>> if torch.__version__ >= "2.12":
        ...     model = shard_masks(model)
        >>> list(model.state_dict())
        ['parametrizations.weight.original', 'parametrizations.weight.0.mask']
    """
    if torch.__version__ < _SHARDS_BOOL:
        raise RuntimeError(
            f"`shard_masks` must have torch {_SHARDS_BOOL} or newer, whose `fully_shard` takes "
            f"Parameters that are no floats; this is {torch.__version__}. Masks stay whole here."
        )
    if is_sharded(model):
        raise RuntimeError(
            "`shard_masks` must be called before `fully_shard`, which takes Parameters over once."
        )
    targets = masked_targets(model)
    unset = [target.name for target in targets if target.mask() is None]
    if unset:
        raise RuntimeError(
            f"masks must be set to be sharded; {listed(unset)} are not. `torch.tensor(1.)` keeps "
            "everything."
        )
    for target in targets:
        for mask in target.masks():
            if isinstance(mask, Mask):
                mask.as_parameter_()
    return model


def _masks(model: nn.Module) -> Iterator[tuple[tuple[str, tuple[int, ...]], Tensor | None]]:
    """Yield name and mask, with which part of it this process holds; () if it is all."""
    for target in masked_targets(model):
        module = target.masks()[0]
        mask = module.mask if isinstance(module, Mask) else target.mask()
        coordinate: tuple[int, ...] = ()
        if mask is not None and is_dtensor(mask):
            spread: Any = mask
            place = spread.device_mesh.get_coordinate()
            coordinate = (-1, *(place[dim] for dim in sharding_dims(mask)))
        yield (target.name, coordinate), mask
