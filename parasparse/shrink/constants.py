"""Removed channels that are constants: what they add to outputs goes into a bias or a weight."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from parasparse.shrink.readers import Reader
from parasparse.shrink.tracing import Trace
from parasparse.shrink.units import Units


@dataclass(frozen=True)
class Constants:
    """What is added to tensors before they are cut.

    Attributes:
        added: for each parameter, by name, what is added to it.
    """

    added: dict[str, Tensor] = field(default_factory=dict)


def constants_of(trace: Trace, units: Units, readers: list[Reader]) -> Constants:
    """Return what the constants among the removed channels add to biases and weights."""
    weights = {leaf.name: leaf.tensor for leaf in trace.leaves.values()}
    added: dict[str, Tensor] = {}
    for reader in readers:
        read = reader.read
        if not reader.has_constants or read.weight is None or read.columns.shape[0] > 1:
            continue
        trace.need_values([weights[read.weight]])
        weight = weights[read.weight].detach().movedim(read.summed, 1)
        values = reader.foldable(units)[0]
        if read.bias is not None and bool(values.any()):
            added[read.bias] = _weighted(weight, values).reshape(len(weight), -1).sum(1)
        gone = reader.collapsing(units)[0]
        if bool(gone.any()):
            heir = next(
                column for column in reader.heirs(units) if units.stay(read.columns[0, column])
            )
            values = torch.where(gone, read.constants[0], 0.0).nan_to_num(0.0)
            change = torch.zeros(weight.shape, dtype=values.dtype)
            change[:, heir] = _weighted(weight, values / read.constants[0, heir])
            added[read.weight] = change.movedim(1, read.summed)
    return Constants(added)


def _weighted(weight: Tensor, values: Tensor) -> Tensor:
    """Return the sum over the inputs of a weight (outputs, inputs, ...), times their `values`."""
    there = values.nonzero().flatten()
    chosen = weight[:, there.to(weight.device)].cpu().to(values.dtype)
    return torch.einsum("oi...,i->o...", chosen, values[there])
