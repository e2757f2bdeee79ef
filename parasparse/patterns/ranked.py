"""Patterns that keep the entries or units with the highest scores, in one tensor or in several."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from parasparse.counts import check_sparsity
from parasparse.dtypes import widened_dtype
from parasparse.patterns.blocks_channels_heads import Units, block, channel, has_units, head
from parasparse.patterns.n_of_m_and_bands import n_of_m
from parasparse.patterns.selection.kth import shaped
from parasparse.patterns.selection.scores import as_scores
from parasparse.patterns.selection.together import ranked_together
from parasparse.sharding.dtensors import (
    full_tensor,
    is_dtensor,
    is_sharded_along,
    laid_out_like,
    on_local,
)

Pattern = Callable[..., Tensor]
_Scores = Mapping[str, Tensor]


def takes_sparsity(pattern: Pattern) -> bool:
    """Whether `pattern` is called with a sparsity."""
    return getattr(pattern, "takes_sparsity", True)


def number_of(pattern: Pattern, shape: torch.Size) -> int:
    """Return how many units, or entries, of a tensor of `shape` there are for `pattern`."""
    if not has_units(pattern):
        return shape.numel()
    return pattern.pool(torch.zeros((), device="cpu").expand(shape)).numel()


def check_can_bound(pattern: Pattern) -> None:
    """Raise ValueError if `pattern` cannot keep `max_sparsity` for each tensor."""
    if pattern is not unstructured and not has_units(pattern):
        raise ValueError(
            "`max_sparsity` must be omitted with patterns other than `unstructured` and those of "
            f"units (`block`, `channel`, `head`); got {pattern}."
        )


def unstructured(scores: Tensor, sparsity: float) -> Tensor:
    """Return the mask of the highest scores, whatever their position.

    Args:
        scores: any shape.
        sparsity: share of zeros, in [0, 1].

    Raises:
        ValueError: the scores contain NaN, or the sparsity is outside [0, 1].

    Examples:
        >>> unstructured(torch.tensor([1.0, 3.0, 1.0, 2.0]), 0.25).tolist()
        [True, True, False, True]
    """
    return jointly({"": scores}, sparsity)[""]


def jointly(
    scores: Mapping[str, Tensor],
    sparsity: float,
    *,
    pattern: Pattern = unstructured,
    max_sparsity: float = 1.0,
) -> dict[str, Tensor]:
    """Return a mask for each of `scores`, ranked together: they have the sparsity as a whole.

    Units of different tensors are compared by their mean or norm per entry, and each counts as one.

    Args:
        scores: by name, any shapes.
        sparsity: share of zeros among all of them, in [0, 1].
        pattern: a pattern that takes a sparsity. A custom one without `pool` and `spread` is called
            once, with all scores as one flat tensor.
        max_sparsity: upper bound for each tensor, in [0, 1], with `unstructured` or a pattern of
            units. Below 1, each tensor keeps at least one entry or unit.

    Raises:
        ValueError: the pattern takes no sparsity, or does not fit a shape; the scores contain NaN;
            a sparsity is outside [0, 1]; or `max_sparsity` keeps more than `sparsity` does, or is
            below 1 with another pattern.

    Examples:
        >>> masks = jointly({"a": torch.tensor([1.0, 2.0]), "b": torch.tensor([4.0, 3.0])}, 0.5)
        >>> masks["a"].tolist(), masks["b"].tolist()
        ([False, False], [True, True])
    """
    check_sparsity(sparsity)
    if not takes_sparsity(pattern):
        raise ValueError(f"`pattern` must take a sparsity to rank jointly; {pattern} takes none.")
    if check_sparsity(max_sparsity, "max_sparsity") < 1:
        check_can_bound(pattern)
    if not scores:
        return {}
    if hasattr(pattern, "jointly"):
        return pattern.jointly(scores, sparsity)  # type: ignore[no-any-return]
    if any(score.is_meta for score in scores.values()):
        return _on_meta(scores, sparsity, pattern)
    if pattern is unstructured:
        return _of_entries(scores, sparsity, max_sparsity)
    if any(is_dtensor(score) for score in scores.values()):
        return _of_full_tensors(scores, sparsity, pattern, max_sparsity)
    if has_units(pattern):
        return _of_units(scores, sparsity, pattern, max_sparsity)
    return _of_one_flat_tensor(scores, sparsity, pattern)


def _on_meta(scores: _Scores, sparsity: float, pattern: Pattern) -> dict[str, Tensor]:
    if isinstance(pattern, block | channel | head):  # raises if a shape does not fit
        return {name: pattern(score, sparsity) for name, score in scores.items()}
    return {name: torch.empty_like(score, dtype=torch.bool) for name, score in scores.items()}


def _of_entries(scores: _Scores, sparsity: float, max_sparsity: float) -> dict[str, Tensor]:
    sources = [as_scores(score) for score in scores.values()]
    masks = ranked_together(sources, sparsity, max_sparsity=max_sparsity)
    return dict(zip(scores, shaped(masks, list(scores.values())), strict=True))


def _of_full_tensors(
    scores: _Scores, sparsity: float, pattern: Pattern, max_sparsity: float
) -> dict[str, Tensor]:
    full = {name: full_tensor(score) for name, score in scores.items()}
    masks = jointly(full, sparsity, pattern=pattern, max_sparsity=max_sparsity)
    return {name: laid_out_like(mask, scores[name]) for name, mask in masks.items()}


def _of_units(
    scores: _Scores, sparsity: float, pattern: Units, max_sparsity: float
) -> dict[str, Tensor]:
    units = {name: pattern.pool(score) for name, score in scores.items()}
    kept = jointly(units, sparsity, max_sparsity=max_sparsity)
    return {name: pattern.spread(kept[name], score.shape) for name, score in scores.items()}


def _of_one_flat_tensor(scores: _Scores, sparsity: float, pattern: Pattern) -> dict[str, Tensor]:
    device = next(iter(scores.values())).device
    flat = torch.cat([score.flatten().to(device) for score in scores.values()])
    parts = pattern(flat, sparsity).split([score.numel() for score in scores.values()])
    return {
        name: part.view(score.shape).to(score.device)
        for (name, score), part in zip(scores.items(), parts, strict=True)
    }


def mask_for(pattern: Pattern, scores: Tensor, *sparsity: float) -> Tensor:
    """Return the mask of `pattern` for `scores`, gathered only if it needs full tensors."""
    if not is_dtensor(scores) or pattern is unstructured:
        return pattern(scores, *sparsity)
    if isinstance(pattern, n_of_m) and not is_sharded_along(scores, pattern.groups_along):
        return on_local(pattern, scores)
    return laid_out_like(pattern(full_tensor(scores), *sparsity), scores)


@dataclass(frozen=True, init=False, repr=False)
class chain:  # noqa: N801
    """Apply patterns one after the other, each to the entries that the earlier ones kept.

    `chain(channel(0), n_of_m(2, 4))` drops channels, and half of the entries of the others.

    Args:
        patterns: two or more. At most one takes a sparsity, which is the chain's. The result is
            sparser if another pattern drops more. A pattern of units must be the first.

    Raises:
        ValueError: there are fewer than two patterns, more than one takes a sparsity, a pattern of
            units is not the first, or a pattern is a class or not callable.

    Examples:
        >>> scores = torch.tensor([[1.0, 2.0], [4.0, 3.0]])
        >>> chain(channel(0), n_of_m(1, 2))(scores, 0.5).tolist()
        [[False, False], [True, False]]
    """

    patterns: tuple[Pattern, ...]

    def __init__(self, *patterns: Pattern) -> None:
        # A chain in a chain is replaced by its patterns.
        patterns = tuple(p for q in patterns for p in (q.patterns if isinstance(q, chain) else [q]))
        taking = [pattern for pattern in patterns if takes_sparsity(pattern)]
        late = [p for p in patterns[1:] if has_units(p)]
        classes = [p for p in patterns if isinstance(p, type) or not callable(p)]
        if len(patterns) < 2 or len(taking) > 1 or late or classes:
            raise ValueError(
                "`patterns` must be two or more callables, at most one of which takes a sparsity, "
                f"and a pattern of units must be first; got {patterns}."
            )
        object.__setattr__(self, "patterns", patterns)

    def __repr__(self) -> str:
        return f"chain({', '.join(map(repr, self.patterns))})"

    @property
    def takes_sparsity(self) -> bool:
        """Whether one of the patterns takes a sparsity."""
        return any(takes_sparsity(pattern) for pattern in self.patterns)

    def __call__(self, scores: Tensor, sparsity: float | None = None) -> Tensor:
        """Return the mask for `scores`."""
        return self.jointly({"": scores}, sparsity)[""]

    def jointly(
        self, scores: Mapping[str, Tensor], sparsity: float | None = None
    ) -> dict[str, Tensor]:
        """Return the masks for `scores`; the pattern that takes a sparsity ranks them together."""
        masks: dict[str, Tensor] = {}
        left = dict(scores)
        for pattern in self.patterns:
            if takes_sparsity(pattern):
                kept = jointly(left, check_sparsity(sparsity), pattern=pattern)
            else:
                kept = {name: mask_for(pattern, score) for name, score in left.items()}
            masks = {name: mask & masks.get(name, mask) for name, mask in kept.items()}
            left = {name: _lowered(scores[name], mask) for name, mask in masks.items()}
        return masks


def _lowered(scores: Tensor, mask: Tensor) -> Tensor:
    """Return `scores` with the entries that `mask` drops below all others."""
    is_exact = scores.is_floating_point() and widened_dtype(scores.dtype) == scores.dtype
    values = scores if is_exact else scores.double()
    return torch.where(mask, values.clamp(min=torch.finfo(values.dtype).min), -math.inf)
