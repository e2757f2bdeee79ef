"""`deploy_masks`: replace masks of a model by name."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from parasparse import names
from parasparse.attach.stand_in import check_not_accelerated
from parasparse.masks.convert import as_mask
from parasparse.masks.mask import Mask
from parasparse.sharding.fsdp import reshard
from parasparse.targets.reach import masked_targets
from parasparse.targets.tensors import Target
from parasparse.text import listed, nearest


def deploy_masks(
    model: nn.Module,
    masks: Mapping[str, Any] | None = None,
    *,
    state_dict: Mapping[str, Any] | None = None,
    prefix: str = "",
    reset: bool = False,
    strict: bool = True,
) -> nn.Module:
    """Set the masks of `model` that are there already; return the model.

    Args:
        model: a model with masks; changed in place.
        masks: mask by name, as `named_masks` yields them; `layer`, `layer.mask`,
            `layer.weight_mask`, `layer.weight.mask` and `layer.parametrizations.weight.0.mask` name
            the mask of `layer.weight`. Any mask that `Mask.mask_` takes; None unsets.
        state_dict: another word for `masks`.
        prefix: take the keys that start with it and a dot, without them; others are not looked at.
        reset: unset all masks that are not given.
        strict: refuse keys that name no mask.

    Raises:
        ValueError: an unknown key; two keys that give one mask different values; a mask with NaN.
        RuntimeError: a mask's shape does not match. The model is as it was.

    Examples:
        >>> from parasparse import sparsify
        >>> model = deploy_masks(sparsify(nn.Linear(2, 1), 0.5), {"weight": [[True, False]]})
        >>> mask_of(model, "weight").tolist()
        [[True, False]]

    Reference: cplxmodule, `nn.masked.deploy_masks`. Differs: a key that names no mask is refused.
    """
    given = masks if masks is not None else state_dict
    if given is None:
        raise TypeError("`masks` must be given, a mask by name; got None.")
    check_not_accelerated(model)
    reshard(model)
    targets = masked_targets(model)
    if prefix:
        start = f"{prefix}."
        given = {k.removeprefix(start): v for k, v in given.items() if k.startswith(start)}
        if strict and not given:
            raise ValueError(f'`masks` must hold keys that start with "{start}"; there are none.')
    chosen = _chosen(given, targets, strict=strict)
    for target in targets if reset else ():
        chosen.setdefault(_plain_mask(target), None)
    for mask, value in chosen.items():
        mask.mask_(value)
    return model


def _chosen(
    given: Mapping[str, Any], targets: list[Target], *, strict: bool
) -> dict[Mask, Tensor | None]:
    """Return the value that `given` has for each mask that it names."""
    keys = _keys(targets)
    named = {key: keys.get(_plain_key(key)) for key in given}
    unknown = [key for key, target in named.items() if target is None]
    if unknown and strict:
        raise ValueError(
            f"`masks` must name masks of the model; {listed(unknown)} name none of "
            f"{len(targets)}{nearest(unknown[0], keys)}. To put masks on dense tensors use "
            "`sparsify(model, masks)`, to pass over such keys `strict=False`."
        )
    chosen: dict[Mask, Tensor | None] = {}
    for key, target in named.items():
        if target is None:
            continue
        mask, value = _plain_mask(target), _copied(given[key], target)
        if mask in chosen and not _are_equal(chosen[mask], value):
            raise ValueError(
                f'`masks` must name each mask once; "{key}" names one again, with other values.'
            )
        chosen[mask] = value
    return chosen


def _keys(targets: list[Target]) -> dict[str, Target]:
    """Return what a mask may be called in a dict of masks, for each of `targets`."""
    keys = {name: target for target in targets for name in target.names}
    for target in targets:
        for name in target.names:
            layer, _, own = name.rpartition(".")
            for key in (*names.mask_keys(name), *([layer] if own == "weight" else [])):
                keys.setdefault(key, target)
    return keys


def _plain_key(key: str) -> str:
    return names.dense_name(key) if names.is_own_mask(key) else key


def _copied(value: Any, target: Target) -> Tensor | None:
    """Return a mask for `target`; not the live one of another target, which may change first."""
    if value is None:
        return None
    tensor = target.stored()
    return as_mask(value, tensor.shape, tensor.dtype).clone()


def _are_equal(one: Tensor | None, two: Tensor | None) -> bool:
    return one is two or (one is not None and two is not None and torch.equal(one, two))


def _plain_mask(target: Target) -> Mask:
    mask = target.masks()[0]
    if not isinstance(mask, Mask):
        raise ValueError(
            f'`masks` must name plain masks; that of "{target.name}" is a {type(mask).__name__}. '
            "`binarize` the model first."
        )
    return mask
