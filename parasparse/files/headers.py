"""Headers of packed files, and the errors about damaged ones."""

import ctypes
import json
import os
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeAlias

import torch
from torch import Tensor

from parasparse.files.bits import buffer

FORMAT = "parasparse-packed"
VERSION = 4
_AS_TEXT = ("1", "2")  # versions whose header is not compressed
_READ = (*_AS_TEXT, "3", str(VERSION))
LONGEST = 1 << 28  # bytes of a header; few compressed ones may claim to be many

FilePath: TypeAlias = str | os.PathLike[str]


def metadata() -> dict[str, str]:
    """Return what tells packed files of this version from others."""
    return {"format": FORMAT, "version": str(VERSION)}


def packed_header(header: Mapping[str, Any]) -> Tensor:
    """Return `header` as JSON, compressed by zlib; raise ValueError if it is too long."""
    text = json.dumps(header, separators=(",", ":")).encode()
    if len(text) > LONGEST:
        raise ValueError(
            "`source` must have names and values other than tensors of at most "
            f"{LONGEST:,} bytes as JSON; got {len(text):,}."
        )
    return torch.frombuffer(bytearray(zlib.compress(text, 9)), dtype=torch.uint8)


def checked_header(content: Mapping[str, Any], path: FilePath) -> dict[str, Any]:
    """Return the header in `content`; raise ValueError if it is damaged or not a packed file's."""
    if content.get("format") != FORMAT:
        reader = "safetensors.torch.load_file" if is_safetensors(path) else "torch.load"
        raise ValueError(
            f'`path` must be a packed file of `parasparse.save`; "{path}" is another kind of '
            f"file. Read it with {reader}."
        )
    version = str(content.get("version"))
    whole, _, _ = version.partition(".")
    if whole.isdecimal() and whole.lstrip("0") != "" and whole not in _READ:
        raise ValueError(
            f'"{path}" was written by a newer parasparse: version {version:.20}; this one reads '
            f"{_READ[0]} to {_READ[-1]}. Upgrade parasparse."
        )
    with damage_named(path, "has no intact header"):
        if version not in _READ:
            raise ValueError("The version is impossible.")
        header: dict[str, Any] = json.loads((_text if version in _AS_TEXT else _unpacked)(content))
        streams = {"streams"} if version == str(VERSION) else set()
        if header.keys() - {"metadata"} != {"entries", "modules", *streams} or not all(
            isinstance(entry, dict) for entry in header["entries"].values()
        ):
            raise ValueError("The header has unexpected entries.")
        if any(not isinstance(header.get(key) or {}, dict) for key in ("modules", "metadata")):
            raise ValueError("The header has entries of the wrong type.")
    return header


def bytes_in(content: Mapping[str, Any], name: str) -> Tensor:
    """Return the bytes of this name in `content`; raise ValueError if they are something else."""
    data: object = content[name]
    kind = torch.uint8, 1, torch.strided, "cpu"
    if (
        not isinstance(data, Tensor)
        or (data.dtype, data.ndim, data.layout, data.device.type) != kind
    ):
        raise ValueError(f'"{name}" must be a 1-D tensor of uint8.')
    return data.contiguous()


def _text(content: Mapping[str, Any]) -> str:
    text = str(content["header"])
    if crc32(text.encode()) != content["crc32"]:
        raise ValueError("The checksum does not match.")
    return text


def _unpacked(content: Mapping[str, Any]) -> bytes:
    reader = zlib.decompressobj()
    text = reader.decompress(bytes(buffer(bytes_in(content, "header"))), LONGEST)
    if not reader.eof or reader.unused_data:
        raise ValueError(f"The header is cut off, or has more than {LONGEST:,} bytes.")
    return text


@contextmanager
def damage_named(path: FilePath, what: str) -> Iterator[None]:
    """Turn any exception that damaged bytes cause into a ValueError."""
    try:
        yield
    except (PermissionError, ImportError, MemoryError, NotImplementedError):
        raise
    except Exception as error:
        if "can't allocate memory" in str(error):  # torch's own MemoryError
            raise
        raise ValueError(
            f'`path` must be an intact packed file of `parasparse.save`; "{path}" {what}. It is '
            "damaged, cut off, or another kind of file (code in it has not been run)."
        ) from error


def crc32(data: bytes | ctypes.Array[ctypes.c_ubyte]) -> str:
    """Return the CRC-32 of `data` in hexadecimal."""
    return hexadecimal(zlib.crc32(data))


def hexadecimal(crc32: int) -> str:
    """Return a CRC-32 as it is written in headers."""
    return f"{crc32:08x}"


def is_safetensors(path: FilePath) -> bool:
    """Whether `path` ends in .safetensors."""
    return os.fspath(path).lower().endswith(".safetensors")
