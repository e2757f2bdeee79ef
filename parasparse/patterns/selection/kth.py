"""Which scores are the highest: exact, over any number of tensors, without sorting or copying them.

The k-th score lies, almost surely, between two scores that a random sample picks. One pass counts
what lies below these two and gathers the few entries in between, among which it is searched. The
sample decides how many these are, never which is found: the answer is exact, and the same on any
number of threads.

Reference: Floyd, Rivest, "Expected time bounds for selection", 1975, CACM 18(3).
"""

import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from parasparse.patterns.selection import sharded
from parasparse.patterns.selection.source import (
    Scores,
    Scratch,
    Threshold,
    as_scores,
    check_kind,
    check_scores,
    common_dtype,
    has_nan,
    refuse_nan,
)
from parasparse.sharding.dtensors import from_local, to_local

_SAMPLE = 1 << 15


def highest(scores: Sequence[Tensor], kept: int) -> list[Tensor]:
    """Return bool masks of the `kept` highest of all `scores` together.

    Of equal scores the one in the earlier tensor is kept, and there the one with the lower flat
    index.

    Args:
        scores: real, any shapes, dtypes and devices, no NaN.
        kept: how many, between 0 and the number of all entries.

    Raises:
        ValueError: NaN among the scores.
        TypeError: complex scores.

    Examples:
        >>> highest([torch.tensor([1.0, 3.0]), torch.tensor([3.0, 2.0])], 2)
        [tensor([False,  True]), tensor([ True, False])]
    """
    return shaped(highest_masks([as_scores(score) for score in scores], kept), scores)


def shaped(masks: Iterator[Tensor], tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return flat masks of the parts of `tensors` as masks of these."""
    pairs = zip(masks, tensors, strict=True)
    return [from_local(mask.view(to_local(tensor).shape), tensor) for mask, tensor in pairs]


def highest_masks(sources: Sequence[Scores], kept: int) -> Iterator[Tensor]:
    """Yield the flat masks of `highest`, each when it is asked for; of parts of spread tensors.

    Raises:
        ValueError, TypeError: as `highest`.
    """
    for source in sources:
        check_kind(source)
    total = sum(source.every for source in sources)
    if kept in (0, total):
        for source in sources:
            check_scores(source)
            yield torch.full((source.numel,), kept > 0, device=next(source.chunks()).device)
        return
    narrow = common_dtype(sources).itemsize == 2 and total > 4 * _SAMPLE  # settled in one round
    if narrow or any(source.tensor is not None for source in sources):
        yield from sharded.highest_masks(sources, kept)
        return
    cut = find_threshold(sources, kept)
    ties = kept - cut.above
    some = ties < cut.equal  # of the equal ones stay
    wide, scratch = common_dtype(sources), Scratch()
    compare = torch.gt if some else torch.ge
    for source in sources:
        mask, start = torch.empty(0, dtype=torch.bool), 0
        for raw in source.chunks():
            if start == 0:
                mask = torch.empty(source.numel, dtype=torch.bool, device=raw.device)
            part, chunk = mask[start : start + raw.numel()], raw.to(wide)
            start += raw.numel()
            part.copy_(compare(chunk, cut.value, out=scratch.like(chunk)))
            if some and ties:
                ties -= _add_first(part, chunk == cut.value, ties)
        yield mask


def find_threshold(scores: Sequence[Scores], kept: int) -> Threshold:
    """Return the `kept`-th highest of all `scores`, and how many are above and equal to it.

    Args:
        scores: real.
        kept: between 1 and the number of all entries.

    Raises:
        ValueError: NaN among the scores.
    """
    total = sum(score.numel for score in scores)
    rank = total - kept + 1  # of the searched score from below
    for sigmas in (5.0, 50.0, math.inf) if total > 4 * _SAMPLE else (math.inf,):
        low, high = _bracket(scores, rank / total, sigmas)
        upto_low, inside = _between(scores, low, high)
        upto_inside = upto_low + inside.numel()
        if rank <= upto_low:
            below = _count(scores, torch.lt, low)
            if rank > below:
                return Threshold(low, total - upto_low, upto_low - below)
        elif rank <= upto_inside:
            value = inside.kthvalue(rank - upto_low).values
            upto_value = upto_low + int(torch.count_nonzero(inside <= value))
            equal = int(torch.count_nonzero(inside == value))
            return Threshold(value.item(), total - upto_value, equal)
        else:
            upto_high = _count(scores, torch.le, high)
            if rank <= upto_high:
                return Threshold(high, total - upto_high, upto_high - upto_inside)
    raise AssertionError("the widest bracket holds every score")


def _bracket(scores: Sequence[Scores], share: float, sigmas: float) -> tuple[float, float]:
    """Return two scores that the one with `share` of all below it lies between, almost surely."""
    dtype = common_dtype(scores)
    if dtype.is_floating_point:
        least, most = -math.inf, math.inf
    else:
        least, most = torch.iinfo(dtype).min, torch.iinfo(dtype).max
    if sigmas == math.inf:
        return least, most
    sample = _sample(scores)
    n = sample.numel()
    spread = sigmas * math.sqrt(n * share * (1 - share)) + sigmas
    first, last = math.floor(share * n - spread), math.ceil(share * n + spread)
    return (
        least if first < 1 else sample.kthvalue(first).values.item(),
        most if last > n else sample.kthvalue(last).values.item(),
    )


def _sample(scores: Sequence[Scores]) -> Tensor:
    """Return about `_SAMPLE` of the scores: one of each stretch of equal length, at random."""
    total = sum(score.numel for score in scores)
    stretch = -(-total // _SAMPLE)
    # On the CPU whatever the default device is; torch's own generator stays as it is.
    generator = torch.Generator("cpu").manual_seed(0)
    starts = torch.arange(0, total, stretch, device="cpu")
    drawn = torch.randint(stretch, starts.shape, generator=generator, device="cpu")
    positions = (starts + drawn).clamp_(max=total - 1)
    ends = torch.tensor([score.numel for score in scores], device="cpu").cumsum(0)
    until = torch.searchsorted(positions, ends).tolist()
    dtype = common_dtype(scores)
    found, start, offset = [], 0, 0
    for score, stop in zip(scores, until, strict=True):
        if stop > start:
            found.append(score.at(positions[start:stop] - offset).to("cpu", dtype))
        start, offset = stop, offset + score.numel
    return torch.cat(found)


def _between(scores: Sequence[Scores], low: float, high: float) -> tuple[int, Tensor]:
    """Return the number of scores <= `low`, and the scores between `low` and `high`."""
    count, inside, one, two = 0, [], Scratch(), Scratch()
    for source, raw in ((each, raw) for each in scores for raw in each.chunks()):
        chunk = raw.to(common_dtype(scores))
        if has_nan(chunk):  # every score comes by here
            refuse_nan(source)
        # On a CPU compared faster into floats than into bools, whose product is then `and`.
        above = torch.gt(chunk, low, out=one.like(chunk))
        count += chunk.numel() - _number(above)
        below = torch.lt(chunk, high, out=two.like(chunk))
        inside.append(chunk[above.mul_(below).bool()].cpu())
    return count, torch.cat(inside)


def _count(scores: Sequence[Scores], compare: Callable[..., Tensor], value: float) -> int:
    """Return the number of scores for which `compare(score, value)`."""
    chunks = _chunks(scores, common_dtype(scores))
    return sum(int(torch.count_nonzero(compare(chunk, value))) for chunk in chunks)


def _number(ones: Tensor) -> int:
    """Return how many entries of `ones`, the others 0, are 1."""
    # A sum takes a tenth of the time of `count_nonzero` on a CPU, and is exact up to 2^24.
    exact = ones.dtype in (torch.float32, torch.float64) and ones.numel() <= 1 << 24
    return int(ones.sum()) if exact else int(torch.count_nonzero(ones))


def _chunks(scores: Sequence[Scores], dtype: torch.dtype) -> Iterator[Tensor]:
    """Yield all scores as `dtype`."""
    for score in scores:
        for chunk in score.chunks():
            yield chunk.to(dtype)


def _add_first(mask: Tensor, ties: Tensor, most: int) -> int:
    """Set `mask` at the first `most` of the True entries of `ties`; return how many these are."""
    first = ties.nonzero().flatten()[:most]
    mask[first] = True
    return first.numel()
