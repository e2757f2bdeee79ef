"""Bools as bits, eight per byte, and tensors as bytes."""

import ctypes

import torch
from torch import Tensor

# Eight bools, a little-endian word of bytes 0 and 1, times this have bit 56 + j where byte j is 1.
_GATHER = 0x0102_0408_1020_4080


def pack_bits(bools: Tensor) -> Tensor:
    """Return `bools` as bits, uint8: eight a byte, from the lowest bit up, filled with 0."""
    flat = bools.flatten().view(torch.uint8)
    if flat.numel() % 8:
        flat = torch.cat([flat, flat.new_zeros(-flat.numel() % 8)])
    return (flat.view(torch.int64) * _GATHER).view(torch.uint8)[7::8].contiguous()


def unpack_bits(bits: Tensor, number: int) -> Tensor:
    """Return the first `number` of `bits` as bools."""
    powers = torch.tensor([1, 2, 4, 8, 16, 32, 64, 128], dtype=torch.uint8, device=bits.device)
    return (bits.unsqueeze(1) & powers).flatten()[:number] != 0


def buffer(data: Tensor) -> ctypes.Array[ctypes.c_ubyte]:
    """Return the bytes of a contiguous uint8 tensor, not copied; `data` must outlive them."""
    # Tensor.numpy() would do, but numpy is no dependency.
    return (ctypes.c_ubyte * data.numel()).from_address(data.data_ptr())
