"""The contract of a module that masks, and what holds where one of a user's own says nothing."""

from typing import Protocol

import torch
from torch import Tensor, nn


class MaskModule(Protocol):
    """A module that masks a tensor. All but `forward` is optional.

    A treatment may return any `nn.Module` that gives back a tensor of the shape and dtype that it
    gets. What else it has of these is used; `Mask` and `SoftMask` have all of it.

    Attributes:
        mask: what multiplies the tensor now; None: not set. Without it, what is not 0 counts as
            kept.
        is_told_by_its_values: whether what is read says what is stored, but for masked entries, so
            that `functional_call` can put it back. Without it, yes.
    """

    mask: Tensor | None
    is_told_by_its_values: bool

    def forward(self, weight: Tensor) -> Tensor:
        """Return `weight` masked."""

    def merged(self, value: Tensor, stored: Tensor) -> Tensor:
        """Return the tensor to store, so that kept entries read as `value`.

        Called when a masked tensor is assigned to. Without it, `right_inverse(value)` is, as in
        torch's parametrizations; without that, assigning raises RuntimeError.
        """

    def penalty(self, weight: Tensor) -> Tensor:
        """Return what `parasparse.penalty` adds up; `weight` is what the module gets."""

    def fold_(self, keep: Tensor | None = None) -> None:
        """Mask without a scale after it has been folded into the weight; keep what `keep` says."""

    def forget_(self, device: torch.device) -> None:
        """Unset the mask when weights without masks are assigned to a model on the meta device."""


def has_mask(module: nn.Module) -> bool:
    """Whether `module` has a `mask`, which may be None."""
    return hasattr(module, "mask")


def is_told_by_its_values(module: nn.Module) -> bool:
    """Whether what is read says what is stored."""
    return bool(getattr(module, "is_told_by_its_values", True))


def merged(module: nn.Module, value: Tensor, stored: Tensor) -> Tensor:
    """Return the tensor to store, so that kept entries read as `value`.

    Raises:
        RuntimeError: `module` has neither `merged` nor `right_inverse`.
    """
    if hasattr(module, "merged"):
        return module.merged(value, stored)  # type: ignore[operator, no-any-return]
    if hasattr(module, "right_inverse"):
        return module.right_inverse(value)  # type: ignore[operator, no-any-return]
    raise RuntimeError(
        f"a tensor masked by {type(module).__name__}, which has neither `merged` nor "
        "`right_inverse`, cannot be assigned to. Write to `parametrizations.<name>.original` "
        "instead."
    )


def fold_(module: nn.Module, keep: Tensor | None = None) -> None:
    """Let `module` mask without a scale from now on, if it can."""
    if hasattr(module, "fold_"):
        module.fold_(keep)  # type: ignore[operator]


def forget_(module: nn.Module, device: torch.device) -> None:
    """Unset the mask of `module`, if it can be unset."""
    if hasattr(module, "forget_"):
        module.forget_(device)  # type: ignore[operator]
