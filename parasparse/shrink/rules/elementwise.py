"""Operations that work entry by entry: what meets belongs together."""

import torch
from torch import Tensor

from parasparse.shrink.calls import Call
from parasparse.shrink.facts import (
    KNOWN,
    UNKNOWN,
    Facts,
    everywhere,
    lowest_of,
    with_zeros,
    zero_where,
)  # fmt: skip
from parasparse.shrink.labels import fixed_along, tidy, varies, varying
from parasparse.shrink.tracing import Rule, Trace


def elementwise(trace: Trace, call: Call) -> list[Facts]:
    """Tie the labels of operands that vary along the same dimensions."""
    outs = call.outs()
    shape = outs[0].shape
    if any(tensor.shape != shape for tensor in call.tensors()):
        shape = torch.broadcast_tensors(*call.tensors(), outs[0])[0].shape
    labels = joined(trace, call.tensors(), shape)
    found = Facts(tuple(labels), tidy(_state(trace, call, outs[0], shape)))
    return [found if out.shape == shape else _without(trace, labels, out) for out in outs]


def joined(trace: Trace, operands: list[Tensor], shape: torch.Size) -> list[Tensor]:
    """Return the labels of what operands of broadcast `shape` give, and tie those that meet."""
    if len(operands) == 1 and len(trace.labels(operands[0])) < 2:
        return [label.expand(shape) for label in trace.labels(operands[0])]
    expanded = [[label.expand(shape) for label in trace.labels(t)] for t in operands]
    for number, labels in enumerate(expanded):
        for label in labels:
            for other, tensor in enumerate(operands):
                if other != number:
                    _meet_fixed(trace, label, tensor, expanded[other], shape)
    out: list[Tensor] = []
    for label in (label for labels in expanded for label in labels):
        merge(trace, out, label)
    return out


def merge(trace: Trace, labels: list[Tensor], label: Tensor) -> None:
    """Add `label` to the `labels` of a tensor, tied to those that vary where it does."""
    dims = set(varying(label))
    for place, other in enumerate(labels):
        there = set(varying(other))
        if not dims & there:
            continue
        if dims == there:
            trace.ties.tie(label, other)
        elif dims < there:
            _join(trace, other, label)
        else:
            del labels[place]
            if there < dims:
                _join(trace, label, other)
            else:  # such as the queries and keys of each head: heads stay whole
                label, other = (_one_along(trace, each, dims & there) for each in (label, other))
                trace.ties.tie(label, other)
            merge(trace, labels, label)  # with others that vary where it does
        return
    labels.append(label)


def _join(trace: Trace, big: Tensor, small: Tensor) -> None:
    """Make one unit of what `big` has along the dimensions of `small`, as of an attention head."""
    shared, dims = varying(small), varying(big)
    if dims[-1] in shared:  # such as the norm of each head: its weights are used by all heads
        along_all(trace, big, shared)
        trace.ties.pin(small, "all units use it")
    else:
        trace.ties.tie(big, small)


def _one_along(trace: Trace, label: Tensor, dims: set[int]) -> Tensor:
    """Make `label` one unit for each index of `dims`; return it as it varies along them alone."""
    others = tuple(set(varying(label)) - dims)
    along_all(trace, label, others)
    for dim in others:
        label = fixed_along(label, dim, label.shape[dim])
    return label


def along_all(trace: Trace, label: Tensor, dims: tuple[int, ...]) -> None:
    """Make entries of `label` that differ along `dims` alone one unit."""
    first = label
    for dim in dims:
        first = fixed_along(first, dim, label.shape[dim])
    trace.ties.tie(label, first)


def cannot_lose(trace: Trace, label: Tensor, dims: list[int], reason: str) -> None:
    """Make sure that `label` loses no single entries along `dims`: all of them, or none."""
    if not dims:
        return
    if set(varying(label)) - set(dims):
        along_all(trace, label, tuple(dims))
    else:
        trace.ties.pin(label, reason)


def _meet_fixed(
    trace: Trace, label: Tensor, tensor: Tensor, others: list[Tensor], shape: torch.Size
) -> None:
    skipped = len(shape) - tensor.ndim
    dims = [
        dim
        for dim in varying(label)
        if dim >= skipped and tensor.shape[dim - skipped] > 1
        and not any(varies(other, dim) for other in others)
    ]  # fmt: skip
    cannot_lose(trace, label, dims, "it meets a tensor whose size stays")


def _state(trace: Trace, call: Call, out: Tensor, shape: torch.Size) -> Tensor:
    states = [trace.state(t) for t in call.tensors()]
    if call.name in RANDOM or not states:
        return everywhere(UNKNOWN if call.name in RANDOM else KNOWN, shape)
    known = lowest_of(states, shape)
    if out.shape == shape:
        known = with_zeros(known, out)
    if call.name.removesuffix("_") in ("mul", "bitwise_and", "logical_and"):
        for state in states:
            known = zero_where(known, state)
    if call.name.removesuffix("_") == "div" and isinstance(call.args[0], Tensor):
        known = zero_where(known, states[0])
    return known


def _without(trace: Trace, labels: list[Tensor], out: Tensor) -> Facts:
    for label in labels:
        trace.ties.pin(label, "an operation with results of several shapes")
    return Facts((), everywhere(UNKNOWN, out.shape))


def _filled(trace: Trace, call: Call) -> list[Facts]:
    """In place: the tensor keeps its labels and gets a constant."""
    (out,) = call.outs()
    state = with_zeros(everywhere(KNOWN, out.shape), out)
    for tensor in call.tensors()[1:]:
        state = lowest_of([state, trace.state(tensor)], out.shape)
    return [Facts(trace.labels(call.args[0]), state)]


def _made(trace: Trace, call: Call) -> list[Facts]:
    """A new tensor, of which the program has stated the sizes."""
    (out,) = call.outs()
    return [Facts((), with_zeros(everywhere(KNOWN, out.shape), out))]


def _alike(trace: Trace, call: Call) -> list[Facts]:
    """A new tensor of the same sizes."""
    if call.name in RANDOM:
        return _random(trace, call)
    (out,) = call.outs()
    return [Facts(trace.labels(call.args[0]), with_zeros(everywhere(KNOWN, out.shape), out))]


RANDOM = (
    "bernoulli", "bernoulli_", "rand", "rand_like", "randn", "randn_like", "randint", "randperm",
    "randint_like", "normal", "normal_", "uniform_", "exponential_", "multinomial", "poisson",
    "native_dropout", "random_", "geometric_", "log_normal_", "cauchy_", "normal_functional",
    "rrelu_with_noise",
)  # fmt: skip


def _random(trace: Trace, call: Call) -> list[Facts]:
    """Of fewer random numbers, each would be another one."""
    for tensor in call.tensors():
        for label in trace.labels(tensor):
            trace.ties.pin(label, "random numbers")
    if call.tensors() and call.pointwise:
        return elementwise(trace, call)
    return [Facts((), everywhere(UNKNOWN, out.shape)) for out in call.outs()]


ELEMENTWISE: dict[str, Rule] = {
    **dict.fromkeys(RANDOM, _random),
    **dict.fromkeys(("copy", "where", "masked_fill", "addcmul", "addcdiv", "lerp", "clamp",
                     "_prelu_kernel", "native_dropout", "log_sigmoid_forward", "hardtanh",
                     "leaky_relu", "elu", "softplus", "threshold", "hardswish",
                     "mish", "gelu", "silu", "celu", "nan_to_num", "complex",
                     "polar"), elementwise),
    **dict.fromkeys(("fill", "zero", "fill_", "zero_"), _filled),
    **dict.fromkeys(("new_zeros", "new_ones", "new_full", "new_empty", "new_empty_strided"), _made),
    **dict.fromkeys(("zeros_like", "ones_like", "full_like", "empty_like", "rand_like",
                     "randn_like"), _alike),
}  # fmt: skip
