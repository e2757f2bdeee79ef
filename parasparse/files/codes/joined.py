"""Several small tensors of one dtype coded as one, in a single piece.

Coding a tensor takes some hundred calls of torch functions, however small it is. Weights that were
pruned in the same way have the same distribution, except for their scale. So each tensor has a
shift, which is subtracted from the exponents of its entries, and one table of bins fits them all.
Quantized weights have few values, but not the same in each tensor, so each needs its own table.
"""

from collections.abc import Hashable
from dataclasses import dataclass
from math import log2

import torch
from torch import Tensor

from parasparse.files.codes.cursor import Cursor
from parasparse.files.codes.flags import Kind, choose_flag_code
from parasparse.files.codes.head import Head, Layout, pack_head, unpack_head
from parasparse.files.codes.pieces import Piece, pack_piece, unpack_piece
from parasparse.files.codes.places import places_of
from parasparse.files.codes.tensors import choose_units
from parasparse.files.codes.values import choose_bins_of_columns
from parasparse.files.units import words_of

MOST_ENTRIES = 1 << 18  # in a tensor that is joined with others
MOST_KEPT = 1 << 17  # of them that are kept
_MANY = 1 << 10  # kept entries; with fewer, a table of bins that does not fit them costs little
_SAMPLE = 256


@dataclass(frozen=True, eq=False)
class Small:
    """A tensor that may be joined with others of its dtype.

    Args:
        words: its entries as integers, 1-D.
        flags: which of them are not 0, uint8.
        kept: how many of them are not 0.
        kind: equal for tensors that may be joined.
    """

    words: Tensor
    flags: Tensor
    kept: int
    kind: Hashable


def small(tensor: Tensor) -> Small | None:
    """Return `tensor` prepared for joining, or None if it is better coded alone."""
    dtype, number = tensor.dtype, tensor.numel()
    if not 0 < number <= MOST_ENTRIES or dtype.is_complex:
        return None
    words = words_of(tensor.cpu())
    flags = choose_units(words, dtype, tuple(tensor.shape)).kept.flatten()
    kept = int(flags.count_nonzero())
    if kept == 0:
        return Small(words, torch.zeros_like(words, dtype=torch.uint8), 0, None)
    if len(flags) < number or kept > MOST_KEPT:  # in rows or blocks, or with many kept entries
        return None
    if kept >= _MANY and _has_few_values(words, kept, dtype):
        return None
    is_even = kept < number and 8 * kept % number == 0 and _is_even(flags)
    if is_even and number % 8:
        return None  # the patterns of the next tensor would not start where a byte does
    kind = (kept == number, round(2 * log2(kept / number)), is_even)
    return Small(words, flags.view(torch.uint8), kept, kind)


def _has_few_values(words: Tensor, kept: int, dtype: torch.dtype) -> bool:
    """Whether entries that follow each other have less than half of the values they could have."""
    if dtype.itemsize == 1:
        return False
    length = len(words) * _SAMPLE // kept
    some = words.narrow(0, (len(words) - length) // 2, length)
    some = some[some.bool()][:_SAMPLE]
    steps = 1 / torch.finfo(dtype).eps if dtype.is_floating_point else _SAMPLE
    return 2 * len(some.unique()) < min(len(some), steps)


def _is_even(flags: Tensor) -> bool:
    """Whether each eight flags in a row have equally many set, as far as the first ones tell."""
    some = flags[: min(_SAMPLE, len(flags) // 8 * 8)].view(torch.uint8).view(-1, 8).sum(1)
    return len(some) > 0 and bool((some == some[0]).all())


def encode_joined(parts: list[Small], dtype: torch.dtype) -> tuple[Tensor, list[int]]:
    """Return the bytes of tensors of one kind, and the shift of each."""
    flags, words = torch.cat([p.flags for p in parts]), torch.cat([p.words for p in parts])
    number = sum(part.kept for part in parts)
    flag_code = choose_flag_code(flags, number, len(flags))
    places = None if flag_code.kind is Kind.NOTHING else places_of(flags)
    words = words if places is None else words.index_select(0, places)
    kept = torch.tensor([part.kept for part in parts])
    is_floating = dtype.is_floating_point
    shifts = _shifts(words, kept) if is_floating and number else torch.zeros_like(kept)
    words = _shifted(words, -shifts, kept)
    bins = choose_bins_of_columns([words], dtype.itemsize, is_floating=is_floating)
    record, data = pack_piece(Piece(flags, places, words), flag_code, bins)
    head = pack_head(Head((1, 1), len(flags), flag_code, bins, [record]))
    return torch.cat([head, data]), shifts.tolist()


def decode_joined(
    data: Tensor, dtype: torch.dtype, numbers: list[int], shifts: list[int]
) -> list[Tensor]:
    """Return the tensors coded as `data`, 1-D; raise ValueError if they are damaged.

    Args:
        data: 1-D, uint8.
        dtype: of all of them.
        numbers: how many entries each has.
        shifts: what was subtracted from the exponents of each.
    """
    total, cursor = sum(numbers), Cursor(data)
    head = unpack_head(cursor, Layout((total, 1), 1, dtype.itemsize))
    if dtype.is_complex or head.unit != (1, 1) or head.size != total or len(head.records) != 1:
        raise ValueError(f"joined tensors must be one piece of {total} single words.")
    record = head.records[0]
    piece = cursor.take(record.nbytes)
    places, words = unpack_piece(piece, record, total, 1, dtype.itemsize, head)
    ends = torch.tensor(numbers).cumsum(0)
    upto = ends if places is None else torch.searchsorted(places, ends.int())
    words = _shifted(words, torch.tensor(shifts), upto.diff(prepend=upto.new_zeros(1)))
    if places is not None:
        words = torch.zeros(total, dtype=words.dtype).scatter_(0, places.long(), words)
    return [part.clone().view(dtype) for part in words.split(numbers)]


def _shifts(words: Tensor, numbers: Tensor) -> Tensor:
    """Return the shift of each tensor: about a tenth of its exponents lie below.

    Args:
        words: of all tensors.
        numbers: how many are of each, at least 1.
    """
    steps = torch.arange(_SAMPLE) * numbers.unsqueeze(1) // _SAMPLE
    some = words[steps + (numbers.cumsum(0) - numbers).unsqueeze(1)]
    return (_magnitudes(some) >> _bits_below(words)).kthvalue(_SAMPLE // 10).values.long()


def _shifted(words: Tensor, shifts: Tensor, numbers: Tensor) -> Tensor:
    """Return `words` with `shifts` added to the exponents; `numbers` counts the words of each."""
    if not shifts.any():
        return words
    added = (shifts << _bits_below(words)).to(words.dtype).repeat_interleave(numbers)
    return _magnitudes(words + added) | words & _SIGNS[words.dtype]


def _magnitudes(words: Tensor) -> Tensor:
    """Return `words` with the highest bit 0."""
    return words & ~_SIGNS[words.dtype]


def _bits_below(words: Tensor) -> int:
    """Return the bits of a word below its last column."""
    return max(0, 8 * words.itemsize - 16)


_SIGNS = {d: torch.iinfo(d).min for d in (torch.int8, torch.int16, torch.int32, torch.int64)}
