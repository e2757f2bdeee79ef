"""RMSNorms: which means over channels stay exact, because a weight and an eps change with them."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from parasparse.shrink.expressions import Attribute
from parasparse.shrink.facts import ZERO
from parasparse.shrink.labels import compact
from parasparse.shrink.means import Mean
from parasparse.shrink.tracing import Leaf, Trace
from parasparse.shrink.units import Units
from parasparse.text import quoted_module


@dataclass(frozen=True)
class Changes:
    """What changes in the norms of a smaller network.

    Attributes:
        scales: by name of a parameter, a number and a factor: the number is added to the values,
            the sum multiplied by the factor, and the number subtracted again.
        epsilons: the new values of attributes.
    """

    scales: dict[str, tuple[float, float]] = field(default_factory=dict)
    epsilons: dict[Attribute, float] = field(default_factory=dict)


class Norms:
    """The means of a trace for whose change a weight and an eps can make up.

    They may lose channels that are 0. All other means may lose none: they are `averaged`.

    Args:
        trace: a run of the model.
        units: of the trace.
        masked: by name of a parameter, its states: ZERO where a mask drops an entry.
    """

    def __init__(self, trace: Trace, units: Units, masked: Mapping[str, Tensor]) -> None:
        self._units, self._masked = units, masked
        self._leaves = {leaf.name: leaf for leaf in trace.leaves.values()}
        found = [mean for mean in trace.means.found if mean.is_read or mean.gains]
        fixed = {size for size in trace.numbers if isinstance(size, Attribute)}
        exact = {mean for mean in found if self._is_exact(mean, trace.means.read, fixed)}
        uses = self._uses(found)
        while True:  # what shares an eps or a weight with another mean must change with it
            alone = {m for m in exact if all(_agree(uses[name], exact) for name in _names(m))}
            if alone == exact:
                break
            exact = alone
        self.exact = [mean for mean in found if mean in exact]
        self.averaged = [*trace.averaged, *((m.label, m.module) for m in found if m not in exact)]
        self._groups = trace.normed_groups

    def need(self) -> None:
        """Keep the channels over which a mean is taken and that are not 0."""
        for mean in self.exact:
            self._units.need(self._live(mean), f"{quoted_module(mean.module)} takes a mean over it")

    def inexact(self) -> list[str]:
        """Return the modules whose result changes, because a norm loses what it may not."""
        lost = [module for label, module in self.averaged if not self._stays(label)]
        for grid, module in self._groups:
            stay = self._units.stay(grid)
            lost += [module] * bool((stay.any(1) & ~stay.all(1)).any())  # a part of a group
        return lost + [mean.module for mean in self.exact if not self._stays(self._live(mean))]

    def changes(self) -> Changes:
        """Return what changes, once it is decided which channels go."""
        changes = Changes()
        for mean in self.exact:
            stay = self._units.stay(compact(mean.label))
            growth = stay.numel() / int(stay.sum())
            if growth > 1:
                for name, shift, power in mean.gains:
                    changes.scales[name] = (shift, growth**-power)
                for attribute, value, power in mean.epsilons:
                    changes.epsilons[attribute] = value * growth**power
        return changes

    def _stays(self, ids: Tensor) -> bool:
        return bool(self._units.stay(compact(ids)).all())

    def _live(self, mean: Mean) -> Tensor:
        """Return the ids that are not 0."""
        label, state = torch.broadcast_tensors(compact(mean.label), compact(mean.state))
        live: Tensor = label[state != ZERO]
        return live

    def _is_exact(self, mean: Mean, read: set[str], fixed: set[Attribute]) -> bool:
        epsilons = {attribute for attribute, _, _ in mean.epsilons}
        return not mean.is_read and not epsilons & fixed and all(
            name not in read and self._is_along(mean, self._leaves[name])
            and (shift == 0 or not self._drops_live(mean, name))
            for name, shift, _ in mean.gains
        )  # fmt: skip

    def _is_along(self, mean: Mean, leaf: Leaf) -> bool:
        """Whether a parameter loses the channels that the mean loses, and nothing else."""
        if not isinstance(leaf.tensor, nn.Parameter) or leaf.tensor.is_complex():
            return False
        labels = [self._units_of(label) for label in (*leaf.labels, mean.label)]
        return len(labels) == 2 and torch.equal(*labels)

    def _units_of(self, label: Tensor) -> Tensor:
        units: Tensor = self._units.of[compact(label).flatten()]
        return units

    def _drops_live(self, mean: Mean, name: str) -> bool:
        """Whether a mask drops weights that would not be 0 afterwards, of channels that stay."""
        if name not in self._masked:
            return False
        zero = self._masked[name].flatten() == ZERO
        dropped = self._units_of(self._leaves[name].labels[0])[zero]
        return bool(torch.isin(self._units_of(self._live(mean)), dropped).any())

    def _uses(self, found: list[Mean]) -> dict[Hashable, list[tuple[Mean, object]]]:
        uses: dict[Hashable, list[tuple[Mean, object]]] = {}
        for mean in found:
            units = tuple(self._units_of(mean.label).tolist())
            for name, number, power in (*mean.gains, *mean.epsilons):
                uses.setdefault(name, []).append((mean, (number, power, units)))
        return uses


def _agree(uses: list[tuple[Mean, object]], exact: set[Mean]) -> bool:
    """Whether all means that use a weight or an eps are exact and want the same change."""
    return all(mean in exact for mean, _ in uses) and len({how for _, how in uses}) == 1


def _names(mean: Mean) -> list[Hashable]:
    return [name for name, _, _ in (*mean.gains, *mean.epsilons)]
