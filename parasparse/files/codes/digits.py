"""Numbers below a bound, packed into bytes: all in the same number of bits.

A field has 1, 2, 4, 8 or 16 bits. Digits of base 2^b are split into fields, digits of base 3 * 2^b
into fields and numbers below 3, of which five make a byte.
"""

from functools import cache, reduce

import torch
from torch import Tensor

WIDTHS = (16, 8, 4, 2, 1)
_WORDS = {4: torch.int16, 2: torch.int32, 1: torch.int64}  # as many bytes as a byte has fields


def base_for(number: int) -> int:
    """Return the smallest base that holds the digits below `number`: 2^b or 3 * 2^b.

    Examples:
        >>> [base_for(number) for number in (1, 2, 3, 4, 5, 7, 9, 13)]
        [1, 2, 3, 4, 6, 8, 12, 16]
    """
    power = 1 << max(0, number - 1).bit_length()
    return power // 4 * 3 if power // 4 * 3 >= max(3, number) else power


def code_of_base(base: int) -> int:
    """Return the number that stands for a base: 2 * b, and 1 more if it is 3 * 2^b."""
    bits, three = _parts(base)
    return 2 * bits + three


def base_of_code(code: int) -> int:
    """Return the base that `code` stands for; raise ValueError if it is larger than 2^31."""
    if code > 62:
        raise ValueError(f"a base of code {code} is impossible.")
    return (3 if code % 2 else 1) << code // 2


def bits_per_digit(base: int) -> float:
    """Return the bits that a digit takes, without the padding of the last byte."""
    bits, three = _parts(base)
    return bits + 1.6 * three


def digits_nbytes(number: int, base: int) -> int:
    """Return the bytes of `number` digits."""
    bits, three = _parts(base)
    fields = sum(-(-number * width // 8) for width in WIDTHS if bits & width)
    return fields + three * -(-number // 5)


def pack_digits(digits: Tensor, base: int) -> list[Tensor]:
    """Return the bytes of `digits` (1-D, int32, below `base`), to be joined."""
    bits, three = _parts(base)
    parts, done = [], 0
    digits = digits.to(torch.uint8) if base <= 256 else digits
    for width in (width for width in reversed(WIDTHS) if bits & width):
        parts.append(pack_fields(digits >> done & (1 << width) - 1, width))
        done += width
    if three:
        high = (digits >> bits).to(torch.uint8)
        fives = torch.cat([high, high.new_zeros(-len(high) % 5)]).view(-1, 5)
        parts.append(reduce(lambda found, digit: found * 3 + digit, reversed(fives.unbind(1))))
    return parts


def unpack_digits(data: Tensor, number: int, base: int) -> Tensor:
    """Return the first `number` digits in the bytes `data`, int32."""
    bits, three = _parts(base)
    small, large = [], []  # parts of the digits, uint8 and int32
    at = done = 0
    for width in (width for width in reversed(WIDTHS) if bits & width):
        nbytes = -(-number * width // 8)
        part = data[at : at + nbytes]
        if width < 8:
            small.append(_fields(width, done).index_select(0, part.int()).view(torch.uint8))
        else:
            large.append(unpack_fields(part, number, width).int() << done)
        at, done = at + nbytes, done + width
    if three:
        high = _threes(bits).index_select(0, data[at : at + -(-number // 5)].int()).view(-1)
        (small if high.dtype == torch.uint8 else large).append(high)
    if small:
        large.append(reduce(Tensor.bitwise_or_, [part[:number] for part in small]).int())
    large = [part[:number] for part in large]
    return reduce(Tensor.bitwise_or_, large) if large else torch.zeros(number, dtype=torch.int32)


def pack_fields(numbers: Tensor, width: int) -> Tensor:
    """Return `numbers` as fields of `width` bits, from the lowest bit of the first byte up."""
    if width == 16:
        return numbers.to(torch.int16).view(torch.uint8)
    small = numbers.to(torch.uint8)
    if width == 8:
        return small
    number = 8 // width
    if len(small) % number:
        small = torch.cat([small, small.new_zeros(-len(small) % number)])
    # The product of a word, one field to a byte, has all fields in its highest byte.
    gather = sum(1 << 8 * (number - 1) - (8 - width) * i for i in range(number))
    words: Tensor = small.view(_WORDS[width]) * gather
    return (words >> 8 * (number - 1)).to(torch.uint8)


def unpack_fields(data: Tensor, number: int, width: int) -> Tensor:
    """Return the first `number` fields of `width` bits: uint8, or int32 if `width` is 16."""
    if width == 16:
        return data.clone().view(torch.uint16)[:number].int()
    if width == 8:
        return data[:number]
    return _fields(width, 0).index_select(0, data.int()).view(torch.uint8)[:number]


def _parts(base: int) -> tuple[int, bool]:
    """Return b of a base 2^b or 3 * 2^b, and whether it is the latter."""
    three = base & base - 1 != 0
    return (base // 3 if three else base).bit_length() - 1, three


@cache
def _fields(width: int, shift: int) -> Tensor:
    """Return the fields in each byte, shifted left, as one word of as many bytes."""
    fields = torch.arange(256).unsqueeze(1) >> torch.arange(0, 8, width) & (1 << width) - 1
    return (fields << shift).to(torch.uint8).flatten().view(_WORDS[width])


@cache
def _threes(shift: int) -> Tensor:
    """Return the five numbers below 3 in each byte below 243, shifted left: uint8 if they fit."""
    powers = torch.tensor([1, 3, 9, 27, 81])
    numbers = torch.arange(243).unsqueeze(1) // powers % 3 << shift
    return numbers.to(torch.uint8 if shift < 7 else torch.int32)
