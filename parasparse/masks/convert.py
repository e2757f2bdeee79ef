"""Converts masks that users pass to tensors of the right shape and dtype."""

import torch
from torch import Tensor


def as_mask(mask: object, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """Return `mask` as a tensor of `shape`: bool if its entries are all 0 or 1, else real.

    The result may be an expanded view. A real mask gets the real dtype of `dtype`, or float32 if
    `dtype` has one byte. See `Mask.mask_` for what it raises.
    """
    if hasattr(mask, "__array__") and not isinstance(mask, Tensor) and hasattr(mask, "copy"):
        mask = mask.copy()  # torch accepts neither negative strides nor read-only memory
    try:
        value = (mask if isinstance(mask, Tensor) else torch.as_tensor(mask)).detach()
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(
            f"a mask must be a tensor, array or nested list of numbers; got {mask!r:.80}."
        ) from error
    if value.is_complex():
        raise TypeError(f"a mask must be bool, integer or real; got {value.dtype}.")
    if value.layout != torch.strided:
        value = value.to_dense()
    if value.dtype != torch.bool and not value.is_meta:
        value = _bool_or_real(value, torch.float32 if dtype.itemsize == 1 else real_dtype(dtype))
    try:
        return value.expand(shape)
    except RuntimeError as error:
        raise RuntimeError(
            f"a mask must match the existing size {tuple(shape)} of its tensor, or broadcast to "
            f"it; got shape {tuple(value.shape)}."
        ) from error


def _bool_or_real(value: Tensor, dtype: torch.dtype) -> Tensor:
    if bool(((value == 0) | (value == 1)).all()):
        return value != 0
    real = value.to(dtype)
    if not bool(real.isfinite().all()) or bool(((real != 0) != (value != 0)).any()):
        raise ValueError(
            f"a mask must not contain NaN, inf, or values that {dtype} rounds to inf or 0; got "
            f"entries from {value.min()} to {value.max()}."
        )
    return real


def real_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return `dtype`, or the dtype of the components if it is complex."""
    return dtype.to_real() if dtype.is_complex else dtype
