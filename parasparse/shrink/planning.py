"""From a trace to a plan: which units go, and what is folded for them."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from parasparse.shrink.attributes import get_attribute
from parasparse.shrink.constants import Constants, constants_of
from parasparse.shrink.expressions import Attribute
from parasparse.shrink.labels import on_cpu
from parasparse.shrink.layer_sizes import layer_sizes
from parasparse.shrink.needed import keep_all_of, keep_needed, keep_shapes, may_lose, tie_pairs
from parasparse.shrink.norms import Norms
from parasparse.shrink.plan import AttributeRow, Shrinkage, ShrinkRow
from parasparse.shrink.readers import readers_of
from parasparse.shrink.rows import Rows
from parasparse.shrink.running import masked_states, traced, zero_states
from parasparse.shrink.tracing import Trace
from parasparse.shrink.units import Units
from parasparse.targets.reach import Specs
from parasparse.targets.tensors import Target, tensors_of


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
        tie_pairs(trace, _with_one_mask(tensors))
        units, readers = Units(trace), readers_of(trace, masked)
        norms = Norms(trace, units, masked)
        losing = may_lose(tensors if targets is None else tensors_of(model), targets)
        keep_all_of(trace, units, losing)
        while True:
            keep_needed(trace, units, readers, norms, exact=exact)
            attributes, changed = keep_shapes(trace, units, values, multiple_of=multiple_of)
            if not changed:
                break
        changes = norms.changes()
        made = Rows(trace, units)
        rows = made.changed(changes)
        attributes |= layer_sizes(twin, {row.name: row.new_shape for row in rows}, attributes)
        plan = Shrinkage(
            rows=rows,
            attributes=(
                *(_attribute(a, values[a], new) for a, new in attributes.items()),
                *(_epsilon(model, a, new) for a, new in changes.epsilons.items()),
            ),
            kept_back=made.kept_back(),
            inexact=() if exact else tuple(dict.fromkeys(norms.inexact())),
            bytes=_bytes(tensors, rows),
            multiply_adds=_multiply_adds(trace, units),
            branches=tuple(dict.fromkeys(trace.branches)),
        )
        return Work(plan, constants_of(trace, units, readers))


def _with_one_mask(tensors: list[Target]) -> dict[str, int]:
    """Return a number for each mask of two tensors, a pair, by the names of both."""
    masks = {target: id(mask) for target in tensors for mask in target.masks()}
    times = Counter(masks.values())
    return {name: n for target, n in masks.items() if times[n] > 1 for name in target.names}


def _attribute(attribute: Attribute, old: int, new: int) -> AttributeRow:
    return AttributeRow(attribute.path, attribute.name, attribute.index, int(old), int(new))


def _epsilon(model: nn.Module, attribute: Attribute, new: float) -> AttributeRow:
    old = get_attribute(model, attribute)
    return AttributeRow(attribute.path, attribute.name, attribute.index, old, new)


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
