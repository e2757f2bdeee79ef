"""Packed files: dense state dicts without their zeros, as safetensors or torch files."""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any, BinaryIO, TypeAlias

import torch
from torch import Tensor, nn

from parasparse.sparse import _safetensors
from parasparse.sparse._bits import buffer
from parasparse.sparse._headers import (
    FilePath,
    checked_header,
    crc32,
    damage_named,
    is_safetensors,
    metadata_of,
)
from parasparse.sparse._replacing import replacing
from parasparse.sparse.packing import (
    Packed,
    first_names,
    matrix,
    pack_tensor,
    plain_state,
    unpack_tensor,
)
from parasparse.state import dense_state_dict

# What the header says of one name: of a tensor {dtype, shape, unit, bits, crc32}, where `bits` is
# the number of bytes of the bitmask, which come before those of the values; of one that is tied
# {same}; of what is no tensor {value}.
Entry: TypeAlias = dict[str, Any]


def save(source: nn.Module | Mapping[str, Any], path: FilePath) -> None:
    """Write the dense state of `source` without its zeros; `load_packed` returns it bit for bit.

    The file is written beside `path` and renamed when it is whole and on disk: whatever happens on
    the way, the old file stays. Every tensor has a checksum. A safetensors file is written tensor
    by tensor; for a torch file, all packed tensors are in memory at once; a masked model's dense
    weights are made before any is written.

    Args:
        source: a model, of which `dense_state_dict` is written, or a state dict. What is no tensor
            in it must be plain JSON.
        path: a safetensors file if it ends in .safetensors, else a torch file.

    Raises:
        ValueError: a tensor is sparse, nested, quantized, distributed or on the meta device; `path`
            is there and is no file.
        TypeError: a name is no string, or what is under it neither a tensor nor plain JSON.

    Examples:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save({"weight": torch.eye(64)}, f"{folder}/eye.pt")
        ...     load_packed(f"{folder}/eye.pt")["weight"].equal(torch.eye(64))
        True
    """
    given = dense_state_dict(source) if isinstance(source, nn.Module) else source
    state = {str(name): value for name, value in plain_state(given).items()}
    check_storable(state, given)
    header = {
        "entries": entries_of(state, first_names(state)),
        "modules": getattr(given, "_metadata", None),
    }
    write(path, state.__getitem__, header)


def write(path: FilePath, read: Callable[[str], Tensor], header: dict[str, Any]) -> None:
    """Write a packed file of what `read` returns for each tensor of the entries in `header`."""
    with replacing(path) as file:
        (_write_safetensors if is_safetensors(path) else _write_torch)(file, read, header)


def load_packed(path: FilePath) -> dict[str, Any]:
    """Return the dense state dict that `save` wrote, on the CPU; no code from the file is run.

    It loads into dense and into masked models: `model.load_state_dict(load_packed(path))`. Tensors
    that were tied are tied.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no packed file, is damaged, or was written by a newer version.
        ImportError: it ends in .safetensors, and safetensors is not installed.
        NotImplementedError: it holds a dtype that this torch does not have.

    Examples:
        >>> load_packed("nowhere.pt")
        Traceback (most recent call last):
        FileNotFoundError: [Errno 2] No such file or directory: 'nowhere.pt'
    """
    header, read = opened(path)
    state: OrderedDict[str, Any] = OrderedDict()
    for name, entry in header["entries"].items():
        with damage_named(path, f'has no intact "{name}"'):
            if "same" in entry:
                state[name] = state[entry["same"]]
            else:
                state[name] = entry["value"] if "value" in entry else read(name)
    if header["modules"] is not None:
        state._metadata = OrderedDict(header["modules"])  # type: ignore[attr-defined]
    return state


def opened(path: FilePath) -> tuple[dict[str, Any], Callable[[str], Tensor]]:
    """Return the header of a packed file, and what reads and unpacks a tensor of it.

    Raises: as `load_packed`.
    """
    with open(path, "rb"):  # the system's own errors for what cannot be opened
        pass
    with damage_named(path, "cannot be read"):
        content, read = (_read_safetensors if is_safetensors(path) else _read_torch)(path)
    header = checked_header(content, path)

    def unpacked(name: str) -> Tensor:
        with damage_named(path, f'has no intact "{name}"'):
            return _unpacked(header["entries"][name], read(name))

    return header, unpacked


def check_storable(state: Mapping[str, Any], given: Mapping[str, Any]) -> None:
    """Raise TypeError if a file would not give back what `state` holds."""
    wrong = [name for name, value in state.items() if not _storable(name, value)]
    if wrong or not all(isinstance(name, str) for name in given):
        name = wrong[0] if wrong else next(name for name in given if not isinstance(name, str))
        value = given.get(name)
        raise TypeError(
            "`source` must hold tensors and plain JSON by name; "
            f"got {type(value).__name__} as {name!r}."
        )
    modules = getattr(given, "_metadata", None)
    if not _is_json(modules):
        raise TypeError(f"`source._metadata` must be plain JSON; got {modules!r:.60}.")


def entries_of(state: Mapping[str, Any], first: Mapping[str, str]) -> dict[str, Entry]:
    """Return the entries of `state`, each tensor's as long as it may get."""
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
    # "__metadata__" is the head's own in safetensors; a lone surrogate cannot be written.
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
    return {
        "dtype": str(dtype).removeprefix("torch."),
        "shape": list(shape),
        "unit": list(unit),
        "bits": bits,
        "crc32": crc32,
    }


def _packed(tensor: Tensor) -> tuple[Entry, Tensor]:
    """Return the entry of `tensor`, and its bytes: the bitmask, then the values."""
    packed = pack_tensor(tensor)
    data = packed.values.view(torch.uint8)
    bits = 0
    if packed.bits is not None:
        bits = packed.bits.numel()
        data = torch.cat([packed.bits, data])
    data = data.cpu()
    return _entry(packed.dtype, packed.shape, packed.unit, bits, crc32(buffer(data))), data


def _unpacked(entry: Entry, data: Tensor) -> Tensor:
    """Return the tensor of an entry and its bytes; raise ValueError if they are other bytes."""
    data = data.contiguous().flatten().view(torch.uint8)
    if crc32(buffer(data)) != entry["crc32"]:
        raise ValueError("The checksum is another.")
    bits, values = data[: entry["bits"]], data[entry["bits"] :]
    dtype = getattr(torch, entry["dtype"], None)
    if dtype is None:
        raise NotImplementedError(
            f"the file holds {entry['dtype']}, which this torch does not have. Upgrade torch."
        )
    # At a place in memory that is fit for `dtype`; without bits it is copied later.
    values = (values.clone() if len(bits) else values).view(dtype)
    shape, unit = tuple(entry["shape"]), (entry["unit"][0], entry["unit"][1])
    return unpack_tensor(Packed(dtype, shape, unit, bits if len(bits) else None, values))


def _write_safetensors(
    file: BinaryIO, read: Callable[[str], Tensor], header: dict[str, Any]
) -> None:
    """Write tensor by tensor; the entries of `header` become those of the packed tensors."""
    entries = header["entries"]
    sizes = {name: _dense_size(entry) for name, entry in entries.items() if "crc32" in entry}
    # The head is known last and comes first. It is no longer than the one for tensors without
    # zeros: each number in it has at most as many digits.
    room = len(_safetensors.head(metadata_of(header), sizes))
    file.seek(room)
    for name in sizes:
        entries[name], data = _packed(read(name))
        sizes[name] = (torch.uint8, [data.numel()])
        file.write(buffer(data))
        del data  # before the next is packed
    head = _safetensors.head(metadata_of(header), sizes, room=room)
    assert len(head) == room
    file.seek(0)
    file.write(head)


def _dense_size(entry: Entry) -> tuple[torch.dtype, list[int]]:
    return torch.uint8, [entry["bits"]]  # as `entries_of` has it


def _write_torch(file: BinaryIO, read: Callable[[str], Tensor], header: dict[str, Any]) -> None:
    entries = header["entries"]
    tensors: dict[str, Tensor] = {}
    for name in [name for name, entry in entries.items() if "crc32" in entry]:
        entries[name], tensors[name] = _packed(read(name))
    torch.save({**metadata_of(header), "tensors": tensors}, file)


def _read_safetensors(path: FilePath) -> tuple[Mapping[str, str], Callable[[str], Tensor]]:
    file = _safetensors.opened(path)
    return file.metadata() or {}, file.get_tensor


def _read_torch(path: FilePath) -> tuple[Mapping[str, Any], Callable[[str], Tensor]]:
    content = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    if not isinstance(content, dict):
        content = {}  # another kind of file
    return content, lambda name: content["tensors"][name]
