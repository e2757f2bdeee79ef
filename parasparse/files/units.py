"""Tensors as matrices of rectangles that are dropped where all bits are 0."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

# Zeros are found by their bits, because -0.0 and nan payloads are kept. 16 bytes are two words.
WORDS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64, 16: torch.int64}
Unit = tuple[int, int]
# Takes how many of all rectangles are kept; returns the bits that it takes to tell which.
PlaceBits = Callable[[int, int], float]


@dataclass(frozen=True, eq=False)
class Units:
    """A tensor as rectangles of one size.

    Args:
        unit: rows and columns of a rectangle of the matrix (shape[0], product of the others).
        kept: bool, one entry per rectangle: whether any bit in it is 1.
    """

    unit: Unit
    kept: Tensor


def words_of(tensor: Tensor) -> Tensor:
    """Return the entries of `tensor` as integers, 1-D, not copied if it is contiguous."""
    entries = tensor.detach().resolve_conj().resolve_neg().contiguous()
    # Contiguous tensors of one entry, or none, may have any strides.
    flat = entries.as_strided((entries.numel(),), (1,))
    return flat.view(WORDS[tensor.dtype.itemsize])


def matrix(shape: tuple[int, ...]) -> Unit:
    """Return the rows and columns of a tensor as a matrix (shape[0], product of the others)."""
    return (shape[0], math.prod(shape[1:])) if shape else (1, 1)


def words_per_entry(dtype: torch.dtype) -> int:
    """Return how many integers of `words_of` an entry takes."""
    return max(1, dtype.itemsize // 8)


def kept_entries(words: Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    """Return which entries have a bit that is 1, as a matrix."""
    kept = words.bool()  # 6 times faster than `!= 0`
    if words_per_entry(dtype) > 1:
        kept = kept.view(-1, words_per_entry(dtype)).any(1)
    return kept.view(matrix(shape))


def cheapest(kept: Tensor, inner: int, entry_bits: float, place_bits: PlaceBits) -> Units | None:
    """Return the rectangles that take the fewest bits; None if all entries are better kept.

    Args:
        kept: bool, which entries of the matrix are not 0.
        inner: number of columns per index of the second dim.
        entry_bits: bits of a kept entry.
        place_bits: bits to tell which rectangles are kept.
    """
    rows, columns = kept.shape
    number = int(kept.count_nonzero())
    if number == kept.numel():
        return None
    if number == 0:
        return Units((rows, columns), kept.new_zeros(1, 1))
    found, least = None, kept.numel() * entry_bits
    for chain in _chains(rows, columns, inner):
        grid, last = kept, (1, 1)
        for unit in chain:
            grid = _coarser(grid, unit[0] // last[0], unit[1] // last[1])
            held = number if grid is kept else int(grid.count_nonzero())
            values = held * unit[0] * unit[1] * entry_bits
            if values >= least:  # coarser units keep at least as much
                break
            total, last = values + place_bits(held, grid.numel()), unit
            if total < least:
                found, least = Units(unit, grid), total
    return found


def _chains(rows: int, columns: int, inner: int) -> Iterator[list[Unit]]:
    """Yield lists of units to try, each a multiple of the previous one in its list."""
    # Entries, kernels, slices along the first dim, along the second. Some often coincide.
    for unit in dict.fromkeys([(1, 1), (1, inner), (1, columns), (rows, inner)]):
        yield [unit]
    yield [(b, b) for b in (4, 8, 16, 32, 64) if rows % b == 0 == columns % b]


def _coarser(grid: Tensor, tall: int, wide: int) -> Tensor:
    """Return which `tall` x `wide` rectangles of `grid` contain a kept unit."""
    rows, columns = grid.shape
    if tall == wide == 1:
        return grid
    cut = grid.view(torch.uint8).view(rows // tall, tall, columns // wide, wide)
    cut = cut.squeeze(1) if tall == 1 else cut.amax(1)
    return cut.amax(2).view(torch.bool)  # 10 times faster than `any` over both
