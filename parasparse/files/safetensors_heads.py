"""The safetensors format.

The safetensors library reads. It can only write tensors that are all in memory, so writing is done
here: 8 bytes with the length of a JSON text, the text, the tensors' bytes.
"""

import json
import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from parasparse.text import needs

_LONGEST = 100_000_000  # the library reads no longer head
_NAMES = {
    "BOOL": "bool", "U8": "uint8", "I8": "int8", "I16": "int16", "U16": "uint16", "I32": "int32",
    "U32": "uint32", "I64": "int64", "U64": "uint64", "F16": "float16", "BF16": "bfloat16",
    "F32": "float32", "F64": "float64", "C64": "complex64", "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2", "F8_E4M3FNUZ": "float8_e4m3fnuz", "F8_E5M2FNUZ": "float8_e5m2fnuz",
    "F8_E8M0": "float8_e8m0fnu", "F4": "float4_e2m1fn_x2",
}  # fmt: skip
DTYPES: dict[str, torch.dtype] = {
    ours: getattr(torch, theirs) for ours, theirs in _NAMES.items() if hasattr(torch, theirs)
}


# Formats whose shape counts numbers, where an item of torch's tensor holds several.
_PER_ITEM = {"F4": 2}


def torch_shape(kind: str, shape: Sequence[int]) -> tuple[int, ...]:
    """Return the shape of torch's tensor for a tensor of a safetensors file."""
    return (*shape[:-1], shape[-1] // _PER_ITEM.get(kind, 1)) if shape else ()


def head(
    metadata: Mapping[str, str],
    tensors: Mapping[str, tuple[torch.dtype, Sequence[int]]],
    *,
    room: int = 0,
) -> bytes:
    """Return the bytes before the tensors, at least `room`; tensors follow without gaps in order.

    Raises:
        ValueError: safetensors cannot store a name or dtype, or the head is too long.

    Examples:
        >>> head({}, {"a": (torch.uint8, [3])})[8:]
        b'{"__metadata__":{},"a":{"dtype":"U8","shape":[3],"data_offsets":[0,3]}} '
    """
    odd = [n for n in tensors if n == "__metadata__" or n.encode(errors="replace").decode() != n]
    if odd:
        raise ValueError(
            f"safetensors cannot store the tensor name {odd[0]!r}. Save to a .pt file."
        )
    names = {dtype: name for name, dtype in DTYPES.items()}
    text: dict[str, object] = {"__metadata__": dict(metadata)}
    end = 0
    for name, (dtype, shape) in tensors.items():
        if dtype not in names:
            raise ValueError(f'safetensors cannot store {dtype} ("{name}"). Save to a .pt file.')
        start, end = end, end + math.prod(shape) * dtype.itemsize
        kind = names[dtype]
        sizes = [*shape[:-1], shape[-1] * _PER_ITEM.get(kind, 1)] if shape else []
        text[name] = {"dtype": kind, "shape": sizes, "data_offsets": [start, end]}
    body = json.dumps(text, separators=(",", ":")).encode().ljust(room - 8)
    body += b" " * (-len(body) % 8)
    if len(body) > _LONGEST:
        raise ValueError(
            f"the head of a safetensors file must have at most {_LONGEST:,} bytes; got "
            f"{len(body):,}. Save to a .pt file."
        )
    return len(body).to_bytes(8, "little") + body


def opened(path: str | os.PathLike[str]) -> Any:
    """Return the file opened by the library; raise ImportError if that is not installed."""
    try:
        from safetensors import safe_open
    except ImportError as error:
        raise ImportError(
            needs("reading a .safetensors file", "safetensors", "safetensors")
        ) from error
    return safe_open(path, framework="pt")
