"""The class of a module while some of its tensors are masked: one per (base class, names).

torch makes a class for each module, closes over the module in it, and deletes attributes that
siblings may need. Here, modules with the same base class and names share a class. Equal blocks
compile in as many frames as when dense, and a copy, pickle or removal does not affect siblings.
"""

import sys
from functools import partial
from types import SimpleNamespace
from typing import Any
from weakref import WeakValueDictionary

from torch import Tensor, nn
from torch.fx import GraphModule
from torch.nn.utils import parametrize
from torch.nn.utils._named_member_accessor import swap_tensor

from parasparse.attach import call_scope
from parasparse.attach.graph_modules import graph_methods
from parasparse.attach.stack import MaskedParametrizationList, originals_in, stack_of
from parasparse.masks.hooks import is_hooked

_CLASSES: WeakValueDictionary[Any, type] = WeakValueDictionary()


def masked_class(base: type, masked: frozenset[str], names: frozenset[str]) -> type:
    """Return the subclass of `base` whose tensors `names` are parametrized, `masked` by a mask."""
    key = (base, masked, names)
    found = _CLASSES.get(key)
    if found is None:
        found = _CLASSES[key] = _make(base, masked, names)
    return found


def base_class(module: nn.Module) -> type:
    """Return the class that `module` had before it was parametrized."""
    for cls in type(module).__mro__:
        if is_masked_class(cls):
            return cls._base  # type: ignore[attr-defined, no-any-return]
        if is_stock_class(cls):
            return cls.__bases__[0]
    return type(module)


def is_masked_class(cls: type) -> bool:
    """Whether `masked_class` made `cls`, rather than a base of it."""
    return isinstance(cls, _SharedClass) and "_base" in vars(cls)


def is_stock_class(cls: type) -> bool:
    """Whether torch's `register_parametrization` made `cls`."""
    getstate = vars(cls).get("__getstate__")
    return getattr(getstate, "__module__", None) == parametrize.__name__


class _SharedClass(type):
    """Makes torch's `register_parametrization` and `remove_parametrizations` safe for siblings.

    Both edit `type(module)` (test_stock_registration_beside_ours_leaves_siblings_whole).
    """

    def __setattr__(cls, name: str, value: object) -> None:
        getter = value.fget if isinstance(value, property) else None
        if getattr(getter, "__module__", None) == parametrize.__name__:
            value = _tensor_property(name)  # falls back to the plain tensor in siblings
        super().__setattr__(name, value)

    def __delattr__(cls, name: str) -> None:
        getter = getattr(vars(cls).get(name), "fget", None)
        if getattr(getter, "__module__", None) != __name__:  # ours falls back to the plain tensor
            super().__delattr__(name)


def _tensor_property(name: str, *, keeps: bool = False) -> property:
    """Return a property that reads tensor `name` through its parametrizations, if it has any.

    If `keeps`, what is read is kept during a call of the module.
    """

    def read(self: nn.Module) -> Tensor:
        stack = stack_of(self, name)
        if stack is None:  # in a sibling, where the name may be any attribute
            plain = self.__dict__
            return plain[name] if name in plain else nn.Module.__getattr__(self, name)  # type: ignore[return-value]
        if not parametrize._cache_enabled:
            if not isinstance(stack, MaskedParametrizationList) or is_hooked(stack):
                return stack()  # type: ignore[no-any-return]
            return call_scope.read(self, stack) if keeps else stack.forward()
        key = (id(self), name)  # torch's own key, so that `cached()` works
        if parametrize._cache.get(key) is None:
            parametrize._cache[key] = stack()
        return parametrize._cache[key]  # type: ignore[return-value]

    def write(self: nn.Module, value: Tensor) -> None:
        stack = stack_of(self, name)
        if stack is None:
            self.__dict__[name] = value
        else:
            stack.right_inverse(value)

    return property(read, write)


def _make(base: Any, masked: frozenset[str], names: frozenset[str]) -> type:
    keeps = bool(masked) and call_scope.may_read_twice(base)
    namespace: dict[str, Any] = {name: _tensor_property(name, keeps=keeps) for name in names}
    namespace |= {
        "__setattr__": _setattr_over(base, masked),
        "__reduce_ex__": _reduce_ex_over(base, masked, names),
        "__module__": base.__module__,
        "__doc__": base.__doc__,
        "_base": base,
    }
    if masked:
        namespace["__delattr__"] = _del_over(base.__delattr__, masked | {"parametrizations"})
    if issubclass(base, nn.RNNBase) and masked:
        namespace |= _RNN
        if base.check_input is nn.RNNBase.check_input:
            namespace["check_input"] = _check_input
    if keeps:
        namespace["__call__"] = call_scope.call_over(base)
    if issubclass(base, nn.ParameterDict):
        namespace["__delitem__"] = _del_over(base.__delitem__, masked)
    if issubclass(base, GraphModule):
        namespace |= graph_methods(base, partial(masked_class, masked=masked, names=names))
    metaclass: Any = _SharedClass
    if type(base) is not type:  # such as ABCMeta
        metaclass = type("_SharedClass", (_SharedClass, type(base)), {})
    # The class may want arguments of its subclasses, which this one does not have.
    is_asked = getattr(base.__init_subclass__, "__func__", None) is not None
    bases = (_NotAsked, base) if is_asked else (base,)
    kind = "Masked" if masked else "Parametrized"
    shared: type = metaclass(f"{kind}{base.__name__}", bases, namespace)
    if is_asked:
        shared.__bases__ = (base,)  # torch's `type_before_parametrizations` reads the first
    return shared


class _NotAsked:
    """Keeps `__init_subclass__` of the bases after it from running."""

    def __init_subclass__(cls) -> None: ...


def _del_over(delete: Any, masked: frozenset[str]) -> Any:
    def refuse_or_delete(self: nn.Module, name: str) -> None:
        if name in masked:
            state = "holds masks" if name == "parametrizations" else "is masked"
            raise RuntimeError(
                f'"{name}" {state} and cannot be deleted. Call parasparse.squash or '
                "parasparse.unsparsify first."
            )
        delete(self, name)

    return refuse_or_delete


_SIZES = ("num_embeddings", "embedding_dim", "in_features", "out_features")


def _check_size(module: nn.Module, name: str, value: object) -> None:
    """Raise RuntimeError if a masked layer is being resized.

    Whoever does so has written to `weight.data`, which is lost.
    """
    if vars(module).get(name, value) != value:
        raise RuntimeError(
            f"the weight of {type(module).__name__} is masked and cannot be resized: `{name}` must "
            f"stay {vars(module)[name]}; got {value}. Call parasparse.squash or "
            "parasparse.unsparsify first."
        )


def _setattr_over(base: Any, masked: frozenset[str]) -> Any:
    def __setattr__(self: nn.Module, name: str, value: object) -> None:  # noqa: N807
        if name in _SIZES and "weight" in masked:
            _check_size(self, name, value)
        stack = stack_of(self, name) if name in masked else None
        if not isinstance(stack, MaskedParametrizationList):
            base.__setattr__(self, name, value)
        elif sys._getframe(1).f_code is swap_tensor.__code__:
            # `functional_call` swaps values for the length of a call; a tie would outlive it.
            stack.swap(value)
        elif isinstance(value, nn.Parameter):
            stack.retie(value)
        else:
            base.__setattr__(self, name, value)

    return __setattr__


def _reduce_ex_over(base: Any, masked: frozenset[str], names: frozenset[str]) -> Any:
    def __reduce_ex__(self: nn.Module, protocol: Any) -> Any:  # noqa: N807
        # The shared class cannot be imported by name, so `_rebuild` makes it again.
        reduced = base.__reduce_ex__(self, protocol)
        if not is_masked_class(type(self)) or not isinstance(reduced, tuple):
            return reduced
        make, args, *rest = reduced
        plain = tuple(base if arg is type(self) else arg for arg in args)
        return _rebuild, (masked, names, make, plain), *rest

    return __reduce_ex__


def _rebuild(masked: frozenset[str], names: frozenset[str], make: Any, args: Any) -> Any:
    module = make(*args)
    object.__setattr__(module, "__class__", masked_class(type(module), masked, names))
    return module


def _flat_weights(self: nn.RNNBase) -> list[Tensor | None]:
    return [getattr(self, name, None) for name in self._flat_weights_names]


def _do_nothing(self: nn.RNNBase, *_: object) -> None:
    """Keep no list of weights, which would get out of date."""


def _check_input(self: nn.RNNBase, input: Tensor, batch_sizes: Tensor | None) -> None:  # noqa: A002
    """Check as RNNBase does, but read a stored weight: only its dtype matters."""
    name = self._flat_weights_names[0]
    stack = stack_of(self, name)
    like = getattr(self, name) if stack is None else originals_in(stack)[0]
    seen: Any = SimpleNamespace(input_size=self.input_size, _flat_weights=[like])
    nn.RNNBase.check_input(seen, input, batch_sizes)


# RNNs keep a list of their weights. It would contain stale masked tensors, which also prevent a
# deepcopy (test_an_rnn_follows_its_masks_and_training,
# test_an_rnn_deepcopies_after_a_forward_with_gradients).
_RNN: dict[str, Any] = {
    "_flat_weights": property(_flat_weights, _do_nothing),
    "_init_flat_weights": _do_nothing,
    "_update_flat_weights": _do_nothing,
    "flatten_parameters": _do_nothing,
}
