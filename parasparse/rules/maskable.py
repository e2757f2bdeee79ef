"""Whether a tensor can be masked where it is."""

import torch
from torch import nn
from torch.nn.utils.parametrize import is_parametrized

from parasparse.attach.classes import base_class
from parasparse.attach.offloading import check_not_offloaded
from parasparse.attach.older_hooks import legacy_hook, pruned_names
from parasparse.attach.reading import stacks_of
from parasparse.attach.stack import stack_of
from parasparse.dtypes import is_maskable
from parasparse.targets.tensors import Site, Target


def check_maskable(target: Target, *, compact: bool) -> None:
    """Raise an error if nothing can mask `target`."""
    if target.is_compact:
        if not compact:
            raise ValueError(
                f'"{target.name}" is compact, and only GradualPruning and DynamicSparsity change '
                "which entries a compact weight keeps. Call parasparse.expand(model) first."
            )
        return
    dtype = target.stored().dtype
    if not is_maskable(dtype):
        raise TypeError(
            f'"{target.name}" is {dtype}; only floating point and complex tensors can be masked. '
            "Exclude it with a `None` rule placed before this rule."
        )
    for site in target.sites:
        _check_site(site, target.name)
    is_tied = len(target.sites) > len(target.components)
    if is_tied and any(site.attr in pruned_names(site.module) for site in target.sites):
        raise ValueError(
            f'"{target.name}" is tied, and torch.nn.utils.prune prunes one of its uses. Call '
            "torch.nn.utils.prune.remove on it first."
        )


def _check_site(site: Site, name: str) -> None:
    """Raise an error if a module cannot have parametrizations."""
    hook = legacy_hook(site.module, site.attr)
    if hook is not None:
        raise ValueError(
            f'"{name}" is computed by a hook of torch.nn.utils.{hook} and cannot be masked. '
            f"Remove the hook, and use torch.nn.utils.parametrizations.{hook}."
        )
    if isinstance(site.module, torch.jit.ScriptModule):
        raise TypeError(
            f'"{name}" belongs to a ScriptModule and cannot be masked. Call `sparsify` and '
            "`squash` before scripting."
        )
    stack = stack_of(site.module, site.attr)
    if stack is not None and is_parametrized(stack):
        raise ValueError(
            f'"{name}" has parametrizations of its own stored tensor and cannot be masked. Remove '
            "those of `parametrizations` with torch.nn.utils.parametrize.remove_parametrizations."
        )
    base = base_class(site.module)
    if stack is None and isinstance(getattr(base, site.attr, None), property):
        raise ValueError(
            f'"{name}" cannot be masked, because {base.__name__} computes it by a property of that '
            "name. Mask the tensor that the property reads, or exclude it with a "
            "`None` rule before this one."
        )
    if isinstance(site.module, nn.Embedding | nn.EmbeddingBag) and site.module.max_norm is not None:
        raise ValueError(
            f'"{name}" cannot be masked, because its embedding has a `max_norm`: it normalizes the '
            "weight in place when it is called, which a mask would lose. Set `max_norm` to None."
        )
    check_not_offloaded(site.module, site.attr, name)
    if "parametrizations" in site.module._modules and not stacks_of(site.module):
        raise ValueError(
            f'the module of "{name}" has a submodule "parametrizations", the name that torch uses '
            "for its own. Rename it, or call `sparsify` before you export the model."
        )
