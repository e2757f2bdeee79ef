"""Watches the calls in which a program states sizes: view, split, slices, zeros, shapes."""

from __future__ import annotations

import operator
from functools import reduce
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from parasparse.shrink.function_names import ARITHMETIC
from parasparse.shrink.function_sizes import CHECKS, SHAPE, WITHOUT_EXPAND, sizes_of
from parasparse.shrink.outside_torch import REPLACED, leave_torch
from parasparse.shrink.sizes import Size, expression, numbers, telling
from parasparse.shrink.stand_ins import READS, ValuesNeeded
from parasparse.shrink.tracing import Trace

_NBYTES = Tensor.nbytes.__get__  # type: ignore[attr-defined]


class StatedSizes(TorchFunctionMode):
    """Records the sizes that the program states, and gives out shapes that remember themselves."""

    def __init__(self, trace: Trace) -> None:
        super().__init__()
        self._trace = trace

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs, name = kwargs or {}, getattr(func, "__name__", "")
        if func == SHAPE:
            return self._shape(args[0])
        if name == "size" and isinstance(args[0], Tensor):
            shape = self._shape(args[0])
            dim = args[1] if len(args) > 1 else kwargs.get("dim")
            return shape if dim is None else shape[dim]
        if name == "__len__":  # an int, whatever we return
            numbers.get().extend(map(expression, self._shape(args[0])[:1]))
        if name == "numel" or func == _NBYTES:
            size = 1 if name == "numel" else args[0].element_size()
            return reduce(operator.mul, self._shape(args[0]), size)
        if name in ("stride", "storage_offset"):
            numbers.get().extend(map(expression, self._shape(args[0])))
        if name in READS and self._trace.stand_ins:
            raise ValuesNeeded
        if name in READS and name not in REPLACED and isinstance(args[0], Tensor):
            with torch._C._DisableTorchDispatch():
                leave_torch(self._trace, args[0], name)
        func = WITHOUT_EXPAND.get(func, func)
        outer, self._trace.function = self._trace.function, name
        self._trace.means.give([*args, *kwargs.values()])
        try:
            out = func(*args, **kwargs)
        finally:
            self._trace.function = outer
            self._trace.means.give([])
        if name.strip("_") in ARITHMETIC:
            for each in tree_leaves((args, kwargs)):
                if isinstance(each, Size):
                    numbers.get().append(each.expression)
        check = CHECKS.get(name)
        if check is not None:
            with torch._C._DisableTorchDispatch(), telling(None):
                check(self._trace, args, kwargs, out)
        return out

    def __enter__(self) -> StatedSizes:
        self._token = numbers.set(self._trace.numbers)
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        numbers.reset(self._token)

    def _shape(self, tensor: Tensor) -> torch.Size:
        return sizes_of(self._trace, tensor)
