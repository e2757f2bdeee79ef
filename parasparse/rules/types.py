"""The types of rules, as a user writes them."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, Protocol, TypeAlias

from torch import Tensor

from parasparse.targets.reach import Spec

# Gets the tensors that a rule reaches, by name; returns a mask, or a module that masks, for each.
Treatment: TypeAlias = Callable[[dict[str, Tensor]], Mapping[str, Any]]


class Array(Protocol):
    """An array of numpy, or of a library that works with it."""

    def __array__(self) -> Any:
        """Return it as an array of numpy."""


# The right side of a rule: a sparsity, the zeros that are there, a mask, a treatment, or nothing.
Right: TypeAlias = float | Literal["zeros"] | Tensor | Array | Sequence[Any] | Treatment | None

Rules: TypeAlias = (
    Mapping[str, Right]
    | Mapping[type, Right]
    | Mapping[Spec, Right]
    | Sequence[tuple[Spec, Right]]
    | Right
)
"""What a model's tensors get: `{target: right side}`, pairs of these, or a right side alone.

The first rule that reaches a tensor has it; a right side alone is for every weight. See `sparsify`.
"""
