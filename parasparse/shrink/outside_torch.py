"""Values that leave torch, and tensors that are made of others without an operation of torch."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from parasparse.shrink.facts import UNKNOWN
from parasparse.shrink.tracing import Trace, lowest


def leave_torch(trace: Trace, tensor: Tensor, name: str) -> None:
    """Keep what a program reads as numbers, by the function `name`."""
    trace.constants_hold &= lowest(trace, [tensor]) != UNKNOWN
    if name not in ("tolist", "__reduce_ex__") and trace.is_stored(tensor):
        trace.write([tensor])  # whoever has its memory may write into it
    for label in trace.labels(tensor):
        trace.ties.pin(label, f"its values leave torch ({name})")


def follow_copies(trace: Trace, model: nn.Module) -> None:
    """Have copies of the Parameters of `model` that are made by `copy.deepcopy` be followed.

    `Parameter.__deepcopy__` calls functions of torch, but what makes a Parameter is none.
    """
    for parameter in model.parameters():
        vars(parameter)["__deepcopy__"] = partial(_copied_parameter, trace, parameter)


def _copied_parameter(trace: Trace, parameter: nn.Parameter, memo: dict[int, Any]) -> nn.Parameter:
    known = id(parameter) in memo
    copied: nn.Parameter = type(parameter).__deepcopy__(parameter, memo)
    if not known:
        with torch._C.DisableTorchFunction(), torch._C._DisableTorchDispatch():
            trace.set_facts(copied, trace.facts(parameter))
    return copied


def _copied(trace: Trace, args: Any, kwargs: Any, out: Any) -> None:
    trace.set_facts(out, trace.facts(args[0]))


def _replaced(trace: Trace, args: Any, kwargs: Any, out: Any) -> None:
    """`tensor.data = other`."""
    tensor, other = args
    if isinstance(other, Tensor) and tensor.data_ptr() == other.data_ptr():
        trace.set_facts(tensor, trace.facts(other))


REPLACED: dict[str, Callable[..., None]] = {"__deepcopy__": _copied, "__set__": _replaced}
