"""Puts sparse weights into a model, and takes them out again."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from torch import Tensor, nn

from parasparse.acceleration.weight.sparse_weight import SparseWeight, set_requires_grad
from parasparse.attach.reading import masked_stacks
from parasparse.attach.stack import MaskedParametrizationList, stack_of
from parasparse.targets.tensors import Site, Target


def _is_plain(target: Target) -> bool:
    """Whether `target` is a Parameter without parametrization at each of its sites."""
    return all(
        stack_of(site.module, site.attr) is None and site.attr in site.module._parameters
        for site in target.sites
    )


def replaceable(target: Target) -> bool:
    """Whether a sparse weight can replace `target`: a masked or plain matrix."""
    return len(target.shape) > 1 and bool(target.masks() or _is_plain(target))


def stored_or_masked(target: Target) -> Tensor:
    """Return the Parameter itself, or the masked tensor."""
    site = target.sites[0]
    if _is_plain(target):
        parameter = site.module._parameters[site.attr]
        assert parameter is not None
        return parameter
    # With the flag of the stored tensor, a forgotten `no_grad` raises.
    trained = any(t.requires_grad for t in site.originals())
    return target.effective().requires_grad_(trained)


def put(site: Site, weight: SparseWeight) -> None:
    """Replace the tensor at `site` by `weight`."""
    stack = stack_of(site.module, site.attr)
    if isinstance(stack, MaskedParametrizationList):
        stack.let_stand_in(weight)
    else:
        _set(site, weight)


def take(site: Site, weight: SparseWeight) -> None:
    """Restore the tensor that `put` replaced."""
    stack = stack_of(site.module, site.attr)
    if isinstance(stack, MaskedParametrizationList):
        stack.end_stand_in()
    else:
        assert weight.original is not None
        set_requires_grad(weight.original, weight.requires_grad)
        _set(site, weight.original)


def _set(site: Site, tensor: Tensor) -> None:
    # A module's own `__setattr__` may refuse the tensor, or copy it.
    site.module._parameters[site.attr] = tensor  # type: ignore[assignment]
    if isinstance(site.module, nn.RNNBase) and "_flat_weights" in site.module.__dict__:
        names = site.module._flat_weights_names
        site.module._flat_weights = [getattr(site.module, name, None) for name in names]


@contextmanager
def installed(targets: Mapping[str, Target], weights: Mapping[str, SparseWeight]) -> Iterator[None]:
    """Put `weights` in for the length of the block; earlier sparse weights come back."""
    sites = [(site, weight) for name, weight in weights.items() for site in targets[name].sites]
    before = [(site, _weight_at(site)) for site, _ in sites]
    try:
        for site, weight in sites:
            put(site, weight)
        yield
    finally:
        for (site, weight), (_, earlier) in zip(sites, before, strict=True):
            take(site, weight) if earlier is None else put(site, earlier)


def _weight_at(site: Site) -> SparseWeight | None:
    stack = stack_of(site.module, site.attr)
    masked = isinstance(stack, MaskedParametrizationList)
    found = stack.stand_in if masked else site.module._parameters[site.attr]  # type: ignore[union-attr]
    return found if isinstance(found, SparseWeight) else None


def weights_in(model: nn.Module) -> Iterator[tuple[Site, SparseWeight]]:
    """Yield each sparse weight of `model` and its site."""
    for module in model.modules():
        for name, stack in masked_stacks(module):
            if isinstance(stack.stand_in, SparseWeight):
                yield Site(module, name), stack.stand_in
        for name, parameter in module._parameters.items():
            if isinstance(parameter, SparseWeight):
                yield Site(module, name), parameter
