"""Selection of the highest scores of sharded tensors, without gathering them.

The bits of floats, read as integers, have the same order up to the sign. Each process counts the
first 16 bits of its scores. The sum of these counts over processes tells which bucket holds the
k-th score, and the next 16 bits are counted in this bucket only. A round sums 2^16 counts (512 KiB)
and settles 16 bits. Counts are exact, so any number of processes finds the same k-th score.

Reference: Knuth, "The Art of Computer Programming", volume 3, section 5.2.5 (radix exchange).
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from parasparse.patterns.selection.scores import (
    MaskInChunks,
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
    """Integers of one tensor on this process, in chunks; `tensor` is the sharded one, or None."""

    chunks: Callable[[], Iterator[Tensor]]
    tensor: Tensor | None


class _Ordered:
    """Scores as integers in the same order; `has_nan` is known after the first pass."""

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
    """Yield flat bool masks of this process's parts: the `kept` highest of all scores together.

    Among equal scores, the earlier tensor comes first, then the lower flat index in the full
    tensor. Some but not all scores must be kept. Raises ValueError if they contain NaN.
    """
    dtype = common_dtype(sources)
    ordered = [_Ordered(source, dtype) for source in sources]
    keys = [_Keys(each.chunks, each.source.tensor) for each in ordered]
    total = sum(source.numel_everywhere for source in sources)
    cut, below, equal = _lowest(keys, total - kept + 1, dtype.itemsize * 8)
    if int(_sum([(each.source.tensor, _count(each.has_nan)) for each in ordered])):
        for source in sources:  # all processes raise, even if only one has NaN
            check_scores(source)
    to_keep = kept - (total - below - equal)
    ties = to_keep if to_keep < equal else None  # how many keys equal to `cut` are kept; None: all
    for source, own in zip(sources, keys, strict=True):
        take = _whole if source.tensor is None else _part
        mask, ties = take(source, own, cut, ties)
        yield mask


def _whole(source: Scores, keys: _Keys, cut: int, ties: int | None) -> tuple[Tensor, int | None]:
    """Return the mask of a tensor that is not sharded, and how many ties are left to keep."""
    scratch = Scratch()
    masks = MaskInChunks(source.numel, scratch)
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
    """Return the mask of this process's part of a sharded tensor, and the ties left to keep."""
    tensor, end = source.tensor, source.numel_everywhere
    assert tensor is not None
    limit, number = end, 0  # of the ties, those before this flat index are kept
    if ties == 0:
        limit = 0
    elif ties is not None:
        equal = _Keys(partial(_tied_indices, tensor, keys, cut), tensor)
        found = sum(len(indices) for indices in equal.chunks())
        number = int(_sum([(tensor, _count(found))]))
        if number > ties:
            limit = _lowest([equal], ties, end.bit_length() + 1)[0] + 1
    masks = MaskInChunks(source.numel, Scratch())
    for chunk in keys.chunks():
        start = masks.filled
        part = masks.add(chunk, cut, inclusive=limit == end)
        if 0 < limit < end:
            flat = (chunk == cut).nonzero().flatten()
            part[flat[global_indices(tensor, flat + start) < limit]] = True
    return masks.mask, None if ties is None else ties - min(number, ties)


def _tied_indices(tensor: Tensor, keys: _Keys, cut: int) -> Iterator[Tensor]:
    """Yield the flat indices in the full tensor of the keys that equal `cut`."""
    start = 0
    for chunk in keys.chunks():
        yield global_indices(tensor, (chunk == cut).nonzero().flatten() + start)
        start += chunk.numel()


def _lowest(keys: Sequence[_Keys], rank: int, bits: int) -> tuple[int, int, int]:
    """Return the `rank`-th lowest key of `bits` signed bits, and how many are below and equal."""
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
    """Return how many keys with this prefix have each value of the next digit."""
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
    """Return the sum over tensors, and over the processes that hold parts of them."""
    groups: dict[object, tuple[Tensor | None, Tensor]] = {}
    for tensor, number in counts:
        key = shard_key(tensor)
        groups[key] = (tensor, groups[key][1] + number if key in groups else number)
    sums = [n if tensor is None else sum_over_shards(n, tensor) for tensor, n in groups.values()]
    return torch.stack(sums).sum(0)


def _count(number: int) -> Tensor:
    return torch.tensor(int(number), device="cpu")  # not the default device


def _in_order(scores: Tensor) -> Tensor:
    """Return integers in the order of `scores`, negative ones included."""
    bits = (scores + 0.0).view(_INTEGER[scores.dtype.itemsize])  # -0.0 becomes 0.0
    # The bits of negative floats are in descending order.
    return bits ^ ((bits >> (bits.dtype.itemsize * 8 - 1)) & torch.iinfo(bits.dtype).max)
