"""What is ranked: scores of tensors, one after the other, in pieces."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NoReturn

import torch
from torch import Tensor

from parasparse.sharding.dtensors import is_dtensor, sum_over_shards, to_local

_NOT_COMPARED = (torch.uint16, torch.uint32, torch.uint64)


@dataclass(frozen=True, eq=False)
class Scores:
    """Scores of one tensor, which may be computed each time they are wanted.

    Attributes:
        numel: how many there are; of a spread tensor on this process.
        dtype: theirs.
        chunks: yields them flat and in order, in pieces of any size, which hold until the next is
            asked for.
        at: returns those at given places, a vector of indices on the CPU.
        tensor: the spread tensor that these are the scores of a part of; None if they are all.
        name: for errors.
    """

    numel: int
    dtype: torch.dtype
    chunks: Callable[[], Iterator[Tensor]]
    at: Callable[[Tensor], Tensor]
    tensor: Tensor | None = None
    name: str = ""

    @property
    def every(self) -> int:
        """How many scores there are on all processes."""
        return self.numel if self.tensor is None else self.tensor.numel()


@dataclass(frozen=True)
class Threshold:
    """Where the kept scores begin.

    Attributes:
        value: the lowest of the kept scores.
        above: number of scores above `value`.
        equal: number of scores equal to it.
    """

    value: float
    above: int
    equal: int


def as_scores(score: Tensor) -> Scores:
    """Return a tensor of scores as a source: pieces that stay in a CPU's cache."""
    part = to_local(score)
    size = chunk_size(part)
    return Scores(
        part.numel(),
        score.dtype,
        lambda: iter(part.flatten().split(size)),
        lambda places: part.flatten()[places.to(part.device)],
        score if is_dtensor(score) else None,
    )


def chunk_size(tensor: Tensor) -> int:
    """Return how many entries of `tensor` to look at in one go."""
    return (torch.get_num_threads() << 19) // tensor.dtype.itemsize if tensor.is_cpu else 1 << 26


class Scratch:
    """A tensor that is used again: fresh memory costs more than what is done to it."""

    def __init__(self) -> None:
        self._held = torch.empty(0, device="cpu")

    def like(self, chunk: Tensor) -> Tensor:
        """Return a tensor like `chunk`, which holds until the next call."""
        held, size = self._held, chunk.numel()  # `len` of a tensor is slow
        if held.numel() < size or held.dtype != chunk.dtype or held.device != chunk.device:
            held = self._held = torch.empty_like(chunk)
        return held if held.numel() == size else held[:size]


def common_dtype(sources: Sequence[Scores]) -> torch.dtype:
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
        check_scores(as_scores(score))


def check_scores(source: Scores) -> None:
    """Refuse scores that cannot be ranked, on all processes alike.

    Raises:
        TypeError: complex scores, or unsigned ones of more than a byte.
        ValueError: NaN among them.
    """
    check_kind(source)
    if _on_all(source, sum(has_nan(chunk) for chunk in source.chunks())):
        refuse_nan(source)


def check_kind(source: Scores) -> None:
    """Raise TypeError if scores are complex, or unsigned ones of more than a byte."""
    dtype = source.dtype
    if dtype.is_complex:
        raise TypeError(f"scores must be real; got {dtype}. Return the modulus, .abs().")
    if dtype in _NOT_COMPARED:
        raise TypeError(f"scores must not be {dtype}: torch compares none. Use int64.")


def has_nan(scores: Tensor) -> bool:
    """Whether any of `scores` is NaN."""
    if not scores.is_floating_point():
        return False
    wide = scores.float() if scores.dtype.itemsize == 1 else scores
    # A sum is NaN where a term is, and the fastest way to know; so is one of inf and -inf.
    return bool(wide.sum().isnan()) and bool(wide.isnan().any())


def refuse_nan(source: Scores) -> NoReturn:
    """Raise the ValueError for NaN, on all processes alike."""
    number = _on_all(source, sum(int(_isnan(chunk).sum()) for chunk in source.chunks()))
    error = ValueError(
        f"scores must not be NaN; got {number} NaN of {source.every}. "
        "A weight or a statistic diverged: find it, or map NaN to a number in your score."
    )
    if source.name:
        error.add_note(f'while pruning "{source.name}"')
    raise error


def _on_all(source: Scores, number: int) -> int:
    """Return the sum of `number` over the processes that hold parts of the source."""
    if source.tensor is None:
        return number
    return int(sum_over_shards(torch.tensor(number, device="cpu"), source.tensor))


def _isnan(scores: Tensor) -> Tensor:
    return (scores.float() if scores.dtype.itemsize == 1 else scores).isnan()
