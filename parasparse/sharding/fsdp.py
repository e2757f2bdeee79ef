"""Models that FSDP2 manages.

Outside of forward and backward, a Parameter is a DTensor. During them, `fully_shard` replaces it by
the gathered Parameter, in the module and under the name that it has recorded.
"""

import sys
from collections.abc import Iterator
from typing import Any

from torch import nn


def is_sharded(model: nn.Module) -> bool:
    """Whether `fully_shard` manages parameters of any module in `model`."""
    return any(True for _ in _managed(model))


def reshard(model: nn.Module) -> None:
    """Free gathered Parameters, so that `model` has the sharded ones that optimizers hold.

    The outermost module keeps its gathered Parameters after a forward without a backward, and
    writes to them are lost (fsdp2_writes_after_an_evaluation).

    Raises:
        RuntimeError: a module outside `model` manages Parameters in it.
    """
    _check_managers(model)
    for module in _managed(model):
        module.reshard()


def follow(model: nn.Module) -> None:
    """Update the records of `fully_shard` after Parameters of `model` have moved or gone.

    It has no public interface for this (fsdp2_sparsifies_and_squashes_what_is_sharded).
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


def managed_parameters(model: nn.Module) -> dict[int, Any]:
    """Return the record of `fully_shard` for each Parameter in `model`, by id of the Parameter."""
    return {id(p.sharded_param): p for group in _groups(model) for p in group.fsdp_params}


def data_parallel_groups(model: nn.Module) -> list[Any]:
    """Return the process groups over which `fully_shard` averages gradients."""
    meshes = {group.mesh_info.mesh for group in _groups(model)}
    if len(meshes) > 1:
        raise RuntimeError(
            f"`model` must be sharded over one mesh to sum its inputs; it has {len(meshes)}."
        )
    return [mesh.get_group(dim) for mesh in meshes for dim in range(mesh.ndim)]


def _renew_hooks(group: Any) -> None:
    """Repeat the registration of the first forward."""
    saving = group._module_to_pre_save_state_dict_hook_handle
    loading = group._module_to_pre_load_state_dict_hook_handle
    if not (saving or loading):  # no forward yet
        return
    for handles in (saving, loading):
        for handle in handles.values():
            handle.remove()
        handles.clear()
    group.lazy_init()


def _check_managers(model: nn.Module) -> None:
    if not _states():
        return
    inside, own = set(model.modules()), {id(group) for group in _groups(model)}
    outside = [module for module in _states() if module not in inside and _is_managed(module)]
    for module in outside:
        others = [group for group in _groups_of(module) if id(group) not in own]
        if any(p._module_info.module in inside for group in others for p in group.fsdp_params):
            raise RuntimeError(
                "`model` must be the module on which `fully_shard` was called; "
                f"{type(module).__name__}, a module around it, manages its Parameters. Pass that "
                "module, with the names of the tensors that you want."
            )


def _states() -> Any:
    """Return torch's records of modules that `fully_shard` and similar functions manage."""
    records = sys.modules.get("torch.distributed._composable_state")
    return () if records is None else records._module_state_mapping


def _is_managed(module: nn.Module) -> bool:
    return any(cls.__name__ == "FSDPModule" for cls in type(module).__mro__)


def _managed(model: nn.Module) -> Iterator[Any]:
    if _states():  # else no module is visited, because controllers call this in every step
        yield from (module for module in model.modules() if _is_managed(module))


def _groups(model: nn.Module) -> Iterator[Any]:
    groups = (group for module in _managed(model) for group in _groups_of(module))
    yield from {id(group): group for group in groups}.values()


def _groups_of(module: Any) -> list[Any]:
    state = module._get_fsdp_state()
    several = getattr(state, "_fsdp_param_groups", None)  # newer than torch 2.9
    groups = [state._fsdp_param_group] if several is None else several
    return [group for group in groups if group is not None]
