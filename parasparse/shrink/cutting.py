"""Cuts the tensors of a model by a plan."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor, nn

from parasparse import optim
from parasparse.masks.mask import Mask
from parasparse.shrink.attention import prepare
from parasparse.shrink.attributes import get_attribute
from parasparse.shrink.constants import Constants
from parasparse.shrink.expressions import Attribute
from parasparse.shrink.parts import rescaled, selected
from parasparse.shrink.plan import AttributeRow, Shrinkage, ShrinkRow
from parasparse.shrink.undo import Undo, resize_mask, set_size, store
from parasparse.targets.tensors import Target, tensors_of
from parasparse.text import nearest
from parasparse.verbs.writable import check_writable

_WAY_OUT = {  # whether the model should be small already: what to do if it does not fit
    False: "Build the model as it was when the plan was made",
    True: "Pass the model that was cut by this plan",
}


def check_fits(model: nn.Module, plan: Shrinkage, optimizer: Any, *, small: bool = False) -> None:
    """Raise an error if `model` cannot be cut by `plan`, or if `small`, made full again.

    Raises:
        TypeError, ValueError: see `optim.check_cuttable`.
        ValueError: the model has other tensors than the plan.
        RuntimeError: a tensor cannot be written to.
    """
    targets = named_tensors(model)
    for row in plan.rows:
        if row.name not in targets:
            raise ValueError(
                f'the plan names the tensor "{row.name}", which the model does not have'
                f"{nearest(row.name, targets)}. {_WAY_OUT[small]}."
            )
        target, want = targets[row.name], row.new_shape if small else row.shape
        if tuple(target.shape) != want:
            raise ValueError(
                f'"{row.name}" must have the shape {want} of the plan; it has '
                f"{tuple(target.shape)}. {_WAY_OUT[small]}."
            )
        check_writable(target, "unshrink" if small else "shrink")
    for size in plan.attributes:
        _check_size(model, size, small=small)
    if optimizer is not None:
        tensors = [targets[row.name].originals()[0] for row in plan.rows]
        optim.check_cuttable(optimizer, [t for t in tensors if isinstance(t, nn.Parameter)])


def _check_size(model: nn.Module, row: AttributeRow, *, small: bool) -> None:
    want = row.new if small else row.old
    try:
        value = get_attribute(model, Attribute(row.path, row.name, row.index))
    except (AttributeError, KeyError, IndexError, TypeError):
        value = "missing"
    if value != want:
        raise ValueError(
            f"the plan has {row}, so the attribute must be {want}; it is {value}. "
            f"{_WAY_OUT[small]}."
        )


def named_tensors(model: nn.Module) -> dict[str, Target]:
    """Return each tensor of `model` under each of its names."""
    return {name: t for t in tensors_of(model, pairs=False) for name in reversed(t.names)}


def cut(
    model: nn.Module, plan: Shrinkage, constants: Constants, optimizer: Any, undo: Undo
) -> None:
    """Change the tensors, masks, optimizer state and attributes of `model`."""
    targets = named_tensors(model)
    prepare(model, plan, undo)
    for name, delta in constants.added.items():
        (tensor,) = targets[name].originals()
        if optimizer is not None:
            undo.steps.append(optim.add_to_copies(optimizer, tensor, delta))
        store(tensor, tensor.detach() + delta.to(tensor), tensor.grad, undo)
    masks: dict[int, Mask] = {}  # a pair has one mask
    for row in plan.rows:
        (tensor,) = targets[row.name].originals()
        part = partial(selected, row=row)
        for mask in targets[row.name].masks():
            assert isinstance(mask, Mask)
            assert mask.mask is not None
            if id(mask) not in masks:
                masks[id(mask)] = mask
                resize_mask(mask, part(mask.mask), undo)
        if optimizer is not None:
            undo.steps.append(optim.cut(optimizer, tensor, part, partial(_small, row=row)))
        grad = None if tensor.grad is None else part(tensor.grad) / row.scale
        store(tensor, _small(tensor.detach(), row), grad, undo)
    for attribute in plan.attributes:
        set_size(model, attribute, attribute.new, undo)


def _small(tensor: Tensor, row: ShrinkRow) -> Tensor:
    return rescaled(selected(tensor, row), row)
