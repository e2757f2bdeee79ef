"""Stand-ins for the results of large products and of embeddings, whose values a plan does not need.

A plan needs to know which entries of a tensor depend on the input, and the values of those that do
not. The others may have any values, as long as the program does not read them to decide what to do.
Where it might, `ValuesNeeded` is raised, and the model must be run again with all values.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from parasparse.shrink.late_values import LateValues
from parasparse.shrink.memory import written

# The operations, and the place of the weight among their arguments, whose values they do not need.
_WEIGHTS = {"convolution": 1, "mm": 1, "bmm": 1, "addmm": 2, "baddbmm": 2, "embedding": 0}
# Functions through which a program gets at the memory of a tensor.
READS = frozenset(
    ("tolist", "numpy", "__array__", "data_ptr", "__dlpack__", "storage", "untyped_storage",
     "_typed_storage", "__deepcopy__", "__reduce_ex__")
)  # fmt: skip
_TAGS = (torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape)


class ValuesNeeded(BaseException):
    """The program may read a value that has not been computed, or write into a Parameter."""


class StandIns:
    """Makes random results of products and embeddings.

    Args:
        model: into whose Parameters nothing may write.
        late: computes the values of its masked weights.

    Attributes:
        made: whether a result has been replaced.
        late: as given.
    """

    def __init__(self, model: nn.Module, late: LateValues) -> None:
        self.made = False
        self.late = late
        self._parameters = {p.untyped_storage()._cdata for p in model.parameters()}
        generator = torch.Generator("cpu").manual_seed(0)
        numbers = torch.randn(65_521, generator=generator, dtype=torch.float32, device="cpu")
        self._numbers = numbers  # as many as a prime, so that no two rows are equal

    def check(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Raise ValuesNeeded if `func` writes into a Parameter, or is not an operation of torch."""
        if func.namespace != "aten":
            raise ValuesNeeded
        for tensor in written(func, args, kwargs):
            if tensor.untyped_storage()._cdata in self._parameters:
                raise ValuesNeeded

    def instead(self, name: str, func: Any, args: tuple[Any, ...]) -> Tensor | None:
        """Return a stand-in for the result of an operation, or None if it must run."""
        place = _WEIGHTS.get(name)
        if place is None or func._schema.is_mutable:
            return None
        tensors = [t for t in args if isinstance(t, Tensor)]
        if any(t.is_meta or t.layout != torch.strided for t in tensors):
            return None
        weight = args[place]
        if name == "embedding":
            if not _are_rows(args[1], weight):
                return None
            out: Tensor = weight.new_empty((*args[1].shape, weight.shape[-1]))
        elif name == "convolution":
            like = _without_values(func, tuple(map(_layout, args)))
            out = torch.empty_strided(
                like.shape, like.stride(), dtype=like.dtype, device=tensors[0].device
            )
        else:
            out = weight.new_empty((*args[place - 1].shape[:-1], weight.shape[-1]))
        self.made = True
        self.late.need(t for t in tensors if t is not weight)
        self._fill(out.as_strided((out.numel(),), (1,)))
        return out

    def _fill(self, flat: Tensor) -> None:
        size = len(self._numbers)
        whole = len(flat) // size
        flat[: whole * size].view(whole, size).copy_(self._numbers)
        flat[whole * size :].copy_(self._numbers[: len(flat) - whole * size])


def reads_values(name: str, func: Any, args: tuple[Any, ...]) -> bool:
    """Whether the result of an operation, or its shape, tells the program values."""
    if name == "index":
        return any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in args[1])
    return any(tag in func.tags for tag in _TAGS)


def _are_rows(indices: Tensor, weight: Tensor) -> bool:
    """Whether all `indices` are rows of `weight`; there may be none."""
    return not indices.numel() or 0 <= int(indices.min()) <= int(indices.max()) < len(weight)


class _Layout(NamedTuple):
    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype


def _layout(value: Any) -> Any:
    if isinstance(value, Tensor):
        return _Layout(value.shape, value.stride(), value.dtype)
    return tuple(value) if isinstance(value, list) else value


@lru_cache(maxsize=1024)  # a call takes longer than the arithmetic of a small layer
def _without_values(func: Any, args: tuple[Any, ...]) -> Tensor:
    """Return the result of an operation, on the meta device, for tensors of these layouts."""
    tensors = (
        torch.empty_strided(a.shape, a.stride, dtype=a.dtype, device="meta")
        if isinstance(a, _Layout)
        else a
        for a in args
    )
    result: Tensor = func(*tensors)
    return result
