"""Headers of packed files: what they say, and what is said of damaged ones."""

import ctypes
import json
import os
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeAlias

FORMAT = "parasparse-packed"
VERSION = 1

FilePath: TypeAlias = str | os.PathLike[str]


def metadata_of(header: Mapping[str, Any]) -> dict[str, str]:
    """Return what a packed file says of itself: format, version, header and its checksum."""
    text = json.dumps(header, separators=(",", ":"))
    checksum = crc32(text.encode())
    return {"format": FORMAT, "version": str(VERSION), "header": text, "crc32": checksum}


def checked_header(content: Mapping[str, Any], path: FilePath) -> dict[str, Any]:
    """Return the header in `content`; raise ValueError if it is of another file or damaged."""
    if content.get("format") != FORMAT:
        reader = "safetensors.torch.load_file" if is_safetensors(path) else "torch.load"
        raise ValueError(
            f'`path` must be a packed file of `parasparse.save`; "{path}" is another kind of '
            f"file. Read it with {reader}."
        )
    version, text = str(content.get("version")), str(content.get("header"))
    whole, _, _ = version.partition(".")
    if whole.isdecimal() and whole.lstrip("0") != "" and whole != str(VERSION):
        raise ValueError(
            f'`path` must be of a version that this parasparse reads; "{path}" was written by a '
            f"newer parasparse: version {version:.20}; this one reads {VERSION}. Upgrade "
            "parasparse."
        )
    with damage_named(path, "has no intact header"):
        if version != str(VERSION) or crc32(text.encode()) != content["crc32"]:
            raise ValueError("The version or the checksum is another.")
        header: dict[str, Any] = json.loads(text)
        if header.keys() - {"metadata"} != {"entries", "modules"} or not all(
            isinstance(entry, dict) for entry in header["entries"].values()
        ):
            raise ValueError("It holds other things than it should.")
    return header


@contextmanager
def damage_named(path: FilePath, what: str) -> Iterator[None]:
    """Turn what is raised over damaged bytes, which may be anything, into a ValueError."""
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
    return f"{zlib.crc32(data):08x}"


def is_safetensors(path: FilePath) -> bool:
    """Whether the name of a file is that of a safetensors file."""
    return os.fspath(path).lower().endswith(".safetensors")
