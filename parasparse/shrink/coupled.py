"""`coupled`: channels as units across tensors, which are kept or dropped as a whole."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from parasparse.counts import check_sparsity, num_kept
from parasparse.patterns.selection.kth import highest
from parasparse.rules.prune import Distribution, Prune, shares_by
from parasparse.scores.weights_alone import Score, magnitude
from parasparse.shrink.gated_units import UnitsOfTensor
from parasparse.shrink.labels import compact, on_cpu
from parasparse.shrink.needed import (
    averages_over_it,
    distinct,
    keep_all_of,
    keep_stated,
    may_lose,
    places,
    tie_pairs,
    transposed,
)  # fmt: skip
from parasparse.shrink.norms import Norms
from parasparse.shrink.refusals import check_plain_layers
from parasparse.shrink.running import traced
from parasparse.shrink.tracing import Trace
from parasparse.shrink.unit_groups import groups_of, layers_of
from parasparse.shrink.units import Units
from parasparse.targets.reach import Specs
from parasparse.targets.tensors import tensors_of
from parasparse.text import listed

Predicate: TypeAlias = Callable[[str, nn.Module, Tensor], bool]


class coupled:  # noqa: N801 - a pattern reads as a function
    """Keep or drop channels with everything that belongs to them, in all tensors of a model.

    A unit is what `shrink` can remove together: the output channel of a layer, its bias and norm,
    the inputs of all layers that read it, the channels that a residual sum adds to it; all of an
    attention head, or of a group of query heads with its key and value. Channels whose number the
    program states, as in `x.view(-1, 8)`, are not units, because they would have to stay. `rules`
    makes the rules for `sparsify` and `GradualPruning`. In a rule of your own, `reaches` must be
    the target, and the scope "global". A `Gate` with this pattern has one logit for each unit,
    which its tensors share.

    Args:
        model: dense or masked; not changed.
        example_inputs: see `shrink`.
        targets: the tensors that may lose channels: see `shrink`. Other channels are not units.
        norm: None ranks units by the mean of the scores of their entries; p > 0 by the p-norm per
            entry.
        uniform: whether every group of units, such as the channels of one layer, gets the sparsity
            of the rule. Otherwise all units are ranked together.
        distribution: `(shapes by name, sparsity) -> sparsity by name`: the sparsity of each group,
            by the layer that computes its units; None: as `uniform` says. See `distributions`.

    Raises:
        TypeError: `model` is not a module, or `distribution` not a callable.
        RuntimeError: `model` is compact, a compiled program or quantized, or has other
            parametrizations than masks.
        ValueError: a target reaches nothing, or `norm` is not above 0 and finite. There is a
            `distribution`, and `uniform` is False.

    Examples:
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> units = coupled(model, torch.randn(1, 4))
        >>> shrink(sparsify(model, units.rules(0.5)), torch.randn(1, 4))[2]
        Linear(in_features=4, out_features=2, bias=True)
    """

    def __init__(
        self, model: nn.Module, example_inputs: Any, *, targets: Specs | None = None,
        norm: float | None = None, uniform: bool = True, distribution: Distribution | None = None,
    ) -> None:  # fmt: skip
        check_plain_layers(model)
        if norm is not None and (isinstance(norm, str) or not 0 < norm < math.inf):
            raise ValueError(f"`norm` must be None (the mean) or > 0 and finite; got {norm!r}.")
        if distribution is not None and not callable(distribution):
            raise TypeError(f"`distribution` must be a callable; got {distribution!r:.60}.")
        if distribution is not None and not uniform:
            raise ValueError("`uniform` must be True with a `distribution`; got False.")
        self.norm, self.uniform, self.distribution = norm, uniform, distribution
        tensors = tensors_of(model, pairs=False)
        trace, _, _ = traced(model, tensors, example_inputs, {})
        self._shapes: dict[str, torch.Size] = {}
        joined = tensors_of(model)
        self._names = {name: target.name for target in joined for name in target.names}
        self._find(trace, may_lose(joined, targets))

    @on_cpu()
    def _find(self, trace: Trace, losing: set[str]) -> None:
        """Find the units of a run that lie in the tensors named in `losing`."""
        tie_pairs(trace, self._names)
        for grid in transposed(distinct(trace.shapes)):  # shuffled: all groups have the same places
            if grid.shape[-1] == 1:  # otherwise it is enough that slices keep equally many
                trace.ties.tie(grid, places(grid))
        for grid, _ in trace.normed_groups:
            trace.ties.tie(grid, grid[:, :1])
        units = Units(trace)
        keep_all_of(trace, units, losing)
        for reason, pinned in trace.ties.pins.items():
            units.keep(torch.cat(pinned), reason)
        for label, module in Norms(trace, units, {}).averaged:
            units.keep(label, averages_over_it(module))
        keep_stated(trace, units)
        _keep_whole(trace, units)
        found: dict[str, list[Tensor]] = {}
        for leaf in trace.leaves.values():
            if isinstance(leaf.tensor, nn.Parameter):
                labels = [units.of[compact(label)] for label in leaf.labels]
                labels = [ids for ids in labels if not bool(units.kept[ids].all())]
                if labels:
                    name = self._plain(leaf.name)
                    found[name] = labels
                    self._shapes[name] = leaf.tensor.shape
        removable = (~units.kept).nonzero().flatten()
        parts = [torch.unique(ids) for labels in found.values() for ids in labels]
        removable = removable[torch.isin(removable, torch.cat([removable[:0], *parts]))]
        self._why_none = _why_none(units) if not found else ""
        number = torch.full((len(units.kept),), -1)
        number[removable] = torch.arange(len(removable))
        self._labels = {name: [number[ids] for ids in labels] for name, labels in found.items()}
        shapes = [number[units.of[label]] for label in distinct(trace.shapes)]
        self._groups = groups_of(len(removable), self._labels, shapes)
        self._layers = layers_of(self._groups, self._labels, self._shapes)

    def __repr__(self) -> str:
        return f"coupled({len(self._groups)} units in {len(self._shapes)} tensors)"

    def rules(self, sparsity: float, *, score: Score = magnitude) -> dict[Predicate, Prune]:
        """Return the rules that drop this share of the units, those with the lowest scores.

        Args:
            sparsity: share of the units to drop, in [0, 1]; one of each group stays.
            score: of the entries of each tensor: see `Prune`.

        Raises:
            ValueError: `sparsity` is outside [0, 1]. There are no units; the message says why.
        """
        if not self._shapes:
            raise ValueError(f"no channel of the model can be removed: {self._why_none}.")
        return {self.reaches: Prune(sparsity, score=score, pattern=self, scope="global")}

    def reaches(self, name: str, module: nn.Module, tensor: Tensor) -> bool:
        """Whether a tensor has units: the target of a rule."""
        return self._plain(name) in self._shapes

    def _plain(self, name: str) -> str:
        """Return the name that rules have for `name`: of a pair, and without wrappers."""
        return self._names.get(name, name)

    def __call__(self, scores: Any, sparsity: float | None = None) -> Tensor:
        """Refuse: units are ranked in all their tensors together."""
        if sparsity is None:  # called with the tensors of a rule, as a treatment
            raise TypeError(
                "`coupled` is a pattern and must be part of a rule: sparsify(model, "
                "units.rules(0.5))."
            )
        raise ValueError(
            '`scope` must be "global" with the pattern `coupled`, because its units lie in '
            'several tensors: Prune(..., pattern=units, scope="global").'
        )

    @on_cpu()
    def jointly(self, scores: Mapping[str, Tensor], sparsity: float) -> dict[str, Tensor]:
        """Return the masks for `scores`, by name, in which the sparsity counts units.

        Raises:
            ValueError: `scores` has other tensors than the units.
        """
        check_sparsity(sparsity)
        self._check(scores)
        if any(score.is_meta for score in scores.values()):
            return {name: torch.empty_like(s, dtype=torch.bool) for name, s in scores.items()}
        ranks = self._ranks(scores)
        kept = torch.zeros(len(ranks), dtype=torch.bool)
        for members, share in self._ranked_together(sparsity):
            (mask,) = highest([ranks[members]], max(num_kept(len(members), share), 1))
            kept[members] = mask
        return {name: self._spread(name, kept).to(score.device) for name, score in scores.items()}

    def apart(self, tensors: Mapping[str, Tensor]) -> dict[str, UnitsOfTensor]:
        """Return the pattern of each tensor for a gate whose logits are those of all units.

        Raises:
            ValueError: `tensors` has other tensors than the units.
        """
        self._check(tensors)
        number = len(self._groups)
        return {n: UnitsOfTensor(tuple(self._labels[self._plain(n)]), number) for n in tensors}

    @on_cpu()
    def counted(self, kept: Mapping[str, Tensor]) -> tuple[int, int]:
        """Return how many units the masks `kept` drop, and how many there are."""
        ranks = self._ranks({name: mask.double() for name, mask in kept.items()})
        return int((ranks == 0).sum()), len(ranks)

    def _ranked_together(self, sparsity: float) -> Iterator[tuple[Tensor, float]]:
        """Yield units that are ranked together, and the share of them to drop."""
        if not self.uniform:
            yield torch.arange(len(self._groups)), sparsity
            return
        shapes = {n: shape for n, shape in self._shapes.items() if n in self._layers}  # in order
        shares = dict.fromkeys(shapes, sparsity)
        if self.distribution is not None:
            shares = shares_by(self.distribution, shapes, sparsity)
        for group, layer in enumerate(self._layers):
            yield (self._groups == group).nonzero().flatten(), shares[layer]

    def _check(self, scores: Mapping[str, Tensor]) -> None:
        shapes = {self._plain(name): score.shape for name, score in scores.items()}
        if shapes != self._shapes:
            odd = [name for name in {**shapes, **self._shapes}
                   if shapes.get(name) != self._shapes.get(name)]  # fmt: skip
            if changed := [name for name in odd if name in shapes and name in self._shapes]:
                raise ValueError(
                    "the units of `coupled` must be those of the model as it is; the shapes of "
                    f"{listed(changed)} have changed, as by `shrink`. Call `coupled` again."
                )
            raise ValueError(
                "a rule with the pattern `coupled` must reach the tensors of its units: use "
                f"`units.reaches` as its target. It differs for {listed(odd)}."
            )

    def _ranks(self, scores: Mapping[str, Tensor]) -> Tensor:
        """Return the score of each unit: the mean, or norm per entry, of its matrices."""
        total = torch.zeros(len(self._groups), dtype=torch.float64)
        count = torch.zeros_like(total)
        for name, score in scores.items():
            if score.ndim < 2:
                continue
            powers = score.cpu().double()
            powers = powers if self.norm is None else powers.abs() ** self.norm
            for label in self._labels[self._plain(name)]:
                over = [d for d in range(score.ndim) if label.shape[d] == 1]
                sums = powers.sum(over, keepdim=True) if over else powers
                ids = label.flatten()
                there = ids >= 0
                total.index_add_(0, ids[there], sums.flatten()[there])
                each = torch.full_like(ids, score.numel() // label.numel(), dtype=torch.float64)
                count.index_add_(0, ids[there], each[there])
        mean = total / count.clamp(min=1)
        return mean if self.norm is None else mean ** (1 / self.norm)

    def _spread(self, name: str, kept: Tensor) -> Tensor:
        name = self._plain(name)
        mask = torch.ones(self._shapes[name], dtype=torch.bool)
        for label in self._labels[name]:
            mask = mask & ((label < 0) | kept[label])
        return mask


def _keep_whole(trace: Trace, units: Units) -> None:
    """Keep units that are all of a dimension of a tensor: it would be empty without them."""
    for leaf in trace.leaves.values():
        for label in leaf.labels:
            found = units.of[compact(label)]
            if bool((found == found.flatten()[:1]).all()):
                units.keep(label, f"all of {leaf.name} belongs together")


def _why_none(units: Units) -> str:
    """Return the reasons why units stay, the most frequent ones first."""
    reasons = Counter(filter(None, map(units.reason, range(1, len(units.of)))))
    return "; ".join(reason for reason, _ in reasons.most_common(3)) or "it has no weights"
