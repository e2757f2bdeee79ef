"""Accepted kinds of data, and their first mask."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from parasparse.dtypes import widened_dtype


def weight_of(data: Any) -> Tensor:
    """Return the tensor of `data`; raise TypeError or ValueError if it is not accepted."""
    if isinstance(data, nn.Embedding | nn.EmbeddingBag):
        if is_parametrized(data, "weight"):
            raise ValueError(
                f"the weight of {type(data).__name__} must not be parametrized, because masked "
                "values could not be written back. `squash` it first."
            )
        return data.weight
    if not isinstance(data, Tensor):
        raise TypeError(
            "`data` must be a Tensor, Parameter, Embedding or EmbeddingBag; got "
            f"{type(data).__name__}."
        )
    return data


def ones_like(data: Tensor) -> Tensor:
    """Return a mask of ones, floating-point so that it has a mean."""
    dtype = data.dtype.to_real() if data.dtype.is_complex else data.dtype
    dtype = widened_dtype(dtype) if dtype.is_floating_point else torch.float32
    plain = data.detach().as_subclass(Tensor)
    with torch.inference_mode(False):  # the mask changes later
        return torch.ones_like(plain, dtype=dtype, requires_grad=False)
