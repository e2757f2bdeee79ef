"""Swaps of a kept weight for a dropped one, each with the best weights before and after."""

from __future__ import annotations

import torch
from torch import Tensor

_NUMBERS = 1 << 23  # in 64 bits, at a time


def swapped(
    weights: Tensor,
    mask: Tensor,
    matrix: Tensor,
    swaps: int,
    *,
    width: int = 1,
    held: Tensor | None = None,
) -> Tensor:
    """Return `mask` after at most `swaps` swaps in each row.

    Each takes in the dropped weight that lowers the least squares error most, then drops the kept
    one that raises it least. It is undone if the error has not fallen.

    Args:
        weights: (groups, out, in).
        mask: bool, of the same shape.
        matrix: H, (groups, in, in), positive definite.
        swaps: at most so many for each row.
        width: swaps stay within groups of so many inputs; 1: anywhere in the row.
        held: entries that may be kept; None: all.
    """
    allowed = torch.ones_like(mask) if held is None else held
    found = mask.clone()
    size = max(_NUMBERS // weights.shape[-1] ** 2, 1)
    for group in range(len(weights)):
        for rows in torch.arange(weights.shape[1], device=mask.device).split(size):
            found[group, rows] = _of_rows(
                weights[group, rows].double(), mask[group, rows], matrix[group], swaps, width,
                allowed[group, rows],
            )  # fmt: skip
    return found


def _of_rows(
    weights: Tensor, mask: Tensor, matrix: Tensor, swaps: int, width: int, allowed: Tensor
) -> Tensor:
    rows = torch.arange(len(weights), device=weights.device)
    wanted, places = weights @ matrix, torch.arange(weights.shape[1], device=weights.device)
    mask, inverse = mask.clone(), _inverses(mask, matrix)
    going = mask.any(-1) & (allowed & ~mask).any(-1)
    for _ in range(swaps):
        if not bool(going.any()):
            break
        entering, gain, larger = _taken_in(inverse, wanted, matrix, allowed & ~mask)
        # Dropping j raises the error by w_j^2 / (inverse)_jj.
        values = (larger @ wanted.unsqueeze(-1)).squeeze(-1)
        diagonal = larger.diagonal(dim1=-2, dim2=-1)
        near = mask if width == 1 else mask & (places // width == entering.unsqueeze(-1) // width)
        cost = torch.where(near, values.square() / diagonal.clamp(min=1e-300), torch.inf)
        leaving = cost.argmin(-1)
        going &= (cost[rows, leaving] < gain * (1 - 1e-9)) & (gain > 0)
        smaller = _outer(larger, larger[rows, :, leaving], -1 / diagonal[rows, leaving])
        inverse = torch.where(going[:, None, None], smaller, inverse)
        mask[rows[going], entering[going]] = True
        mask[rows[going], leaving[going]] = False
    return mask


def _taken_in(
    inverse: Tensor, wanted: Tensor, matrix: Tensor, candidates: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return which of `candidates` each row takes in, by how much, and the inverse with it."""
    # Taking in j lowers the error by (its residual)^2 / (its own part that the others lack).
    rows = torch.arange(len(wanted), device=wanted.device)
    kept = (inverse @ wanted.unsqueeze(-1)).squeeze(-1)
    residual, across = wanted - kept @ matrix, inverse @ matrix
    own = matrix.diagonal() - (across * matrix).sum(-2)
    gains = torch.where(candidates, residual.square() / own.clamp(min=1e-300), -1.0)
    entering = gains.argmax(-1)
    vector = across[rows, :, entering]
    vector[rows, entering] = -1.0
    return entering, gains[rows, entering], _outer(inverse, vector, 1 / own[rows, entering])


def _outer(matrix: Tensor, vector: Tensor, factor: Tensor) -> Tensor:
    """Return `matrix` + `factor` `vector` `vector`^T, for each row."""
    return matrix + factor[:, None, None] * vector.unsqueeze(-1) * vector.unsqueeze(-2)


def _inverses(mask: Tensor, matrix: Tensor) -> Tensor:
    """Return the inverse of the kept part of `matrix` for each row of `mask`, 0 elsewhere."""
    both = mask.unsqueeze(-1) & mask.unsqueeze(-2)
    system = torch.where(both, matrix, 0.0)
    system.diagonal(dim1=-2, dim2=-1).masked_fill_(~mask, 1.0)
    inverse: Tensor = torch.linalg.inv(system)
    return inverse * both
