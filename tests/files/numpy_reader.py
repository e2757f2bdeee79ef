"""A reader of packed files that shares nothing with the package: docs/packed-format.md in NumPy."""

import json
import math
import zlib

import numpy as np


class Bytes:
    """Takes bytes from the front."""

    def __init__(self, data):
        self.data, self.at = data, 0

    def take(self, number):
        assert self.at + number <= len(self.data)
        self.at += number
        return self.data[self.at - number : self.at]

    def numbers(self, number, kind):
        return np.frombuffer(self.take(number * np.dtype(kind).itemsize), kind).astype(np.int64)

    def number(self):
        (byte,) = self.take(1)
        return byte if byte < 128 else byte - 128 + 128 * self.number()


def read_safetensors(path):
    """Return the tensors of a packed safetensors file as unsigned words: {name: array}."""
    whole = path.read_bytes()
    size = int.from_bytes(whole[:8], "little")
    places = json.loads(whole[8 : 8 + size])
    assert places.pop("__metadata__") == {"format": "parasparse-packed", "version": "4"}
    parts = {n: whole[8 + size :][slice(*place["data_offsets"])] for n, place in places.items()}
    header, tensors = json.loads(zlib.decompress(parts["header"])), Bytes(parts["tensors"])
    entries, found = header["entries"], {}
    for number, nbytes in enumerate(header["streams"]):
        names = [name for name, entry in entries.items() if entry.get("stream") == number]
        found |= read_stream(tensors.take(nbytes), {name: entries[name] for name in names})
    assert tensors.at == len(tensors.data)
    names = {n: entry.get("same", n) for n, entry in entries.items() if "value" not in entry}
    return {name: found[first] for name, first in names.items()}


def read_stream(data, entries):
    """Return the tensors of a stream."""
    if not any("shift" in entry for entry in entries.values()):
        ((name, entry),) = entries.items()
        return {name: read_tensor(data, entry)}
    numbers = [math.prod(entry["shape"]) for entry in entries.values()]
    shifts = np.repeat([entry["shift"] for entry in entries.values()], numbers)
    (dtype,) = {entry["dtype"] for entry in entries.values()}
    whole = read_tensor(data, {"dtype": dtype, "shape": [sum(numbers)]}, shifts)
    parts = np.split(whole, np.cumsum(numbers)[:-1])
    return {n: p.reshape(e["shape"]) for (n, e), p in zip(entries.items(), parts, strict=True)}


def word_size(dtype):
    digits = "".join(c for c in dtype.split("_")[0] if c.isdigit()) or "8"  # bool
    return max(8, int(digits)) // 8 // (2 if dtype.startswith("complex") else 1)


def read_tensor(data, entry, shifts=None):
    """Return the words of a tensor; a complex one has a last dimension of two parts."""
    size, is_complex = word_size(entry["dtype"]), entry["dtype"].startswith("complex")
    shape = entry["shape"]
    rows, columns = (shape[0], math.prod(shape[1:])) if shape else (1, 1)
    nbytes = int.from_bytes(data[:4], "little")
    assert zlib.crc32(data[: nbytes - 4]) == int.from_bytes(data[nbytes - 4 : nbytes], "little")
    source = Bytes(data)
    source.take(4)
    kind, tall, wide, per_piece = (source.number() for _ in range(4))
    signs, kind = kind // 8, kind % 8
    patterns = source.numbers(source.number(), "u1") if kind >= 3 else None
    bins = [read_bins(source) for _ in range(max(1, size // 2))]
    units = rows // tall * (columns // wide)
    records = [read_record(source) for _ in range(-(-units // per_piece))]
    assert source.at == nbytes - 4
    source.take(4)
    per_unit = tall * wide * (2 if is_complex else 1)
    words = np.zeros((units, per_unit), f"u{size}")
    for number, record in enumerate(records):
        piece = source.take(record[3])
        assert zlib.crc32(piece) == record[4]
        start = number * per_piece
        total = min(per_piece, units - start)
        places, values = read_piece(
            Bytes(piece), record, total, (kind, patterns), (signs, bins), (per_unit, size)
        )
        values = values if shifts is None else shifted(values, shifts[start + places], size)
        words[start + places] = values.astype(f"u{size}").reshape(-1, per_unit)
    assert source.at == len(data)
    grid = words.reshape(rows // tall, columns // wide, tall, per_unit // tall).swapaxes(1, 2)
    return grid.reshape(*shape, 2) if is_complex else grid.reshape(shape)


def shifted(words, shifts, size):
    """Return `words` with the shifts added to their last columns, but for the highest bit."""
    sign = np.uint64(1 << 8 * size - 1)
    below = np.uint64(max(0, 8 * size - 16))
    return words & sign | words + (shifts.astype(np.uint64) << below) & sign - np.uint64(1)


def read_record(source):
    kept, base, bits, nbytes = (source.number() for _ in range(4))
    return kept, (1, 3)[base % 2] << base // 2, bits, nbytes, source.numbers(1, "<u4")[0]


def read_bins(source):
    coded = source.numbers(source.number(), "u1")
    gaps = iter(source.numbers((coded >= 128).sum(), "<u2"))
    lows, end = [], 0
    for byte in coded:
        lows.append(end + (next(gaps) if byte >= 128 else 0))
        end = lows[-1] + (1 << (byte & 127))
    return np.array(lows), coded & 127


def read_piece(source, record, total, units, values, sizes):
    kept, base, nbytes = record[:3]
    (kind, patterns), (signs, bins), (per_unit, size) = units, values, sizes
    bits = read_bits(source, 8 * nbytes)
    flags = np.ones(total, bool)
    if kind in (1, 2):
        number = kept if kind == 1 else total - kept
        ones = np.flatnonzero(bits)
        assert len(ones) == number
        steps = np.arange(number)
        places = base * (ones - steps) + read_digits(source, number, base).cumsum() + steps
        flags[:] = kind == 2
        flags[places] = kind == 1
    elif kind in (3, 4):
        group = 4 if kind == 3 else 8
        digits = read_digits(source, -(-total // group), base_for(len(patterns)))
        flags = (patterns[digits][:, None] >> np.arange(group) & 1).reshape(-1)[:total] == 1
    places = np.flatnonzero(flags)
    assert len(places) == kept
    number = kept * per_unit
    words = np.zeros(number, np.uint64)
    for column, (lows, widths) in enumerate(bins):
        is_signed = signs and column == len(bins) - 1
        digits = read_digits(source, number, base_for(len(lows) * (2 if is_signed else 1)))
        if is_signed:
            words |= (digits % 2).astype(np.uint64) << np.uint64(8 * size - 1)
            digits = digits // 2
        numbers = lows[digits] + read_offsets(source, widths[digits])
        words |= numbers.astype(np.uint64) << np.uint64(16 * column)
    assert source.at == len(source.data)
    return places, words


def read_offsets(source, widths):
    ends = widths.cumsum()
    total = ends[-1] if len(ends) else 0
    bits = np.append(read_bits(source, total), np.zeros(16, np.int64))
    starts = ends - widths
    return sum(bits[starts + i] * (widths > i) << i for i in range(16))


def base_for(number):
    bases = sorted({1 << b for b in range(20)} | {3 << b for b in range(20)})
    return next(base for base in bases if base >= number)


def read_digits(source, number, base):
    base = int(base)
    three = base % 3 == 0
    bits = (base // 3 if three else base).bit_length() - 1
    digits, done = np.zeros(number, np.int64), 0
    for width in (1, 2, 4, 8, 16):
        if bits & width:
            fields = read_bits(source, number * width).reshape(number, width)
            digits |= (fields << np.arange(width)).sum(1) << done
            done += width
    if three:
        fives = source.numbers(-(-number // 5), "u1")[:, None] // 3 ** np.arange(5) % 3
        digits |= fives.reshape(-1)[:number] << done
    return digits


def read_bits(source, number):
    data = np.frombuffer(source.take(-(-int(number) // 8)), np.uint8)
    return np.unpackbits(data, bitorder="little")[: int(number)].astype(np.int64)
