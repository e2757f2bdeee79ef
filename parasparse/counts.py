"""How many stay: checked sparsities, and the only place that rounds a count."""

import operator
from numbers import Real
from typing import Any

import torch


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


def whole_number(value: Any, argument: str) -> int:
    """Return `value`, a whole number.

    Raises:
        TypeError: it is none.
    """
    try:
        return operator.index(value)
    except TypeError as error:
        raise TypeError(f"`{argument}` must be a whole number; got {value!r}.") from error


def dimension(pattern: Any, dim: int, shape: torch.Size) -> int:
    """Return `dim` of `pattern` counted from the front."""
    if not -len(shape) <= dim < len(shape):
        raise ValueError(
            f"{pattern} must find dimension {dim}; got a tensor of shape {tuple(shape)}."
        )
    return dim % len(shape)
