"""Masks of models that several processes train."""

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

__all__ = ["check", "shard_masks"]

_MOST = 8  # names in a message
_SHARDS_BOOL = "2.12"


def digest(mask: Tensor | None) -> str:
    """Return the digest of the part of `mask` on this process."""
    if mask is None:
        return "unset"
    data = to_local(mask).cpu().contiguous()
    found = hashlib.blake2b(str((data.dtype, tuple(mask.shape))).encode(), digest_size=16)
    if data.numel():
        found.update(buffer(data.flatten().view(torch.uint8)))
    return found.hexdigest()


def check(model: nn.Module, group: Any = None) -> None:
    """Raise RuntimeError if the masks of `model` differ between processes.

    The processes compare a digest of 16 bytes for each mask, and for each part of a sharded mask
    that several processes have. All processes of `group` must call this.

    Args:
        model: with or without masks.
        group: a process group of torch.distributed; None means all processes.

    Raises:
        RuntimeError: masks differ. All processes raise the same message, which names the masks and
            the processes.

    Examples:
        >>> check(sparsify(nn.Linear(4, 4), 0.5))  # a single process has nothing to compare
    """
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return
    own = {key: digest(mask) for key, mask in _masks(model)}
    every: list[Any] = [None] * torch.distributed.get_world_size(group)
    torch.distributed.all_gather_object(every, own, group=group)
    differing = []
    for name in sorted({name for digests in every for name, _ in digests}):
        parts: dict[tuple[int, ...], dict[str, list[int]]] = {}  # the ranks by part and digest
        for rank, digests in enumerate(every):
            own_parts = {part: told for (of, part), told in digests.items() if of == name}
            for part, told in own_parts.items() or [((), "none")]:
                parts.setdefault(part, {}).setdefault(told, []).append(rank)
        for ranks in parts.values():
            if len(ranks) > 1 or "none" in ranks:
                where = " and ".join(str(some) for some in ranks.values())
                differing.append(f'"{name}" (processes {where})')
    if differing:
        rest = len(differing) - _MOST
        raise RuntimeError(
            f"masks must be the same on all {len(every)} processes; these differ: "
            f"{', '.join(differing[:_MOST])}{f' and {rest} more' if rest > 0 else ''}. Update the "
            "masks on every process, with the same reduced gradients and the same seed. Use "
            "`deploy_masks` to set the same masks everywhere."
        )


def shard_masks(model: nn.Module) -> nn.Module:
    """Make a later `fully_shard` shard the masks with their weights; return the model.

    By default every process holds each whole mask, at 1 byte per entry. Afterwards it holds its
    part, and gathers the mask with the weight when a layer runs. The masks become Parameters
    without gradient, with the same names in `state_dict`. `model.parameters()` includes them, so
    `requires_grad_(True)` on all parameters fails, and averaged models (EMA) average them: restore
    these with `deploy_masks(average, masks)`.

    Args:
        model: not sharded yet, and all masks are set; changed in place.

    Raises:
        RuntimeError: `model` is sharded already, a mask is not set, or torch is older than 2.12.
            The model is unchanged.

    Examples:
        >>> model = sparsify(nn.Linear(4, 4, bias=False), 0.5)
        >>> if torch.__version__ >= "2.12":
        ...     model = shard_masks(model)
        >>> list(model.state_dict())
        ['parametrizations.weight.original', 'parametrizations.weight.0.mask']
    """
    if torch.__version__ < _SHARDS_BOOL:
        raise RuntimeError(
            f"`shard_masks` needs torch {_SHARDS_BOOL} or newer, whose `fully_shard` accepts "
            f"non-float Parameters; this is {torch.__version__}. Without it, masks stay whole."
        )
    if is_sharded(model):
        raise RuntimeError(
            "`shard_masks` must be called before `fully_shard`, which collects Parameters once."
        )
    targets = masked_targets(model)
    unset = [target.name for target in targets if target.mask() is None]
    if unset:
        raise RuntimeError(
            f"masks must be set before they are sharded; {listed(unset)} are not. A mask of "
            "`torch.tensor(1.)` keeps everything."
        )
    for target in targets:
        for mask in target.masks():
            if isinstance(mask, Mask):
                mask.as_parameter_()
    return model


def _masks(model: nn.Module) -> Iterator[tuple[tuple[str, tuple[int, ...]], Tensor | None]]:
    """Yield name and mask, and which part this process has: () if it has all."""
    for target in masked_targets(model):
        module = target.masks()[0]
        mask: Any = module.mask if isinstance(module, Mask) else target.mask()
        coordinate: tuple[int, ...] = ()
        if mask is not None and is_dtensor(mask):
            place = mask.device_mesh.get_coordinate()
            coordinate = (-1, *(place[dim] for dim in sharding_dims(mask)))
        yield (target.name, coordinate), mask
