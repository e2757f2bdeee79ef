"""nn.MultiheadAttention with sparse projections."""

from collections.abc import Callable, Sequence
from types import FunctionType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from parasparse.acceleration.weight.layers import nested_linear as linear


def _packed(
    q: Tensor, k: Tensor, v: Tensor, weight: Any, bias: Tensor | None = None
) -> list[Tensor]:
    """Compute the projections of a fused weight, as torch's function of this name does."""
    if q is k and k is v:
        return [part.contiguous() for part in linear(q, weight, bias).chunk(3, -1)]
    size = q.shape[-1]
    sizes = (size, 2 * size) if k is v else (size, size, size)
    biases = [None] * 3 if bias is None else bias.split(sizes)
    every = zip((q, k, v), weight.parts(sizes), biases, strict=False)
    queries, *others = [linear(*each) for each in every]
    if k is v:
        others = [part.contiguous() for part in others[0].chunk(2, -1)]
    return [queries, *others]


def _with(function: Any, **names: Any) -> FunctionType:
    """Return a Python function of torch with other functions for some global names."""
    names = {**vars(F), **names}
    return FunctionType(
        function.__code__, names, function.__name__, function.__defaults__, function.__closure__
    )


# torch's own code without its first check, which would hand a tensor subclass back to `attention`,
# and with projections that multiply sparsely under torch.compile as well
# (test_attention_computes_with_sparse_projections, test_the_compiled_kernels_are_sparse).
_through = _with(
    F.multi_head_attention_forward,
    has_torch_function=lambda _: False,
    linear=linear,
    _in_projection_packed=_packed,
    _in_projection=_with(vars(F)["_in_projection"], linear=linear),
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
