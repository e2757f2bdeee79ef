"""Find the masks of a model's tensors in a checkpoint of any library."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from parasparse import names
from parasparse.attach.compact_keys import to_masked
from parasparse.masks.mask import Mask
from parasparse.rules.treatments import Fixed
from parasparse.sharding.dtensors import is_dtensor
from parasparse.targets.reach import masked_targets
from parasparse.targets.tensors import Target, tensors_of
from parasparse.verbs.sparsify import sparsify


def attach_found(model: nn.Module, state: dict[str, Any]) -> list[str]:
    """Attach unset masks to tensors that have a mask only in `state`; return their names.

    The masks get their values at once, because a module may read its weight while it loads. In
    `state`, which is to be loaded next, masks of pairs get the keys that they have in `model`.
    """
    found = _found_masks(model, state)
    apart = _pairs_apart(found, state)
    bare = [target for target in found.values() if not target.masks()]
    joint = {t.name: Fixed(None) for t in bare if id(t) not in apart}
    single = {name: Fixed(None) for t in bare for name in apart.get(id(t), ())}
    if joint:
        sparsify(model, joint)
    if single:
        sparsify(model, single, pairs=False)
    for key, target in found.items():
        if target.is_pair and key in names.mask_keys(target.name):
            # This mask belongs to the layer, but a pair loads its mask by its components' keys.
            mask = state.pop(key)
            state |= {f"{names.inside(name)}0.mask": mask for name in _components(target)}
    if joint or single:
        _set_values(model, {k: v for k, v in state.items() if k in found or names.is_own_mask(k)})
    return [*joint, *single]


def mask_compact_entries(model: nn.Module, state: dict[str, Any]) -> None:
    """Replace compact weights in `state` by masked ones where those of `model` are dense.

    Raises:
        RuntimeError: the weights do not fit.
    """
    for target in tensors_of(model):
        for name in () if target.masks() else target.names:
            try:
                to_masked(state, names.inside(name), target.shape)
            except ValueError as error:
                raise RuntimeError(f'"{name}" cannot be loaded: {error}') from error


def _set_values(model: nn.Module, masks: Mapping[str, Any]) -> None:
    """Set the unset masks of `model` that `masks` has; what does not fit is left to the load."""
    by_name = {name: masks[key] for key in masks for name in names.masked_beside(key)}
    for target in masked_targets(model):
        mask = target.masks()[0]
        value = next((by_name[name] for name in target.names if name in by_name), None)
        if not isinstance(value, Tensor) or value.is_meta or is_dtensor(value):
            continue
        if isinstance(mask, Mask) and mask.mask is None and value.shape == target.shape:
            mask.mask_(value)


def _found_masks(model: nn.Module, state: Mapping[str, Any]) -> dict[str, Target]:
    """Return the tensors of `model` that have a mask in `state`, by the key of the mask."""
    own = {}
    for key in state:
        parts = names.parametrized(key)
        if parts is not None and names.is_own_mask(key):
            own[parts[0]] = key
    held = set(model.state_dict()) - set(own.values())
    found = {}
    for target in tensors_of(model):
        for name in target.names:
            for key in (own.get(name, ""), *names.mask_keys(name)):
                if key in state and key not in held:
                    found[key] = target
    return found


def _pairs_apart(found: dict[str, Target], state: Mapping[str, Any]) -> dict[int, list[str]]:
    """Return the names of the components of pairs whose two masks in `state` differ."""
    apart = {}
    for target in {id(target): target for target in found.values() if target.is_pair}.values():
        masks = {}
        for name in _components(target):
            for key, of in found.items():
                own = names.is_own_mask(key) and names.dense_name(key) == name
                if of is target and (own or key in names.mask_keys(name)):
                    masks[name] = state[key]
        values = list(masks.values())
        equal = all(m is not None and torch.equal(m, values[0]) for m in values)
        if masks and (len(masks) == 1 or not equal):
            apart[id(target)] = list(masks)
    return apart


def _components(target: Target) -> list[str]:
    """Return the first name of each component of a pair."""
    attrs = [site.attr for site in target.firsts]
    return [next(n for n in target.names[1:] if n.split(".")[-1] == attr) for attr in attrs]
