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
from torch.overrides import handle_torch_function, has_torch_function

from parasparse.acceleration.formats import operators
from parasparse.acceleration.formats.compiled import Compiled
from parasparse.acceleration.formats.compressed import BSR, CSR, Bag
from parasparse.acceleration.formats.regular import Channels
from parasparse.acceleration.weight.following import NOTHING, Following
from parasparse.acceleration.weight.layers import Use, each, format_for, is_strided, multiplied
from parasparse.acceleration.weight.shifts import Steps, output_sizes, shifted

_Sizes = tuple[int, ...]  # one per spatial dimension
# Output positions per strip: with fewer, the calls cost more than the caches save.
_STRIP = 512
_CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


def convolution(
    func: Any, input: Tensor, weight: Tensor, bias: Tensor | None = None,  # noqa: A002
    stride: Any = 1, padding: Any = 0, dilation: Any = 1, groups: int = 1, *,
    following: Following = NOTHING,
) -> Any:  # fmt: skip
    """Compute a convolution, and what follows it, as a product with patches of x."""
    outputs, _, *kernel = _shape(weight)
    dims = len(kernel)
    if input.ndim not in (dims + 1, dims + 2) or not is_strided(input):
        return NotImplemented
    stride, dilation = each(stride, dims), each(dilation, dims)
    x = input if input.ndim == dims + 2 else input[None]
    if padding == "same" and max(stride) == 1:
        x, padding = F.pad(x, _same(kernel, dilation)), 0
    if padding == "same" or min(*stride, *dilation, groups) < 1 or outputs % groups:
        return NotImplemented  # torch's own error
    padding = each(0 if padding == "valid" else padding, dims)
    batch, channels, *within = x.shape
    sizes = output_sizes(within, kernel, stride, padding, dilation)
    rows = batch * math.prod(sizes)
    more = (bias, stride, padding, dilation, groups)
    use = partial(Use, func, more=more, rows=rows, activation=following.activation)
    chosen = format_for(weight, lambda: use(x.to("meta")), rows, input, bias)
    fits = min(batch, *sizes) > 0 and min(padding) >= 0 and channels == weight.inputs * groups  # type: ignore[attr-defined]
    if chosen is None or not fits:
        return NotImplemented
    if groups != 1 and not isinstance(chosen, (CSR, Bag)):
        return NotImplemented
    if isinstance(chosen, Channels):
        result = following.of(_smaller(func, chosen, x, bias, stride, padding, dilation))
    else:
        assert isinstance(chosen, (CSR, Bag, BSR))  # torch 2.9 does not compile `|`: test_compiled
        steps = Steps(tuple(kernel), stride, padding, dilation, groups)
        result = multiplied(partial(_product, chosen, bias, steps, following), x, weight)
    last = _CHANNELS_LAST.get(x.ndim)
    if last is not None and not x.is_contiguous() and x.is_contiguous(memory_format=last):
        result = result.contiguous(memory_format=last)
    return result if input.ndim == dims + 2 else result[0]


def _shape(weight: Tensor) -> torch.Size:
    with torch._C.DisableTorchFunctionSubclass():  # least overhead
        return weight.shape


def _smaller(func: Any, chosen: Channels, x: Tensor, bias: Tensor | None, *more: _Sizes) -> Tensor:
    """Return the dense convolution of the kept channels."""
    taken = x if chosen.inputs is None else x.index_select(1, chosen.inputs)
    result = chosen.spread(func(taken, chosen.small, None, *more))
    return result if bias is None else result.add_(bias.view(-1, *[1] * (x.ndim - 2)))


def convolution_then(
    x: Tensor, weight: Tensor, bias: Tensor | None, following: Following, *more: Any
) -> Any:
    """Return a convolution and what follows it: see `fuse`."""
    if has_torch_function((x, weight)):
        every = x, weight, bias, following, *more
        return handle_torch_function(convolution_then, (x, weight), *every)
    return following.of(_CONVOLUTIONS[weight.ndim - 3](x, weight, bias, *more))


def _convolution_then(
    _: Any, x: Tensor, weight: Tensor, bias: Tensor | None, following: Following, *more: Any
) -> Any:
    dims = len(_shape(weight)) - 2
    func = _CONVOLUTIONS[dims - 1]
    if x.ndim == dims + 2 and not torch.is_autocast_enabled(x.device.type):
        return convolution(func, x, weight, bias, *more, following=following)
    result = convolution(func, x, weight, bias, *more)
    return result if result is NotImplemented else following.of(result)


def _product(
    matrix: CSR | Bag | BSR, bias: Tensor | None, steps: Steps, following: Following, x: Tensor
) -> Tensor:
    compiling = torch.compiler.is_compiling()
    if not compiling and isinstance(matrix, Compiled) and matrix.can_read(x, bias):
        return shifted(matrix, bias, steps, following, x)
    if isinstance(matrix, CSR | Bag):
        matrix, steps = matrix.diagonal(steps.groups), steps._replace(groups=1)
    if compiling:
        sizes = steps[:4]
        made = _operator(x, bias, matrix.tensors(), matrix.kind, matrix.shape, *sizes)
        return following.of(made)
    return following.of(_of_patches(matrix, bias, steps, x))


def _of_patches(matrix: CSR | Bag | BSR, bias: Tensor | None, steps: Steps, x: Tensor) -> Tensor:
    """Return W @ patches + bias: (batch, outputs, *positions)."""
    around = [n for p in reversed(steps.padding) for n in (p, p)]
    x = F.pad(x, around) if any(around) else x.contiguous()
    patches, outputs = _patches(x, steps), matrix.shape[0]
    rest = x.ndim - 1  # the dimensions of a patch come first
    batch, *positions = sizes = patches.shape[rest:]

    def times(part: Tensor) -> Tensor:
        product = matrix.columns(part.reshape(math.prod(part.shape[:rest]), -1))
        return product if bias is None else product.add_(bias[:, None])

    copied = math.prod(steps.kernel) > 1  # otherwise an image is a matrix of patches as it is
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
    kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int],
) -> Tensor:  # fmt: skip
    """Return a convolution as one operator; torch.compile would write the strips out one by one."""
    steps = Steps(tuple(kernel), tuple(stride), tuple(padding), tuple(dilation))
    made = operators.made_of(parts, kind, shape)
    return _product(made, bias, steps, NOTHING, x).contiguous()


@_operator.register_fake
def _(
    x: Tensor, bias: Tensor | None, parts: Sequence[Tensor], kind: str, shape: Sequence[int],
    kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int],
) -> Tensor:  # fmt: skip
    sizes = output_sizes(x.shape[2:], kernel, stride, padding, dilation)
    return x.new_empty(x.shape[0], shape[0], *sizes)


def _patches(x: Tensor, steps: Steps) -> Tensor:
    """Return a view of the patches of the padded input: (channels, *kernel, batch, *positions)."""
    kernel, stride, _, dilation, _ = steps
    batch, channels, *sizes = x.shape
    positions = output_sizes(sizes, kernel, stride, (0,) * len(kernel), dilation)
    of_image, of_channel, *of_place = x.stride()
    within = [n * d for n, d in zip(of_place, dilation, strict=True)]
    between = [n * s for n, s in zip(of_place, stride, strict=True)]
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


def _same(kernel: Sequence[int], dilation: _Sizes) -> list[int]:
    """Return the padding before and after each dimension, the last one first."""
    totals = [d * (k - 1) for k, d in zip(kernel, dilation, strict=True)]
    return [n for total in reversed(totals) for n in (total // 2, total - total // 2)]


_CONVOLUTIONS = F.conv1d, F.conv2d, F.conv3d
HANDLERS: dict[Any, Any] = {
    **dict.fromkeys(_CONVOLUTIONS, convolution), convolution_then: _convolution_then
}  # fmt: skip
