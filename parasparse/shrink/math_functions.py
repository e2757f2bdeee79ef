"""Functions of `math` that ask a size for its value without calling a method of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from parasparse.shrink.sizes import Size

_NAMES = ("comb", "factorial", "gcd", "isqrt", "lcm", "ldexp", "log", "log10", "log2", "perm")


def _of_numbers(function: Callable[..., Any]) -> Callable[..., Any]:
    def of_numbers(*args: Any) -> Any:
        return function(*(int(each) if isinstance(each, Size) else each for each in args))

    return of_numbers


@contextmanager
def math_of_sizes() -> Iterator[None]:
    """Have functions of `math` note from which sizes they compute a number."""
    plain = {name: getattr(math, name) for name in _NAMES}
    try:
        for name, function in plain.items():
            setattr(math, name, _of_numbers(function))
        yield
    finally:
        for name, function in plain.items():
            setattr(math, name, function)
