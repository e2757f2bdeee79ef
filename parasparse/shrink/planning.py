"""From a trace to a plan: which units go, and what is folded for them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from parasparse.shrink.constants import Constants, constants_of
from parasparse.shrink.facts import ZERO
from parasparse.shrink.labels import compact, on_cpu, varying
from parasparse.shrink.layer_sizes import layer_sizes
from parasparse.shrink.needed import keep_all_of, keep_needed, keep_shapes, may_lose
from parasparse.shrink.norms import Changes, Norms
from parasparse.shrink.plan import AttributeRow, KeptRow, Shrinkage, ShrinkRow
from parasparse.shrink.readers import readers_of
from parasparse.shrink.running import masked_states, traced, zero_states
from parasparse.shrink.sizes import Attribute, get_attribute
from parasparse.shrink.tracing import Leaf, Trace
from parasparse.shrink.units import Units
from parasparse.targets.reach import Specs
from parasparse.targets.tensors import Target


@dataclass(frozen=True)
class Work:
    """A plan, and the constants that are folded into the tensors that stay."""

    plan: Shrinkage
    constants: Constants = field(default_factory=Constants)


def work_for(
    model: nn.Module,
    tensors: list[Target],
    example_inputs: Any,
    *,
    targets: Specs | None,
    exact: bool,
    multiple_of: int,
) -> Work:
    """Return what shrinking `model` does, which has these `tensors`."""
    masked = masked_states(tensors)
    dropped = masked or zero_states(tensors)
    trace, values, twin = traced(model, tensors, example_inputs, dropped)
    with on_cpu():
        units, readers = Units(trace), readers_of(trace, masked)
        norms = Norms(trace, units, masked)
        keep_all_of(trace, units, may_lose(tensors, targets))
        while True:
            keep_needed(trace, units, readers, norms, exact=exact)
            attributes, changed = keep_shapes(trace, units, values, multiple_of=multiple_of)
            if not changed:
                break
        changes = norms.changes()
        found = (_row(leaf, units, changes) for leaf in trace.leaves.values())
        rows = tuple(row for row in found if row is not None)
        attributes |= layer_sizes(twin, {row.name: row.new_shape for row in rows}, attributes)
        plan = Shrinkage(
            rows=rows,
            attributes=(
                *(_attribute(a, values[a], new) for a, new in attributes.items()),
                *(_epsilon(model, a, new) for a, new in changes.epsilons.items()),
            ),
            kept_back=_kept_back(trace, units),
            inexact=() if exact else tuple(dict.fromkeys(norms.inexact())),
            bytes=_bytes(tensors, rows),
            multiply_adds=_multiply_adds(trace, units),
            branches=tuple(dict.fromkeys(trace.branches)),
        )
        return Work(plan, constants_of(trace, units, readers))


def _row(leaf: Leaf, units: Units, changes: Changes) -> ShrinkRow | None:
    """Return the row of a tensor, or None if it keeps its shape."""
    shape, kept = list(leaf.tensor.shape), {}
    for label in sorted(leaf.labels, key=lambda label: len(varying(label))):
        stay = units.stay(compact(label))
        if bool(stay.all()):
            continue
        dims = varying(label)
        if len(dims) == 1:
            kept[dims[0]] = tuple(stay.flatten().nonzero().flatten().tolist())
            shape[dims[0]] = len(kept[dims[0]])
        else:  # of a grouped convolution: (rows, inputs of the group)
            per_row = stay.flatten(2)[:, :, 0] if stay.ndim > 2 else stay
            rows = kept.get(0, range(len(per_row)))
            each = [tuple(per_row[row].nonzero().flatten().tolist()) for row in rows]
            if any(len(one) < per_row.shape[1] for one in each):
                kept[1] = tuple(each)
                shape[1] = len(each[0])
    if not kept:
        return None
    shift, scale = changes.scales.get(leaf.name, (0.0, 1.0))
    old, new = tuple(leaf.tensor.shape), tuple(shape)
    return ShrinkRow(leaf.name, old, new, dict(sorted(kept.items())), scale, shift)


def _attribute(attribute: Attribute, old: int, new: int) -> AttributeRow:
    return AttributeRow(attribute.path, attribute.name, attribute.index, int(old), int(new))


def _epsilon(model: nn.Module, attribute: Attribute, new: float) -> AttributeRow:
    old = get_attribute(model, attribute)
    return AttributeRow(attribute.path, attribute.name, attribute.index, old, new)


def _kept_back(trace: Trace, units: Units) -> tuple[KeptRow, ...]:
    """Return the channels whose entries are all dropped and that stay."""
    rows = []
    for leaf in (leaf for leaf in trace.leaves.values() if leaf.name in trace.dropped):
        for label in leaf.labels:
            if len(varying(label)) != 1:
                continue
            (dim,) = varying(label)
            ids = compact(label).flatten()
            reasons: dict[str, list[int]] = {}
            for channel in _dead(compact(trace.state(leaf.tensor)), dim, units.stay(ids)):
                reason = units.reason(int(units.of[ids[channel]]))
                reasons.setdefault(reason, []).append(channel)
            rows += [KeptRow(leaf.name, dim, tuple(c), reason) for reason, c in reasons.items()]
    return tuple(rows)


def _dead(state: Tensor, dim: int, among: Tensor) -> list[int]:
    """Return the indices of `dim`, of those `among` which to look, that are ZERO everywhere."""
    others = [d for d in range(state.ndim) if d != dim]
    some = state[tuple(slice(None, None, 1 if d == dim else 31) for d in range(state.ndim))]
    for part in (some, state) if others else (state,):  # a part rules out most
        zero = (part.amin(others) if others else part) == ZERO
        if not bool((zero & among).any()):
            return []
    return (zero & among).nonzero().flatten().tolist()


def _bytes(tensors: list[Target], rows: tuple[ShrinkRow, ...]) -> tuple[int, int]:
    sizes = {row.name: row for row in rows}
    before = after = 0
    for target in tensors:
        size = target.originals()[0].element_size()
        before += target.shape.numel() * size
        row = sizes.get(target.name)
        after += torch.Size(row.new_shape if row else target.shape).numel() * size
    return before, after


def _multiply_adds(trace: Trace, units: Units) -> tuple[int, int]:
    before = after = 0
    for product in trace.products:
        before += product.positions * product.rows.numel() * product.columns.numel()
        kept = int(units.stay(product.rows).sum()) * int(units.stay(product.columns).sum())
        after += product.positions * kept
    return before, after
