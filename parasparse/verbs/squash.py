"""`squash` and `unsparsify`: remove masks, with or without folding them into the weights."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from parasparse.attach import attaching
from parasparse.attach.accelerated import check_not_accelerated
from parasparse.attach.inverses import gives_back
from parasparse.attach.offloading import check_not_offloaded
from parasparse.attach.undo import restored_on_error
from parasparse.masks.protocol import fold_
from parasparse.sharding.fsdp import follow, is_sharded, reshard
from parasparse.targets.reach import Specs, masked_targets
from parasparse.targets.tensors import Site, Target, masked_tensors_of
from parasparse.text import listed
from parasparse.verbs.compact import check_not_wrapped, expand_target
from parasparse.verbs.writable import check_writable


def squash(
    model: nn.Module, targets: Specs | None = None, *, keep_parametrizations: bool = False
) -> nn.Module:
    """Fold masks into plain weights and remove them; return the model.

    Afterwards the model has the classes, `state_dict` keys, parameter order and Parameter objects
    of the dense model. Exception: other parametrizations under a mask are replaced, with the mask,
    by one new Parameter.

    Args:
        model: any module; changed in place. Without masks, it does not change.
        targets: masked tensors, one target of a rule or a list of them; None: all.
        keep_parametrizations: keep the parametrizations under a mask that can compute the masked
            weight. `weight_norm` can: its zeros are exact, and other entries may differ in the last
            bits (relatively by at most 8 times `torch.finfo(dtype).eps`). `spectral_norm` and
            `orthogonal` cannot, so they are replaced.

    Raises:
        RuntimeError: a mask is not set, a weight is not writable, tied weights have different
            masks, `fully_shard` manages a tensor parametrized under its mask, or a model with
            compact weights is wrapped in DDP. The model is unchanged.
        ValueError: a target reaches no masked tensor.

    Examples:
        >>> model = squash(sparsify(nn.Linear(10, 10), 0.9))
        >>> type(model) is nn.Linear, int((model.weight != 0).sum())
        (True, 10)
    """
    chosen = _to_take_off(model, targets)
    if is_sharded(model) and any(len(s.stack()) > 1 for target in chosen for s in target.sites):
        raise RuntimeError(
            "a tensor that is parametrized under its mask must be squashed before `fully_shard`. "
            "`dense_state_dict` returns its values."
        )
    for target in chosen:
        for site in target.sites:
            check_not_offloaded(site.module, site.attr, target.name)
        target.effective()  # an unset mask raises here, before anything has changed
    _check_foldable(model, chosen)
    _expand(model, chosen)
    with restored_on_error(site.module for target in chosen for site in target.sites):
        for target in chosen:
            mask = target.masks()[0]
            with torch.no_grad():  # all before any write: each component may depend on both
                values = [[site.effective() for site in part] for part in target.components]
            for component, masked in zip(target.components, values, strict=True):
                _fold(component, masked, keep_parametrizations)
            # A tied use outside `model` may share it, and must not scale again
            # (test_squashing_a_part_scales_a_tie_that_lies_outside_once).
            fold_(mask)
    _moved(model)
    return model


def unsparsify(model: nn.Module, targets: Specs | None = None) -> nn.Module:
    """Remove masks without folding them, so the stored weights come back; return the model.

    Entries that a compact weight drops are not stored, and become 0. See `squash` for the
    arguments. Masks need not be set.

    Examples:
        >>> model = unsparsify(sparsify(nn.Linear(10, 10), 0.9))
        >>> int((model.weight != 0).sum())
        100
    """
    chosen = _to_take_off(model, targets)
    _expand(model, chosen)
    for target in chosen:
        for site in target.sites:
            attaching.detach(site.module, site.attr)
    _moved(model)
    return model


def _to_take_off(model: nn.Module, targets: Specs | None) -> list[Target]:
    check_not_accelerated(model)
    reshard(model)
    return masked_targets(model, targets)


def _expand(model: nn.Module, chosen: list[Target]) -> None:
    """Make compact weights dense, whose Parameters stay the same objects."""
    compact = [target for target in chosen if target.is_compact]
    if compact:
        check_not_wrapped(model)
    for target in compact:
        expand_target(target)


def _check_foldable(model: nn.Module, chosen: list[Target]) -> None:
    """Raise RuntimeError if the masked values of a target cannot be written to its tensors."""
    holders: dict[int, list[Target]] = {}  # by id of the stored tensor
    for target in masked_tensors_of(model):
        for original in target.originals():
            holders.setdefault(id(original), []).append(target)
    for target in chosen:
        for original in target.originals():
            names = {holder.name for holder in holders[id(original)]}
            if len(names) > 1:
                raise RuntimeError(
                    f"{listed(sorted(names))} are one Parameter but masked differently, so they "
                    "cannot be squashed. Call `sparsify` on the whole model to give them one mask, "
                    "or `unsparsify`."
                )
        check_writable(target, "squash")


def _fold(sites: tuple[Site, ...], values: list[Tensor], keep_parametrizations: bool) -> None:
    """Store the masked values of a tensor, used at `sites`, and remove its mask."""
    kept = keep_parametrizations and all(
        torch.equal(value, values[0]) and gives_back(site.stack(), value)
        for site, value in zip(sites, values, strict=True)
    )
    baked: Tensor | None = None
    for site, value in zip(sites, values, strict=True):
        stack = site.stack()
        if len(stack) == 1 or kept:
            with torch.no_grad():
                stack.store(value)
            attaching.detach(site.module, site.attr)
            continue
        if baked is None:
            tensors = site.originals()
            grad = any(tensor.requires_grad for tensor in tensors)
            held = isinstance(tensors[0], nn.Parameter)
            baked = nn.Parameter(value, requires_grad=grad) if held else value
        attaching.detach(site.module, site.attr, baked)


def _moved(model: nn.Module) -> None:
    """Tell `fully_shard` and DDP wrappers in `model` that Parameters and masks have moved."""
    follow(model)
    # Otherwise DDP broadcasts an empty list in the next forward (ddp_forward_after_squash).
    for module in model.modules():
        if isinstance(module, DistributedDataParallel):
            module._assign_modules_buffers()
