"""The tensors of a model: each once, with all its names and places, pairs joined."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrize import is_parametrized
from torch.optim.swa_utils import AveragedModel

from parasparse.attach import reading
from parasparse.attach.pair_stack import joined
from parasparse.attach.stack import MaskedParametrizationList, stack_of
from parasparse.names import PAIR_ENDINGS, ancestors

_WRAPPERS = (DistributedDataParallel, DataParallel, AveragedModel)
_WRAPPED_NAMES = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")


@dataclass(frozen=True)
class Site:
    """One place where a tensor hangs."""

    module: nn.Module
    attr: str

    def stack(self) -> MaskedParametrizationList:
        """Return what masks it, where it is masked."""
        stack = stack_of(self.module, self.attr)
        assert isinstance(stack, MaskedParametrizationList)
        return stack


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
        ndim: number of its dimensions.
        places: its names, and those of the modules around it.
    """

    name: str
    names: tuple[str, ...]
    owners: tuple[tuple[str, nn.Module], ...]
    parts: tuple[tuple[Site, ...], ...]
    is_buffer: bool
    ndim: int
    places: frozenset[str]

    @property
    def sites(self) -> list[Site]:
        """Every place of every part."""
        return [site for part in self.parts for site in part]

    def stored(self) -> Tensor:
        """Return the tensor without its mask, detached; complex if it is a pair."""
        return self._joined(reading.stored)

    def effective(self) -> Tensor:
        """Return the tensor as its module sees it, detached; complex if it is a pair."""
        return self._joined(reading.effective)

    def _joined(self, read: Callable[[nn.Module, str], Tensor]) -> Tensor:
        with torch.no_grad():
            parts = [read(part[0].module, part[0].attr).detach() for part in self.parts]
            if len(parts) == 1:
                return parts[0]
            return joined(*parts)

    def masks(self) -> list[nn.Module]:
        """Return what masks it: nothing, one module, or several where its places differ."""
        found = [reading.mask_module(site.module, site.attr) for site in self.sites]
        return list({id(mask): mask for mask in found if mask is not None}.values())

    def mask(self) -> Tensor | None:
        """Return the mask as it is now, None if it is not set.

        Under a module that has no `mask` it is what is not 0 now.
        """
        module = self.masks()[0]
        if hasattr(module, "mask"):
            return module.mask  # type: ignore[return-value]
        return self.effective() != 0


@dataclass(eq=False)
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
            if child is None or (key == "parametrizations" and is_parametrized(module)):
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


def collect_as_masked(model: nn.Module, *, pairs: bool = True) -> list[Target]:
    """Return the tensors of `model`; a pair is one unless its parts have masks of their own."""
    entries = _entries(model, by_mask=True)
    return _paired(entries, _share_a_mask) if pairs else [_target(entry) for entry in entries]


def _entries(model: nn.Module, *, by_mask: bool = False) -> list[_Entry]:
    """Return the tensors of `model`; `by_mask` holds a tie apart where its places' masks differ."""
    entries: dict[tuple[int, ...], _Entry] = {}
    for plain, name, module, parent in named_modules(model):
        if any(is_lazy(t) for t in module._parameters.values() if t is not None):
            raise RuntimeError(
                f"`model` must know its shapes; the lazy module {name!r} ({type(module).__name__}) "
                "does not yet. Run a dummy batch through the model first."
            )
        parameters, buffers = reading.tensor_names(module)
        for attr in (*parameters, *buffers):
            key = tuple(id(tensor) for tensor in reading.originals(module, attr))
            if by_mask:
                key += (id(reading.mask_module(module, attr)),)
            entry = entries.setdefault(key, _Entry(is_buffer=attr in buffers))
            entry.names.append(_join(plain, attr))
            entry.raw.append(_join(name, attr))
            # The tensors of a ParameterDict belong to the layer that holds it.
            owner = parent if isinstance(module, nn.ParameterDict) and parent else module
            entry.owners += [(entry.names[-1], owner)]
            entry.owners += [(entry.names[-1], module)] if owner is not module else []
            entry.sites[id(module), attr] = Site(module, attr)
    return list(entries.values())


def _target(entry: _Entry, imaginary: _Entry | None = None, joints: tuple[str, ...] = ()) -> Target:
    both = [entry] if imaginary is None else [entry, imaginary]
    names = [*joints, *(name for e in both for name in (*e.names, *e.raw))]
    owners = entry.owners if not joints else [(joints[0], owner) for _, owner in entry.owners]
    site = next(iter(entry.sites.values()))
    return Target(
        name=names[0],
        names=tuple(dict.fromkeys(names)),
        owners=tuple(owners),
        parts=tuple(tuple(e.sites.values()) for e in both),
        is_buffer=entry.is_buffer,
        ndim=reading.stored(site.module, site.attr).ndim,
        places=frozenset(place for name in names for place in ancestors(name)),
    )


def _paired(entries: list[_Entry], belong: Callable[[_Entry, _Entry], bool]) -> list[Target]:
    """Join real and imaginary tensors; a pair stands where its first part stood."""
    by_site = {site: entry for entry in entries for site in entry.sites}
    position = {id(entry): i for i, entry in enumerate(entries)}
    taken = {name for entry in entries for name in entry.names}
    pairs: dict[int, tuple[_Entry, _Entry, tuple[str, ...]]] = {}  # by the position of the first
    second: set[int] = set()
    for entry in entries:
        for site in entry.sites.values():
            for real, imag in _endings(site):
                other = by_site.get((id(site.module), site.attr.removesuffix(real) + imag))
                joints = _joints(entry, real)
                if (
                    other is None
                    or other is entry
                    or not belong(entry, other)
                    or joints[0] in taken
                ):
                    continue
                first, last = sorted((position[id(entry)], position[id(other)]))
                if not {first, last} & (pairs.keys() | second):
                    pairs[first] = (entry, other, joints)
                    second.add(last)
    return [_target(*pairs.get(i, (entry,))) for i, entry in enumerate(entries) if i not in second]


def _endings(site: Site) -> Iterator[tuple[str, str]]:
    """Yield how the name of the real tensor at `site` ends, and how the imaginary one's does."""
    if isinstance(site.module, nn.ParameterDict) and site.attr == "real":
        yield "real", "imag"
    for real, imag in PAIR_ENDINGS:
        if site.attr.endswith(real) and site.attr != real:
            yield real, imag


def _joints(entry: _Entry, ending: str) -> tuple[str, ...]:
    """Return the joint names of the pair whose real part is `entry`, plain ones first."""
    names = [n for n in (*entry.names, *entry.raw) if n.endswith(ending)]
    names = [n.removesuffix(ending).removesuffix(".") or n for n in names]
    return tuple(dict.fromkeys(names))


def _alike(real: _Entry, imaginary: _Entry) -> bool:
    if real.is_buffer or imaginary.is_buffer:
        return False
    one, two = (next(iter(entry.sites.values())) for entry in (real, imaginary))
    a, b = reading.stored(one.module, one.attr), reading.stored(two.module, two.attr)
    return a.shape == b.shape and a.dtype == b.dtype and a.is_floating_point()


def _share_a_mask(real: _Entry, imaginary: _Entry) -> bool:
    masks = [_target(entry).masks() for entry in (real, imaginary)]
    if not any(masks):
        return _alike(real, imaginary)
    return len(masks[0]) == len(masks[1]) == 1 and masks[0][0] is masks[1][0]


def _join(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix else name


def part_stacks(target: Target) -> list[list[MaskedParametrizationList]]:
    """Return the places of each part of `target` that are masked."""
    found = [[stack_of(site.module, site.attr) for site in p] for p in target.parts]
    return [[s for s in part if isinstance(s, MaskedParametrizationList)] for part in found]
