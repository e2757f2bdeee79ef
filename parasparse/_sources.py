"""What is ranked: scores of tensors, one after the other, in pieces."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from parasparse._parts import is_spread, part_of, summed

_NOT_COMPARED = (torch.uint16, torch.uint32, torch.uint64)


@dataclass(frozen=True, eq=False)
class Source:
    """Scores of one tensor, which may be computed each time they are wanted.

    Attributes:
        numel: how many there are; of a spread tensor on this process.
        dtype: theirs.
        chunks: yields them flat and in order, in pieces of any size, which hold until the next is
            asked for. No NaN.
        at: returns those at given places, a vector of indices on the CPU.
        tensor: the spread tensor that these are the scores of a part of; None if they are all.
    """

    numel: int
    dtype: torch.dtype
    chunks: Callable[[], Iterator[Tensor]]
    at: Callable[[Tensor], Tensor]
    tensor: Tensor | None = None

    @property
    def every(self) -> int:
        """How many scores there are on all processes."""
        return self.numel if self.tensor is None else self.tensor.numel()


@dataclass(frozen=True)
class Cut:
    """Where the kept scores begin.

    Attributes:
        value: the lowest of the kept scores.
        above: number of scores above `value`.
        equal: number of scores equal to it.
    """

    value: float
    above: int
    equal: int


def as_source(score: Tensor) -> Source:
    """Return a tensor of scores as a source: pieces that stay in a CPU's cache."""
    part = part_of(score)
    size = chunk_size(part)
    return Source(
        part.numel(),
        score.dtype,
        lambda: iter(part.flatten().split(size)),
        lambda places: part.flatten()[places.to(part.device)],
        score if is_spread(score) else None,
    )


def scored(tensor: Tensor, score: Callable[[Tensor], Tensor]) -> Source:
    """Return the scores of `tensor` as a source: each piece is scored when it is wanted.

    Args:
        tensor: any; of a spread one this process scores its part.
        score: of each entry by itself, of flat pieces.
    """
    part = part_of(tensor)
    size = chunk_size(part)
    return Source(
        part.numel(),
        score(part.flatten()[:1]).dtype,
        lambda: map(score, part.flatten().split(size)),
        lambda places: score(part.flatten()[places.to(part.device)]),
        tensor if is_spread(tensor) else None,
    )


def chunk_size(tensor: Tensor) -> int:
    """Return how many entries of `tensor` to look at in one go."""
    return torch.get_num_threads() << 16 if tensor.is_cpu else 1 << 26


def common_dtype(sources: Sequence[Source]) -> torch.dtype:
    """Return a dtype to compare all scores in, without loss but for integers beside floats."""
    dtypes = {source.dtype for source in sources}
    floats = {torch.float32 if d.itemsize == 1 else d for d in dtypes if d.is_floating_point}
    if not floats:
        return torch.int64
    if not all(dtype.is_floating_point for dtype in dtypes):
        return torch.float64  # integers of more than 53 bits beside floats: to the nearest
    if len(floats) == 1:
        return floats.pop()
    return torch.float64 if torch.float64 in floats else torch.float32


def check_ranked(*scores: Tensor) -> None:
    """Refuse scores that cannot be ranked.

    Raises:
        TypeError: complex scores, or unsigned ones of more than a byte.
        ValueError: NaN among them.
    """
    for score in scores:
        check_source(as_source(score))


def check_source(source: Source) -> None:
    """Refuse scores that cannot be ranked, on all processes alike.

    Raises:
        TypeError: complex scores, or unsigned ones of more than a byte.
        ValueError: NaN among them.
    """
    dtype = source.dtype
    if dtype.is_complex:
        raise TypeError(f"scores must be real; got {dtype}. Return the modulus, .abs().")
    if dtype in _NOT_COMPARED:
        raise TypeError(f"scores must not be {dtype}: torch compares none. Use int64.")
    if not dtype.is_floating_point:
        return
    found = sum(_number_of_nan(chunk) for chunk in source.chunks())
    if source.tensor is not None:
        found = int(summed(torch.tensor(found), source.tensor))
    if found:
        raise ValueError(
            f"scores must not be NaN; got {found} NaN of {source.every}. "
            "A weight or a statistic diverged: find it, or map NaN to a number in your score."
        )


def _number_of_nan(chunk: Tensor) -> int:
    wide = chunk.float() if chunk.dtype.itemsize == 1 else chunk
    # The maximum is NaN where any entry is, and costs a fifth of `isnan().any()`.
    return int(wide.isnan().sum()) if wide.numel() and bool(wide.max().isnan()) else 0
