"""Models that FSDP2 manages: `fully_shard` remembers which module holds each Parameter.

Outside of forward and backward a Parameter is a DTensor, of which each process holds a part; for
these it puts the gathered one in its place, in the module and under the name that it remembers.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn


def is_sharded(model: nn.Module) -> bool:
    """Whether `fully_shard` manages the parameters of any module in `model`."""
    return any(True for _ in _managed(model))


def reshard(model: nn.Module) -> None:
    """Free what was gathered, so that the Parameters are those that optimizers hold.

    The outermost module keeps its gathered ones after a forward without a backward, and what is
    written to them is lost (fsdp2_writes_after_an_evaluation).
    """
    for module in _managed(model):
        module.reshard()


def follow(model: nn.Module) -> None:
    """Tell `fully_shard` where Parameters of `model` have moved to, and which are gone.

    That is no part of its interface (fsdp2_sparsifies_and_squashes_what_is_sharded).
    """
    groups = list(_groups(model))
    if not groups:
        return
    places: dict[int, list[tuple[nn.Module, str]]] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            places.setdefault(id(parameter), []).append((module, name))
    for group in groups:
        group.fsdp_params = [p for p in group.fsdp_params if id(p.sharded_param) in places]
        for managed in group.fsdp_params:
            (module, name), *ties = places[id(managed.sharded_param)]
            info = managed._module_info
            if info.module is not module:
                managed._post_load_hook_handle.remove()
                managed._post_load_hook_handle = module.register_load_state_dict_post_hook(
                    lambda *_, managed=managed: managed.reset_sharded_param()
                )
            info.module, info.param_name = module, name
            info.shared_modules = [module for module, _ in ties]
            info.shared_param_names = [name for _, name in ties]
        _renew_hooks(group)


def sharded_parameters(model: nn.Module) -> dict[int, Tensor]:
    """Return the Parameters that `fully_shard` manages in `model`, by identity."""
    managed = [p.sharded_param for group in _groups(model) for p in group.fsdp_params]
    return {id(parameter): parameter for parameter in managed}


def data_parallel_groups(model: nn.Module) -> list[Any]:
    """Return the process groups over which `fully_shard` averages gradients; [] if it does not."""
    meshes = {group.mesh_info.mesh for group in _groups(model)}
    if len(meshes) > 1:
        raise RuntimeError(
            f"`model` must be sharded over one mesh for inputs to be summed; it has {len(meshes)}."
        )
    return [mesh.get_group(dim) for mesh in meshes for dim in range(mesh.ndim)]


def _renew_hooks(group: Any) -> None:
    """Let what the group found out at the first forward be found again."""
    held = (
        group._module_to_pre_save_state_dict_hook_handle,
        group._module_to_pre_load_state_dict_hook_handle,
    )
    if not any(held):  # there was none yet
        return
    for handles in held:
        for handle in handles.values():
            handle.remove()
        handles.clear()
    group.lazy_init()


def _managed(model: nn.Module) -> Iterator[Any]:
    for module in model.modules():
        if any(cls.__name__ == "FSDPModule" for cls in type(module).__mro__):
            yield module


def _groups(model: nn.Module) -> Iterator[Any]:
    seen: set[int] = set()
    for module in _managed(model):
        state = module._get_fsdp_state()
        several = getattr(state, "_fsdp_param_groups", None)  # newer than torch 2.9
        for group in [state._fsdp_param_group] if several is None else several:
            if group is not None and id(group) not in seen:
                seen.add(id(group))
                yield group
