"""`cat` and `stack`: the channels of the parts lie side by side."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from parasparse.shrink.calls import Call
from parasparse.shrink.facts import Facts, facts
from parasparse.shrink.labels import compact, varies, varying
from parasparse.shrink.rules.elementwise import merge
from parasparse.shrink.tracing import Rule, Trace


def _concatenated(trace: Trace, call: Call) -> list[Facts]:
    parts, dim, (out,) = list(call.args[0]), call.arg(1, "dim", 0), call.outs()
    run = torch.cat if call.name == "cat" else torch.stack
    if call.name == "cat":  # torch skips the legacy shape (0,)
        parts = [part for part in parts if part.ndim == out.ndim] or parts
    dim %= out.ndim
    state = run([trace.state(part) for part in parts], dim)
    labels: list[Tensor] = []
    taken: list[set[int]] = [set() for _ in parts]
    for number, part in enumerate(parts):
        for place in range(len(trace.labels(part))):
            if place not in taken[number]:
                labels.append(_line(trace, parts, number, place, taken, dim, run))
    found: list[Tensor] = []
    for label in labels:
        merge(trace, found, label)
    return [facts(found, state)]


def _line(
    trace: Trace, parts: list[Tensor], number: int, place: int, taken: list[set[int]], dim: int,
    run: Callable[..., Tensor],
) -> Tensor:  # fmt: skip
    """Return the label of the whole that a label of a part goes into."""
    label = trace.labels(parts[number])[place]
    stacked = run is torch.stack
    others = [d for d in varying(label) if stacked or d != dim]
    line: list[Tensor] = []
    for other, part in enumerate(parts):
        match = None
        for index, each in enumerate(trace.labels(part)):
            same = set(varying(each)) & set(varying(label)) or (other == number and index == place)
            if index not in taken[other] and same:
                match = index
                break
        if other == number:
            match = place
        if match is None:
            line.append(torch.zeros((), dtype=torch.long).expand(part.shape))
            if others:
                trace.ties.pin(label, f"{run.__name__} with a tensor whose size stays")
            continue
        taken[other].add(match)
        mine = trace.labels(part)[match]
        if others and not stacked:
            trace.ties.tie(_first(mine, dim), _first(label, dim))
            if not varies(mine, dim) and not varies(label, dim):
                mine = _first(label, dim).expand(part.shape)
        elif others:
            trace.ties.tie(mine, label)
            mine = label
        line.append(mine)
    return run(line, dim)


def _first(label: Tensor, dim: int) -> Tensor:
    """Return the ids at the first place along `dim`, of a part that may be empty along it."""
    small = compact(label)
    return small.narrow(dim, 0, min(1, small.shape[dim]))


CONCATENATION: dict[str, Rule] = dict.fromkeys(("cat", "stack"), _concatenated)
