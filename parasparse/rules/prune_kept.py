"""Treatments of compact weights, which drop some of the entries that are kept now."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from parasparse import patterns
from parasparse.counts import bounded, num_kept
from parasparse.masks.kept_entries import KeptEntries
from parasparse.patterns.selection.kth import highest
from parasparse.rules.prune import Prune
from parasparse.rules.treatments import keep_nonzero
from parasparse.scores.weights_alone import is_entrywise
from parasparse.targets.tensors import Target
from parasparse.text import described, listed


@dataclass(frozen=True)
class KeptValues:
    """The values of a compact weight, or all of another tensor, and the shape of the weight."""

    values: Tensor
    entries: KeptEntries | None
    shape: torch.Size

    @classmethod
    def of(cls, target: Target) -> "KeptValues":
        """Return the values of `target`."""
        entries = target.kept()
        if entries is None:
            values = target.stored()
            return cls(values, None, values.shape)
        return cls(target.originals()[0].detach(), entries, entries.shape)

    def where(self, chosen: Tensor) -> Tensor | KeptEntries:
        """Return the mask of the `chosen` values."""
        if self.entries is None:
            return chosen
        return KeptEntries(self.entries.positions[chosen], self.shape)


def results_of_kept(treatment: Any, group: list[Target]) -> dict[str, Tensor | KeptEntries]:
    """Return the masks of `treatment` for tensors of which some are compact.

    Raises:
        ValueError: the treatment needs entries that do not exist.
    """
    if treatment is keep_nonzero:
        kept = {target: target.kept() for target in group}
        return {t.name: t.effective() != 0 if k is None else k for t, k in kept.items()}
    if not isinstance(treatment, Prune) or not _ranks_entries(treatment):
        names = [target.name for target in group if target.is_compact]
        raise ValueError(
            "a compact weight must be pruned by scores of each entry alone, such as `magnitude`, "
            f"without a pattern; {listed(names)} would get {described(treatment)}. Call "
            "parasparse.expand(model) first, or leave them out."
        )
    tensors = {target.name: KeptValues.of(target) for target in group}
    if treatment.scope == "global":
        return _pruned(treatment, tensors, treatment.sparsity or 0.0)
    shares = treatment.shares(tensors)
    return {
        name: mask
        for name, tensor in tensors.items()
        for mask in _pruned(treatment, {name: tensor}, shares[name]).values()
    }


def _ranks_entries(prune: Prune) -> bool:
    global_floor = prune.scope == "global" and prune.max_sparsity < 1
    return prune.pattern is patterns.unstructured and is_entrywise(prune.score) and not global_floor


def _pruned(
    prune: Prune, tensors: Mapping[str, KeptValues], sparsity: float
) -> dict[str, Tensor | KeptEntries]:
    """Return the masks of tensors that share one sparsity."""
    numel = sum(tensor.shape.numel() for tensor in tensors.values())
    kept = num_kept(numel, bounded(numel, sparsity, prune.max_sparsity))
    there = sum(tensor.values.numel() for tensor in tensors.values())
    scores = [prune.scores_of(tensor.values, name) for name, tensor in tensors.items()]
    chosen = zip(tensors.items(), highest(scores, min(kept, there)), strict=True)
    return {name: tensor.where(mask) for (name, tensor), mask in chosen}
