"""The wording of common errors, and the only place that rounds a count."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from numbers import Real


def num_kept(numel: int, sparsity: float) -> int:
    """Return how many of `numel` entries stay at `sparsity`: n - round(n * s), half to even.

    Args:
        numel: number of entries (or of units), >= 0.
        sparsity: share of zeros, in [0, 1].

    Examples:
        >>> [num_kept(10, s) for s in (0.0, 0.25, 0.9, 1.0)]
        [10, 8, 1, 0]
    """
    return numel - round(numel * sparsity)


def check_sparsity(value: object, argument: str = "sparsity") -> float:
    """Return `value` as a float in [0, 1].

    Raises:
        TypeError: it is no real number.
        ValueError: it is outside [0, 1], or NaN.
    """
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(
            f"`{argument}` must be a number in [0, 1], the share of zeros; "
            f"got {value!r} of type {type(value).__name__}."
        )
    if not 0.0 <= float(value) <= 1.0:  # false for NaN as well
        raise ValueError(f"`{argument}` must be in [0, 1], the share of zeros; got {value!r}.")
    return float(value)


def listed(names: Iterable[object], *, most: int = 8) -> str:
    """Return `names` quoted and joined by commas; past `most`, how many more there are."""
    quoted = [f'"{name}"' for name in names]
    rest = len(quoted) - most
    return ", ".join(quoted[:most]) + (f" and {rest} more" if rest > 0 else "")


def nearest(name: str, names: Iterable[str]) -> str:
    """Return ' (nearest: ...)' with the names most like `name`, or '' if none is like it."""
    found = difflib.get_close_matches(name, list(names), n=3, cutoff=0.5)
    return f" (nearest: {listed(found)})" if found else ""
