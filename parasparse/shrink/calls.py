"""Operations of torch that a model has run."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._ops import HigherOrderOperator
from torch.utils._pytree import tree_leaves


@dataclass
class Call:
    """An operation that has run: its name, arguments and results.

    Attributes:
        function: the operation.
        is_stand_in: whether its result has other values: see `values_where`.
    """

    name: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    out: Any
    function: Any
    is_stand_in: bool = False

    @property
    def pointwise(self) -> bool:
        """Whether it works entry by entry."""
        return torch.Tag.pointwise in self.function.tags

    def __post_init__(self) -> None:
        self._outs = tensors_among([self.out])
        self._tensors = tensors_among([*self.args, *self.kwargs.values()])

    def outs(self) -> list[Tensor]:
        """Return the tensors among the results."""
        return self._outs

    def tensors(self) -> list[Tensor]:
        """Return the tensors among the arguments."""
        return self._tensors

    def takes_number(self) -> bool:
        """Whether values are computed with a Python number, which may come from the input."""
        if self.pointwise or self.name.removesuffix("_") in _FILLS:
            numbers = tree_leaves((self.args, self.kwargs))
        else:
            numbers = [self.kwargs.get(name) for name in ("alpha", "beta")]
        return any(isinstance(n, (int, float)) and not isinstance(n, bool) for n in numbers)

    def arg(self, index: int, name: str, default: Any = None) -> Any:
        """Return an argument given by position or by name."""
        return self.args[index] if len(self.args) > index else self.kwargs.get(name, default)


# Operations that write a number into a tensor.
_FILLS = ("full", "full_like", "new_full", "fill", "masked_fill", "scalar_tensor")


def tensors_among(values: Iterable[Any]) -> list[Tensor]:
    """Return the tensors among arguments or results, also those in lists and tuples."""
    found: list[Tensor] = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, (list, tuple)):
            found += tensors_among(value)
    return found


def check_can_be_followed(function: Any, tensors: Iterable[Tensor], module: str) -> None:
    """Raise RuntimeError if a call in `module` has parts that no dispatch mode sees."""
    where = f'"{module}"' if module else "the model"
    if isinstance(function, HigherOrderOperator):
        raise RuntimeError(
            f"a model must not use higher-order operators; {where} calls "
            f"torch.ops.higher_order.{function.name()}, whose inner functions cannot be followed. "
            "Use an `if`, a loop or plain operations instead while you plan and shrink."
        )
    if any(tensor.is_nested for tensor in tensors):
        raise RuntimeError(
            f"a model must not use nested tensors; {where} computes with one. Use padded "
            "tensors with a mask instead while you plan and shrink."
        )
