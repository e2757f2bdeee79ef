"""What `OneShot` did to a tensor."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from parasparse.oneshot.least_squares import LARGEST, least_squares
from parasparse.oneshot.problem import Problem, Solution, quadratic


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
        unseen: matrices of a stack, such as experts, that had no input: pruned by magnitude.
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
    unseen: int
    lower_bound: float | None


def row_of(solution: Solution, weights: Tensor, samples: int) -> OneShotRow:
    """Return the row for `weights`, those of `solution` after rounding, as matrices."""
    problem, mask, best = solution.problem, solution.mask, solution.best
    hessian, dense = problem.hessian, problem.weights
    if best is None and dense.shape[-1] <= LARGEST:
        best = least_squares(dense, mask, hessian.matrix)
    change = weights.to(dense) - dense
    is_rounded = weights.dtype != solution.weights.dtype
    known = None if is_rounded else solution.damped_error
    error, damped_error = _energies(change, problem, known)
    outputs, damped_outputs = (energy or 1.0 for energy in _energies(dense, problem))
    return OneShotRow(
        problem.name, mask.numel(), int(mask.count_nonzero()), samples, mask.shape[-1],
        int(hessian.dead.sum()), hessian.damping,
        error / outputs, damped_error / damped_outputs, int(hessian.unseen.sum()),
        None if best is None else _energies(best - dense, problem)[1] / damped_outputs,
    )  # fmt: skip


def _energies(
    weights: Tensor, problem: Problem, damped: float | None = None
) -> tuple[float, float]:
    """Return the squared outputs of `weights`, by the Gram matrix and by the `damped` one."""
    hessian = problem.hessian
    # The two matrices differ in the diagonal only.
    more = hessian.diagonal - hessian.gram.diagonal(dim1=-2, dim2=-1)
    added = float((weights.square().sum(-2) * more.masked_fill(hessian.dead, 0.0)).sum())
    energy = quadratic(weights, hessian.gram) if damped is None else max(damped - added, 0.0)
    return energy, energy + added
