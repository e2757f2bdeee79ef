"""Changes to a model that can be undone, one at a time."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from parasparse.attach.storing import give
from parasparse.masks.mask import Mask
from parasparse.shrink.attributes import get_attribute, set_attribute
from parasparse.shrink.expressions import Attribute
from parasparse.shrink.plan import AttributeRow


class Undo:
    """Steps that undo what has been done."""

    def __init__(self) -> None:
        self.steps: list[Callable[[], None]] = []

    def run(self) -> None:
        """Undo everything, the last step first."""
        while self.steps:
            self.steps.pop()()


def store(tensor: Tensor, value: Tensor, grad: Tensor | None, undo: Undo) -> None:
    """Give `tensor` a new value and gradient, which may have another shape."""
    old, old_grad = tensor.data, tensor.grad

    def restore() -> None:
        give(tensor, old, old_grad)

    undo.steps.append(restore)
    give(tensor, value, grad)


def resize_mask(mask: Mask, value: Tensor, undo: Undo) -> None:
    """Give a mask another shape."""
    old = mask.mask
    assert old is not None
    undo.steps.append(lambda: mask.resize_(old))
    mask.resize_(value)


def set_size(model: nn.Module, row: AttributeRow, value: float | None, undo: Undo) -> None:
    """Set an attribute of a module or config."""
    attribute = Attribute(row.path, row.name, row.index)
    old = get_attribute(model, attribute)
    undo.steps.append(lambda: set_attribute(model, attribute, old))
    set_attribute(model, attribute, value)
