"""Operations that move entries: they are run on the labels as they are."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from parasparse.shrink.calls import Call
from parasparse.shrink.expressions import span
from parasparse.shrink.facts import KNOWN, UNKNOWN, ZERO, Facts, everywhere, facts, worst
from parasparse.shrink.labels import compact, fixed_along, varies, varying
from parasparse.shrink.rules.elementwise import cannot_lose
from parasparse.shrink.rules.products import only_zeros
from parasparse.shrink.sizes import expression
from parasparse.shrink.tracing import Rule, Trace, unknown_operation

# Functions whose pieces `pieces` checks, where it sees how the program computed the places.
_CHECKED = ("split", "split_with_sizes", "narrow", "chunk", "__getitem__", "__setitem__")


def _moved(run: Callable[..., Any]) -> Rule:
    """Return the rule of an operation that `run` does to a label."""

    def rule(trace: Trace, call: Call) -> list[Facts]:
        x, outs = call.args[0], call.outs()
        rest, kwargs = call.args[1:], call.kwargs

        def each(label: Tensor) -> list[Tensor]:
            result = run(label, *rest, **kwargs)
            return list(result) if isinstance(result, (tuple, list)) else [result]

        labels = [each(label) for label in trace.labels(x)]
        states = each(trace.state(x))
        return [
            facts([label[i] for label in labels], states[i].expand(out.shape))
            for i, out in enumerate(outs)
        ]

    return rule


def _turned(run: Callable[..., Any]) -> Rule:
    """Return the rule of an operation after which labels that were tidy are so, and as many."""

    def rule(trace: Trace, call: Call) -> list[Facts]:
        x, (out,) = call.args[0], call.outs()
        labels = [run(label, *call.args[1:], **call.kwargs) for label in trace.labels(x)]
        state = run(trace.state(x), *call.args[1:], **call.kwargs)
        return [Facts(tuple(labels), state.expand(out.shape))]

    return rule


def _checked(run: Callable[..., Any]) -> Rule:
    """Return the rule of an operation that takes pieces whose sizes or places are numbers."""
    move = _moved(run)

    def rule(trace: Trace, call: Call) -> list[Facts]:
        if trace.function not in _CHECKED:
            _pieces_stay(trace, call)
        return move(trace, call)

    return rule


def _picked(run: Callable[..., Any]) -> Rule:
    """Return the rule of an operation that takes entries of a dimension by their number."""
    move = _moved(run)

    def rule(trace: Trace, call: Call) -> list[Facts]:
        _pieces_stay(trace, call)
        x, dim = call.args[0], call.arg(1, "dim", 0) % call.args[0].ndim
        found = []
        for each in move(trace, call):
            for label in each.labels:  # of one channel, whose dimension is gone
                if not varying(label):
                    trace.ties.pin(label, "its entries are picked by number")
            found.append(Facts(tuple(filter(varying, each.labels)), each.state))
        if not trace.is_stored(x):
            return found
        # Other inputs may pick others, as tokens pick experts.
        for label in trace.labels(x):
            if varying(label) == (dim,):
                trace.ties.pin(label, "its entries are picked by number")
        state = compact(worst(trace.state(x), [dim], x.shape)).select(dim, 0)
        return [Facts(each.labels, state.expand(each.state.shape)) for each in found]

    return rule


def _pieces_stay(trace: Trace, call: Call) -> None:
    """Require that the places of pieces do not move: nobody has said how they would."""
    x, name = call.args[0], call.name
    if name.startswith("unsafe_") and not trace.function.startswith("unsafe_"):
        return  # the gates of a recurrent layer, which are equal parts, and meet
    dim = call.arg(2, "dim", 0) if "split" in name or "chunk" in name else call.arg(1, "dim", 0)
    dim %= x.ndim
    for label in trace.labels(x):
        if not varies(label, dim):
            continue
        if name in ("select", "unbind"):
            trace.require(int(label.shape[dim]), span(label, dim), name)
        elif name == "slice":
            size, start, stop = label.shape[dim], call.arg(2, "start") or 0, call.arg(3, "end")
            if start != 0 or (stop is not None and stop < size):
                trace.ties.pin(label, "the program takes a part of it by number")
        else:
            start = 0
            for piece in call.outs():
                size = piece.shape[dim]
                if size:
                    trace.require(size, span(label, dim, start, start + size), "split")
                start += size


def _shifted(run: Callable[..., Any], dims_of: Callable[[Call], Any]) -> Rule:
    """Return the rule of an operation that is another one when entries along its dims are gone."""

    def rule(trace: Trace, call: Call) -> list[Facts]:
        for label in trace.labels(call.args[0]):
            if any(varies(label, dim) for dim in dims_of(call) or range(label.ndim)):
                trace.ties.pin(label, call.name)
        return _moved(run)(trace, call)

    return rule


def _squeezed(trace: Trace, call: Call) -> list[Facts]:
    """`squeeze`: a dimension that is larger than 1 must stay so, or it would go."""
    x, dims = call.args[0], call.arg(1, "dim", range(call.args[0].ndim))
    for dim in [dims] if isinstance(dims, int) else dims:
        for label in trace.labels(x):
            if varying(label) == (dim % x.ndim,):
                trace.least.append((label, 2))
            elif varies(label, dim % x.ndim):
                trace.ties.pin(label, "squeeze")
    return _moved(torch.squeeze)(trace, call)


def _shuffled(run: Callable[..., Tensor]) -> Rule:
    """Return the rule of a shuffle between channels and places: (N, C, H, W)."""

    def rule(trace: Trace, call: Call) -> list[Facts]:
        (x, number, *_), inverse = call.args, "unshuffle" in call.name
        for label in trace.labels(x):
            if inverse and any(varies(label, dim) for dim in (-1 % x.ndim, -2 % x.ndim)):
                trace.ties.pin(label, call.name)
            elif not inverse and varies(label, x.ndim - 3):  # become places of one channel
                parts = label.unflatten(-3, (-1, number * number))
                trace.ties.tie(parts, fixed_along(parts, -3, number * number))
        return _moved(run)(trace, call)

    return rule


def _channels_shuffled(trace: Trace, call: Call) -> list[Facts]:
    """`channel_shuffle`: the groups of channels stay, with equally many in each.

    The channels of all groups at one place follow each other then, and go together.
    """
    for label in trace.labels(call.args[0]):
        if varies(label, 1):
            apart = label.unflatten(1, (call.args[1], -1))
            trace.shapes += [compact(apart), compact(apart.transpose(1, 2))]
            trace.require(expression(call.args[1]), span(apart, 1), call.name)
    return _moved(torch.channel_shuffle)(trace, call)


def _tiled(trace: Trace, call: Call) -> list[Facts]:
    """`repeat`: the copies of an entry are one unit."""
    return _moved(lambda t, repeats: t.repeat(repeats))(trace, call)


def _padded(trace: Trace, call: Call) -> list[Facts]:
    x, (out,), amounts = call.args[0], call.outs(), call.args[1]
    pairs = [amounts[i : i + 2] for i in range(0, len(amounts), 2)]
    dims = [x.ndim - 1 - i for i, pair in enumerate(pairs) if any(pair)]
    labels = []
    for label in trace.labels(x):
        if any(varies(label, dim) for dim in dims):
            trace.ties.pin(label, "padding of channels")
        for dim in dims:
            label = fixed_along(label, dim, out.shape[dim])
        labels.append(label)
    value = call.arg(2, "value") or 0.0
    state = trace.state(x)
    if dims and not any(varies(label, dim) for label in trace.labels(x) for dim in dims):
        state = only_zeros(state)
    state = state.contiguous()
    padded = torch.constant_pad_nd(state, amounts, ZERO if value == 0 else UNKNOWN)
    return [facts(labels, padded.expand(out.shape))]


def _paired(trace: Trace, call: Call) -> list[Facts]:
    """`view_as_complex`: the real and the imaginary part of a number are one unit."""
    x = call.args[0]
    for label in trace.labels(x):
        cannot_lose(trace, label, [x.ndim - 1] * varies(label, x.ndim - 1), "part of a number")
    labels = [label.select(-1, 0) for label in trace.labels(x)]
    state = worst(trace.state(x), [x.ndim - 1], x.shape).select(-1, 0)
    return [facts(labels, state)]


def _patched(trace: Trace, call: Call) -> list[Facts]:
    """`im2col`: (N, C, H, W) to (N, C * kernel, L)."""
    x, (out,) = call.args[0], call.outs()
    per = out.shape[1] // x.shape[1]
    labels = []
    for label in trace.labels(x):
        if any(varies(label, d) for d in range(x.ndim) if d != 1):
            trace.ties.pin(label, "unfold")
            continue
        ids = label.select(0, 0).flatten(1)[:, 0].repeat_interleave(per)
        labels.append(ids.view(1, -1, 1).expand(out.shape))
    known = int(trace.state(x).amin()) if x.numel() else KNOWN
    return [facts(labels, torch.full((), min(known, KNOWN), dtype=torch.uint8).expand(out.shape))]


def _viewed(t: Tensor, shape: Any, *_: Any, **__: Any) -> Tensor:
    return t if isinstance(shape, torch.dtype) else t.reshape(shape)


def _lifted(trace: Trace, call: Call) -> list[Facts]:
    """Python numbers and arrays as a tensor: constants, unless they may come from the input."""
    state = KNOWN if trace.constants_hold else UNKNOWN
    return [Facts((), everywhere(state, out.shape)) for out in call.outs()]


def _set(trace: Trace, call: Call) -> list[Facts]:
    """`set_`: another tensor's memory, as copies and pickles are made."""
    unknown_operation(trace, call)
    return [trace.facts_of_memory(out) for out in call.outs()]


def _same(t: Tensor, *_: Any, **__: Any) -> Tensor:
    return t


_aten = torch.ops.aten
MOVEMENTS: dict[str, Rule] = {
    **dict.fromkeys(("view", "_unsafe_view", "_reshape_alias", "reshape"), _moved(_viewed)),
    **dict.fromkeys(("clone", "alias", "detach", "_to_copy", "contiguous", "_conj", "conj",
                     "resolve_conj"), _turned(_same)),
    "set": _set,
    **dict.fromkeys(("lift", "lift_fresh", "lift_fresh_copy"), _lifted),
    "permute": _turned(torch.permute), "transpose": _turned(torch.transpose),
    "t": _turned(torch.t), "unsqueeze": _turned(torch.unsqueeze), "squeeze": _squeezed,
    "expand": _turned(lambda t, sizes, **_: t.expand(sizes)),
    "flip": _moved(torch.flip), "pixel_shuffle": _shuffled(torch.pixel_shuffle),
    "unfold": _shifted(lambda t, *a: t.unfold(*a), lambda call: [call.args[1]]),
    "diagonal": _shifted(torch.diagonal, lambda call: [call.arg(2, "dim1", 0),
                                                       call.arg(3, "dim2", 1)]),
    **dict.fromkeys(("tril", "triu"), _shifted(_same, lambda call: [-2 % call.args[0].ndim,
                                                                    -1 % call.args[0].ndim])),
    "view_as_real": _moved(lambda t: t.unsqueeze(-1).expand(*t.shape, 2)),
    "view_as_complex": _paired,
    "roll": _shifted(torch.roll, lambda call: call.arg(2, "dims", [])),
    "pixel_unshuffle": _shuffled(torch.pixel_unshuffle),
    "channel_shuffle": _channels_shuffled, "native_channel_shuffle": _channels_shuffled,
    "repeat": _tiled, "constant_pad_nd": _padded, "im2col": _patched,
    "slice": _checked(_aten.slice), "select": _picked(torch.select),
    "split": _checked(torch.split), "split_with_sizes": _checked(torch.split_with_sizes),
    "unbind": _picked(torch.unbind), "unsafe_split": _checked(torch.split),
    "unsafe_chunk": _checked(torch.chunk),
}  # fmt: skip
