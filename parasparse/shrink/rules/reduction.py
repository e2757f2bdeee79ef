"""Operations that work along dimensions: sums, means, norms, softmax."""

from __future__ import annotations

from typing import Any

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
    lowest_of,
    with_zeros,
    worst,
)  # fmt: skip
from parasparse.shrink.labels import along, compact, tidy, varies, varying
from parasparse.shrink.means import RMS_NORMS
from parasparse.shrink.rules.elementwise import cannot_lose
from parasparse.shrink.rules.products import only_zeros
from parasparse.shrink.tracing import Rule, Trace

_AVERAGES = ("mean", "var", "var_mean", "std", "std_mean")
_SUMS = ("sum", "linalg_vector_norm", "norm", "nansum")


def _reduced(trace: Trace, call: Call) -> list[Facts]:
    """Sums, means and extremes: the reduced dimensions go."""
    x = call.args[0]
    dims, keep = _dims_of(call), _keeps(call, x)
    labels = []
    for label in trace.labels(x):
        there = [dim for dim in varying(label) if dim in dims]
        if there and set(there) == set(varying(label)):
            _reduced_whole(trace, call, label)
            continue
        cannot_lose(trace, label, there, "")
        labels.append(_without_dims(label, dims, keep))
    state = worst(trace.state(x), dims, x.shape)
    if call.name in _SUMS or call.name == "prod":
        state = only_zeros(state)
    elif call.name == "logsumexp":  # the logarithm of how many there are, of what is 0
        state = everywhere(UNKNOWN, x.shape)
    state = _without_dims(state, dims, keep)
    return [
        facts([label.expand(out.shape) for label in labels],
              with_zeros(state.expand(out.shape), out))
        for out in call.outs()
    ]  # fmt: skip


def _reduced_whole(trace: Trace, call: Call, label: Tensor) -> None:
    if call.name in _AVERAGES:
        for out in call.outs():
            trace.means.start(label, trace.state(call.args[0]), trace.module, out, of=call.name)
    elif call.name in _SUMS and not _is_least(call):
        trace.sums.append((label, trace.state(call.args[0]), trace.module))
    else:
        trace.ties.pin(label, f"{call.name} over channels")


def _is_least(call: Call) -> bool:
    """Whether a norm is one of a negative order, which zeros would decide."""
    order = call.arg(1, "ord", 2) if "norm" in call.name else 2
    return isinstance(order, (int, float)) and order < 0


def _dims_of(call: Call) -> list[int]:
    x = call.args[0]
    place = 2 if call.name in ("linalg_vector_norm", "norm") else 1
    dims = call.arg(place, "dim")
    if (
        call.name in ("max", "min", "prod", "any", "all", "sum", "mean", "var", "std")
        and len(call.args) <= 1
    ):
        dims = call.kwargs.get("dim")
    if dims is None or dims == [] or isinstance(dims, bool):
        return list(range(x.ndim))
    return [d % max(x.ndim, 1) for d in ([dims] if isinstance(dims, int) else dims)]


def _keeps(call: Call, x: Tensor) -> bool:
    return bool(call.outs()[0].ndim == x.ndim)


def _without_dims(tensor: Tensor, dims: list[int], keep: bool) -> Tensor:
    tensor = compact(tensor)
    if not tensor.numel():  # ids and states are 0: what comes out stays, and is not known
        tensor = tensor.new_zeros([max(size, 1) for size in tensor.shape])
    for dim in sorted(dims, reverse=True):
        tensor = tensor.narrow(dim, 0, 1) if keep else tensor.select(dim, 0)
    return tensor


def _softmax(trace: Trace, call: Call) -> list[Facts]:
    """Each entry depends on all entries along a dimension."""
    x, dim = call.args[0], call.arg(1, "dim", -1)
    for label in trace.labels(x):
        if varies(label, dim % label.ndim):
            cannot_lose(trace, label, [dim % label.ndim], f"{call.name} over channels")
    state = only_zeros(worst(trace.state(x), [dim], x.shape))
    if not call.name.startswith("cum"):
        state = everywhere(UNKNOWN, x.shape)  # 1 / size, of what is 0
    return [
        facts(list(trace.labels(x)), with_zeros(state, out)) if out.shape == x.shape
        else Facts((), everywhere(UNKNOWN, out.shape))
        for out in call.outs()
    ]  # fmt: skip


def _glu(trace: Trace, call: Call) -> list[Facts]:
    """`glu`: the halves along a dimension are multiplied."""
    x, dim, (out,) = call.args[0], call.arg(1, "dim", -1), call.outs()
    labels = []
    dim %= x.ndim
    for label in trace.labels(x):
        if varies(label, dim):
            first, second = label.chunk(2, dim)
            trace.ties.tie(first, second)
            trace.shapes.append(label.unflatten(dim, (2, -1)).movedim(dim, 0))
            label = first
        else:
            label = label.narrow(dim, 0, 1).expand(out.shape)
        labels.append(label)
    a, b = trace.state(x).chunk(2, dim)
    return [facts(labels, with_zeros(lowest_of([a, b], out.shape), out))]


def _batch_norm(trace: Trace, call: Call) -> list[Facts]:
    """Statistics and weights of each channel. In training, they are of what is normalized."""
    x, (out, *rest) = call.args[0], call.outs()
    if call.arg(5, "training", False):
        _averaged(trace, x, [d for d in range(x.ndim) if d != 1])
    per_channel = [t for t in call.args[1:5] if isinstance(t, Tensor)]
    _tie_channels(trace, x, per_channel, 1)
    states = [lowest_along(trace.state(x), 1), *map(trace.state, per_channel)]
    state = lowest_of(states, states[0].shape)
    weight = call.args[1]
    if isinstance(weight, Tensor):
        state = state.masked_fill(trace.state(weight) == ZERO, KNOWN)
    state = tidy(with_zeros(along(state.contiguous(), 1, x.shape), out))
    return [Facts(trace.labels(x), state)] + [Facts((), everywhere(UNKNOWN, o.shape)) for o in rest]


def _tie_channels(trace: Trace, x: Tensor, tensors: list[Tensor], dim: int) -> None:
    """Tie the labels of 1-D tensors to those of dimension `dim` of `x`."""
    dim %= x.ndim
    there = [each for each in trace.labels(x) if varies(each, dim)]
    if len(there) == 1 and varying(there[0]) == (dim,):
        ids = compact(there[0]).flatten()
        tensors = [tensor for tensor in tensors if not trace.take_ids(tensor, ids)]
    labels = [label for tensor in tensors for label in trace.labels(tensor)]
    stays = any(not trace.labels(tensor) and tensor.numel() > 1 for tensor in tensors)
    for each in there if labels else ():
        sizes = [-1 if d == dim else 1 for d in range(x.ndim)]
        trace.ties.tie(each, torch.stack(labels).view(len(labels), *sizes))
    for each in there if stays else ():
        trace.ties.pin(each, "it meets a tensor whose size stays")
    for label in () if there else labels:
        trace.ties.pin(label, "norm of channels that stay")


def _layer_norm(trace: Trace, call: Call) -> list[Facts]:
    """`layer_norm` and `rms_norm`: the last dimensions are averaged over."""
    x, shape = call.args[0], call.args[1]
    dims = list(range(x.ndim - len(shape), x.ndim))
    if call.name in RMS_NORMS:
        _rms_norm(trace, call, dims)
    else:
        _averaged(trace, x, dims)
    weights = [t for t in call.args[2:4] if isinstance(t, Tensor)]
    if len(shape) == 1:
        _tie_channels(trace, x, weights, -1)
    else:
        for label in (label for t in weights for label in trace.labels(t)):
            trace.ties.pin(label, "norm over several dimensions")
    return _normed(trace, call, worst(trace.state(x), dims, x.shape))


def _rms_norm(trace: Trace, call: Call, dims: list[int]) -> None:
    x, weight, epsilon = call.args[0], call.arg(2, "weight"), call.arg(3, "eps")
    labels = [label for label in trace.labels(x) if set(dims) & set(varying(label))]
    if len(labels) == 1 and set(varying(labels[0])) <= set(dims):
        trace.means.norm(labels[0], trace.state(x), trace.module, weight, epsilon)
        return
    _averaged(trace, x, dims)
    for tensor in call.tensors():
        trace.means.use(tensor)


def _group_norm(trace: Trace, call: Call) -> list[Facts]:
    """Each group of channels is averaged over, with all places: whole groups can go."""
    x, groups = call.args[0], call.args[6]
    channels = [d for d in range(x.ndim) if d != 0]
    for label in trace.labels(x):
        if varying(label) == (1,) and groups > 1:
            grid = compact(label).reshape(groups, -1)
            trace.shapes.append(grid)  # the others keep equally many
            trace.normed_groups.append((grid, trace.module))
        elif varying(label) == (1,):
            trace.average(label)
        else:
            cannot_lose(trace, label, [d for d in varying(label) if d in channels], "group norm")
    _tie_channels(trace, x, [t for t in call.args[1:3] if isinstance(t, Tensor)], 1)
    each = lowest_along(trace.state(x), 1).reshape(groups, -1)
    state = each.amin(1, keepdim=True).expand(each.shape).flatten()
    return _normed(trace, call, along(state, 1, x.shape))


def _averaged(trace: Trace, x: Tensor, dims: list[int]) -> None:
    for label in trace.labels(x):
        there = [dim for dim in varying(label) if dim in dims]
        if there and set(there) == set(varying(label)):
            trace.average(label)
        else:
            cannot_lose(trace, label, there, "")


def _normed(trace: Trace, call: Call, state: Tensor) -> list[Facts]:
    x, (out, *rest) = call.args[0], call.outs()
    tensors: list[Any] = [t for t in call.tensors()[1:] if t.ndim]
    if any(bool((trace.state(t) == UNKNOWN).any()) for t in tensors):
        state = everywhere(UNKNOWN, out.shape)
    return [facts(list(trace.labels(x)), with_zeros(state, out))] + [
        Facts((), everywhere(UNKNOWN, o.shape)) for o in rest
    ]


REDUCTIONS: dict[str, Rule] = {
    **dict.fromkeys((*_AVERAGES, *_SUMS, "amax", "amin", "max", "min", "prod", "logsumexp", "any",
                     "all"), _reduced),
    **dict.fromkeys(("_softmax", "_log_softmax", "_safe_softmax", "cumsum", "cumprod",
                     "logcumsumexp", "cummax"), _softmax),
    "glu": _glu,
    **dict.fromkeys(("native_batch_norm", "cudnn_batch_norm", "batch_norm",
                     "_native_batch_norm_legit_no_training", "_batch_norm_no_update"), _batch_norm),
    **dict.fromkeys(("native_layer_norm", "_fused_rms_norm", "rms_norm"), _layer_norm),
    "native_group_norm": _group_norm,
}  # fmt: skip
