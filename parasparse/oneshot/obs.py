"""Optimal brain surgeon, column after column: the update of SparseGPT."""

from collections.abc import Callable

import torch
from torch import Tensor

_INNER = 32  # columns updated one by one before the rest of their block


def obs(
    weights: Tensor,
    inverse_factor: Tensor,
    choose: Callable[[Tensor, int, int], Tensor],
    *,
    step: int,
    block: int = 128,
) -> tuple[Tensor, Tensor]:
    """Return new weights and the mask: what a column loses is made up for by all later columns.

    Args:
        weights: (groups, out, in).
        inverse_factor: upper triangular U with U^T U the inverse of the damped Gram matrix.
        choose: `(scores, start, stop)` to the mask of columns [start, stop); the scores are
            w^2 / U_jj^2 of the weights as they are then.
        step: columns chosen at a time, from each multiple of it. A multiple of `block` or a divisor
            of it.
        block: columns whose effect on the later ones is added up before it is applied.

    Reference: Frantar, Alistarh, "SparseGPT", 2023, arXiv:2301.00774, algorithm 1.
    """
    factor = inverse_factor.to(weights)
    diagonal = factor.diagonal(dim1=-2, dim2=-1)
    left = weights.mT.clone(memory_format=torch.contiguous_format)  # a column is contiguous
    mask = torch.empty_like(left, dtype=torch.bool)
    size = weights.shape[-1]
    inner = block if step < block and _INNER % step else min(_INNER, block)
    for start in range(0, size, block):
        stop = min(start + block, size)
        lost = torch.zeros_like(left[:, start:stop])
        for first in range(start, stop, inner):
            last = min(first + inner, stop)
            for column in range(first, last):
                if column % step == 0 or column == start:
                    chosen = min(column + step, stop) if step < block else stop
                    scores = (left[:, column:chosen] / diagonal[:, column:chosen, None]).square()
                    mask[:, column:chosen] = choose(scores.mT, column, chosen).mT
                own = left[:, column]
                gone = torch.where(mask[:, column], 0.0, own) / diagonal[:, column, None]
                lost[:, column - start] = gone
                own.masked_fill_(~mask[:, column], 0.0)
                later = factor[:, column, column + 1 : last, None]
                left[:, column + 1 : last].addcmul_(later, gone.unsqueeze(1), value=-1)
            _apply(
                left[:, last:stop],
                factor[:, first:last, last:stop],
                lost[:, first - start : last - start],
            )
        _apply(left[:, stop:], factor[:, start:stop, stop:], lost)
    return left.mT.contiguous(), mask.mT.contiguous()


def _apply(left: Tensor, factor: Tensor, lost: Tensor) -> None:
    """Subtract what the `lost` columns mean for those that are `left`."""
    if left.shape[1]:
        left.baddbmm_(factor.mT, lost, alpha=-1)
