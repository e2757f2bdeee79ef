"""`dense_gradients`: gradients of masked weights, masked entries included, in a `with` block."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from parasparse.attach.compacted import check_not_compact
from parasparse.attach.finding import all_masked_stacks
from parasparse.attach.fsdp_gradients import reduced
from parasparse.attach.probes import probed
from parasparse.attach.stack import MaskedParametrizationList
from parasparse.sharding.dtensors import on_local
from parasparse.sharding.fsdp import managed_parameters, reshard
from parasparse.targets.reach import masked_targets
from parasparse.targets.tensors import Target


class DenseGradients(Mapping[str, Tensor | None]):
    """Gradients of masked weights by plain name; None before the first backward pass."""

    def __init__(self, probes: dict[str, list[Tensor | _Sum]]) -> None:
        self._probes = probes

    def __getitem__(self, name: str) -> Tensor | None:
        grads = [probe.grad for probe in self._probes[name]]
        found = [grad for grad in grads if grad is not None]
        if len(grads) == 1 or not found:
            return grads[0]
        # A pair has the gradient of a complex weight, by torch's convention.
        real, imaginary = (torch.zeros_like(found[0]) if g is None else g for g in grads)
        return on_local(torch.complex, real, imaginary)

    def __iter__(self) -> Iterator[str]:
        return iter(self._probes)

    def __len__(self) -> int:
        return len(self._probes)


@contextmanager
def dense_gradients(model: nn.Module) -> Iterator[DenseGradients]:
    """Collect the gradients of masked weights, masked entries included.

    `.grad` stays masked. Gradients accumulate over the backward passes in the block, times the
    scale of a GradScaler. Gradients of a DistributedDataParallel are averaged over its processes
    once, at the end of the block, which all processes must reach. If `fully_shard` manages the
    weights, gradients are averaged like `.grad`, and each process has its part.

    Yields:
        A mapping from plain name to gradient, None before the first backward pass.

    Raises:
        RuntimeError: a block is already open for the model, a weight is compact, or `fully_shard`
            manages weights with masks that are not bool.

    Examples:
        >>> model = sparsify(nn.Linear(2, 1, bias=False), {"weight": [[True, False]]})
        >>> with dense_gradients(model) as grads:
        ...     model(torch.ones(1, 2)).sum().backward()
        >>> grads["weight"].tolist(), model.parametrizations.weight.original.grad.tolist()
        ([[1.0, 1.0]], [[1.0, 0.0]])

    Reference: Evci et al., "Rigging the Lottery", 2020, arXiv:1911.11134, section 3 (4).
    """
    check_not_compact(model, "`dense_gradients`")
    with collecting(model, masked_targets(model)) as grads:
        yield grads


@contextmanager
def collecting(model: nn.Module, targets: list[Target]) -> Iterator[DenseGradients]:
    """Do what `dense_gradients` does for some masked tensors of `model`."""
    reshard(model)
    sharded, probes = managed_parameters(model), {}
    with ExitStack() as stack:
        for target in targets:
            probes[target.name] = [_armed(part, sharded, stack) for part in target.stacks()]
        yield DenseGradients(probes)
    for module in model.modules():
        if isinstance(module, DistributedDataParallel):
            inside = {id(stack) for stack in all_masked_stacks(module)}
            for target in targets:
                for stacks, probe in zip(target.stacks(), probes[target.name], strict=True):
                    if isinstance(probe, Tensor) and any(id(s) in inside for s in stacks):
                        _average(probe, module.process_group)


@dataclass(eq=False)
class _Sum:
    """The sum of gradients over backward passes."""

    grad: Tensor | None = None

    def add(self, grad: Tensor) -> None:
        self.grad = grad if self.grad is None else self.grad + grad


def _armed(
    stacks: list[MaskedParametrizationList], sharded: Mapping[int, Any], stack: ExitStack
) -> Tensor | _Sum:
    """Watch all uses of a tensor until `stack` ends; return the object that has its gradient."""
    managed = sharded.get(id(stacks[0].original)) if stacks[0].is_tensor else None
    if managed is None:
        return stack.enter_context(probed(stacks))
    total = _Sum()
    stack.enter_context(reduced(managed, stacks, total.add))
    return total


def _average(probe: Tensor, group: torch.distributed.ProcessGroup) -> None:
    # Processes without a gradient must take part too.
    grad = torch.zeros_like(probe) if probe.grad is None else probe.grad
    torch.distributed.all_reduce(grad, group=group)
    probe.grad = grad / torch.distributed.get_world_size(group)
