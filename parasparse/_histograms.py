"""Which scores are the highest when processes hold parts of the tensors: nothing is gathered.

Scores of floats are ordered as the whole numbers that their bits make, up to the sign. Each process
counts the first 16 bits of its scores, the counts are summed over processes, and the bucket that
holds the k-th is known; the next 16 bits are counted in that bucket alone. One round settles 16
bits, two 32, four 64; each sums 2^16 counts, 512 KiB. Counts are exact, so that any number of
processes finds the same k-th score, which is the one that a single process finds.

Reference: Knuth, "The Art of Computer Programming", volume 3, section 5.2.5 (radix exchange).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from parasparse._parts import layout, places_in, summed
from parasparse._sources import Cut, Source, common_dtype

_DIGIT = 16  # bits
_INTEGER = {2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class _Keys:
    """Whole numbers of one tensor on this process.

    Attributes:
        chunks: yields them, flat.
        tensor: the spread tensor whose parts all processes count; None if each has them all.
    """

    chunks: Callable[[], Iterator[Tensor]]
    tensor: Tensor | None


def masks_of(sources: Sequence[Source], kept: int) -> Iterator[Tensor]:
    """Yield flat bool masks of this process's parts: the `kept` highest of all `sources` together.

    Of equal scores the one in the earlier tensor is kept, and there the one with the lower flat
    index in the whole.
    """
    dtype = common_dtype(sources)
    every = sum(source.every for source in sources)
    cut = None if kept in (0, every) else find_cut(sources, kept)
    limits = [0] * len(sources) if cut is None else _limits(sources, cut, kept - cut.above)
    for source, limit in zip(sources, limits, strict=True):
        parts = []
        for start, chunk in _with_start(source, dtype):
            if cut is None:
                parts.append(torch.full_like(chunk, kept > 0, dtype=torch.bool))
                continue
            mask = chunk > cut.value
            if limit:
                equal = (chunk == cut.value).nonzero().flatten()
                mask[equal[_places(source, equal + start) < limit]] = True
            parts.append(mask)
        yield torch.cat(parts)


def find_cut(sources: Sequence[Source], kept: int) -> Cut:
    """Return the `kept`-th highest of all `sources`, and how many are above and equal to it.

    Args:
        sources: real, without NaN.
        kept: between 1 and the number of all entries.
    """
    dtype = common_dtype(sources)

    def keys(source: Source) -> Iterator[Tensor]:
        for chunk in source.chunks():
            yield _key(chunk.to(dtype))

    every = sum(source.every for source in sources)
    held = [_Keys(lambda s=source: keys(s), source.tensor) for source in sources]  # type: ignore[misc]
    key, below, equal = _lowest(held, every - kept + 1, dtype.itemsize * 8)
    return Cut(_score(key, dtype), every - below - equal, equal)


def _limits(sources: Sequence[Source], cut: Cut, ties: int) -> list[int]:
    """Return, for each source, the place before which entries equal to the cut are kept."""
    if ties == cut.equal:
        return [source.every for source in sources]
    dtype, limits = common_dtype(sources), []
    for source in sources:

        def keys(source: Source = source) -> Iterator[Tensor]:
            for start, chunk in _with_start(source, dtype):
                yield _places(source, (chunk == cut.value).nonzero().flatten() + start)

        held = _Keys(keys, source.tensor)
        number = int(_sum({source.tensor: torch.tensor(sum(len(places) for places in keys()))}))
        if ties >= number:
            limits.append(source.every)
        elif ties == 0:
            limits.append(0)
        else:
            limits.append(_lowest([held], ties, source.every.bit_length() + 1)[0] + 1)
        ties -= min(ties, number)
    return limits


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
    counts: dict[Tensor | None, Tensor] = {}
    for each in keys:
        found = torch.zeros(1 << width, dtype=torch.int64)
        for chunk in each.chunks():
            low = shift - width
            if first:
                digits = (chunk >> low).to(torch.int32) + (1 << (width - 1))
            else:
                inside = chunk[(chunk >> shift) == prefix]
                digits = (inside >> low) & ((1 << width) - 1)
            found += torch.bincount(digits, minlength=1 << width).cpu()
        counts[each.tensor] = counts.get(each.tensor, 0) + found
    return _sum(counts)


def _sum(counts: dict[Tensor | None, Tensor]) -> Tensor:
    """Return the sum over tensors, and over the processes that hold parts of these."""
    groups: dict[object, tuple[Tensor | None, Tensor]] = {}
    for tensor, number in counts.items():
        key = layout(tensor)
        groups[key] = (tensor, groups[key][1] + number if key in groups else number)
    sums = [
        number if tensor is None else summed(number, tensor) for tensor, number in groups.values()
    ]
    return torch.stack(sums).sum(0)


def _key(scores: Tensor) -> Tensor:
    """Return whole numbers in the order of `scores`."""
    if not scores.is_floating_point():
        return scores
    bits = (scores + 0.0).view(_INTEGER[scores.dtype.itemsize])  # -0.0 becomes 0.0
    # Those below 0 count backwards.
    return bits ^ ((bits >> (bits.dtype.itemsize * 8 - 1)) & torch.iinfo(bits.dtype).max)


def _score(key: int, dtype: torch.dtype) -> float:
    """Return the score whose key this is."""
    if not dtype.is_floating_point:
        return key
    integer = _INTEGER[dtype.itemsize]
    bits = torch.tensor([key if key >= 0 else key ^ torch.iinfo(integer).max], dtype=integer)
    return bits.view(dtype).item()


def _places(source: Source, flat: Tensor) -> Tensor:
    return flat if source.tensor is None else places_in(source.tensor, flat)


def _with_start(source: Source, dtype: torch.dtype) -> Iterator[tuple[int, Tensor]]:
    start = 0
    for chunk in source.chunks():
        yield start, chunk.to(dtype)
        start += chunk.numel()
