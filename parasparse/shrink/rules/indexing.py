"""Operations that pick entries by indices: embeddings, gather, masks."""

from collections.abc import Callable

import torch
from torch import Tensor

from parasparse.shrink.calls import Call
from parasparse.shrink.facts import (
    KNOWN,
    UNKNOWN,
    ZERO,
    Facts,
    everywhere,
    facts,
    lowest_along,
    worst,
)  # fmt: skip
from parasparse.shrink.labels import compact, fixed_along, varies, varying
from parasparse.shrink.rules.elementwise import cannot_lose, merge
from parasparse.shrink.rules.products import only_zeros
from parasparse.shrink.tracing import Rule, Trace, lowest


def _embedded(trace: Trace, call: Call) -> list[Facts]:
    """`embedding`: rows are picked by data; columns go through."""
    weight, (out,) = call.args[0], call.outs()
    labels = []
    for label in trace.labels(weight):
        if varies(label, 0):
            trace.ties.pin(label, "rows of an embedding are picked by the input")
        else:
            labels.append(label.select(0, 0).expand(out.shape))
    row = only_zeros(lowest_along(trace.state(weight), 1))
    if call.is_stand_in:
        out.mul_((row != ZERO).to(out))
    return [facts(labels, row.expand(out.shape))]


def _indexed(trace: Trace, call: Call) -> list[Facts]:
    """`index`: dimensions that are indexed cannot lose entries."""
    x, indices, (out,) = call.args[0], list(call.args[1]), call.outs()
    dims: list[int] = []  # that are indexed
    dim = 0
    for index in indices:
        width = 1 if index is None or index.dtype not in (torch.bool, torch.uint8) else index.ndim
        dims += range(dim, dim + width) if index is not None else []
        dim += width
    state = trace.state(x)
    state = worst(state, dims, state.shape)
    return [_picked(trace, call, dims, out, lambda t: _index(t, indices, dims, out), state)]


def _index(tensor: Tensor, indices: list[Tensor | None], dims: list[int], out: Tensor) -> Tensor:
    """Index a tensor that does not vary along `dims`."""
    tensor = compact(tensor)
    for dim in dims:
        tensor = tensor.narrow(dim, 0, 1)
    rest = [d for d in range(tensor.ndim) if d not in dims]
    new = out.ndim - len(rest)
    together = dims == list(range(dims[0], dims[-1] + 1)) and len(dims) == dims[-1] - dims[0] + 1
    first = dims[0] if together else 0
    for dim in reversed(dims):
        tensor = tensor.squeeze(dim)
    for _ in range(new):
        tensor = tensor.unsqueeze(first)
    return tensor.expand(out.shape)


def _picked(
    trace: Trace, call: Call, dims: list[int], out: Tensor, run: Callable[[Tensor], Tensor],
    state: Tensor,
) -> Facts:  # fmt: skip
    """Return the facts of what is picked along `dims`; `run` does so with a label."""
    labels = []
    for label in trace.labels(call.args[0]):
        there = [dim for dim in varying(label) if dim in dims]
        if set(there) == set(varying(label)):
            trace.ties.pin(label, f"picked by indices ({call.name})")
            continue
        cannot_lose(trace, label, there, "")
        for dim in there:
            label = fixed_along(label, dim, label.shape[dim])
        labels.append(run(label))
    for tensor in call.tensors()[1:]:
        for label in trace.labels(tensor):
            if call.name == "gather" and _is_cut_with(label, labels, call.args[0].shape, dims):
                merge(trace, labels, label)
            else:
                trace.ties.pin(label, "used as an index")
    state = run(state)
    if lowest(trace, call.tensors()[1:]) == UNKNOWN:  # zeros are zeros wherever they are picked
        state = only_zeros(state)
    return facts(labels, state.expand(out.shape))


def _is_cut_with(label: Tensor, labels: list[Tensor], shape: torch.Size, dims: list[int]) -> bool:
    """Whether the index of `gather` varies where its source does, and nowhere else."""
    return all(
        dim not in dims and label.shape[dim] == shape[dim]
        and any(varies(other, dim) for other in labels)
        for dim in varying(label)
    )  # fmt: skip


def _along(trace: Trace, call: Call) -> list[Facts]:
    """`gather`, `index_select`, sorting: one dimension is indexed, the others stay."""
    x, (out, *rest) = call.args[0], call.outs()
    dim = call.arg(1, "dim", -1) if call.name in _DIM_FIRST else call.arg(2, "dim", -1)
    if call.name in ("argmax", "argmin"):
        dim = call.arg(1, "dim")
    if dim is None or x.ndim == 0:
        for label in trace.labels(x):
            trace.ties.pin(label, f"{call.name} over channels")
        return [Facts((), everywhere(UNKNOWN, o.shape)) for o in call.outs()]
    dim %= x.ndim
    state = worst(trace.state(x), [dim], x.shape)

    def run(t: Tensor) -> Tensor:
        t = t.narrow(dim, 0, 1)
        if out.ndim < x.ndim:
            return t.squeeze(dim).expand(out.shape)
        for d in range(x.ndim):  # gather takes as many entries as its index has
            if d != dim and out.shape[d] != t.shape[d]:
                t = t.narrow(d, 0, out.shape[d])
        return t.expand(out.shape)

    dims = [dim]
    if call.name == "gather":
        index = call.args[2]
        there = [d for d in range(x.ndim) if index.shape[d] > 1 and index.stride(d)]
        dims += [d for d in there if not any(varies(a, d) for a in trace.labels(index))]  # stay
    found = _picked(trace, call, dims, out, run, state)
    places = Facts(found.labels, everywhere(UNKNOWN, out.shape))
    first = places if call.name.startswith("arg") else found
    return [first] + [places if o.shape == out.shape else
                      Facts((), everywhere(UNKNOWN, o.shape)) for o in rest]  # fmt: skip


_DIM_FIRST = ("gather", "index_select", "sort", "argsort")


def _data(trace: Trace, call: Call) -> list[Facts]:
    """Results whose shape or value depends on data: the program may branch on them."""
    unknown = lowest(trace, call.tensors()) == UNKNOWN
    for tensor in call.tensors():
        for label in trace.labels(tensor):
            trace.ties.pin(label, f"{call.name} of channels")
    if unknown:
        trace.branches.append(f"{call.name} in {trace.module or 'forward'}")
        trace.constants_hold &= call.name not in ("item", "_local_scalar_dense")
    state = UNKNOWN if unknown else KNOWN
    return [Facts((), everywhere(state, out.shape)) for out in call.outs()]


INDEXING: dict[str, Rule] = {
    "embedding": _embedded, "index": _indexed, "_unsafe_index": _indexed,
    **dict.fromkeys(("gather", "index_select", "sort", "argsort", "topk", "argmax", "argmin",
                     "kthvalue"), _along),
    **dict.fromkeys(("_local_scalar_dense", "item", "nonzero", "masked_select", "_unique2",
                     "is_nonzero", "bincount", "equal"), _data),
}  # fmt: skip
