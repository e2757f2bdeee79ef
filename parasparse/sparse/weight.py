"""The tensor subclass that takes the place of a weight and multiplies sparsely.

    F.linear(x, weight)    ->  the format that is chosen for the number of rows of x
    anything else          ->  the dense values

To modules, `state_dict`, `deepcopy`, pickle and `.to()` it is a Parameter like any other.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Collection
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from parasparse.sparse import attention, layers, recurrent
from parasparse.sparse.formats import Format, formats_of

# For each measured number of rows the name of a format, or None for the dense kernel.
Choices = tuple[tuple[int, str | None], ...]

HANDLERS = {**layers.HANDLERS, **attention.HANDLERS, **recurrent.HANDLERS}


class SparseWeight(torch.Tensor):
    """A weight of two or more dimensions with sparse formats beside its dense values.

    Attributes:
        original: the Parameter whose place it has, and whose storage; None: freed.
        choices: pairs of rows and format, by rows; the nearest ratio of rows decides.
        seen: is told of each use while uses are recorded, None where nothing is multiplied.
    """

    original: Tensor | None
    choices: Choices
    seen: Callable[[layers.Use | None], None] | None
    _formats: dict[str, Format]
    _parts: dict[tuple[int, ...], tuple[SparseWeight, ...]]

    def __new__(cls, original: Tensor, choices: Choices = (), *, keep_dense: bool = True) -> Self:
        """Make one of `original`, whose values stay where they are unless `keep_dense` is False."""
        values = original.detach()
        formats = formats_of(values, {name for _, name in choices if name is not None})
        if not keep_dense:
            # Whatever reads it without asking us sees NaN, not wrong numbers. No view, which
            # torch.compile cannot take if it was made without gradients.
            nan = values.new_full((1,), math.nan).untyped_storage()
            values = values.new_empty(0).set_(nan, 0, original.shape, (0,) * original.ndim)
        self = torch.Tensor._make_subclass(cls, values, original.requires_grad)
        self.original = original if keep_dense else None
        self.choices, self.seen = tuple(sorted(choices, key=_rows)), None
        self._formats, self._parts = formats, {}
        if isinstance(original, nn.Parameter):
            self._is_param = True
        return self

    def __init__(self, *_: object, **__: object) -> None:
        """All is done in `__new__`; torch.Tensor would take arguments of its own."""

    def format_for(self, rows: int) -> Format | None:
        """Return what multiplies `rows` rows; None: the dense kernel."""
        name, last = None, 0
        for measured, choice in self.choices:
            if rows * rows > measured * last:  # nearer to this one than to the last, as a ratio
                name = choice
            last = measured
        return None if name is None else self._formats.get(name)

    def plain(self) -> Tensor:
        """Return the dense values as a plain tensor."""
        if self.original is not None:
            return self.original.detach()
        return next(iter(self._formats.values())).dense().view(self.shape)

    def parts(self, sizes: tuple[int, ...]) -> tuple[SparseWeight, ...]:
        """Return the weight cut into `sizes` outputs; each part has the same choices."""
        if sizes not in self._parts:
            pieces = self.plain().split(sizes)
            self._parts[sizes] = tuple(SparseWeight(piece, self.choices) for piece in pieces)
        for part in self._parts[sizes]:
            part.seen = self.seen
            part.requires_grad_(self.requires_grad)
        return self._parts[sizes]

    def renew(self) -> None:
        """Make the formats of the values that are there now."""
        self._formats, self._parts = formats_of(self.plain(), list(self._formats)), {}

    def bytes_stored(self) -> int:
        """Return the bytes of the formats; what they share counts once."""
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
        if handler is not None:
            result = handler(func, *args, **kwargs)
            if result is not NotImplemented:
                return result
        elif func not in _METADATA:
            pytree.tree_map_only(SparseWeight, _told_otherwise, (args, kwargs))
        if _writes(func) or "out" in kwargs:
            return _written(func, args, kwargs)
        if func not in _METADATA and func.__name__ != "__set__":
            args, kwargs = pytree.tree_map_only(SparseWeight, _as_plain, (args, kwargs))
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> SparseWeight:
        if id(self) not in memo:
            new = _rebuilt(*copy.deepcopy(self._recipe(), memo))
            memo[id(self)] = new
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


def _rows(choice: tuple[int, str | None]) -> int:
    return choice[0]


def _rebuilt(original: Tensor, choices: Choices, keep_dense: bool) -> SparseWeight:
    return SparseWeight(original, choices, keep_dense=keep_dense)


def _written(func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    """Let `func` change the values of its first argument, or of `out`; make new formats of them."""
    leaves = pytree.tree_leaves((args[:1], kwargs.get("out")))
    weights = [leaf for leaf in leaves if isinstance(leaf, SparseWeight)]
    if any(weight.original is None for weight in weights):
        raise RuntimeError(
            "an accelerated weight whose dense values were freed (`keep_dense=False`) must not "
            "change. Build the model anew, load into it, and accelerate that."
        )
    if func == _SET_DATA:
        _check_dtype(args[0], args[1])
        with torch._C.DisableTorchFunctionSubclass():
            func(*args)
        args = (args[0].original, args[1])
    plain_args, plain_kwargs = pytree.tree_map_only(SparseWeight, _as_plain, (args, kwargs))
    with torch._C.DisableTorchFunctionSubclass():
        result = func(*plain_args, **plain_kwargs)
    for weight in weights:
        weight.renew()
    return args[0] if args and result is plain_args[0] else result


def _check_dtype(weight: SparseWeight, value: Tensor) -> None:
    if value.is_cpu and value.dtype not in ON_CPU and weight.dtype in ON_CPU:
        raise TypeError(
            f"an accelerated weight must be float32 or float64 on a CPU; got {value.dtype}. Call "
            "parasparse.restore(model) first."
        )


def _as_plain(weight: SparseWeight) -> Tensor:
    return weight.plain() if weight.original is None else weight.original


def _told_otherwise(weight: SparseWeight) -> None:
    if weight.seen is not None:
        weight.seen(None)


# What these tell is true of the weight itself, freed or not.
_GETTERS = """
    shape dtype device layout ndim requires_grad grad grad_fn is_leaf is_cpu is_cuda is_meta
    is_sparse is_quantized _base _version
""".split()  # noqa: SIM905
_METHODS = """
    size dim numel nelement element_size is_floating_point is_complex requires_grad_ register_hook
    __hash__ __len__ _is_view stride storage_offset is_contiguous
""".split()  # noqa: SIM905
_METADATA = {
    *(getattr(torch.Tensor, name).__get__ for name in _GETTERS),
    *(getattr(torch.Tensor, name) for name in _METHODS),
}
_IN_PLACE = "add sub mul matmul truediv floordiv mod pow and or xor lshift rshift".split()  # noqa: SIM905
_SET_DATA = torch.Tensor.data.__set__  # type: ignore[attr-defined]
_WRITES = {"__setitem__", *(f"__i{name}__" for name in _IN_PLACE)}


def _writes(func: Callable[..., Any]) -> bool:
    """Whether `func` changes the values of its first argument."""
    if func in _METADATA:
        return False
    name = func.__name__
    if name.startswith("__"):
        return name in _WRITES or func == _SET_DATA
    return name.endswith("_")
