"""The context in which a model is watched while the user runs it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from parasparse import _attach
from parasparse._checks import listed
from parasparse._stack import stack_of
from parasparse._tensors import Target
from parasparse._tensors import collect as tensors_of
from parasparse.contexts import part_stacks, probed
from parasparse.scores.statistics import Statistics, Sums, wide
from parasparse.targets import is_weight, reaches


@contextmanager
def collect(model: nn.Module, targets: Any = None) -> Iterator[Statistics]:
    """Watch the forward and backward passes in the block; yield what scores need of them.

    Gradients are those of the weights as the modules see them, masked entries included, summed over
    the backward passes; under a GradScaler times its scale. `.grad` is as ever. Where nothing runs
    backward, no memory is taken for gradients: about three times the weights otherwise.

    Args:
        model: dense or masked; run it as it is, not compiled.
        targets: which tensors, as the left sides of rules: one, or a list; None: every weight that
            a sparsity alone reaches.

    Raises:
        ValueError: a target reaches no tensor.
        RuntimeError: `dense_gradients`, or another block like this, is open for the model.

    Examples:
        >>> from parasparse import Prune, scores, sparsify
        >>> model = nn.Linear(4, 2)
        >>> with collect(model) as statistics:
        ...     model(torch.rand(8, 4)).square().mean().backward()
        >>> sparsify(model, Prune(0.5, score=scores.taylor(statistics))).weight.count_nonzero()
        tensor(4)
    """
    chosen = _chosen(model, targets)
    statistics = Statistics(model, {}, _parts(model))
    with ExitStack() as stack:
        for target in chosen:
            _watch(target, statistics, stack)
        yield statistics


def _chosen(model: nn.Module, targets: Any) -> list[Target]:
    found = tensors_of(model, pairs=False)
    if targets is None:
        return [target for target in found if is_weight(target)]
    several = isinstance(targets, (list, set))
    chosen = []
    for spec in targets if several else [targets]:
        reached = [target for target in found if reaches(spec, target)]
        if not reached:
            raise ValueError(
                f"`targets` must each reach a tensor; {spec!r} reaches none of "
                f"{listed(target.name for target in found)}."
            )
        chosen += [target for target in reached if target not in chosen]
    return chosen


def _parts(model: nn.Module) -> dict[str, list[str]]:
    """Return the plain names of the parts of each tensor, which are two for a pair."""
    names = {site: t.name for t in tensors_of(model, pairs=False) for site in t.sites}
    return {t.name: [names[part[0]] for part in t.parts] for t in tensors_of(model)}


def _watch(target: Target, statistics: Statistics, stack: ExitStack) -> None:
    site, is_masked = target.sites[0], bool(target.masks())
    parametrizations = stack_of(site.module, site.attr)
    is_plain = parametrizations is None or len(parametrizations) == int(is_masked)
    first = _attach.originals(site.module, site.attr)[0]
    leaf: Tensor | None = None
    if is_masked:
        leaf = stack.enter_context(probed(part_stacks(target)[0]))
    elif is_plain and first.requires_grad:
        leaf = first
    sums = Sums(lambda: _attach.stored(site.module, site.attr), leaf, first if is_plain else None)
    statistics.sums[target.name] = sums
    if leaf is not None:

        def add(grad: Tensor) -> None:
            if not statistics.is_paused:
                sums.add(grad)

        stack.callback(leaf.register_hook(add).remove)
    for place in target.sites:
        squares = _squares_of(place.module) if place.attr == "weight" else None
        if squares is not None:
            hook = _hook(target.name, squares, statistics)
            handle = place.module.register_forward_pre_hook(hook, with_kwargs=True)
            stack.callback(handle.remove)


def _hook(
    name: str, squares: Callable[[Any, Tensor], Tensor], statistics: Statistics
) -> Callable[..., None]:
    def add(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if statistics.is_paused:
            return
        value = (args[0] if args else kwargs["input"]).detach()
        with torch.no_grad(), torch.autocast(value.device.type, enabled=False):
            found = squares(module, value)
        known = statistics.squared_inputs.get(name)
        statistics.squared_inputs[name] = found if known is None else known + found

    return add


def _squares_of(module: nn.Module) -> Callable[[Any, Tensor], Tensor] | None:
    """Return what sums the squares of the inputs that each entry of `module.weight` multiplies."""
    if isinstance(module, nn.Linear):
        return _of_linear
    if isinstance(module, _ConvNd) and not isinstance(module, _ConvTransposeNd):
        return _of_convolution
    if isinstance(module, nn.Embedding):
        return _of_embedding
    return None


def _of_linear(module: nn.Linear, x: Tensor) -> Tensor:
    return wide(x).abs().square().reshape(-1, module.in_features).sum(0, keepdim=True)


def _of_convolution(module: _ConvNd, x: Tensor) -> Tensor:
    # The derivative of the sum of outputs by a weight is the sum of what it multiplies.
    squares = wide(x).abs().square()
    weight = torch.zeros(_shape(module), dtype=squares.dtype, device=x.device, requires_grad=True)
    with torch.enable_grad():
        total = module._conv_forward(squares, weight, None).sum()
    return torch.autograd.grad(total, weight)[0]


def _shape(module: _ConvNd) -> tuple[int, ...]:
    return (module.out_channels, module.in_channels // module.groups, *module.kernel_size)


def _of_embedding(module: nn.Embedding, index: Tensor) -> Tensor:
    counts = torch.bincount(index.flatten(), minlength=module.num_embeddings)
    return counts.to(torch.get_default_dtype()).unsqueeze(1)
