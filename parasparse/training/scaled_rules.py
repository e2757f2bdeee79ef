"""Rules whose sparsity a controller scales."""

from dataclasses import replace
from typing import Any

import torch

from parasparse.counts import bounded, check_floors, least_kept
from parasparse.patterns.ranked import number_of
from parasparse.rules.assignments import Assignment
from parasparse.rules.prune import Prune
from parasparse.rules.treatments import as_treatment
from parasparse.scores.weights_alone import magnitude
from parasparse.text import described
from parasparse.training.present import Present, share_of_zeros


def as_rules(pairs: list[tuple[Any, Any]]) -> Any:
    """Return pairs of target and treatment as rules for `sparsify`."""
    return pairs[0][1] if pairs[0][0] is None else pairs


def scaled(prune: Prune | None, share: float) -> Prune | None:
    """Return `prune` with `share` times its sparsity."""
    if prune is None or prune.sparsity is None:
        return prune
    if share == 0:  # nothing is ranked: at the start the score may have no data yet
        return replace(prune, sparsity=0.0, score=magnitude)
    return replace(prune, sparsity=share * prune.sparsity)


def check_floors_at_the_end(
    assigned: list[Assignment], rules: list[tuple[Any, Prune | None]]
) -> None:
    """Raise ValueError if floors of `rules` keep too much at their full sparsity.

    `assigned` are the assignments of `rules`, scaled.
    """
    for spec, prune in rules:
        if prune is None or prune.max_sparsity == 1 or prune.scope == "local":
            continue
        shapes = [each.target.shape for each in assigned if each.rule is spec]
        sizes = [number_of(prune.pattern, shape) for shape in shapes]
        floors = [least_kept(size, prune.max_sparsity) for size in sizes]
        check_floors(floors, sum(sizes), prune.sparsity or 0.0)


def raised(prune: Prune | None, share: float, present: Present) -> Prune | None:
    """Return `prune` for `share` of the way from the sparsities `present` to its own.

    A tensor that already has more zeros than `prune` asks for keeps its sparsity.
    """
    if prune is None or prune.sparsity is None or not any(zeros for zeros, _ in present.values()):
        return scaled(prune, share)
    if share == 0:
        prune = replace(prune, score=magnitude)  # the score may have no data, as in `scaled`
    if prune.scope == "global":
        return replace(prune, sparsity=next(iter(sparsities(prune, share, present).values())))
    shared_out = prune.distribution or dict.fromkeys

    def from_present(shapes: dict[str, torch.Size], sparsity: float) -> dict[str, float]:
        asked = shared_out(shapes, sparsity)
        now = {name: share_of_zeros({name: present[name]}) for name in shapes}
        between = {name: _between(now[name], asked[name], share) for name in shapes}
        if prune.max_sparsity == 1:
            return between
        sizes = {name: number_of(prune.pattern, shape) for name, shape in shapes.items()}
        return {n: bounded(sizes[n], between[n], prune.max_sparsity) for n in shapes}

    return replace(prune, distribution=from_present, max_sparsity=1.0)


def sparsities(prune: Prune | None, share: float, present: Present) -> dict[str, float]:
    """Return the sparsities that `raised` asks for; without its distribution among tensors."""
    if prune is None or prune.sparsity is None:
        return {}
    groups = [present] if prune.scope == "global" else [{n: present[n]} for n in present]
    return {
        name: _between(share_of_zeros(group), prune.sparsity, share)
        for group in groups
        for name in group
    }


def _between(present: float, asked: float, share: float) -> float:
    return (1 - share) * present + share * max(present, asked)


def with_sparsity(treatment: Any) -> Prune | None:
    """Return `treatment` as a `Prune`, or None for None.

    Raises:
        ValueError: it has no sparsity to scale.
    """
    found = as_treatment(treatment)
    if found is None or (isinstance(found, Prune) and found.sparsity is not None):
        return found
    raise ValueError(
        "each treatment in `rules` must have a sparsity, which the controller scales: a number, "
        f"`Prune(number, ...)`, or None; got {described(treatment)}."
    )
