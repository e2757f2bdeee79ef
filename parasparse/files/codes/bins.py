"""Bins `[low, low + 2^width)` that hold about equally many of the numbers to code.

A number is coded as the number of its bin, in a fixed number of bits, and its offset in the bin, in
`width` bits. Where all bins hold equally many, no code of the bins is shorter.
"""

import math
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from parasparse.files.codes.digits import base_for, bits_per_digit

_BIN_BITS, _GAP_BITS = 8, 16  # in the table
_SIZES = sorted(m << b for m in (1, 3) for b in range(10) if m << b <= 512)  # see `of_numbers`
_BASES = torch.tensor(_SIZES, device="cpu")
_DIGIT_BITS = torch.tensor([bits_per_digit(n) for n in _SIZES], dtype=torch.float64, device="cpu")
_MOST_PARTS = 2048  # a part that holds less than one in so many numbers is not halved
_FEW = 8  # numbers: halving a part with fewer saves less than a bin takes


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


def choose_bins(counts: Tensor, least: int = 0) -> Bins:
    """Return bins that take few bits.

    The range of the numbers that occur is halved, and then, repeatedly, the bin that holds most
    numbers. Halving a bin saves a bit for each number in it. So the best bins for each base follow
    from the halves in descending order of how many numbers they hold.

    Args:
        counts: 1-D, how often each number from `least` on occurs.
        least: the least number that occurs.
    """
    total = int(counts.sum())
    if total == 0:
        return Bins((0,), (0,), nbits=_BIN_BITS)
    if is_noise(counts):
        return replace(PLAIN, nbits=16.0 * total)
    width = (len(counts) - 1).bit_length()
    held = _in_halves(counts, width)
    halved, saved = _halved(held, total)
    lows, widths = _bins_between(held, halved, width)
    lows = [least + low for low in lows]
    ends = [low + (1 << bits) for low, bits in zip(lows, widths, strict=True)]
    gaps = sum(end != low for end, low in zip(ends, lows[1:], strict=False))
    digit = bits_per_digit(base_for(len(lows)))
    nbits = total * (width + digit) - saved + _BIN_BITS * len(lows) + _GAP_BITS * gaps
    return Bins((0,) if widths == [16] else tuple(lows), tuple(widths), nbits=nbits)


def _in_halves(counts: Tensor, width: int) -> Tensor:
    """Return how many numbers lie in each half, quarter, ... of the range of 2^width numbers.

    The halves of part `i` are `2 * i` and `2 * i + 1`. The whole is part 1.
    """
    levels = [torch.cat([counts, counts.new_zeros((1 << width) - len(counts))])]
    for _ in range(width):
        levels.append(levels[-1].view(-1, 2).sum(1))
    return torch.cat([counts.new_zeros(1), *reversed(levels)])


def _halved(held: Tensor, total: int) -> tuple[Tensor, int]:
    """Return the parts to halve for the fewest bits in all, and how many bits that saves."""
    parts = (held[: len(held) // 2] > max(_FEW, total // _MOST_PARTS)).nonzero().squeeze(1)
    # A part must come before its halves, also if one of them holds all of its numbers.
    numbers, order = held.index_select(0, parts).sort(descending=True, stable=True)
    parts = parts.index_select(0, order)
    bins = held.view(-1, 2).index_select(0, parts).bool().all(1).cumsum(0) + 1
    saved = torch.cat([numbers.new_zeros(1), numbers.cumsum(0)])
    most = torch.searchsorted(bins, _BASES, right=True)
    bits = total * _DIGIT_BITS + (_BIN_BITS + _GAP_BITS / 4) * _BASES - saved.index_select(0, most)
    best = int(most[bits.argmin()])
    return parts[:best], int(saved[best])


def _bins_between(held: Tensor, halved: Tensor, width: int) -> tuple[list[int], list[int]]:
    """Return the lows and widths of the bins that halving the parts `halved` leaves."""
    is_halved = torch.zeros(len(held), dtype=torch.bool)
    is_halved[halved] = True
    parts = torch.cat([halved.new_ones(1), 2 * halved, 2 * halved + 1])
    parts = parts[held.index_select(0, parts).bool() & ~is_halved.index_select(0, parts)]
    widths = width + 1 - torch.frexp(parts.float()).exponent
    lows, order = ((parts << widths) - (1 << width)).sort()
    return lows.tolist(), widths.index_select(0, order).tolist()


def is_noise(counts: Tensor) -> bool:
    """Whether all numbers of 16 bits are about equally likely."""
    if len(counts) < 0.9 * (1 << 16):
        return False
    total = int(counts.sum())
    if total < 256:
        return False
    if len(counts) < 1 << 16:
        counts = torch.cat([counts, counts.new_zeros((1 << 16) - len(counts))])
    different = len(counts) * -math.expm1(-total / len(counts))  # if they are
    shares = counts.view(256, 256).sum(1) / total
    entropy = -float(shares.xlogy(shares).sum() / math.log(2))
    bias = 255 / (2 * math.log(2) * total)
    return int(counts.count_nonzero()) > 0.9 * different and entropy + bias > 7.98
