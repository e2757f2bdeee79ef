"""The tensors of a model, and which of them a rule's target reaches."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.nn.parameter import is_lazy
from torch.optim.swa_utils import AveragedModel

from parasparse import _attach
from parasparse._checks import listed, nearest

Predicate = Callable[[str, nn.Module, Tensor], bool]
Spec = str | re.Pattern[str] | type | tuple[type, ...] | Predicate

_WRAPPERS = (DistributedDataParallel, DataParallel, AveragedModel)
_WRAPPED_NAMES = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
PAIR_ENDINGS = (("_re", "_im"), ("_real", "_imag"))


@dataclass(frozen=True, eq=False)
class Site:
    """One place where a tensor hangs."""

    module: nn.Module
    attr: str


@dataclass(frozen=True, eq=False)
class Target:
    """One tensor with all the names and places that it has, or a pair of a real and imaginary one.

    Attributes:
        name: the first plain name; the joint name of a pair.
        names: every name that reaches it: those of ties and of a pair's parts, with and without
            the prefixes of wrappers.
        owners: plain name and owning module, for types and predicates.
        parts: the places of the tensor; of the real and of the imaginary tensor if it is a pair.
        is_buffer: it is no parameter.
    """

    name: str
    names: tuple[str, ...]
    owners: tuple[tuple[str, nn.Module], ...]
    parts: tuple[tuple[Site, ...], ...]
    is_buffer: bool

    @property
    def sites(self) -> list[Site]:
        """Every place of every part."""
        return [site for part in self.parts for site in part]

    def stored(self) -> Tensor:
        """Return the tensor without its mask, detached; complex if it is a pair."""
        return self._joined(_attach.stored)

    def effective(self) -> Tensor:
        """Return the tensor as its module sees it, detached; complex if it is a pair."""
        return self._joined(_attach.effective)

    def _joined(self, read: Callable[[nn.Module, str], Tensor]) -> Tensor:
        with torch.no_grad():
            parts = [read(part[0].module, part[0].attr).detach() for part in self.parts]
            if len(parts) == 1:
                return parts[0]
            wide = parts[0].dtype if parts[0].dtype == torch.float64 else torch.float32
            return torch.complex(parts[0].to(wide), parts[1].to(wide))

    def masks(self) -> list[nn.Module]:
        """Return what masks it: nothing, one module, or several where its places differ."""
        found = [_attach.mask_module(site.module, site.attr) for site in self.sites]
        return list({id(mask): mask for mask in found if mask is not None}.values())


@dataclass
class _Entry:
    """A tensor while its names are being collected."""

    names: list[str] = field(default_factory=list)
    raw: list[str] = field(default_factory=list)
    owners: list[tuple[str, nn.Module]] = field(default_factory=list)
    sites: dict[tuple[int, str], Site] = field(default_factory=dict)
    is_buffer: bool = False


def named_modules(model: nn.Module) -> Iterator[tuple[str, str, nn.Module, nn.Module | None]]:
    """Yield plain name, name, module and parent of every module, shared ones under each name.

    Plain names lack the prefixes of wrappers. What parametrizes tensors is left out.
    """

    def walk(
        plain: str, name: str, module: nn.Module, parent: nn.Module | None
    ) -> Iterator[tuple[str, str, nn.Module, nn.Module | None]]:
        yield plain, name, module, parent
        for key, child in module._modules.items():
            if child is None or (key == "parametrizations" and _attach.has_stacks(module)):
                continue
            wrapped = key in _WRAPPED_NAMES or (key == "module" and isinstance(module, _WRAPPERS))
            below = plain if wrapped else _join(plain, key)
            yield from walk(below, _join(name, key), child, module)

    return walk("", "", model, None)


def collect(model: nn.Module, *, pairs: bool = True) -> list[Target]:
    """Return the tensors of `model`, each once, in the order of `named_parameters`.

    Args:
        model: any module.
        pairs: join a real and an imaginary tensor of one module into one target.

    Raises:
        RuntimeError: a lazy module has not seen its first batch.
    """
    entries = _entries(model)
    return _paired(entries, _alike) if pairs else [_target(entry) for entry in entries]


def masked(model: nn.Module, specs: Any = None) -> list[Target]:
    """Return the masked tensors of `model`; a pair is one where its parts share their mask.

    Args:
        model: any module.
        specs: the left side of a rule, or a list of them; None: all.

    Raises:
        ValueError: one of `specs` reaches no masked tensor.
    """
    found = [target for target in _paired(_entries(model), _share_a_mask) if target.masks()]
    if specs is None:
        return found
    wanted: set[int] = set()
    for spec in specs if isinstance(specs, list) else [specs]:
        reached = [target for target in found if reaches(spec, target)]
        if not reached:
            raise ValueError(_misses(spec, found, "`targets` must each reach a masked tensor"))
        wanted |= {id(target) for target in reached}
    return [target for target in found if id(target) in wanted]


def _entries(model: nn.Module) -> list[_Entry]:
    entries: dict[tuple[int, ...], _Entry] = {}
    for plain, name, module, parent in named_modules(model):
        if any(is_lazy(t) for t in module._parameters.values() if t is not None):
            raise RuntimeError(
                f"`model` must know its shapes; the lazy module {name!r} ({type(module).__name__}) "
                "does not yet. Run a dummy batch through the model first."
            )
        parameters, buffers = _attach.tensor_names(module)
        for attr in (*parameters, *buffers):
            key = tuple(id(tensor) for tensor in _attach.originals(module, attr))
            entry = entries.setdefault(key, _Entry(is_buffer=attr in buffers))
            entry.names.append(_join(plain, attr))
            entry.raw.append(_join(name, attr))
            # The tensors of a ParameterDict belong to the layer that holds it.
            owner = parent if isinstance(module, nn.ParameterDict) and parent else module
            entry.owners += [(entry.names[-1], owner)]
            entry.owners += [(entry.names[-1], module)] if owner is not module else []
            entry.sites[id(module), attr] = Site(module, attr)
    return list(entries.values())


def _target(entry: _Entry, imaginary: _Entry | None = None, joint: str = "") -> Target:
    both = [entry] if imaginary is None else [entry, imaginary]
    joints = [joint] if joint else []
    owners = entry.owners if imaginary is None else [(joint, owner) for _, owner in entry.owners]
    names = [*joints, *(n for e in both for n in (*e.names, *e.raw))]
    return Target(
        name=names[0],
        names=tuple(dict.fromkeys(names)),
        owners=tuple(owners),
        parts=tuple(tuple(e.sites.values()) for e in both),
        is_buffer=entry.is_buffer,
    )


def _paired(entries: list[_Entry], belong: Callable[[_Entry, _Entry], bool]) -> list[Target]:
    """Join real and imaginary tensors; a pair stands where its first part stood."""
    by_site = {site: entry for entry in entries for site in entry.sites}
    joined: dict[int, tuple[_Entry, _Entry, str] | None] = {}
    for entry in entries:
        for site in entry.sites.values():
            for other, joint in _counterparts(site, entry.names[0]):
                imaginary = by_site.get((id(site.module), other))
                if imaginary is None or id(entry) in joined or id(imaginary) in joined:
                    continue
                if not belong(entry, imaginary):
                    continue
                first, second = sorted((entry, imaginary), key=entries.index)
                joined[id(first)], joined[id(second)] = (entry, imaginary, joint), None
    targets = []
    for entry in entries:
        pair = joined.get(id(entry), (entry, None, ""))
        if pair is not None:
            targets.append(_target(*pair))
    return targets


def _counterparts(site: Site, name: str) -> Iterator[tuple[str, str]]:
    """Yield the attribute of the imaginary tensor of the real one at `site`, and the joint name."""
    if isinstance(site.module, nn.ParameterDict) and site.attr == "real":
        yield "imag", name.removesuffix(".real")
    for real, imaginary in PAIR_ENDINGS:
        if site.attr.endswith(real) and site.attr != real:
            yield site.attr.removesuffix(real) + imaginary, name.removesuffix(real)


def _alike(real: _Entry, imaginary: _Entry) -> bool:
    if real.is_buffer or imaginary.is_buffer:
        return False
    one, two = (next(iter(entry.sites.values())) for entry in (real, imaginary))
    a, b = _attach.stored(one.module, one.attr), _attach.stored(two.module, two.attr)
    return a.shape == b.shape and a.dtype == b.dtype and a.is_floating_point()


def _share_a_mask(real: _Entry, imaginary: _Entry) -> bool:
    masks = [_target(entry).masks() for entry in (real, imaginary)]
    return len(masks[0]) == len(masks[1]) == 1 and masks[0][0] is masks[1][0]


def is_weight(target: Target) -> bool:
    """Whether a sparsity alone reaches `target`.

    That is every parameter whose own name is, starts with or ends with "weight" and that has two or
    more dimensions, outside embeddings and norms; a tensor tied to an embedding counts as one.
    """
    dense = (nn.Embedding, nn.EmbeddingBag, nn.LayerNorm, nn.RMSNorm)
    return (
        _is_parameter_of_two_dimensions(target)
        and any(
            own.startswith("weight") or own.endswith("weight")
            for own in (name.rpartition(".")[2] for name in target.names)
        )
        and not any(isinstance(site.module, dense) for site in target.sites)
    )


def reaches(spec: Spec, target: Target) -> bool:
    """Whether `spec`, the left side of a rule, reaches `target`.

    Raises:
        TypeError: `spec` is none of the kinds that the rules know.
    """
    wide = _is_parameter_of_two_dimensions(target)
    if isinstance(spec, str):
        if spec in target.names:
            return True
        return wide and any(
            fnmatchcase(part, spec) for name in target.names for part in _ancestors(name)
        )
    if isinstance(spec, re.Pattern):
        return wide and any(spec.fullmatch(name) for name in target.names)
    if _is_types(spec):
        return wide and any(isinstance(owner, spec) for _, owner in target.owners)  # type: ignore[arg-type]
    if not callable(spec):
        raise TypeError(
            "a rule's target must be a name or glob, a compiled regex, a module type or tuple of "
            f"types, or a predicate (name, module, tensor) -> bool; got {spec!r}."
        )
    if target.is_buffer:
        return False
    tensor = target.stored()
    return any(spec(name, owner, tensor) for name, owner in target.owners)


def assign(specs: Mapping[int, Spec | None], targets: list[Target]) -> dict[int, list[Target]]:
    """Return the targets that each rule gets: the first rule that reaches a target has it.

    Args:
        specs: left side by number of the rule; None reaches what a sparsity alone reaches.
        targets: the tensors of the model.

    Raises:
        ValueError: a rule reaches nothing, or nothing that an earlier rule left.
    """
    taken: dict[int, int] = {}  # target -> rule
    groups: dict[int, list[Target]] = {}
    for number, spec in specs.items():
        reached = [t for t in targets if (is_weight(t) if spec is None else reaches(spec, t))]
        if not reached:
            raise ValueError(_misses(spec, targets, "`rules` must each reach a tensor"))
        groups[number] = [t for t in reached if id(t) not in taken]
        if not groups[number]:
            earlier = listed(dict.fromkeys(_shown(specs[taken[id(t)]]) for t in reached))
            raise ValueError(
                "`rules` must each reach a tensor that no earlier rule took; all that "
                f"{_shown(spec)!r} reaches was taken by {earlier}. Put the narrower rule first."
            )
        taken |= {id(t): number for t in groups[number]}
    return groups


def _misses(spec: Spec | None, targets: list[Target], must: str) -> str:
    near = ""
    if isinstance(spec, str):
        names = [name for target in targets for name in target.names]
        modules = [part for target in targets for part in _ancestors(target.name)[1:]]
        ending = re.search(r"\.?[*?\[].*", spec)
        globs = [module + ending[0] for module in modules] if ending else []
        near = nearest(spec, dict.fromkeys([*globs, *modules, *names]))
    what = "a sparsity alone" if spec is None else f'"{_shown(spec)}"'
    return (
        f"{must}; {what} reaches none of {len(targets)} tensors{near}. Globs, regexes and types "
        "reach parameters with two or more dimensions; one with fewer, or a buffer, is reached by "
        "its exact name."
    )


def _shown(spec: Spec | None) -> str:
    if isinstance(spec, re.Pattern):
        return spec.pattern
    if isinstance(spec, tuple):
        return " | ".join(map(_shown, spec))
    return spec if isinstance(spec, str) else getattr(spec, "__qualname__", str(spec))


def _is_types(spec: object) -> bool:
    types = spec if isinstance(spec, tuple) and spec else (spec,)
    return all(isinstance(t, type) for t in types)


def _is_parameter_of_two_dimensions(target: Target) -> bool:
    site = target.parts[0][0]
    return not target.is_buffer and _attach.stored(site.module, site.attr).ndim >= 2


def _ancestors(name: str) -> list[str]:
    """Return `name` and the names of the modules around it: a.b.c -> a.b.c, a.b, a."""
    parts = name.split(".")
    return [".".join(parts[:end]) for end in range(len(parts), 0, -1)]


def _join(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix else name
