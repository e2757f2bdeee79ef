"""Attaches a mask to a tensor of a module, and detaches it.

    module.weight == module.parametrizations.weight[-1](stored)        # attached
    module.parametrizations.weight.original                            # the Parameter it was before

The layout is the one of `torch.nn.utils.parametrize`, but torch's functions to register and remove
give each module its own class, call `set_` on the Parameter and reorder it, which breaks the cases
in tests/attach/test_attach.py. Here, modules of one base class with the same masked tensors share a
class, and the Parameter is moved without a change.
"""

import types
from typing import Any
from weakref import WeakValueDictionary

from torch import Tensor, nn
from torch.nn.utils import parametrize

from parasparse.attach.classes import base_class, is_masked_class, is_stock_class, masked_class
from parasparse.attach.container import Parametrizations, put_stack
from parasparse.attach.dense_keys import accept_dense_keys_of, refuse_dense_keys_of
from parasparse.attach.older_hooks import pruned_names, undo_prune
from parasparse.attach.pair_stack import PairParametrizationList
from parasparse.attach.reading import in_order, masked_stacks, stacks_of, tensor_names
from parasparse.attach.stack import MaskedParametrizationList, stack_of


def attach(module: nn.Module, name: str, mask: nn.Module) -> None:
    """Mask tensor `name` of `module`, which has no mask yet, with `mask`."""
    if name in pruned_names(module):
        undo_prune(module, name)
    keep_order(module)
    stack = stack_of(module, name)
    if stack is not None:  # such as weight_norm, which stays below the mask
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
    reclass(module)


def detach(module: nn.Module, name: str, baked: Tensor | None = None) -> None:
    """Remove the mask of tensor `name` of `module`, and keep other parametrizations.

    If `baked` is given, it replaces the stored tensor and all parametrizations.
    """
    stack = stack_of(module, name)
    assert isinstance(stack, MaskedParametrizationList)
    if isinstance(stack, PairParametrizationList):
        stack.separate()
    if baked is None and len(stack) > 1:
        del stack._modules[str(len(stack) - 1)]
        stack.__class__ = parametrize.ParametrizationList  # type: ignore[assignment]
        reclass(module)
        return
    tensor = stack.original if baked is None else baked
    persistent = "original" not in stack._non_persistent_buffers_set
    container: Any = module._modules["parametrizations"]
    del container._modules[name]
    if not container._modules:
        del module._modules["parametrizations"]
    parameters, buffers = module.__dict__["_dense_order"]
    reclass(module)
    # `register_parameter` fails in modules whose `__getattr__` finds the name elsewhere.
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


def reclass(module: nn.Module) -> None:
    """Give `module` the class for its masked tensors, and drop the state that only masks need."""
    masked = frozenset(name for name, _ in masked_stacks(module))
    names = frozenset(stacks_of(module))
    if names:
        container: Any = module._modules["parametrizations"]
        container.__class__ = Parametrizations if masked else nn.ModuleDict
    if masked:
        accept_dense_keys_of(module)
        if isinstance(module, nn.RNNBase):
            module.__dict__.pop("_flat_weights", None)  # computed at each read from now on
    else:
        refuse_dense_keys_of(module)
        module.__dict__.pop("_dense_order", None)
    base = base_class(module)
    new = masked_class(base, masked, names) if names else base
    old = type(module)
    if not (old is base or is_masked_class(old) or is_stock_class(old)):
        new = _on_top(old, base, new)
    # Not `module.__class__ = new`, because the `__setattr__` of the module may refuse it.
    object.__setattr__(module, "__class__", new)


def _on_top(old: type, base: type, new: type) -> type:
    """Rebuild `old`, which other code put on top, over `new` (test_a_class_put_on_top_stays)."""
    found = _ON_TOP.get((old, new))
    if found is None:
        (under,) = [b for b in old.__bases__ if issubclass(b, base)]
        bases = tuple(new if b is under else b for b in old.__bases__)
        name = old.__name__.replace(under.__name__, new.__name__)  # FSDPMaskedLinear
        own = {k: v for k, v in vars(old).items() if k not in ("__dict__", "__weakref__")}
        found = types.new_class(name, bases, exec_body=lambda namespace: namespace.update(own))
        _ON_TOP[old, new] = found
    return found


_ON_TOP: WeakValueDictionary[tuple[type, type], type] = WeakValueDictionary()


def keep_order(module: nn.Module) -> None:
    """Remember the order of the tensors of `module`, which masks change."""
    if "_dense_order" not in module.__dict__:
        module.__dict__["_dense_order"] = tensor_names(module)


def _reorder(held: dict[str, Any], first: list[str]) -> None:
    for name in in_order(list(held), first):
        held[name] = held.pop(name)
