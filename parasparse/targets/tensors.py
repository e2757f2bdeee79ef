"""The tensors of a model: each once, with all its names and places, pairs joined."""

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
from parasparse.masks.protocol import has_mask
from parasparse.names import PAIR_ENDINGS, ancestors

_WRAPPERS = (DistributedDataParallel, DataParallel, AveragedModel)
_WRAPPED_NAMES = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")


@dataclass(frozen=True)
class Site:
    """One place where a tensor hangs."""

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

    def effective(self) -> Tensor:
        """Return the tensor as its module sees it."""
        return reading.effective(self.module, self.attr)

    def originals(self) -> tuple[Tensor, ...]:
        """Return the tensors that hold its values: their identities tell ties."""
        return reading.originals(self.module, self.attr)


@dataclass(frozen=True, eq=False)
class Target:
    """One tensor with all the names and places that it has, or a pair of a real and imaginary one.

    Attributes:
        name: the first plain name; the joint name of a pair.
        names: every name that reaches it: those of ties and of a pair's parts, with and without
            the prefixes of wrappers.
        owners: plain name and owning module, for types and predicates.
        components: the sites of the tensor; of the real and of the imaginary tensor of a pair.
        is_buffer: it is no parameter.
        ndim: number of its dimensions.
        paths: its names, and those of the modules around it.
    """

    name: str
    names: tuple[str, ...]
    owners: tuple[tuple[str, nn.Module], ...]
    components: tuple[tuple[Site, ...], ...]
    is_buffer: bool
    ndim: int
    paths: frozenset[str]

    @property
    def sites(self) -> list[Site]:
        """Every site of every component."""
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
        """Return the tensor without its mask, detached; complex if it is a pair."""
        return self._joined(Site.stored)

    def effective(self) -> Tensor:
        """Return the tensor as its module sees it, detached; complex if it is a pair."""
        return self._joined(Site.effective)

    def _joined(self, read: Callable[[Site], Tensor]) -> Tensor:
        with torch.no_grad():
            values = [read(site).detach() for site in self.firsts]
            return joined(*values) if self.is_pair else values[0]

    def masks(self) -> list[nn.Module]:
        """Return what masks it: nothing, one module, or several where its places differ."""
        found = [site.mask_module() for site in self.sites]
        return list({id(mask): mask for mask in found if mask is not None}.values())

    def mask(self) -> Tensor | None:
        """Return the mask as it is now, None if it is not set.

        Under a module that has no `mask` it is what is not 0 now.
        """
        module = self.masks()[0]
        if has_mask(module):
            return module.mask  # type: ignore[return-value]
        return self.effective() != 0

    def stacks(self) -> list[list[MaskedParametrizationList]]:
        """Return the stacks of each component, where its sites are masked."""
        return [
            [site.stack() for site in component if site.mask_module() is not None]
            for component in self.components
        ]


@dataclass(eq=False)
class _Entry:
    """A tensor while its names are being collected."""

    names: list[str] = field(default_factory=list)
    raw: list[str] = field(default_factory=list)
    owners: list[tuple[str, nn.Module]] = field(default_factory=list)
    sites: dict[tuple[int, str], Site] = field(default_factory=dict)
    is_buffer: bool = False

    def first(self) -> Site:
        return next(iter(self.sites.values()))


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


def tensors_of(model: nn.Module, *, pairs: bool = True) -> list[Target]:
    """Return the tensors of `model`, each once, in the order of `named_parameters`.

    Args:
        model: any module.
        pairs: join a real and an imaginary tensor of one module into one target.

    Raises:
        RuntimeError: a lazy module has not seen its first batch.
    """
    entries = _entries(model)
    return _paired(entries, _alike) if pairs else [_target(entry) for entry in entries]


def masked_tensors_of(model: nn.Module, *, pairs: bool = True) -> list[Target]:
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
    return Target(
        name=names[0],
        names=tuple(dict.fromkeys(names)),
        owners=tuple(owners),
        components=tuple(tuple(e.sites.values()) for e in both),
        is_buffer=entry.is_buffer,
        ndim=entry.first().stored().ndim,
        paths=frozenset(path for name in names for path in ancestors(name)),
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
    for real, imag in PAIR_ENDINGS:
        if site.attr.endswith(real) and site.attr != real:
            yield real, imag
        elif isinstance(site.module, nn.ParameterDict) and f".{site.attr}" == real:
            yield real[1:], imag[1:]


def _joints(entry: _Entry, ending: str) -> tuple[str, ...]:
    """Return the joint names of the pair whose real part is `entry`, plain ones first."""
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


def _join(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix else name
