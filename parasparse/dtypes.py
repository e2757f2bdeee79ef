"""What some dtypes cannot do in torch, and the dtypes to use instead."""

import torch
from torch import Tensor

_SIGNED = {torch.uint16: torch.int16, torch.uint32: torch.int32, torch.uint64: torch.int64}


def is_maskable(dtype: torch.dtype) -> bool:
    """Whether entries of `dtype` are numbers; an entry of float4 holds two, and torch has no 0."""
    packed = getattr(torch, "float4_e2m1fn_x2", None)
    return (dtype.is_floating_point or dtype.is_complex) and dtype != packed


def widened_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return float32 for a dtype of one byte, else `dtype`."""
    return torch.float32 if dtype.itemsize == 1 else dtype


def widened(tensor: Tensor) -> Tensor:
    """Return a tensor of one-byte entries as float32: float8 has no abs, comparison or division."""
    return tensor.to(torch.float32) if tensor.dtype.itemsize == 1 else tensor


def total(tensor: Tensor) -> Tensor:
    """Return the sum of all entries, in 32 bits at least: in float16 it would soon be inf."""
    half = tensor.is_floating_point() and tensor.dtype.itemsize < 4
    return tensor.sum(dtype=torch.float32) if half else tensor.sum()


def all_finite(tensor: Tensor) -> bool:
    """Whether no entry of a real `tensor` is NaN or infinite."""
    # The extremes are NaN if an entry is. They need no memory.
    extremes = tensor.detach().aminmax() if tensor.numel() else ()
    return all(bool(extreme.isfinite()) for extreme in extremes)


def is_comparable(dtype: torch.dtype) -> bool:
    """Whether torch compares entries of `dtype`: all but unsigned ones of more than a byte."""
    return dtype not in _SIGNED


def signed(tensor: Tensor) -> Tensor:
    """Return the bits of an incomparable tensor as signed integers; other tensors as they are."""
    return tensor if is_comparable(tensor.dtype) else tensor.view(_SIGNED[tensor.dtype])
