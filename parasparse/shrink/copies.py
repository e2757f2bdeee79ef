"""Copies of a model that have no masks, to be run."""

from __future__ import annotations

import copy
from collections import OrderedDict
from functools import partial
from typing import Any

from torch import Tensor, nn

from parasparse.attach import attaching
from parasparse.attach.classes import base_class
from parasparse.masks.mask import Mask
from parasparse.shrink.late_values import LateValues
from parasparse.targets.tensors import Target, named_modules
from parasparse.verbs.squash import squash


def full_copy(model: nn.Module) -> nn.Module:
    """Return a copy of `model` in eval mode, with masked values in place of masks."""
    twin = squash(copy.deepcopy(model))
    twin.eval()  # which returns nothing in a class whose `train` does not
    return twin


def shared_copy(model: nn.Module, tensors: list[Target], late: LateValues) -> nn.Module:
    """Return what `full_copy` does, much faster, whose Parameters may share memory with `model`.

    Nothing may write into them. `tensors` are those of the model. Of masked weights, `late`
    computes the values.
    """
    masked = [target for target in tensors if target.masks()]
    if not all(map(_is_plain, masked)):
        return full_copy(model)
    copied: dict[int, Any] = {}  # what `deepcopy` takes for an object, by id
    for target in masked:
        (original,), (mask,) = target.originals(), target.masks()
        stored = original.detach()
        compute = partial(mask, stored)
        value = late.like(stored, compute) if stored.ndim > 1 else compute()
        copied[id(original)] = _alike(original, value)
        for site in target.sites:
            copied[id(site.stack())] = site.stack()
    for parameter in model.parameters():
        if type(parameter) is nn.Parameter:
            copied.setdefault(id(parameter), _alike(parameter, parameter.detach()))
    usual: dict[type, bool] = {}
    for _, _, module, _ in reversed(list(named_modules(model))):  # what others contain comes first
        for each in (module._modules.get("parametrizations"), module):
            if each is None or id(each) in copied:
                continue
            if type(each) not in usual:
                usual[type(each)] = _is_copied_as_usual(each)
            if usual[type(each)]:
                _copy_into(copied, each)
    twin = copy.deepcopy(model, copied)
    for target in masked:
        for site in target.sites:
            (original,) = site.originals()
            attaching.detach(copied[id(site.module)], site.attr, copied[id(original)])
    twin.eval()
    return twin


def _is_copied_as_usual(module: nn.Module) -> bool:
    """Whether the class of a module leaves it to `deepcopy` how it is copied."""
    base = base_class(module)
    return not hasattr(base, "__deepcopy__") and all(
        getattr(base, name) is getattr(nn.Module, name)
        for name in ("__reduce_ex__", "__reduce__", "__getstate__")
    )


def _copy_into(copied: dict[int, Any], module: nn.Module) -> None:
    """Copy a module as `deepcopy` does, in a fraction of the time."""
    twin = copied[id(module)] = module.__new__(type(module))
    state = dict(module.__getstate__())
    for name, value in state.items():
        if name in _UNUSED:
            state[name] = value.copy()
        elif name in _DICTS and type(value) is dict:
            state[name] = {key: _copied(each, copied) for key, each in value.items()}
        elif type(value) is OrderedDict and not value:  # such as hooks
            state[name] = copied.setdefault(id(value), OrderedDict())
        elif type(value) not in _SIMPLE:
            state[name] = _copied(value, copied)
    twin.__setstate__(state)


def _copied(value: Any, copied: dict[int, Any]) -> Any:
    if id(value) in copied:
        return copied[id(value)]
    kind = type(value)
    if kind in _SIMPLE or (kind is tuple and _SIMPLE.issuperset(map(type, value))):
        return value
    if kind is set and not value:
        return copied.setdefault(id(value), set())
    return copy.deepcopy(value, copied)


_UNUSED = ("_state_dict_hooks", "_load_state_dict_pre_hooks")  # in a copy that only runs
_DICTS = ("_parameters", "_buffers", "_modules")
_SIMPLE = frozenset((bool, int, float, str, type(None)))


def _is_plain(target: Target) -> bool:
    """Whether a tensor has a bool mask, the same at each site, and no other parametrization."""
    mask, *others = target.masks()
    return (
        not others
        and isinstance(mask, Mask)
        and mask.is_bool
        and all(len(site.stack()) == 1 for site in target.sites)
        and len(target.originals()) == 1
    )


def _alike(tensor: Tensor, value: Tensor) -> Tensor:
    return nn.Parameter(value, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else value
