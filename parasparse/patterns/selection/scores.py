"""Scores to be ranked, read in chunks."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NoReturn

import torch
from torch import Tensor

from parasparse.dtypes import is_comparable, widened, widened_dtype
from parasparse.sharding.dtensors import is_dtensor, sum_over_shards, to_local


@dataclass(frozen=True, eq=False)
class Scores:
    """The scores of one tensor, which may be computed every time they are read.

    Attributes:
        numel: number of scores on this process.
        dtype: dtype of the scores.
        chunks: yields flat chunks of any size in order, each valid until the next.
        at: returns the scores at flat indices, which are on the CPU.
        tensor: the sharded tensor that these are a part of; None: they are all.
        name: name of the tensor, for errors.
    """

    numel: int
    dtype: torch.dtype
    chunks: Callable[[], Iterator[Tensor]]
    at: Callable[[Tensor], Tensor]
    tensor: Tensor | None = None
    name: str = ""

    @property
    def numel_everywhere(self) -> int:
        """Number of scores on all processes."""
        return self.numel if self.tensor is None else self.tensor.numel()


@dataclass(frozen=True)
class Threshold:
    """The lowest kept score, and how many scores are above and equal to it."""

    value: float
    above: int
    equal: int


def as_scores(score: Tensor) -> Scores:
    """Return a tensor of scores in chunks that fit into a CPU's cache."""
    part = to_local(score)
    size = chunk_size(part)
    return Scores(
        part.numel(),
        score.dtype,
        lambda: iter(part.flatten().split(size)),
        lambda indices: part.flatten()[indices.to(part.device)],
        score if is_dtensor(score) else None,
    )


def chunk_size(tensor: Tensor) -> int:
    """Return how many entries of `tensor` to process at once."""
    return (torch.get_num_threads() << 19) // tensor.dtype.itemsize if tensor.is_cpu else 1 << 26


class Scratch:
    """Memory that is reused: allocating it takes longer than the arithmetic in it."""

    def __init__(self) -> None:
        self._held = torch.empty(0, device="cpu")

    def like(self, chunk: Tensor) -> Tensor:
        """Return a tensor like `chunk`, valid until the next call."""
        held, size = self._held, chunk.numel()  # `len` of a tensor is slow
        if held.numel() < size or held.dtype != chunk.dtype or held.device != chunk.device:
            held = self._held = torch.empty_like(chunk)
        return held if held.numel() == size else held[:size]


class MaskInChunks:
    """A flat mask that is computed chunk by chunk."""

    def __init__(self, numel: int, scratch: Scratch) -> None:
        self.mask = torch.empty(0, dtype=torch.bool, device="cpu")
        self.filled, self._numel, self._scratch = 0, numel, scratch

    def add(self, chunk: Tensor, cut: float, *, inclusive: bool) -> Tensor:
        """Append and return the mask of entries above `cut`, or equal to it if `inclusive`."""
        if not self.filled:
            self.mask = torch.empty(self._numel, dtype=torch.bool, device=chunk.device)
        part = self.mask[self.filled : self.filled + chunk.numel()]
        self.filled += chunk.numel()
        # On a CPU, comparing into numbers and copying takes a third of the time of bools.
        compare = torch.ge if inclusive else torch.gt
        part.copy_(compare(chunk, cut, out=self._scratch.like(chunk)))
        return part


def common_dtype(sources: Sequence[Scores]) -> torch.dtype:
    """Return the dtype to compare all scores in; exact except for integers beside floats."""
    dtypes = {source.dtype for source in sources}
    floats = {widened_dtype(dtype) for dtype in dtypes if dtype.is_floating_point}
    if not floats:
        return torch.int64
    if torch.float64 in floats or not all(dtype.is_floating_point for dtype in dtypes):
        return torch.float64  # rounds integers of more than 53 bits
    return floats.pop() if len(floats) == 1 else torch.float32


def check_scores(source: Scores) -> None:
    """Raise TypeError for scores of a dtype without order, ValueError for NaN on any process."""
    check_kind(source)
    if _on_all(source, sum(has_nan(chunk) for chunk in source.chunks())):
        refuse_nan(source)


def check_kind(source: Scores) -> None:
    """Raise TypeError if scores are complex, or unsigned integers of more than a byte."""
    if source.dtype.is_complex:
        raise TypeError(f"scores must be real; got {source.dtype}. Return the modulus, .abs().")
    if not is_comparable(source.dtype):
        raise TypeError(f"scores must not be {source.dtype}: torch cannot compare it. Use int64.")


def has_nan(scores: Tensor) -> bool:
    """Whether any of `scores` is NaN."""
    if not scores.is_floating_point():
        return False
    wide = widened(scores)
    # A sum is the fastest test: it is NaN if a term is. So is the sum of inf and -inf.
    return bool(wide.sum().isnan()) and bool(wide.isnan().any())


def refuse_nan(source: Scores) -> NoReturn:
    """Raise ValueError with the number of NaN on all processes."""
    number = _on_all(source, sum(int(widened(c).isnan().sum()) for c in source.chunks()))
    error = ValueError(
        f"scores must not be NaN; got {number} NaN of {source.numel_everywhere}. "
        "A weight or a statistic diverged: find it, or map NaN to a number in your score."
    )
    if source.name:
        error.add_note(f'while pruning "{source.name}"')
    raise error


def _on_all(source: Scores, number: int) -> int:
    """Return the sum of `number` over the processes that hold parts of the scores."""
    if source.tensor is None:
        return number
    return int(sum_over_shards(torch.tensor(number, device="cpu"), source.tensor))
