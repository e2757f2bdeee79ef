"""Stand-ins for the results of large products, whose values a plan does not need.

A plan needs to know which entries of a tensor depend on the input, and the values of those that do
not. The others may have any values, as long as the program does not read them to decide what to do.
Where it might, `ValuesNeeded` is raised, and the model must be run again with all values.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

PRODUCTS = ("convolution", "mm", "addmm", "bmm", "baddbmm")
# Functions through which a program gets at the memory of a tensor.
READS = frozenset(
    ("tolist", "numpy", "__array__", "data_ptr", "__dlpack__", "storage", "untyped_storage",
     "_typed_storage")
)  # fmt: skip
_TAGS = (torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape)


class ValuesNeeded(BaseException):
    """The program may read a value that has not been computed, or write into a Parameter."""


class StandIns:
    """Makes random results of products.

    Args:
        model: into whose Parameters nothing may write.

    Attributes:
        made: whether a result has been replaced.
    """

    def __init__(self, model: nn.Module) -> None:
        self.made = False
        self._parameters = {p.untyped_storage()._cdata for p in model.parameters()}
        generator = torch.Generator().manual_seed(0)
        self._numbers = torch.randn(65_521, generator=generator)  # a prime: no two rows are equal

    def check(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Raise ValuesNeeded if `func` writes into a Parameter, or is no operation of torch."""
        if func.namespace != "aten":
            raise ValuesNeeded
        if func._schema.is_mutable:
            for place, argument in enumerate(func._schema.arguments):
                value = args[place] if place < len(args) else kwargs.get(argument.name)
                if argument.is_write and self._holds(value):
                    raise ValuesNeeded

    def _holds(self, value: Any) -> bool:
        tensors = value if isinstance(value, (list, tuple)) else [value]
        return any(
            isinstance(t, Tensor) and t.untyped_storage()._cdata in self._parameters
            for t in tensors
        )

    def instead(self, name: str, func: Any, args: tuple[Any, ...]) -> Tensor | None:
        """Return a stand-in for the result of an operation, or None if it must run."""
        if name not in PRODUCTS or func._schema.is_mutable:
            return None
        tensors = [t for t in args if isinstance(t, Tensor)]
        if any(t.is_meta or t.layout != torch.strided for t in tensors):
            return None
        if name == "convolution":
            like = func(*map(_without_values, args))
            out = torch.empty_strided(
                like.shape, like.stride(), dtype=like.dtype, device=tensors[0].device
            )
        else:
            x, w = tensors[-2:]
            out = x.new_empty((*x.shape[:-1], w.shape[-1]))
        self.made = True
        self._fill(out.as_strided((out.numel(),), (1,)))
        return out

    def _fill(self, flat: Tensor) -> None:
        size = len(self._numbers)
        whole = len(flat) // size
        flat[: whole * size].view(whole, size).copy_(self._numbers)
        flat[whole * size :].copy_(self._numbers[: len(flat) - whole * size])


def reads_values(name: str, func: Any, args: tuple[Any, ...]) -> bool:
    """Whether the result of an operation, or its shape, tells the program values."""
    if name == "index":
        return any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in args[1])
    return any(tag in func.tags for tag in _TAGS)


def _without_values(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")
