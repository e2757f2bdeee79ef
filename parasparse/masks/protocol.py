"""The contract of a module that masks, and the defaults for its optional members."""

from typing import Protocol

import torch
from torch import Tensor, nn


class MaskModule(Protocol):
    """A module that masks a tensor. Only `forward` is required.

    A treatment may return any `nn.Module` whose output has the shape and dtype of its input. These
    members are used where the module has them:

    * `mask`, a tensor or None: what multiplies now, None if it is not set. Without it, entries that
      are not 0 count as kept.
    * `is_told_by_its_values`, a bool: whether the masked tensor determines the stored one where
      entries are kept, so that `functional_call` can restore it. Without it, True.
    * `merged(value, stored)` returns the tensor to store when the masked tensor is assigned to, so
      that kept entries read as `value`. Without it, `right_inverse(value)` is called, as in torch's
      parametrizations. Without either, assigning raises RuntimeError.
    * `penalty(weight)` returns a term of `parasparse.penalty`; `weight` is the module's input.
    * `fold_(keep=None)` masks without a scale, which has been folded into the weight; the bool
      tensor `keep` selects entries.
    * `forget_(device)` unsets the mask when weights without masks are assigned to a model on the
      meta device.
    """

    def forward(self, weight: Tensor, /) -> Tensor:
        """Return `weight` masked."""


def has_mask(module: nn.Module) -> bool:
    """Whether `module` has a `mask`, which may be None."""
    return hasattr(module, "mask")


def is_told_by_its_values(module: nn.Module) -> bool:
    """Return the attribute of that name, or True if `module` does not have it."""
    return bool(getattr(module, "is_told_by_its_values", True))


def merged(module: nn.Module, value: Tensor, stored: Tensor) -> Tensor:
    """Call `merged` of `module`, else its `right_inverse`; raise RuntimeError if it has neither."""
    if hasattr(module, "merged"):
        return module.merged(value, stored)  # type: ignore[operator, no-any-return]
    if hasattr(module, "right_inverse"):
        return module.right_inverse(value)  # type: ignore[operator, no-any-return]
    raise RuntimeError(
        f"a tensor masked by {type(module).__name__} cannot be assigned to, because this module "
        "has neither `merged` nor `right_inverse`. Write to `parametrizations.<name>.original`."
    )


def fold_(module: nn.Module, keep: Tensor | None = None) -> None:
    """Call `fold_` of `module`, if it has this method."""
    if hasattr(module, "fold_"):
        module.fold_(keep)  # type: ignore[operator]


def forget_(module: nn.Module, device: torch.device) -> None:
    """Call `forget_` of `module`, if it has this method."""
    if hasattr(module, "forget_"):
        module.forget_(device)  # type: ignore[operator]
