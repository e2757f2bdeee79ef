"""What `OneShot` did to a tensor."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from parasparse.oneshot.least_squares import LARGEST, least_squares
from parasparse.oneshot.problem import Solution, quadratic


@dataclass(frozen=True)
class OneShotRow:
    """What `OneShot` did to one tensor.

    Errors are squared changes of the outputs over the inputs of `collect`, relative to the squared
    outputs. The weights are those of the model, so that rounding to bfloat16 counts.

    Attributes:
        name: of the tensor.
        numel: number of entries.
        kept: number of entries that the mask keeps.
        samples: inputs, such as tokens, that the Gram matrix sums. 0: pruned by magnitude.
        inputs: length of an input. With fewer samples, the Gram matrix is singular without damping.
        dead_inputs: inputs that were always 0, whose weights were dropped first.
        damping: share of the mean of the diagonal that was added; larger than asked for if the
            Gram matrix was singular.
        error: relative error.
        damped_error: with the damped Gram matrix, whose error the update minimizes.
        lower_bound: the least `damped_error` of any weights on this mask. None for "obs" and "none"
            with more than 1024 inputs, where finding it would take longer than the update.
    """

    name: str
    numel: int
    kept: int
    samples: int
    inputs: int
    dead_inputs: int
    damping: float
    error: float
    damped_error: float
    lower_bound: float | None


def row_of(solution: Solution, weights: Tensor, samples: int) -> OneShotRow:
    """Return the row for `weights`, those of `solution` after rounding, as matrices."""
    problem, mask, best = solution.problem, solution.mask, solution.best
    hessian, dense = problem.hessian, problem.weights
    if best is None and dense.shape[-1] <= LARGEST:
        best = least_squares(dense, mask, hessian.matrix)
    whole, outputs = quadratic(dense, hessian.matrix) or 1.0, quadratic(dense, problem.gram) or 1.0
    change = (weights.to(dense) - dense).masked_fill(hessian.dead.unsqueeze(-2), 0.0)
    return OneShotRow(
        problem.name, mask.numel(), int(mask.sum()), samples, mask.shape[-1],
        int(hessian.dead.sum()), hessian.damping,
        quadratic(change, problem.gram) / outputs,
        quadratic(change, hessian.matrix) / whole,
        None if best is None else quadratic(best - dense, hessian.matrix) / whole,
    )  # fmt: skip
