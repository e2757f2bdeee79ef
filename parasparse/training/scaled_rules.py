"""Rules whose sparsity a controller scales."""

from dataclasses import replace
from typing import Any

from parasparse.rules.prune import Prune
from parasparse.rules.treatments import as_treatment
from parasparse.scores.weights_alone import magnitude
from parasparse.text import described


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
