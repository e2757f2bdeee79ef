"""Where tensors lie in memory, and whether it has been written to."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any

from torch import Tensor, nn


class Changes:
    """Which parameters and buffers of a model a run changes.

    Attributes:
        written: the memory into which something may have written since.
    """

    def __init__(self, model: nn.Module) -> None:
        self.written: set[int] = set()
        self._before = _stamps(model)

    def names(self, model: nn.Module) -> frozenset[str]:
        """Return the names of those that have changed."""
        now = _stamps(model)
        return frozenset(
            name for name, stamp in self._before.items()
            if now.get(name) != stamp or stamp[1] in self.written
        )  # fmt: skip


def written(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Iterator[Tensor]:
    """Yield the arguments of an operation into whose memory it writes."""
    for place, name in _written_arguments(func):
        value = args[place] if place < len(args) else kwargs.get(name)
        each = value if isinstance(value, (list, tuple)) else [value]
        yield from (tensor for tensor in each if isinstance(tensor, Tensor))


@lru_cache(maxsize=1024)
def _written_arguments(func: Any) -> tuple[tuple[int, str], ...]:
    """Return the places and names of the arguments of an operation that it may write into."""
    schema = func._schema
    if not schema.is_mutable or schema.name == "aten::set_":  # which takes other memory
        return ()
    return tuple((n, each.name) for n, each in enumerate(schema.arguments) if each.is_write)


def has_layout_of(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors lie at the same places of their memory."""
    return (a.shape, a.stride(), a.storage_offset(), a.dtype) == (
        b.shape, b.stride(), b.storage_offset(), b.dtype
    )  # fmt: skip


def _stamps(model: nn.Module) -> dict[str, tuple[int, int, int]]:
    """Return, by name, what differs once a parameter or buffer is replaced or written to."""
    return {
        name: (
            id(tensor), tensor.untyped_storage()._cdata,
            0 if tensor.is_inference() else tensor._version,
        )
        for name, tensor in [*model.named_buffers(), *model.named_parameters()]
    }  # fmt: skip
