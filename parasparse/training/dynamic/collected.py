"""The gradients that growth reads, collected in the step before an update."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from parasparse.acceleration.compact.uses import Uses, recorded
from parasparse.sharding.dtensors import count_nonzero
from parasparse.training.dynamic.compact_layer import CompactLayer
from parasparse.training.dynamic.layer import Layer
from parasparse.verbs.dense_gradients import DenseGradients, collecting
from parasparse.verbs.moving import wrapper_of


@dataclass(frozen=True)
class Collected:
    """What growth reads of each layer.

    Attributes:
        device: of the model.
        dense: gradients of masked weights.
        uses: uses of compact weights, by name.
        groups: the processes that train a compact weight, if DistributedDataParallel does.
    """

    device: torch.device
    dense: DenseGradients
    uses: dict[str, Uses]
    groups: dict[str, Any]

    def is_empty(self) -> bool:
        """Whether no process has had a backward pass."""
        return self._on_every_process(not self._tensors())

    def is_finite(self) -> bool:
        """Whether all gradients are finite on every process."""
        return self._on_every_process(
            not any(count_nonzero(~_values(tensor).isfinite()) for tensor in self._tensors())
        )

    def _tensors(self) -> list[Tensor]:
        found = [gradient for gradient in self.dense.values() if gradient is not None]
        return found + [tensor for uses in self.uses.values() for tensor in uses.tensors()]

    def _on_every_process(self, holds: bool) -> bool:
        # Dense gradients have been averaged, so they are the same on every process.
        for group in {id(group): group for group in self.groups.values()}.values():
            flag = torch.tensor(holds, dtype=torch.int32, device=self.device)
            torch.distributed.all_reduce(flag, op=torch.distributed.ReduceOp.MIN, group=group)
            holds = bool(flag)
        return holds


@contextmanager
def collected(model: nn.Module, layers: Mapping[str, Layer | CompactLayer]) -> Iterator[Collected]:
    """Collect the gradients of `layers` while the block lasts."""
    masked = [layer.target for layer in layers.values() if isinstance(layer, Layer)]
    compact = {n: layer for n, layer in layers.items() if isinstance(layer, CompactLayer)}
    with ExitStack() as stack:
        dense = stack.enter_context(collecting(model, masked))
        uses = {
            name: stack.enter_context(recorded([site.stack() for site in layer.target.sites]))
            for name, layer in compact.items()
        }
        wrappers = {name: wrapper_of(model, layer.target) for name, layer in compact.items()}
        groups = {name: each.process_group for name, each in wrappers.items() if each is not None}
        yield Collected(next(model.parameters()).device, dense, uses, groups)


def _values(grad: Tensor) -> Tensor:
    return grad.coalesce().values() if grad.is_sparse else grad
