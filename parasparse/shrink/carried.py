"""What a model keeps from one call for the next one: buffers and attributes that are tensors."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from parasparse.shrink.tracing import Trace


class Carried:
    """The buffers of a model and its attributes that are tensors, before a run.

    What the run puts in the place of one that it reads is read by the next run.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._before = _held(model)

    def pin(self, trace: Trace) -> None:
        """Keep the channels of what the run has put there."""
        for place, (tensor, memory) in _held(self._model).items():
            before, old = self._before.get(place, (tensor, memory))
            if (before is not tensor or old != memory) and trace.has_read(before):
                trace.means.use(tensor)
                for label in trace.labels(tensor):
                    trace.ties.pin(label, "the next call reads it")


def _held(model: nn.Module) -> dict[tuple[int, str], tuple[Tensor, int]]:
    """Return the tensors by module and name, and which memory each has."""
    return {
        (id(module), name): (value, value.untyped_storage()._cdata)
        for module in model.modules()
        for name, value in {**dict(module.named_buffers(recurse=False)), **vars(module)}.items()
        if isinstance(value, Tensor) and value.layout == torch.strided
    }
