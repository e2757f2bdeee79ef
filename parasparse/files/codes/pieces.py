"""Pieces of a tensor: runs of units, each coded apart from the others."""

import zlib
from dataclasses import dataclass

import torch
from torch import Tensor

from parasparse.files.bits import buffer
from parasparse.files.codes.bins import Bins
from parasparse.files.codes.cursor import Cursor
from parasparse.files.codes.flags import FlagCode, Kind, pack_flags, unpack_flags
from parasparse.files.codes.head import Head, Record
from parasparse.files.codes.places import places_of
from parasparse.files.codes.values import pack_values, unpack_values


@dataclass(frozen=True, eq=False)
class Piece:
    """Which units of a piece are kept, as flags and as places (None: all), and their words."""

    flags: Tensor
    places: Tensor | None
    words: Tensor


def kept_piece(flags: Tensor, words: Tensor, kind: Kind) -> Piece:
    """Return the piece of the units whose `words` [units, words of each] are given."""
    if kind is Kind.NOTHING:
        return Piece(flags, None, words.reshape(-1))
    places = places_of(flags)
    return Piece(flags, places, words.index_select(0, places).view(-1))


def pack_piece(piece: Piece, flag_code: FlagCode, bins: list[Bins]) -> tuple[Record, Tensor]:
    """Return the record and the bytes of a piece."""
    flags = pack_flags(piece.flags, piece.places, flag_code)
    data = torch.cat([flags.bits, *flags.digits, *pack_values(piece.words, bins)])
    crc32 = zlib.crc32(buffer(data))
    kept = len(piece.flags if piece.places is None else piece.places)
    return Record(kept, flags.base, len(flags.bits), len(data), crc32), data


def unpack_piece(
    data: Tensor, record: Record, total: int, unit_words: int, itemsize: int, head: Head
) -> tuple[Tensor | None, Tensor]:
    """Return the places of the units that are kept, None if all are, and their words."""
    if zlib.crc32(buffer(data)) != record.crc32:
        raise ValueError("the checksum of a piece does not match.")
    cursor = Cursor(data)
    places = unpack_flags(cursor, head.flags, total, record.kept, record.base, record.bits)
    words = unpack_values(cursor, head.bins, record.kept * unit_words, itemsize)
    if cursor.left:
        raise ValueError(f"{cursor.left} bytes of a piece are left over.")
    return places, words
