"""Convolutions that read windows of the input itself, without patches.

In a padded image that is stored row by row, entry k of the kernel meets the same places as entry 0,
shifted by a fixed distance: a window of n values. The windows run over the ends of the rows of the
image, which the output leaves out. With a stride, the image is split into phases, one for each
residue of the place, and the entry's residue decides which phase it reads.
"""

import math
from collections.abc import Sequence
from functools import lru_cache, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from parasparse.acceleration.formats.compiled import Compiled, Windows, is_plain
from parasparse.acceleration.weight.following import Following

_Sizes = tuple[int, ...]  # one per spatial dimension


class Steps(NamedTuple):
    """How a kernel moves over its input."""

    kernel: _Sizes
    stride: _Sizes
    padding: _Sizes
    dilation: _Sizes
    groups: int = 1


def shifted(
    matrix: Compiled, bias: Tensor | None, steps: Steps, following: Following, x: Tensor
) -> Tensor:
    """Return W @ patches + bias with the sum and activation of `following`."""
    if math.prod(steps.kernel) == 1 and max(steps.stride) > 1 and not any(steps.padding):
        for dim, s in enumerate(steps.stride, 2):  # a single phase is read
            x = x[(slice(None),) * dim + (slice(None, None, s),)]
        steps = steps._replace(stride=(1,) * len(steps.stride))
    windows, positions, _ = _windows(tuple(x.shape), steps)
    shape, added, x = (x.shape[0], matrix.shape[0], *positions), following.added, x.contiguous()
    if added is not None and not _can_read(added, shape):
        out = matrix.convolution(windows, x, bias, None, None, x.new_empty(shape))
        return following.of(out)
    reuse = following.last and not torch.is_grad_enabled()
    out = added if reuse else x.new_empty(shape)
    return matrix.convolution(windows, x, bias, added, following.activation, out)


def _can_read(added: Any, shape: _Sizes) -> bool:
    """Whether the kernel can add `added`: it may be a number, another shape, or need a gradient."""
    if not is_plain(added) or (added.requires_grad and torch.is_grad_enabled()):
        return False
    return bool(added.shape == shape and added.is_contiguous())


@lru_cache(maxsize=256)
def _windows(shape: _Sizes, steps: Steps) -> tuple[Windows, _Sizes, list[Tensor]]:
    """Return the windows, the sizes of the output, and the tensors that the windows point to."""
    arange = partial(torch.arange, device="cpu")  # whatever the default device
    batch, channels, *sizes = shape
    kernel, stride, padding, dilation, groups = steps
    positions = tuple(output_sizes(sizes, kernel, stride, padding, dilation))
    channels //= groups
    padded = (n + 2 * p for n, p in zip(sizes, padding, strict=True))
    within = tuple(-(-n // s) for n, s in zip(padded, stride, strict=True))
    places = arange(channels).view(-1, *[1] * len(kernel)) * math.prod((*stride, *within))
    of_phases = _strides((*stride, *within))[: len(stride)]
    between = _strides(within)
    every = zip(kernel, stride, dilation, of_phases, between, strict=True)
    for dim, (k, s, d, of_phase, of_place) in enumerate(every):
        at = arange(k) * d
        shift = at % s * of_phase + at // s * of_place
        places = places + shift.view(-1, *[1] * (len(kernel) - dim - 1))
    length = 1 + sum((p - 1) * b for p, b in zip(positions, between, strict=True))
    runs = arange(1)
    if within != positions:
        for p, b in zip(positions[:-1], between[:-1], strict=True):
            runs = (runs[:, None] + arange(p) * b).flatten()
    places, more = places.flatten(), 3 - len(kernel)
    in_three = (
        ((1,) * more, sizes),
        ((1,) * more, stride),
        ((0,) * more, padding),
        ((1,) * more, within),
    )
    windows = Windows(
        batch, groups, channels, *((*before, *each) for before, each in in_three),
        places.data_ptr(), length, runs.data_ptr(), len(runs), math.prod(positions) // len(runs),
    )  # fmt: skip
    return windows, positions, [places, runs]


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
