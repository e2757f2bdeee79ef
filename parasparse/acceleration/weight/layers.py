"""Linear and convolution layers with a sparse weight.

A handler replaces a torch function that is called with a `SparseWeight`. It returns NotImplemented
to run the dense kernel.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

from parasparse.acceleration.formats import operators
from parasparse.acceleration.formats.format import Format
from parasparse.acceleration.formats.regular import Channels
from parasparse.attach.accelerated import StandIn
from parasparse.masks.apply import is_tracing

_Sizes = tuple[int, ...]  # one per spatial dimension


@dataclass(frozen=True)
class Use:
    """A call that multiplied with a weight."""

    func: Callable[..., Tensor]
    like: Tensor  # the input, on the meta device
    more: tuple[Any, ...]  # the arguments after the weight
    rows: int  # how often the call multiplied each entry of the weight; 0 for a lookup
    times: int = 1  # number of such calls
    outputs: int | None = None  # number of outputs of the weight that were used; None: all


GRADIENT = (
    "accelerated weights are for inference: no gradient goes through them. Run the model under "
    "`torch.no_grad()`, or call parasparse.restore(model) before training."
)


def format_for(weight: Any, use: Callable[[], Use], rows: int, *others: Any) -> Format | None:
    """Return the format of `weight` for `rows` rows; None: the dense kernel.

    Raises:
        RuntimeError: a gradient would be lost, or the model is exported or traced.
    """
    if not hasattr(weight, "format_for") or is_transformed():
        return None
    if not hasattr(weight, "seen"):  # it trains
        trained: Format | None = weight.format_for(rows)
        return trained
    if torch.is_grad_enabled() and any(t.requires_grad for t in (weight, *others) if t is not None):
        raise RuntimeError(GRADIENT)
    if torch.compiler._is_exporting_flag or is_tracing():
        raise RuntimeError(
            "an accelerated model must not be exported or traced, because its kernels exist only "
            "in this process. Call parasparse.restore(model) first; the zeros stay."
        )
    if weight.seen is not None:
        weight.seen(use())
        return None
    found: Format | None = weight.format_for(rows)
    return found


def is_transformed() -> bool:
    """Whether torch.func or forward-mode derivatives are active, which need the dense kernels."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def is_strided(x: Tensor) -> bool:
    """Whether `x` is neither a nested tensor nor one of torch's sparse tensors."""
    return not x.is_nested and x.layout is torch.strided


def multiplied(call: Callable[[Tensor], Tensor], x: Tensor, weight: Tensor) -> Tensor:
    """Return `call(x)`; under autocast, computed in the weight's dtype and cast at the end."""
    kind = x.device.type
    if not torch.is_autocast_enabled(kind):
        return call(x)
    with torch.autocast(kind, enabled=False):
        if x.dtype == torch.float64:  # autocast leaves float64 unchanged
            return call(x)
        return call(x.to(weight.dtype)).to(torch.get_autocast_dtype(kind))


def linear(func: Any, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Any:  # noqa: A002
    """Compute input @ weight.T + bias."""
    if not is_strided(input):
        return NotImplemented
    inputs = input.shape[-1]
    rows = math.prod(input.shape[:-1])
    chosen = format_for(
        weight, lambda: Use(func, input.to("meta"), (bias,), rows), rows, input, bias
    )
    if chosen is None or not rows or inputs != weight.inputs:  # type: ignore[attr-defined]
        original = getattr(weight, "original", None)
        if original is None or weight.seen is not None:  # type: ignore[attr-defined]
            return NotImplemented
        with torch._C.DisableTorchFunctionSubclass():  # least overhead
            return func(input, original, bias)
    x = input.reshape(rows, inputs)
    result = multiplied(lambda x: operators.rows(chosen, x, bias), x, weight)
    return result.view(*input.shape[:-1], result.shape[1])


def nested_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Compute x @ weight.T + bias within a handler.

    There, torch.compile takes a subclass for an ordinary tensor, which eager mode does not.
    """
    if not isinstance(weight, StandIn):
        return F.linear(x, weight, bias)
    result = linear(F.linear, x, weight, bias)
    if result is NotImplemented:  # `F.linear` of the weight would count this use once more
        return F.linear(x, weight.plain(), bias)
    return result  # type: ignore[no-any-return]


def convolution(
    func: Any, input: Tensor, weight: Tensor, bias: Tensor | None = None,  # noqa: A002
    stride: Any = 1, padding: Any = 0, dilation: Any = 1, groups: int = 1,
) -> Any:  # fmt: skip
    """Compute a convolution as a product with the patches of the input."""
    kernel = weight.shape[2:]
    dims = len(kernel)
    if input.ndim not in (dims + 1, dims + 2):
        return NotImplemented
    stride, dilation = each(stride, dims), each(dilation, dims)
    x = input if input.ndim == dims + 2 else input[None]
    if padding == "same":
        x = F.pad(x, _same(kernel, dilation))
    padding = each(0 if isinstance(padding, str) else padding, dims)
    sizes = _output_sizes(x.shape[2:], kernel, stride, padding, dilation)
    rows = len(x) * math.prod(sizes)
    more = (bias, stride, padding, dilation, groups)
    chosen = format_for(weight, lambda: Use(func, x.to("meta"), more, rows), rows, input, bias)
    if chosen is None or rows <= 0 or groups != 1 or x.shape[1] != weight.inputs:  # type: ignore[attr-defined]
        return NotImplemented
    if isinstance(chosen, Channels):
        taken = x if chosen.inputs is None else x.index_select(1, chosen.inputs)
        result = chosen.spread(func(taken, chosen.small, None, stride, padding, dilation))
    else:
        patches = _patches(x, kernel, stride, padding, dilation)
        if patches is None:
            return NotImplemented
        result = _times_patches(chosen, patches, weight).view(len(x), -1, *sizes)
    if bias is not None:
        result += bias.view(-1, *[1] * dims)
    if dims == 2 and x.is_contiguous(memory_format=torch.channels_last):
        result = result.contiguous(memory_format=torch.channels_last)
    return result if input.ndim == dims + 2 else result[0]


def _times_patches(chosen: Format, patches: Tensor, weight: Tensor) -> Tensor:
    """Return W @ patches of each image: (batch, outputs, positions)."""
    parts = [multiplied(partial(operators.columns, chosen), each, weight) for each in patches]
    return parts[0][None] if len(parts) == 1 else torch.stack(parts)


def each(value: Any, dims: int) -> _Sizes:
    """Return one number for each spatial dimension, as torch's convolutions take them."""
    return (value,) * dims if isinstance(value, int) else tuple(value) * (dims // len(value) or 1)


def _same(kernel: _Sizes, dilation: _Sizes) -> list[int]:
    """Return the padding before and after each dimension, the last one first."""
    totals = [d * (k - 1) for k, d in zip(kernel, dilation, strict=True)]
    return [n for total in reversed(totals) for n in (total // 2, total - total // 2)]


def _output_sizes(
    sizes: _Sizes, kernel: _Sizes, stride: _Sizes, padding: _Sizes, dilation: _Sizes
) -> list[int]:
    every = zip(sizes, kernel, stride, padding, dilation, strict=True)
    return [(n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in every]


def _patches(
    x: Tensor, kernel: _Sizes, stride: _Sizes, padding: _Sizes, dilation: _Sizes
) -> Tensor | None:
    """Return the patch of each output position: (batch, channels x kernel, positions)."""
    if not any(padding) and all(k == 1 for k in kernel):
        every = tuple(slice(None, None, s) for s in stride)
        return x[:, :, *every].flatten(2)
    if len(kernel) == 1:  # an image of one row
        x = x[:, :, None]
        kernel, stride, dilation = (1, *kernel), (1, *stride), (1, *dilation)
        padding = (0, *padding)
    if len(kernel) > 2:
        return None
    return F.unfold(x, kernel, dilation, padding, stride)


def transposed(func: Any, input: Tensor, weight: Tensor, *more: Any, **_: Any) -> Any:  # noqa: A002
    """Report the use by a transposed convolution, which stays dense."""
    dims = weight.ndim - 2
    rows = math.prod(input.shape[-dims:]) * (len(input) if input.ndim == dims + 2 else 1)
    format_for(weight, lambda: Use(func, input.to("meta"), more, rows), rows, input)
    return NotImplemented


def lookup(func: Any, input: Tensor, weight: Tensor, *more: Any, **_: Any) -> Any:  # noqa: A002
    """Report a lookup of rows, for which a dense table is the fastest."""
    if getattr(weight, "seen", None) is not None:
        weight.seen(Use(func, input.to("meta"), more, 0))  # type: ignore[attr-defined]
    return NotImplemented


HANDLERS: dict[Any, Callable[..., Any]] = {
    F.linear: linear, F.embedding: lookup,
    F.conv1d: convolution, F.conv2d: convolution, F.conv3d: convolution,
    **dict.fromkeys((F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d), transposed),
}  # fmt: skip
