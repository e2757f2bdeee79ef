"""Packed files: dense state dicts without their zeros, as safetensors or torch files."""

import json
from collections.abc import Callable, Mapping
from typing import Any, BinaryIO, TypeAlias

import torch
from torch import Tensor

from parasparse.files import safetensors_heads
from parasparse.files.bits import buffer
from parasparse.files.headers import (
    FilePath,
    checked_header,
    crc32,
    damage_named,
    is_safetensors,
    metadata_of,
)
from parasparse.files.packing import Packed, matrix, pack_tensor, unpack_tensor
from parasparse.files.replacing import replacing

# In the header, a tensor is {dtype, shape, unit, bits, crc32}, a tied one {same: first name}, any
# other value {value}. `bits` is the number of bytes of the bitmask, which precedes the values.
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
    """Return the entries of `state`; entries of tensors have their greatest length."""
    entries: dict[str, Entry] = {}
    for name, value in state.items():
        if name in first:
            entries[name] = {"same": first[name]}
        elif isinstance(value, Tensor):
            whole = matrix(value.shape)
            entries[name] = _entry(value.dtype, value.shape, whole, value.nbytes, crc32(b""))
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


def _entry(
    dtype: torch.dtype, shape: tuple[int, ...], unit: tuple[int, int], bits: int, crc32: str
) -> Entry:
    name = str(dtype).removeprefix("torch.")
    return {"dtype": name, "shape": list(shape), "unit": list(unit), "bits": bits, "crc32": crc32}


def _packed(tensor: Tensor) -> tuple[Entry, Tensor]:
    """Return the entry of `tensor`, and its bytes: the bitmask, then the values."""
    packed = pack_tensor(tensor)
    data = packed.values.view(torch.uint8)
    bits = 0 if packed.bits is None else packed.bits.numel()
    data = (data if packed.bits is None else torch.cat([packed.bits, data])).cpu()
    return _entry(packed.dtype, packed.shape, packed.unit, bits, crc32(buffer(data))), data


def _unpacked(entry: Entry, data: Tensor) -> Tensor:
    data = data.contiguous().flatten().view(torch.uint8)
    if crc32(buffer(data)) != entry["crc32"]:
        raise ValueError("The checksum does not match.")
    bits, values = data[: entry["bits"]], data[entry["bits"] :]
    dtype = getattr(torch, entry["dtype"], None)
    if dtype is None:
        raise NotImplementedError(
            f"the file holds {entry['dtype']}, which this torch does not have. Upgrade torch."
        )
    # The copy is aligned for `dtype`. Without bits, `unpack_tensor` copies.
    values = (values.clone() if len(bits) else values).view(dtype)
    shape, unit = tuple(entry["shape"]), (entry["unit"][0], entry["unit"][1])
    return unpack_tensor(Packed(dtype, shape, unit, bits if len(bits) else None, values))


def _write_safetensors(file: BinaryIO, read: _Read, header: dict[str, Any]) -> None:
    """Write tensor by tensor; the entries of `header` become those of the packed tensors."""
    entries = header["entries"]
    sizes = {
        name: (torch.uint8, [entry["bits"]]) for name, entry in entries.items() if "crc32" in entry
    }
    # The head comes first but is known last. Its numbers have at most as many digits as for tensors
    # without zeros, which `entries_of` assumes.
    room = len(safetensors_heads.head(metadata_of(header), sizes))
    file.seek(room)
    for name in sizes:
        entries[name], data = _packed(read(name))
        sizes[name] = (torch.uint8, [data.numel()])
        file.write(buffer(data))
        del data  # before the next is packed
    head = safetensors_heads.head(metadata_of(header), sizes, room=room)
    assert len(head) == room
    file.seek(0)
    file.write(head)


def _write_torch(file: BinaryIO, read: _Read, header: dict[str, Any]) -> None:
    entries = header["entries"]
    tensors: dict[str, Tensor] = {}
    for name in [name for name, entry in entries.items() if "crc32" in entry]:
        entries[name], tensors[name] = _packed(read(name))
    torch.save({**metadata_of(header), "tensors": tensors}, file)


def _read_safetensors(path: FilePath) -> tuple[Mapping[str, str], _Read]:
    file = safetensors_heads.opened(path)
    return file.metadata() or {}, file.get_tensor


def _read_torch(path: FilePath) -> tuple[Mapping[str, Any], _Read]:
    content = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    if not isinstance(content, dict):
        content = {}  # not a packed file
    return content, lambda name: content["tensors"][name]
