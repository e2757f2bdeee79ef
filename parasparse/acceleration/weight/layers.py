"""Linear layers with a sparse weight, and what all layers share.

A handler replaces a torch function that is called with a `SparseWeight`. It returns NotImplemented
to run the dense kernel.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

from parasparse.acceleration.formats import operators
from parasparse.acceleration.formats.format import Format
from parasparse.attach.accelerated import StandIn
from parasparse.masks.apply import is_tracing


@dataclass(frozen=True)
class Use:
    """A call that multiplied with a weight."""

    func: Callable[..., Tensor]
    like: Tensor  # the input, on the meta device
    more: tuple[Any, ...]  # the arguments after the weight
    rows: int  # how often the call multiplied each entry of the weight; 0 for a lookup
    times: int = 1  # number of such calls
    outputs: int | None = None  # number of outputs of the weight that were used; None: all
    activation: str | None = None  # one that the convolution computed too


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


def is_faked() -> bool:
    """Whether new tensors have no values, as in FakeTensorMode: none of them may be kept."""
    if torch.compiler.is_compiling() or not torch._C._len_torch_dispatch_stack():
        return False
    return type(torch.empty(0)) is not Tensor


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


def each(value: Any, dims: int) -> tuple[int, ...]:
    """Return one number for each spatial dimension, as torch's convolutions take them."""
    return (value,) * dims if isinstance(value, int) else tuple(value) * (dims // len(value) or 1)


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
    **dict.fromkeys((F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d), transposed),
}  # fmt: skip
