"""Products with a matrix W of which only the kept values exist, and their gradients.

    product(x, values, places)                     x @ W.T
    product(x, values, places, transposed=True)    x @ W
    sampled(g, x, places)                          (g.T @ x) at the kept places

The gradients of these two are such products again, so derivatives of any order are sparse. Under
torch.compile, which has no sparse tensors, they are custom operators. Under vmap and forward-mode
derivatives, for which there are no kernels, W is dense.
"""

from __future__ import annotations

from typing import Any, TypeAlias

import torch
from torch import Tensor

from parasparse.acceleration.formats.compressed import CSR, Bag, csr
from parasparse.acceleration.weight.layers import is_transformed
from parasparse.masks.apply import is_batched

_HALF = (torch.float16, torch.bfloat16)


Indices: TypeAlias = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]  # `Places.tensors()`


def can_multiply(values: Tensor) -> bool:
    """Whether there are kernels for the device and dtype of `values`."""
    in_float32 = values.dtype in _HALF or values.dtype == torch.float32
    return not values.is_meta and (in_float32 or CSR.can_multiply(values))


def product(x: Tensor, values: Tensor, places: Indices, *, transposed: bool = False) -> Tensor:
    """Return x @ W.T, or x @ W if `transposed`, for x with two dimensions and at least one row."""
    if _is_transformed(x, values):
        dense = _dense(values, places)
        return x @ (dense if transposed else dense.t())
    run = _product if torch.compiler.is_compiling() else _Product.apply
    result: Tensor = run(x, values, *places, transposed)
    return result


def sampled(g: Tensor, x: Tensor, places: Indices) -> Tensor:
    """Return the entries of g.T @ x at the kept places, row by row."""
    if _is_transformed(g, x):
        return (g.t() @ x)[_rows_and_columns(places)]
    run = _sampled if torch.compiler.is_compiling() else _Sampled.apply
    result: Tensor = run(g, x, *places)
    return result


def _is_transformed(*tensors: Tensor) -> bool:
    """Whether a transform is running, for example over a backward pass."""
    if torch.compiler.is_compiling():
        return False
    return is_transformed() or any(map(is_batched, tensors))


def _dense(values: Tensor, places: Indices) -> Tensor:
    starts, _, column_starts, *_ = places
    zeros = values.new_zeros(len(starts) - 1, len(column_starts) - 1)
    return zeros.index_put(_rows_and_columns(places), values)


def _rows_and_columns(places: Indices) -> tuple[Tensor, Tensor]:
    """Return the row and the column of each entry, row by row."""
    _, columns, _, rows, _ = places
    return rows.sort().values.long(), columns.long()


def _times(
    x: Tensor, values: Tensor,
    starts: Tensor, columns: Tensor, column_starts: Tensor, rows: Tensor, order: Tensor,
    transposed: bool,
) -> Tensor:  # fmt: skip
    dtype = x.dtype
    if dtype in _HALF and values.dtype == dtype:  # torch has no sparse kernels for them
        x, values = x.float(), values.float()
    if transposed:
        values, starts, columns = values.index_select(0, order), column_starts, rows
    shape = (len(starts) - 1, x.shape[1])
    fast = Bag.can_multiply(values) and (len(x) > 1 or not CSR.can_multiply(values))
    matrix = (Bag if fast else CSR)(starts, columns, values, shape)
    return matrix.rows(x, None).to(dtype)


def _at_places(
    g: Tensor, x: Tensor,
    starts: Tensor, columns: Tensor, column_starts: Tensor, rows: Tensor, order: Tensor,
) -> Tensor:  # fmt: skip
    dtype = x.dtype
    if dtype in _HALF:
        g, x = g.float(), x.float()
    zeros = x.new_zeros(len(columns))  # `beta=0` multiplies them, so they must be finite
    shape = (g.shape[1], x.shape[1])
    pattern = csr(starts, columns, zeros, shape)
    found: Tensor = torch.sparse.sampled_addmm(pattern, g.t().contiguous(), x, beta=0.0)
    return found.values().to(dtype, copy=True)  # no view of a sparse tensor: it has no strides


def _keep_product(ctx: Any, inputs: tuple[Any, ...], output: Any = None) -> None:
    *tensors, ctx.transposed = inputs
    ctx.save_for_backward(*tensors)


def _product_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    x, values, *places = ctx.saved_tensors
    for_x = for_values = None
    if ctx.needs_input_grad[0]:
        for_x = product(grad, _conjugate(values), places, transposed=not ctx.transposed)
    if ctx.needs_input_grad[1]:
        x = _conjugate(x)
        for_values = sampled(x, grad, places) if ctx.transposed else sampled(grad, x, places)
    return for_x, for_values, *_NONE, None


def _keep_sampled(ctx: Any, inputs: tuple[Any, ...], output: Any = None) -> None:
    ctx.save_for_backward(*inputs)


def _sampled_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    g, x, *places = ctx.saved_tensors
    for_g = for_x = None
    if ctx.needs_input_grad[0]:
        for_g = product(_conjugate(x), grad, places)
    if ctx.needs_input_grad[1]:
        for_x = product(_conjugate(g), grad, places, transposed=True)
    return for_g, for_x, *_NONE


_NONE = (None,) * 5  # indices have no gradients


def _conjugate(tensor: Tensor) -> Tensor:
    return tensor.conj().resolve_conj()  # the kernels ignore the conjugate bit


class _Product(torch.autograd.Function):
    # Not `setup_context`, which makes a call 50 us slower.
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        _keep_product(ctx, inputs)
        return _times(*inputs)

    backward = staticmethod(_product_backward)


class _Sampled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        _keep_sampled(ctx, inputs)
        return _at_places(*inputs)

    backward = staticmethod(_sampled_backward)


_product = torch.library.custom_op("parasparse::product", _times, mutates_args=())
_sampled = torch.library.custom_op("parasparse::sampled", _at_places, mutates_args=())
_product.register_autograd(_product_backward, setup_context=_keep_product)
_sampled.register_autograd(_sampled_backward, setup_context=_keep_sampled)


@_product.register_fake
def _(
    x: Tensor, values: Tensor,
    starts: Tensor, columns: Tensor, column_starts: Tensor, rows: Tensor, order: Tensor,
    transposed: bool,
) -> Tensor:  # fmt: skip
    return x.new_empty(x.shape[0], len(column_starts if transposed else starts) - 1)


@_sampled.register_fake
def _(
    g: Tensor, x: Tensor,
    starts: Tensor, columns: Tensor, column_starts: Tensor, rows: Tensor, order: Tensor,
) -> Tensor:  # fmt: skip
    return x.new_empty(len(columns))
