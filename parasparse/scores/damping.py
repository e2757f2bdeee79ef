"""Gram matrices that can be inverted: damped, with dead inputs set apart, and factored."""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

GROWTH = (1, 10, 100, 1000)
_SMALL = 256  # rows of triangular matrices that are inverted in one piece


@dataclass(frozen=True, eq=False)
class Damped:
    """H = G + damping * mean(diag G) I, for a stack of Gram matrices G.

    Attributes:
        gram: G, (groups, in, in), float64.
        diagonal: of H, (groups, in). That of a dead input is 1; the matrix of a group without any
            input is I.
        reversed_factor: the upper triangular R with H = R R^T, rows and columns in reverse.
        damping: the damping used.
        dead: (groups, in), inputs that were always 0, in groups that had inputs.
        unseen: (groups,), groups whose inputs were all 0, or that had none.
    """

    gram: Tensor
    diagonal: Tensor
    reversed_factor: Tensor
    damping: float
    dead: Tensor
    unseen: Tensor

    @cached_property
    def matrix(self) -> Tensor:
        """H, (groups, in, in)."""
        matrix = self.gram.clone()
        matrix.diagonal(dim1=-2, dim2=-1).copy_(self.diagonal)
        return matrix

    @cached_property
    def inverse_factor(self) -> Tensor:
        """The upper triangular U with U^T U the inverse of H, as in SparseGPT."""
        return _inverse(self.reversed_factor.flip(-2, -1))

    def factor_columns(self, start: int, stop: int) -> Tensor:
        """Return columns [start, stop) of R down to the diagonal, (groups, stop, columns)."""
        size = self.diagonal.shape[-1]
        return self.reversed_factor[:, size - stop :, size - stop : size - start].flip(-2, -1)

    @cached_property
    def scale(self) -> Tensor:
        """The square roots of the diagonal of H, (groups, in)."""
        return self.diagonal.sqrt()

    @cached_property
    def eigen(self) -> tuple[Tensor, Tensor]:
        """The eigenvalues and eigenvectors of H with its inputs scaled to a diagonal of 1."""
        scaled = self.matrix / (self.scale.unsqueeze(-1) * self.scale.unsqueeze(-2))
        values, vectors = torch.linalg.eigh(scaled)
        return values, vectors

    def inverse_diagonal(self) -> Tensor:
        """Return the diagonal of the inverse of H, (groups, in)."""
        return self.inverse_factor.square().sum(-2)


def _inverse(upper: Tensor) -> Tensor:
    """Return the inverse of upper triangular matrices, half by half: most of it are products."""
    size = upper.shape[-1]
    if size <= _SMALL:
        eye = torch.eye(size).to(upper).expand_as(upper)
        small: Tensor = torch.linalg.solve_triangular(upper, eye, upper=True)
        return small
    first, last = slice(size // 2), slice(size // 2, None)
    inverse = torch.zeros_like(upper)
    inverse[..., first, first] = _inverse(upper[..., first, first])
    inverse[..., last, last] = _inverse(upper[..., last, last])
    beside = inverse[..., first, first] @ upper[..., first, last]
    inverse[..., first, last] = -beside @ inverse[..., last, last]
    return inverse


def damped(gram: Tensor, damping: float) -> Damped:
    """Return `gram` (groups, in, in) damped, by up to 1000 times `damping` if it stays singular.

    Raises:
        RuntimeError: it is singular or not finite even then.
    """
    diagonal = gram.diagonal(dim1=-2, dim2=-1)
    dead = diagonal <= 0
    unseen = dead.all(-1)
    mean = torch.where(unseen, 0.0, diagonal.mean(-1))
    for growth in GROWTH:
        own = torch.where(dead, 1.0, diagonal) + growth * damping * mean.unsqueeze(-1)
        lower = gram.flip(-2, -1).mT  # columns are contiguous, so it is factored in place
        lower.diagonal(dim1=-2, dim2=-1).copy_(own.flip(-1))
        failed = lower.new_empty(0, dtype=torch.int32)
        torch.linalg.cholesky_ex(lower, out=(lower, failed))
        if not failed.any() and lower.diagonal(dim1=-2, dim2=-1).isfinite().all():
            alive = ~unseen.unsqueeze(-1)
            return Damped(gram, own, lower, growth * damping, dead & alive, unseen)
    raise RuntimeError(
        f"the Gram matrix must be positive definite; it is not, even with {GROWTH[-1]} times the "
        f"`damping` of {damping}. Collect more inputs, or raise `damping`."
    )
