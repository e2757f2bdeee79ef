"""The contract of a module that masks, and the defaults for its optional members."""

from typing import Protocol

import torch
from torch import Tensor, nn


class MaskModule(Protocol):
    """A module that masks a tensor. Only `forward` is required.

    A treatment may return any `nn.Module` whose output has the shape and dtype of its input. The
    other members are used where the module has them. `Mask` and `SoftMask` have all of them.

    Attributes:
        mask: the tensor that multiplies now, or None if it is not set. Without this attribute,
            entries that are not 0 count as kept.
        is_told_by_its_values: whether the masked tensor determines the stored one where entries are
            kept, so that `functional_call` can restore it. Without this attribute, True.
    """

    mask: Tensor | None
    is_told_by_its_values: bool

    def forward(self, weight: Tensor) -> Tensor:
        """Return `weight` masked."""

    def merged(self, value: Tensor, stored: Tensor) -> Tensor:
        """Return the tensor to store, so that kept entries read as `value`.

        Called when the masked tensor is assigned to. Without this method, `right_inverse(value)` is
        called, as in torch's parametrizations. Without either, assigning raises RuntimeError.
        """

    def penalty(self, weight: Tensor) -> Tensor:
        """Return the term of `parasparse.penalty`; `weight` is the input of the module."""

    def fold_(self, keep: Tensor | None = None) -> None:
        """Mask without a scale, which has been folded into the weight; `keep` selects entries."""

    def forget_(self, device: torch.device) -> None:
        """Unset the mask when weights without masks are assigned to a model on the meta device."""


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
