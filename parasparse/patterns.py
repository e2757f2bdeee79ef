"""Patterns: scores and a sparsity in, a bool mask out (True = kept).

A pattern is any callable `(scores, sparsity) -> mask`. One that fixes the sparsity itself has an
attribute `sparsity` and is called as `(scores)`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from parasparse._checks import check_sparsity, num_kept


def unstructured(scores: Tensor, sparsity: float) -> Tensor:
    """Return the mask of the `num_kept(n, sparsity)` highest of the `n` scores, wherever they lie.

    Of equal scores the one with the lower flat index is kept.

    Args:
        scores: real, any shape, no NaN.
        sparsity: share of zeros, in [0, 1].

    Raises:
        ValueError: NaN among the scores; sparsity outside [0, 1].

    Examples:
        >>> unstructured(torch.tensor([1.0, 3.0, 1.0, 2.0]), 0.25).tolist()
        [True, True, False, True]
    """
    kept = num_kept(scores.numel(), check_sparsity(sparsity))
    if scores.is_meta:
        return torch.empty_like(scores, dtype=torch.bool)
    flat = _ranked(scores).flatten()
    if kept in (0, flat.numel()):
        return torch.full_like(scores, kept > 0, dtype=torch.bool)
    lowest = flat.kthvalue(flat.numel() - kept + 1).values
    mask = flat > lowest
    ties = (flat == lowest).nonzero().flatten()
    mask[ties[: kept - int(mask.sum())]] = True
    return mask.view(scores.shape)


@dataclass(frozen=True)
class n_of_m:  # noqa: N801 - a pattern reads as a function
    """Keep the `n` highest of every `m` consecutive entries along `dim`: 2:4 is `n_of_m(2, 4)`.

    The shape of a Linear weight is (out, in), so that `dim=1` groups the inputs, as hardware does.
    Of equal scores the one with the lower index is kept.

    Args:
        n: entries kept in each group, in [0, m].
        m: size of a group; must divide the size of `dim`.
        dim: the grouped dimension.

    Raises:
        ValueError: n outside [0, m]; on call: `dim` is not there, or m does not divide its size.

    Examples:
        >>> n_of_m(2, 4)(torch.tensor([[1.0, 4.0, 2.0, 3.0]])).tolist()
        [[False, True, False, True]]

    Reference: Mishra et al., "Accelerating Sparse Deep Neural Networks", 2021, arXiv:2104.08378.
    """

    n: int
    m: int
    dim: int = 1

    def __post_init__(self) -> None:
        if not (0 <= self.n <= self.m and self.m >= 1):
            raise ValueError(f"`n` must be in [0, m] and `m` >= 1; got n={self.n}, m={self.m}.")

    @property
    def sparsity(self) -> float:
        """The share of zeros that the pattern brings: 1 - n/m."""
        return 1 - self.n / self.m

    def __call__(self, scores: Tensor) -> Tensor:
        """Return the mask for `scores` (real, no NaN)."""
        if not -scores.ndim <= self.dim < scores.ndim or scores.shape[self.dim] % self.m:
            raise ValueError(
                f"{self} must divide dimension {self.dim} of the tensor into groups of {self.m}; "
                f"got shape {tuple(scores.shape)}. Choose another `dim`, or leave this tensor out."
            )
        if scores.is_meta:
            return torch.empty_like(scores, dtype=torch.bool)
        last = _ranked(scores).movedim(self.dim, -1)
        groups = last.reshape(-1, self.m)
        best = groups.argsort(dim=1, descending=True, stable=True)[:, : self.n]
        mask = torch.zeros_like(groups, dtype=torch.bool).scatter_(1, best, True)
        return mask.view(last.shape).movedim(-1, self.dim).contiguous()


def _ranked(scores: Tensor) -> Tensor:
    """Return `scores` in a dtype that torch can rank; the conversion keeps order and ties."""
    if scores.is_complex():
        raise TypeError(f"scores must be real; got {scores.dtype}. Return the modulus, .abs().")
    if scores.dtype == torch.bool or scores.dtype.itemsize == 1:
        scores = scores.to(torch.float32)
    if scores.is_floating_point() and bool(scores.isnan().any()):
        raise ValueError(
            f"scores must not be NaN; got {int(scores.isnan().sum())} NaN of {scores.numel()}. "
            "A weight or a statistic diverged: find it, or map NaN to a number in your score."
        )
    return scores
