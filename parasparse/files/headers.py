"""Headers of packed files, and the errors about damaged ones."""

import ctypes
import json
import os
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeAlias

FORMAT = "parasparse-packed"
VERSION = 2
_READ = ("1", str(VERSION))

FilePath: TypeAlias = str | os.PathLike[str]


def metadata_of(header: Mapping[str, Any]) -> dict[str, str]:
    """Return the metadata of a packed file: format, version, header and checksum of the header."""
    text = json.dumps(header, separators=(",", ":"))
    checksum = crc32(text.encode())
    return {"format": FORMAT, "version": str(VERSION), "header": text, "crc32": checksum}


def checked_header(content: Mapping[str, Any], path: FilePath) -> dict[str, Any]:
    """Return the header in `content`; raise ValueError if it is damaged or not a packed file's."""
    if content.get("format") != FORMAT:
        reader = "safetensors.torch.load_file" if is_safetensors(path) else "torch.load"
        raise ValueError(
            f'`path` must be a packed file of `parasparse.save`; "{path}" is another kind of '
            f"file. Read it with {reader}."
        )
    version, text = str(content.get("version")), str(content.get("header"))
    whole, _, _ = version.partition(".")
    if whole.isdecimal() and whole.lstrip("0") != "" and whole not in _READ:
        raise ValueError(
            f'"{path}" was written by a newer parasparse: version {version:.20}; this one reads '
            f"{' and '.join(_READ)}. Upgrade parasparse."
        )
    with damage_named(path, "has no intact header"):
        if version not in _READ or crc32(text.encode()) != content["crc32"]:
            raise ValueError("The version or the checksum does not match.")
        header: dict[str, Any] = json.loads(text)
        if header.keys() - {"metadata"} != {"entries", "modules"} or not all(
            isinstance(entry, dict) for entry in header["entries"].values()
        ):
            raise ValueError("The header has unexpected entries.")
    return header


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
