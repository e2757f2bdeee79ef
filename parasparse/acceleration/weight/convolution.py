"""Convolutions with a sparse weight, as products with the patches of the input.

All patches at once take up as many times the input's bytes as the kernel has entries. They are
copied and multiplied a strip of output positions at a time, so that they stay in the caches.
"""

import math
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from parasparse.acceleration.formats import operators
from parasparse.acceleration.formats.compiled import Compiled
from parasparse.acceleration.formats.compressed import BSR, CSR, Bag
from parasparse.acceleration.formats.regular import Channels
from parasparse.acceleration.weight.layers import Use, each, format_for, is_strided, multiplied
from parasparse.acceleration.weight.shifts import output_sizes, shifted

_Sizes = tuple[int, ...]  # one per spatial dimension
_Steps = tuple[_Sizes, _Sizes, _Sizes]  # the kernel, the stride and the dilation
# Output positions per strip: with fewer, the calls cost more than the caches save.
_STRIP = 512
_CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


def convolution(
    func: Any, input: Tensor, weight: Tensor, bias: Tensor | None = None,  # noqa: A002
    stride: Any = 1, padding: Any = 0, dilation: Any = 1, groups: int = 1,
) -> Any:  # fmt: skip
    """Compute a convolution as a product with the patches of the input."""
    kernel = weight.shape[2:]
    dims = len(kernel)
    if input.ndim not in (dims + 1, dims + 2) or not is_strided(input):
        return NotImplemented
    stride, dilation = each(stride, dims), each(dilation, dims)
    x = input if input.ndim == dims + 2 else input[None]
    if padding == "same" and max(stride) == 1:
        x, padding = F.pad(x, _same(kernel, dilation)), 0
    if padding == "same" or min(*stride, *dilation, groups) < 1 or len(weight) % groups:
        return NotImplemented  # torch's own error
    padding = each(0 if padding == "valid" else padding, dims)
    sizes = output_sizes(x.shape[2:], kernel, stride, padding, dilation)
    rows = len(x) * math.prod(sizes)
    more = (bias, stride, padding, dilation, groups)
    chosen = format_for(weight, lambda: Use(func, x.to("meta"), more, rows), rows, input, bias)
    fits = min(len(x), *sizes) > 0 and min(padding) >= 0 and x.shape[1] == weight.inputs * groups  # type: ignore[attr-defined]
    if chosen is None or not fits:
        return NotImplemented
    if isinstance(chosen, (CSR, Bag)):
        chosen = chosen.diagonal(groups)
    elif groups != 1:
        return NotImplemented
    if isinstance(chosen, Channels):
        result = _smaller(func, chosen, x, bias, stride, padding, dilation)
    else:
        assert isinstance(chosen, CSR | Bag | BSR)
        x = F.pad(x, [n for p in reversed(padding) for n in (p, p)]) if any(padding) else x
        call = partial(_product, chosen, bias, (kernel, stride, dilation))
        result = multiplied(call, x, weight)
    last = _CHANNELS_LAST.get(x.ndim)
    if last is not None and x.is_contiguous(memory_format=last) and not x.is_contiguous():
        result = result.contiguous(memory_format=last)
    return result if input.ndim == dims + 2 else result[0]


def _smaller(func: Any, chosen: Channels, x: Tensor, bias: Tensor | None, *more: _Sizes) -> Tensor:
    """Return the dense convolution of the kept channels."""
    taken = x if chosen.inputs is None else x.index_select(1, chosen.inputs)
    result = chosen.spread(func(taken, chosen.small, None, *more))
    return result if bias is None else result.add_(bias.view(-1, *[1] * (x.ndim - 2)))


def _product(matrix: CSR | Bag | BSR, bias: Tensor | None, steps: _Steps, x: Tensor) -> Tensor:
    """Return W @ patches + bias: (batch, outputs, *positions)."""
    if torch.compiler.is_compiling():
        made: Tensor = _operator(x, bias, matrix.tensors(), matrix.kind, matrix.shape, *steps)
        return made
    if isinstance(matrix, Compiled) and math.prod(steps[0]) > 1:
        return shifted(matrix, bias, steps, x)
    patches, outputs = _patches(x.contiguous(), *steps), matrix.shape[0]
    rest = x.ndim - 1  # the dimensions of a patch come first
    batch, *positions = sizes = patches.shape[rest:]

    def times(part: Tensor) -> Tensor:
        product = matrix.columns(part.reshape(math.prod(part.shape[:rest]), -1))
        return product if bias is None else product.add_(bias[:, None])

    copied = math.prod(steps[0]) > 1  # otherwise an image is a matrix of patches as it is
    strips = list(_strips(sizes, _STRIP if copied else max(_STRIP, math.prod(positions))))
    if batch == len(strips) == 1:
        return times(patches).view(1, outputs, *positions)
    result = x.new_empty(batch, outputs, *positions)
    for images, *places in strips:
        where: Any = (..., images, *places)
        part = patches[where]
        product = times(part).view(outputs, *part.shape[rest:])
        result[images, :, *places] = product.transpose(0, 1)
    return result


@torch.library.custom_op("parasparse::convolution", mutates_args=())
def _operator(
    x: Tensor, bias: Tensor | None, parts: Sequence[Tensor], kind: str, shape: Sequence[int],
    kernel: Sequence[int], stride: Sequence[int], dilation: Sequence[int],
) -> Tensor:  # fmt: skip
    """Return `_product` as one operator; torch.compile would write the strips out one by one."""
    steps = tuple(kernel), tuple(stride), tuple(dilation)
    return _product(operators.made_of(parts, kind, shape), bias, steps, x).contiguous()


@_operator.register_fake
def _(
    x: Tensor, bias: Tensor | None, parts: Sequence[Tensor], kind: str, shape: Sequence[int],
    kernel: Sequence[int], stride: Sequence[int], dilation: Sequence[int],
) -> Tensor:  # fmt: skip
    none = (0,) * len(kernel)
    sizes = output_sizes(x.shape[2:], kernel, stride, none, dilation)
    return x.new_empty(x.shape[0], shape[0], *sizes)


def _patches(x: Tensor, kernel: _Sizes, stride: _Sizes, dilation: _Sizes) -> Tensor:
    """Return a view of the patches: (channels, *kernel, batch, *positions)."""
    batch, channels, *sizes = x.shape
    positions = output_sizes(tuple(sizes), kernel, stride, (0,) * len(kernel), dilation)
    of_image, of_channel, *steps = x.stride()
    within = [n * d for n, d in zip(steps, dilation, strict=True)]
    between = [n * s for n, s in zip(steps, stride, strict=True)]
    return x.as_strided(
        (channels, *kernel, batch, *positions), (of_channel, *within, of_image, *between)
    )


def _strips(sizes: _Sizes, most: int) -> Iterator[tuple[slice, ...]]:
    """Yield equal parts of an array of `sizes`, each of at most `most` entries."""
    if not sizes:
        yield ()
        return
    first, inner = sizes[0], math.prod(sizes[1:])
    count = -(-first // max(1, most // inner))
    length = -(-first // count)
    for start in range(0, first, length):
        for more in _strips(sizes[1:], most):
            yield slice(start, start + length), *more


def _same(kernel: _Sizes, dilation: _Sizes) -> list[int]:
    """Return the padding before and after each dimension, the last one first."""
    totals = [d * (k - 1) for k, d in zip(kernel, dilation, strict=True)]
    return [n for total in reversed(totals) for n in (total // 2, total - total // 2)]


HANDLERS: dict[Any, Any] = dict.fromkeys((F.conv1d, F.conv2d, F.conv3d), convolution)
