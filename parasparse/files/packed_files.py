"""Packed files: dense state dicts without their zeros, as safetensors or torch files."""

import json
import math
from collections.abc import Callable, Mapping
from typing import Any, BinaryIO, TypeAlias

import torch
from torch import Tensor

from parasparse.files import safetensors_heads, version_1
from parasparse.files.bits import buffer
from parasparse.files.codes.tensors import decode, encode
from parasparse.files.headers import (
    FilePath,
    checked_header,
    damage_named,
    is_safetensors,
    metadata_of,
)
from parasparse.files.replacing import replacing

# In the header, a tensor is {dtype, shape}, a tied one {same: first name}, any other value {value}.
Entry: TypeAlias = dict[str, Any]
_Read: TypeAlias = Callable[[str], Tensor]


def write(path: FilePath, read: _Read, header: dict[str, Any]) -> None:
    """Write a packed file: `read` returns the tensor of each entry in `header`."""
    with replacing(path) as file:
        (_write_safetensors if is_safetensors(path) else _write_torch)(file, read, header)


def opened(path: FilePath) -> tuple[dict[str, Any], _Read]:
    """Return the header of a packed file, and a function that reads and unpacks a tensor.

    Both raise as `load_packed` does.
    """
    with open(path, "rb"):  # raises the system's own error if the file cannot be opened
        pass
    with damage_named(path, "cannot be read"):
        content, read = (_read_safetensors if is_safetensors(path) else _read_torch)(path)
    header = checked_header(content, path)

    def unpacked(name: str) -> Tensor:
        with damage_named(path, f'has no intact "{name}"'):
            return _unpacked(header["entries"][name], read(name))

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


def _unpacked(entry: Entry, data: Tensor) -> Tensor:
    dtype = getattr(torch, entry["dtype"], None)
    if dtype is None:
        raise NotImplementedError(
            f"the file holds {entry['dtype']}, which this torch does not have. Upgrade torch."
        )
    data = data.contiguous().flatten().view(torch.uint8)
    if "bits" in entry:
        return version_1.unpacked(entry, dtype, data)
    return decode(data, dtype, tuple(entry["shape"]))


def _write_safetensors(file: BinaryIO, read: _Read, header: dict[str, Any]) -> None:
    """Write tensor by tensor."""
    entries = header["entries"]
    names = [name for name, entry in entries.items() if "dtype" in entry]
    # The head comes first, but its sizes are known last. They have at most as many digits as these.
    sizes = {name: (torch.uint8, [_most_bytes(entries[name])]) for name in names}
    room = len(safetensors_heads.head(metadata_of(header), sizes))
    file.seek(room)
    for name in names:
        data = encode(read(name))
        sizes[name] = (torch.uint8, [data.numel()])
        file.write(buffer(data))
        del data  # before the next is packed
    head = safetensors_heads.head(metadata_of(header), sizes, room=room)
    assert len(head) == room
    file.seek(0)
    file.write(head)


def _most_bytes(entry: Entry) -> int:
    """Return more bytes than any tensor with the dtype and shape of `entry` is coded in."""
    nbytes: int = math.prod(entry["shape"]) * getattr(torch, entry["dtype"]).itemsize
    return nbytes + nbytes // 4 + 4096


def _write_torch(file: BinaryIO, read: _Read, header: dict[str, Any]) -> None:
    names = [name for name, entry in header["entries"].items() if "dtype" in entry]
    tensors = {name: encode(read(name)) for name in names}
    torch.save({**metadata_of(header), "tensors": tensors}, file)


def _read_safetensors(path: FilePath) -> tuple[Mapping[str, str], _Read]:
    file = safetensors_heads.opened(path)
    return file.metadata() or {}, file.get_tensor


def _read_torch(path: FilePath) -> tuple[Mapping[str, Any], _Read]:
    content = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    if not isinstance(content, dict):
        content = {}  # not a packed file
    return content, lambda name: content["tensors"][name]
