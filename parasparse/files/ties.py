"""When two tensors are one tensor: a tie."""

from collections.abc import Mapping
from typing import Any, TypeVar

from torch import Tensor

from parasparse.sharding.dtensors import to_local

_Key = TypeVar("_Key")


def identity(tensor: Tensor) -> tuple[Any, ...]:
    """Return a key that is the same for two dense tensors if they are one tensor.

    A view with another dtype, shape or stride is a different tensor. Tensors without memory
    (empty ones, or on the meta device) are tied only if they are the same object.
    """
    held = to_local(tensor)
    place = (held.data_ptr() or id(tensor), tensor.device, tensor.dtype)
    return *place, tensor.shape, held.stride(), tensor.is_conj(), tensor.is_neg()


def first_names(tensors: Mapping[_Key, Any]) -> dict[_Key, _Key]:
    """Return, for each tensor that an earlier name already has, that earlier name."""
    names: dict[tuple[Any, ...], _Key] = {}
    first = {}
    for name, value in tensors.items():
        if isinstance(value, Tensor) and names.setdefault(identity(value), name) != name:
            first[name] = names[identity(value)]
    return first
