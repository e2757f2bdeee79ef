"""One layer to prune: its weights as matrices, and the Gram matrix of its inputs.

The error of new weights W' is tr((W' - W) G (W' - W)^T), the squared change of the outputs over all
inputs. Solvers minimize the same with the damped matrix H for G.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from parasparse.scores.damping import Damped
from parasparse.scores.layouts import Layout

_PANEL = 256  # columns of a matrix at a time


@dataclass(frozen=True, eq=False)
class Problem:
    """One layer to prune.

    Attributes:
        name: of the tensor.
        weights: (groups, out, in), float32 or float64; 0 at dead inputs. May be the tensor itself.
        hessian: the damped Gram matrix.
        held: True where the present mask keeps an entry, as `weights`; None: everywhere.
        layout: how matrices become the tensor.
        shape: of the tensor.
    """

    name: str
    weights: Tensor
    hessian: Damped
    held: Tensor | None
    layout: Layout
    shape: torch.Size

    def restored(self, matrices: Tensor) -> Tensor:
        """Return `matrices` in the shape of the tensor."""
        return self.layout.restored(matrices, self.shape)


@dataclass(frozen=True, eq=False)
class Solution:
    """Weights and mask of one layer.

    Attributes:
        problem: the layer.
        weights: (groups, out, in).
        mask: bool, of the same shape.
        damped_error: of the weights, if known.
        best: the least squares weights on the mask, if known.
    """

    problem: Problem
    weights: Tensor
    mask: Tensor
    damped_error: float | None = None
    best: Tensor | None = None


def problem_of(
    name: str, tensor: Tensor, mask: Tensor | None, layout: Layout, hessian: Damped
) -> Problem:
    """Return the problem of a tensor, whose present `mask` may be None."""
    # In 32 bits at least: half precision would lose what the updates change.
    dtype = torch.float64 if tensor.dtype == torch.float64 else torch.float32
    weights = layout.matrices(tensor.detach()).to(dtype)
    if bool(hessian.dead.any()):
        weights = weights.masked_fill(hessian.dead.unsqueeze(-2), 0.0)
    held = None if mask is None else layout.matrices(mask)
    return Problem(name, weights, hessian, held, layout, tensor.shape)


def quadratic(change: Tensor, matrix: Tensor) -> float:
    """Return tr(change matrix change^T) for symmetric matrices, summed over groups."""
    total = 0.0
    for start in range(0, matrix.shape[-1], _PANEL):
        own = slice(start, start + _PANEL)
        columns = matrix[:, : own.stop, own].to(change)
        product = change[..., own] @ columns[:, start:]
        product.baddbmm_(change[..., :start], columns[:, :start], alpha=2)  # above the diagonal
        total += float(product.mul_(change[..., own]).sum(-1).sum(dtype=torch.float64))
    return total
