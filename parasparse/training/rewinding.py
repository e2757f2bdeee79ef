"""Snapshots of a model without its masks, which training can return to."""

import copy
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from parasparse.attach.finding import all_masked_stacks


def snapshot(model: nn.Module) -> dict[str, Any]:
    """Return a copy of the state of `model`, including BatchNorm's, without masks and gates."""
    own = snapshot_keys(model)
    return {
        key: value.clone() if isinstance(value, Tensor) else copy.deepcopy(value)
        for key, value in model.state_dict().items()
        if key in own
    }


def snapshot_keys(model: nn.Module) -> set[str]:
    """Return the keys of a `snapshot` of `model`."""
    masks = {id(stack.mask) for stack in all_masked_stacks(model)}
    modules = model.named_modules(remove_duplicate=False)
    prefixes = tuple(f"{name}." for name, module in modules if id(module) in masks)
    return {key for key in model.state_dict() if not key.startswith(prefixes)}


def rewind(model: nn.Module, saved: Mapping[str, Any]) -> None:
    """Load a `snapshot` into `model`; masks and gates stay as they are."""
    model.load_state_dict({**model.state_dict(), **saved})
