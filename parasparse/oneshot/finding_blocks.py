"""Finds the blocks of a model: the modules that are pruned one after the other."""

from collections.abc import Sequence
from fnmatch import fnmatchcase

from torch import nn

from parasparse.names import ancestors
from parasparse.targets.tensors import named_modules
from parasparse.text import listed, nearest

# Lists that are this much smaller than the largest are no blocks of their own.
_SMALLEST = 0.25


def blocks_of(model: nn.Module, blocks: str | Sequence[str] | None) -> dict[str, nn.Module]:
    """Return the blocks of `model` by plain name, in the order of its modules.

    Args:
        model: any module.
        blocks: names or globs of modules; a ModuleList stands for the modules in it, and a glob
            for the outermost modules that it matches. None: those in the largest ModuleLists.

    Raises:
        ValueError: a name or glob reaches no module, one block lies in another, or there is no
            ModuleList.
    """
    modules: dict[str, nn.Module] = {}
    for name, _, module, _ in named_modules(model):
        if name and all(module is not other for other in modules.values()):
            modules[name] = module
    if blocks is None:
        names = _in_largest_lists(modules)
    else:
        specs = [blocks] if isinstance(blocks, str) else list(blocks)
        names = [name for spec in specs for name in _reached(spec, modules)]
    names = list(dict.fromkeys(names))
    if not names:
        raise ValueError(f"`blocks` must name at least one module; got {blocks!r}.")
    for name in names:
        around = [other for other in ancestors(name)[1:] if other in names]
        if around:
            raise ValueError(
                f'`blocks` must not lie inside each other; "{name}" lies in "{around[0]}".'
            )
    return {name: module for name, module in modules.items() if name in names}


def _reached(spec: str, modules: dict[str, nn.Module]) -> list[str]:
    """Return the names of the blocks that `spec` stands for."""
    found = [name for name in modules if name == spec or fnmatchcase(name, spec)]
    if not found:
        raise ValueError(
            f'`blocks` must be names or globs of modules; "{spec}" reaches none of '
            f"{len(modules)}{nearest(spec, modules)}."
        )
    outermost = [name for name in found if not any(a in found for a in ancestors(name)[1:])]
    return [inner for name in outermost for inner in _without_lists(name, modules)]


def _without_lists(name: str, modules: dict[str, nn.Module]) -> list[str]:
    """Return `name`, or the names of the modules in it if it is a list, which is never called."""
    if not isinstance(modules[name], nn.ModuleList):
        return [name]
    inner = [other for other in modules if other.rpartition(".")[0] == name]
    return [found for other in inner for found in _without_lists(other, modules)]


def _in_largest_lists(modules: dict[str, nn.Module]) -> list[str]:
    """Return the names of the modules in the ModuleLists that hold most of the parameters."""
    lists = [name for name, module in modules.items() if isinstance(module, nn.ModuleList)]
    outermost = [name for name in lists if not any(a in lists for a in ancestors(name)[1:])]
    sizes = {name: _size(modules[name]) for name in outermost}
    least = _SMALLEST * max(sizes.values(), default=0)
    names = [name for name, size in sizes.items() if size >= max(least, 1)]
    if not names:
        raise ValueError(
            "`blocks` must be given: the model has no ModuleList with parameters. Its modules are "
            f"{listed(name for name in modules if '.' not in name)}."
        )
    return [inner for name in names for inner in _without_lists(name, modules)]


def _size(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
