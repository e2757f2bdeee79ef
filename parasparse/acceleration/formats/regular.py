"""Formats for zeros that dense kernels, or the tensor cores of a GPU, can skip."""

from dataclasses import dataclass
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Channels:
    """A smaller dense weight without the outputs and inputs that are all zeros."""

    small: Tensor  # with all dimensions of the weight
    outputs: Tensor | None  # indices of the outputs in `small`; None: all
    inputs: Tensor | None  # indices of the inputs in `small`; None: all
    all_outputs: int  # number of outputs of the weight
    all_inputs: int

    @classmethod
    def of(cls, weight: Tensor) -> Self | None:
        """Return `weight` in this format, or None if it would be hardly smaller."""
        kept = weight.flatten(2).ne(0).any(2) if weight.ndim > 2 else weight != 0
        outputs, inputs = kept.any(1), kept.any(0)
        if outputs.sum() * inputs.sum() > 0.95 * kept.numel() or not outputs.any():
            return None
        small = weight[outputs][:, inputs].contiguous()
        return cls(small, _indices(outputs), _indices(inputs), *kept.shape)

    def rows(self, x: Tensor, bias: Tensor | None) -> Tensor:  # noqa: D102
        taken = x if self.inputs is None else x.index_select(1, self.inputs)
        result = self.spread(F.linear(taken, self.small.flatten(1)))
        return result if bias is None else result.add_(bias)

    def columns(self, u: Tensor) -> Tensor:  # noqa: D102
        taken = u if self.inputs is None else u.index_select(0, self.inputs)
        return self.spread(self.small.flatten(1) @ taken, 0)

    def spread(self, result: Tensor, dim: int = 1) -> Tensor:
        """Return `result` with zeros for the missing outputs."""
        if self.outputs is None:
            return result
        shape = [*result.shape]
        shape[dim] = self.all_outputs
        return result.new_zeros(shape).index_copy_(dim, self.outputs, result)

    def dense(self) -> Tensor:  # noqa: D102
        shape = (len(self.small), self.all_inputs, *self.small.shape[2:])
        inputs = self.small
        if self.inputs is not None:
            inputs = self.small.new_zeros(shape).index_copy_(1, self.inputs, self.small)
        return self.spread(inputs, 0)

    def tensors(self) -> list[Tensor]:  # noqa: D102
        return [t for t in (self.small, self.outputs, self.inputs) if t is not None]


@dataclass(frozen=True)
class TwoFour:
    """2:4 semi-structured, multiplied by the sparse tensor cores of a CUDA device."""

    matrix: Tensor

    @classmethod
    def of(cls, weight: Tensor) -> Self | None:
        """Return `weight` in this format, or None if it is not 2:4, or torch does not offer it."""
        half = weight.dtype in (torch.float16, torch.bfloat16)
        if not weight.is_cuda or not half or weight.ndim != 2 or weight.shape[1] % 4:
            return None
        if weight.unflatten(1, (-1, 4)).count_nonzero(2).gt(2).any():
            return None
        try:
            return cls(torch.sparse.to_sparse_semi_structured(weight.detach()))
        except (RuntimeError, ValueError):  # torch does not offer it for this device or shape
            return None

    def rows(self, x: Tensor, bias: Tensor | None) -> Tensor:  # noqa: D102
        return F.linear(x, self.matrix, bias)

    def columns(self, u: Tensor) -> Tensor:  # noqa: D102
        return self.rows(u.t(), None).t()

    def dense(self) -> Tensor:  # noqa: D102
        return self.matrix.to_dense()

    def tensors(self) -> list[Tensor]:  # noqa: D102
        return [t for t in vars(self.matrix).values() if isinstance(t, Tensor)]


def _indices(kept: Tensor) -> Tensor | None:
    return None if kept.all() else kept.nonzero().flatten()
