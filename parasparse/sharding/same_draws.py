"""Random numbers that are the same on all processes that train a model."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from parasparse.sharding.dtensors import is_dtensor


@contextmanager
def same_draws(model: nn.Module) -> Iterator[None]:
    """Make torch's global generators produce the numbers of the first process on all processes.

    The other processes restore their generators afterwards, so their own dropout, for example, is
    unaffected. Does nothing unless `model` contains DistributedDataParallel or DTensors.
    """
    groups = _groups(model)
    if not groups:
        yield
        return
    first = next(iter(model.parameters())).device
    cuda = [first] if first.type == "cuda" else []
    own = torch.get_rng_state(), [torch.cuda.get_rng_state(device) for device in cuda]
    torch.set_rng_state(_of_first(own[0], groups))
    for device, state in zip(cuda, own[1], strict=True):
        torch.cuda.set_rng_state(_of_first(state, groups), device)
    try:
        yield
    finally:
        if any(torch.distributed.get_rank(group) for group, _ in groups):
            torch.set_rng_state(own[0])
            for device, state in zip(cuda, own[1], strict=True):
                torch.cuda.set_rng_state(state, device)


def warn_if_alone(model: nn.Module) -> None:
    """Warn if there are several processes, but `model` is neither DDP nor sharded."""
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    if distributed and torch.distributed.get_world_size() > 1 and not _groups(model):
        warnings.warn(
            "several processes run, but `model` is neither a DistributedDataParallel nor sharded, "
            "so connections move by the data of this process alone. If DistributedDataParallel "
            "wraps the model, give the controller the wrapper, or the masks will diverge.",
            stacklevel=4,
        )


def _groups(model: nn.Module) -> list[tuple[Any, Any]]:
    """Return the process groups that train `model`, each with the device of its tensors."""
    groups: list[tuple[Any, Any]] = []
    for module in model.modules():
        if isinstance(module, DistributedDataParallel):
            groups.append((module.process_group, next(iter(module.parameters())).device))
    sharded: list[Any] = [parameter for parameter in model.parameters() if is_dtensor(parameter)]
    for mesh in dict.fromkeys(parameter.device_mesh for parameter in sharded):
        groups += [(mesh.get_group(dim), mesh.device_type) for dim in range(mesh.ndim)]
    return groups


def _of_first(state: Tensor, groups: list[tuple[Any, Any]]) -> Tensor:
    for group, device in groups:
        sent = state.to(device, copy=True)
        torch.distributed.broadcast(sent, group=group, group_src=0)
        state = sent.cpu()
    return state
