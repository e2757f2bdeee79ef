"""Checked numbers, and the only function that rounds a count of kept entries."""

import operator
from collections.abc import Collection
from numbers import Real
from typing import Any

import torch


def num_kept(numel: int, sparsity: float) -> int:
    """Return how many of `numel` entries (or units) are kept: n - round(n * s), half to even.

    Examples:
        >>> [num_kept(10, s) for s in (0.0, 0.25, 0.9, 1.0)]
        [10, 8, 1, 0]
    """
    return numel - round(numel * sparsity)


def least_kept(numel: int, max_sparsity: float) -> int:
    """Return how many of `numel` entries (or units) are kept at least; below 1, one or more.

    Examples:
        >>> [least_kept(10, s) for s in (0.5, 0.98, 1.0)]
        [5, 1, 0]
    """
    least = num_kept(numel, max_sparsity)
    return max(least, 1) if numel and max_sparsity < 1 else least


def bounded(numel: int, sparsity: float, max_sparsity: float) -> float:
    """Return `sparsity`, or a lower one that keeps `least_kept(numel, max_sparsity)`."""
    least = least_kept(numel, max_sparsity)
    return sparsity if num_kept(numel, sparsity) >= least else 1 - least / numel


def check_floors(floors: Collection[int], total: int, sparsity: float) -> None:
    """Raise ValueError if `floors` keep more of `total` entries (or units) than `sparsity` does."""
    least, kept = sum(floors), num_kept(total, sparsity)
    if least > kept:
        raise ValueError(
            f"`max_sparsity` must not keep more than `sparsity` does; it keeps {least:,} of "
            f"{total:,}, and a sparsity of {sparsity} keeps {kept:,}. Raise `max_sparsity`, leave "
            "small tensors dense, or lower `sparsity`."
        )


def check_sparsity(value: object, argument: str = "sparsity") -> float:
    """Return `value` as a float in [0, 1], or raise TypeError or ValueError."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(
            f"`{argument}` must be a number in [0, 1], the share of zeros; got {value!r} of type "
            f"{type(value).__name__}."
        )
    if not 0.0 <= float(value) <= 1.0:  # false for NaN as well
        raise ValueError(f"`{argument}` must be in [0, 1], the share of zeros; got {value!r}.")
    return float(value)


def whole_number(value: Any, argument: str) -> int:
    """Return `value` as an int, or raise TypeError if it is not a whole number."""
    try:
        return operator.index(value)
    except TypeError as error:
        raise TypeError(f"`{argument}` must be a whole number; got {value!r}.") from error


def dimension(pattern: Any, dim: int, shape: torch.Size) -> int:
    """Return dimension `dim` of `pattern`, counted from the front."""
    if not -len(shape) <= dim < len(shape):
        raise ValueError(f"{pattern} needs dimension {dim}; got a tensor of shape {tuple(shape)}.")
    return dim % len(shape)
