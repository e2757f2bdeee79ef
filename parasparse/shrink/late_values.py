"""Masked weights whose values are computed when something reads them."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor


class LateValues:
    """Tensors whose values are computed when they are needed.

    Most weights are read by large products alone, which `StandIns` does not run.
    """

    def __init__(self) -> None:
        self._late: dict[int, Callable[[], object]] = {}  # by memory

    def like(self, tensor: Tensor, compute: Callable[[], Tensor]) -> Tensor:
        """Return a tensor of the shape of `tensor`, with memory that `compute` will fill."""
        late = torch.empty_like(tensor)
        # `.data`, so that the run doesn't seem to have changed the weight: see `Changes`.
        self._late[late.untyped_storage()._cdata] = lambda: late.data.copy_(compute())
        return late

    def need(self, tensors: Iterable[Tensor]) -> None:
        """Compute the values of `tensors`, which may be views of those that are late."""
        for tensor in tensors if self._late else ():
            if tensor.layout == torch.strided:
                compute = self._late.pop(tensor.untyped_storage()._cdata, None)
                if compute is not None:
                    compute()
