"""Exact selection of the highest scores of any number of tensors, without sorting or copying.

A random sample gives two scores that almost surely enclose the k-th. One pass counts the scores
below them and gathers the few in between, which are then searched. The sample decides only how many
are gathered: the result is exact, and the same for any number of threads.

Reference: Floyd, Rivest, "Expected time bounds for selection", 1975, CACM 18(3).
"""

import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from parasparse.patterns.selection import sharded
from parasparse.patterns.selection.scores import (
    MaskInChunks,
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
    """Return bool masks of the `kept` highest entries of all `scores` together.

    Among equal scores, the earlier tensor comes first, then the lower flat index. Shapes, devices
    and real dtypes may differ. Raises an error as `check_scores` does.

    Examples:
        >>> highest([torch.tensor([1.0, 3.0]), torch.tensor([3.0, 2.0])], 2)
        [tensor([False,  True]), tensor([ True, False])]
    """
    return shaped(highest_masks([as_scores(score) for score in scores], kept), scores)


def shaped(masks: Iterator[Tensor], tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return masks of `tensors` from flat masks of their local parts."""
    pairs = zip(masks, tensors, strict=True)
    return [from_local(mask.view(to_local(tensor).shape), tensor) for mask, tensor in pairs]


def highest_masks(sources: Sequence[Scores], kept: int) -> Iterator[Tensor]:
    """Yield the masks of `highest` lazily: flat, of the local part of each tensor."""
    for source in sources:
        check_kind(source)
    total = sum(source.numel_everywhere for source in sources)
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
    some = ties < cut.equal  # only some of the equal scores are kept
    wide, scratch = common_dtype(sources), Scratch()
    for source in sources:
        masks = MaskInChunks(source.numel, scratch)
        for raw in source.chunks():
            chunk = raw.to(wide)
            part = masks.add(chunk, cut.value, inclusive=not some)
            if some and ties:
                first = (chunk == cut.value).nonzero().flatten()[:ties]
                part[first] = True
                ties -= first.numel()
        yield masks.mask


def find_threshold(scores: Sequence[Scores], kept: int) -> Threshold:
    """Return the `kept`-th highest of all `scores`; raise ValueError if they contain NaN."""
    total = sum(score.numel for score in scores)
    rank = total - kept + 1  # counted from the lowest score
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
    """Return two scores that almost surely enclose the quantile `share` of all scores."""
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
    """Return about `_SAMPLE` scores: a random one from each run of equal length."""
    total = sum(score.numel for score in scores)
    stretch = -(-total // _SAMPLE)
    # Always on the CPU, and without changing torch's global generator.
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
    """Return how many scores are <= `low`, and the scores between `low` and `high`."""
    count, inside, one, two = 0, [], Scratch(), Scratch()
    for source, raw in ((each, raw) for each in scores for raw in each.chunks()):
        chunk = raw.to(common_dtype(scores))
        if has_nan(chunk):  # this loop reads every score
            refuse_nan(source)
        # A CPU compares into floats faster than into bools. Their product is `and`.
        above = torch.gt(chunk, low, out=one.like(chunk))
        count += chunk.numel() - _number(above)
        below = torch.lt(chunk, high, out=two.like(chunk))
        inside.append(chunk[above.mul_(below).bool()].cpu())
    return count, torch.cat(inside)


def _count(scores: Sequence[Scores], compare: Callable[..., Tensor], value: float) -> int:
    """Return the number of scores for which `compare(score, value)`."""
    dtype = common_dtype(scores)
    chunks = (chunk.to(dtype) for source in scores for chunk in source.chunks())
    return sum(int(torch.count_nonzero(compare(chunk, value))) for chunk in chunks)


def _number(ones: Tensor) -> int:
    """Return how many entries of `ones`, a tensor of 0 and 1, are 1."""
    # On a CPU, `sum` is ten times as fast as `count_nonzero`, and exact up to 2^24.
    exact = ones.dtype in (torch.float32, torch.float64) and ones.numel() <= 1 << 24
    return int(ones.sum()) if exact else int(torch.count_nonzero(ones))
