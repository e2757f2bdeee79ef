"""Scores that need only the tensor."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from parasparse.dtypes import widened

Score = Callable[[Tensor, str], Tensor]
_Score = TypeVar("_Score", bound=Callable[..., Tensor])


def entrywise(score: _Score) -> _Score:
    """Declare that the score of an entry depends only on this entry.

    `score` is then called with flat chunks of a tensor. Each process scores its own part of a
    sharded tensor; without this decorator, sharded tensors are gathered to be scored.

    Examples:
        >>> @entrywise
        ... def positive(tensor, name): return tensor
    """
    score.entrywise = True  # type: ignore[attr-defined]
    return score


def is_entrywise(score: Callable[..., Tensor]) -> bool:
    """Whether `score` was decorated with `entrywise`."""
    return getattr(score, "entrywise", False)


@entrywise
def magnitude(tensor: Tensor, name: str = "") -> Tensor:
    """Return |w|, the modulus if the tensor is complex.

    Args:
        tensor: real or complex, any shape.
        name: not used; scores are called with it.

    Examples:
        >>> magnitude(torch.tensor([-2.0, 0.5, 1.0])).tolist()
        [2.0, 0.5, 1.0]

    Reference: Han, Pool, Tran, Dally, "Learning both Weights and Connections for Efficient Neural
        Networks", 2015, arXiv:1506.02626, section 3.
    """
    tensor = widened(tensor)
    if not (tensor.is_floating_point() or tensor.is_complex()):
        tensor = tensor.to(torch.float64)  # the lowest integer has no abs
    return tensor.detach().abs()


def random(tensor: Tensor, name: str = "", *, generator: torch.Generator | None = None) -> Tensor:
    """Return scores drawn uniformly from [0, 1).

    Args:
        tensor: the scores have its shape and device.
        name: not used; scores are called with it.
        generator: random generator; None: torch's global one. Bind it with
            `functools.partial(random, generator=g)`.

    Examples:
        >>> draw = lambda: random(torch.ones(3), generator=torch.Generator().manual_seed(0))
        >>> bool((draw() == draw()).all())
        True
    """
    device = tensor.device if generator is None else generator.device
    return torch.rand(tensor.shape, generator=generator, device=device).to(tensor.device)


def lamp(tensor: Tensor, name: str = "") -> Tensor:
    """Return w^2 divided by the sum of w^2 of all entries at least as large, in [0, 1].

    With `scope="global"`, these scores distribute the sparsity over layers. Among equal entries,
    the one with the lower index counts as larger. See `magnitude` for the arguments.

    Examples:
        >>> lamp(torch.tensor([1.0, -2.0, 2.0])).tolist()
        [0.1111111111111111, 1.0, 0.5]

    Reference: Lee et al., "Layer-adaptive Sparsity for the Magnitude-based Pruning", 2021,
        arXiv:2010.07611, equation 4.
    """
    squares = magnitude(tensor).double().flatten().square()
    order = squares.argsort(descending=True, stable=True)
    largest_first = squares[order]
    shares = largest_first / largest_first.cumsum(0).clamp(min=torch.finfo(torch.float64).tiny)
    return torch.empty_like(shares).scatter_(0, order, shares).view(tensor.shape)


@dataclass(frozen=True)
class zeros_first:  # noqa: N801 - a score reads as a function
    """Score as `score` does, except that zero entries get -inf, so they are pruned first.

    Use it to prune a sparse model further by a score that may rank its zeros high (`magnitude` does
    not). Not for patterns of units: a unit with a single zero would have the lowest score too.

    Args:
        score: any score.

    Examples:
        >>> score = zeros_first(lambda tensor, name: torch.tensor([1.0, 2.0, 3.0]))
        >>> score(torch.tensor([5.0, 0.0, 4.0]), "w").tolist()
        [1.0, -inf, 3.0]
    """

    score: Score

    def __call__(self, tensor: Tensor, name: str = "") -> Tensor:
        """Return the scores of `tensor`."""
        scores = self.score(tensor, name)
        if scores.shape != tensor.shape:  # not broadcast: `Prune` raises the error
            return scores
        values = scores if scores.is_floating_point() else scores.double()
        return torch.where(tensor == 0, -math.inf, values)
