"""`binarize_masks`: real masks in a state dict as bool ones."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from parasparse.masks.apply import apply_mask
from parasparse.masks.convert import as_mask
from parasparse.names import PAIR_ENDINGS
from parasparse.sharding.dtensors import laid_out_like
from parasparse.text import listed, nearest


def binarize_masks(
    state_dict: Mapping[str, Any], masks: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return new dicts: the weights times their masks, without -0.0; the masks as bool, `!= 0`.

    Args:
        state_dict: dense (`layer.weight`), complex in parts (`layer.weight.real` and `.imag`), or
            of a masked model (`layer.parametrizations.weight.original`); masks in it are made bool
            as well.
        masks: by the names that `deploy_masks` takes; each broadcasts to its weight. A mask given
            as None is left out.

    Raises:
        ValueError: a key of `masks` belongs to no weight of `state_dict`.
        RuntimeError: a mask's shape does not match.

    Examples:
        >>> weights = {"weight": torch.tensor([-1.0, 2.0])}
        >>> state, masks = binarize_masks(weights, {"weight": [0.0, 0.5]})
        >>> state["weight"].tolist(), masks["weight"].tolist()
        ([0.0, 1.0], [False, True])

    Reference: cplxmodule, `nn.masked.binarize_masks`. Differs: negative entries count as kept.
    """
    result = dict(state_dict)
    bools: dict[str, Tensor] = {}
    unknown = [
        key for key, mask in masks.items() if mask is not None and not _weights_of(key, result)
    ]
    if unknown:
        raise ValueError(
            f"`masks` must belong to weights of `state_dict`; {listed(unknown)} do not"
            f"{nearest(unknown[0], result)}."
        )
    folded: set[str] = set()
    for key, mask in masks.items():
        if mask is None:
            continue
        names = _weights_of(key, result)
        if folded & set(names):
            raise ValueError(f'`masks` must name each weight once; "{key}" names one again.')
        for name in names:
            weight = state_dict[name]
            full = as_mask(mask, weight.shape, weight.dtype).to(weight.device)
            product = apply_mask(weight.detach(), laid_out_like(full, weight))
            for twin in _twins(name, state_dict):  # the other names of a tied tensor
                result[twin] = product
                folded.add(twin)
        bools[key] = torch.as_tensor(mask) != 0
        for held in [h for name in {*_weight_names(key), *folded} for h in _mask_names(name)]:
            if result.get(held) is not None:
                result[held] = result[held] != 0
    return result, bools


def _weights_of(key: str, state: Mapping[str, Any]) -> list[str]:
    """Return the tensors of `state` that mask `key` of a dict of masks is for."""
    for name in _weight_names(key):
        layer, dot, attr = name.rpartition(".")
        inside = f"{layer}{dot}parametrizations.{attr}"
        pairs = [
            (f"{start}{real}{end}", f"{start}{imag}{end}")
            for start, end in ((name, ""), (inside, ".original"))
            for real, imag in PAIR_ENDINGS
        ]
        pairs += [(f"{name}.real", f"{name}.imag")]
        below = f"{name}.parametrizations"
        pairs += [(f"{below}.real.original", f"{below}.imag.original")]
        for group in [(name,), (f"{inside}.original",), (f"{name}_orig",), *pairs]:
            if all(member in state for member in group):
                return list(group)
    return []


def _twins(name: str, state: Mapping[str, Any]) -> list[str]:
    """Return the names in `state` of the very tensor that is called `name`."""
    weight = state[name]
    same = [
        key
        for key, other in state.items()
        if isinstance(other, Tensor)
        and (other.data_ptr(), other.shape, other.stride())
        == (weight.data_ptr(), weight.shape, weight.stride())
    ]
    return same if weight.numel() and not weight.is_meta else [name]


def _weight_names(key: str) -> list[str]:
    """Return the weights that `key` may name: layer.weight for layer, layer.mask and so on."""
    names = [key]
    for ending in ("_mask", ".mask"):
        names += [key.removesuffix(ending)] if key.endswith(ending) else []
    layers = [*names, ""] if key == "mask" else names
    return [*names, *(f"{layer}.weight".removeprefix(".") for layer in layers)]


def _mask_names(key: str) -> list[str]:
    """Return what a state dict may call the mask that `key` names."""
    names = []
    for name in _weight_names(key):
        layer, dot, attr = name.rpartition(".")
        names += [f"{name}_mask", f"{layer}{dot}parametrizations.{attr}.0.mask"]
        names += [name.removesuffix(".original") + ".0.mask"] if attr == "original" else []
        names += [f"{layer}{dot}mask"] if attr == "weight" else []
    return names
