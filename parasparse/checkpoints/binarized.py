"""`binarize_masks`: weights of a state dict times their masks, and the masks as bool."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from parasparse import names
from parasparse.masks.apply import apply_mask
from parasparse.masks.convert import as_mask
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
            as None is left out. Where something else parametrizes the weight under its mask, what
            is stored stays, and the mask is 0 or 1.

    Raises:
        ValueError: a key of `masks` belongs to no weight of `state_dict`, or to one that another
            key names; a mask that is not 0 or 1 lies over another parametrization.
        RuntimeError: a mask's shape does not match.

    Examples:
        >>> weights = {"weight": torch.tensor([-1.0, 2.0])}
        >>> state, masks = binarize_masks(weights, {"weight": [0.0, 0.5]})
        >>> state["weight"].tolist(), masks["weight"].tolist()
        ([0.0, 1.0], [False, True])

    Reference: cplxmodule, `nn.masked.binarize_masks`. Differs: negative entries count as kept.
    """
    weights = {key: _weights_of(key, state_dict) for key, m in masks.items() if m is not None}
    unknown = [key for key, found in weights.items() if not found]
    if unknown:
        raise ValueError(
            f"`masks` must belong to weights of `state_dict`; {listed(unknown)} do not"
            f"{nearest(unknown[0], state_dict)}."
        )
    result = dict(state_dict)
    folded: set[str] = set()
    for key, found in weights.items():
        if folded & set(found):
            raise ValueError(f'`masks` must name each weight once; "{key}" names one again.')
        for name in found:
            twins = _twins(name, state_dict)  # the other names of a tied tensor
            result |= dict.fromkeys(twins, _product(name, masks[key], state_dict))
            folded.update(twins)
    dense = {names.dense_name(name) for name in folded}
    dense |= {joint for name in dense for joint, _ in names.joints(name)}
    for key, held in state_dict.items():
        if held is not None and names.is_mask_key(key) and dense & set(names.masked_names(key)):
            result[key] = held != 0
    return result, {key: torch.as_tensor(masks[key]) != 0 for key in weights}


def _weights_of(key: str, state: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the tensors of `state` that mask `key` of a dict of masks is for."""
    for name in names.masked_names(key):
        found = names.stored_keys(name, state) or _computed_from(name, state)
        if found:
            return found
    return ()


def _computed_from(name: str, state: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the keys that `name` is computed from where something parametrizes it."""
    start = f"{names.inside(name)}original"
    return tuple(key for key in state if key.startswith(start) and key[len(start) :].isdecimal())


def _product(name: str, mask: Any, state: Mapping[str, Any]) -> Tensor:
    """Return tensor `name` of `state`, times its mask where nothing else lies between them."""
    weight: Tensor = state[name]
    inside = names.inside(names.dense_name(name))
    others = {key.removeprefix(inside) for key in state if key.startswith(inside)}
    if not others - {"original", "0.mask"}:
        full = as_mask(mask, weight.shape, weight.dtype).to(weight.device)
        return apply_mask(weight.detach(), laid_out_like(full, weight))
    values = torch.as_tensor(mask)
    if not bool(((values == 0) | (values == 1)).all()):
        raise ValueError(
            f'the mask of "{names.dense_name(name)}" must be 0 or 1, because another '
            "parametrization lies under it, which no scale can be folded through. Load the state "
            "into its model, and `squash` that."
        )
    return weight


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
