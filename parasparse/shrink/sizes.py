"""Sizes that a program states in Python, and the attributes that they come from.

While a model is traced, the int attributes of its modules and configs are replaced by `Size`, an
int that remembers how it was computed. Where one reaches an operation such as `view`, the size
that the smaller tensor will have is known, and the attribute is solved for.
"""

from __future__ import annotations

import operator
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

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


# The sizes from which a number has been computed, while a model is traced.
numbers: ContextVar[list[Expression]] = ContextVar("numbers", default=[])  # noqa: B039
# What is told of each comparison of sizes, with its result, while a model is traced.
_Told: TypeAlias = Callable[[Computed, bool], None]
_told: ContextVar[_Told | None] = ContextVar("told", default=None)


@contextmanager
def telling(told: _Told | None) -> Iterator[None]:
    """Tell `told` of each comparison of sizes; None: nobody."""
    token = _told.set(told)
    try:
        yield
    finally:
        _told.reset(token)


# The run whose sizes are followed. A program may keep them, as in `functools.lru_cache`: for
# another run, they are plain numbers.
_run: ContextVar[object] = ContextVar("run", default=None)


@contextmanager
def own_sizes() -> Iterator[None]:
    """Follow the sizes that are made here, and no others."""
    token = _run.set(object())
    try:
        yield
    finally:
        _run.reset(token)


class Size(int):
    """An int that remembers how it was computed."""

    expression: Expression
    run: object

    def __new__(cls, value: Any, expression: Expression | None = None) -> Any:
        """Make the size `value`, computed by `expression`; without one, an int: `type(size)(4)`."""
        if expression is None:
            return int(value)
        size = super().__new__(cls, value)
        size.expression, size.run = expression, _run.get()
        return size

    # What is no size any more but a number, such as a scale, must not change.
    def __int__(self) -> int:
        return self._number()

    def __float__(self) -> float:
        return float(self._number())

    def __truediv__(self, other: Any) -> Any:
        return self._number() / other

    def __rtruediv__(self, other: Any) -> Any:
        return other / self._number()

    def __pow__(self, other: Any, modulo: Any = None) -> Any:
        return pow(self._number(), other, modulo)

    def __rpow__(self, other: Any, modulo: Any = None) -> Any:
        return pow(other, self._number(), modulo)

    def _number(self) -> int:
        numbers.get().append(expression(self))
        return plain(self)

    def __divmod__(self, other: Any) -> Any:
        return self // other, self % other

    def __rdivmod__(self, other: Any) -> Any:
        return other // self, other % self

    def __bool__(self) -> bool:
        return self != 0

    def __round__(self, ndigits: Any = None) -> int:
        return self if ndigits is None else round(self._number(), ndigits)

    def __pos__(self) -> Size:
        return self

    __trunc__ = __floor__ = __ceil__ = conjugate = __pos__
    real = numerator = property(__pos__)

    def as_integer_ratio(self) -> Any:
        """Return the size and 1, as numbers."""
        return self._number(), 1

    def __reduce__(self) -> tuple[Any, ...]:
        return int, (plain(self),)

    def __deepcopy__(self, memo: Any) -> Size:
        return self


def plain(value: int) -> int:
    """Return `value` as an int that remembers nothing."""
    return int.__int__(value)


def expression(value: int) -> Expression:
    """Return how `value` was computed."""
    is_of_run = isinstance(value, Size) and value.run is _run.get()
    return value.expression if is_of_run else plain(value)  # type: ignore[attr-defined]


def _unary(function: Callable[[int], int]) -> Callable[[Size], Size]:
    return lambda self: Size(function(plain(self)), Computed(function, (expression(self),)))


def _arithmetic(function: Callable[..., Any], *, swapped: bool) -> Callable[[Size, Any], Any]:
    def method(self: Size, other: Any) -> Any:
        if isinstance(other, float):
            return function(other, self._number()) if swapped else function(self._number(), other)
        if not isinstance(other, int):  # a list to repeat, a fraction, a tensor
            self._number()
            return NotImplemented
        a, b = (other, self) if swapped else (self, other)
        return Size(
            function(plain(a), plain(b)), Computed(function, (expression(a), expression(b)))
        )

    return method


def _comparison(function: Callable[..., bool], usual: Callable[..., Any]) -> Callable[..., Any]:
    def method(self: Size, other: Any) -> Any:
        outcome = usual(self, other)
        told = _told.get()
        if told is None or not isinstance(other, (int, float)):
            return outcome
        if isinstance(other, int):
            told(Computed(function, (expression(self), expression(other))), outcome)
        else:
            outcome = function(plain(self), other)
            told(Computed(lambda size: function(size, other), (expression(self),)), outcome)
        return outcome

    return method


for _name, _one in (
    ("__neg__", operator.neg), ("__abs__", operator.abs), ("__invert__", operator.invert),
    ("bit_length", int.bit_length), ("bit_count", int.bit_count),
):  # fmt: skip
    setattr(Size, _name, _unary(_one))
for _name in ("add", "sub", "mul", "floordiv", "mod", "and_", "or_", "xor", "lshift", "rshift"):
    _function, _name = getattr(operator, _name), _name.strip("_")
    setattr(Size, f"__{_name}__", _arithmetic(_function, swapped=False))
    setattr(Size, f"__r{_name}__", _arithmetic(_function, swapped=True))
for _name in ("eq", "ne", "lt", "le", "gt", "ge"):
    _usual = getattr(int, f"__{_name}__")
    setattr(Size, f"__{_name}__", _comparison(getattr(operator, _name), _usual))


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


def tag_attributes(model: nn.Module) -> dict[Attribute, int]:
    """Replace the int attributes of modules and their configs by `Size`; return what they were."""
    found: dict[Attribute, int] = {}
    seen: set[int] = set()
    for path, holder in holders(model):
        if id(holder) not in seen:
            seen.add(id(holder))
            for name, value in vars(holder).items():  # which stay the same names
                if type(value) in (int, tuple, list):
                    vars(holder)[name] = _tagged(value, path, name, found)
    return found


# Types of most attributes, which are looked at quickly.
_PLAIN = frozenset((int, float, bool, str, tuple, list, dict, set, OrderedDict, type(None)))


def holders(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Yield the modules and their configs, each with its path."""
    for path, module in model.named_modules():
        yield path, module
        for name, value in list(vars(module).items()):
            if type(value) not in _PLAIN and _is_config(value):
                yield f"{path}.{name}" if path else name, value


def _is_config(value: object) -> bool:
    """Whether `value` is a plain object with attributes, such as the config of transformers."""
    return (
        hasattr(value, "__dict__")
        and not isinstance(value, (nn.Module, Tensor, type, torch.Generator))
        and not callable(value)
        and not type(value).__module__.startswith(("torch", "builtins"))
    )


def _tagged(value: Any, path: str, name: str, found: dict[Attribute, int]) -> Any:
    if name.startswith("_") and name != "_num_heads":
        return value
    if type(value) is int and value > 1:
        attribute = Attribute(path, name)
        found[attribute] = value
        return Size(value, attribute)
    if type(value) in (tuple, list) and value and all(type(v) is int for v in value):
        for index, each in enumerate(value):
            found[Attribute(path, name, index)] = each
        return type(value)(Size(v, Attribute(path, name, i)) for i, v in enumerate(value))
    return value


def holder_of(model: nn.Module, attribute: Attribute) -> Any:
    """Return the object that has `attribute`."""
    return operator.attrgetter(attribute.path)(model) if attribute.path else model


def get_attribute(model: nn.Module, attribute: Attribute) -> Any:
    """Return an attribute of a module or config, or an entry of a tuple there."""
    value = vars(holder_of(model, attribute))[attribute.name]
    return value if attribute.index is None else value[attribute.index]


def set_attribute(model: nn.Module, attribute: Attribute, value: float | None) -> None:
    """Set an attribute of a module or config, or an entry of a tuple there."""
    holder = holder_of(model, attribute)
    if attribute.index is None:
        vars(holder)[attribute.name] = value
        return
    values = list(vars(holder)[attribute.name])
    values[attribute.index] = value
    vars(holder)[attribute.name] = type(vars(holder)[attribute.name])(values)


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
