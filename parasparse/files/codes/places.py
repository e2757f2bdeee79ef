"""Which of many flags are set: Golomb codes of the distances between them.

The distance from one set flag to the next, less 1, is `base * quotient + digit`. Quotients are
written as so many zeros and a one, digits in `base`. With base 1 the bits are the flags themselves.
"""

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from parasparse.files.codes.digits import (
    base_for,
    bits_per_digit,
    pack_digits,
    pack_fields,
    unpack_digits,
)

_FEW = 1 << 14
_AT_ONCE = 1 << 19  # flags: what is computed from them fits the cache


@dataclass(frozen=True, eq=False)
class Golomb:
    """Codes of the places of set flags: `bits` of the quotients, and `digits`, as bytes."""

    base: int
    bits: Tensor
    digits: list[Tensor]


def places_of(flags: Tensor) -> Tensor:
    """Return where `flags` (1-D, uint8 of 0 and 1) are 1, int32."""
    if len(flags) < _FEW:
        return flags.nonzero().squeeze(1).int()  # slow if many are set
    parts = flags.split(_AT_ONCE)
    places = [places_of_bits(pack_fields(part, 1)) for part in parts]
    return torch.cat([found.add_(_AT_ONCE * i) for i, found in enumerate(places)])


def places_of_bits(data: Tensor) -> Tensor:
    """Return which bits of `data` (uint8) are 1, int32; bit 0 is the lowest of the first byte."""
    ones, places = _ones_of_bytes()
    as_int32 = data.int()
    counts = ones.index_select(0, as_int32)
    upto = counts.cumsum(0)
    total = int(upto[-1]) if len(upto) else 0
    # The byte of the i-th one is the number of bytes before which at most i ones end.
    ends = torch.zeros(total + 1, dtype=torch.int32).scatter_add_(0, upto, torch.ones_like(counts))
    byte = ends[:total].cumsum(0, dtype=torch.int32)
    # It is number i - before of the ones of its byte.
    firsts = (as_int32 << 3).sub_(upto.int()).add_(counts)
    rows = firsts.index_select(0, byte).add_(torch.arange(total, dtype=torch.int32))
    return places.index_select(0, rows).add_(byte.bitwise_left_shift_(3))


@cache
def _ones_of_bytes() -> tuple[Tensor, Tensor]:
    """Return how many ones each byte has, and, 8 numbers for each byte, where they are."""
    bits = torch.arange(256).unsqueeze(1) >> torch.arange(8) & 1
    places = bits.sort(dim=1, descending=True, stable=True).indices
    return bits.sum(1).int(), places.flatten().int()


def pack_places(flags: Tensor, places: Tensor) -> Golomb:
    """Return the codes of the places (1-D, int32) at which `flags` are 1, in a base of few bits."""
    number = len(places)
    wanted = (len(flags) / number - 1) * 0.69 if number else 0.0
    if number and wanted < 1:
        return Golomb(1, pack_fields(flags, 1), [])
    gaps = places.diff(prepend=places.new_full((1,), -1)) - 1
    some = gaps[:: 1 + number // 4096]
    best = min(_bases_near(wanted), key=lambda base: _bits(some, base))
    quotients = divided(gaps, best)
    digits = pack_digits(gaps.sub_(quotients, alpha=best), best)
    ends = quotients.add_(1).cumsum(0)
    bits = torch.zeros(int(ends[-1]) if number else 0, dtype=torch.uint8)
    bits.scatter_(0, ends.sub_(1), 1)
    return Golomb(best, pack_fields(bits, 1), digits)


def unpack_places(bits: Tensor, digits: Tensor, number: int, base: int) -> Tensor:
    """Return `number` places, int32; raise ValueError if there is another number of them."""
    ends = places_of_bits(bits)
    if len(ends) != number:
        raise ValueError(f"the bits of the quotients must have {number} ones; got {len(ends)}.")
    if base == 1:
        return ends
    # The place of flag i is base * (ends[i] - i) + i + the sum of all digits up to the i-th.
    steps = unpack_digits(digits, number, base).sub_(base - 1).cumsum(0, dtype=torch.int32)
    return ends.mul_(base).add_(steps).add_(base - 1)


def divided(numbers: Tensor, base: int) -> Tensor:
    """Return `numbers` (int32, not negative) // `base`, which is 2^b or 3 * 2^b."""
    bits = (base & -base).bit_length() - 1
    high = numbers >> bits
    # Exact for numbers of 32 bits, and faster than a division of integers.
    return high if base >> bits == 1 else high.double().add_(0.5).mul_(1 / 3).int()


def _bases_near(wanted: float) -> list[int]:
    """Return the bases below and above `wanted`."""
    above = base_for(int(wanted) + 1)
    return [max(1, above // 4 * 3 if above & above - 1 == 0 else above // 3 * 2), above]


def _bits(gaps: Tensor, base: int) -> float:
    return float(divided(gaps, base).sum()) + len(gaps) * bits_per_digit(base)
