"""Masks and weights of layers, by the update that was asked for."""

from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor

from parasparse.counts import num_kept
from parasparse.oneshot.least_squares import least_squares
from parasparse.oneshot.obs import obs
from parasparse.oneshot.problem import Problem, Solution
from parasparse.oneshot.supports import Support, highest_in_rows
from parasparse.oneshot.swaps import swapped
from parasparse.patterns import n_of_m, unstructured


def by_least_squares(
    problems: list[Problem], masks: Mapping[str, Tensor], support: Support, swaps: int = 0
) -> dict[str, Solution]:
    """Return the best weights on `masks`, after at most `swaps` for each row."""
    found = {}
    for problem in problems:
        mask, matrix, width = masks[problem.name], problem.hessian.matrix, 1
        if swaps:
            if support.pattern is not unstructured:
                width = group_width(support, problem)
                if width == 1:
                    raise ValueError(
                        "`swaps` must be 0 unless the pattern groups the inputs; "
                        f'{support.pattern} does not for "{problem.name}".'
                    )
            mask = swapped(problem.weights, mask, matrix, swaps, width=width, held=problem.held)
        weights = least_squares(problem.weights, mask, matrix)
        found[problem.name] = Solution(problem, weights, mask, best=weights)
    return found


def by_obs(problem: Problem, mask: Tensor, block: int) -> Solution:
    """Return the weights of SparseGPT for a given `mask`."""

    def choose(scores: Tensor, start: int, stop: int) -> Tensor:
        return mask[..., start:stop]

    found = obs(problem.weights, problem.hessian, choose, step=block, block=block)
    return Solution(problem, *found)


def by_sparsegpt(problem: Problem, support: Support, block: int) -> Solution:
    """Return weights and mask of SparseGPT, which chooses the mask while it updates."""
    pattern, shares = support.pattern, support.sparsity or 0.0
    if isinstance(pattern, n_of_m):
        pattern(problem.restored(problem.weights).to("meta"))  # raises if it does not fit
        along = replace(pattern, dim=1)
        block = -(-block // pattern.m) * pattern.m

        def choose(scores: Tensor, start: int, stop: int) -> Tensor:
            if stop - start == pattern.m:
                return highest_in_rows(scores, pattern.n)
            return along(scores.reshape(-1, stop - start)).view(scores.shape)  # the remainder

        found = obs(problem.weights, problem.hessian, choose, step=pattern.m, block=block)
        return Solution(problem, *found)
    rows = 1 if support.by_row else problem.weights[..., 0].numel()

    def ranked(scores: Tensor, start: int, stop: int) -> Tensor:
        # Counts add up to that of the row, or of the tensor, whatever the blocks.
        kept = num_kept(rows * stop, shares) - num_kept(rows * start, shares)
        units = scores if rows == 1 else scores.reshape(1, -1)
        return highest_in_rows(units, kept).view(scores.shape)

    found = obs(problem.weights, problem.hessian, ranked, step=block, block=block)
    return Solution(problem, *found)


def chooses_by_column(support: Support, problem: Problem) -> bool:
    """Whether the mask can be chosen column by column, as SparseGPT does."""
    if problem.held is not None or support.scope == "global":
        return False
    return support.pattern is unstructured or group_width(support, problem) > 1


def group_width(support: Support, problem: Problem) -> int:
    """Return m if the pattern is n:m along the inputs of a matrix, else 1."""
    pattern, layout, dims = support.pattern, problem.layout, len(problem.shape)
    if not isinstance(pattern, n_of_m) or dims != (3 if layout.is_stack else 2):
        return 1
    along = dims - 2 if layout.is_transposed else dims - 1
    return pattern.m if pattern.groups_along % dims == along else 1
