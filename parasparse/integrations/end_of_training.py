"""Shared by the trainers' callbacks: the best checkpoint is as sparse as asked, schedules end."""

import math
import warnings
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from parasparse.training.controller import Controller
from parasparse.training.history import saved_number, saved_shape
from parasparse.verbs.masks import named_masks


class Sparsest:
    """The highest sparsity that a controller has reached.

    Attributes:
        total: share of zeros of all its tensors together.
    """

    def __init__(self, controller: Controller) -> None:
        self._controller = controller
        self._names = set(controller.state_dict()["start"])
        self.total = _zeros(controller.state_dict()["start"].values())
        self.has_risen()

    def has_risen(self) -> bool:
        """Whether an update since the last call has made the network sparser than ever."""
        before = self.total
        self.total = max([before, *(update.total for update in self._controller.history[-1:])])
        return self.total > before

    def warn_if_less(self, model: nn.Module) -> None:
        """Warn if the masks of `model` drop less than the controller has dropped."""
        masks = [mask for name, mask in named_masks(model) if name in self._names]
        bool_masks = [m for m in masks if m is not None and m.dtype == torch.bool]
        if len(bool_masks) < len(self._names):
            return  # gates, or masks that the user has removed
        now = _zeros(bool_masks)
        if now < self.total:
            warnings.warn(
                f"the checkpoint that was loaded at the end has a sparsity of {now:.1%}, and "
                f"training has reached {self.total:.1%}. Evaluate and save after the last update "
                "of the masks, or do not load the best checkpoint.",
                stacklevel=3,
            )


def warn_if_unfinished(controller: Controller) -> None:
    """Warn if training ends before the schedule of `controller` does."""
    missing = getattr(controller, "unfinished", str)()  # your own controllers may not have it
    if missing:
        warnings.warn(f"training has ended before the schedule: {missing}", stacklevel=3)


def _zeros(masks: Iterable[Tensor | Mapping[str, Any]]) -> float:
    counts = [(saved_number(mask), math.prod(saved_shape(mask))) for mask in masks]
    numel = sum(size for _, size in counts)
    return 1 - sum(kept for kept, _ in counts) / numel if numel else 0.0
