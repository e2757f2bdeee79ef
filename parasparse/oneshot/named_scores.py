"""The named scores of `OneShot`, for weights as matrices; without inputs they rank by magnitude."""

from torch import Tensor

from parasparse.oneshot.problem import Problem
from parasparse.scores.saliency import relative_importance


def wanda(problem: Problem) -> Tensor:
    """Return |w| times the norm of the input."""
    return problem.weights.abs() * _norms(problem)


def ria(problem: Problem) -> Tensor:
    """Return the relative importance times the root of the norm of the input."""
    return relative_importance(problem.weights.abs()) * _norms(problem).sqrt()


def sparsegpt(problem: Problem) -> Tensor:
    """Return w^2 / (H^-1)_jj."""
    inverse = problem.hessian.inverse_diagonal().unsqueeze(-2)
    return problem.weights.square() / inverse.to(problem.weights)


def _norms(problem: Problem) -> Tensor:
    squares = problem.hessian.gram.diagonal(dim1=-2, dim2=-1)
    squares = squares.masked_fill(problem.hessian.unseen.unsqueeze(-1), 1.0)
    return squares.sqrt().unsqueeze(-2).to(problem.weights)


NAMED = {"sparsegpt": sparsegpt, "wanda": wanda, "ria": ria}
