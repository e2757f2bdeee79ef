"""Convolutions that read windows of the input itself, without patches.

In a padded image that is stored row by row, entry k of the kernel meets the same places as entry 0,
shifted by a fixed distance: a window of n values. The windows run over the ends of the rows of the
image, so the last columns of the output are cut off. With a stride, the image is split into phases,
one for each residue of the place, and the entry's residue decides which phase it reads.
"""

import math
from collections.abc import Sequence
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from parasparse.acceleration.formats.compiled import Compiled

_Sizes = tuple[int, ...]  # one per spatial dimension


def shifted(
    matrix: Compiled, bias: Tensor | None, steps: tuple[_Sizes, _Sizes, _Sizes], x: Tensor
) -> Tensor:
    """Return W @ patches + bias: (batch, outputs, *positions)."""
    kernel, stride, dilation = steps
    batch, channels, *sizes = x.shape
    positions = output_sizes(sizes, kernel, stride, (0,) * len(kernel), dilation)
    x, within = _phases(x, stride)
    places = _places(channels, within, *steps)
    between = _strides(within)
    n = 1 + sum((p - 1) * s for p, s in zip(positions, between, strict=True))
    result = x.new_empty(batch, matrix.shape[0], *positions)
    for image, out in zip(x, result, strict=True):
        rows = matrix.windows(image, places, n, bias)
        out.copy_(rows.as_strided(out.shape, (n, *between)))
    return result


def _phases(x: Tensor, stride: _Sizes) -> tuple[Tensor, _Sizes]:
    """Return the phases of x, (batch, channels, *stride, *within), and the sizes within one."""
    batch, channels, *sizes = x.shape
    within = tuple(-(-n // s) for n, s in zip(sizes, stride, strict=True))
    if max(stride) == 1:
        return x.contiguous(), within
    missing = [w * s - n for w, s, n in zip(within, stride, sizes, strict=True)]
    x = F.pad(x, [n for m in reversed(missing) for n in (0, m)])
    split = x.view(batch, channels, *[n for pair in zip(within, stride, strict=True) for n in pair])
    dims = len(stride)
    order = [*range(3, 3 + 2 * dims, 2), *range(2, 2 + 2 * dims, 2)]
    return split.permute(0, 1, *order).contiguous(), within


@lru_cache(maxsize=256)
def _places(
    channels: int, within: _Sizes, kernel: _Sizes, stride: _Sizes, dilation: _Sizes
) -> Tensor:
    """Return where the window of each entry of a patch begins: (channels * entries of a kernel)."""
    places = torch.arange(channels).view(-1, *[1] * len(kernel)) * math.prod((*stride, *within))
    of_phases = _strides((*stride, *within))[: len(stride)]
    every = zip(kernel, stride, dilation, of_phases, _strides(within), strict=True)
    for dim, (k, s, d, of_phase, of_place) in enumerate(every):
        at = torch.arange(k) * d
        shift = at % s * of_phase + at // s * of_place
        places = places + shift.view(-1, *[1] * (len(kernel) - dim - 1))
    return places.flatten()


def _strides(sizes: _Sizes) -> _Sizes:
    """Return the strides of a contiguous tensor of `sizes`."""
    return tuple(math.prod(sizes[i + 1 :]) for i in range(len(sizes)))


def output_sizes(
    sizes: Sequence[int], kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int],
    dilation: Sequence[int],
) -> list[int]:  # fmt: skip
    """Return the sizes of the output of a convolution."""
    every = zip(sizes, kernel, stride, padding, dilation, strict=True)
    return [(n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in every]
