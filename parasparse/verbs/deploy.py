"""`deploy_masks`: set existing masks of a model by name."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from parasparse import names
from parasparse.attach.accelerated import check_not_accelerated
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
    """Set existing masks of `model` by name; return the model.

    Args:
        model: a model with masks; changed in place.
        masks: masks by name, as from `named_masks`. The mask of `layer.weight` may also be called
            `layer`, `layer.mask`, `layer.weight_mask`, `layer.weight.mask` or
            `layer.parametrizations.weight.0.mask`, and masks may be nested as NNI writes them,
            `{layer: {"weight": mask}}`. Prefixes of wrappers do not matter, as in
            `load_state_dict`. Values as in `Mask.mask_`; None unsets.
        state_dict: the same as `masks`.
        prefix: use only keys that start with it and a dot, which are removed.
        reset: unset all other masks.
        strict: raise `ValueError` for keys that name no mask.

    Raises:
        ValueError: a key is unknown, two keys give a mask different values, or a mask contains NaN.
        TypeError: neither `masks` nor `state_dict` is given, or a mask is complex.
        RuntimeError: a mask's shape does not match. After an error, the model is unchanged.

    Examples:
        >>> model = deploy_masks(sparsify(nn.Linear(2, 1), 0.5), {"weight": [[True, False]]})
        >>> mask_of(model, "weight").tolist()
        [[True, False]]

    Reference: cplxmodule, `nn.masked.deploy_masks`. Differs: unknown keys raise `ValueError`.
    """
    given = masks if masks is not None else state_dict
    if given is None:
        raise TypeError("`masks` must be given, a mapping from name to mask; got None.")
    check_not_accelerated(model)
    reshard(model)
    targets = masked_targets(model)
    given = names.flat(given)
    if prefix:
        start = f"{prefix}."
        given = {k.removeprefix(start): v for k, v in given.items() if k.startswith(start)}
        if strict and not given:
            raise ValueError(f'`masks` must have keys that start with "{start}"; it has none.')
    chosen = _chosen(given, targets, strict=strict)
    for target in targets if reset else ():
        chosen.setdefault(_plain_mask(target), None)
    for mask, value in chosen.items():
        mask.mask_(value)
    return model


def _chosen(
    given: Mapping[str, Any], targets: list[Target], *, strict: bool
) -> dict[Mask, Tensor | None]:
    """Return the new value of each mask that `given` names."""
    keys = _keys(targets)
    own = {key: names.dense_name(key) if names.is_own_mask(key) else key for key in given}
    spelled = names.spelled_like(set(own.values()), [target.name for target in targets])
    named = {key: keys.get(own[key]) or keys.get(spelled[own[key]]) for key in given}
    unknown = [key for key, target in named.items() if target is None]
    if unknown and strict:
        raise ValueError(
            f"`masks` must name masks of the model; {listed(unknown)} name none of its "
            f"{len(targets)}{nearest(unknown[0], keys)}. Attach masks to dense tensors with "
            "`sparsify(model, masks)`, or ignore such keys with `strict=False`."
        )
    chosen: dict[Mask, Tensor | None] = {}
    for key, target in named.items():
        if target is None:
            continue
        mask, value = _plain_mask(target), _copied(given[key], target)
        if mask in chosen and not _are_equal(chosen[mask], value):
            raise ValueError(f'"{key}" gives a mask a second value. Name each mask once.')
        chosen[mask] = value
    return chosen


def _keys(targets: list[Target]) -> dict[str, Target]:
    """Return the targets by all names that their masks may have in a dict of masks."""
    keys = {name: target for target in targets for name in target.names}
    for target in targets:
        for name in target.names:
            layer, _, own = name.rpartition(".")
            for key in (*names.mask_keys(name), *([layer] if own == "weight" else [])):
                keys.setdefault(key, target)
    return keys


def _copied(value: Any, target: Target) -> Tensor | None:
    """Return a copy of `value` as a mask for `target`; it may be a mask that changes first."""
    if value is None:
        return None
    tensor = target.stored()
    return as_mask(value, tensor.shape, tensor.dtype).clone()


def _are_equal(one: Tensor | None, two: Tensor | None) -> bool:
    if one is None or two is None or one.is_meta or two.is_meta:
        return one is two
    return torch.equal(one, two)


def _plain_mask(target: Target) -> Mask:
    mask = target.masks()[0]
    if not isinstance(mask, Mask):
        raise ValueError(
            f'the mask of "{target.name}" is a {type(mask).__name__}, which cannot be set. Call '
            f"`{'expand' if target.is_compact else 'binarize'}` first."
        )
    return mask
