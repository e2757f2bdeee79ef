"""Swaps of a kept weight for a dropped one, each with the best weights before and after."""

from __future__ import annotations

import torch
from torch import Tensor

from parasparse.oneshot.least_squares import kept_systems

_NUMBERS = 1 << 23  # in 64 bits, at a time
_ROUNDING = 1e-12  # of an input: a smaller part that the others lack is none


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
    rows, places = (torch.arange(size, device=weights.device) for size in weights.shape)
    wanted, mask = weights @ matrix, mask.clone()
    inverse, own = _start(mask, matrix)
    going = mask.any(-1) & (allowed & ~mask).any(-1)
    for _ in range(swaps):
        if not bool(going.any()):
            break
        # Taking in j lowers the error by (its residual)^2 / own_j.
        kept = (inverse @ wanted.unsqueeze(-1)).squeeze(-1)
        candidates = allowed & ~mask & (own > _ROUNDING * matrix.diagonal())
        gains = torch.where(candidates, (wanted - kept @ matrix).square() / own, -1.0)
        gain, entering = gains.max(-1)
        going &= gain > 0
        # The inverse with it is larger by v v^T / own_j.
        v = (inverse @ matrix[entering].unsqueeze(-1)).squeeze(-1)
        v[rows, entering] = -1.0
        more = torch.where(going, 1 / own[rows, entering], 0.0).unsqueeze(-1) * v
        values = kept + more * (v * wanted).sum(-1, keepdim=True)
        diagonal = inverse.diagonal(dim1=-2, dim2=-1) + more * v
        # Dropping i then raises the error by values_i^2 / diagonal_i.
        near = mask if width == 1 else mask & (places // width == entering.unsqueeze(-1) // width)
        cost, leaving = torch.where(near, values.square() / diagonal, torch.inf).min(-1)
        going &= cost < gain * (1 - 1e-9)
        u = inverse[rows, :, leaving] + more * v[rows, leaving].unsqueeze(-1)
        less = -u / diagonal[rows, leaving].unsqueeze(-1)
        left, right = torch.stack((more, less), -1), torch.stack((v, u), -2)
        left = torch.where(going[:, None, None], left, 0.0)
        inverse.baddbmm_(left, right)
        own -= ((left.mT @ matrix) * (right @ matrix)).sum(-2)
        mask[rows[going], entering[going]] = True
        mask[rows[going], leaving[going]] = False
    return mask


def _start(mask: Tensor, matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Return the inverses of what rows keep of `matrix`, and what all inputs have of their own.

    The inverses are 0 elsewhere. What an input has of its own is the squared part of it that the
    kept ones do not explain.
    """
    rows = torch.arange(len(mask), device=mask.device)[:, None, None]
    places, are_kept, system = kept_systems(mask, matrix, int(mask.sum(-1).max()))
    factor = torch.linalg.cholesky(system)
    explained = torch.linalg.solve_triangular(
        factor, matrix[places] * are_kept.unsqueeze(-1), upper=False
    )
    both = are_kept.unsqueeze(-1) & are_kept.unsqueeze(-2)
    smaller = torch.cholesky_inverse(factor) * both
    inverse = matrix.new_zeros(len(mask), *matrix.shape)
    inverse[rows, places.unsqueeze(-1), places.unsqueeze(-2)] = smaller
    return inverse, matrix.diagonal() - explained.square().sum(-2)
