"""The streams of a packed file: the coded bytes of a tensor, or of several small ones joined."""

import math
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

from parasparse.files import version_1
from parasparse.files.bits import buffer
from parasparse.files.codes.joined import (
    MOST_ENTRIES,
    MOST_KEPT,
    Small,
    decode_joined,
    encode_joined,
    small,
)
from parasparse.files.codes.tensors import decode, encode
from parasparse.files.headers import bytes_in

# In the header, a tensor is {dtype, shape, stream}, and has a shift if it is joined with others; a
# tied one is {same: first name}, any other value {value}.
Entry: TypeAlias = dict[str, Any]
Read: TypeAlias = Callable[[str], Tensor]
_ENTRIES_AT_ONCE = 1 << 20  # of small tensors that are in memory together


@dataclass(frozen=True, eq=False)
class Stream:
    """Coded bytes, and the names of the tensors that are in them."""

    names: list[str]
    data: Tensor


def dtype_of(entry: Entry) -> torch.dtype:
    """Return the dtype of a tensor's entry; raise NotImplementedError if this torch has none."""
    dtype = getattr(torch, entry["dtype"], None)
    if not isinstance(dtype, torch.dtype):
        raise NotImplementedError(
            f"the file holds {entry['dtype']}, which this torch does not have. Upgrade torch."
        )
    return dtype


def write_streams(
    write: Callable[[Any], object], read: Read, header: dict[str, Any]
) -> dict[str, Any]:
    """Write the tensors, a few at a time; return `header` with the streams that they are in."""
    entries: dict[str, Entry] = dict(header["entries"])
    streams: list[int] = []
    for batch in _batches(entries):
        tensors = {name: read(name) for name in batch}
        prepared = small(list(tensors.values())) if len(batch) > 1 else []
        parts = dict(zip(batch, prepared, strict=False))
        for names in _groups(batch, parts):
            data, shifts = _encoded([(tensors[name], parts.get(name)) for name in names])
            for name, shift in zip(names, shifts, strict=True):
                entries[name] = {**entries[name], "stream": len(streams), **shift}
            streams.append(data.numel())
            write(buffer(data))
            del data  # before the next is packed
    return {**header, "entries": entries, "streams": streams}


def _encoded(group: list[tuple[Tensor, Small | None]]) -> tuple[Tensor, list[dict[str, int]]]:
    """Return the bytes of a stream, and for the entry of each tensor its shift, if it has one."""
    if len(group) == 1:
        return encode(group[0][0]), [{}]
    parts = [part for _, part in group if part is not None]
    data, shifts = encode_joined(parts)
    return data, [{"shift": shift} for shift in shifts]


def _batches(entries: Mapping[str, Entry]) -> list[list[str]]:
    """Return the names of tensors that are in memory together: small ones of the same dtype."""
    batches: list[list[str]] = []
    held: dict[str, int] = {}  # entries in the last batch of a dtype
    last: dict[str, list[str]] = {}
    for name, entry in entries.items():
        if "dtype" not in entry:
            continue
        number, dtype = math.prod(entry["shape"]), entry["dtype"]
        if number > MOST_ENTRIES:
            batches.append([name])
        elif dtype in last and held[dtype] + number <= _ENTRIES_AT_ONCE:
            last[dtype].append(name)
            held[dtype] += number
        else:
            last[dtype], held[dtype] = [name], number
            batches.append(last[dtype])
    return batches


def _groups(names: list[str], parts: Mapping[str, Small | None]) -> list[list[str]]:
    """Return the names of the tensors in each stream."""
    groups: list[list[str]] = []
    last: dict[Hashable, list[str]] = {}
    held: dict[Hashable, int] = {}  # entries that are kept, in the last group of a kind
    for name in names:
        part = parts.get(name)
        if part is not None and part.kind in last and held[part.kind] < MOST_KEPT:
            last[part.kind].append(name)
            held[part.kind] += part.kept
            continue
        groups.append([name])
        if part is not None:
            last[part.kind], held[part.kind] = groups[-1], part.kept
    return groups


def streams_in(content: Mapping[str, Any], header: Mapping[str, Any]) -> dict[str, Stream]:
    """Return the stream of each tensor, by name; bytes are not copied."""
    entries = {name: entry for name, entry in header["entries"].items() if "dtype" in entry}
    if isinstance(content["tensors"], Mapping):  # versions 1 and 2
        return {name: Stream([name], content["tensors"][name]) for name in entries}
    if "streams" in header:
        sizes, places = header["streams"], [entry["stream"] for entry in entries.values()]
    else:  # version 3
        sizes, places = [entry["nbytes"] for entry in entries.values()], list(range(len(entries)))
    if len(set(places)) != len(sizes):
        raise ValueError("each stream must have a tensor.")
    data = bytes_in(content, "tensors").split(sizes)
    streams = {place: Stream([], part) for place, part in enumerate(data)}
    for name, place in zip(entries, places, strict=True):
        streams[place].names.append(name)
    return {name: stream for stream in streams.values() for name in stream.names}


def decoded(stream: Stream, entries: Mapping[str, Entry]) -> dict[str, Tensor]:
    """Return the tensors in a stream; raise ValueError if it is damaged."""
    held = [entries[name] for name in stream.names]
    dtype = dtype_of(held[0])
    data = stream.data.contiguous().flatten().view(torch.uint8)
    shapes = [tuple(entry["shape"]) for entry in held]
    if "bits" in held[0]:
        tensors = [version_1.unpacked(held[0], dtype, data)]
    elif "shift" not in held[0]:
        tensors = [decode(data, dtype, shapes[0])]
    else:
        numbers, shifts = [math.prod(shape) for shape in shapes], [one["shift"] for one in held]
        if any(dtype_of(entry) != dtype for entry in held):
            raise ValueError("joined tensors must have one dtype.")
        if not all(isinstance(shift, int) and 0 <= shift < 1 << 15 for shift in shifts):
            raise ValueError("shifts must be integers below 2**15 and not negative.")
        if max(numbers) > MOST_ENTRIES:
            raise ValueError(f"joined tensors must have at most {MOST_ENTRIES} entries each.")
        flat = decode_joined(data, dtype, numbers, shifts)
        tensors = [one.view(shape) for one, shape in zip(flat, shapes, strict=True)]
    return dict(zip(stream.names, tensors, strict=True))
