"""Reads the tensors of a module: stored and effective values, masks, names."""

import re
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from parasparse.attach.evaluating import evaluating
from parasparse.attach.older_hooks import prune_mask, pruned_names
from parasparse.attach.stack import MaskedParametrizationList, originals_in, stack_of
from parasparse.masks.places import Kept


def masked_stacks(module: nn.Module) -> Iterator[tuple[str, MaskedParametrizationList]]:
    """Yield the name and the stack of each masked tensor of `module` itself."""
    for name, stack in stacks_of(module).items():
        if isinstance(stack, MaskedParametrizationList):
            yield name, stack


def mask_module(module: nn.Module, name: str) -> nn.Module | None:
    """Return the module that masks tensor `name` of `module`, or None."""
    stack = stack_of(module, name)
    return stack.mask if isinstance(stack, MaskedParametrizationList) else None


def stored(module: nn.Module, name: str) -> Tensor:
    """Return tensor `name` of `module` without its mask, but with other parametrizations."""
    stack = stack_of(module, name)
    if isinstance(stack, MaskedParametrizationList):
        with evaluating(stack):  # in training mode, spectral_norm iterates at each read
            return stack.stored()
    if name in pruned_names(module):
        return getattr(module, f"{name}_orig")  # type: ignore[no-any-return]
    with evaluating(stack):
        return getattr(module, name)  # type: ignore[no-any-return]


def effective(module: nn.Module, name: str) -> Tensor:
    """Return tensor `name` of `module` as the module reads it."""
    if name in pruned_names(module):  # the attribute is stale until the next forward
        return stored(module, name) * prune_mask(module, name)
    stack = stack_of(module, name)
    with evaluating(stack):
        if isinstance(stack, MaskedParametrizationList) and stack.is_compact:
            return stack.stored()
        return getattr(module, name)  # type: ignore[no-any-return]


def shape(module: nn.Module, name: str) -> torch.Size:
    """Return the shape of `stored`, without computing it for a compact weight."""
    mask = mask_module(module, name)
    return mask.places.shape if isinstance(mask, Kept) else stored(module, name).shape


def originals(module: nn.Module, name: str) -> tuple[Tensor, ...]:
    """Return the stored tensors of `name`. Tied tensors are the same objects."""
    stack = stack_of(module, name)
    if stack is not None:
        return originals_in(stack)
    # Not what the attribute gives: a class may compute that anew at each read, by a property.
    held: Any = module._parameters if name in module._parameters else module._buffers
    return (held[name] if name in held else stored(module, name),)


def tensor_names(module: nn.Module) -> tuple[list[str], list[str]]:
    """Return the names of the parameters and of the buffers of `module` as if it were dense."""
    parameters = [name for name, tensor in module._parameters.items() if tensor is not None]
    buffers = [name for name, tensor in module._buffers.items() if tensor is not None]
    for name in pruned_names(module):
        parameters[parameters.index(f"{name}_orig")] = name
        buffers.remove(f"{name}_mask")
    for name, stack in stacks_of(module).items():
        is_parameter = isinstance(originals_in(stack)[0], nn.Parameter)
        (parameters if is_parameter else buffers).append(name)
    first_parameters, first_buffers = module.__dict__.get("_dense_order", ((), ()))
    return in_order(parameters, first_parameters), in_order(buffers, first_buffers)


def stacks_of(module: nn.Module) -> dict[str, parametrize.ParametrizationList]:
    """Return the parametrizations of each tensor of `module` itself, with or without a mask.

    Raises:
        ValueError: a program that was exported or traced has masks there, which are plain tensors.
    """
    if "parametrizations" not in module._modules:
        return {}
    container: Any = module._modules["parametrizations"]
    if not isinstance(container, nn.ModuleDict):
        _check_without_masks(container)
    held = container._modules.items()
    return {n: stack for n, stack in held if isinstance(stack, parametrize.ParametrizationList)}


def _check_without_masks(container: nn.Module) -> None:
    """Raise ValueError if a program has a mask, or the logits of a gate, in `container`."""
    for name, _ in (*container.named_buffers(), *container.named_parameters()):
        found = re.fullmatch(r"([^.]+)\.\d+\.(mask|logits)", name)
        if found:
            raise ValueError(
                f'the mask of "{found[1]}" is part of an exported or traced program, where it can '
                "be neither read nor changed. Use the model that the program was made from, or "
                "`squash` that model before you export or trace it."
            )


def in_order(names: list[str], first: tuple[str, ...] | list[str]) -> list[str]:
    """Return `names` with the names in `first` moved to the front, in the order of `first`."""
    return [n for n in first if n in names] + [n for n in names if n not in first]
