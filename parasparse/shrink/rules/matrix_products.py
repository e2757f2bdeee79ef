"""Matrix products: they sum over the last dimension of one operand and one of the other."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from parasparse.shrink.calls import Call
from parasparse.shrink.facts import (
    UNKNOWN,
    Facts,
    facts,
    lowest_along,
)  # fmt: skip
from parasparse.shrink.labels import compact, varies, varying
from parasparse.shrink.products import Product, Read
from parasparse.shrink.rules.elementwise import along_all, merge
from parasparse.shrink.rules.products import (
    constants_of,
    inner_labels,
    name_of,
    only_zeros,
    product_state,
    sums_of,
)  # fmt: skip
from parasparse.shrink.tracing import Rule, Trace, unknown_operation


def _matrix_product(trace: Trace, call: Call) -> list[Facts]:
    """(..., M, K) times (..., K, N), plus a bias for addmm and baddbmm."""
    bias, x, w = (None, *call.args[:2]) if call.name in ("mm", "bmm", "mv") else call.args[:3]
    (out,) = call.outs()
    if not x.shape[-1] or not w.shape[-1]:  # nothing is summed up, or nothing comes out
        return unknown_operation(trace, call)
    x_over, x_other = _sorted(trace, x, -1)
    w_over, w_other = _sorted(trace, w, -2)
    for here, there in ((x_over, w_over), (w_over, x_over)):
        if here and not there and x.shape[-1] > 1:
            for label in (label for label in here if len(varying(label)) == 1):
                trace.ties.pin(label, "multiplied by a tensor whose size stays")
    for one, other in ((x, w), (w, x)):
        _keep_batches(trace, one, other)
    for a in x_over:
        for b in w_over:
            _meet(trace, a, b)
    if x_over and w_over and w.numel() and len(varying(x_over[0])) == 1:
        # A factor of the bias, `beta`, would be one of the constants that are added to it.
        _read(trace, x, w, x_over[0], w_other, None if call.kwargs else bias)
    if trace.leaf(w) or trace.leaf(w._base):
        rows = next((label for label in w_other if varying(label) == (w.ndim - 1,)), None)
        columns = next((label for label in w_over if varying(label) == (w.ndim - 2,)), None)
        trace.products.append(
            Product(
                out.numel() // out.shape[-1],
                _flat(rows, w.shape[-1]),
                _flat(columns, w.shape[-2]),
            )
        )
    labels: list[Tensor] = []
    for label in x_other:
        merge(trace, labels, label.narrow(-1, 0, 1).expand(out.shape))
    for label in w_other:
        merge(trace, labels, label.narrow(-2, 0, 1).expand(out.shape))
    state = _product_state(trace, call, x, w, bias)
    return [facts(_with_bias(trace, labels, bias, out), state)]


def _keep_batches(trace: Trace, x: Tensor, other: Tensor) -> None:
    """Keep what varies over the matrices of `x` if `other` would not have fewer matrices."""
    if x.ndim < 3 or other.stride(0) == 0:  # one matrix, repeated as often as needed
        return
    if not any(varies(label, 0) for label in trace.labels(other)):
        for label in trace.labels(x):
            if varies(label, 0):
                trace.ties.pin(label, "multiplied by a tensor whose size stays")


def _sorted(trace: Trace, tensor: Tensor, dim: int) -> tuple[list[Tensor], list[Tensor]]:
    """Return the labels that vary along the summed `dim`, and those of the result.

    A label that varies along other dimensions as well, as that of attention heads does, becomes
    one unit along `dim`, and is found in the result.
    """
    over, other = [], []
    for label in inner_labels(trace, tensor):
        if varies(label, dim % label.ndim):
            over.append(label)
            if len(varying(label)) > 1:
                along_all(trace, label, (dim % label.ndim,))
                other.append(label)
        else:
            other.append(label)
    return over, other


def _flat(label: Tensor | None, size: int) -> Tensor:
    return torch.zeros(size, dtype=torch.long) if label is None else compact(label).flatten()


def _meet(trace: Trace, a: Tensor, b: Tensor) -> None:
    """Tie labels that are summed over; what all heads use, such as keys of positions, stays."""
    is_one = [len(varying(label)) == 1 for label in (a, b)]
    if is_one[0] != is_one[1]:  # the other is one unit along the sum: see `_sorted`
        trace.ties.pin(a if is_one[0] else b, "all units use it")
    else:
        trace.ties.tie(_ids(trace, a, -1), _ids(trace, b, -2))


def _ids(trace: Trace, label: Tensor, dim: int) -> Tensor:
    """Return the ids along the summed dimension, by batch."""
    rest = label.ndim - 1 if dim == -2 else label.ndim - 2
    if varies(label, rest):
        trace.ties.pin(label, "its channels are combined in two ways")
    return compact(label).select(rest, 0)


def _read(trace: Trace, x: Tensor, w: Tensor, over: Tensor, rows: list[Tensor], bias: Any) -> None:
    """Remember a product with a weight that has the same columns for the whole batch."""
    size = w.shape[-1]
    pure = [label for label in rows if varying(label) == (w.ndim - 1,)]
    state = lowest_along(trace.state(x), x.ndim - 1)
    states = compact(trace.state(w))
    states = states if w.ndim == 2 else states.flatten(0, -3).amin(0)
    name, summed = _stored(trace, w)
    trace.reads.append(
        Read(
            columns=compact(over).reshape(-1, over.shape[-1])[:1],
            rows=pure[0].reshape(-1, size)[0] if pure else torch.zeros(size, dtype=torch.long),
            states=states.expand(w.shape[-2:]).t(),
            constants=constants_of(x.reshape(-1, x.shape[-1]), state).unsqueeze(0),
            weight=name,
            summed=summed,
            bias=name_of(trace, bias),
            padded=False,
            module=trace.module,
        )
    )


def _stored(trace: Trace, w: Tensor) -> tuple[str | None, int]:
    """Return the name of the matrix that `w` is, or is the transpose of, and what is summed."""
    if w.ndim > 2:  # a matrix for each of the batch, to which no constant can be added
        return None, 0
    if trace.leaf(w):
        return name_of(trace, w), 0
    base = w._base
    if base is not None and (w.shape, w.stride()) == (base.shape[::-1], base.stride()[::-1]):
        return name_of(trace, base), 1
    return None, 0


def _with_bias(trace: Trace, labels: list[Tensor], bias: Any, out: Tensor) -> list[Tensor]:
    """Tie the labels of a bias to those of the product that it is added to."""
    if isinstance(bias, Tensor):
        sized = [d for d in range(out.ndim) if d >= out.ndim - bias.ndim
                 and bias.shape[d - out.ndim + bias.ndim] > 1]  # fmt: skip
        added = [label.expand(out.shape) for label in trace.labels(bias)]
        for label in labels:
            dims = [
                d for d in varying(label) if d in sized and not any(varies(a, d) for a in added)
            ]
            if dims:
                trace.ties.pin(label, "a bias whose size stays is added")
        for label in added:
            if not any(set(varying(label)) & set(varying(other)) for other in labels):
                trace.ties.pin(label, "added to a tensor whose size stays")
            merge(trace, labels, label)
    return labels


def _product_state(trace: Trace, call: Call, x: Tensor, w: Tensor, bias: Any) -> Tensor:
    """Return which sums do not depend on the input: those whose terms are all known or ZERO."""
    rows = compact(trace.state(x)).amin(-2, keepdim=True).transpose(-1, -2)
    if not (trace.leaf(w) or trace.leaf(w._base)):  # perhaps a sum over the places of a sequence
        rows = only_zeros(rows)
    zero, depends = sums_of(rows, compact(trace.state(w)), -2)
    known = ~depends
    if isinstance(bias, Tensor):
        known = known & (compact(trace.state(bias)) != UNKNOWN)
    return product_state(trace, call, zero, known, bias)


MATRIX_PRODUCTS: dict[str, Rule] = dict.fromkeys(("mm", "addmm", "bmm", "baddbmm"), _matrix_product)
