"""Growth of compact weights by their dense gradient, which exists one block of rows at a time."""

from typing import Any

import torch
from torch import Tensor

from parasparse.acceleration.compact.uses import Uses
from parasparse.patterns.selection.kth import highest

BLOCK = 1 << 20  # entries of the gradient that exist at a time, in whole rows


def largest_free(
    uses: Uses, kept: Tensor, like: Tensor, matrix: tuple[int, int], count: int, group: Any = None
) -> Tensor:
    """Return `count` positions with the largest |gradient| among those that are not kept.

    Of equal gradients, the lower position comes first.

    Args:
        uses: of the weight.
        kept: sorted positions.
        like: a tensor of the dtype and the device of the weight.
        matrix: number of outputs and of inputs of the weight.
        count: at most the number of entries that are not kept.
        group: the processes over which the gradient is summed; None: this one alone.
    """
    outputs, inputs = matrix
    dtype = torch.promote_types(like.dtype, torch.float32)
    best = torch.empty(0, dtype=dtype.to_real(), device=like.device)
    positions = torch.empty(0, dtype=torch.int64, device=like.device)
    height = max(1, BLOCK // max(1, inputs))
    for start in range(0, outputs if count else 0, height):
        stop = min(start + height, outputs)
        gradient = torch.zeros(stop - start, inputs, dtype=dtype, device=like.device)
        uses.add_rows(start, stop, gradient)
        if group is not None:
            torch.distributed.all_reduce(gradient, group=group)
        size = gradient.abs_() if not dtype.is_complex else gradient.abs()
        size = size.flatten()
        first, last = torch.searchsorted(kept, kept.new_tensor([start * inputs, stop * inputs]))
        inside = kept[first:last] - start * inputs
        size[inside] = -1.0
        if len(best) < count:
            room = size.numel() - len(inside)
            found = highest([size], min(count, room))[0].nonzero().flatten()
        else:  # of equal ones, those of earlier blocks stay
            found = (size > best.min()).nonzero().flatten()
        best = torch.cat([best, size[found]])
        positions = torch.cat([positions, found + start * inputs])
        if len(best) > count:
            (chosen,) = highest([best], count)
            best, positions = best[chosen], positions[chosen]
    return positions
