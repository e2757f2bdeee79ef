"""Random numbers that are the same in all processes that train one model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from parasparse._parts import is_spread


@contextmanager
def drawn_alike(model: nn.Module) -> Iterator[None]:
    """Let torch's global generators draw what those of the first process draw.

    The others' generators are afterwards as they were: their own streams, for dropout say, go on.
    Nothing happens unless DistributedDataParallel or spread weights are in `model`.
    """
    groups = _groups(model)
    if not groups:
        yield
        return
    tensor = next(iter(model.parameters()))
    devices = [tensor.device] if tensor.is_cuda else []
    is_first = all(torch.distributed.get_rank(group) == 0 for group in groups)
    own = torch.get_rng_state(), [torch.cuda.get_rng_state(device) for device in devices]
    torch.set_rng_state(_of_first(own[0], groups, tensor.device))
    for device, state in zip(devices, own[1], strict=True):
        torch.cuda.set_rng_state(_of_first(state, groups, tensor.device), device)
    try:
        yield
    finally:
        if not is_first:
            torch.set_rng_state(own[0])
            for device, state in zip(devices, own[1], strict=True):
                torch.cuda.set_rng_state(state, device)


def _groups(model: nn.Module) -> list[Any]:
    """Return the process groups that reach all processes that train `model`, one by one."""
    groups: list[Any] = []
    for module in model.modules():
        if isinstance(module, DistributedDataParallel):
            groups.append(module.process_group)
    for parameter in model.parameters():
        if is_spread(parameter):
            mesh = parameter.device_mesh  # type: ignore[attr-defined]
            return [*groups, *(mesh.get_group(dim) for dim in range(mesh.ndim))]
    return groups


def _of_first(state: torch.Tensor, groups: list[Any], device: torch.device) -> torch.Tensor:
    sent = state.to(device, copy=True)
    for group in groups:
        torch.distributed.broadcast(sent, group=group, group_src=0)
    return sent.cpu()
