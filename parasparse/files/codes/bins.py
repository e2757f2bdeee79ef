"""Bins `[low, low + 2^width)` that hold about equally many of the numbers to code.

A number is coded as the number of its bin, in a fixed number of bits, and its offset in the bin, in
`width` bits. Where all bins hold equally many, no code of the bins is shorter.
"""

import heapq
import math
from bisect import bisect_left
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from parasparse.files.codes.digits import base_for, bits_per_digit

_BIN_BITS, _GAP_BITS = 8, 16  # in the table
_MOST = 512  # bins
_MOST_VALUES = 768  # where more occur, neighbours are taken for one


@dataclass(frozen=True, eq=False)
class Bins:
    """Bins in ascending order.

    Args:
        lows: 1-D, int32, the least number in each bin.
        widths: 1-D, int32, 0 to 16: the bits of an offset.
        sign: the bit of a number that is not in the bins but in the lowest bit of a digit; or 0.
        nbits: bits of all numbers and of the table.
    """

    lows: Tensor
    widths: Tensor
    sign: int = 0
    nbits: float = 0.0

    @property
    def base(self) -> int:
        """Base of the digits: the number of the bin, or twice that plus the sign."""
        return base_for(len(self.lows) * (2 if self.sign else 1))

    @cached_property
    def width(self) -> int | None:
        """The bits of every offset, or None if they differ."""
        first = int(self.widths[0])
        return first if bool((self.widths == first).all()) else None

    @property
    def is_plain(self) -> bool:
        """Whether numbers of 16 bits are coded as they are."""
        return self.width == 16 and int(self.lows[-1]) == 0 == self.sign

    @cached_property
    def of_digits(self) -> Tensor:
        """Return 32 * (least number) + width for each digit, int32."""
        coded = self.lows << 5 | self.widths
        return torch.stack([coded, coded | self.sign << 5], 1).flatten() if self.sign else coded

    @cached_property
    def of_numbers(self) -> Tensor:
        """Return 2**15 * offset + 2**10 * width + digit for each number, int32."""
        end = min(1 << 16, int(self.lows[-1]) + (1 << int(self.widths[-1])))
        numbers = torch.arange(self.sign or end, dtype=torch.int32)
        bins = torch.zeros_like(numbers)
        bins[self.lows[1:].long()] = 1
        bins = bins.cumsum(0, dtype=torch.int32)
        offsets = numbers - self.lows.index_select(0, bins)
        coded = offsets << 15 | self.widths.index_select(0, bins) << 10
        if not self.sign:
            return coded | bins
        return torch.cat([coded | bins << 1, coded | bins << 1 | 1])


PLAIN = Bins(torch.zeros(1, dtype=torch.int32), torch.full((1,), 16, dtype=torch.int32))


def choose_bins(counts: Tensor) -> Bins:
    """Return bins that take few bits.

    Args:
        counts: 1-D, how often each number from 0 up to 2**8 or 2**16 occurs.
    """
    if len(counts) == 1 << 16 and is_noise(counts):
        return replace(PLAIN, nbits=16.0 * int(counts.sum()))
    step, most = 0, min(_MOST_VALUES, max(128, int(counts.sum()) // 32))
    while int(counts.count_nonzero()) > most:
        counts, step = counts.view(-1, 2).sum(1), step + 1
    search = _Search(counts)

    def cut(share: float) -> _Cut:
        return search.cut(search.total / share)

    share, found = 16.0, cut(16.0)
    while share < _MOST and (tried := cut(4 * share)).bits < found.bits:
        share, found = 4 * share, tried
    found = min(found, cut(share / 2), cut(share * 2), key=lambda one: one.bits)
    return found.bins(step)


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
    """Bins that were tried. `held` is how many numbers each holds."""

    lows: list[int]
    widths: list[int]
    held: list[int]

    @cached_property
    def bits(self) -> float:
        """Bits of all numbers and of the table."""
        gaps = zip(self.lows[1:], self.lows, self.widths, strict=False)
        table = _BIN_BITS * len(self.lows)
        table += _GAP_BITS * sum(low != last + (1 << w) for low, last, w in gaps)
        offsets = sum(held * width for held, width in zip(self.held, self.widths, strict=True))
        return table + offsets + sum(self.held) * bits_per_digit(base_for(len(self.lows)))

    def bins(self, step: int) -> Bins:
        """Return the bins of numbers that were divided by 2^step."""
        lows, widths = (torch.tensor(n, dtype=torch.int32) for n in (self.lows, self.widths))
        lows, widths = lows << step, widths + step
        if len(lows) == 1 and int(widths) == 16:  # which hold any number
            lows = torch.zeros_like(lows)
        return Bins(lows, widths, nbits=self.bits + sum(self.held) * step)


class _Search:
    """Finds the bins whose offsets take the fewest bits at a given price of a bin."""

    def __init__(self, counts: Tensor) -> None:
        found = counts.nonzero().squeeze(1) if counts.any() else torch.zeros(1, dtype=torch.int64)
        upto = torch.cat([counts.new_zeros(1), counts[found].cumsum(0)])
        self.total, self.distinct = max(1, int(upto[-1])), len(found)
        widths = torch.arange(int(found[-1] - found[0]).bit_length() + 1)
        # For a bin of each width from each value up: the first value after it, what it holds.
        after = torch.searchsorted(found, found.unsqueeze(1) + (1 << widths))
        held = upto[after] - upto[:-1].unsqueeze(1)
        # Wide bins that hold next to nothing are not cut finer; nor are bins wider than the rest.
        wide = (after < self.distinct).sum(1)
        narrow = (held <= self.total / (8 * _MOST)).sum(1).sub(1).clamp(min=0).minimum(wide)
        ends = torch.cat([found, found[-1:] + (2 << 16)])[after]
        gaps = (after < self.distinct) & (ends != found.unsqueeze(1) + (1 << widths))
        offered = zip(
            (held * widths + _GAP_BITS * gaps).tolist(),
            after.tolist(),
            narrow.tolist(),
            wide.tolist(),
            strict=True,
        )
        options = [
            list(zip(range(n, w + 1), b[n : w + 1], a[n : w + 1], strict=True))
            for b, a, n, w in offered
        ]
        reached = {0}
        for first, choice in enumerate(options):
            if first in reached:
                reached.update(after for _, _, after in choice)
        self._options = {first: options[first] for first in sorted(reached - {self.distinct})}
        self._values, self._upto = found.tolist(), upto.tolist()

    def cut(self, price: float) -> _Cut:
        """Return the bins that are cheapest if each costs `price` bits, and some more bins.

        There are then as many as digits of a base can tell apart.
        """
        least = [0.0] * (self.distinct + 1)
        chosen = {}
        for first, options in reversed(self._options.items()):
            costs = [bits + least[after] for _, bits, after in options]
            cost = min(costs)
            least[first] = cost + price + _BIN_BITS
            chosen[first] = options[costs.index(cost)]
        bins, first = [], 0
        while first < self.distinct:
            width, _, after = chosen[first]
            bins.append((self._upto[first] - self._upto[after], self._values[first], width))
            first = after
        self._split(bins)
        held, lows, widths = zip(*sorted(bins, key=lambda one: one[1]), strict=True)
        return _Cut(list(lows), list(widths), [-number for number in held])

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
                first, after = (bisect_left(self._values, end) for end in ends)
                if first < after:
                    part = self._upto[first] - self._upto[after]
                    heapq.heappush(bins, (part, start, width - 1))
        bins += whole
