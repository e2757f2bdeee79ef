"""Decides which units must stay: those that the outputs need, and those that shapes need."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from itertools import permutations

import torch
from torch import Tensor

from parasparse.shrink.comparisons import spans_behind, turned
from parasparse.shrink.expressions import Attribute, attributes_in, spans_in
from parasparse.shrink.facts import ZERO
from parasparse.shrink.labels import compact, tidy, varying
from parasparse.shrink.norms import Norms
from parasparse.shrink.readers import Reader
from parasparse.shrink.regular import to_restore
from parasparse.shrink.solving import solve
from parasparse.shrink.tracing import Trace
from parasparse.shrink.units import Units
from parasparse.targets.reach import Specs, reached
from parasparse.targets.tensors import Target
from parasparse.text import quoted_module


def may_lose(found: list[Target], targets: Specs | None) -> set[str]:
    """Return the names of the tensors, of those `found`, that may lose channels."""
    if targets is not None:
        chosen = reached(targets, found, "a tensor")
        found = [t for t in found if t in chosen or len(t.shape) < 2 or t.is_buffer]
    return {name for target in found for name in target.names}


def keep_all_of(trace: Trace, units: Units, losing: set[str]) -> None:
    """Keep the channels of all tensors but those of the names `losing`."""
    for leaf in trace.leaves.values():
        if leaf.name not in losing:
            for label in leaf.labels:
                units.need(label, f"no target reaches {leaf.name}")


def tie_pairs(trace: Trace, pairs: Mapping[str, object]) -> None:
    """Make one unit of what a real and an imaginary tensor have in the same place.

    `pairs` has an object for each pair, by the names of both tensors.
    """
    first: dict[object, list[Tensor]] = {}
    for leaf in (leaf for leaf in trace.leaves.values() if leaf.name in pairs):
        labels = first.setdefault(pairs[leaf.name], leaf.labels)
        for real, imaginary in zip(labels, leaf.labels, strict=False):
            trace.ties.tie(real, imaginary)


def keep_stated(trace: Trace, units: Units) -> None:
    """Keep the units whose number is one that the program states, such as 8 in `view(-1, 8)`.

    If their slices stay and one of them keeps all, so do the others: of keys and values in one
    tensor that is chunked, the values, if the program states how many keys there are.
    """
    dims: dict[object, set[int]] = defaultdict(set)  # of a label, whose sizes are stated
    for requirement in trace.required:
        if attributes_in(requirement.given) or spans_in(requirement.given):
            continue
        ids, dim = requirement.span.ids(), requirement.span.dim
        stated = dims[ids.data_ptr(), ids.shape, ids.stride()]
        stated.add(dim)
        slices = units.stay(ids).movedim(dim, 0).reshape(ids.shape[dim], -1)
        is_whole = bool(slices.all(1).any())
        if is_whole or stated.issuperset(varying(tidy(units.of[ids]))):
            units.keep(ids, f"a size in {requirement.where} cannot follow")


def keep_needed(
    trace: Trace, units: Units, readers: list[Reader], norms: Norms, *, exact: bool
) -> None:
    """Keep what the outputs of the network depend on."""
    for reason, pinned in trace.ties.pins.items():
        units.need(torch.cat(pinned), reason)
    if exact:
        norms.need()
        for label, module in norms.averaged:
            units.need(label, averages_over_it(module))
    for label, state, module in trace.sums:
        live = torch.broadcast_tensors(label, state)
        units.need(live[0][live[1] != ZERO], f"{module or 'the model'} sums over it")
    groups = trace.normed_groups if exact else []
    while (
        _keep_read(units, readers) or _keep_heirs(units, readers) or _keep_normed(units, groups)
    ):  # fmt: skip
        pass


def averages_over_it(module: str) -> str:
    """Return the reason why a channel stays over which `module` averages."""
    return f"{quoted_module(module)} takes a mean or norm over it"


def _keep_read(units: Units, readers: list[Reader]) -> bool:
    """Keep what readers read, except for constants that may go."""
    changed = False
    for reader in readers:
        unknown = reader.read.columns[reader.unknown(units)]
        changed |= units.need(unknown, f"{reader.where} reads it")
    return changed


def _keep_normed(units: Units, groups: list[tuple[Tensor, str]]) -> bool:
    """Keep all channels of a group that is averaged over, if the outputs need one of them."""
    changed = False
    for grid, module in groups:
        ids = grid[units.matter(grid).any(1)]
        changed |= units.need(ids, averages_over_it(module))
    return changed


def _keep_heirs(units: Units, readers: list[Reader]) -> bool:
    """Keep one of the constants that a reader without a bias reads, or all if it must be."""
    changed = False
    for reader in (reader for reader in readers if reader.has_constants):
        columns, gone = reader.read.columns, reader.collapsing(units)
        if not bool(gone.any()):
            continue
        why = "pads with zeros" if reader.read.padded else "has no bias of its own"
        why = f"it is a constant, and {reader.where} {why}"
        heirs = columns[0, reader.heirs(units)]
        if len(heirs):
            if not bool(units.stay(heirs).any()):
                changed |= units.need(heirs[:1], f"{why}; it stands for the others")
        else:
            changed |= units.need(columns[gone], why)
    return changed


def keep_shapes(
    trace: Trace,
    units: Units,
    values: dict[Attribute, int],
    *,
    multiple_of: int,
) -> tuple[dict[Attribute, int], bool]:
    """Keep more until every tensor is regular and every stated size can follow.

    Returns:
        The attributes that change, with their new values; and whether more units are kept.
    """
    shapes, least = distinct(trace.shapes), _Least(trace)
    grids = transposed(shapes)
    before = int(units.kept.sum())
    while True:
        changed = _keep_regular(units, shapes)
        changed |= _keep_grids(units, grids)
        changed |= least.keep(units)
        changed |= _keep_groups(trace, units)
        changed |= multiple_of > 1 and _keep_multiples(trace, units, multiple_of)
        if changed:
            continue
        kept = units.kept[units.of]
        new, unmet = solve(trace.required, values, kept)
        for requirement in unmet:
            for each in (requirement.span, *spans_in(requirement.given)):
                changed |= units.keep(each.label, f"a size in {requirement.where} cannot follow")
        for requirement in () if changed else unmet:  # it needs what others need otherwise
            for each in spans_behind(requirement.given, trace.required, new):
                changed |= units.keep(each.label, f"a size in {requirement.where} cannot follow")
        for comparison, spans in turned(trace.compared, trace.required, new, values, kept):
            for span in spans:
                reason = f"a comparison of how many there are in {comparison.where} decides"
                changed |= units.keep(span.label, reason)
        if not changed:
            return new, int(units.kept.sum()) > before


def distinct(labels: Iterable[Tensor]) -> list[Tensor]:
    """Return joint labels, each once."""
    found: dict[tuple[object, ...], list[Tensor]] = defaultdict(list)
    places = {(label.data_ptr(), label.shape, label.stride()): label for label in labels}
    for label in places.values():
        small = compact(label).squeeze()
        if small.ndim > 1:
            ids = small.flatten()
            key = (tuple(small.shape), int((ids * torch.arange(1, len(ids) + 1)).sum()))
            if not any(torch.equal(small, other) for other in found[key]):
                found[key].append(small)
    return [label for alike in found.values() for label in alike]


def transposed(shapes: list[Tensor]) -> list[Tensor]:
    """Return the joint labels of dimensions that are found in another order as well.

    Each is (before, dimensions..., after): `before` and `after` are those whose place stays. The
    dimensions are in the order that the program had first.
    """
    found: list[Tensor] = []
    alike: dict[object, list[Tensor]] = defaultdict(list)
    for label in shapes:
        corners = (int(label[(place,) * label.ndim]) for place in (0, -1))  # which stay corners
        others = alike[tuple(sorted(label.shape)), *corners]
        for other in others:
            found += _moved(other, _order(other, label))
        others.append(label)
    return found


def _order(label: Tensor, other: Tensor) -> tuple[int, ...]:
    """Return the order of dimensions in which `label` is `other`, or the one that it has."""
    same, *orders = permutations(range(label.ndim))
    for order in orders:
        turned = label.permute(order)
        if turned.shape == other.shape and torch.equal(turned, other):
            return order
    return same


def _moved(label: Tensor, order: tuple[int, ...]) -> Iterator[Tensor]:
    """Yield `label` for each run of dimensions that trade places with each other alone."""
    start = 0
    for end in range(1, label.ndim + 1):
        if max(order[:end]) < end:
            if end - start > 1:
                shape = label.shape
                yield label.reshape(shape[:start].numel(), *shape[start:end], shape[end:].numel())
            start = end


def places(grid: Tensor) -> Tensor:
    """Return the ids along the longest dimension of a joint label, as `transposed` returns it."""
    sizes = grid.shape[1:-1]
    longest = max(range(len(sizes)), key=lambda dim: (sizes[dim], dim))
    for dim in range(len(sizes)):
        grid = grid if dim == longest else grid.narrow(dim + 1, 0, 1)
    return grid


def _keep_grids(units: Units, grids: list[Tensor]) -> bool:
    """Keep whole rows and columns, so that the smaller label is the same in the other order."""
    changed = False
    for label in grids:
        stay = units.stay(label).any(-1)
        more, dims = ~stay, range(1, stay.ndim)
        for dim in dims:
            more &= stay.any([other for other in dims if other != dim], keepdim=True)
        changed |= units.keep(label[..., 0][more], "channels of groups are shuffled")
    return changed


def _keep_regular(units: Units, shapes: list[Tensor]) -> bool:
    changed = False
    for label in shapes:
        more = to_restore(units.stay(label))
        changed |= units.keep(label[more], "slices of a tensor must keep equally many")
    return changed


class _Least:
    """The labels of which some ids must stay, and how many: one of each tensor, and more."""

    def __init__(self, trace: Trace) -> None:
        found = [(label, 1) for leaf in trace.leaves.values() for label in leaf.labels]
        found += trace.least
        self._ids = [compact(label).flatten() for label, _ in found]
        self._all = torch.cat([torch.zeros(0, dtype=torch.long), *self._ids])
        sizes = torch.tensor([len(ids) for ids in self._ids], dtype=torch.long)
        self._of = torch.repeat_interleave(torch.arange(len(sizes)), sizes)  # of which label
        self._least = torch.tensor([number for _, number in found], dtype=torch.long)

    def keep(self, units: Units) -> bool:
        """Keep as many as needed; return whether some were not kept before."""
        stay = units.stay(self._all).to(torch.long)
        fewer = torch.zeros_like(self._least).index_add_(0, self._of, stay) < self._least
        changed = False
        for place in fewer.nonzero().flatten().tolist():
            ids = self._ids[place]
            missing = int(self._least[place]) - int(units.stay(ids).sum())
            more = ids[~units.stay(ids)][: max(missing, 0)]
            changed |= units.keep(more, "one channel of a tensor must stay")
        return changed


def _keep_groups(trace: Trace, units: Units) -> bool:
    """Keep an input and an output of each group of a convolution that keeps one of them."""
    changed = False
    for rows, inputs, module in trace.groups:
        stay = [units.stay(ids).any(1) for ids in (rows, inputs)]
        for ids, here, there in ((rows, *stay), (inputs, *reversed(stay))):
            first = ids[there & ~here][:, 0]
            changed |= units.keep(first, f"a group of {module} keeps an input and an output")
    return changed


def _keep_multiples(trace: Trace, units: Units, multiple_of: int) -> bool:
    changed = False
    for leaf in trace.leaves.values():
        for label in leaf.labels:
            ids = torch.unique(compact(label))
            removed = ids[~units.stay(ids)]
            missing = -(len(ids) - len(removed)) % multiple_of
            if len(removed) and missing:
                changed |= units.keep(removed[:missing], f"sizes are multiples of {multiple_of}")
    return changed
