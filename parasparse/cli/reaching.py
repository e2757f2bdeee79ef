"""The tensors of a checkpoint that rules reach: the same as in a model with these tensors."""

from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from parasparse.cli.held_masks import computed
from parasparse.cli.rules import Rule
from parasparse.dtypes import is_maskable
from parasparse.files.checkpoint import Checkpoint, CheckpointError
from parasparse.names import ancestors, plain
from parasparse.targets.reach import group_by_rule
from parasparse.targets.tensors import Wrapper, tensors_of


@dataclass(frozen=True, eq=False)
class Reached:
    """A tensor, or a pair, that a rule reaches."""

    name: str
    parts: tuple[str, ...]  # the name of the tensor, or of the two components
    rule: Rule


def reached(source: Checkpoint, rules: list[Rule]) -> list[list[Reached]]:
    """Return the tensors that each pruning rule reaches, as in a model with these tensors.

    A checkpoint does not tell buffers from parameters, so only integer buffers are excluded.
    """
    _check_plain(source, rules)
    model, names = _model_of(source)
    targets = tensors_of(model)
    # A `none` rule for biases alone is fine, although it reaches nothing that could be pruned.
    rules = [rule for rule in rules if not _is_idle(rule, source)]
    try:
        groups = group_by_rule({n: rule.target for n, rule in enumerate(rules)}, targets)
    except ValueError as error:
        raise CheckpointError(str(error)) from error
    found = [
        [
            Reached(t.name, tuple(names[id(s.module), s.attr] for s in t.firsts), rules[number])
            for t in group
        ]
        for number, group in groups.items()
        if rules[number].prune is not None
    ]
    for each in (one for group in found for one in group):
        dtype = source.infos[each.parts[0]].dtype
        if not is_maskable(dtype):
            raise CheckpointError(
                f'a pruned tensor must be floating-point or complex; "{each.name}" is {dtype}. Put '
                f"--rule '{each.name}=none' before its rule."
            )
    return found


def _check_plain(source: Checkpoint, rules: list[Rule]) -> None:
    """Raise CheckpointError if a rule prunes a masked or parametrized tensor."""
    for name, keys in computed(source).items():
        found = (r for r in rules if any(_is_in(k, r.target, source) for k in (name, *keys)))
        rule = next(found, None)
        if rule is not None and rule.prune is not None:
            raise CheckpointError(
                f'a pruned tensor must be plain; "{name}" is masked or parametrized. Fold masks '
                f"with `parasparse squash` first, or put --rule '{name}=none' before its rule."
            )


def _is_in(name: str, glob: str, source: Checkpoint) -> bool:
    """Whether `glob` matches `name` or a module that contains it, with or without wrappers."""
    places = (*ancestors(name), *ancestors(source.plain(name)))
    return any(fnmatchcase(place, glob) for place in places)


def _is_idle(rule: Rule, source: Checkpoint) -> bool:
    """Whether a rule excludes only tensors that could not be pruned: vectors, computed ones."""
    if rule.prune is not None or rule.target in source.infos:
        return False
    left = computed(source)
    inside = {key for keys in left.values() for key in keys}
    dense = [name for name in source.infos if name not in inside]
    dims = [len(source.infos[n].shape) for n in dense if _is_in(n, rule.target, source)]
    excludes = bool(dims) or any(_is_in(name, rule.target, source) for name in left)
    return excludes and max(dims, default=0) < 2


def _model_of(source: Checkpoint) -> tuple[nn.Module, dict[tuple[int, str], str]]:
    """Return a model on the meta device with the tensors of `source`, and their names there."""
    model = _Place()
    modules: dict[str, nn.Module] = {"": model}
    held: dict[str, Tensor] = {}
    names: dict[tuple[int, str], str] = {}
    left = {key for keys in computed(source).values() for key in keys}  # see `_check_plain`
    for name, info in source.infos.items():
        path, _, attr = name.rpartition(".")
        if name in left:
            continue
        if attr.startswith("_") and hasattr(model, attr):
            raise CheckpointError(f'tensor "{name}" has the name of an attribute of nn.Module.')
        kind: type[nn.Module] = nn.ParameterDict if attr in ("real", "imag") else _Place
        module = _module_at(path, modules, kind)
        first = source.ties.get(name, name)
        if first not in held:
            tensor = torch.empty(info.shape, dtype=info.dtype, device="meta")
            held[first] = nn.Parameter(tensor) if is_maskable(info.dtype) else tensor
        if isinstance(held[first], nn.Parameter):
            module._parameters[attr] = held[first]  # type: ignore[assignment]
        else:
            module._buffers[attr] = held[first]
        names[id(module), attr] = first
    around = {".".join(["module"] * number) for number in range(source.depth)}
    for path in [path for path in modules if plain(path) in around]:
        modules[path].__class__ = _Around
    return model, names


class _Place(nn.Module):
    """A module whose tensors can have any name, even that of a method."""

    def __getattribute__(self, name: str) -> Any:
        if not name.startswith("_"):
            held = object.__getattribute__(self, "__dict__")
            for kind in ("_parameters", "_buffers"):
                if name in held.get(kind, ()):
                    return held[kind][name]
        return super().__getattribute__(name)


class _Around(_Place, Wrapper):
    """A module that DDP has put around the module that it calls "module"."""


def _module_at(path: str, modules: dict[str, nn.Module], make: type[nn.Module]) -> nn.Module:
    """Return the module at `path`; create it if there is none."""
    if path not in modules:
        above, _, own = path.rpartition(".")
        modules[path] = make()
        _module_at(above, modules, _Place)._modules[own] = modules[path]
    return modules[path]
