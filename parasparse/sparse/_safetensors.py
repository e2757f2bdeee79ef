"""The safetensors format: heads of files that are written in parts, and files opened for reading.

Reading is the safetensors library's, an extra. Its writer wants every tensor in memory at once, so
writing is ours: 8 bytes with the length of a JSON text, the text, the tensors' bytes.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

_LONGEST = 100_000_000  # what the library reads


def head(metadata: Mapping[str, str], sizes: Mapping[str, int], *, room: int = 0) -> bytes:
    """Return what comes before the tensors: vectors of `sizes` bytes, without gaps, in that order.

    Args:
        metadata: for the file as a whole.
        sizes: bytes by name.
        room: fill it with spaces to at least so many bytes.

    Raises:
        ValueError: it is longer than the library reads.

    Examples:
        >>> head({}, {"a": 3})[8:]
        b'{"__metadata__":{},"a":{"dtype":"U8","shape":[3],"data_offsets":[0,3]}} '
    """
    text: dict[str, object] = {"__metadata__": dict(metadata)}
    end = 0
    for name, size in sizes.items():
        text[name] = {"dtype": "U8", "shape": [size], "data_offsets": [end, end + size]}
        end += size
    body = json.dumps(text, separators=(",", ":")).encode()
    body = body.ljust(room - 8)
    body += b" " * (-len(body) % 8)
    if len(body) > _LONGEST:
        raise ValueError(
            f"the head of a safetensors file must be at most {_LONGEST:,} bytes; got "
            f"{len(body):,}. Save to a torch file (.pt) instead."
        )
    return len(body).to_bytes(8, "little") + body


def read(path: str | os.PathLike[str]) -> tuple[Mapping[str, str], Callable[[str], Tensor]]:
    """Return the metadata of a file, and a function that reads a tensor.

    Raises:
        ImportError: safetensors is not installed.
    """
    try:
        from safetensors import safe_open
    except ImportError as error:
        raise ImportError(
            "Reading a .safetensors file needs safetensors: pip install parasparse[safetensors]"
        ) from error
    file: Any = safe_open(path, framework="pt")
    return file.metadata() or {}, file.get_tensor
