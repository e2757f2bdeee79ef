"""Optimal brain surgeon, column after column: the update of SparseGPT."""

from collections.abc import Callable

import torch
from torch import Tensor

from parasparse.scores.damping import Damped

_INNER = 32  # columns updated one by one before the rest of their block


def obs(
    weights: Tensor,
    hessian: Damped,
    choose: Callable[[Tensor, int, int], Tensor],
    *,
    step: int,
    block: int = 128,
) -> tuple[Tensor, Tensor, float]:
    """Return new weights, the mask and the error tr((W' - W) H (W' - W)^T).

    What a column loses is made up for by all later columns.

    Args:
        weights: W, (groups, out, in).
        hessian: the damped Gram matrix H = R R^T, with the upper triangular R.
        choose: `(scores, start, stop)` to the mask of columns [start, stop); the scores are
            w^2 R_jj^2 of the weights as they are then.
        step: columns chosen at a time, from each multiple of it. A multiple of `block` or a divisor
            of it.
        block: columns whose effect on the later ones is added up before it is applied.

    Reference: Frantar, Alistarh, "SparseGPT", 2023, arXiv:2301.00774, algorithm 1. Differs: there
        W' - W = -L U for the losses L and the inverse U of R. Here (W' - W) R = -L, so only blocks
        of R are inverted, and the error is the sum of the squares of L.
    """
    found, mask = torch.empty_like(weights), torch.empty_like(weights, dtype=torch.bool)
    changes = weights.new_empty(weights.mT.shape)  # a column is contiguous
    error = 0.0
    for start in range(0, weights.shape[-1], block):
        stop = min(start + block, weights.shape[-1])
        columns = hessian.factor_columns(start, stop).to(weights)
        eye = torch.eye(stop - start).to(weights)
        inverse = torch.linalg.solve_triangular(columns[:, start:], eye, upper=True)
        dense = weights[..., start:stop].mT.contiguous()
        earlier = columns[:, :start].mT @ changes[:, :start]
        left = dense.baddbmm(inverse.mT, earlier, alpha=-1)
        lost = _prune(left, mask[..., start:stop], inverse, choose, start, step)
        found[..., start:stop] = left.mT
        torch.sub(left, dense, out=changes[:, start:stop])
        error += float(lost.square().sum())
    return found, mask, error


def _prune(
    left: Tensor,
    mask: Tensor,
    inverse: Tensor,
    choose: Callable[[Tensor, int, int], Tensor],
    start: int,
    step: int,
) -> Tensor:
    """Prune columns `left` (groups, columns, out) from `start` on in place; return what they lose.

    `mask` (groups, out, columns) is set. After each `_INNER` columns, what they lose is made up for
    by those after them, together.
    """
    size = left.shape[1]
    diagonal = inverse.diagonal(dim1=-2, dim2=-1).unsqueeze(-1)
    shares = inverse / diagonal
    lost = torch.empty_like(left)
    inner = size if step < size and _INNER % step else _INNER
    for first in range(0, size, inner):
        last = min(first + inner, size)
        for column in range(first, last):
            if column % step == 0:
                chosen = slice(column, min(column + step, size))
                scores = (left[:, chosen] / diagonal[:, chosen]).square()
                mask[..., chosen] = choose(scores.mT, start + column, start + chosen.stop)
                lost[:, chosen] = ~mask[..., chosen].mT
            own = lost[:, column].mul_(left[:, column]).unsqueeze(1)
            left[:, column:last].addcmul_(shares[:, column, column:last, None], own, value=-1)
        left[:, last:].baddbmm_(shares[:, first:last, last:].mT, lost[:, first:last], alpha=-1)
    return lost.div_(diagonal)
