"""Masks of several tensors that share one sparsity, with a floor for each of them."""

from collections.abc import Iterator, Sequence

from torch import Tensor

from parasparse.counts import check_floors, least_kept, num_kept
from parasparse.patterns.selection.kth import highest_masks
from parasparse.patterns.selection.scores import Scores
from parasparse.sharding.dtensors import sum_over_shards


def ranked_together(
    sources: Sequence[Scores], sparsity: float, *, max_sparsity: float = 1.0
) -> Iterator[Tensor]:
    """Yield the masks of the highest of all scores together, as `highest_masks` does.

    A tensor that would keep less than `max_sparsity` allows keeps its own highest scores, and the
    others keep fewer. Raises ValueError if they cannot.
    """
    sizes = [source.numel_everywhere for source in sources]
    kept, floors = num_kept(sum(sizes), sparsity), [least_kept(n, max_sparsity) for n in sizes]
    check_floors(floors, sum(sizes), sparsity)
    # A single tensor keeps enough, as has been checked.
    short = _short(sources, kept, floors) if any(floors) and len(sources) > 1 else set()
    free = [source for i, source in enumerate(sources) if i not in short]
    together = highest_masks(free, kept - sum(floors[i] for i in short))
    for i, source in enumerate(sources):
        yield from highest_masks([source], floors[i]) if i in short else [next(together)]


def _short(sources: Sequence[Scores], kept: int, floors: Sequence[int]) -> set[int]:
    """Return the indices of the tensors that keep only their floor.

    What these take is missing for the others, so more of them may reach their floor.
    """
    short: set[int] = set()
    while True:
        free = [i for i in range(len(sources)) if i not in short]
        masks = highest_masks([sources[i] for i in free], kept - sum(floors[i] for i in short))
        counts = {i: _count(sources[i], mask) for i, mask in zip(free, masks, strict=True)}
        found = {i for i, count in counts.items() if count < floors[i]}
        if not found:
            return short
        short |= found


def _count(source: Scores, mask: Tensor) -> int:
    """Return how many entries a mask of `source` keeps, on all processes."""
    number = mask.count_nonzero().cpu()
    return int(number if source.tensor is None else sum_over_shards(number, source.tensor))
