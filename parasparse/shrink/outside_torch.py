"""Values that leave torch, and tensors that are made of others without an operation of torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from parasparse.shrink.facts import UNKNOWN
from parasparse.shrink.tracing import Trace, lowest


def leave_torch(trace: Trace, tensor: Tensor, name: str) -> None:
    """Keep what a program reads as numbers, by the function `name`."""
    trace.constants_hold &= lowest(trace, [tensor]) != UNKNOWN
    if name not in ("tolist", "__reduce_ex__") and trace.is_stored(tensor):
        trace.write([tensor])  # whoever has its memory may write into it
    for label in trace.labels(tensor):
        trace.ties.pin(label, f"its values leave torch ({name})")


def _copied(trace: Trace, args: Any, kwargs: Any, out: Any) -> None:
    trace.set_facts(out, trace.facts(args[0]))


def _replaced(trace: Trace, args: Any, kwargs: Any, out: Any) -> None:
    """`tensor.data = other`."""
    tensor, other = args
    if isinstance(other, Tensor) and tensor.data_ptr() == other.data_ptr():
        trace.set_facts(tensor, trace.facts(other))


REPLACED: dict[str, Callable[..., None]] = {"__deepcopy__": _copied, "__set__": _replaced}
