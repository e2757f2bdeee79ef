"""Bools as bits, eight per byte, and tensors as bytes on the CPU."""

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

# Eight bools are a little-endian word of bytes 0 and 1. Bit 56 + j of its product is byte j.
_GATHER = 0x0102_0408_1020_4080


def pack_bits(bools: Tensor) -> Tensor:
    """Return `bools` as uint8, eight per byte from the lowest bit up, padded with 0."""
    flat = bools.flatten().view(torch.uint8)
    if flat.numel() % 8:
        flat = torch.cat([flat, flat.new_zeros(-flat.numel() % 8)])
    return (flat.view(torch.int64) * _GATHER).view(torch.uint8)[7::8].contiguous()


def unpack_bits(bits: Tensor, number: int) -> Tensor:
    """Return the first `number` of `bits` as bools."""
    powers = torch.tensor([1, 2, 4, 8, 16, 32, 64, 128], dtype=torch.uint8, device=bits.device)
    return (bits.unsqueeze(1) & powers).flatten()[:number] != 0


def buffer(data: Tensor) -> ctypes.Array[ctypes.c_ubyte]:
    """Return the bytes of a contiguous uint8 tensor without a copy; `data` must outlive them."""
    # Not Tensor.numpy(), because numpy is not a dependency.
    return (ctypes.c_ubyte * data.numel()).from_address(data.data_ptr())


@contextmanager
def on_cpu() -> Iterator[None]:
    """New tensors are on the CPU, whatever the default device is."""
    if torch.empty(0).device.type == "cpu":
        yield  # any `torch.device` costs time in each call
        return
    with torch.device("cpu"):
        yield
