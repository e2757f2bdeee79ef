"""Scores that need the tensor alone."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

Score = Callable[[Tensor, str], Tensor]
_Score = TypeVar("_Score", bound=Callable[..., Tensor])


def entrywise(score: _Score) -> _Score:
    """Say that `score` gives each entry what depends on this entry alone.

    Then it is called with flat pieces of a tensor rather than with the tensor: large ones are
    scored a piece at a time, and of what is sharded over processes each scores its own part.
    Without this decorator a sharded tensor is gathered to be scored.

    Examples:
        >>> @entrywise
        ... def positive(tensor, name): return tensor
    """
    score.entrywise = True  # type: ignore[attr-defined]
    return score


def is_entrywise(score: Callable[..., Tensor]) -> bool:
    """Whether `score` was said to be."""
    return getattr(score, "entrywise", False)


@entrywise
def magnitude(tensor: Tensor, name: str = "") -> Tensor:
    """Return |w|, the modulus where the tensor is complex.

    Args:
        tensor: real or complex, any shape.
        name: not used; part of the protocol.

    Examples:
        >>> magnitude(torch.tensor([-2.0, 0.5, 1.0])).tolist()
        [2.0, 0.5, 1.0]

    Reference: Han, Pool, Tran, Dally, "Learning both Weights and Connections for Efficient Neural
        Networks", 2015, arXiv:1506.02626, section 3.
    """
    if tensor.dtype.itemsize == 1:  # float8 has no abs
        tensor = tensor.to(torch.float32)
    elif not (tensor.is_floating_point() or tensor.is_complex()):  # the lowest integer has none
        tensor = tensor.to(torch.float64)
    return tensor.detach().abs()


def random(tensor: Tensor, name: str = "", *, generator: torch.Generator | None = None) -> Tensor:
    """Return scores drawn uniformly from [0, 1).

    Args:
        tensor: gives the shape and the device.
        name: not used; part of the protocol.
        generator: source of randomness, torch's global one if None. Bind it with
            `functools.partial(random, generator=g)` to use this as a score.

    Examples:
        >>> draw = lambda: random(torch.ones(3), generator=torch.Generator().manual_seed(0))
        >>> bool((draw() == draw()).all())
        True
    """
    device = tensor.device if generator is None else generator.device
    return torch.rand(tensor.shape, generator=generator, device=device).to(tensor.device)


def lamp(tensor: Tensor, name: str = "") -> Tensor:
    """Return w^2 over the sum of w^2 of all entries that are at least as large; in (0, 1].

    Ranked jointly (`scope="global"`) they share out the sparsity among layers. Of equal entries the
    one with the lower index counts as larger. Entries that are 0 score 0.

    Args:
        tensor: real or complex, any shape.
        name: not used; part of the protocol.

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
    """Score as `score` does, but entries that are 0 now lowest of all: they are pruned first.

    To prune a sparse model further by a score that may rank its zeros high. `magnitude` does not
    need it. For patterns of entries; a unit that holds a single zero would be the lowest too.

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
        if scores.shape != tensor.shape:  # for `Prune` to refuse, not to be broadcast here
            return scores
        values = scores if scores.is_floating_point() else scores.double()
        return torch.where(tensor == 0, -math.inf, values)
