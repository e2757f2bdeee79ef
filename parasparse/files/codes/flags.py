"""Which rectangles of a tensor are kept: flags, coded in one of five ways."""

import math
from dataclasses import dataclass
from enum import IntEnum

import torch
from torch import Tensor

from parasparse.files.codes.cursor import Cursor
from parasparse.files.codes.digits import (
    base_for,
    bits_per_digit,
    digits_nbytes,
    pack_digits,
    pack_fields,
    unpack_digits,
    unpack_fields,
)
from parasparse.files.codes.places import pack_places, places_of, unpack_places

_SOME = 1 << 13


class Kind(IntEnum):
    """What is written of the flags."""

    NOTHING = 0  # all are set
    SET = 1  # the places of those that are set
    UNSET = 2  # the places of those that are not
    FOURS = 3  # the pattern of each four of them
    EIGHTS = 4  # the pattern of each eight


@dataclass(frozen=True, eq=False)
class FlagCode:
    """How the flags of a tensor are coded; `patterns` are those that occur, ascending, uint8."""

    kind: Kind
    patterns: Tensor


@dataclass(frozen=True, eq=False)
class PackedFlags:
    """Coded flags of a piece: the base and the bits of Golomb codes, and digits, as bytes."""

    base: int
    bits: Tensor
    digits: list[Tensor]


def entropy(number: int, total: int) -> float:
    """Return the bits that the places of `number` of `total` take at least, about."""
    if number in (0, total):
        return 0.0
    share = number / total
    return -total * (share * math.log2(share) + (1 - share) * math.log2(1 - share))


def choose_flag_code(flags: Tensor, number: int, piece: int) -> FlagCode:
    """Return the code that takes the fewest bits for `flags`: 1-D, uint8, `number` 1 and others 0.

    They are packed `piece` at a time. Patterns do not go on from one piece to the next.
    """
    none, total = torch.zeros(0, dtype=torch.uint8), len(flags)
    if number == total:
        return FlagCode(Kind.NOTHING, none)
    found, least = (
        FlagCode(Kind.SET if number <= total / 2 else Kind.UNSET, none),
        entropy(number, total),
    )
    for kind, size in ((Kind.FOURS, 4), (Kind.EIGHTS, 8)):
        if piece % size and piece < total:
            continue
        for part in (flags[:_SOME], flags):  # if even some have many patterns, all have
            counts = torch.bincount(_patterns(part, size).int(), minlength=1 << size)
            patterns = counts.nonzero().squeeze(1).to(torch.uint8)
            bits = -(-total // size) * bits_per_digit(base_for(len(patterns))) + 8 * len(patterns)
            if bits >= least:
                break
        else:
            found, least = FlagCode(kind, patterns), bits
    return found


def pack_flags(flags: Tensor, places: Tensor | None, code: FlagCode) -> PackedFlags:
    """Return the bytes for the flags of a piece, which are set at `places`; None: all are."""
    nothing = flags.new_zeros(0)
    if places is None:
        return PackedFlags(1, nothing, [])
    if code.kind in (Kind.SET, Kind.UNSET):
        if code.kind is Kind.UNSET:
            flags = 1 - flags
            places = places_of(flags)
        golomb = pack_places(flags, places)
        return PackedFlags(golomb.base, golomb.bits, golomb.digits)
    numbers = torch.zeros(256, dtype=torch.int32)
    numbers[code.patterns.long()] = torch.arange(len(code.patterns), dtype=torch.int32)
    size = _SIZES[code.kind]
    digits = numbers.index_select(0, _patterns(flags, size).int())
    return PackedFlags(1, nothing, pack_digits(digits, base_for(len(code.patterns))))


def unpack_flags(
    cursor: Cursor, code: FlagCode, total: int, number: int, base: int, nbits: int
) -> Tensor | None:
    """Return the places of the `number` set ones of `total` flags, int32; None if all are set.

    Args:
        cursor: at the bytes of the flags.
        code: how the flags are coded.
        total: number of flags.
        number: how many of them are set.
        base: base of the Golomb codes.
        nbits: bytes of the bits of the Golomb codes.
    """
    bits = cursor.take(nbits)
    if code.kind is Kind.NOTHING:
        found = None
    elif code.kind is Kind.SET:
        found = unpack_places(bits, cursor.take(digits_nbytes(number, base)), number, base)
    elif code.kind is Kind.UNSET:
        digits = cursor.take(digits_nbytes(total - number, base))
        unset = unpack_places(bits, digits, total - number, base)
        flags = torch.ones(total, dtype=torch.uint8)
        found = places_of(flags.scatter_(0, unset.long(), 0))
    else:
        size, base = _SIZES[code.kind], base_for(len(code.patterns))
        groups = -(-total // size)
        digits = unpack_digits(cursor.take(digits_nbytes(groups, base)), groups, base)
        found = _places_of_patterns(code.patterns, digits, size, total)
    are_set = total if found is None else len(found)
    if are_set != number:
        raise ValueError(f"{number} flags must be set; {are_set} are.")
    return found


_SIZES = {Kind.FOURS: 4, Kind.EIGHTS: 8}
_WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # of so many bytes


def _places_of_patterns(patterns: Tensor, digits: Tensor, size: int, total: int) -> Tensor:
    """Return where `total` flags are set, whose patterns of `size` each are given by `digits`."""
    flags = unpack_fields(patterns, 8 * len(patterns), 1).view(-1, 8)[:, :size].contiguous()
    number = int(flags[0].sum())
    if number not in _WORDS or not bool((flags.sum(1) == number).all()):
        chosen = flags.view(_WORDS[size]).view(-1).index_select(0, digits)
        return places_of(chosen.view(torch.uint8)[:total])
    # Each pattern sets equally many, as N:M does: their places in it are a word.
    places = flags.nonzero()[:, 1].to(torch.uint8).view(_WORDS[number])
    chosen = places.index_select(0, digits).view(torch.uint8)
    groups = torch.arange(len(chosen), dtype=torch.int32) >> number.bit_length() - 1
    found = groups.mul_(size).add_(chosen)
    return found[found < total] if total % size else found  # as a damaged file may have it


def _patterns(flags: Tensor, size: int) -> Tensor:
    """Return each `size` flags as a number, the first in the lowest bit."""
    groups = -(-len(flags) // size)
    patterns = pack_fields(flags, 1)
    return patterns if size == 8 else unpack_fields(patterns, groups, 4)
