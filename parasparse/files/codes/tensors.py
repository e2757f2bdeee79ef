"""Tensors as coded bytes, in pieces that are read apart: docs/packed-format.md describes them."""

import math
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch
from torch import Tensor

from parasparse.files.codes.cursor import Cursor
from parasparse.files.codes.flags import choose_flag_code, entropy
from parasparse.files.codes.head import Head, Layout, Record, pack_head, unpack_head
from parasparse.files.codes.pieces import kept_piece, pack_piece, unpack_piece
from parasparse.files.codes.values import choose_bins_of_columns
from parasparse.files.units import WORDS, Units, cheapest, kept_entries, matrix, words_of

_WORDS_OF_PIECE = 128_000  # fewer cost more in calls, more no longer fit the cache
_UNITS_OF_PIECE = 1 << 26
_LARGEST_UNIT = 1 << 20
_ROWS = 16  # in which most columns have a kept entry, if these are anywhere
_SHARE_OF_BITS = 0.75  # that coded values take, about

_From = TypeVar("_From")
_To = TypeVar("_To")


def encode(tensor: Tensor) -> Tensor:
    """Return `tensor` coded in few bits, as bytes."""
    dtype, shape = tensor.dtype, tuple(tensor.shape)
    entries = words_of(tensor.cpu())
    kept = kept_entries(entries, dtype, shape)
    units = choose_units(kept, int(kept.count_nonzero()), dtype, shape)
    words, flags = _by_unit(entries, dtype, shape, units.unit), units.kept.flatten()
    flags = flags.view(torch.uint8)
    number = int(flags.count_nonzero())
    size = _piece_size(number, words)
    flag_code = choose_flag_code(flags, number, size)
    cut = list(zip(flags.split(size), words.split(size), strict=True)) if len(flags) else []
    pieces = _in_threads(lambda one: kept_piece(*one, flag_code.kind), cut)
    is_floating = dtype.is_floating_point or dtype.is_complex
    held = [piece.words for piece in pieces]
    bins = choose_bins_of_columns(held, words.element_size(), is_floating=is_floating)
    packed = _in_threads(lambda piece: pack_piece(piece, flag_code, bins), pieces)
    head = pack_head(Head(units.unit, size, flag_code, bins, [record for record, _ in packed]))
    return torch.cat([head, *(data for _, data in packed)])


def decode(data: Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    """Return the tensor that was coded as `data`; raise ValueError if it is damaged."""
    return decode_rows(data, dtype, shape, 0, matrix(shape)[0]).view(shape)


def decode_rows(
    data: Tensor, dtype: torch.dtype, shape: tuple[int, ...], start: int, stop: int
) -> Tensor:
    """Return rows `start` to `stop` of the matrix, 1-D; only the pieces that hold them are read."""
    rows, columns = matrix(shape)
    layout = Layout((rows, columns), dtype.itemsize // _part_size(dtype), _part_size(dtype))
    cursor = Cursor(data)
    head = unpack_head(cursor, layout)
    tall, wide = head.unit
    high, low = start // tall, -(-stop // tall)  # rows of units
    across = columns // wide
    unit_words = tall * wide * layout.per_entry
    found = torch.zeros((low - high) * across, unit_words, dtype=WORDS[layout.itemsize])
    first = high * across  # unit
    jobs = []
    for place, record in enumerate(head.records):
        begin, piece = place * head.size, cursor.take(record.nbytes)
        total = min(head.size, rows // tall * across - begin)
        if begin < first + len(found) and begin + total > first:
            jobs.append((piece, record, begin - first, total))

    def unpack(job: tuple[Tensor, Record, int, int]) -> None:
        piece, record, begin, total = job
        places, words = unpack_piece(piece, record, total, unit_words, layout.itemsize, head)
        _put(found, places, words.view(-1, unit_words), begin, total)

    _in_threads(unpack, jobs)
    entries = found.view(low - high, across, tall, unit_words // tall).transpose(1, 2).reshape(-1)
    per_row = columns * layout.per_entry
    entries = entries[(start - high * tall) * per_row : (stop - high * tall) * per_row]
    return entries.view(dtype)


def _put(found: Tensor, places: Tensor | None, words: Tensor, begin: int, total: int) -> None:
    """Write units of a piece, of which `found` may hold only a part."""
    first, last = max(0, -begin), min(total, len(found) - begin)  # of the units that it holds
    part = found[begin + first : begin + last]
    if places is None:
        part.copy_(words[first:last])
        return
    index = places.long()
    if last - first < total:
        inside = (index >= first) & (index < last)
        index, words = index[inside] - first, words[inside]
    if words.shape[1] == 1:
        part.view(-1).scatter_(0, index, words.view(-1))
    else:
        part.index_copy_(0, index, words)


def choose_units(kept: Tensor, number: int, dtype: torch.dtype, shape: tuple[int, ...]) -> Units:
    """Return the units in which a tensor takes few bits; all single ones if all are kept.

    Args:
        kept: bool, which entries of the matrix are not 0.
        number: how many of them are.
        dtype: of the tensor.
        shape: of the tensor.
    """
    bits, inner = _SHARE_OF_BITS * 8 * dtype.itemsize, math.prod(shape[2:])
    if not _may_have_units(kept, number, inner, bits):
        return Units((1, 1), kept)
    found = cheapest(kept, inner, bits, entropy)
    if found is None or math.prod(found.unit) > _LARGEST_UNIT:
        return Units((1, 1), kept)
    return found


def _may_have_units(kept: Tensor, number: int, inner: int, bits: float) -> bool:
    """Whether units larger than single entries, of `bits` each, may pay.

    They save at most the bits of the places, so they may hold only few zeros.
    """
    (rows, columns), flags = kept.shape, kept.view(-1)
    if number in (0, len(flags)):
        return number == 0
    most = number + entropy(number, len(flags)) / bits
    if inner == 1 and columns % 4 == 0:
        # Units of single columns span all rows; all others hold four entries side by side.
        some = kept[:_ROWS].view(torch.uint8).amax(0).count_nonzero()
        return min(rows * int(some), 4 * int(flags.view(torch.int32).count_nonzero())) <= most
    # All kept entries in a unit but the first of each row or column follow an entry of the unit.
    shortest = min(side for side in (rows, columns, inner, 4) if side > 1)
    least = number * (1 - 1 / shortest) - (most - number)
    beside = (flags[1:] & flags[:-1]).count_nonzero()
    below = (flags[columns:] & flags[:-columns]).count_nonzero()
    return max(int(beside), int(below)) >= least


def _by_unit(
    entries: Tensor, dtype: torch.dtype, shape: tuple[int, ...], unit: tuple[int, int]
) -> Tensor:
    """Return the words of each unit, [units, words]; those of complex entries are of a part."""
    (rows, columns), (tall, wide) = matrix(shape), unit
    words = entries.view(WORDS[_part_size(dtype)])
    per_entry = dtype.itemsize // _part_size(dtype)
    cut = words.view(rows // tall, tall, columns // wide, wide * per_entry).transpose(1, 2)
    return cut.reshape(-1, tall * wide * per_entry)


def _piece_size(kept: int, words: Tensor) -> int:
    """Return how many units make a piece: 1, or a multiple of 8 that holds `_WORDS_OF_PIECE`."""
    wanted = _WORDS_OF_PIECE * len(words) // max(1, kept * words.shape[1])
    return max(1, min(wanted, _UNITS_OF_PIECE) // 8 * 8)


def _part_size(dtype: torch.dtype) -> int:
    """Return the bytes of an entry, or of each of the two parts of a complex one."""
    return dtype.itemsize // 2 if dtype.is_complex else dtype.itemsize


def _in_threads(function: Callable[[_From], _To], items: Iterable[_From]) -> list[_To]:
    """Return what `function` returns for each item, computed by as many threads as torch uses."""
    items, number = list(items), torch.get_num_threads()
    if number == 1 or len(items) < 2:
        return [function(item) for item in items]
    try:
        # Each of them works alone: threads of torch within them would wait for each other.
        with ThreadPoolExecutor(number, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            return list(pool.map(function, items))
    finally:
        torch.set_num_threads(number)  # for threads that start later
