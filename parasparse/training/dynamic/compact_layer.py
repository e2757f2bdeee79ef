"""One compact weight as the moves of dynamic sparse training see it: its kept values."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from parasparse.acceleration.compact.uses import Uses
from parasparse.masks.kept_entries import KeptEntries, draw_free
from parasparse.masks.places import Kept, Places
from parasparse.optim import Optimizers
from parasparse.patterns import Pattern, unstructured
from parasparse.targets.tensors import Target
from parasparse.training.dynamic.block_growth import largest_free
from parasparse.training.dynamic.moves import GROWTH, PRUNE, REDISTRIBUTION, random_growth
from parasparse.training.history import masks_lost
from parasparse.verbs.moving import check_movable, move

# The moves of compact weights. Prune and redistribution get the kept values and a mask of ones.
MOVES: dict[str, dict[str, Callable[..., Any]]] = {
    "prune": {name: PRUNE[name] for name in ("magnitude", "SET", "global_magnitude")},
    "growth": {name: GROWTH[name] for name in ("random", "gradient")},
    "redistribution": {name: REDISTRIBUTION[name] for name in ("none", "magnitude", "nonzero")},
}


@dataclass(frozen=True, eq=False)
class CompactLayer:
    """A compact weight; see `Layer` for the methods that both have."""

    target: Target
    pattern: Pattern = unstructured

    @property
    def parameters(self) -> list[Tensor]:
        """The kept values, the only Parameter."""
        return self.target.originals()

    @property
    def places(self) -> Places:
        """Where the values are; raises RuntimeError if the weight is not compact any more."""
        modules = self.target.masks()
        if len(modules) != 1 or not isinstance(modules[0], Kept):
            raise masks_lost([self.target.name])
        return modules[0].places

    @property
    def numel(self) -> int:
        """Number of entries of the weight, kept or not."""
        return self.places.shape.numel()

    @property
    def mask(self) -> KeptEntries:
        """The kept entries."""
        return KeptEntries(self.places.positions(), self.places.shape)

    def check(self) -> None:
        """Raise RuntimeError if the weight is not compact any more."""
        _ = self.places

    def begin(self, *, dense_gradient: bool) -> None:
        """Do nothing, because no masked weight has to be 0."""

    def zero_masked(self) -> None:
        """Do nothing, because what is not kept does not exist."""

    def seen_mask(self) -> Tensor:
        """Return a mask of the kept values: all are kept."""
        values = self.parameters[0]
        return torch.ones(values.shape, dtype=torch.bool, device=values.device)

    def seen_weight(self) -> Tensor:
        """Return the kept values."""
        return self.parameters[0]

    def grown(
        self, left: Tensor, count: int, growth: Callable[..., Any], uses: Uses | None, group: Any
    ) -> KeptEntries:
        """Return the kept entries after growth.

        Args:
            left: a mask of the kept values, False where they are pruned.
            count: number of entries to grow.
            growth: one of `MOVES`.
            uses: the uses of the weight since the last step, for growth by gradient.
            group: the processes that train the weight, or None.
        """
        places = self.places
        kept = places.positions()[left]
        if growth is random_growth:
            new = draw_free(kept, self.numel, count)
        else:
            like, matrix = self.parameters[0].detach(), places.matrix_shape
            new = largest_free(uses or Uses(), kept, like, matrix, count, group)
        return KeptEntries(torch.cat([kept, new]).sort().values, places.shape)

    def entries(self, grown: KeptEntries) -> KeptEntries:
        """Return `grown`."""
        return grown

    def check_state(self, optimizer: Optimizers) -> None:
        """Raise TypeError if the state of the optimizer cannot be moved."""
        check_movable(self.target, optimizer)

    def set_mask(
        self, mask: Tensor | KeptEntries, optimizer: Optimizers, *, keep_state_of_grown: bool
    ) -> None:
        """Move values and state to the entries of `mask`; they are 0 where it grows."""
        assert isinstance(mask, KeptEntries)
        move(self.target, mask, optimizer)
