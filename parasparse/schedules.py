"""Schedules: numbers that change with the step, such as sparsities or temperatures.

A schedule is any callable `int -> float`. The ramps below are exactly `initial` up to step `start`
and `final` from step `stop` on. In between, each has a formula in the progress

    p = (step - start) / (stop - start)    in [0, 1]
"""

import math
import operator
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass
from typing import Any


@dataclass(frozen=True)
class Constant:
    """`value`, a finite number, at every step.

    Examples:
        >>> Constant(0.5)(1_000)
        0.5
    """

    value: float

    def __post_init__(self) -> None:
        _check_finite("value", self.value)

    def __call__(self, step: int) -> float:
        """Return the value at `step`."""
        return self.value


@dataclass(frozen=True)
class _Ramp(ABC):
    """A schedule from `initial` to `final`; a subclass gives its curve from 0 to 1."""

    initial: float
    final: float
    _: KW_ONLY
    start: int = 0
    stop: int

    def __post_init__(self) -> None:
        _check_finite("initial", self.initial)
        _check_finite("final", self.final)
        if not self.stop > self.start:
            raise ValueError(f"`stop` must be after `start`, {self.start!r}; got {self.stop!r}.")

    def __call__(self, step: int) -> float:
        """Return the value at `step`."""
        if step <= self.start:
            return self.initial
        if step >= self.stop:
            return self.final
        p = (step - self.start) / (self.stop - self.start)
        return self.initial + (self.final - self.initial) * self._curve(p)

    @abstractmethod
    def _curve(self, p: float) -> float:
        """Return the share of the way from `initial` to `final`: 0 at p = 0 and 1 at p = 1."""


@dataclass(frozen=True)
class Linear(_Ramp):
    """initial + (final - initial) p.

    Args:
        initial: value up to step `start`.
        final: value from step `stop` on.
        start: last step with the value `initial`.
        stop: first step with the value `final`, after `start`.

    Raises:
        ValueError: `stop` is not after `start`, or a number is not finite.

    Examples:
        >>> [Linear(0.0, 1.0, stop=4)(step) for step in (-1, 0, 1, 4, 9)]
        [0.0, 0.0, 0.25, 1.0, 1.0]
    """

    def _curve(self, p: float) -> float:
        return p


@dataclass(frozen=True)
class Cubic(_Ramp):
    """final + (initial - final) (1 - p)^3: fast at first, then slower. See `Linear`.

    Examples:
        >>> [Cubic(0.0, 1.0, stop=2)(step) for step in (0, 1, 2)]
        [0.0, 0.875, 1.0]

    Reference: Zhu & Gupta, "To prune, or not to prune", 2017, arXiv:1710.01878, equation 1.
        Differs: defined at every step; `Every` selects the steps of updates.
    """

    def _curve(self, p: float) -> float:
        return 1 - (1 - p) ** 3


@dataclass(frozen=True)
class Cosine(_Ramp):
    """final + (initial - final) (1 + cos(pi p)) / 2: slow at both ends. See `Linear`.

    Examples:
        >>> [round(Cosine(0.5, 0.0, stop=4)(step), 3) for step in (0, 1, 2, 4, 6)]
        [0.5, 0.427, 0.25, 0.0, 0.0]

    Reference: Dettmers & Zettlemoyer, "Sparse Networks from Scratch", 2019, arXiv:1907.04840,
        section 3. Differs: stays at `final`; a cosine learning rate rises again.
    """

    def _curve(self, p: float) -> float:
        return (1 - math.cos(math.pi * p)) / 2


@dataclass(frozen=True)
class Exponential(_Ramp):
    """initial (final / initial)^p: each step multiplies by the same factor.

    See `Linear`. Both values must be above 0, or it raises `ValueError`.

    Examples:
        >>> [Exponential(1.0, 100.0, stop=2)(step) for step in (0, 1, 2, 3)]
        [1.0, 10.0, 100.0, 100.0]
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (self.initial > 0 and self.final > 0):
            raise ValueError(
                f"`initial` and `final` must be above 0; got {self.initial!r} and {self.final!r}."
            )

    def _curve(self, p: float) -> float:
        share = self.final / self.initial
        return p if share == 1 else (share**p - 1) / (share - 1)


@dataclass(frozen=True)
class OneCycle(_Ramp):
    """initial + (final - initial) (f(p) - f(0)) / (f(1) - f(0)): slow, fast, slow.

    f(p) = 1 / (1 + exp(-14 p + 5)). See `Linear`.

    Examples:
        >>> [round(OneCycle(0.0, 1.0, stop=4)(step), 3) for step in (0, 1, 2, 4)]
        [0.0, 0.177, 0.88, 1.0]

    Reference: Hubens et al., "One-Cycle Pruning: Pruning ConvNets Under a Tight Training Budget",
        2021, arXiv:2107.02086, equation 2. Differs: exact at p = 0; the paper's is at 0.7% there.
    """

    def _curve(self, p: float) -> float:
        return (_logistic(p) - _logistic(0)) / (_logistic(1) - _logistic(0))


@dataclass(frozen=True)
class Every:
    """Select every `n`-th step from `start` to `stop`.

    Args:
        n: number of steps from one selected step to the next, at least 1.
        start: first selected step.
        stop: no step after it is selected; None: no end.

    Raises:
        ValueError: `n` is below 1, or `stop` is before `start`.

    Examples:
        >>> [step for step in range(20) if Every(5, start=2, stop=15)(step)]
        [2, 7, 12]
    """

    n: int
    _: KW_ONLY
    start: int = 0
    stop: int | None = None

    def __post_init__(self) -> None:
        if self.n < 1:
            raise ValueError(f"`n` must be at least 1; got {self.n!r}.")
        if self.stop is not None and self.stop < self.start:
            raise ValueError(
                f"`stop` must not be before `start`, {self.start!r}; got {self.stop!r}."
            )

    def __call__(self, step: int) -> bool:
        """Return whether `step` is selected."""
        before_end = self.stop is None or step <= self.stop
        return step >= self.start and before_end and (step - self.start) % self.n == 0


def as_every(every: Any) -> Callable[[int], bool]:
    """Return `every` if callable, `Every(every)` if an integer; else raise TypeError."""
    if callable(every):
        return every  # type: ignore[no-any-return]
    if isinstance(every, bool) or not hasattr(every, "__index__"):
        raise TypeError(
            f"`every` must be a whole number of steps, or a function of the step; got {every!r}."
        )
    return Every(operator.index(every))


def _logistic(p: float) -> float:
    return 1 / (1 + math.exp(-14 * p + 5))


def _check_finite(argument: str, value: float) -> None:
    if not math.isfinite(value):
        raise ValueError(f"`{argument}` must be a finite number; got {value!r}.")
