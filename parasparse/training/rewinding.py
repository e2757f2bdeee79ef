"""Snapshots of a model without its masks, to rewind to."""

import copy
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from parasparse.attach import reading


def snapshot(model: nn.Module) -> dict[str, Any]:
    """Return a copy of the state of `model`, BatchNorm's included, without masks and gates."""
    own = snapshot_keys(model)
    return {
        key: value.clone() if isinstance(value, Tensor) else copy.deepcopy(value)
        for key, value in model.state_dict().items()
        if key in own
    }


def snapshot_keys(model: nn.Module) -> set[str]:
    """Return the keys of a `snapshot` of `model`."""
    return set(model.state_dict()) - _mask_keys(model)


def rewind(model: nn.Module, saved: Mapping[str, Any]) -> None:
    """Give `model` back the state of a `snapshot`; masks and gates stay as they are."""
    model.load_state_dict({**model.state_dict(), **saved})


def _mask_keys(model: nn.Module) -> set[str]:
    """Return the keys of all that masks and gates hold."""
    masks = {id(stack.mask) for stack in reading.all_masked_stacks(model)}
    names = [
        name for name, module in model.named_modules(remove_duplicate=False) if id(module) in masks
    ]
    return {key for key in model.state_dict() if any(key.startswith(f"{name}.") for name in names)}
