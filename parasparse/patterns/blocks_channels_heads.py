"""Patterns of units: blocks, channels and attention heads are kept or dropped as a whole.

A unit is a tile. Tiles have equal sizes and start at index 0; those at the end may be smaller.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from numbers import Real
from typing import Protocol, TypeGuard

import torch
from torch import Tensor

from parasparse.counts import check_sparsity, dimension, num_kept, whole_number
from parasparse.patterns.selection.kth import highest
from parasparse.patterns.tiles import pooled, spread_out


class Units(Protocol):
    """A pattern of units, which can rank them across tensors."""

    def __call__(self, scores: Tensor, sparsity: float) -> Tensor:
        """Return the mask for `scores`."""

    def pool(self, scores: Tensor) -> Tensor:
        """Return the score of each unit."""

    def spread(self, units: Tensor, shape: torch.Size) -> Tensor:
        """Return a tensor of `shape` whose entries have the value of their unit."""


def has_units(pattern: object) -> TypeGuard[Units]:
    """Whether `pattern` is a pattern of units."""
    return hasattr(pattern, "pool") and hasattr(pattern, "spread")


class _OfUnits(ABC):
    """A pattern that keeps or drops whole units; the sparsity counts units."""

    norm: float | None

    def __call__(self, scores: Tensor, sparsity: float) -> Tensor:
        check_sparsity(sparsity)
        self._tiles(scores.shape)  # refuses shapes that do not fit
        if scores.is_meta:
            return torch.empty_like(scores, dtype=torch.bool)
        units = self.pool(scores)
        (kept,) = highest([units], num_kept(units.numel(), sparsity))
        return self.spread(kept, scores.shape)

    def pool(self, scores: Tensor) -> Tensor:
        view, tile = self._tiles(scores.shape)
        return pooled(scores.reshape(view), tile, self.norm)

    def spread(self, units: Tensor, shape: torch.Size) -> Tensor:
        view, tile = self._tiles(shape)
        return spread_out(units, tile, view).reshape(shape)

    @abstractmethod
    def _tiles(self, shape: torch.Size) -> tuple[list[int], list[int]]:
        """Return how to view a tensor of `shape`, and the size of a unit along each dimension."""


@dataclass(frozen=True)
class block(_OfUnits):  # noqa: N801 - a pattern reads as a function
    """Keep or drop whole blocks, such as the 16 x 16 blocks of a Linear.

    Blocks start at index 0. Those at the end of a dimension are cut off there, and so are blocks
    that are larger than the tensor.

    Args:
        shape: size of a block along each dimension of the tensor; -1: the whole dimension.
        norm: None ranks blocks by the mean of their scores; p > 0 by the p-norm, inf included.

    Raises:
        ValueError: a size is 0 or below -1. On call: the tensor has a different number of
            dimensions.

    Examples:
        >>> block((1, 2))(torch.tensor([[1.0, 5.0, 4.0, 3.0]]), 0.5).tolist()
        [[False, False, True, True]]
        >>> block((16, 16, -1, -1)).pool(torch.rand(64, 32, 3, 3)).shape  # a Conv2d
        torch.Size([4, 2, 1, 1])

    Reference: Narang, Undersander, Diamos, "Block-Sparse Recurrent Neural Networks", 2017,
        arXiv:1711.02782, section 3.1. Differs: ranks by the mean; the paper ranks by the maximum
        (`norm=math.inf`).
    """

    shape: tuple[int, ...]
    norm: float | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        sizes = tuple(whole_number(n, "shape") for n in self.shape)
        object.__setattr__(self, "shape", sizes)
        if not self.shape or not all(n > 0 or n == -1 for n in self.shape):
            raise ValueError(f"`shape` must consist of sizes > 0, or -1; got {self.shape}.")
        _check_norm(self.norm)

    def _tiles(self, shape: torch.Size) -> tuple[list[int], list[int]]:
        if len(shape) != len(self.shape):
            raise ValueError(
                f"{self} must have one size per dimension of the tensor; got shape {tuple(shape)}. "
                "A size of -1 is the whole dimension."
            )
        sizes = zip(self.shape, shape, strict=True)
        return list(shape), [max(size if n == -1 else min(n, size), 1) for n, size in sizes]


@dataclass(frozen=True)
class channel(_OfUnits):  # noqa: N801
    """Keep or drop whole channels: the slices along `dim`.

    The weights of Linear and Conv are (out, in, ...), so `channel(0)` drops outputs, `channel(1)`
    inputs.

    Args:
        dim: the dimension that counts the channels.
        norm: None ranks channels by the mean of their scores; p > 0 by the p-norm, inf included.

    Raises:
        ValueError: `norm` is not > 0. On call: the tensor has no such dimension.

    Examples:
        >>> channel(0)(torch.tensor([[1.0, 2.0], [3.0, 0.5]]), 0.5).tolist()
        [[False, False], [True, True]]

    Reference: Li et al., "Pruning Filters for Efficient ConvNets", 2017, arXiv:1608.08710,
        section 3.1.
    """

    dim: int = 0
    norm: float | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        whole_number(self.dim, "dim")
        _check_norm(self.norm)

    def _tiles(self, shape: torch.Size) -> tuple[list[int], list[int]]:
        dim = dimension(self, self.dim, shape)
        return list(shape), [1 if d == dim else max(n, 1) for d, n in enumerate(shape)]


@dataclass(frozen=True)
class head(_OfUnits):  # noqa: N801
    """Keep or drop whole attention heads: runs of channels along `dim`.

    A fused projection consists of query, key and value, one after the other, and a head has a run
    in each: `head(12, fused=3)` for the `in_proj_weight` of MultiheadAttention, whose shape is
    (3 * 12 * d, embed_dim); `head(12, dim=1)` for its `out_proj.weight`, (embed_dim, 12 * d).

    Args:
        num_heads: number of heads.
        dim: the dimension that counts the channels.
        fused: number of projections, one after the other along `dim`.
        norm: None ranks heads by the mean of their scores; p > 0 by the p-norm, inf included.

    Raises:
        ValueError: a number is below 1. On call: the tensor has no such dimension, or
            `fused * num_heads` does not divide its size.

    Examples:
        >>> scores = torch.tensor([[1.0], [4.0], [2.0], [2.0], [1.0], [3.0]])
        >>> head(2, fused=3)(scores, 0.5).flatten().tolist()
        [False, True, False, True, False, True]

    Reference: Michel, Levy, Neubig, "Are Sixteen Heads Really Better than One?", 2019,
        arXiv:1905.10650, section 4. Differs: ranks by any score; the paper uses the gradient of a
        head's gate.
    """

    num_heads: int
    dim: int = field(default=0, kw_only=True)
    fused: int = field(default=1, kw_only=True)
    norm: float | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        for name in ("num_heads", "dim", "fused"):
            whole_number(getattr(self, name), name)
        if self.num_heads < 1 or self.fused < 1:
            raise ValueError(f"`num_heads` and `fused` must be >= 1; got {self}.")
        _check_norm(self.norm)

    def _tiles(self, shape: torch.Size) -> tuple[list[int], list[int]]:
        dim, runs = dimension(self, self.dim, shape), self.fused * self.num_heads
        if shape[dim] % runs:
            raise ValueError(
                f"{self} must divide dimension {dim} into {runs} runs; got shape {tuple(shape)}."
            )
        view = [*shape[:dim], self.fused, self.num_heads, shape[dim] // runs, *shape[dim + 1 :]]
        return view, [1 if d == dim + 1 else max(n, 1) for d, n in enumerate(view)]


def _check_norm(norm: object) -> None:
    """Raise ValueError if `norm` is neither None nor a number > 0."""
    number = isinstance(norm, Real) and not isinstance(norm, bool) and float(norm) > 0
    if norm is not None and not number:
        raise ValueError(f"`norm` must be None (the mean) or > 0, inf included; got {norm!r}.")
