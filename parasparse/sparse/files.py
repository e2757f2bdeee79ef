"""Packed files: dense state dicts without their zeros, as safetensors or torch files."""

from __future__ import annotations

import ctypes
import json
import os
import secrets
import shutil
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, TypeAlias

import torch
from torch import Tensor, nn

from parasparse.sparse import _safetensors
from parasparse.sparse.packing import (
    Packed,
    check_packable,
    first_names,
    matrix,
    pack_tensor,
    unpack_tensor,
)
from parasparse.state import dense_state_dict

FORMAT = "parasparse-packed"
VERSION = 1

FilePath: TypeAlias = str | os.PathLike[str]
# What the header says of one name: of a tensor {dtype, shape, unit, bits, crc32}, where `bits` is
# the number of bytes of the bitmask, which come before those of the values; of one that is tied
# {same}; of what is no tensor {value}.
Entry: TypeAlias = dict[str, Any]


def save(source: nn.Module | Mapping[str, Any], path: FilePath) -> None:
    """Write the dense state of `source` without its zeros; `load_packed` returns it bit for bit.

    The file is written beside `path` and renamed when it is whole and on disk: whatever happens on
    the way, the old file stays. Every tensor has a checksum. A safetensors file is written tensor
    by tensor; for a torch file, all packed tensors are in memory at once.

    Args:
        source: a model, of which `dense_state_dict` is written, or a state dict. What is no tensor
            in it must be plain JSON.
        path: a safetensors file if it ends in .safetensors, else a torch file.

    Raises:
        ValueError: a tensor is sparse, nested, quantized or on the meta device; `path` is there
            and is no file.
        TypeError: a name is no string, or what is under it neither a tensor nor plain JSON.

    Examples:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save({"weight": torch.eye(64)}, f"{folder}/eye.pt")
        ...     load_packed(f"{folder}/eye.pt")["weight"].equal(torch.eye(64))
        True
    """
    state = dense_state_dict(source) if isinstance(source, nn.Module) else source
    entries = _entries(state)
    with _replacing(path) as file:
        (_write_safetensors if _is_safetensors(path) else _write_torch)(file, state, entries)


def load_packed(path: FilePath) -> dict[str, Any]:
    """Return the dense state dict that `save` wrote, on the CPU; no code from the file is run.

    It loads into dense and into masked models: `model.load_state_dict(load_packed(path))`. Tensors
    that were tied are tied.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no packed file, is damaged, or was written by a newer version.
        ImportError: it ends in .safetensors, and safetensors is not installed.

    Examples:
        >>> load_packed("nowhere.pt")
        Traceback (most recent call last):
        FileNotFoundError: [Errno 2] No such file or directory: 'nowhere.pt'
    """
    with open(path, "rb"):  # the system's own errors for what cannot be opened
        pass
    with _damage_named(path, "cannot be read"):
        content, read = (_safetensors.read if _is_safetensors(path) else _read_torch)(path)
    state: dict[str, Any] = {}
    for name, entry in _checked_header(content, path).items():
        if "same" in entry:
            state[name] = state[entry["same"]]
        elif "value" in entry:
            state[name] = entry["value"]
        else:
            with _damage_named(path, f'has no intact "{name}"'):
                state[name] = _unpacked(entry, read(name))
    return state


def _is_safetensors(path: FilePath) -> bool:
    return os.fspath(path).endswith(".safetensors")


def _entries(state: Mapping[str, Any]) -> dict[str, Entry]:
    """Check all of `state`; return its entries, each tensor's as long as it may get."""
    wrong = [name for name, value in state.items() if not _storable(name, value)]
    if wrong:
        raise TypeError(
            "`source` must hold tensors and plain JSON by name; "
            f"got {type(state[wrong[0]]).__name__} as {wrong[0]!r}."
        )
    check_packable(state)
    first = first_names(state)
    entries: dict[str, Entry] = {}
    for name, value in state.items():
        if name in first:
            entries[name] = {"same": first[name]}
        elif isinstance(value, Tensor):
            whole = matrix(value.shape)
            entries[name] = _entry(value.dtype, value.shape, whole, value.nbytes, _crc32(b""))
        else:
            entries[name] = {"value": value}
    return entries


def _storable(name: object, value: object) -> bool:
    if isinstance(value, Tensor):
        return isinstance(name, str)
    try:
        return isinstance(name, str) and bool(json.loads(json.dumps(value)) == value)
    except (TypeError, ValueError):
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
    return _entry(packed.dtype, packed.shape, packed.unit, bits, _crc32(_buffer(data))), data


def _unpacked(entry: Entry, data: Tensor) -> Tensor:
    """Return the tensor of an entry and its bytes; raise ValueError if they are other bytes."""
    data = data.contiguous().flatten().view(torch.uint8)
    if _crc32(_buffer(data)) != entry["crc32"]:
        raise ValueError("The checksum is another.")
    bits, values = data[: entry["bits"]], data[entry["bits"] :]
    dtype = getattr(torch, entry["dtype"])
    values = values.clone().view(dtype)  # at a place in memory that is fit for `dtype`
    shape, unit = tuple(entry["shape"]), (entry["unit"][0], entry["unit"][1])
    return unpack_tensor(Packed(dtype, shape, unit, bits if len(bits) else None, values))


def _crc32(data: bytes | ctypes.Array[ctypes.c_ubyte]) -> str:
    return f"{zlib.crc32(data):08x}"


def _buffer(data: Tensor) -> ctypes.Array[ctypes.c_ubyte]:
    """Return the bytes of a contiguous uint8 tensor, not copied; `data` must outlive them."""
    # Tensor.numpy() would do, but numpy is no dependency.
    return (ctypes.c_ubyte * data.numel()).from_address(data.data_ptr())


def _metadata(entries: dict[str, Entry]) -> dict[str, str]:
    header = json.dumps(entries, separators=(",", ":"))
    crc32 = _crc32(header.encode())
    return {"format": FORMAT, "version": str(VERSION), "header": header, "crc32": crc32}


def _checked_header(content: Mapping[str, Any], path: FilePath) -> dict[str, Entry]:
    if content.get("format") != FORMAT:
        reader = "safetensors.torch.load_file" if _is_safetensors(path) else "torch.load"
        raise ValueError(
            f'`path` must be a packed file of `parasparse.save`; "{path}" is another kind of '
            f"file. Read it with {reader}."
        )
    version, header = str(content.get("version")), str(content.get("header"))
    if version.isdecimal() and int(version) > VERSION:
        raise ValueError(
            f'`path` must be of a version that this parasparse reads; "{path}" was written by a '
            f"newer parasparse: version {version}; this one reads {VERSION}. Upgrade parasparse."
        )
    with _damage_named(path, "has no intact header"):
        if version != str(VERSION) or _crc32(header.encode()) != content["crc32"]:
            raise ValueError("The version or the checksum is another.")
        entries: dict[str, Entry] = json.loads(header)
    return entries


@contextmanager
def _damage_named(path: FilePath, what: str) -> Iterator[None]:
    """Turn what is raised over damaged bytes, which may be anything, into a ValueError."""
    try:
        yield
    except (OSError, ImportError, MemoryError):
        raise
    except Exception as error:
        raise ValueError(
            f'`path` must be an intact packed file of `parasparse.save`; "{path}" {what}. It is '
            "damaged, cut off, or another kind of file (code in it has not been run)."
        ) from error


def _write_safetensors(file: BinaryIO, state: Mapping[str, Any], entries: dict[str, Entry]) -> None:
    """Write tensor by tensor; `entries` become those of the packed tensors."""
    sizes = {name: state[name].nbytes for name, entry in entries.items() if "crc32" in entry}
    # The head is known last and comes first. It is no longer than the one for tensors without
    # zeros: each number in it has at most as many digits.
    room = len(_safetensors.head(_metadata(entries), sizes))
    file.seek(room)
    for name in sizes:
        entries[name], data = _packed(state[name])
        sizes[name] = data.numel()
        file.write(_buffer(data))
        del data  # before the next is packed
    head = _safetensors.head(_metadata(entries), sizes, room=room)
    assert len(head) == room
    file.seek(0)
    file.write(head)


def _write_torch(file: BinaryIO, state: Mapping[str, Any], entries: dict[str, Entry]) -> None:
    tensors: dict[str, Tensor] = {}
    for name in [name for name, entry in entries.items() if "crc32" in entry]:
        entries[name], tensors[name] = _packed(state[name])
    torch.save({**_metadata(entries), "tensors": tensors}, file)


def _read_torch(path: FilePath) -> tuple[Mapping[str, Any], Callable[[str], Tensor]]:
    content = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    if not isinstance(content, dict):
        content = {}  # another kind of file
    return content, lambda name: content["tensors"][name]


@contextmanager
def _replacing(path: FilePath) -> Iterator[BinaryIO]:
    """Yield a new file beside `path` that takes its place at the end, unless something is raised.

    As when `path` itself is opened, links are followed, and permissions stay or are the usual.
    """
    target = Path(os.path.realpath(path))
    if target.exists() and not target.is_file():
        raise ValueError(f'`path` must be a file or be free; "{path}" is neither.')
    beside = target.with_name(f"{target.name}.{secrets.token_hex(4)}.tmp")
    try:
        with open(beside, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        if target.exists():
            shutil.copymode(target, beside)
        os.replace(beside, target)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise
