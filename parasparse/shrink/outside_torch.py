"""Values that leave torch, and tensors that are made of others without an operation of torch."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
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


@contextmanager
def followed_parameters(trace: Trace) -> Iterator[None]:
    """Follow the Parameters that a run makes of tensors, as `copy.deepcopy` does too.

    `nn.Parameter` calls no operation of torch.
    """
    plain, thread = nn.Parameter.__new__, threading.get_ident()

    def new(cls: type[nn.Parameter], *args: Any, **kwargs: Any) -> nn.Parameter:
        made: nn.Parameter = plain(cls, *args, **kwargs)
        data = args[0] if args else kwargs.get("data")
        if isinstance(data, Tensor) and threading.get_ident() == thread:
            with torch._C.DisableTorchFunction(), torch._C._DisableTorchDispatch():
                trace.set_facts(made, trace.facts(data))
        return made

    nn.Parameter.__new__ = new  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        nn.Parameter.__new__ = plain  # type: ignore[method-assign]


def _copied(trace: Trace, args: Any, kwargs: Any, out: Any) -> None:
    trace.set_facts(out, trace.facts(args[0]))


def _replaced(trace: Trace, args: Any, kwargs: Any, out: Any) -> None:
    """`tensor.data = other`."""
    tensor, other = args
    if isinstance(other, Tensor) and tensor.data_ptr() == other.data_ptr():
        trace.set_facts(tensor, trace.facts(other))


REPLACED: dict[str, Callable[..., None]] = {"__deepcopy__": _copied, "__set__": _replaced}
