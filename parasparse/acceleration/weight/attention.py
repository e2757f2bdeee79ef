"""nn.MultiheadAttention with sparse projections."""

from collections.abc import Callable, Sequence
from types import FunctionType
from typing import Any

import torch
import torch.nn.functional as F

_forward: Any = F.multi_head_attention_forward
# torch's own code without its first check, which would hand a tensor subclass back to `attention`
# (test_attention_computes_with_sparse_projections).
_through = FunctionType(
    _forward.__code__,
    {**vars(F), "has_torch_function": lambda _: False},
    _forward.__name__,
    _forward.__defaults__,
    _forward.__closure__,
)


def attention(func: Any, *args: Any, **kwargs: Any) -> Any:
    """Compute attention, with its projections as linear layers."""
    return _through(*args, **kwargs)


def split(func: Any, weight: Any, split_size: int | Sequence[int], dim: int = 0) -> Any:
    """Split a fused projection into query, key and value."""
    if dim != 0 or isinstance(split_size, int) or sum(split_size) != len(weight):
        return NotImplemented
    return weight.parts(tuple(split_size))


def chunk(func: Any, weight: Any, chunks: int, dim: int = 0) -> Any:
    """Split a fused projection into equal parts."""
    if dim != 0 or chunks < 1 or len(weight) % chunks:
        return NotImplemented
    return weight.parts((len(weight) // chunks,) * chunks)


HANDLERS: dict[Any, Callable[..., Any]] = {
    F.multi_head_attention_forward: attention,
    torch.Tensor.split: split,
    torch.Tensor.chunk: chunk,
}
