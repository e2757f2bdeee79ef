"""The tensor subclass that replaces a weight and multiplies sparsely.

    F.linear(x, weight)    ->  the format for the number of rows of x
    other functions        ->  the dense values

For modules, `state_dict`, `deepcopy`, pickle and `.to()` it is an ordinary Parameter.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Collection
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from operator import itemgetter
from typing import Any, Self

import torch
from torch import Tensor, nn

from parasparse.acceleration.formats.format import Format, formats_of
from parasparse.acceleration.weight.dispatch import (
    HANDLERS,
    METADATA,
    SET_DATA,
    replaced,
    stand_ins_in,
    writes,
)
from parasparse.acceleration.weight.layers import GRADIENT, Use, is_faked
from parasparse.attach.accelerated import StandIn

# The format at each measured number of rows; None is the dense kernel.
Choices = tuple[tuple[int, str | None], ...]


class SparseWeight(StandIn):
    """A weight of two or more dimensions with sparse formats beside its dense values."""

    original: Tensor | None  # the Parameter that it replaces and shares storage with; None: freed
    choices: Choices  # sorted by rows; the nearest ratio of rows decides
    inputs: int  # size of the second dimension
    # Called with each use while uses are recorded; with None if it is not a multiplication.
    seen: Callable[[Use | None], None] | None
    _formats: dict[str, Format]
    _parts: dict[tuple[int, ...], tuple[SparseWeight, ...]]
    _version_made: int

    def __new__(cls, original: Tensor, choices: Choices = (), *, keep_dense: bool = True) -> Self:
        """Make a sparse weight; `keep_dense=False` keeps only the formats, not the values."""
        values = original.detach()
        own = values if keep_dense else _nan_like(values)
        self = torch.Tensor._make_subclass(cls, own)
        set_requires_grad(self, original.requires_grad)
        self.original = original if keep_dense else None
        self.choices, self.seen = tuple(sorted(choices, key=itemgetter(0))), None
        self.inputs = original.shape[1]
        self._made_of(values, {name for _, name in choices if name is not None})
        if isinstance(original, nn.Parameter):
            self._is_param = True
        return self

    def __init__(self, *_: object, **__: object) -> None:
        """Do nothing, because torch.Tensor would not accept the arguments of `__new__`."""

    def format_for(self, rows: int) -> Format | None:
        """Return the format that multiplies `rows` rows; None: the dense kernel."""
        if not torch.compiler.is_compiling() and self._version_made != version(self.original):
            # A view, or an earlier reference to the Parameter, was written to.
            self._made_of(self.plain(), self._formats)
        name, last = None, 0
        for measured, choice in self.choices:
            if rows * rows > measured * last:  # a nearer ratio than to the last
                name = choice
            last = measured
        return None if name is None else self._formats.get(name)

    def plain(self) -> Tensor:
        """Return the dense values as a plain tensor."""
        if self.original is not None:
            return self.original.detach()
        if is_faked():
            return torch.empty(self.shape, dtype=self.dtype, device=self.device)
        return next(iter(self._formats.values())).dense().view(self.shape)

    def parts(self, sizes: tuple[int, ...]) -> tuple[SparseWeight, ...]:
        """Return the weight split into `sizes` outputs, each part with the same choices."""
        if sizes not in self._parts:
            kept = self.original is not None
            pieces = self.plain().split(sizes)
            made = [SparseWeight(piece, self.choices, keep_dense=kept) for piece in pieces]
            self._parts[sizes] = tuple(made)
        for part, size in zip(self._parts[sizes], sizes, strict=True):
            part.seen = None if self.seen is None else partial(_tell_of_part, self.seen, size)
            set_requires_grad(part, self.requires_grad)
        return self._parts[sizes]

    def adopt(self, values: Tensor) -> None:
        """Take the values of a plain tensor of the same shape."""
        names = list(self._formats)
        self._made_of(values, names)
        kept = self.original is not None
        if not kept and len(self._formats) < len(names):  # too few zeros, for example: dense again
            self.original = nn.Parameter(values, requires_grad=self.requires_grad)
            kept = True
        with torch._C.DisableTorchFunctionSubclass():
            if self.original is not None and self.original is not values:
                self.original.data = values.detach()
            self.data = values.detach() if kept else _nan_like(values)
        self._version_made = version(self.original)

    def _made_of(self, values: Tensor, names: Collection[str]) -> None:
        with torch.inference_mode(False), torch.no_grad():  # formats are kept for other modes
            self._formats, self._parts = formats_of(values, names), {}
        self._version_made = version(self.original)

    def bytes_stored(self) -> int:
        """Return the bytes of the formats; shared tensors count once."""
        every = [tensor for held in self._formats.values() for tensor in held.tensors()]
        return sum({(t.data_ptr(), t.shape): t.nbytes for t in every}.values())

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
        if handler is not None and not is_faked():
            result = handler(func, *args, **kwargs)
            if result is not NotImplemented:
                return result
        elif func in METADATA or (func.__name__ == "__set__" and func != SET_DATA):
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        else:
            for weight in stand_ins_in((args, kwargs)):
                if weight.seen is not None:
                    weight.seen(_ADDED if func in _ADDING else None)
            if writes(func) or kwargs.get("out") is not None:
                return _written(func, args, kwargs)
        with torch._C.DisableTorchFunctionSubclass():
            result = func(*replaced(args, _as_plain), **replaced(kwargs, _as_plain))
        if torch.is_grad_enabled() and _is_differentiable(result):
            raise RuntimeError(GRADIENT)
        return result

    def __deepcopy__(self, memo: dict[int, Any]) -> SparseWeight:
        if id(self) not in memo:
            memo[id(self)] = _rebuilt(*copy.deepcopy(self._recipe(), memo))
        return memo[id(self)]  # type: ignore[no-any-return]

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _rebuilt, self._recipe()

    def _recipe(self) -> tuple[Tensor, Choices, bool]:
        if self.original is not None:
            return self.original, self.choices, True
        return nn.Parameter(self.plain(), requires_grad=self.requires_grad), self.choices, False

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        used = ", ".join(f"{name or 'dense'} at {rows} rows" for rows, name in self.choices)
        return f"SparseWeight({used}; {self.plain()!r})"


ON_CPU = (torch.float32, torch.float64)


def version(tensor: Tensor | None) -> int:
    """Return the number of writes to `tensor` or its views that autograd saw."""
    return 0 if tensor is None or tensor.is_inference() else tensor._version


def set_requires_grad(tensor: Tensor, requires_grad: bool) -> None:
    """Set `requires_grad`, which torch allows on inference tensors only in inference mode."""
    if tensor.requires_grad != requires_grad:
        with torch.inference_mode() if tensor.is_inference() else nullcontext():
            tensor.requires_grad_(requires_grad)


def _rebuilt(original: Tensor, choices: Choices, keep_dense: bool) -> SparseWeight:
    return SparseWeight(original, choices, keep_dense=keep_dense)


def _nan_like(values: Tensor) -> Tensor:
    """Return NaNs of the shape of `values` in the memory of one.

    Code that bypasses the subclass then reads NaN, not wrong numbers. It is not a view, because
    torch.compile cannot take views that were made without gradients.
    """
    nan = values.new_full((1,), math.nan).untyped_storage()
    return values.new_empty(0).set_(nan, 0, values.shape, (0,) * values.ndim)


def _tell_of_part(seen: Callable[[Use | None], None], outputs: int, use: Use | None) -> None:
    seen(use and replace(use, outputs=outputs))


def _written(func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    """Let `func` write to its first argument or `out`, and update the formats."""
    if func == SET_DATA:
        weight, value = args[0], replaced(args[1], _as_plain).detach()
        if value.is_cpu and value.dtype not in ON_CPU and weight.dtype in ON_CPU:
            raise TypeError(
                f"an accelerated weight must be float32 or float64 on a CPU; got {value.dtype}. "
                "Call parasparse.restore(model) first."
            )
        return weight.adopt(value)
    # torch.nn.init passes all arguments by keyword.
    weights = stand_ins_in((args[:1], kwargs))
    plain = {id(w): w.plain() if w.original is None else w.original for w in weights}

    def values(weight: SparseWeight) -> Tensor:
        return plain[id(weight)] if id(weight) in plain else _as_plain(weight)

    with torch._C.DisableTorchFunctionSubclass():
        result = func(*replaced(args, values), **replaced(kwargs, values))
    for weight in weights:
        weight.adopt(plain[id(weight)])
    return next((w for w in weights if result is plain[id(w)]), result)


def _as_plain(weight: SparseWeight) -> Tensor:
    if weight.original is not None:
        return weight.original
    return weight.plain().requires_grad_(weight.requires_grad and torch.is_grad_enabled())


def _is_differentiable(result: Any) -> bool:
    if isinstance(result, (list, tuple)):
        return any(_is_differentiable(part) for part in result)
    return isinstance(result, Tensor) and result.grad_fn is not None


# They add a parameter to their input, such as a position embedding: nothing is multiplied.
_ADDING = {
    torch.add, torch.cat, torch.stack, torch.Tensor.add, torch.Tensor.__add__,
    torch.Tensor.__radd__, torch.Tensor.expand, torch.Tensor.expand_as, torch.Tensor.repeat,
}  # fmt: skip
_ADDED = Use(torch.add, torch.empty(0, device="meta"), (), 0)
