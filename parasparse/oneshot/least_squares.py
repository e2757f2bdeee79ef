"""The best weights on a given support: by Cholesky, or conjugate gradients for many inputs."""

import torch
from torch import Tensor

LARGEST = 1024  # inputs up to which each row is factored
_NUMBERS = 1 << 24  # in 64 bits, at a time


def least_squares(
    weights: Tensor, mask: Tensor, matrix: Tensor, start: Tensor | None = None
) -> Tensor:
    """Return W' that is 0 outside `mask` and minimizes tr((W' - W) H (W' - W)^T).

    Rows that keep everything stay as they are, to the bit.

    Args:
        weights: W, (groups, out, in).
        mask: bool, of the same shape.
        matrix: H, (groups, in, in), positive definite.
        start: what conjugate gradients start from; None: `weights` on the mask.
    """
    if weights.shape[-1] <= LARGEST:
        rows = zip(weights, mask, matrix, strict=True)
        found = torch.stack([_by_cholesky(w, m, h) for w, m, h in rows])
    else:
        first = weights if start is None else start
        found = by_conjugate_gradients(weights, mask, matrix.to(weights), first)
    return torch.where(mask.all(-1, keepdim=True), weights, found)


def _by_cholesky(weights: Tensor, mask: Tensor, matrix: Tensor) -> Tensor:
    """Return the rows of one group."""
    found = torch.zeros_like(weights, dtype=torch.float64)
    wanted = weights.double() @ matrix
    counts = mask.sum(-1)
    order = counts.argsort(stable=True)  # rows of about the same number together
    size = max(_NUMBERS // max(int(counts.max()) ** 2, 1), 1)
    for rows in order.split(size):
        kept = int(counts[rows].max())
        if kept == 0:
            continue
        places, own, system = kept_systems(mask[rows], matrix, kept)
        right = wanted[rows].gather(-1, places) * own
        solved = torch.cholesky_solve(right.unsqueeze(-1), torch.linalg.cholesky(system))
        found[rows] = torch.zeros_like(found[rows]).scatter(-1, places, solved.squeeze(-1))
    return found.to(weights)


def kept_systems(mask: Tensor, matrix: Tensor, kept: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the part of `matrix` that each row of `mask` (rows, in) keeps.

    Returns:
        Inputs, (rows, kept), the kept ones first; which of these are kept; and the systems
        (rows, kept, kept), with those of I where an input is not.
    """
    places = (~mask).to(torch.uint8).argsort(dim=-1, stable=True)[:, :kept]
    own = mask.gather(-1, places)
    system = matrix[places.unsqueeze(-1), places.unsqueeze(-2)]
    system = system * (own.unsqueeze(-1) & own.unsqueeze(-2))
    system.diagonal(dim1=-2, dim2=-1).masked_fill_(~own, 1.0)
    return places, own, system


def by_conjugate_gradients(
    weights: Tensor, mask: Tensor, matrix: Tensor, start: Tensor, *, iterations: int = 100
) -> Tensor:
    """Return `least_squares` by conjugate gradients of all rows at once, with H in their dtype."""
    inverse = matrix.diagonal(dim1=-2, dim2=-1).reciprocal().unsqueeze(-2) * mask
    found = start * mask
    left = ((weights - found) @ matrix) * mask
    # Residuals of 1e-4 in float32: the error is too large by their squares.
    scale = ((weights @ matrix) * mask).square().mul(inverse).sum(-1, keepdim=True)
    enough = scale * 0.1 * torch.finfo(weights.dtype).eps
    direction = left * inverse
    slope = (left * direction).sum(-1, keepdim=True)
    for _ in range(iterations):
        if bool((slope <= enough).all()):
            break
        across = direction @ matrix
        step = slope / (direction * across).sum(-1, keepdim=True).clamp(min=1e-30)
        found += step * direction
        left -= step * (across * mask)
        further = left * inverse
        after = (left * further).sum(-1, keepdim=True)
        direction = further + after / slope.clamp(min=1e-30) * direction
        slope = after
    return found
