"""The types of rules."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, Protocol, TypeAlias

from torch import Tensor

# From the tensors that a rule reaches, by name, to a mask or a module that masks for each.
Treatment: TypeAlias = Callable[[dict[str, Tensor]], Mapping[str, Any]]


class Array(Protocol):
    """An array of NumPy or of a library that works with it."""

    def __array__(self) -> Any: ...


# The right side of a rule: a sparsity, present zeros, a mask, a treatment, or nothing.
Right: TypeAlias = float | Literal["zeros"] | Tensor | Array | Sequence[Any] | Treatment | None

# `Any` for the left sides (`Spec`): the keys of a dict are invariant, so that one of names and
# types, {"head": 0.5, nn.Linear: 0.9}, would be refused.
Rules: TypeAlias = Mapping[Any, Any] | Sequence[tuple[Any, Any]] | Right
"""`{target: treatment}`, a list of such pairs, or a single treatment for every weight.

The first rule that reaches a tensor applies. See `sparsify`.
"""
