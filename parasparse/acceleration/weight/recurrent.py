"""LSTM, GRU and Elman networks with sparse weights: torch's equations, step by step."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from parasparse.acceleration.weight.layers import Use, format_for, nested_linear

State = tuple[Tensor, ...]


def _lstm(projected: Tensor, recurrent: Tensor, state: State) -> State:
    """Return (h, c): c' = f c + i g, h' = o tanh(c')."""
    i, f, g, o = (projected + recurrent).chunk(4, 1)
    c = f.sigmoid() * state[1] + i.sigmoid() * g.tanh()
    return o.sigmoid() * c.tanh(), c


def _gru(projected: Tensor, recurrent: Tensor, state: State) -> State:
    """Return (h,): n = tanh(x_n + r h_n), h' = (1 - z) n + z h."""
    size = state[0].shape[1]
    r, z = (projected[:, : 2 * size] + recurrent[:, : 2 * size]).sigmoid().chunk(2, 1)
    n = (projected[:, 2 * size :] + r * recurrent[:, 2 * size :]).tanh()
    return (n + z * (state[0] - n),)


def _tanh(projected: Tensor, recurrent: Tensor, state: State) -> State:
    return ((projected + recurrent).tanh(),)


def _relu(projected: Tensor, recurrent: Tensor, state: State) -> State:
    return ((projected + recurrent).relu(),)


_CELLS = {torch.lstm: _lstm, torch.gru: _gru, torch.rnn_tanh: _tanh, torch.rnn_relu: _relu}
_ONE_STEP = {
    torch.lstm_cell: _lstm, torch.gru_cell: _gru,
    torch.rnn_tanh_cell: _tanh, torch.rnn_relu_cell: _relu,
}  # fmt: skip


def recurrent(func: Any, *args: Any) -> Any:
    """Run all layers over all steps, or return NotImplemented for the dense kernel."""
    packed = not isinstance(args[3], bool)
    if packed or torch.is_autocast_enabled(args[0].device.type):
        return _untold(args[3] if packed else args[2])
    input, hx, weights, biases, layers, dropout, train, bidirectional, batch_first = args  # noqa: A001
    ways, each = 1 + bidirectional, 4 if biases else 2
    if len(weights) != layers * ways * each or (train and dropout):  # projections of an LSTM
        return _untold(weights)
    state: State = (hx,) if isinstance(hx, Tensor) else tuple(hx)
    x = input.transpose(0, 1) if batch_first else input
    groups = [tuple(weights[i : i + each]) for i in range(0, len(weights), each)]
    if not _is_sparse(func, x, state, groups, ways) or not x.numel():
        return NotImplemented
    ends: list[State] = []
    for layer in range(layers):
        outputs = []
        for way in range(ways):
            index = layer * ways + way
            start = tuple(part[index] for part in state)
            steps, end = _one_way(_CELLS[func], x, start, groups[index], backwards=way == 1)
            outputs.append(steps)
            ends.append(end)
        x = outputs[0] if ways == 1 else torch.cat(outputs, 2)
    final = tuple(torch.stack(part) for part in zip(*ends, strict=True))
    return (x.transpose(0, 1) if batch_first else x), *final


def one_step(
    func: Any, input: Tensor, hx: Any, ih: Tensor, hh: Tensor,  # noqa: A002
    ih_bias: Tensor | None = None, hh_bias: Tensor | None = None,
) -> Any:  # fmt: skip
    """Run a cell, such as nn.LSTMCell, for one step."""
    if torch.is_autocast_enabled(input.device.type):
        return NotImplemented
    state: State = (hx,) if isinstance(hx, Tensor) else tuple(hx)
    projected = nested_linear(input, ih, ih_bias)
    end = _ONE_STEP[func](projected, nested_linear(state[0], hh, hh_bias), state)
    return end if len(end) > 1 else end[0]


def _one_way(
    cell: Callable[[Tensor, Tensor, State], State],
    x: Tensor,
    state: State,
    weights: tuple[Tensor, ...],
    *,
    backwards: bool,
) -> tuple[Tensor, State]:
    """Return the outputs (steps, batch, hidden) and the last state of one direction."""
    ih, hh, *biases = weights
    projected = nested_linear(x, ih, biases[0] if biases else None)
    bias = biases[1] if biases else None
    outputs = []
    for step in range(len(x) - 1, -1, -1) if backwards else range(len(x)):
        state = cell(projected[step], nested_linear(state[0], hh, bias), state)
        outputs.append(state[0])
    return torch.stack(outputs[::-1] if backwards else outputs), state


def _is_sparse(
    func: Any, x: Tensor, state: State, groups: list[tuple[Tensor, ...]], ways: int
) -> bool:
    """Whether any of the weights multiplies sparsely; reports the use to weights that record."""
    steps, batch, hidden = len(x), x.shape[1], state[0].shape[2]
    found = False
    for index, (ih, hh, *_) in enumerate(groups):
        wide = x.shape[2] if index < ways else hidden * ways
        for weight, rows, inputs, times in (
            (ih, steps * batch, wide, 1),
            (hh, batch, hidden, steps),
        ):
            use = Use(F.linear, torch.empty(rows, inputs, device="meta"), (None,), rows, times)
            found |= format_for(weight, partial(_itself, use), rows, x, *state) is not None
    return found


def _untold(weights: Any) -> Any:
    """Leave a call to the dense kernel; report a use that cannot be described."""
    for weight in weights:
        if getattr(weight, "seen", None) is not None:
            weight.seen(None)
    return NotImplemented


def _itself(use: Use) -> Use:
    return use


HANDLERS: dict[Any, Callable[..., Any]] = dict.fromkeys(_CELLS, recurrent)
OF_CELLS: dict[Any, Callable[..., Any]] = dict.fromkeys(_ONE_STEP, one_step)
