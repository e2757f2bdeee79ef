"""What matrix products and convolutions have in common."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from parasparse.shrink.facts import KNOWN, UNKNOWN, ZERO
from parasparse.shrink.tracing import Trace


def constants_of(x: Tensor, state: Tensor) -> Tensor:
    """Return the value of each column of `x` if it is the same whatever the input is, or NaN."""
    kind = torch.complex128 if x.is_complex() else torch.float64
    values = torch.full((x.shape[-1],), torch.nan, dtype=kind)
    known = (state != UNKNOWN).nonzero().flatten()
    if x.is_meta or not len(known):
        values[state == ZERO] = 0.0
        return values
    columns = x[:, known.to(x.device)].cpu().to(kind)
    # A kernel computes the last entries of a row by other instructions, which may round otherwise.
    rounding = 8 * torch.finfo(x.dtype).eps * columns[:1].abs()
    same = ((columns - columns[:1]).abs() <= rounding).all(0)
    values[known[same]] = columns[0, same]
    return values


def name_of(trace: Trace, tensor: Any) -> str | None:
    """Return the name of the parameter or buffer that `tensor` is, or None."""
    leaf = trace.leaf(tensor)
    return leaf.name if leaf else None


def only_zeros(state: Tensor) -> Tensor:
    """Return `state` with UNKNOWN for KNOWN: for results that depend on the place or the size.

    At the border of an image, or for a longer sequence, they are others than in the example.
    """
    return torch.where(state == KNOWN, UNKNOWN, state).to(torch.uint8)


def depends_on_input(a: Tensor, b: Tensor, dim: int) -> Tensor:
    """Return which sums over `dim` of products depend on the input, with that dimension of size 1.

    Args:
        a: states of the one operand.
        b: states of the other one, often of a large weight: so this passes over them twice.
        dim: the dimension.
    """
    if not a.numel() or not b.numel():
        return torch.zeros_like((a + b).sum(dim, keepdim=True), dtype=torch.bool)
    known = (a != UNKNOWN).to(torch.uint8) * ZERO
    depends = torch.maximum(b, known).amin(dim, keepdim=True) != ZERO
    if int(b.amin()) == UNKNOWN:
        depends = depends | ((a != ZERO) & (b == UNKNOWN)).any(dim, keepdim=True)
    return depends
