"""The content of torch files beside the tensors of a state dict, nested to any depth."""

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from parasparse.files.checkpoint import CheckpointError
from parasparse.files.ties import identity


def tensors_in(value: Any) -> list[Tensor]:
    """Return all tensors in `value`, repeated ones each time, in a fixed order."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, (list, tuple)):
        return [tensor for held in value for tensor in tensors_in(held)]
    return []


def renewed(value: Any, made: dict[tuple[Any, ...], Tensor]) -> Any:
    """Return a copy of `value` with new, unfilled tensors; tied tensors stay tied.

    `made` collects the new tensors by the `identity` of the old ones.
    """
    if isinstance(value, Tensor):
        check_dense(value, "a tensor beside the state dict")
        key = identity(value)
        if key not in made:
            made[key] = torch.empty(value.shape, dtype=value.dtype)
        return made[key]
    odd = isinstance(value, (torch.UntypedStorage, torch.TypedStorage))
    if odd or (isinstance(value, (dict, set, frozenset)) and any(map(torch.is_tensor, value))):
        raise CheckpointError(
            "tensors beside a state dict must be in dicts, lists or tuples; one is a storage, in a "
            "set or a key of a dict."
        )
    if isinstance(value, dict):
        new = copy.copy(value)
        for key, held in value.items():
            new[key] = renewed(held, made)
        return new
    if isinstance(value, (list, tuple)):
        items = [renewed(held, made) for held in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    return value


def check_dense(tensor: Tensor, name: str) -> None:
    """Raise CheckpointError if `tensor` cannot be read and written entry by entry."""
    wrong = (
        "sparse" if tensor.layout != torch.strided
        else "quantized" if tensor.is_quantized
        else "on the meta device" if tensor.is_meta
        else ""
    )  # fmt: skip
    if wrong:
        raise CheckpointError(f"tensors must be dense and have values; {name} is {wrong}.")
