"""How a size follows from attributes of modules and from the dimensions of tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeAlias

from torch import Tensor

from parasparse.shrink.labels import compact, varying
from parasparse.shrink.regular import shape_of_kept


@dataclass(frozen=True)
class Attribute:
    """An int attribute: the path of the object that has it, its name, and its place in a tuple."""

    path: str
    name: str
    index: int | None = None

    def __str__(self) -> str:
        place = "" if self.index is None else f"[{self.index}]"
        return f"{self.path}.{self.name}{place}" if self.path else f"{self.name}{place}"


@dataclass(frozen=True, eq=False)
class Span:
    """The size of a tensor along a dimension, or of its first entries there.

    Attributes:
        label: of the tensor, compact.
        dim: the dimension.
        start: first index.
        stop: index after the last one; None: the end.
    """

    label: Tensor
    dim: int
    start: int = 0
    stop: int | None = None

    def size(self, kept: Tensor) -> int | None:
        """Return the new size, given which ids are kept; None if what is kept is not regular."""
        shape = shape_of_kept(self._part(kept[self.label]))
        return None if shape is None else shape[self.dim]

    def _part(self, tensor: Tensor) -> Tensor:
        stop = tensor.shape[self.dim] if self.stop is None else self.stop
        return tensor.narrow(self.dim, self.start, stop - self.start)

    def ids(self) -> Tensor:
        """Return the ids of these entries."""
        return self._part(self.label)


@dataclass(frozen=True)
class Computed:
    """The result of an operator on sizes."""

    operator: Callable[..., int]
    operands: tuple[Expression, ...]


Expression: TypeAlias = int | Attribute | Span | Computed


@dataclass(frozen=True)
class Requirement:
    """A size that the program states, and the dimension that must have it.

    Attributes:
        given: how the program computes the size.
        span: the dimension.
        where: the operation, for messages.
    """

    given: Expression
    span: Span
    where: str


def evaluate(expr: Expression, values: Mapping[Attribute, int], kept: Tensor) -> int | None:
    """Return the value of an expression for new attributes and kept ids; None: there is none."""
    if isinstance(expr, int):
        return expr
    if isinstance(expr, Attribute):
        return values[expr]
    if isinstance(expr, Span):
        return expr.size(kept)
    operands = [evaluate(each, values, kept) for each in expr.operands]
    if any(each is None for each in operands):
        return None
    try:
        return expr.operator(*operands)
    except (ZeroDivisionError, ValueError):  # ValueError: a shift by a negative number
        return None


def spans_in(expr: Expression) -> list[Span]:
    """Return the dimensions that an expression depends on."""
    if isinstance(expr, Span):
        return [expr]
    if isinstance(expr, Computed):
        return [span for each in expr.operands for span in spans_in(each)]
    return []


def holding(expr: Expression, values: Mapping[Attribute, Expression]) -> Expression:
    """Return an expression with `values` in place of attributes."""
    if isinstance(expr, Attribute):
        return values.get(expr, expr)
    if isinstance(expr, Computed):
        return Computed(expr.operator, tuple(holding(each, values) for each in expr.operands))
    return expr


def attributes_in(expr: Expression) -> list[Attribute]:
    """Return the attributes that an expression depends on."""
    if isinstance(expr, Attribute):
        return [expr]
    if isinstance(expr, Computed):
        return [attribute for each in expr.operands for attribute in attributes_in(each)]
    return []


def span(label: Tensor, dim: int, start: int = 0, stop: int | None = None) -> Span:
    """Return the dimension `dim` of a tensor with this label, or a part of it."""
    return Span(compact(label), dim % label.ndim, start, stop)


def spans_of(
    given: list[Expression], labels: Mapping[str, list[Tensor]],
    sized_by: Callable[[Attribute], tuple[str, int] | None],
) -> dict[Attribute, Expression]:  # fmt: skip
    """Return the sizes of parameters that attributes such as `out_features` follow."""
    found: dict[Attribute, Expression] = {}
    for attribute in {a for size in given for a in attributes_in(size)}:
        name, dim = sized_by(attribute) or ("", 0)
        for label in labels.get(name, ()):
            if varying(label) == (dim,):
                found[attribute] = span(label, dim)
    return found
