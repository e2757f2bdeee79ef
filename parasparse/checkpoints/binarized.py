"""`binarize_masks`: multiply the weights of a state dict by their masks, and make masks bool."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from parasparse import names
from parasparse.files.ties import first_names
from parasparse.masks.apply import apply_mask
from parasparse.masks.convert import as_mask
from parasparse.sharding.dtensors import laid_out_like
from parasparse.text import listed, nearest


def binarize_masks(
    state_dict: Mapping[str, Any], masks: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return new dicts: the weights times their masks, without -0.0; the masks as bool, `!= 0`.

    Args:
        state_dict: dense (`layer.weight`), with components (`layer.weight.real` and `.imag`), or of
            a masked model (`layer.parametrizations.weight.original`), whose masks become bool.
        masks: masks by name, as in `deploy_masks`, also nested; each broadcasts to its weight. None
            is ignored. If another parametrization lies under a mask, the mask must be 0 or 1, and
            stored values do not change.

    Raises:
        ValueError: a key of `masks` names no weight of `state_dict`, or one that another key names;
            or a mask that is not 0 or 1 lies over another parametrization; or a weight is compact.
        RuntimeError: a mask's shape does not match.

    Examples:
        >>> weights = {"weight": torch.tensor([-1.0, 2.0])}
        >>> state, masks = binarize_masks(weights, {"weight": [0.0, 0.5]})
        >>> state["weight"].tolist(), masks["weight"].tolist()
        ([0.0, 1.0], [False, True])

    Reference: cplxmodule, `nn.masked.binarize_masks`. Differs: negative entries count as kept.
    """
    masks = names.flat(masks)
    spelled = names.spelled_like(masks, state_dict)
    weights = {
        key: _weights_of(key, state_dict) or _weights_of(spelled[key], state_dict)
        for key, mask in masks.items()
        if mask is not None
    }
    unknown = [key for key, found in weights.items() if not found]
    if unknown:
        raise ValueError(
            f"`masks` must name weights of `state_dict`; {listed(unknown)} do not"
            f"{nearest(unknown[0], state_dict)}."
        )
    result, ties = dict(state_dict), first_names(state_dict)
    folded: set[str] = set()
    for key, found in weights.items():
        if folded & set(found):
            raise ValueError(f'`masks` must name each weight once; "{key}" names one again.')
        for name in found:
            tied = {other for other in state_dict if ties.get(other, other) == ties.get(name, name)}
            result |= dict.fromkeys(tied, _product(name, masks[key], state_dict))
            folded |= tied
    dense = {names.dense_name(name) for name in folded}
    dense |= {joint for name in dense for joint, _ in names.joints(name)}
    for key, held in state_dict.items():
        if held is not None and dense & set(names.masked_beside(key)):
            result[key] = held != 0
    return result, {key: torch.as_tensor(masks[key]) != 0 for key in weights}


def _weights_of(key: str, state: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the tensors of `state` that the mask called `key` belongs to."""
    for name in names.masked_names(key):
        found = names.stored_keys(name, state) or _computed_from(name, state)
        if found:
            return found
    return ()


def _computed_from(name: str, state: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the keys from which another parametrization computes `name`."""
    start = f"{names.inside(name)}original"
    return tuple(key for key in state if key.startswith(start) and key[len(start) :].isdecimal())


def _product(name: str, mask: Any, state: Mapping[str, Any]) -> Tensor:
    """Return tensor `name` of `state`, times its mask unless another parametrization is between."""
    weight: Tensor = state[name]
    inside = names.inside(names.dense_name(name))
    others = {key.removeprefix(inside) for key in state if key.startswith(inside)}
    if not others - {"original", "0.mask"}:
        full = as_mask(mask, weight.shape, weight.dtype).to(weight.device)
        return apply_mask(weight.detach(), laid_out_like(full, weight))
    if {"0.starts", "0.columns"} <= others:
        raise ValueError(
            f'"{names.dense_name(name)}" is compact, so its shape is not known. Give '
            "`dense_state_dict(model)` instead of the state of the compact model."
        )
    values = torch.as_tensor(mask)
    if not bool(((values == 0) | (values == 1)).all()):
        raise ValueError(
            f'the mask of "{names.dense_name(name)}" must be 0 or 1, because another '
            "parametrization lies under it. Load the state into its model, and `squash` the model."
        )
    return weight
