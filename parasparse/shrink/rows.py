"""The rows of a plan: what each tensor loses, and which dead channels stay."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from parasparse.shrink.facts import ZERO
from parasparse.shrink.labels import compact, varying
from parasparse.shrink.norms import Changes
from parasparse.shrink.plan import Kept, KeptRow, ShrinkRow
from parasparse.shrink.tracing import Leaf, Trace
from parasparse.shrink.units import Units


@dataclass
class Rows:
    """Makes the rows of a plan, once it is decided which channels go.

    Many tensors have the same ids, such as a weight and all vectors of a norm. What stays of them
    is looked up once.
    """

    trace: Trace
    units: Units
    _stay: dict[tuple[int, int, int], Tensor] = field(default_factory=dict)
    _kept: dict[tuple[int, int, int], Kept] = field(default_factory=dict)

    def changed(self, changes: Changes) -> tuple[ShrinkRow, ...]:
        """Return the rows of the tensors that do not keep their shape."""
        found = (self._row(leaf, changes) for leaf in self.trace.leaves.values())
        return tuple(row for row in found if row is not None)

    def kept_back(self) -> tuple[KeptRow, ...]:
        """Return the channels whose entries are all dropped and that stay."""
        rows = []
        for leaf, label, dim in self._may_be_kept_back():
            ids, state = compact(label).flatten(), compact(self.trace.state(leaf.tensor))
            reasons: dict[str, list[int]] = {}
            for channel in _dead(state, dim, self._stays(label, dim)):
                reason = self.units.reason(int(self.units.of[ids[channel]]))
                reasons.setdefault(reason, []).append(channel)
            rows += [KeptRow(leaf.name, dim, tuple(c), reason) for reason, c in reasons.items()]
        return tuple(rows)

    def _may_be_kept_back(self) -> list[tuple[Leaf, Tensor, int]]:
        """Return leaves, their labels and dimensions; of vectors, those with a dead entry."""
        places = [
            (leaf, label, varying(label)[0])
            for leaf in self.trace.leaves.values() if leaf.name in self.trace.dropped
            for label in leaf.labels if len(varying(label)) == 1
        ]  # fmt: skip
        vectors = [number for number, (leaf, *_) in enumerate(places) if leaf.tensor.ndim == 1]
        if not vectors:
            return places
        states = torch.cat([self.trace.state(places[number][0].tensor) for number in vectors])
        stay = torch.cat([self._stays(*places[number][1:]) for number in vectors])
        sizes = torch.tensor([len(places[number][0].tensor) for number in vectors])
        ends = sizes.cumsum(0)
        dead = torch.bucketize(((states == ZERO) & stay).nonzero().flatten(), ends, right=True)
        some = {vectors[place] for place in dead.tolist()}
        others = set(vectors) - some
        return [place for number, place in enumerate(places) if number not in others]

    def _row(self, leaf: Leaf, changes: Changes) -> ShrinkRow | None:
        """Return the row of a tensor, or None if it keeps its shape."""
        shape = list(leaf.tensor.shape)
        kept: dict[int, Kept | tuple[Kept, ...]] = {}
        for label in sorted(leaf.labels, key=lambda label: len(varying(label))):
            dims = varying(label)
            if len(dims) == 1:
                (dim,) = dims
                indices = self._indices(label, dim)
                if len(indices) < label.shape[dim]:
                    kept[dim], shape[dim] = indices, len(indices)
                continue
            stay = self.units.stay(compact(label))
            if bool(stay.all()):
                continue
            # Of a grouped convolution: (rows, inputs of the group).
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

    def _stays(self, label: Tensor, dim: int) -> Tensor:
        """Return which indices of the one dimension along which `label` varies stay."""
        key = _place(label, dim)
        if key not in self._stay:
            self._stay[key] = self.units.stay(compact(label).flatten())
        return self._stay[key]

    def _indices(self, label: Tensor, dim: int) -> Kept:
        key = _place(label, dim)
        if key not in self._kept:
            self._kept[key] = tuple(self._stays(label, dim).nonzero().flatten().tolist())
        return self._kept[key]


def _place(label: Tensor, dim: int) -> tuple[int, int, int]:
    """Return where the ids of a label are that varies along one dimension."""
    return label.data_ptr(), label.shape[dim], label.stride(dim)


def _dead(state: Tensor, dim: int, among: Tensor) -> list[int]:
    """Return the indices of `dim`, of those `among` which to look, that are ZERO everywhere."""
    others = [d for d in range(state.ndim) if d != dim]
    some = state[tuple(slice(None, None, 1 if d == dim else 31) for d in range(state.ndim))]
    for part in (some, state) if others else (state,):  # a part rules out most
        zero = (part.amin(others) if others else part) == ZERO
        if not bool((zero & among).any()):
            return []
    return (zero & among).nonzero().flatten().tolist()
