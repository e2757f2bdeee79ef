"""Tensors in packed files of version 1: a bitmask of what is kept, then its values as they are."""

from typing import Any

import torch
from torch import Tensor

from parasparse.files.bits import buffer
from parasparse.files.headers import crc32
from parasparse.files.packing import Packed, unpack_tensor


def unpacked(entry: dict[str, Any], dtype: torch.dtype, data: Tensor) -> Tensor:
    """Return the tensor of an entry {dtype, shape, unit, bits, crc32} of the header.

    `bits` is the number of bytes of the bitmask, which precedes the values.
    """
    if crc32(buffer(data)) != entry["crc32"]:
        raise ValueError("The checksum does not match.")
    bits, values = data[: entry["bits"]], data[entry["bits"] :]
    # The copy is aligned for `dtype`. Without bits, `unpack_tensor` copies.
    values = (values.clone() if len(bits) else values).view(dtype)
    shape, unit = tuple(entry["shape"]), (entry["unit"][0], entry["unit"][1])
    return unpack_tensor(Packed(dtype, shape, unit, bits if len(bits) else None, values))
