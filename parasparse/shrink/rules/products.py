"""What matrix products and convolutions have in common."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from parasparse.shrink.calls import Call
from parasparse.shrink.facts import KNOWN, UNKNOWN, ZERO, with_zeros
from parasparse.shrink.labels import compact, varying
from parasparse.shrink.tracing import Trace


def constants_of(x: Tensor, state: Tensor) -> Tensor:
    """Return the value of each column of `x` if it is the same whatever the input is, or NaN."""
    kind = torch.complex128 if x.is_complex() else torch.float64
    values = torch.full((x.shape[-1],), torch.nan, dtype=kind)
    values[state == ZERO] = 0.0
    known = (state == KNOWN).nonzero().flatten()
    if x.is_meta or not len(x) or not len(known):
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


def inner_labels(trace: Trace, tensor: Tensor) -> list[Tensor]:
    """Return the labels of `tensor`, one for each dimension: the outer ones of two kinds stay.

    Such are the experts and the inner channels of fused weights.
    """
    kept: list[Tensor] = []
    for label in sorted(trace.labels(tensor), key=_is_outer):
        if any(varying(label) == varying(other) for other in kept):
            trace.ties.pin(label, "other channels share its dimension")
        else:
            kept.append(label)
    return kept


def _is_outer(label: Tensor) -> bool:
    """Whether neighbours have the same id."""
    ids = compact(label).flatten()[:2]
    return len(ids) < 2 or bool(ids[0] == ids[1])


def only_zeros(state: Tensor) -> Tensor:
    """Return `state` with UNKNOWN for KNOWN: for results that depend on the place or the size.

    At the border of an image, or for a longer sequence, they are others than in the example.
    """
    small = compact(state)
    return small.masked_fill(small == KNOWN, UNKNOWN).expand(state.shape)


def sums_of(a: Tensor, b: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """Return which sums over `dim` of products are 0, and which depend on the input.

    Args:
        a: states of the one operand.
        b: states of the other one, often of a large weight: so few passes are made over them.
        dim: the dimension, of size 1 in the results.
    """
    if not a.numel() or not b.numel():
        nothing = torch.zeros_like((a + b).sum(dim, keepdim=True), dtype=torch.bool)
        return ~nothing, nothing
    some = bool(a.any())
    zero = (torch.maximum(b, a) if some else b).amin(dim, keepdim=True) == ZERO
    if not some or not bool((a == KNOWN).any()):
        return zero, ~zero
    has_unknown = int(b.amin()) == UNKNOWN
    known = (a != UNKNOWN).to(torch.uint8) * ZERO
    depends = torch.maximum(b, known).amin(dim, keepdim=True) != ZERO
    if has_unknown:
        depends = depends | ((a != ZERO) & (b == UNKNOWN)).any(dim, keepdim=True)
    return zero, depends


def product_state(
    trace: Trace, call: Call, zero: Tensor, known: Tensor, bias: Tensor | None
) -> Tensor:
    """Return the state of a product, and compute the entries of a stand-in that are known.

    Args:
        trace: the run.
        call: the product.
        zero: whether the products that are summed up are all 0; broadcasts to the result.
        known: whether the result does not depend on the input, of the shape of `zero`.
        bias: what is added, of a shape that broadcasts to that of the result.
    """
    (out,) = call.outs()
    if bias is not None:
        known, _ = torch.broadcast_tensors(known, bias)
    state = known.to(torch.uint8)  # KNOWN or UNKNOWN
    if not out.numel():  # nothing tells what the values would be, but for zeros
        silent = zero if bias is None else zero & (bias == 0)
        return state.masked_fill(known & silent, ZERO).expand(out.shape)
    if not call.is_stand_in or not bool(known.any()):
        return with_zeros(state.expand(out.shape), out)
    if bool((known & ~zero).any()):
        trace.need_values(call.tensors())
        out.copy_(call.function(*call.args))
        return with_zeros(state.expand(out.shape), out)
    out.mul_((~known).to(out))
    if bias is None:
        return (state * ZERO).expand(out.shape)
    out.add_(torch.where(known.to(out.device), bias, 0))
    return with_zeros(state, bias.expand(state.shape)).expand(out.shape)
