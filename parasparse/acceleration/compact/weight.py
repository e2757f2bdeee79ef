"""The tensor that is read where a weight has kept values alone.

F.linear(x, weight)    ->  the sparse product, with sparse gradients
other functions        ->  the dense values, differentiably
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from parasparse.acceleration.compact.products import can_multiply, product
from parasparse.acceleration.compact.uses import Recorder
from parasparse.acceleration.weight import dispatch, recurrent
from parasparse.acceleration.weight.layers import each, format_for, is_strided, multiplied
from parasparse.attach.accelerated import StandIn
from parasparse.masks.places import Places


@dataclass(frozen=True)
class Trained:
    """A format whose products have gradients; see `formats.format`."""

    values: Tensor
    places: Places
    recorder: Recorder | None = None

    def rows(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """Return x @ W.T + bias."""
        result = product(x, self.values, self.places.indices())
        if self.recorder is not None:
            result = self.recorder.watched(result, x)
        return result if bias is None else result + bias

    def columns(self, u: Tensor) -> Tensor:
        """Return W @ u."""
        return self.rows(u.t(), None).t()

    def dense(self) -> Tensor:
        """Return W."""
        dense: Tensor = self.places(self.values)
        return dense.flatten(1)

    def tensors(self) -> list[Tensor]:
        """Return the stored tensors."""
        return [self.values, *self.places.indices()]


class CompactWeight(StandIn):
    """A weight of which only the kept values exist. It lives for one reading.

    Its own memory is one NaN, so that code that bypasses the subclass does not read wrong numbers.
    """

    kept: Tensor  # the values
    places: Places
    recorder: Recorder | None

    def __new__(cls, values: Tensor, places: Places, recorder: Recorder | None = None) -> Self:
        """Make a weight of the values at `places`, whose uses `recorder` records."""
        nan = torch.full((1,), torch.nan, dtype=values.dtype, device=values.device)
        guarded = cls is CompactWeight and not torch.compiler.is_compiling()
        kind: type[Self] = GuardedWeight if guarded else cls  # type: ignore[assignment]
        self = torch.Tensor._make_subclass(kind, nan.expand(places.shape))
        self.kept, self.places, self.recorder = values, places, recorder
        return self

    def __init__(self, *_: object) -> None:
        """Do nothing, because torch.Tensor would not accept the arguments of `__new__`."""

    @property
    def inputs(self) -> int:
        """Size of the second dimension."""
        return self.places.shape[1]

    def format_for(self, rows: int) -> Trained | None:
        """Return the format that multiplies `rows` rows; None: the dense kernel."""
        is_matrix = self.places.shape[2:].numel() == 1
        usable = is_matrix and can_multiply(self.kept)
        return Trained(self.kept, self.places, self.recorder) if rows and usable else None

    def plain(self) -> Tensor:
        """Return the dense values, with their graph."""
        dense: Tensor = self.places(self.kept)
        return dense if self.recorder is None else self.recorder.watched(dense, None)

    def parts(self, sizes: tuple[int, ...]) -> Sequence[Tensor]:
        """Return the weight split into `sizes` outputs; dense ones under torch.compile."""
        if torch.compiler.is_compiling():  # the sizes of the parts depend on data
            dense: Sequence[Tensor] = self.plain().split(sizes)
            return dense
        places = self.places.parts(sizes)
        values = self.kept.split([len(part) for part in places])
        recorder = self.recorder
        firsts = [sum(sizes[:i]) for i in range(len(sizes))]
        recorders = [None if recorder is None else recorder.part(first) for first in firsts]
        return [CompactWeight(*part) for part in zip(values, places, recorders, strict=True)]

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Collection[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        handler = HANDLERS.get(func)
        if handler is not None:
            result = handler(func, *args, **kwargs)
            if result is not NotImplemented:
                return result
        elif func in _OF_VALUES:
            return func(args[0].kept)
        elif func in _HOOKS:
            raise RuntimeError(
                "a compact weight has no gradient of its own. Use "
                "`parametrizations.<name>.original`, whose gradient is that of the kept values."
            )
        elif func in dispatch.METADATA:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        elif dispatch.stand_ins_in(_written(func, args, kwargs)):
            raise RuntimeError(
                "a compact weight must not be changed in place, because it is computed from its "
                "kept values. Write to `parametrizations.<name>.original`, assign a tensor to the "
                "attribute, or call parasparse.expand(model) first."
            )
        args = dispatch.replaced(args, CompactWeight.plain)
        return func(*args, **dispatch.replaced(kwargs, CompactWeight.plain))

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"CompactWeight({self.places.extra_repr()}, {self.dtype})"


class GuardedWeight(CompactWeight):
    """A weight that refuses to be read by code that bypasses the subclass; see `__new__`."""

    @classmethod
    def __torch_dispatch__(cls, func: Any, *_: Any, **__: Any) -> Any:  # type: ignore[override]
        raise RuntimeError(
            f"{func} must not read a compact weight together with this kind of tensor, which does "
            "not ask the weight how to multiply. Pass ordinary tensors (the `values()` of a nested "
            "one), or call parasparse.expand(model) first."
        )


def _written(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Return what a call writes to, if anything."""
    if not dispatch.writes(func):
        return kwargs.get("out")
    return [*args, *kwargs.values()][0]  # torch.nn.init passes all arguments by keyword


def _pointwise(
    func: Any, input: Tensor, weight: Tensor, bias: Tensor | None = None,  # noqa: A002
    stride: Any = 1, padding: Any = 0, dilation: Any = 1, groups: int = 1,
) -> Any:  # fmt: skip
    """Compute a convolution with a kernel of one as a linear layer."""
    dims = weight.ndim - 2
    padded = padding not in ("same", "valid") and any(each(padding, dims))
    if padded or groups != 1 or input.ndim not in (dims + 1, dims + 2):
        return NotImplemented
    every: Any = tuple(slice(None, None, step) for step in each(stride, dims))
    taken = input[(..., *every)].movedim(-dims - 1, -1)
    result = dispatch.HANDLERS[F.linear](F.linear, taken, weight, bias)
    if result is NotImplemented:
        return result
    result = result.movedim(-1, -dims - 1)
    last = dims == 2 and input.is_contiguous(memory_format=torch.channels_last)
    return result if last else result.contiguous()


def _addmm(func: Any, *args: Any, **named: Any) -> Any:
    """Compute bias + x @ weight, as the Conv1D of transformers does."""
    if named or len(args) != 3:
        return NotImplemented
    bias, x, weight = args
    return _matmul(func, x, weight, bias=bias)


def _matmul(func: Any, *args: Any, bias: Any = None, **named: Any) -> Any:
    """Compute x @ weight, plus `bias` if there is one."""
    if named or len(args) != 2 or not isinstance(args[1], CompactWeight):
        return NotImplemented
    x, weight = args
    dims = x.ndim == 2 or (x.ndim > 2 and func not in _OF_MATRICES)
    chosen = None
    if dims and is_strided(x) and not isinstance(x, CompactWeight):
        chosen = format_for(weight, lambda: None, x.numel(), x)  # type: ignore[arg-type, return-value]
    if chosen is None or weight.ndim != 2 or x.shape[-1] != len(weight):
        return NotImplemented
    places = weight.places.indices()

    def times(x: Tensor) -> Tensor:
        result = product(x, weight.kept, places, transposed=True)
        if weight.recorder is not None:
            result = weight.recorder.watched(result, x, transposed=True)
        return result if bias is None else result + bias.expand_as(result)

    result = multiplied(times, x.flatten(0, -2), weight)
    return result.view(*x.shape[:-1], -1)


def _lookup(func: Any, input: Tensor, weight: Any, *more: Any, **options: Any) -> Any:  # noqa: A002
    """Look rows up in the dense values; the gradient of the kept values is no sparse tensor."""
    at = 4 if func is F.embedding else 5  # of `sparse`
    if len(more) > at:
        more = (*more[:at], False, *more[at + 1 :])
    else:
        options["sparse"] = False
    return func(input, weight.plain(), *more, **options)


_OF_MATRICES = (torch.addmm, torch.mm, torch.Tensor.mm)
HANDLERS: dict[Any, Callable[..., Any]] = {
    **dispatch.HANDLERS,
    **recurrent.OF_CELLS,
    **dict.fromkeys((F.embedding, F.embedding_bag), _lookup),
    **dict.fromkeys((F.conv1d, F.conv2d, F.conv3d), _pointwise),
    torch.addmm: _addmm,
    **dict.fromkeys(
        (torch.mm, torch.matmul, torch.Tensor.mm, torch.Tensor.matmul, torch.Tensor.__matmul__),
        _matmul,
    ),
}
_HOOKS = {torch.Tensor.register_hook, torch.Tensor.retain_grad}
_OF_VALUES = {torch.Tensor.requires_grad.__get__, torch.Tensor.is_leaf.__get__}  # type: ignore[attr-defined]
