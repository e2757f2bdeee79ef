"""Methods of a `torch.fx.GraphModule` whose own tensors are masked.

torch looks for these tensors among the module's Parameters and buffers when it copies the module,
and writes `forward` into the module's class. So it gets to see the dense module.
"""

import copy
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from parasparse.attach.dense_keys import accept_dense_keys_of
from parasparse.attach.stack import originals_in

Remask = Callable[[type], type]  # from the class of a dense module to that with masks


def graph_methods(base: Any, remask: Remask) -> dict[str, Any]:
    """Return the methods that a masked subclass of `base` needs. `remask` can be pickled."""

    def recompile(self: nn.Module) -> Any:
        with _seen_dense(self, base):
            return base.recompile(self)

    def __deepcopy__(self: nn.Module, memo: dict[int, Any]) -> nn.Module:  # noqa: N807
        with _seen_dense(self, base) as container:
            copied = base.__deepcopy__(self, memo)
        order = self.__dict__["_dense_order"]
        return _masked_again(copied, copy.deepcopy(container, memo), order, remask)

    def __copy__(self: nn.Module) -> nn.Module:  # noqa: N807
        with _seen_dense(self, base) as container:
            copied = base.__copy__(self)
        stacks = type(container)()
        stacks._modules.update(container._modules)
        return _masked_again(copied, stacks, self.__dict__["_dense_order"], remask)

    def __reduce_ex__(self: nn.Module, _: Any) -> Any:  # noqa: N807
        with _seen_dense(self, base) as container:
            make, (body, *rest) = base.__reduce__(self)
            body |= {name: body[name].copy() for name in ("_parameters", "_buffers", "_modules")}
            body["_load_state_dict_pre_hooks"] = OrderedDict()  # ours refers to the module
        order = self.__dict__["_dense_order"]
        return _rebuilt, (make, (body, *rest), container, order, remask)

    return {function.__name__: function for function in (recompile, __deepcopy__, __copy__)} | {
        "__reduce_ex__": __reduce_ex__
    }


@contextmanager
def _seen_dense(module: nn.Module, base: type) -> Iterator[Any]:
    """Let `module` look dense for the length of the block; yield its parametrizations."""
    held: Any = (module._parameters, module._buffers, module._modules)
    before, cls = [dict(tensors) for tensors in held], type(module)
    container: Any = module._modules.pop("parametrizations")
    for name, stack in container._modules.items():
        original = originals_in(stack)[0]
        (held[0] if isinstance(original, nn.Parameter) else held[1])[name] = original
    object.__setattr__(module, "__class__", base)
    try:
        yield container
    finally:
        object.__setattr__(module, "__class__", cls)
        for tensors, contents in zip(held, before, strict=True):
            tensors.clear()
            tensors.update(contents)


def _masked_again(module: nn.Module, container: Any, order: Any, remask: Remask) -> nn.Module:
    for name in container._modules:
        module._parameters.pop(name, None)
        module._buffers.pop(name, None)
    module._modules["parametrizations"] = container
    module.__dict__["_dense_order"] = order
    accept_dense_keys_of(module)
    object.__setattr__(module, "__class__", remask(type(module)))
    return module


def _rebuilt(make: Any, args: Any, container: Any, order: Any, remask: Remask) -> nn.Module:
    return _masked_again(make(*args), container, order, remask)
