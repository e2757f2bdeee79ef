"""What may be removed from a tensor so that a smaller tensor is left."""

import torch
from torch import Tensor


def is_regular(kept: Tensor) -> bool:
    """Whether the kept entries, in order, form a tensor with as many dimensions.

    Along the last dimension each slice must keep the same number or nothing, and so on upwards.

    Examples:
        >>> is_regular(torch.tensor([[True, False], [False, True]]))
        True
        >>> is_regular(torch.tensor([[True, False], [True, True]]))
        False
    """
    return shape_of_kept(kept) is not None


def shape_of_kept(kept: Tensor) -> tuple[int, ...] | None:
    """Return the shape of the tensor of the kept entries, or None if they are not regular."""
    sizes: list[int] = []
    while kept.ndim:
        counts = kept.sum(-1)
        most = int(counts.max()) if counts.numel() else 0
        kept = counts > 0
        if not bool((counts[kept] == most).all()):
            return None
        sizes.append(most)
    return tuple(reversed(sizes))


def to_restore(kept: Tensor) -> Tensor:
    """Return the entries to keep as well so that `kept` comes nearer to regular.

    Slices that keep fewer entries than others get their first removed ones back, level by level.
    """
    levels = [kept]
    while levels[-1].ndim > 1:
        levels.append(levels[-1].any(-1))
    for depth, level in enumerate(levels):
        counts = level.sum(-1)
        missing = torch.where(counts > 0, counts.max() - counts, 0)
        if bool(missing.any()):
            removed = ~level
            first = removed & (removed.cumsum(-1) <= missing.unsqueeze(-1))
            return first.reshape(*first.shape, *[1] * depth).expand(kept.shape) & ~kept
    return torch.zeros_like(kept)
