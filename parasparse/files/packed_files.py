"""Packed files: dense state dicts without their zeros, as safetensors or torch files."""

import json
import math
from collections.abc import Mapping
from typing import Any, BinaryIO

import torch
from torch import Tensor

from parasparse.files import safetensors_heads
from parasparse.files.bits import buffer, on_cpu
from parasparse.files.headers import (
    FORMAT,
    LONGEST,
    FilePath,
    checked_header,
    damage_named,
    is_safetensors,
    metadata,
    packed_header,
)
from parasparse.files.replacing import replacing
from parasparse.files.streams import Entry, Read, decoded, dtype_of, streams_in, write_streams


@on_cpu()
def write(path: FilePath, read: Read, header: dict[str, Any]) -> None:
    """Write a packed file: `header` lacks streams, and `read` returns the tensor of each entry."""
    with replacing(path) as file:
        (_write_safetensors if is_safetensors(path) else _write_torch)(file, read, header)


@on_cpu()
def opened(path: FilePath) -> tuple[dict[str, Any], Read]:
    """Return the header of a packed file, and a function that reads and unpacks a tensor.

    Both raise as `load_packed` does.
    """
    with open(path, "rb"):  # raises the system's own error if the file cannot be opened
        pass
    with damage_named(path, "cannot be read"):
        content = (_read_safetensors if is_safetensors(path) else _read_torch)(path)
    header = checked_header(content, path)
    with damage_named(path, "has no intact tensors"):
        streams = streams_in(content, header)
    waiting: dict[str, Tensor] = {}  # unpacked with another tensor, but not read yet

    @on_cpu()
    def unpacked(name: str) -> Tensor:
        with damage_named(path, f'has no intact "{name}"'):
            if name not in waiting:
                waiting.update(decoded(streams[name], header["entries"]))
            return waiting.pop(name)

    return header, unpacked


def check_storable(state: Mapping[str, Any], given: Mapping[str, Any]) -> None:
    """Raise TypeError if a file cannot store `state`, which is `given` with names as strings."""
    wrong = [name for name, value in state.items() if not _storable(name, value)]
    wrong += [name for name in given if not isinstance(name, str)]
    if wrong:
        raise TypeError(
            "`source` must hold tensors and plain JSON by name; "
            f"got {type(given.get(wrong[0])).__name__} as {wrong[0]!r}."
        )
    modules = getattr(given, "_metadata", None)
    if not _is_json(modules):
        raise TypeError(f"`source._metadata` must be plain JSON; got {modules!r:.60}.")


def entries_of(state: Mapping[str, Any], first: Mapping[str, str]) -> dict[str, Entry]:
    """Return the entries of `state` in the header."""
    entries: dict[str, Entry] = {}
    for name, value in state.items():
        if name in first:
            entries[name] = {"same": first[name]}
        elif isinstance(value, Tensor):
            dtype = str(value.dtype).removeprefix("torch.")
            entries[name] = {"dtype": dtype, "shape": list(value.shape)}
        else:
            entries[name] = {"value": value}
    return entries


def _storable(name: str, value: object) -> bool:
    # safetensors reserves "__metadata__", and a lone surrogate cannot be encoded.
    if name == "__metadata__" or name.encode(errors="replace").decode() != name:
        return False
    return isinstance(value, Tensor) or _is_json(value)


def _is_json(value: object) -> bool:
    try:
        return bool(json.loads(json.dumps(value)) == value)
    except (TypeError, ValueError, RecursionError):
        return False


def _write_safetensors(file: BinaryIO, read: Read, header: dict[str, Any]) -> None:
    # The head comes first, but its sizes are known last. They have at most as many digits as these.
    most = sum(_most_bytes(entry) for entry in header["entries"].values() if "dtype" in entry)
    room = len(_head(most, LONGEST))
    file.seek(room)
    packed = packed_header(write_streams(file.write, read, header))
    nbytes = file.tell() - room
    file.write(buffer(packed))
    head = _head(nbytes, packed.numel(), room=room)
    assert len(head) == room
    file.seek(0)
    file.write(head)


def _head(tensors: int, header: int, *, room: int = 0) -> bytes:
    """Return the head of a safetensors file, for so many bytes of coded tensors and of header."""
    sizes = {"tensors": (torch.uint8, [tensors]), "header": (torch.uint8, [header])}
    return safetensors_heads.head(metadata(), sizes, room=room)


def _most_bytes(entry: Entry) -> int:
    """Return more bytes than any tensor with the dtype and shape of `entry` is coded in."""
    nbytes: int = math.prod(entry["shape"]) * dtype_of(entry).itemsize
    return nbytes + nbytes // 4 + 4096


def _write_torch(file: BinaryIO, read: Read, header: dict[str, Any]) -> None:
    data = bytearray()
    packed = packed_header(write_streams(data.extend, read, header))
    none = torch.empty(0, dtype=torch.uint8)
    tensors = torch.frombuffer(data, dtype=torch.uint8) if data else none
    torch.save({**metadata(), "header": packed, "tensors": tensors}, file)


def _read_safetensors(path: FilePath) -> Mapping[str, Any]:
    file = safetensors_heads.opened(path)
    content = file.metadata() or {}
    if content.get("format") != FORMAT:
        return {}  # not a packed file
    tensors = {name: file.get_tensor(name) for name in file.offset_keys()}
    # Versions 1 and 2 have a header in the metadata.
    return {**content, "tensors": tensors} if "header" in content else {**content, **tensors}


def _read_torch(path: FilePath) -> Mapping[str, Any]:
    content = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    return content if isinstance(content, dict) else {}  # not a packed file
