"""Finds the first call in which two networks give torch other numbers, or call something else."""

from __future__ import annotations

import inspect
import traceback
from collections.abc import Callable, Collection
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

# Functions whose ints are numbers, not sizes.
_ARITHMETIC = frozenset(
    f"{side}{name}" for side in ("", "r")
    for name in ("add", "sub", "mul", "div", "truediv", "floordiv", "pow", "mod")
)  # fmt: skip


@dataclass(frozen=True)
class _Called:
    """A call of a function of torch: its name, the numbers that it got, and who called it."""

    name: str
    numbers: tuple[float, ...]
    place: str


class _Calls(TorchFunctionMode):
    """Records the calls of functions of torch."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[_Called] = []

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        name = getattr(func, "__name__", "").strip("_")
        kinds = (float, int) if name in _ARITHMETIC else float
        numbers = (n for n in tree_leaves((args, kwargs)) if isinstance(n, kinds))
        self.made.append(_Called(name, tuple(numbers), _place()))
        return func(*args, **kwargs or {})


def first_other_call(
    masked: Callable[[], object], small: Callable[[], object], known: Collection[float] = ()
) -> str:
    """Return a sentence about the first call in which `small` differs from `masked`, or "".

    Args:
        masked: runs a network.
        small: runs the other one.
        known: numbers that `small` may have in the place of others.
    """
    for one, other in zip(_calls(masked), _calls(small), strict=False):
        if one.name != other.name:
            return f" There, {other.place} calls `{other.name}` instead of `{one.name}`."
        pairs = zip(one.numbers, other.numbers, strict=False)
        for old, new in ((a, b) for a, b in pairs if a != b and b not in known):
            return f" There, {other.place} gives `{one.name}` {new:.6g} instead of {old:.6g}."
    return ""


def _calls(run: Callable[[], object]) -> list[_Called]:
    calls = _Calls()
    with suppress(Exception), calls:  # which the caller has seen
        run()
    return calls.made


def _place() -> str:
    """Return the line of the program that is calling a function of torch."""
    for frame, line in traceback.walk_stack(inspect.currentframe()):
        if frame.f_globals.get("__name__", "").split(".")[0] not in ("torch", "parasparse"):
            return f"{frame.f_code.co_filename}:{line}"
    return "the program"
