"""The part of a tensor that stays, and the full tensor again. Numbers only."""

from __future__ import annotations

import torch
from torch import Tensor

from parasparse.masks.mask import memory_format_of
from parasparse.shrink.plan import ShrinkRow


def selected(tensor: Tensor, row: ShrinkRow) -> Tensor:
    """Return the part of a tensor that stays, in its memory format."""
    if tensor.is_sparse:  # the gradient of an embedding
        return selected(tensor.to_dense(), row).to_sparse(tensor.sparse_dim())
    part = tensor
    for dim, kept in row.kept.items():
        index = torch.tensor(kept, device=tensor.device)
        if index.ndim > 1:
            part = part.gather(1, _expanded(index, part))
        else:
            part = part.index_select(dim, index)
    return part.contiguous(memory_format=memory_format_of(tensor))


def rescaled(tensor: Tensor, row: ShrinkRow) -> Tensor:
    """Return the values of a parameter in the smaller network. `tensor` has any shape."""
    return _times(tensor, row.scale, row.shift)


def restored(tensor: Tensor, row: ShrinkRow) -> Tensor:
    """Return the values of a parameter before `rescaled`."""
    return _times(tensor, 1 / row.scale, row.shift)


def _times(tensor: Tensor, scale: float, shift: float) -> Tensor:
    if scale == 1:
        return tensor
    return ((tensor.double() + shift) * scale - shift).to(tensor.dtype)


def spread(tensor: Tensor, row: ShrinkRow, full: Tensor) -> Tensor:
    """Return `full` with the entries of `tensor` where they were before `selected`."""
    if tensor.is_sparse:
        return spread(tensor.to_dense(), row, full).to_sparse(tensor.sparse_dim())
    dims = list(row.kept)
    result = full.clone(memory_format=memory_format_of(tensor))
    return _spread(tensor, row, result, dims)


def _spread(tensor: Tensor, row: ShrinkRow, full: Tensor, dims: list[int]) -> Tensor:
    """Write into `full` along `dims`, the first of which was cut first."""
    if not dims:
        return tensor
    dim, *rest = dims
    index = torch.tensor(row.kept[dim], device=tensor.device)
    if index.ndim > 1:
        inner = _spread(tensor, row, full.gather(1, _expanded(index, full)), rest)
        return full.scatter_(1, _expanded(index, full), inner)
    inner = _spread(tensor, row, full.index_select(dim, index), rest)
    return full.index_copy_(dim, index, inner)


def _expanded(index: Tensor, tensor: Tensor) -> Tensor:
    """Return an index of (rows, inputs) for `gather` along dimension 1 of `tensor`."""
    return index.view(*index.shape, *[1] * (tensor.ndim - 2)).expand(-1, -1, *tensor.shape[2:])
