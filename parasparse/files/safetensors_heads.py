"""The safetensors format: heads of files that are written in parts, and files opened for reading.

Reading is the safetensors library's, an extra. Its writer wants every tensor in memory at once, so
writing is ours: 8 bytes with the length of a JSON text, the text, the tensors' bytes.
"""

import json
import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch

_LONGEST = 100_000_000  # what the library reads
_NAMES = {
    "BOOL": "bool", "U8": "uint8", "I8": "int8", "I16": "int16", "U16": "uint16", "I32": "int32",
    "U32": "uint32", "I64": "int64", "U64": "uint64", "F16": "float16", "BF16": "bfloat16",
    "F32": "float32", "F64": "float64", "C64": "complex64", "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2", "F8_E4M3FNUZ": "float8_e4m3fnuz", "F8_E5M2FNUZ": "float8_e5m2fnuz",
    "F8_E8M0": "float8_e8m0fnu",
}  # fmt: skip
DTYPES: dict[str, torch.dtype] = {
    ours: getattr(torch, theirs) for ours, theirs in _NAMES.items() if hasattr(torch, theirs)
}


def head(
    metadata: Mapping[str, str],
    tensors: Mapping[str, tuple[torch.dtype, Sequence[int]]],
    *,
    room: int = 0,
) -> bytes:
    """Return what comes before the tensors, which follow without gaps in this order.

    Args:
        metadata: for the file as a whole.
        tensors: dtype and shape by name.
        room: fill it with spaces to at least so many bytes.

    Raises:
        ValueError: it is longer than the library reads; or it has no name for a dtype.

    Examples:
        >>> head({}, {"a": (torch.uint8, [3])})[8:]
        b'{"__metadata__":{},"a":{"dtype":"U8","shape":[3],"data_offsets":[0,3]}} '
    """
    odd = [n for n in tensors if n == "__metadata__" or n.encode(errors="replace").decode() != n]
    if odd:
        raise ValueError(f"safetensors files know no tensor that is called {odd[0]!r}. Save a .pt.")
    names = {dtype: name for name, dtype in DTYPES.items()}
    text: dict[str, object] = {"__metadata__": dict(metadata)}
    end = 0
    for name, (dtype, shape) in tensors.items():
        if dtype not in names:
            raise ValueError(f'safetensors files know no {dtype}, that of "{name}". Save a .pt.')
        start, end = end, end + math.prod(shape) * dtype.itemsize
        text[name] = {"dtype": names[dtype], "shape": list(shape), "data_offsets": [start, end]}
    body = json.dumps(text, separators=(",", ":")).encode()
    body = body.ljust(room - 8)
    body += b" " * (-len(body) % 8)
    if len(body) > _LONGEST:
        raise ValueError(
            f"the head of a safetensors file must be at most {_LONGEST:,} bytes; got "
            f"{len(body):,}. Save to a torch file (.pt) instead."
        )
    return len(body).to_bytes(8, "little") + body


def opened(path: str | os.PathLike[str]) -> Any:
    """Return the file as the library opens it, tensors unread.

    Raises:
        ImportError: safetensors is not installed.
    """
    try:
        from safetensors import safe_open
    except ImportError as error:
        raise ImportError(
            "Reading a .safetensors file needs safetensors: pip install parasparse[safetensors]"
        ) from error
    return safe_open(path, framework="pt")
