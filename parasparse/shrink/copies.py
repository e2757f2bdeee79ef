"""Copies of a model that have no masks, to be run."""

from __future__ import annotations

import copy
from collections import OrderedDict
from typing import Any

from torch import Tensor, nn

from parasparse.attach import attaching
from parasparse.targets.tensors import Target, named_modules
from parasparse.verbs.squash import squash


def full_copy(model: nn.Module) -> nn.Module:
    """Return a copy of `model` in eval mode, with masked values in place of masks."""
    return squash(copy.deepcopy(model)).eval()


def shared_copy(model: nn.Module, tensors: list[Target]) -> nn.Module:
    """Return what `full_copy` does, much faster, whose Parameters may share memory with `model`.

    Nothing may write into them. `tensors` are those of the model.
    """
    masked = [target for target in tensors if target.masks()]
    if not all(map(_is_plain, masked)):
        return full_copy(model)
    copied: dict[int, Any] = {}  # what `deepcopy` takes for an object, by id
    for target in masked:
        (original,) = target.originals()
        copied[id(original)] = _alike(original, target.effective())
        for site in target.sites:
            copied[id(site.stack())] = site.stack()
    for parameter in model.parameters():
        if type(parameter) is nn.Parameter:
            copied.setdefault(id(parameter), _alike(parameter, parameter.detach()))
    for _, _, module, _ in named_modules(model):
        for value in vars(module).values():
            if type(value) is OrderedDict and not value:  # its hooks: `deepcopy` takes long
                copied[id(value)] = OrderedDict()
    twin = copy.deepcopy(model, copied)
    for target in masked:
        for site in target.sites:
            (original,) = site.originals()
            attaching.detach(copied[id(site.module)], site.attr, copied[id(original)])
    return twin.eval()


def _is_plain(target: Target) -> bool:
    """Whether a tensor has a bool mask, the same at each site, and no other parametrization."""
    return (
        len(target.masks()) == 1
        and target.has_bool_mask
        and all(len(site.stack()) == 1 for site in target.sites)
        and len(target.originals()) == 1
    )


def _alike(tensor: Tensor, value: Tensor) -> Tensor:
    return nn.Parameter(value, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else value
