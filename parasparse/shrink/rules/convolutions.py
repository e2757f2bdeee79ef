"""Convolutions: they sum over the channels of a group."""

from __future__ import annotations

import torch
from torch import Tensor

from parasparse.shrink.calls import Call
from parasparse.shrink.facts import (
    UNKNOWN,
    Facts,
    everywhere,
    lowest_along,
)  # fmt: skip
from parasparse.shrink.labels import along, compact, tidy, varying
from parasparse.shrink.products import Product, Read
from parasparse.shrink.rules.products import (
    constants_of,
    inner_labels,
    name_of,
    only_zeros,
    product_state,
    sums_of,
)  # fmt: skip
from parasparse.shrink.tracing import Rule, Trace


def _convolution(trace: Trace, call: Call) -> list[Facts]:
    x, w, bias = call.args[:3]
    transposed, groups = call.args[6], call.args[8]
    (out,) = call.outs()
    out_dim, in_dim = (1, 0) if transposed else (0, 1)
    _pin_kernel(trace, w)
    inputs = _channels(trace, x)
    if groups > 1:
        if transposed:
            return _pinned(trace, call)
        rows, columns = _grouped(trace, w, groups, inputs)
    else:
        rows = _ids_along(trace, w, out_dim)
        columns = _ids_along(trace, w, in_dim)
        _tie_or_pin(trace, inputs, columns)
    if isinstance(bias, Tensor):
        _tie_or_pin(trace, rows, trace.labels(bias)[0] if trace.labels(bias) else None)
    padded = any(call.args[4]) or transposed
    x_state = lowest_along(trace.state(x), 1)
    states = only_zeros(x_state) if padded else x_state
    zero, known, weights = _convolution_state(trace, states, w, groups, transposed)
    if bias is not None:
        known = known & (trace.state(bias) != UNKNOWN)
    outs = torch.zeros(out.shape[1], dtype=torch.long) if rows is None else rows
    if columns is not None and inputs is not None:
        _read(trace, call, outs, columns, weights, x_state)
    places = (x if transposed else out).shape[2:]
    kernel = w.shape[2:].numel() * places.numel() * out.shape[0]
    trace.products.append(Product(kernel, outs, _inputs_of_one(columns, w.shape[in_dim])))
    channel = (1, -1, *[1] * (out.ndim - 2))
    state = product_state(
        trace, call, zero.view(channel), known.view(channel),
        None if bias is None else bias.view(channel),
    )  # fmt: skip
    labels = () if rows is None else (along(rows, 1, out.shape),)
    return [Facts(labels, tidy(state))]


def _read(
    trace: Trace, call: Call, rows: Tensor, columns: Tensor, states: Tensor, x_state: Tensor
) -> None:
    """Remember what the convolution sums over."""
    x, w, bias = call.args[:3]
    padding, transposed, groups = call.args[4], call.args[6], call.args[8]
    channels = x.transpose(0, 1).flatten(1).t()
    constants = constants_of(channels, x_state).view(groups, 1, -1)
    trace.reads.append(
        Read(
            columns=columns.reshape(-1, w.shape[0 if transposed else 1]),
            rows=rows,
            states=states,
            constants=constants.expand(-1, len(rows) // groups, -1).flatten(0, 1)
            if groups > 1
            else constants[0],
            weight=name_of(trace, w),
            summed=0 if transposed else 1,
            bias=name_of(trace, bias),
            padded=any(padding) or transposed,
            module=trace.module,
        )
    )


def _pin_kernel(trace: Trace, w: Tensor) -> None:
    for label in trace.labels(w):
        if any(dim > 1 for dim in varying(label)):
            trace.ties.pin(label, "size of a kernel")


def _channels(trace: Trace, x: Tensor) -> Tensor | None:
    """Return the ids of the input channels; other labels are pinned."""
    found = None
    for label in inner_labels(trace, x):
        if varying(label) == (1,):
            found = compact(label).flatten()
        else:
            trace.ties.pin(label, "convolution along channels")
    return found


def _ids_along(trace: Trace, w: Tensor, dim: int) -> Tensor | None:
    for label in inner_labels(trace, w):
        if varying(label) == (dim,):
            return compact(label).flatten()
        if dim in varying(label):
            trace.ties.pin(label, "a weight whose channels are combined")
    return None


def _tie_or_pin(trace: Trace, a: Tensor | None, b: Tensor | None) -> None:
    if a is not None and b is not None:
        trace.ties.tie(a, b)
    else:
        for ids in (a, b):
            if ids is not None:
                trace.ties.pin(ids, "it meets a tensor whose size stays")


def _grouped(
    trace: Trace, w: Tensor, groups: int, inputs: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """Return row ids (O) and column ids (O, I / groups) of a grouped convolution.

    A parameter gets an id for each group and position, so that groups may lose different ones if
    they lose equally many. Of a depthwise convolution, a group is one unit.
    """
    outs, per = w.shape[0], w.shape[1]
    rows, leaf = _ids_along(trace, w, 0), trace.leaf(w)
    if leaf is not None and per > 1 and all(len(varying(label)) == 1 for label in leaf.labels):
        ids = trace.ties.new(groups * per).view(groups, 1, per)
        ids = ids.expand(groups, outs // groups, per).reshape(outs, per)
        kept = [label for label in leaf.labels if varying(label) != (1,)]
        trace.relabel(leaf, [*kept, ids.view(outs, per, *[1] * (w.ndim - 2)).expand(w.shape)])
    joint = [label for label in trace.labels(w) if 1 in varying(label)]
    columns = joint[0].reshape(outs, per, -1)[:, :, 0] if joint else None
    if inputs is None or rows is None:
        for stays in (inputs, rows, columns):
            if stays is not None:
                trace.ties.pin(stays, "a grouped convolution of channels that stay")
        return rows, None
    each = inputs.view(groups, 1, per).expand(groups, outs // groups, per).reshape(outs, per)
    if per == 1:
        trace.ties.tie(rows.unsqueeze(1), each)
        trace.ties.tie(rows.view(groups, -1)[:, :1], rows.view(groups, -1))
        return rows, each
    if columns is None:
        for ids in (rows, each):
            trace.ties.pin(ids, "multiplied by a tensor whose size stays")
        return rows, None
    trace.ties.tie(columns, each)
    # A group is dropped as a whole; the groups that stay keep equally many inputs and outputs.
    trace.shapes.append(rows.view(groups, -1))
    trace.shapes.append(inputs.view(groups, -1))
    trace.groups.append((rows.view(groups, -1), inputs.view(groups, -1), trace.module))
    return rows, columns


def _pinned(trace: Trace, call: Call) -> list[Facts]:
    for tensor in call.tensors():
        for label in trace.labels(tensor):
            trace.ties.pin(label, "transposed convolution with groups")
    return [Facts((), everywhere(UNKNOWN, out.shape)) for out in call.outs()]


def _convolution_state(
    trace: Trace, x_state: Tensor, w: Tensor, groups: int, transposed: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return which output channels are 0, which are known, and the states of the weights.

    The last are (O, I / groups * kernel).
    """
    w_state = compact(trace.state(w)).flatten(2)
    w_state = w_state.transpose(0, 1) if transposed else w_state
    rows, columns = w.shape[:2][::-1] if transposed else w.shape[:2]
    each = x_state.view(groups, 1, -1)
    if groups > 1:
        each = each.expand(-1, rows // groups, -1)
    each = each.reshape(-1, columns, 1).expand(-1, -1, w_state.shape[2]).flatten(1)
    w_state = w_state.expand(-1, columns, -1).flatten(1)  # one row if all are alike
    zero, depends = sums_of(each, w_state, 1)
    return zero.squeeze(1), ~depends.squeeze(1), w_state.expand(rows, -1)


def _inputs_of_one(columns: Tensor | None, size: int) -> Tensor:
    """Return the ids of the inputs of one output."""
    if columns is None:
        return torch.zeros(size, dtype=torch.long)
    return columns[0] if columns.ndim > 1 else columns


CONVOLUTIONS: dict[str, Rule] = dict.fromkeys(("convolution", "_convolution"), _convolution)
