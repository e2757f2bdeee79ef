"""What data may be, and the mask that it gets at first."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized


def weight_of(data: Any) -> Tensor:
    """Return the tensor that `data` is or holds.

    Raises:
        TypeError: it is no Tensor, Parameter, Embedding or EmbeddingBag.
        ValueError: an embedding is parametrized.
    """
    if isinstance(data, nn.Embedding | nn.EmbeddingBag):
        if is_parametrized(data, "weight"):
            raise ValueError(
                f"{type(data).__name__} must have a plain weight; it is parametrized, so that "
                "masked values could not be written back. `squash` it first."
            )
        return data.weight
    if not isinstance(data, Tensor):
        raise TypeError(
            "`data` must be a Tensor, Parameter, Embedding or EmbeddingBag; got "
            f"{type(data).__name__}."
        )
    return data


def ones_like(data: Tensor) -> Tensor:
    """Return a mask that keeps all: floating, so that it has a mean."""
    dtype = data.dtype.to_real() if data.dtype.is_complex else data.dtype
    if not dtype.is_floating_point or dtype.itemsize == 1:
        dtype = torch.float32
    plain = data.detach().as_subclass(Tensor)
    with torch.inference_mode(False):  # it is changed later
        return torch.ones_like(plain, dtype=dtype, requires_grad=False)
