"""From a trace to a plan: which units go, and what is folded for them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from parasparse.shrink.constants import Constants, constants_of
from parasparse.shrink.facts import ZERO
from parasparse.shrink.labels import compact, varying
from parasparse.shrink.layer_sizes import layer_sizes
from parasparse.shrink.needed import keep_all_of, keep_needed, keep_shapes
from parasparse.shrink.plan import AttributeRow, KeptRow, Shrinkage, ShrinkRow
from parasparse.shrink.readers import readers_of
from parasparse.shrink.running import masked_entries, traced, zero_entries
from parasparse.shrink.sizes import Attribute
from parasparse.shrink.tracing import Leaf, Trace
from parasparse.shrink.units import Units
from parasparse.targets.reach import Specs, reached
from parasparse.targets.tensors import tensors_of


@dataclass(frozen=True)
class Work:
    """A plan, and the constants that are folded into the tensors that stay."""

    plan: Shrinkage
    constants: Constants = field(default_factory=Constants)


def work_for(
    model: nn.Module,
    example_inputs: Any,
    *,
    targets: Specs | None,
    exact: bool,
    multiple_of: int,
) -> Work:
    """Return what shrinking `model` does."""
    may_lose = _may_lose(model, targets)
    masked = masked_entries(model)
    trace, values, twin = traced(model, example_inputs, masked or zero_entries(model))
    units, readers = Units(trace), readers_of(trace, masked)
    keep_all_of(trace, units, may_lose)
    while True:
        keep_needed(trace, units, readers, exact=exact)
        attributes, changed = keep_shapes(trace, units, values, multiple_of=multiple_of)
        if not changed:
            break
    rows = tuple(row for leaf in trace.leaves.values() if (row := _row(leaf, units)) is not None)
    attributes |= layer_sizes(twin, {row.name: row.new_shape for row in rows}, attributes)
    plan = Shrinkage(
        rows=rows,
        attributes=tuple(_attribute(a, values[a], new) for a, new in attributes.items()),
        kept_back=_kept_back(trace, units),
        inexact=() if exact else _inexact(trace, units),
        bytes=_bytes(model, rows),
        multiply_adds=_multiply_adds(trace, units),
        branches=tuple(dict.fromkeys(trace.branches)),
    )
    return Work(plan, constants_of(trace, units, readers))


def _may_lose(model: nn.Module, targets: Specs | None) -> set[str]:
    """Return the names of the tensors that may lose channels."""
    found = tensors_of(model, pairs=False)
    if targets is not None:
        chosen = reached(targets, found, "a tensor")
        found = [t for t in found if t in chosen or len(t.shape) < 2 or t.is_buffer]
    return {name for target in found for name in target.names}


def _row(leaf: Leaf, units: Units) -> ShrinkRow | None:
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
    return ShrinkRow(leaf.name, tuple(leaf.tensor.shape), tuple(shape), dict(sorted(kept.items())))


def _attribute(attribute: Attribute, old: int, new: int) -> AttributeRow:
    return AttributeRow(attribute.path, attribute.name, attribute.index, int(old), int(new))


def _kept_back(trace: Trace, units: Units) -> tuple[KeptRow, ...]:
    """Return the channels whose entries are all dropped and that stay."""
    rows = []
    for leaf in trace.leaves.values():
        for label in leaf.labels:
            if len(varying(label)) != 1:
                continue
            (dim,) = varying(label)
            others = [d for d in range(leaf.tensor.ndim) if d != dim]
            state = compact(trace.state(leaf.tensor))
            dead = (state.amin(others) if others else state) == ZERO
            ids = compact(label).flatten()
            reasons: dict[str, list[int]] = {}
            for channel in (dead & units.stay(ids)).nonzero().flatten().tolist():
                reason = units.reason(int(units.of[ids[channel]]))
                reasons.setdefault(reason, []).append(channel)
            rows += [KeptRow(leaf.name, dim, tuple(c), reason) for reason, c in reasons.items()]
    return tuple(rows)


def _inexact(trace: Trace, units: Units) -> tuple[str, ...]:
    changed = (m for label, m in trace.averaged if not bool(units.stay(compact(label)).all()))
    return tuple(dict.fromkeys(changed))


def _bytes(model: nn.Module, rows: tuple[ShrinkRow, ...]) -> tuple[int, int]:
    sizes = {row.name: row for row in rows}
    before = after = 0
    for target in tensors_of(model, pairs=False):
        tensor = target.stored()
        before += tensor.numel() * tensor.element_size()
        row = sizes.get(target.name)
        shape = torch.Size(row.new_shape) if row else tensor.shape
        after += shape.numel() * tensor.element_size()
    return before, after


def _multiply_adds(trace: Trace, units: Units) -> tuple[int, int]:
    before = after = 0
    for product in trace.products:
        before += product.positions * product.rows.numel() * product.columns.numel()
        kept = int(units.stay(product.rows).sum()) * int(units.stay(product.columns).sum())
        after += product.positions * kept
    return before, after
