"""Several small tensors of one dtype coded as one, in a single piece.

Coding a tensor takes some hundred calls of torch functions, however small it is. Weights that were
pruned in the same way have the same distribution, except for their scale. So each tensor has a
shift, which is subtracted from the exponents of its entries, and one table of bins fits them all.
Quantized weights have few values, but not the same in each tensor, so each needs its own table.
"""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from math import log2

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from parasparse.files.codes.cursor import Cursor
from parasparse.files.codes.flags import Kind, choose_flag_code
from parasparse.files.codes.head import Head, Layout, pack_head, unpack_head
from parasparse.files.codes.pieces import Piece, pack_piece, unpack_piece
from parasparse.files.codes.places import places_of
from parasparse.files.codes.tensors import choose_units
from parasparse.files.codes.values import choose_bins_of_columns
from parasparse.files.units import kept_entries, words_of

MOST_ENTRIES = 1 << 18  # in a tensor that is joined with others
MOST_KEPT = 1 << 17  # of them that are kept
_MANY = 1 << 10  # kept entries; with fewer, a table of bins that does not fit them costs little
_SAMPLE = 256


@dataclass(frozen=True, eq=False)
class Small:
    """A tensor that may be joined with others of its dtype.

    Args:
        words: its entries as integers, 1-D.
        dtype: its dtype.
        flags: which of them are not 0, uint8.
        kept: how many of them are not 0.
        kind: equal for tensors that may be joined.
    """

    words: Tensor
    dtype: torch.dtype
    flags: Tensor
    kept: int
    kind: Hashable


def small(tensors: Sequence[Tensor]) -> list[Small | None]:
    """Return tensors of one dtype prepared for joining, or None for one better coded alone."""
    found = [_flagged(tensor) for tensor in tensors]
    many = [i for i, one in enumerate(found) if one is not None and one.kept >= _MANY]
    few = _have_few_values([one for one in found if one is not None and one.kept >= _MANY])
    for place, has_few in zip(many, few, strict=True):
        found[place] = None if has_few else found[place]
    return found


def _flagged(tensor: Tensor) -> Small | None:
    """Return `tensor` prepared for joining, or None; its values are not looked at."""
    dtype, number = tensor.dtype, tensor.numel()
    if not 0 < number <= MOST_ENTRIES or dtype.is_complex:
        return None
    words = words_of(tensor.cpu())
    entries = kept_entries(words, dtype, tuple(tensor.shape))
    kept = int(entries.count_nonzero())
    flags = entries.view(-1).view(torch.uint8)
    if kept == 0:
        return Small(words, dtype, flags, 0, None)
    if kept > MOST_KEPT or choose_units(entries, kept, dtype, tuple(tensor.shape)).unit != (1, 1):
        return None
    is_even = kept < number and 8 * kept % number == 0 and _is_even(flags)
    if is_even and number % 8:
        return None  # the patterns of the next tensor would not start where a byte does
    return Small(
        words, dtype, flags, kept, (kept == number, round(2 * log2(kept / number)), is_even)
    )


def _have_few_values(parts: list[Small]) -> list[bool]:
    """Whether entries of each that follow each other have less than half of the values possible."""
    if not parts or parts[0].dtype.itemsize == 1:
        return [False] * len(parts)
    dtype, samples = parts[0].dtype, [_some_values(part) for part in parts]
    steps = 1 / torch.finfo(dtype).eps if dtype.is_floating_point else _SAMPLE
    zeros = samples[0].new_zeros(_SAMPLE + 1)
    ordered = pad_sequence([*samples, zeros], batch_first=True)[:-1].sort(1).values
    different = (ordered[:, 1:] != ordered[:, :-1]).sum(1)  # from each other and from the padding
    return [
        2 * number < min(len(some), steps)
        for number, some in zip(different.tolist(), samples, strict=True)
    ]


def _some_values(part: Small) -> Tensor:
    """Return kept entries that follow each other, at most `_SAMPLE`."""
    length = len(part.words) * _SAMPLE // part.kept
    start = (len(part.words) - length) // 2
    places = part.flags.narrow(0, start, length).nonzero().view(-1)[:_SAMPLE]
    return part.words.narrow(0, start, length).index_select(0, places)


def _is_even(flags: Tensor) -> bool:
    """Whether each eight flags in a row have equally many set, as far as the first ones tell."""
    some = flags[: min(_SAMPLE, len(flags) // 8 * 8)].view(-1, 8).sum(1)
    return len(some) > 0 and bool((some == some[0]).all())


def encode_joined(parts: list[Small]) -> tuple[Tensor, list[int]]:
    """Return the bytes of tensors of one kind, and the shift of each."""
    dtype = parts[0].dtype
    flags, words = torch.cat([p.flags for p in parts]), torch.cat([p.words for p in parts])
    number = sum(part.kept for part in parts)
    flag_code = choose_flag_code(flags, number, len(flags))
    places = None if flag_code.kind is Kind.NOTHING else places_of(flags)
    words = words if places is None else words.index_select(0, places)
    kept = [part.kept for part in parts]
    is_floating = dtype.is_floating_point
    shifts = _shifts(words, torch.tensor(kept)) if is_floating and number else [0] * len(kept)
    words = _shifted(words, [-shift for shift in shifts], kept)
    bins = choose_bins_of_columns([words], dtype.itemsize, is_floating=is_floating)
    record, data = pack_piece(Piece(flags, places, words), flag_code, bins)
    head = pack_head(Head((1, 1), len(flags), flag_code, bins, [record]))
    return torch.cat([head, data]), shifts


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
    words = _shifted(words, shifts, upto.diff(prepend=upto.new_zeros(1)).tolist())
    if places is not None:
        words = torch.zeros(total, dtype=words.dtype).scatter_(0, places.long(), words)
    return [part.clone().view(dtype) for part in words.split(numbers)]


def _shifts(words: Tensor, numbers: Tensor) -> list[int]:
    """Return shifts with which about 1 in 20 of each tensor's exponents lies below the same number.

    Of pruned weights, that is just above the threshold, so it hardly depends on the sample. The
    least shift is 0, so that most exponents stay where they were, and few are below 0.

    Args:
        words: of all tensors.
        numbers: how many are of each, at least 1.
    """
    starts = (numbers.cumsum(0) - numbers).unsqueeze(1)
    places = torch.arange(_SAMPLE).mul(numbers.unsqueeze(1)).floor_divide_(_SAMPLE).add_(starts)
    some = words.index_select(0, places.view(-1)).view(-1, _SAMPLE)
    low = (_magnitudes(some) >> _bits_below(words)).kthvalue(_SAMPLE // 20).values.long()
    shifts: list[int] = (low - low.min()).tolist()
    return shifts


def _shifted(words: Tensor, shifts: list[int], numbers: list[int]) -> Tensor:
    """Return `words` with `shifts` added to the exponents; `numbers` counts the words of each."""
    if not any(shifts):
        return words
    added, bits = words.clone(), _bits_below(words)
    for part, shift in zip(added.split(numbers), shifts, strict=True):
        part += shift << bits
    return added.bitwise_xor_(words).bitwise_and_(~_SIGNS[words.dtype]).bitwise_xor_(words)


def _magnitudes(words: Tensor) -> Tensor:
    """Return `words` with the highest bit 0."""
    return words & ~_SIGNS[words.dtype]


def _bits_below(words: Tensor) -> int:
    """Return the bits of a word below its last column."""
    return max(0, 8 * words.itemsize - 16)


_SIGNS = {d: torch.iinfo(d).min for d in (torch.int8, torch.int16, torch.int32, torch.int64)}
