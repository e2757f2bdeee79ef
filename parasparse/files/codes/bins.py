"""Bins `[low, low + 2^width)` that hold about equally many of the numbers to code.

A number is coded as the number of its bin, in a fixed number of bits, and its offset in the bin, in
`width` bits. Where all bins hold equally many, no code of the bins is shorter.
"""

import heapq
import math
from bisect import bisect_left, bisect_right
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise

import torch
from torch import Tensor

from parasparse.files.codes.digits import base_for, bits_per_digit

_BIN_BITS, _GAP_BITS = 8, 16  # in the table
_MOST = 512  # bins: with the sign a digit has 10 bits, see `Bins.of_numbers`
_MOST_VALUES = 2048  # where more occur, neighbours are taken for one
_FULLEST = 1.4  # how much more than the average a bin may hold


@dataclass(frozen=True, eq=False)
class Bins:
    """Bins in ascending order.

    Args:
        lows: the least number in each bin.
        widths: the bits of an offset in each bin, 0 to 16.
        sign: the bit of a number that is not in the bins but in the lowest bit of a digit; or 0.
        nbits: bits of all numbers and of the table.
    """

    lows: tuple[int, ...]
    widths: tuple[int, ...]
    sign: int = 0
    nbits: float = 0.0

    @property
    def base(self) -> int:
        """Base of the digits: the number of the bin, or twice that plus the sign."""
        return base_for(len(self.lows) * (2 if self.sign else 1))

    @property
    def width(self) -> int | None:
        """The bits of every offset, or None if they differ."""
        return self.widths[0] if len(set(self.widths)) == 1 else None

    @property
    def is_plain(self) -> bool:
        """Whether numbers of 16 bits are coded as they are."""
        return self.width == 16 and self.lows[-1] == 0 == self.sign

    @cached_property
    def of_digits(self) -> Tensor:
        """Return 32 * (least number) + width for each digit, int32."""
        coded = [low << 5 | width for low, width in zip(self.lows, self.widths, strict=True)]
        if self.sign:
            coded = [one | sign for one in coded for sign in (0, self.sign << 5)]
        return torch.tensor(coded, dtype=torch.int32)

    @cached_property
    def of_numbers(self) -> Tensor:
        """Return 2**15 * offset + 2**10 * width + digit for each number, int32."""
        assert self.base <= 1 << 10
        start, end = self.lows[0], self.lows[-1] + (1 << self.widths[-1])
        end = min(self.sign or 1 << 16, end)
        numbers = torch.arange(start, end, dtype=torch.int32)
        lows, widths = (torch.tensor(n, dtype=torch.int32) for n in (self.lows, self.widths))
        bins = torch.zeros_like(numbers)
        bins[lows[1:].long() - start] = 1
        bins = bins.cumsum(0, dtype=torch.int32)
        offsets = numbers - lows.index_select(0, bins)
        coded = offsets << 15 | widths.index_select(0, bins) << 10
        found = torch.zeros(2 * self.sign or end, dtype=torch.int32)
        found[start:end] = coded | bins << (1 if self.sign else 0)
        if self.sign:
            found[self.sign + start : self.sign + end] = coded | bins << 1 | 1
        return found


PLAIN = Bins((0,), (16,))


def choose_bins(counts: Tensor) -> Bins:
    """Return bins that take few bits.

    Args:
        counts: 1-D, how often each number from 0 up to 2**8 or 2**16 occurs.
    """
    total = int(counts.sum())
    if len(counts) == 1 << 16 and is_noise(counts):
        return replace(PLAIN, nbits=16.0 * total)
    step, most = 0, min(_MOST_VALUES, max(128, total // 8))
    while int(counts.count_nonzero()) > most:
        counts, step = counts.view(-1, 2).sum(1), step + 1
    values = _Values(counts)
    tries = _tries(values, total)
    if total * math.log2(len(values)) + _BIN_BITS * len(values) < min(one.bits for one in tries):
        tries.append(values.cut(0))  # a bin for each number
    best = sorted((one for one in tries if one.bins), key=lambda one: one.bits)[:2]
    return min((values.filled(one, step) for one in best), key=lambda one: one.nbits)


def _tries(values: "_Values", total: int) -> list["_Cut"]:
    """Return bins of several numbers, around the number at which they take the fewest bits."""
    tried: dict[float, _Cut] = {}

    def bits(power: float) -> float:
        """Return the bits with about 2^power bins."""
        if power not in tried:
            tried[power] = values.cut(int(_FULLEST * total / 2**power))
        return tried[power].bits

    power = min(7, int(math.log2(1 + math.sqrt(total) / 4)))  # seldom far off
    step = 1 if bits(power + 1) < bits(power) else -1
    while power + step >= 0 and bits(power + step) < bits(power):
        power += step
    for other in (power - 0.5, power + 0.5, 0):
        bits(other)
    return list(tried.values())


def is_noise(counts: Tensor) -> bool:
    """Whether all numbers of 16 bits are about equally likely."""
    total = int(counts.sum())
    if total < 256:
        return False
    different = len(counts) * -math.expm1(-total / len(counts))  # if they are
    shares = counts.view(256, 256).sum(1) / total
    entropy = -float(shares.xlogy(shares).sum() / math.log(2))
    bias = 255 / (2 * math.log(2) * total)
    return int(counts.count_nonzero()) > 0.9 * different and entropy + bias > 7.98


@dataclass(frozen=True)
class _Cut:
    """Bins that were tried.

    Args:
        bins: minus how many numbers a bin holds, the least, and the width, in ascending order.
            None if there would be too many.
        bits: bits of all numbers and of the table, about.
    """

    bins: list[tuple[int, int, int]]
    bits: float


class _Values:
    """The numbers that occur, in ascending order, and how often."""

    def __init__(self, counts: Tensor) -> None:
        found = counts.nonzero().squeeze(1) if counts.any() else torch.zeros(1, dtype=torch.int64)
        upto = torch.cat([counts.new_zeros(1), counts.index_select(0, found).cumsum(0)])
        self._numbers: list[int] = found.tolist()
        self._upto: list[int] = upto.tolist()  # how many are less than each

    def __len__(self) -> int:
        return len(self._numbers)

    def cut(self, most: int) -> _Cut:
        """Return bins that are as wide as possible, but hold only one number or at most `most`."""
        numbers, upto, end = self._numbers, self._upto, len(self)
        bins: list[tuple[int, int, int]] = []
        first = bits = 0
        while first < end:
            if len(bins) == _MOST:
                return _Cut([], math.inf)
            low, before = numbers[first], upto[first]
            after = bisect_right(upto, before + most) - 1
            if after == end:
                width = (numbers[-1] - low).bit_length()
            else:
                width = (numbers[after] - low).bit_length() - 1 if after > first else 0
            first = bisect_left(numbers, low + (1 << width), first) if width else first + 1
            bits += (upto[first] - before) * width
            bins.append((before - upto[first], low, width))
        digits = upto[-1] * math.log2(len(bins))
        return _Cut(bins, bits + digits + _BIN_BITS * len(bins))

    def filled(self, cut: _Cut, step: int) -> Bins:
        """Return the bins of `cut`, and some more, for numbers that were divided by 2^step.

        There are as many as digits of a base can tell apart.
        """
        bins = list(cut.bins)
        self._split(bins)
        bins.sort(key=lambda one: one[1])
        gaps = sum(last + (1 << width) != low for (_, last, width), (_, low, _) in pairwise(bins))
        digit = step + bits_per_digit(base_for(len(bins)))
        nbits: float = _BIN_BITS * len(bins) + _GAP_BITS * gaps
        nbits -= sum(held * (width + digit) for held, _, width in bins)
        lows = tuple(low << step for _, low, _ in bins)
        widths = tuple(width + step for _, _, width in bins)
        return Bins((0,) if widths == (16,) else lows, widths, nbits=nbits)

    def _split(self, bins: list[tuple[int, int, int]]) -> None:
        """Halve the bins that hold most until there are as many as their base can tell apart."""
        base = base_for(len(bins))
        whole: list[tuple[int, int, int]] = []
        heapq.heapify(bins)
        while bins and len(bins) + len(whole) < base:
            held, low, width = heapq.heappop(bins)
            if width == 0:
                whole.append((held, low, width))
                continue
            for start in (low, low + (1 << width - 1)):
                ends = (start, start + (1 << width - 1))
                first, after = (bisect_left(self._numbers, end) for end in ends)
                if first < after:
                    part = self._upto[first] - self._upto[after]
                    heapq.heappush(bins, (part, start, width - 1))
        bins += whole
