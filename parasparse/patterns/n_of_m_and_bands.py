"""Patterns that decide by themselves how much to keep: groups, and bands of diagonals."""

from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor

from parasparse.counts import dimension, whole_number
from parasparse.dtypes import widened
from parasparse.patterns.selection.scores import as_scores, check_scores


@dataclass(frozen=True)
class n_of_m:  # noqa: N801 - a pattern reads as a function
    """Keep the `n` highest of every `m` consecutive entries along `dim`: 2:4 is `n_of_m(2, 4)`.

    The weights of Linear and Conv are (out, in, ...), so `dim=1` groups the inputs, as hardware
    does. The weight of a depthwise convolution has one input: exclude it, or use `dim=0`.

    Args:
        n: entries kept in each group, in [0, m].
        m: size of a group, at least 1.
        dim: the grouped dimension; None: 1, but rules refuse stacks of matrices, whose product may
            sum along another one.
        remainder: treatment of the last entries if m does not divide the size of `dim`: "refuse"
            raises, "keep" keeps all of them, "pad" keeps their n highest.

    Raises:
        ValueError: n is outside [0, m], or `remainder` is unknown. On call: the tensor has no such
            dimension, or m does not divide its size and `remainder` is "refuse".

    Examples:
        >>> n_of_m(2, 4)(torch.tensor([[1.0, 4.0, 2.0, 3.0]])).tolist()
        [[False, True, False, True]]

    Reference: Mishra et al., "Accelerating Sparse Deep Neural Networks", 2021, arXiv:2104.08378.
    """

    n: int
    m: int
    dim: int | None = None
    remainder: Literal["refuse", "keep", "pad"] = field(default="refuse", kw_only=True)
    takes_sparsity: ClassVar[bool] = False

    def __post_init__(self) -> None:
        for name in ("n", "m") if self.dim is None else ("n", "m", "dim"):
            whole_number(getattr(self, name), name)
        if not (0 <= self.n <= self.m and self.m >= 1):
            raise ValueError(f"`n` must be in [0, m] and `m` >= 1; got n={self.n}, m={self.m}.")
        if self.remainder not in ("refuse", "keep", "pad"):
            raise ValueError(
                f'`remainder` must be "refuse", "keep" or "pad"; got {self.remainder!r}.'
            )

    @property
    def groups_along(self) -> int:
        """The grouped dimension."""
        return 1 if self.dim is None else self.dim

    def __call__(self, scores: Tensor) -> Tensor:
        """Return the mask for `scores`."""
        dim = dimension(self, self.groups_along, scores.shape)
        size, rest = scores.shape[dim], scores.shape[dim] % self.m
        if rest and self.remainder == "refuse":
            is_depthwise = size == dim == 1 and scores.ndim > 2
            depthwise = " It is depthwise, with one input per group." if is_depthwise else ""
            raise ValueError(
                f"{self} must divide dimension {dim} into groups of {self.m}; got shape "
                f"{tuple(scores.shape)}.{depthwise} Exclude this tensor, choose another `dim`, or "
                'set `remainder` to "keep" or "pad".'
            )
        if scores.is_meta:
            return torch.empty_like(scores, dtype=torch.bool)
        check_scores(as_scores(scores))
        groups, tail = widened(scores).movedim(dim, -1).split([size - rest, rest], -1)
        masks = [
            _highest_of_each(groups.unflatten(-1, (size // self.m, self.m)), self.n).flatten(-2),
            _highest_of_each(tail, rest if self.remainder == "keep" else self.n),
        ]
        return torch.cat(masks, -1).movedim(-1, dim).contiguous()


@dataclass(frozen=True)
class nearly_diagonal:  # noqa: N801
    """Keep the `k` diagonals nearest to the main one: entries with |row - column| <= k // 2.

    Rows and columns are the first two dimensions. The scores are not used.

    Args:
        k: number of diagonals, odd and at least 1.

    Raises:
        ValueError: k is even or below 1. On call: the tensor has fewer than two dimensions, or
            one of the first two is not larger than k // 2.

    Examples:
        >>> nearly_diagonal(3)(torch.rand(3, 4)).int().tolist()
        [[1, 1, 0, 0], [1, 1, 1, 0], [0, 1, 1, 1]]

    Reference: torch.ao.pruning, `NearlyDiagonalSparsifier`.
    """

    k: int
    takes_sparsity: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if whole_number(self.k, "k") < 1 or self.k % 2 == 0:
            raise ValueError(f"`k` must be an odd number of diagonals; got {self.k}.")

    def __call__(self, scores: Tensor) -> Tensor:
        """Return the mask for `scores`."""
        if scores.ndim < 2 or self.k // 2 >= min(scores.shape[:2]):
            raise ValueError(
                f"{self} must fit into the first two dimensions; got shape {tuple(scores.shape)}."
            )
        rows, columns = (torch.arange(n, device=scores.device) for n in scores.shape[:2])
        band = (rows[:, None] - columns).abs() <= self.k // 2
        return band.view(*band.shape, *[1] * (scores.ndim - 2)).expand(scores.shape).contiguous()


def _highest_of_each(groups: Tensor, n: int) -> Tensor:
    """Return the mask of the `n` highest entries along the last dimension."""
    best = groups.argsort(dim=-1, descending=True, stable=True)[..., :n]
    return torch.zeros_like(groups, dtype=torch.bool).scatter_(-1, best, True)
