"""Which stored tensors make a parametrization compute a given weight."""

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import _WeightNorm


def right_inverse(module: nn.Module, value: Any) -> Any:
    """Return the tensors from which the parametrization `module` computes `value`.

    Differs: torch's `weight_norm` gives NaN for a row of zeros, and sums the squares of a row in
    another order than its `right_inverse`.
    """
    if not isinstance(module, _WeightNorm):
        return module.right_inverse(value)  # type: ignore[operator]
    norm, _ = module.right_inverse(value)
    direction = torch.where(norm == 0, 1, value)  # a row of zeros has any direction
    read, _ = module.right_inverse(module(norm, direction))
    return torch.where(norm == 0, norm, norm * (norm / read)), direction


def gives_back(stack: parametrize.ParametrizationList, value: Tensor) -> bool:
    """Whether `stack` without its mask reads as `value` after `value` has been stored.

    Zeros must be exact, and other entries equal up to rounding. `stack` does not change.
    """
    trial: Any = copy.deepcopy(stack)  # a `right_inverse` may change its module
    try:
        with torch.no_grad():
            trial.store(value)
            read = trial.stored()
    except Exception:  # a `right_inverse` may refuse a value with any error, or be missing
        return False
    wide, limits = torch.promote_types(value.dtype, torch.float64), torch.finfo(value.dtype)
    off = (read.to(wide) - value.to(wide)).abs()
    near = off <= 8 * limits.eps * (value.to(wide).abs() + limits.tiny)
    return bool((near & ((value != 0) | (read == 0))).all())
