"""What precedes the pieces of a coded tensor: how they are coded, and how long each is."""

import zlib
from dataclasses import dataclass

import torch
from torch import Tensor

from parasparse.files.bits import buffer
from parasparse.files.codes.bins import Bins
from parasparse.files.codes.cursor import Cursor
from parasparse.files.codes.digits import base_of_code, code_of_base
from parasparse.files.codes.flags import FlagCode, Kind
from parasparse.files.codes.numbers import NumberReader, pack_number

_SIGNED = 8  # in the byte of the kind: the highest bits of words are in no bin
_GAP = 128  # in the byte of a width: a gap precedes the bin
_MOST_WORDS = 1 << 26  # of a piece
_LEAST_RECORD = 8  # bytes


@dataclass(frozen=True)
class Record:
    """A piece.

    Args:
        kept: how many of its units are kept.
        base: base of its Golomb codes.
        bits: bytes of the bits of its Golomb codes.
        nbytes: bytes of the piece.
        crc32: checksum of these bytes.
    """

    kept: int
    base: int
    bits: int
    nbytes: int
    crc32: int


@dataclass(frozen=True, eq=False)
class Head:
    """How a tensor is coded.

    Args:
        unit: rows and columns of a unit.
        size: units in each piece but the last.
        flags: how it is coded which units are kept.
        bins: how each column of the entries of kept units is coded.
        records: the pieces.
    """

    unit: tuple[int, int]
    size: int
    flags: FlagCode
    bins: list[Bins]
    records: list[Record]


@dataclass(frozen=True)
class Layout:
    """What the head of a tensor must fit.

    Args:
        matrix: rows and columns of the tensor.
        per_entry: words of an entry: two if it is complex.
        itemsize: bytes of a word.
    """

    matrix: tuple[int, int]
    per_entry: int
    itemsize: int

    @property
    def sign(self) -> int:
        """The highest bit of the last column of a word."""
        return 1 << 8 * min(2, self.itemsize) - 1


def pack_head(head: Head) -> Tensor:
    """Return the bytes of `head`, the checksum of all others last."""
    start = pack_number(head.flags.kind + (_SIGNED if head.bins[-1].sign else 0))
    parts = [start, *(pack_number(number) for number in (*head.unit, head.size))]
    if head.flags.kind in (Kind.FOURS, Kind.EIGHTS):
        patterns = head.flags.patterns
        parts += [pack_number(len(patterns)), bytes(patterns.tolist())]
    parts += [_packed_bins(bins) for bins in head.bins]
    parts += [_packed_record(record) for record in head.records]
    data = b"".join(parts)
    data = (len(data) + 8).to_bytes(4, "little") + data
    data += zlib.crc32(data).to_bytes(4, "little")
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)


def _packed_bins(bins: Bins) -> bytes:
    end, widths, gaps = 0, [], []
    for low, width in zip(bins.lows, bins.widths, strict=True):
        widths.append(width if low == end else width + _GAP)
        gaps.append((low - end).to_bytes(2, "little") if low != end else b"")
        end = low + (1 << width)
    return b"".join([pack_number(len(widths)), bytes(widths), *gaps])


def _packed_record(record: Record) -> bytes:
    numbers = (record.kept, code_of_base(record.base), record.bits, record.nbytes)
    packed = b"".join(pack_number(number) for number in numbers)
    return packed + record.crc32.to_bytes(4, "little")


def unpack_head(cursor: Cursor, layout: Layout) -> Head:
    """Return the head at `cursor`; raise ValueError if it is damaged, or does not fit `layout`."""
    reader = _checked(cursor)
    kind, tall, wide, size = (reader.number() for _ in range(4))
    (rows, columns), words = layout.matrix, tall * wide * layout.per_entry
    if min(tall, wide, size) == 0 or rows % tall or columns % wide:
        raise ValueError(f"units of {tall} x {wide}, {size} to a piece, do not fit {layout}.")
    flags = _unpack_flag_code(reader, Kind(kind & ~_SIGNED))
    number = max(1, layout.itemsize // 2)
    signs = [0] * (number - 1) + [layout.sign if kind & _SIGNED else 0]
    bins = [_unpack_bins(reader, sign) for sign in signs]
    units = rows // tall * (columns // wide)
    pieces = -(-units // size)
    if _LEAST_RECORD * pieces > reader.left:
        raise ValueError(f"{pieces} pieces do not fit {reader.left} bytes.")
    records = [_unpack_record(reader) for _ in range(pieces)]
    for place, record in enumerate(records):
        most = min(size, units - place * size, max(1, _MOST_WORDS // max(1, words)))
        if record.kept > most:
            raise ValueError(f"{record} is impossible.")
    if reader.left or sum(record.nbytes for record in records) != cursor.left:
        raise ValueError("the lengths of the pieces do not add up.")
    return Head((tall, wide), size, flags, bins, records)


def _checked(cursor: Cursor) -> NumberReader:
    """Return a reader of the head but for its length and its checksum."""
    length = cursor.take(4)
    nbytes = int.from_bytes(bytes(length.tolist()), "little")
    rest = bytes(buffer(cursor.take(nbytes - 4)))
    data, crc32 = bytes(length.tolist()) + rest[:-4], rest[-4:]
    if zlib.crc32(data).to_bytes(4, "little") != crc32:
        raise ValueError("the checksum does not match.")
    return NumberReader(data[4:])


def _unpack_flag_code(reader: NumberReader, kind: Kind) -> FlagCode:
    patterns = reader.take(reader.number()) if kind in (Kind.FOURS, Kind.EIGHTS) else b""
    return FlagCode(kind, torch.tensor(list(patterns), dtype=torch.uint8))


def _unpack_bins(reader: NumberReader, sign: int) -> Bins:
    lows, widths, end = [], [], 0
    coded = reader.take(reader.number())
    for byte in coded:
        gap = int.from_bytes(reader.take(2), "little") if byte & _GAP else 0
        lows.append(end + gap)
        widths.append(byte & ~_GAP)
        end = lows[-1] + (1 << widths[-1])
    if not coded or max(widths) > 16 or lows[-1] > 0xFFFF:
        raise ValueError("the table of bins is impossible.")
    return Bins(tuple(lows), tuple(widths), sign)


def _unpack_record(reader: NumberReader) -> Record:
    kept, code, bits, nbytes = (reader.number() for _ in range(4))
    return Record(kept, base_of_code(code), bits, nbytes, int.from_bytes(reader.take(4), "little"))
