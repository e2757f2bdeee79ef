"""Models that FSDP2 manages: `fully_shard` remembers which module holds each Parameter.

Outside of forward and backward a Parameter is a DTensor, of which each process holds a part; for
these it puts the gathered one in its place, in the module and under the name that it remembers.
"""

import sys
from collections.abc import Iterator
from typing import Any

from torch import nn


def is_sharded(model: nn.Module) -> bool:
    """Whether `fully_shard` manages the parameters of any module in `model`."""
    return any(True for _ in _managed(model))


def reshard(model: nn.Module) -> None:
    """Free what was gathered, so that the Parameters are those that optimizers hold.

    The outermost module keeps its gathered ones after a forward without a backward, and what is
    written to them is lost (fsdp2_writes_after_an_evaluation).

    Raises:
        RuntimeError: a module outside `model` manages Parameters in it.
    """
    _check_managers(model)
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


def managed_parameters(model: nn.Module) -> dict[int, Any]:
    """Return what `fully_shard` keeps of each Parameter in `model`, by the Parameter's identity."""
    return {id(p.sharded_param): p for group in _groups(model) for p in group.fsdp_params}


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


def _check_managers(model: nn.Module) -> None:
    if not _states():
        return
    inside, own = set(model.modules()), {id(group) for group in _groups(model)}
    for module in list(_states()):
        if module in inside or not _is_managed(module):
            continue
        for group in _groups_of(module):
            if id(group) not in own and any(
                p._module_info.module in inside for p in group.fsdp_params
            ):
                raise RuntimeError(
                    "`model` must be the module that `fully_shard` was called on; one around it, "
                    f"a {type(module).__name__}, manages its Parameters. Pass that, with the names "
                    "of the tensors that you want."
                )


def _states() -> Any:
    """Return what torch remembers of modules that `fully_shard` and its like were called on."""
    remembering = sys.modules.get("torch.distributed._composable_state")
    return () if remembering is None else remembering._module_state_mapping


def _is_managed(module: nn.Module) -> bool:
    return any(cls.__name__ == "FSDPModule" for cls in type(module).__mro__)


def _managed(model: nn.Module) -> Iterator[Any]:
    # Controllers ask at each step: where nobody has called it, no module is looked at.
    if _states():
        yield from (module for module in model.modules() if _is_managed(module))


def _groups(model: nn.Module) -> Iterator[Any]:
    seen: set[int] = set()
    for module in _managed(model):
        for group in _groups_of(module):
            if id(group) not in seen:
                seen.add(id(group))
                yield group


def _groups_of(module: Any) -> list[Any]:
    state = module._get_fsdp_state()
    several = getattr(state, "_fsdp_param_groups", None)  # newer than torch 2.9
    groups = [state._fsdp_param_group] if several is None else several
    return [group for group in groups if group is not None]
