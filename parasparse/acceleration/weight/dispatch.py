"""What the functions of torch do with a weight that multiplies sparsely."""

from collections.abc import Callable
from typing import Any

import torch

from parasparse.acceleration.weight import attention, convolution, layers, recurrent
from parasparse.acceleration.weight.following import Following
from parasparse.attach.accelerated import StandIn

# Functions that multiply sparsely. A handler returns NotImplemented to run the dense kernel.
HANDLERS: dict[Any, Callable[..., Any]] = {
    **layers.HANDLERS, **convolution.HANDLERS, **attention.HANDLERS, **recurrent.HANDLERS,
}  # fmt: skip
SET_DATA = torch.Tensor.data.__set__  # type: ignore[attr-defined]
# Their results are those of the weight itself, even when it has no dense values.
_GETTERS = """
    shape dtype device layout ndim requires_grad grad grad_fn is_leaf is_cpu is_cuda is_meta
    is_sparse is_quantized _base _version
""".split()  # noqa: SIM905
_METHODS = """
    size dim numel nelement element_size is_floating_point is_complex requires_grad_ register_hook
    is_inference __hash__ __len__ _is_view stride storage_offset is_contiguous
""".split()  # noqa: SIM905
METADATA = {
    *(getattr(torch.Tensor, name).__get__ for name in _GETTERS),
    *(getattr(torch.Tensor, name) for name in _METHODS),
}
_IN_PLACE = "add sub mul matmul truediv floordiv mod pow and or xor lshift rshift".split()  # noqa: SIM905
_WRITES = {"__setitem__", *(f"__i{name}__" for name in _IN_PLACE)}


def writes(func: Callable[..., Any]) -> bool:
    """Whether `func` changes the values of its first argument."""
    if func in METADATA:
        return False
    name = func.__name__
    if name.startswith("__"):
        return name in _WRITES or func == SET_DATA
    return name.endswith("_")


def stand_ins_in(tree: Any) -> list[Any]:
    """Return the weights among the arguments of a call."""
    if isinstance(tree, StandIn):
        return [tree]
    if isinstance(tree, dict):
        tree = tree.values()
    elif not isinstance(tree, (list, tuple)):
        return []
    return [weight for branch in tree for weight in stand_ins_in(branch)]


def replaced(tree: Any, plain: Callable[[Any], Any]) -> Any:
    """Return `tree` with `plain(weight)` for weights; torch's pytree would take 20 us."""
    if isinstance(tree, StandIn):
        return plain(tree)
    if isinstance(tree, dict):
        return {key: replaced(branch, plain) for key, branch in tree.items()}
    if type(tree) in (list, tuple):
        return type(tree)([replaced(branch, plain) for branch in tree])
    if isinstance(tree, Following):
        return Following(*(replaced(branch, plain) for branch in tree))
    return tree
