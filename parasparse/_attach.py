"""Hangs a mask on a tensor of a module, and takes it off again.

    module.weight == module.parametrizations.weight[-1](stored)        # attached
    module.parametrizations.weight.original                            # the Parameter it was before

The layout is that of `torch.nn.utils.parametrize`, the registration is not: its `register` and
`remove` give each module a class of its own, call `set_` on the Parameter and reorder it (the tests
of tests/test_attach.py name what breaks). Here modules of one base class with the same masked
tensors share one class, and the Parameter is moved, never touched.
"""

from __future__ import annotations

import types
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakValueDictionary

from torch import Tensor, nn
from torch.nn.utils import parametrize

from parasparse._dense_keys import accept_dense_keys
from parasparse._foreign import prune_mask, pruned_names, undo_prune
from parasparse._masked_class import base_class, is_masked_class, is_stock_class, masked_class
from parasparse._pair_stack import PairParametrizationList
from parasparse._stack import MaskedParametrizationList, original_names, put_stack, stack_of


def masked_stacks(module: nn.Module) -> Iterator[tuple[str, MaskedParametrizationList]]:
    """Yield the name and the stack of each tensor of `module` itself that carries a mask."""
    for name, stack in _stacks(module).items():
        if isinstance(stack, MaskedParametrizationList):
            yield name, stack


def mask_module(module: nn.Module, name: str) -> nn.Module | None:
    """Return what masks tensor `name` of `module`, or None."""
    stack = stack_of(module, name)
    return stack.mask if isinstance(stack, MaskedParametrizationList) else None


def stored(module: nn.Module, name: str) -> Tensor:
    """Return tensor `name` of `module` without its mask, whatever lies underneath."""
    stack = stack_of(module, name)
    if isinstance(stack, MaskedParametrizationList):
        with _at_rest(stack):
            return stack.stored()
    if name in pruned_names(module):
        return getattr(module, f"{name}_orig")  # type: ignore[no-any-return]
    with _at_rest(stack):
        return getattr(module, name)  # type: ignore[no-any-return]


def effective(module: nn.Module, name: str) -> Tensor:
    """Return tensor `name` of `module` as the module sees it."""
    if name in pruned_names(module):  # the attribute is stale until the next forward
        return stored(module, name) * prune_mask(module, name)
    with _at_rest(stack_of(module, name)):
        return getattr(module, name)  # type: ignore[no-any-return]


@contextmanager
def _at_rest(stack: nn.Module | None) -> Iterator[None]:
    """Read without changing anything: spectral_norm in training mode iterates at each reading."""
    training = [] if stack is None else [module for module in stack.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


def originals(module: nn.Module, name: str) -> tuple[Tensor, ...]:
    """Return the tensors that hold the values of `name`: their identities tell ties."""
    stack = stack_of(module, name)
    if stack is None:
        return (stored(module, name),)
    return tuple(getattr(stack, key) for key in original_names(stack))


def tensor_names(module: nn.Module) -> tuple[list[str], list[str]]:
    """Return the names of the parameters and of the buffers of `module`, as when it was dense."""
    parameters = [name for name, tensor in module._parameters.items() if tensor is not None]
    buffers = [name for name, tensor in module._buffers.items() if tensor is not None]
    for name in pruned_names(module):
        parameters[parameters.index(f"{name}_orig")] = name
        buffers.remove(f"{name}_mask")
    for name, stack in _stacks(module).items():
        held = getattr(stack, original_names(stack)[0])
        (parameters if isinstance(held, nn.Parameter) else buffers).append(name)
    first_parameters, first_buffers = module.__dict__.get("_dense_order", ((), ()))
    return _in_order(parameters, first_parameters), _in_order(buffers, first_buffers)


def attach(module: nn.Module, name: str, mask: nn.Module) -> None:
    """Put `mask` between tensor `name` of `module` and its reader; the tensor has none so far."""
    if name in pruned_names(module):
        undo_prune(module, name)
    if "_dense_order" not in module.__dict__:
        module.__dict__["_dense_order"] = tensor_names(module)
    stack = stack_of(module, name)
    if stack is not None:  # weight_norm, say: it stays, underneath
        stack._modules[str(len(stack))] = mask
        stack.__class__ = MaskedParametrizationList
    else:
        persistent = name not in module._non_persistent_buffers_set
        held = module._parameters if name in module._parameters else module._buffers
        tensor = held.pop(name)
        assert tensor is not None
        stack = MaskedParametrizationList(tensor, mask, persistent=persistent)
        put_stack(module, name, stack)
    stack.train(module.training)
    if not any(_is_key_hook(hook) for hook in module._load_state_dict_pre_hooks.values()):
        module.register_load_state_dict_pre_hook(accept_dense_keys)
    _reclass(module)


def detach(module: nn.Module, name: str, baked: Tensor | None = None) -> None:
    """Take the mask off tensor `name` of `module`.

    Args:
        module: the owner.
        name: its tensor.
        baked: takes the place of everything that the stack holds; None: the stored tensor comes
            back, under what else is parametrized.
    """
    stack = stack_of(module, name)
    assert isinstance(stack, MaskedParametrizationList)
    if isinstance(stack, PairParametrizationList):
        stack.separate()
    if baked is None and len(stack) > 1:
        del stack._modules[str(len(stack) - 1)]
        stack.__class__ = parametrize.ParametrizationList  # type: ignore[assignment]
        _reclass(module)
        return
    tensor = stack.original if baked is None else baked
    persistent = "original" not in stack._non_persistent_buffers_set
    del _stacks(module)[name]
    if not _stacks(module):
        del module._modules["parametrizations"]
    parameters, buffers = module.__dict__["_dense_order"]
    _reclass(module)
    # Not register_parameter: it asks the module for the name, and some delegate what they lack.
    if isinstance(tensor, nn.Parameter):
        module._parameters[name] = tensor
        _reorder(module._parameters, parameters)
    else:
        module._buffers[name] = tensor
        _reorder(module._buffers, buffers)
        if not persistent:
            module._non_persistent_buffers_set.add(name)
    if isinstance(module, nn.RNNBase) and not any(True for _ in masked_stacks(module)):
        module._init_flat_weights()


def _stacks(module: nn.Module) -> dict[str, parametrize.ParametrizationList]:
    if "parametrizations" not in module._modules:
        return {}
    return module._modules["parametrizations"]._modules  # type: ignore[union-attr, return-value]


def _reclass(module: nn.Module) -> None:
    """Give `module` the class that fits what is masked on it, and drop what only masks need."""
    masked = frozenset(name for name, _ in masked_stacks(module))
    if not masked:
        module.__dict__.pop("_dense_order", None)
        hooks = module._load_state_dict_pre_hooks
        for key in [key for key, hook in hooks.items() if _is_key_hook(hook)]:
            del hooks[key]
    elif isinstance(module, nn.RNNBase):
        module.__dict__.pop("_flat_weights", None)  # masked, they are computed at each reading
    base = base_class(module)
    names = frozenset(_stacks(module))
    new = masked_class(base, masked, names) if names else base
    old = type(module)
    if old is base or is_masked_class(old) or is_stock_class(old):
        # Not `module.__class__ = new`: a module's own __setattr__ may refuse.
        object.__setattr__(module, "__class__", new)
    else:
        object.__setattr__(module, "__class__", _on_top(old, base, new))


def _on_top(old: type, base: type, new: type) -> type:
    """Return the class that somebody put on top, over `new` (test_a_class_put_on_top_stays)."""
    found = _ON_TOP.get((old, new))
    if found is None:
        (under,) = [b for b in old.__bases__ if issubclass(b, base)]
        bases = tuple(new if b is under else b for b in old.__bases__)
        name = old.__name__.replace(under.__name__, new.__name__)  # FSDPMaskedLinear
        found = types.new_class(name, bases, exec_body=lambda ns: ns.update(_own(old)))
        _ON_TOP[old, new] = found
    return found


_ON_TOP: WeakValueDictionary[tuple[type, type], type] = WeakValueDictionary()


def _own(cls: type) -> dict[str, Any]:
    return {k: v for k, v in vars(cls).items() if k not in ("__dict__", "__weakref__")}


def _is_key_hook(hook: Any) -> bool:
    return getattr(hook, "hook", None) is accept_dense_keys


def _in_order(names: list[str], first: tuple[str, ...] | list[str]) -> list[str]:
    return [n for n in first if n in names] + [n for n in names if n not in first]


def _reorder(held: dict[str, Any], first: list[str]) -> None:
    for name in _in_order(list(held), first):
        held[name] = held.pop(name)
