"""The state dict of a data sparsifier, taken apart and checked."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True, eq=False)
class Entry:
    """What a state says of one data.

    Attributes:
        state: what is remembered, the dense mask with it.
        group: its configuration.
        tensor: its values, unmasked where it is masked.
        is_masked: it was not squashed.
    """

    state: dict[str, Any]
    group: dict[str, Any]
    tensor: Tensor
    is_masked: bool


def entries(state_dict: Mapping[str, Any]) -> dict[str, Entry]:
    """Return what `state_dict`, which stays as it is, says of each data, by name.

    Raises:
        RuntimeError: "Error loading <name>": its three parts do not fit each other.
    """
    state, groups = state_dict["state"], state_dict["data_groups"]
    tensors = dict(state_dict["_container"])
    found = {}
    for name, held in state.items():
        original = tensors.pop(f"parametrizations.{name}.original", None)
        plain = tensors.pop(name, None)
        tensor = plain if original is None else original
        if name not in groups or tensor is None or "mask" not in held:
            raise _inconsistent(name)
        own = copy.deepcopy(dict(held))
        own["mask"] = own["mask"].to_dense()
        group = copy.deepcopy(dict(groups[name]))
        found[name] = Entry(own, group, tensor, original is not None)
    rest = [name for name in (*groups, *tensors) if name not in found]
    if rest:
        raise _inconsistent(rest[0])
    return found


def _inconsistent(name: str) -> RuntimeError:
    return RuntimeError(
        f"Error loading {name}: `state_dict` must hold its mask, its configuration and its tensor."
    )
