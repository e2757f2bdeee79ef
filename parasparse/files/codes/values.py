"""Values, as columns of 8 or 16 bits, each coded by the number of its bin and the offset in it.

A word of 1 byte is one column; a longer one has a column for each 2 bytes, the lowest first. The
highest bit of the highest column, the sign of floating-point numbers, may be in no bin, but beside
its number.
"""

from collections.abc import Iterable
from dataclasses import replace

import torch
from torch import Tensor

from parasparse.files.codes.bins import PLAIN, Bins, choose_bins, is_noise
from parasparse.files.codes.cursor import Cursor
from parasparse.files.codes.digits import (
    digits_nbytes,
    pack_digits,
    pack_fields,
    unpack_digits,
    unpack_fields,
)
from parasparse.files.codes.offsets import pack_offsets, unpack_offsets
from parasparse.files.units import WORDS

_SOME = 1 << 13


def choose_bins_of_columns(pieces: list[Tensor], itemsize: int, *, is_floating: bool) -> list[Bins]:
    """Return the bins of each column that take few bits for `pieces`, integers of `itemsize`."""
    last = max(1, itemsize // 2) - 1
    bins = [_bins_of_low(pieces, index) for index in range(last)]
    total = max(1, sum(len(words) for words in pieces))
    negative = sum(int((words < 0).count_nonzero()) for words in pieces) / total
    tried = []
    if is_floating:
        sign = 1 << min(8 * itemsize, 16) - 1
        apart = choose_bins(*_counts(_column(words, last) & sign - 1 for words in pieces))
        tried.append(replace(apart, sign=sign, nbits=apart.nbits + total))
    if not (is_floating and 0.2 < negative < 0.8):
        tried.append(choose_bins(*_counts(_column(words, last) for words in pieces)))
    return [*bins, min(tried, key=lambda one: one.nbits)]


def _bins_of_low(pieces: list[Tensor], index: int) -> Bins:
    """Return the bins of a column but the last, which is noise in most weights."""
    step = sum(len(words) for words in pieces) // _SOME | 1
    some = [_column(words[::step], index) for words in pieces]
    if some and is_noise(torch.bincount(torch.cat(some), minlength=1 << 16)):
        return PLAIN
    return choose_bins(*_counts(_column(words, index) for words in pieces))


def _counts(columns: Iterable[Tensor]) -> tuple[Tensor, int]:
    """Return how often each number occurs, from the least to the largest, and the least."""
    counts, least, end = torch.zeros(1 << 16, dtype=torch.int64), 1 << 16, 0
    for column in columns:
        if len(column):
            first = int(column.min())
            found = torch.bincount(column - first)
            counts[first : first + len(found)] += found
            least, end = min(least, first), max(end, first + len(found))
    return (counts[least:end], least) if end else (counts[:1], 0)


def _column(words: Tensor, index: int) -> Tensor:
    """Return a column of integers `words` (1-D), int32; the first is the lowest."""
    if words.element_size() == 1:
        return words.contiguous().view(torch.uint8).int()
    return (words >> 16 * index if index else words).int() & 0xFFFF


def pack_values(words: Tensor, bins: list[Bins]) -> list[Tensor]:
    """Return the bytes of integers `words` (1-D), to be joined."""
    parts = []
    for index, of_column in enumerate(bins):
        if of_column.is_plain:
            parts.append(pack_fields(words >> 16 * index if index else words, 16))
            continue
        column = _column(words, index)
        coded = of_column.of_numbers.index_select(0, column)
        parts += pack_digits(coded & (1 << 10) - 1, of_column.base)
        offsets = coded >> 15
        if of_column.width in (8, 16):
            parts.append(pack_fields(offsets, of_column.width))
        elif of_column.width != 0:
            parts.append(pack_offsets(offsets, coded >> 10 & 31))
    return parts


def unpack_values(cursor: Cursor, bins: list[Bins], number: int, itemsize: int) -> Tensor:
    """Return the next `number` integers of `itemsize` bytes, 1-D."""
    return _joined([_unpack_column(cursor, one, number) for one in bins]).to(WORDS[itemsize])


def _unpack_column(cursor: Cursor, bins: Bins, number: int) -> Tensor:
    if bins.is_plain:
        return cursor.numbers(number, torch.uint16).int()
    digits = unpack_digits(cursor.take(digits_nbytes(number, bins.base)), number, bins.base)
    coded = bins.of_digits.index_select(0, digits)
    lows = coded >> 5
    if bins.width == 0:
        return lows
    if bins.width in (8, 16):
        nbytes = number * bins.width // 8
        return lows.add_(unpack_fields(cursor.take(nbytes), number, bins.width).int())
    return unpack_offsets(cursor, coded.bitwise_and_(31)).add_(lows)


def _joined(columns: list[Tensor]) -> Tensor:
    """Return integers of 16 bits each, int32, as words of which the first is the lowest part."""
    if len(columns) == 1:
        return columns[0]
    halves = [
        high.bitwise_left_shift_(16).bitwise_or_(low)
        for low, high in zip(columns[::2], columns[1::2], strict=True)
    ]
    return halves[0] if len(halves) == 1 else torch.stack(halves, 1).view(torch.int64).squeeze(1)
