"""`Size`, an int that remembers how a program computed it.

While a model is traced, the int attributes of its modules and configs are replaced by such ints.
Where one reaches an operation such as `view`, the size that the smaller tensor will have is known,
and the attribute is solved for.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, TypeAlias

from parasparse.shrink.expressions import Computed, Expression

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
