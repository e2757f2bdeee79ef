"""The tensors of a model: each once with all its names and sites, and pairs joined."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.nn.parameter import is_lazy
from torch.optim.swa_utils import AveragedModel

from parasparse.attach import finding, reading
from parasparse.attach.pair_stack import joined
from parasparse.attach.stack import MaskedParametrizationList, stack_of
from parasparse.masks.kept_entries import KeptEntries
from parasparse.masks.mask import Mask
from parasparse.masks.places import Kept
from parasparse.masks.protocol import has_mask
from parasparse.names import PAIR_ENDINGS, WRAPPED, ancestors, join

_Modules: TypeAlias = Iterator[tuple[str, str, nn.Module, nn.Module | None]]


class Wrapper(nn.Module):
    """A module whose submodule `module` is the model that it wraps."""


_WRAPPERS = (DistributedDataParallel, DataParallel, AveragedModel, Wrapper)


@dataclass(frozen=True)
class Site:
    """A module and the name of one of its tensors."""

    module: nn.Module
    attr: str

    def stack(self) -> MaskedParametrizationList:
        """Return the stack of a masked tensor."""
        stack = stack_of(self.module, self.attr)
        assert isinstance(stack, MaskedParametrizationList)
        return stack

    def mask_module(self) -> nn.Module | None:
        """Return the module that masks the tensor, or None."""
        return reading.mask_module(self.module, self.attr)

    def stored(self) -> Tensor:
        """Return the tensor without its mask."""
        return reading.stored(self.module, self.attr)

    def shape(self) -> torch.Size:
        """Return the shape of the tensor."""
        return reading.shape(self.module, self.attr)

    def effective(self) -> Tensor:
        """Return the tensor as its module reads it."""
        return reading.effective(self.module, self.attr)

    def originals(self) -> tuple[Tensor, ...]:
        """Return the stored tensors. Tied tensors are the same objects."""
        return reading.originals(self.module, self.attr)


@dataclass(frozen=True, eq=False)
class Target:
    """A tensor, or a pair of a real and an imaginary tensor, with all names and sites.

    Attributes:
        name: the first plain name, or the joint name of a pair.
        names: every name, with and without the prefixes of wrappers, including the names of tied
            tensors and of components.
        owners: pairs of plain name and owning module, for types and predicates.
        components: the sites of the tensor, or of each component of a pair.
        is_buffer: whether it is a buffer.
        shape: of the tensor.
    """

    name: str
    names: tuple[str, ...]
    owners: tuple[tuple[str, nn.Module], ...]
    components: tuple[tuple[Site, ...], ...]
    is_buffer: bool
    shape: torch.Size

    @cached_property
    def paths(self) -> frozenset[str]:
        """`names`, and the names of the modules around them."""
        return frozenset(path for name in self.names for path in ancestors(name))

    @cached_property
    def sites(self) -> list[Site]:
        """All sites of all components."""
        return [site for component in self.components for site in component]

    @property
    def firsts(self) -> list[Site]:
        """The first site of each component."""
        return [component[0] for component in self.components]

    @property
    def is_pair(self) -> bool:
        """Whether it is a real and an imaginary tensor."""
        return len(self.components) == 2

    def stored(self) -> Tensor:
        """Return the tensor without its mask, detached. A pair is complex."""
        return self._joined(Site.stored)

    def effective(self) -> Tensor:
        """Return the tensor as its module reads it, detached. A pair is complex."""
        return self._joined(Site.effective)

    def _joined(self, read: Callable[[Site], Tensor]) -> Tensor:
        with torch.no_grad():
            values = [read(site).detach() for site in self.firsts]
            return joined(*values) if self.is_pair else values[0]

    def masks(self) -> list[nn.Module]:
        """Return the modules that mask it: none, one, or several if its sites differ."""
        found = (reading.mask_module(site.module, site.attr) for site in self.sites)
        return list({id(mask): mask for mask in found if mask is not None}.values())

    def mask(self) -> Tensor | None:
        """Return the mask, None if it is not set, or the nonzero entries if there is no `mask`."""
        module = self.masks()[0]
        return module.mask if has_mask(module) else self.effective() != 0  # type: ignore[return-value]

    @property
    def has_bool_mask(self) -> bool:
        """Whether it has a plain bool mask."""
        module = self.masks()[0]
        return self.is_compact or (isinstance(module, Mask) and module.is_bool)

    def kept(self) -> KeptEntries | None:
        """Return the kept entries if it is compact, else None."""
        masks = self.masks()
        return masks[0].entries() if masks and isinstance(masks[0], Kept) else None

    @property
    def is_compact(self) -> bool:
        """Whether it is stored as its kept entries alone."""
        return any(isinstance(mask, Kept) for mask in self.masks())

    def originals(self) -> list[Tensor]:
        """Return the stored tensors, each once."""
        found = [tensor for site in self.sites for tensor in site.originals()]
        return list({id(tensor): tensor for tensor in found}.values())

    def stacks(self) -> list[list[MaskedParametrizationList]]:
        """Return the stacks of each component at its masked sites."""
        return [
            [site.stack() for site in component if site.mask_module() is not None]
            for component in self.components
        ]


@dataclass(eq=False)
class _Entry:
    """A tensor while its names and sites are being collected."""

    names: list[str] = field(default_factory=list)
    raw: list[str] = field(default_factory=list)
    owners: list[tuple[str, nn.Module]] = field(default_factory=list)
    sites: dict[tuple[int, str], Site] = field(default_factory=dict)
    is_buffer: bool = False

    def first(self) -> Site:
        return next(iter(self.sites.values()))


def named_modules(model: nn.Module) -> _Modules:
    """Yield plain name, name, module and parent of every module, shared ones under each name.

    Plain names do not have the prefixes of wrappers. Parametrizations are left out.
    """
    todo: list[tuple[str, str, nn.Module, nn.Module | None]] = [("", "", model, None)]
    while todo:
        plain, name, module, parent = todo.pop()
        finding.take_over(module)
        yield plain, name, module, parent
        for key, child in reversed(module._modules.items()):
            if child is None or (key == "parametrizations" and reading.stacks_of(module)):
                continue
            wrapped = key in WRAPPED or (key == "module" and isinstance(module, _WRAPPERS))
            below = plain if wrapped else join(plain, key)
            todo.append((below, join(name, key), child, module))


def tensors_of(model: nn.Module, *, pairs: bool = True) -> list[Target]:
    """Return the tensors of `model`, each once, in the order of `named_parameters`.

    `pairs` joins a real and an imaginary tensor of one module into one target.

    Raises:
        RuntimeError: a lazy module has no shapes yet.
    """
    entries = _entries(model)
    return _paired(entries, _alike) if pairs else [_target(entry) for entry in entries]


def masked_tensors_of(model: nn.Module, *, pairs: bool = True) -> list[Target]:
    """Return the tensors of `model`. Pairs are joined unless the components have two masks."""
    entries = _entries(model, by_mask=True)
    return _paired(entries, _share_a_mask) if pairs else [_target(entry) for entry in entries]


def _entries(model: nn.Module, *, by_mask: bool = False) -> list[_Entry]:
    """Return the tensors of `model`; `by_mask` separates tied tensors with different masks."""
    entries: dict[tuple[int, ...], _Entry] = {}
    for plain, name, module, parent in named_modules(model):
        if any(is_lazy(t) for t in module._parameters.values() if t is not None):
            raise RuntimeError(
                f"the lazy module {name!r} ({type(module).__name__}) has no shapes yet. Run a "
                "dummy batch through the model first."
            )
        parameters, buffers = reading.tensor_names(module)
        for attr in (*parameters, *buffers):
            key = tuple(id(tensor) for tensor in reading.originals(module, attr))
            if by_mask:
                key += (id(reading.mask_module(module, attr)),)
            entry = entries.setdefault(key, _Entry(is_buffer=attr in buffers))
            entry.names.append(join(plain, attr))
            entry.raw.append(join(name, attr))
            # The tensors of a ParameterDict also belong to the layer that has it.
            owners = [parent] if isinstance(module, nn.ParameterDict) and parent else []
            entry.owners += [(entry.names[-1], owner) for owner in (*owners, module)]
            entry.sites[id(module), attr] = Site(module, attr)
    return list(entries.values())


def _target(entry: _Entry, imaginary: _Entry | None = None, joints: tuple[str, ...] = ()) -> Target:
    both = [entry] if imaginary is None else [entry, imaginary]
    names = [*joints, *(name for e in both for name in (*e.names, *e.raw))]
    owners = entry.owners if not joints else [(joints[0], owner) for _, owner in entry.owners]
    return Target(
        name=names[0],
        names=tuple(dict.fromkeys(names)),
        owners=tuple(owners),
        components=tuple(tuple(e.sites.values()) for e in both),
        is_buffer=entry.is_buffer,
        shape=entry.first().shape(),
    )


def _paired(entries: list[_Entry], belong: Callable[[_Entry, _Entry], bool]) -> list[Target]:
    """Join real and imaginary tensors. A pair gets the position of its first component."""
    by_site = {site: entry for entry in entries for site in entry.sites}
    position = {id(entry): i for i, entry in enumerate(entries)}
    taken = {name for entry in entries for name in entry.names}
    pairs: dict[int, tuple[_Entry, _Entry, tuple[str, ...]]] = {}  # by position
    second: set[int] = set()
    for entry in entries:
        for site in entry.sites.values():
            for real, imag in _endings(site):
                other = by_site.get((id(site.module), site.attr.removesuffix(real) + imag))
                names = _joints(entry, real)
                if other is None or other is entry or names[0] in taken or not belong(entry, other):
                    continue
                first, last = sorted((position[id(entry)], position[id(other)]))
                if not {first, last} & (pairs.keys() | second):
                    pairs[first] = (entry, other, names)
                    second.add(last)
    return [_target(*pairs.get(i, (entry,))) for i, entry in enumerate(entries) if i not in second]


def _endings(site: Site) -> Iterator[tuple[str, str]]:
    """Yield the ending of the name at `site`, if real, and the ending of the imaginary name."""
    for real, imag in PAIR_ENDINGS:
        if site.attr.endswith(real) and site.attr != real:
            yield real, imag
        elif isinstance(site.module, nn.ParameterDict) and f".{site.attr}" == real:
            yield real[1:], imag[1:]


def _joints(entry: _Entry, ending: str) -> tuple[str, ...]:
    """Return the joint names of the pair whose real component is `entry`, plain ones first."""
    names = [n for n in (*entry.names, *entry.raw) if n.endswith(ending)]
    names = [n.removesuffix(ending).removesuffix(".") or n for n in names]
    return tuple(dict.fromkeys(names))


def _alike(real: _Entry, imaginary: _Entry) -> bool:
    if real.is_buffer or imaginary.is_buffer:
        return False
    a, b = real.first().stored(), imaginary.first().stored()
    return a.shape == b.shape and a.dtype == b.dtype and a.is_floating_point()


def _share_a_mask(real: _Entry, imaginary: _Entry) -> bool:
    masks = [_target(entry).masks() for entry in (real, imaginary)]
    if not any(masks):
        return _alike(real, imaginary)
    return len(masks[0]) == len(masks[1]) == 1 and masks[0][0] is masks[1][0]
