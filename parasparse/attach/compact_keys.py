"""Loads compact weights of checkpoints into masked models, and other weights into compact models.

compact    parametrizations.weight.original (values), .0.starts, .0.columns
masked     parametrizations.weight.original (dense), .0.mask
"""

from typing import Any

import torch
from torch import Tensor

from parasparse.masks.convert import as_mask
from parasparse.masks.places import Places, check_places

_PLACES = ("0.starts", "0.columns")


def to_masked(state_dict: dict[str, Any], inside: str, shape: torch.Size) -> None:
    """Replace the values and places of a weight of `shape`, if they are there, by those of a mask.

    `inside` is the prefix of its keys.

    Raises:
        ValueError: they do not fit `shape`. They are removed.
    """
    keys = [f"{inside}{own}" for own in ("original", *_PLACES)]
    if not all(isinstance(state_dict.get(key), Tensor) for key in keys):
        return
    values, starts, columns = (state_dict.pop(key) for key in keys)
    check_places(values, starts, columns, shape)
    places = Places(starts, columns, shape)
    with torch.no_grad():
        state_dict |= {keys[0]: places(values), f"{inside}0.mask": places.mask()}


def to_compact(state_dict: dict[str, Any], inside: str, dense: str, now: Places) -> None:
    """Replace a dense weight, if it is there, by the values and places of a compact one.

    It has the key `dense` or is the `original` of a masked weight. Without a mask in `state_dict`
    the places are those of `now`.

    Raises:
        ValueError: the shape of the weight or the mask does not fit, or the mask is not bool. They
            are removed.
    """
    original, mask_key = f"{inside}original", f"{inside}0.mask"
    found = [key for key in (original, dense, f"{dense}_orig") if key in state_dict]
    if not found or (found == [original] and state_dict[original].ndim < 2):
        return
    weight, *_ = [state_dict.pop(key) for key in found]
    has_mask, mask = mask_key in state_dict, state_dict.pop(mask_key, None)
    if weight.shape != now.shape:
        raise ValueError(
            f"size mismatch for {dense}: the checkpoint has the shape {tuple(weight.shape)}, the "
            f"compact weight {tuple(now.shape)}."
        )
    places = _places_of(mask, weight, dense) if has_mask else now
    state_dict |= {
        original: places.right_inverse(weight),
        f"{inside}0.starts": places.starts, f"{inside}0.columns": places.columns,
    }  # fmt: skip


def _places_of(mask: Any, weight: Tensor, name: str) -> Places:
    as_bool = None if mask is None else as_mask(mask, weight.shape, weight.dtype)
    if as_bool is None or as_bool.dtype != torch.bool:
        raise ValueError(
            f'the mask of "{name}" must be set and bool to load it into a compact weight. Call '
            "parasparse.expand(model) first."
        )
    return Places.of(as_bool.to(weight.device))
