"""A dict whose keys are tensors."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from typing import Generic, TypeVar

from torch import Tensor

Value = TypeVar("Value")


class ByTensor(Generic[Value]):
    """Values by tensor, for as long as the tensors live.

    A lookup takes a tenth of the time of one in `torch.utils.weak.WeakTensorKeyDictionary`. The
    value of a tensor that is gone stays until another tensor gets its place in memory.
    """

    def __init__(self) -> None:
        self._held: dict[int, tuple[weakref.ref[Tensor], Value]] = {}

    def get(self, tensor: Tensor) -> Value | None:
        """Return the value of `tensor`, or None."""
        held = self._held.get(id(tensor))
        return held[1] if held is not None and held[0]() is tensor else None

    def __contains__(self, tensor: Tensor) -> bool:
        held = self._held.get(id(tensor))
        return held is not None and held[0]() is tensor

    def __getitem__(self, tensor: Tensor) -> Value:
        assert tensor in self
        return self._held[id(tensor)][1]

    def __setitem__(self, tensor: Tensor, value: Value) -> None:
        self._held[id(tensor)] = (weakref.ref(tensor), value)

    def __delitem__(self, tensor: Tensor) -> None:
        del self._held[id(tensor)]

    def items(self) -> Iterator[tuple[Tensor, Value]]:
        """Yield the tensors that live, and their values."""
        for reference, value in list(self._held.values()):
            tensor = reference()
            if tensor is not None:
                tensor._fix_weakref()  # type: ignore[attr-defined] # of a weak reference
                yield tensor, value
