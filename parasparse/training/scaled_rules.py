"""Rules whose sparsity a controller scales."""

from dataclasses import replace
from typing import Any

from parasparse.rules.prune import Prune
from parasparse.rules.treatments import as_treatment
from parasparse.scores.weights_alone import magnitude
from parasparse.text import described


def as_rules(pairs: list[tuple[Any, Any]]) -> Any:
    """Return `pairs` of target and treatment as `sparsify` takes them."""
    return pairs[0][1] if pairs[0][0] is None else pairs


def scaled(prune: Prune | None, share: float) -> Prune | None:
    """Return `prune` at `share` times its sparsity."""
    if prune is None or prune.sparsity is None:
        return prune
    if share == 0:  # nothing is ranked: a score may have nothing to go by yet
        return replace(prune, sparsity=0.0, score=magnitude)
    return replace(prune, sparsity=share * prune.sparsity)


def with_sparsity(treatment: Any) -> Prune | None:
    """Return the `Prune` that a treatment is, None for None.

    Raises:
        ValueError: it has no sparsity that could be scaled.
    """
    found = as_treatment(treatment)
    if found is None or (isinstance(found, Prune) and found.sparsity is not None):
        return found
    raise ValueError(
        "`rules` must give each tensor a sparsity that the schedule can scale, a number or "
        f"`Prune(number, ...)`, or None; got {described(treatment)}."
    )
