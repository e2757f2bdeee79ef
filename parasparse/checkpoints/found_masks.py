"""Masks in a checkpoint, ours or of other libraries, for the tensors of a model."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from parasparse.rules.treatments import Fixed
from parasparse.targets.tensors import Target, tensors_of
from parasparse.verbs.sparsify import sparsify

_OWN_MASK = re.compile(r"(?:(?P<layer>.+)\.)?parametrizations\.(?P<attr>[^.]+)\.\d+\.mask")


def attach_found(model: nn.Module, state: dict[str, Any]) -> list[str]:
    """Attach masks, not yet set, where `state` has some and `model` none; return the names.

    Args:
        model: changed in place.
        state: to be loaded next; masks of pairs get the keys that the model has for them.
    """
    found = _found_masks(model, state)
    apart = _pairs_apart(found, state)
    names = [t.name for t in found.values() if not t.masks() and id(t) not in apart]
    names = list(dict.fromkeys(names))
    parts = [name for t in found.values() if not t.masks() for name in apart.get(id(t), ())]
    parts = list(dict.fromkeys(parts))
    if names:
        sparsify(model, {name: Fixed(None) for name in names})
    if parts:
        sparsify(model, {name: Fixed(None) for name in parts}, pairs=False)
    for key, target in found.items():
        if target.is_pair and not _OWN_MASK.fullmatch(key):
            # The mask of a pair hangs at its layer; a stack knows what lies beside it only.
            state[_own_mask_key(target)] = state.pop(key)
    return [*names, *parts]


def _found_masks(model: nn.Module, state: Mapping[str, Any]) -> dict[str, Target]:
    """Return the key of the mask in `state` of each tensor of `model` that has one there."""
    own = {}
    for key in state:
        match = _OWN_MASK.fullmatch(key)
        if match:
            own[".".join(filter(None, match.groups()))] = key
    held = set(model.state_dict()) - set(own.values())
    found = {}
    for target in tensors_of(model):
        for name in target.names:
            layer, _, attr = name.rpartition(".")
            foreign = [f"{name}_mask"]
            if attr == "weight":
                foreign.append(f"{layer}.mask" if layer else "mask")
            for key in (own.get(name, ""), *foreign):
                if key in state and key not in held:
                    found[key] = target
    return found


def _pairs_apart(found: dict[str, Target], state: Mapping[str, Any]) -> dict[int, list[str]]:
    """Return the parts of the pairs whose two masks in `state` differ."""
    keys: dict[int, list[str]] = {}
    for key, target in found.items():
        if target.is_pair and _OWN_MASK.fullmatch(key):
            keys.setdefault(id(target), []).append(key)
    apart = {}
    for pair, both in keys.items():
        masks = [state[key] for key in both]
        equal = all(m is not None and torch.equal(m, masks[0]) for m in masks)
        if len(both) == 1 or not equal:
            names = [match.groups() for match in map(_OWN_MASK.fullmatch, both) if match]
            apart[pair] = [".".join(filter(None, name)) for name in names]
    return apart


def _own_mask_key(target: Target) -> str:
    layer, _, attr = target.names[1].rpartition(".")  # the real part's first name
    return f"{layer}.parametrizations.{attr}.0.mask".removeprefix(".")
