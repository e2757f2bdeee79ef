"""Operations that write at indices, and leave the other entries as they are."""

from __future__ import annotations

import torch
from torch import Tensor

from parasparse.shrink.calls import Call
from parasparse.shrink.facts import UNKNOWN, ZERO, Facts, everywhere, facts, lowest_of, worst
from parasparse.shrink.labels import compact, varying
from parasparse.shrink.rules.elementwise import cannot_lose, joined
from parasparse.shrink.tracing import Rule, Trace, unknown_operation


def _along(trace: Trace, call: Call) -> list[Facts]:
    """`index_add(x, dim, index, source)`: the other dimensions of the source meet those of x."""
    x, dim, index = call.args[:3]
    source = call.arg(3, "source")
    parts = [x, source] if isinstance(source, Tensor) else [x]
    if x.ndim == 0 or any(part.ndim != x.ndim for part in parts):
        return unknown_operation(trace, call)
    _pin(trace, index)
    return [_written(trace, call, [(part, [dim % x.ndim]) for part in parts])]


def _scattered(trace: Trace, call: Call) -> list[Facts]:
    """`scatter(x, dim, index, source)`: the index has the dimensions of both."""
    x, dim, index = call.args[:3]
    source = call.arg(3, "src", call.kwargs.get("value"))
    parts = [x, index, source] if isinstance(source, Tensor) else [x, index]
    rest = [[n for d, n in enumerate(p.shape) if d != dim % max(x.ndim, 1)] for p in parts]
    if x.ndim == 0 or any(sizes != rest[0] for sizes in rest):
        return unknown_operation(trace, call)
    return [_written(trace, call, [(part, [dim % x.ndim]) for part in parts])]


def _put(trace: Trace, call: Call) -> list[Facts]:
    """`index_put(x, indices, values)`: values have the dimensions of x that are not indexed."""
    x, indices, values = call.args[:3]
    first = sum(i.ndim if i.dtype in (torch.bool, torch.uint8) else 1 for i in indices
                if i is not None)  # fmt: skip
    if any(i is None for i in indices):
        return unknown_operation(trace, call)
    for index in indices:
        _pin(trace, index)
    rest = x.ndim - first
    leading = list(range(max(values.ndim - rest, 0)))
    return [_written(trace, call, [(x, list(range(first))), (values, leading)])]


def _pin(trace: Trace, index: Tensor) -> None:
    for label in trace.labels(index):
        trace.ties.pin(label, "used as an index")


def _written(trace: Trace, call: Call, parts: list[tuple[Tensor, list[int]]]) -> Facts:
    """Return the facts of the first of `parts`, into which the others are written.

    Args:
        trace: the run.
        call: the operation.
        parts: the tensors that meet, and the dimensions of each that are indexed.
    """
    (out,), dims = call.outs(), parts[0][1]
    rests = [_rest(trace, tensor, indexed) for tensor, indexed in parts]
    shape = rests[0].shape

    def whole(t: Tensor) -> Tensor:
        for dim in dims:
            t = t.unsqueeze(dim)
        return t.expand(out.shape)

    labels = [whole(label) for label in joined(trace, rests, shape)]
    values = [trace.state(rest) for rest in rests if rest.dtype == out.dtype]
    state = compact(lowest_of(values, shape))
    zero = (state == ZERO) & (len(values) > 1)  # or a number is written
    return facts(labels, whole((zero.to(torch.uint8) * ZERO).expand(shape)))


def _rest(trace: Trace, tensor: Tensor, dims: list[int]) -> Tensor:
    """Return a tensor without values that stands for `tensor` without `dims`."""
    rest = tensor.new_empty([n for d, n in enumerate(tensor.shape) if d not in dims], device="meta")
    labels = []
    for label in trace.labels(tensor):
        there = [dim for dim in varying(label) if dim in dims]
        if set(there) == set(varying(label)):
            trace.ties.pin(label, "written to by indices")
            continue
        cannot_lose(trace, label, there, "")
        labels.append(_without(label, dims).expand(rest.shape))
    state = compact(worst(trace.state(tensor), dims, tensor.shape))
    known = all(state.shape[dim] for dim in dims)
    state = _without(state, dims) if known else everywhere(UNKNOWN, rest.shape)
    trace.set_facts(rest, Facts(tuple(labels), state.expand(rest.shape)))
    return rest


def _without(tensor: Tensor, dims: list[int]) -> Tensor:
    tensor = compact(tensor)
    for dim in sorted(dims, reverse=True):
        tensor = tensor.select(dim, 0)
    return tensor


WRITES: dict[str, Rule] = {
    **dict.fromkeys(("index_add", "index_copy"), _along),
    **dict.fromkeys(("scatter", "scatter_add", "scatter_reduce"), _scattered),
    **dict.fromkeys(("index_put", "_index_put_impl", "_unsafe_index_put"), _put),
}
