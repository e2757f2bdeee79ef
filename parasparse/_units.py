"""Patterns of units: blocks, channels, attention heads are kept or dropped as a whole.

A unit is a tile: a tensor is cut into tiles of one size from index 0 on, the last ones short.
"""

from __future__ import annotations

import math
import operator
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from numbers import Real
from typing import Any, Protocol, TypeGuard

import torch
from torch import Tensor
from torch.nn import functional as F

from parasparse._checks import check_sparsity, num_kept
from parasparse._select import highest
from parasparse._sources import check_ranked


class Units(Protocol):
    """A pattern of units, which can be ranked across tensors."""

    def __call__(self, scores: Tensor, sparsity: float) -> Tensor:
        """Return the mask for `scores`."""

    def pool(self, scores: Tensor) -> Tensor:
        """Return the score of each unit."""

    def spread(self, units: Tensor, shape: torch.Size) -> Tensor:
        """Return a tensor of `shape` whose entries have the value of their unit."""


def has_units(pattern: object) -> TypeGuard[Units]:
    """Whether `pattern` is one of units."""
    return hasattr(pattern, "pool") and hasattr(pattern, "spread")


class _OfUnits(ABC):
    """A pattern that keeps or drops whole units of entries; counts are in units."""

    norm: float | None

    def __call__(self, scores: Tensor, sparsity: float) -> Tensor:
        """Return the mask for `scores`."""
        check_sparsity(sparsity)
        self._tiles(scores.shape)  # refuses shapes that do not fit
        if scores.is_meta:
            return torch.empty_like(scores, dtype=torch.bool)
        units = self.pool(scores)
        (kept,) = highest([units], num_kept(units.numel(), sparsity))
        return self.spread(kept, scores.shape)

    def pool(self, scores: Tensor) -> Tensor:
        """Return the score of each unit."""
        view, tile = self._tiles(scores.shape)
        return _pool(scores.reshape(view), tile, self.norm)

    def spread(self, units: Tensor, shape: torch.Size) -> Tensor:
        """Return a tensor of `shape` whose entries have the value of their unit."""
        view, tile = self._tiles(shape)
        return _spread(units, tile, view).reshape(shape)

    @abstractmethod
    def _tiles(self, shape: torch.Size) -> tuple[list[int], list[int]]:
        """Return how to view a tensor of `shape`, and the size of a unit along each dimension."""


@dataclass(frozen=True)
class block(_OfUnits):  # noqa: N801 - a pattern reads as a function
    """Keep or drop whole blocks: 90 % of the 16 x 16 blocks of a Linear, say.

    Blocks lie side by side from index 0 on and are cut off at the other edges.

    Args:
        shape: size of a block along each dimension of the tensor; -1: the whole dimension.
        norm: None ranks blocks by the mean of their scores; p > 0 by the p-norm, may be inf.

    Raises:
        ValueError: a size of 0 or below -1; on call: the tensor has another number of dimensions,
            or is smaller than a block.

    Examples:
        >>> block((1, 2))(torch.tensor([[1.0, 5.0, 4.0, 3.0]]), 0.5).tolist()
        [[False, False, True, True]]
        >>> block((16, 16, -1, -1)).pool(torch.rand(64, 32, 3, 3)).shape  # a Conv2d
        torch.Size([4, 2, 1, 1])

    Reference: Narang, Undersander, Diamos, "Block-Sparse Recurrent Neural Networks", 2017,
        arXiv:1711.02782, section 3.1. Differs: by the mean, not the maximum (`norm=math.inf`).
    """

    shape: tuple[int, ...]
    norm: float | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        sizes = tuple(whole_number(n, "shape") for n in self.shape)
        object.__setattr__(self, "shape", sizes)
        if not self.shape or not all(n > 0 or n == -1 for n in self.shape):
            raise ValueError(f"`shape` must hold sizes > 0, or -1; got {self.shape}.")
        _check_norm(self.norm)

    def _tiles(self, shape: torch.Size) -> tuple[list[int], list[int]]:
        too_large = 0 not in shape and any(map(operator.gt, self.shape, shape))
        if len(shape) != len(self.shape) or too_large:
            raise ValueError(
                f"{self} must have a size for each dimension of the tensor and fit into it; got "
                f"shape {tuple(shape)}. A size of -1 stands for a whole dimension."
            )
        sizes = zip(self.shape, shape, strict=True)
        return list(shape), [max(size, 1) if n == -1 else n for n, size in sizes]


@dataclass(frozen=True)
class channel(_OfUnits):  # noqa: N801
    """Keep or drop whole channels: the slices along `dim`.

    The weights of Linear and Conv are (out, in, ...): `channel(0)` drops outputs, `channel(1)`
    inputs.

    Args:
        dim: the dimension that counts the channels.
        norm: None ranks channels by the mean of their scores; p > 0 by the p-norm, may be inf.

    Raises:
        ValueError: on call: the tensor has no such dimension.

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

    Fused projections hold query, key and value one after the other, and a head has a run in each:
    `head(12, fused=3)` for the `in_proj_weight` of MultiheadAttention, (3 * 12 * d, embed_dim);
    `head(12, dim=1)` for the weight of its `out_proj`, (embed_dim, 12 * d).

    Args:
        num_heads: number of heads.
        dim: the dimension that counts the channels.
        fused: number of projections that follow each other along `dim`.
        norm: None ranks heads by the mean of their scores; p > 0 by the p-norm, may be inf.

    Raises:
        ValueError: a number below 1; on call: the tensor has no such dimension, or
            `fused * num_heads` does not divide its size.

    Examples:
        >>> scores = torch.tensor([[1.0], [4.0], [2.0], [2.0], [1.0], [3.0]])
        >>> head(2, fused=3)(scores, 0.5).flatten().tolist()
        [False, True, False, True, False, True]

    Reference: Michel, Levy, Neubig, "Are Sixteen Heads Really Better than One?", 2019,
        arXiv:1905.10650, section 4. Differs: any score, theirs is the gradient of a head's gate.
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


def whole_number(value: Any, argument: str) -> int:
    """Return `value`, a whole number.

    Raises:
        TypeError: it is none.
    """
    try:
        return operator.index(value)
    except TypeError as error:
        raise TypeError(f"`{argument}` must be a whole number; got {value!r}.") from error


def dimension(pattern: Any, dim: int, shape: torch.Size) -> int:
    """Return `dim` of `pattern` counted from the front."""
    if not -len(shape) <= dim < len(shape):
        raise ValueError(
            f"{pattern} must find dimension {dim}; got a tensor of shape {tuple(shape)}."
        )
    return dim % len(shape)


def _check_norm(norm: object) -> None:
    """Raise ValueError if `norm` is no order of a norm."""
    number = isinstance(norm, Real) and not isinstance(norm, bool) and float(norm) > 0
    if norm is not None and not number:
        raise ValueError(f"`norm` must be None (the mean) or > 0, inf included; got {norm!r}.")


def _pool(scores: Tensor, tile: Sequence[int], norm: float | None) -> Tensor:
    """Return one score for each tile of `scores`: the mean or norm of its entries.

    Args:
        scores: any shape, no NaN.
        tile: the size of a tile along each dimension.
        norm: None: mean of s; inf: the largest s; else mean(s^norm)^(1/norm).

    Returns:
        float64; means that agree in their first 32 bits are equal.

    Raises:
        ValueError: NaN, or with a norm negative ones among the scores.
    """
    check_ranked(scores)
    values, scale = scores.detach().double(), 1.0  # squares neither overflow nor vanish
    if norm is not None:
        if bool((values < 0).any()):
            raise ValueError(
                f"scores must be >= 0 to take their norm; got {float(values.min()):g}. Use the "
                "mean, `norm=None`, or scores that are magnitudes."
            )
        finite = torch.where(values.isinf(), 0.0, values)
        scale = (float(finite.max()) if values.numel() else 0.0) or 1.0
        values = values / scale if norm == math.inf else (values / scale) ** norm
    cells = tiled(values, tile)
    inner = list(range(1, cells.ndim, 2))
    if norm == math.inf:
        return cells.amax(inner) * scale
    mean = cells.sum(inner)
    for dim, (size, length) in enumerate(zip(tile, scores.shape, strict=True)):
        counts = torch.full((mean.shape[dim],), size, dtype=mean.dtype, device=mean.device)
        if length % size:
            counts[-1] = length % size
        mean = mean / counts.view([-1 if d == dim else 1 for d in range(mean.ndim)])
    return _to_32_bits(mean if norm is None else mean ** (1 / norm) * scale)


def _to_32_bits(means: Tensor) -> Tensor:
    """Return `means` rounded, so that the order in which a sum was taken plays no part.

    Sums of the same numbers differ in their last bits with the number of threads and the place in
    memory; units that are equal must tie.

    Reference: Veltkamp's splitting, in Dekker, "A floating-point technique for extending the
        available precision", 1971, Numerische Mathematik 18, section 5.
    """
    wide = means * (2**21 + 1)
    rounded = wide - (wide - means)
    return torch.where(rounded.isfinite(), rounded, means)


def _spread(units: Tensor, tile: Sequence[int], shape: Sequence[int]) -> Tensor:
    """Return a tensor of `shape` that has the value of its tile everywhere."""
    for dim, size in enumerate(tile):
        units = units.repeat_interleave(size, dim).narrow(dim, 0, shape[dim])
    return units.contiguous()


def tiled(values: Tensor, tile: Sequence[int], *, fill: float = 0.0) -> Tensor:
    """Return `values` as (tiles, entries) for each dimension in turn, the last ones with `fill`."""
    short = [-length % size for size, length in zip(tile, values.shape, strict=True)]
    if any(short):
        values = F.pad(values, [n for missing in reversed(short) for n in (0, missing)], value=fill)
    sizes = zip(values.shape, tile, strict=True)
    return values.reshape([n for length, size in sizes for n in (length // size, size)])
