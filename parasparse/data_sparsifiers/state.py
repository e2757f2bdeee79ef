"""Parsing the state dict of a data sparsifier."""

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from parasparse import names


@dataclass(frozen=True, eq=False)
class Entry:
    """The state of one data."""

    state: dict[str, Any]  # with the dense mask
    group: dict[str, Any]  # the configuration
    tensor: Tensor  # without the mask
    is_masked: bool
    own: dict[str, Tensor]  # other state of the module that masks


def entries(state_dict: Mapping[str, Any]) -> dict[str, Entry]:
    """Return the state of each data by name; raise RuntimeError if `state_dict` is inconsistent."""
    missing = [key for key in ("state", "data_groups", "_container") if key not in state_dict]
    if missing:
        raise _inconsistent(missing[0])
    state, groups = state_dict["state"], state_dict["data_groups"]
    tensors = dict(state_dict["_container"])
    found = {}
    for name, held in state.items():
        inside = names.inside(name)
        original = tensors.pop(f"{inside}original", None)
        plain = tensors.pop(name, None)
        own = {k.removeprefix(f"{inside}0."): t for k, t in tensors.items() if k.startswith(inside)}
        tensors = {k: t for k, t in tensors.items() if not k.startswith(inside)}
        tensor = plain if original is None else original
        if name not in groups or tensor is None or "mask" not in held or "." in name:
            raise _inconsistent(name)
        own.pop("mask", None)
        remembered = {k: copy.deepcopy(v) for k, v in held.items() if k != "mask"}
        remembered["mask"] = held["mask"].to_dense().clone()
        if remembered["mask"].shape != tensor.shape:
            raise _inconsistent(name)
        group = copy.deepcopy(dict(groups[name]))
        found[name] = Entry(remembered, group, tensor, original is not None, own)
    rest = [name for name in (*groups, *tensors) if name not in found]
    if rest:
        raise _inconsistent(rest[0])
    return found


def _inconsistent(name: str) -> RuntimeError:
    return RuntimeError(
        f"Error loading {name}: `state_dict` must have its mask, its configuration and its tensor "
        "(in the mask's shape), under a name without dots."
    )
