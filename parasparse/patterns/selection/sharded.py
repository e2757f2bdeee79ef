"""Which scores are the highest when processes hold parts of the tensors: nothing is gathered.

Scores of floats are ordered as the whole numbers that their bits make, up to the sign. Each process
counts the first 16 bits of its scores, the counts are summed over processes, and the bucket that
holds the k-th is known; the next 16 bits are counted in that bucket alone. One round settles 16
bits, two 32, four 64; each sums 2^16 counts, 512 KiB. Counts are exact, so that any number of
processes finds the same k-th score, which is the one that a single process finds.

Reference: Knuth, "The Art of Computer Programming", volume 3, section 5.2.5 (radix exchange).
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from parasparse.patterns.selection.source import (
    Scores,
    Scratch,
    check_scores,
    common_dtype,
    has_nan,
)
from parasparse.sharding.dtensors import global_indices, shard_key, sum_over_shards

_DIGIT = 16  # bits
_INTEGER = {2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class _Keys:
    """Whole numbers of one tensor on this process.

    Attributes:
        chunks: yields them flat and in order; each holds until the next.
        tensor: the spread tensor of which each process counts a part; None if each counts all.
    """

    chunks: Callable[[], Iterator[Tensor]]
    tensor: Tensor | None


class _Ordered:
    """The scores of a source as whole numbers in the same order.

    Attributes:
        has_nan: whether the first pass saw NaN.
    """

    def __init__(self, source: Scores, dtype: torch.dtype) -> None:
        self.source, self.dtype, self.has_nan = source, dtype, False
        self._is_known, self._is_signless = False, True

    def chunks(self) -> Iterator[Tensor]:
        for chunk in self.source.chunks():
            scores = chunk.to(self.dtype)
            if not self.dtype.is_floating_point:
                yield scores
                continue
            bits = scores.view(_INTEGER[self.dtype.itemsize])
            if not self._is_known and bits.numel():
                self.has_nan = self.has_nan or has_nan(scores)
                self._is_signless = self._is_signless and int(bits.amin()) >= 0
            yield bits if self._is_signless else _in_order(scores)
        self._is_known = True


def highest_masks(sources: Sequence[Scores], kept: int) -> Iterator[Tensor]:
    """Yield flat bool masks of this process's parts: the `kept` highest of all `sources` together.

    Of equal scores the one in the earlier tensor is kept, and there the one with the lower flat
    index in the whole.

    Args:
        sources: real scores.
        kept: how many, between 1 and one less than there are.

    Raises:
        ValueError: NaN among the scores.
    """
    dtype = common_dtype(sources)
    ordered = [_Ordered(source, dtype) for source in sources]
    keys = [_Keys(each.chunks, each.source.tensor) for each in ordered]
    every = sum(source.every for source in sources)
    cut, below, equal = _lowest(keys, every - kept + 1, dtype.itemsize * 8)
    if int(_sum([(each.source.tensor, _count(each.has_nan)) for each in ordered])):
        for source in sources:  # on all processes, if it is on one
            check_scores(source)
    ties: int | None = kept - (every - below - equal)
    if ties == equal:
        ties = None
    for source, own in zip(sources, keys, strict=True):
        take = _whole if source.tensor is None else _part
        mask, ties = take(source, own, cut, ties)
        yield mask


def _whole(source: Scores, keys: _Keys, cut: int, ties: int | None) -> tuple[Tensor, int | None]:
    """Return the mask of what each process holds, and how many ties are left for others.

    Args:
        source: the scores.
        keys: theirs.
        cut: the lowest of the kept ones.
        ties: how many that equal it are kept; None: all.
    """
    scratch, masks = Scratch(), _Filled(source.numel)
    for chunk in keys.chunks():
        number = 0
        if ties:
            number = int(torch.eq(chunk, cut, out=scratch.like(chunk)).sum(dtype=torch.int32))
        all_stay = ties is None or 0 < number <= ties
        part = masks.add(chunk, cut, inclusive=all_stay)
        if number and not all_stay:
            part[(chunk == cut).nonzero().flatten()[:ties]] = True
        ties = None if ties is None else ties - min(number, ties)
    return masks.mask, ties


def _part(source: Scores, keys: _Keys, cut: int, ties: int | None) -> tuple[Tensor, int | None]:
    """Return the mask of what this process holds; as `_whole`."""
    limit, number = source.every, 0  # entries before this place stay
    if ties == 0:
        limit = 0
    elif ties is not None:
        equal = _Keys(partial(_places, source, keys, cut), source.tensor)
        found = sum(len(places) for places in equal.chunks())
        number = int(_sum([(source.tensor, _count(found))]))
        if number > ties:
            limit = _lowest([equal], ties, source.every.bit_length() + 1)[0] + 1
    masks = _Filled(source.numel)
    for chunk in keys.chunks():
        start = masks.filled
        part = masks.add(chunk, cut, inclusive=limit == source.every)
        if 0 < limit < source.every:
            flat = (chunk == cut).nonzero().flatten()
            part[flat[_in_whole(source, flat + start) < limit]] = True
    return masks.mask, None if ties is None else ties - min(number, ties)


class _Filled:
    """A mask that is filled in chunk by chunk."""

    def __init__(self, numel: int) -> None:
        self.mask, self.filled, self._numel = (
            torch.empty(0, dtype=torch.bool, device="cpu"),
            0,
            numel,
        )
        self._scratch = Scratch()

    def add(self, chunk: Tensor, cut: int, *, inclusive: bool) -> Tensor:
        """Fill in what is above `cut`, or equals it; return this part of the mask."""
        if not self.filled:
            self.mask = torch.empty(self._numel, dtype=torch.bool, device=chunk.device)
        part = self.mask[self.filled : self.filled + chunk.numel()]
        self.filled += chunk.numel()
        # Compared into numbers, then copied: a third of the time of bools on a CPU.
        compare = torch.ge if inclusive else torch.gt
        part.copy_(compare(chunk, cut, out=self._scratch.like(chunk)))
        return part


def _places(source: Scores, keys: _Keys, cut: int) -> Iterator[Tensor]:
    """Yield where in the whole the scores lie that equal the cut."""
    start = 0
    for chunk in keys.chunks():
        yield _in_whole(source, (chunk == cut).nonzero().flatten() + start)
        start += chunk.numel()


def _in_whole(source: Scores, flat: Tensor) -> Tensor:
    return flat if source.tensor is None else global_indices(source.tensor, flat)


def _lowest(keys: Sequence[_Keys], rank: int, bits: int) -> tuple[int, int, int]:
    """Return the `rank`-th lowest of all keys, how many are below it, and how many equal it.

    Args:
        keys: signed, of `bits` bits.
        rank: from 1 on.
        bits: how many tell them apart.
    """
    prefix, below, equal, shift = 0, 0, 0, bits
    while shift:
        width = min(_DIGIT, shift)
        first = shift == bits
        counts = _counts(keys, prefix, shift, width, first=first)
        upto = counts.cumsum(0)
        digit = int(torch.searchsorted(upto, rank - below))
        equal = int(counts[digit])
        below += int(upto[digit]) - equal
        if first:
            digit -= 1 << (width - 1)  # signed
        prefix, shift = (prefix << width) + digit, shift - width
    return prefix, below, equal


def _counts(keys: Sequence[_Keys], prefix: int, shift: int, width: int, *, first: bool) -> Tensor:
    """Return how many keys with this prefix there are for each value of the next digit."""
    counts, low, half = [], shift - width, 1 << (width - 1)
    for each in keys:
        found = torch.zeros(1 << width, dtype=torch.int64, device="cpu")
        for chunk in each.chunks():
            if not first:
                inside = chunk[(chunk >> shift) == prefix]
                found += torch.bincount((inside >> low) & (2 * half - 1), minlength=2 * half).cpu()
                continue
            digits = chunk >> low if low else chunk
            if digits.numel() and int(digits.amin()) < 0:
                found += torch.bincount(digits.to(torch.int32) + half, minlength=2 * half).cpu()
            else:
                found[half:] += torch.bincount(digits, minlength=half).cpu()
        counts.append((each.tensor, found))
    return _sum(counts)


def _sum(counts: Sequence[tuple[Tensor | None, Tensor]]) -> Tensor:
    """Return the sum over tensors, and over the processes that hold parts of these."""
    groups: dict[object, tuple[Tensor | None, Tensor]] = {}
    for tensor, number in counts:
        key = shard_key(tensor)
        groups[key] = (tensor, groups[key][1] + number if key in groups else number)
    sums = [n if tensor is None else sum_over_shards(n, tensor) for tensor, n in groups.values()]
    return torch.stack(sums).sum(0)


def _count(number: int) -> Tensor:
    return torch.tensor(int(number), device="cpu")  # whatever the default device is


def _in_order(scores: Tensor) -> Tensor:
    """Return whole numbers in the order of `scores`, which may be below 0."""
    bits = (scores + 0.0).view(_INTEGER[scores.dtype.itemsize])  # -0.0 becomes 0.0
    # Those below 0 count backwards.
    return bits ^ ((bits >> (bits.dtype.itemsize * 8 - 1)) & torch.iinfo(bits.dtype).max)
