"""Shared by the trainers' callbacks: masks from checkpoints, and controllers that resume."""

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from parasparse.checkpoints.found_masks import attach_found
from parasparse.distributed import digest
from parasparse.optim import load_named_state, named_state
from parasparse.text import listed
from parasparse.training.controller import Controller
from parasparse.verbs.masks import named_masks


def accept_masks(model: nn.Module) -> RemovableHandle:
    """Make `model.load_state_dict` attach the masks it finds, until the handle is removed.

    Trainers load a checkpoint before they create the optimizer, which a controller needs.
    """
    return model.register_load_state_dict_pre_hook(_attach)  # type: ignore[no-any-return]


def _attach(module: nn.Module, state_dict: dict[str, Any], *_: object) -> None:
    attach_found(module, state_dict)


def state_of(
    controller: Controller, model: nn.Module, optimizers: Sequence[torch.optim.Optimizer]
) -> dict[str, Any]:
    """Return the state of a run for `resumed` and `reorder`."""
    return {
        "class": type(controller).__name__,
        "controller": controller.state_dict(),
        "masks": _digests(model),
        "order": [_order(model, optimizer) for optimizer in optimizers],
    }


def is_of(controller: Controller | None, model: nn.Module) -> bool:
    """Whether `controller` is for this model, which still has its masks."""
    if controller is None:
        return False
    if model not in (controller.model, getattr(controller.model, "module", None)):
        return False
    names = {name for name, _ in named_masks(model)}
    return names >= set(controller.state_dict()["start"])


def resumed(
    model: nn.Module, make: Callable[[], Controller], states: Sequence[Mapping[str, Any]]
) -> Controller:
    """Return a controller from `make` that continues from its state; `model` stays as it is.

    `states` are of controllers of one run; its own is the one for the same tensors.

    Raises RuntimeError if `model` has other masks, or `make` makes a controller of another class.
    """
    ours = _digests(model)
    other = [name for name, found in states[0]["masks"].items() if ours.get(name) != found]
    if other:
        raise RuntimeError(
            "the state of a controller must be loaded together with its masks; the masks of "
            f"{listed(other)} are not in the model. Load the checkpoint that it was saved with. "
            "For a PEFT model, trainers save only the adapters."
        )
    kept = copy.deepcopy(model.state_dict())
    controller = make()
    names = list(controller.state_dict()["start"])
    state = next((each for each in states if tensors_in(each) == names), states[0])
    if type(controller).__name__ != state["class"]:
        raise RuntimeError(
            f"the factory must make the saved kind of controller, {state['class']}; it made "
            f"{type(controller).__name__}."
        )
    model.load_state_dict(kept)
    controller.load_state_dict(state["controller"])
    return controller


def tensors_in(state: Mapping[str, Any]) -> list[str]:
    """Return the names of the tensors of a controller whose state `state_of` has returned."""
    return list(state["controller"]["start"])


def reorder(
    model: nn.Module, optimizer: torch.optim.Optimizer, order: list[list[str]] | None
) -> None:
    """Give each parameter its own state after `optimizer` has loaded a state by position.

    An optimizer that is created after masks are attached has its parameters in another order.
    `order` lists the names of the parameters of each group when the state was saved.
    """
    if order is None or order == _order(model, optimizer):
        return
    saved = optimizer.state_dict()
    names = [name for group in order for name in group]
    state = {names[number]: values for number, values in saved["state"].items()}
    groups = [
        {**group, "params": own} for group, own in zip(saved["param_groups"], order, strict=True)
    ]
    load_named_state(model, optimizer, {"state": state, "param_groups": groups})


def _order(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[list[str]] | None:
    try:
        return [group["params"] for group in named_state(model, optimizer)["param_groups"]]
    except ValueError:  # it also holds parameters outside the model
        return None


def _digests(model: nn.Module) -> dict[str, str]:
    """Return digests of the bool masks; masks of gates are computed and differ by device."""
    return {
        name: digest(mask)
        for name, mask in named_masks(model)
        if mask is not None and mask.dtype == torch.bool
    }
