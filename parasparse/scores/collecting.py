"""`collect`: a block in which a model is watched while the user runs it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.parallel import DistributedDataParallel

from parasparse.attach.fsdp_gradients import reduced
from parasparse.attach.probes import probed
from parasparse.attach.stack import stack_of
from parasparse.masks.mask import Mask
from parasparse.scores.grams import Grams
from parasparse.scores.inputs import is_conv1d_of_gpt2, rows_of
from parasparse.scores.products import wide
from parasparse.scores.stack_products import Watch
from parasparse.scores.statistics import Statistics, Sums
from parasparse.sharding.fsdp import data_parallel_groups, managed_parameters, reshard
from parasparse.targets.reach import Specs, as_list, reached_alone, reaches
from parasparse.targets.tensors import Target, tensors_of
from parasparse.text import listed


@contextmanager
def collect(
    model: nn.Module, targets: Specs | None = None, *, grams: bool = False
) -> Iterator[Statistics]:
    """Watch the forward and backward passes in the block; yield the statistics that scores need.

    Gradients are taken with respect to the weights that the modules see, and include masked entries
    of masks attached before the block. They are summed over backward passes, times the scale of a
    GradScaler. `.grad` is unchanged. The sums take three times the memory of the weights. If
    `model` is a DistributedDataParallel, all processes must reach the end of the block, where their
    sums are added. If `fully_shard` manages the weights, gradients are averaged over processes.

    Args:
        model: dense or masked, not compiled.
        targets: tensors to watch, one target of a rule or a list of them; None: every weight that a
            sparsity alone reaches.
        grams: collect Gram matrices of the inputs, which `OneShot` needs, instead of gradients, so
            that forward passes are enough. An input that several layers get, such as the query, key
            and value projections, is counted once, and they share its matrix. Fused experts have
            one for each expert. Sums are in 64 bits.

    Raises:
        ValueError: a target reaches no tensor.
        RuntimeError: `dense_gradients` or `collect` is already open for the model, or a tied tensor
            is masked in only some of its uses. In the block: with `grams`, an input is not finite.

    Examples:
        >>> model = nn.Linear(4, 2)
        >>> with collect(model) as statistics:
        ...     model(torch.rand(8, 4)).square().mean().backward()
        >>> sparsify(model, Prune(0.5, score=scores.taylor(statistics))).weight.count_nonzero()
        tensor(4)
    """
    if model in _watched:
        raise RuntimeError("`collect` is already open for this model. Close that block first.")
    chosen = _chosen(model, targets)
    statistics = Statistics(model, {}, _parts(model), grams=Grams() if grams else None)
    reshard(model)
    sharded, groups = managed_parameters(model), data_parallel_groups(model)
    _watched.add(model)
    try:
        with ExitStack() as stack:
            for target in chosen:
                _check_masked_everywhere(target)
                _watch_gradients(target, statistics, stack, sharded)
                _watch_inputs(target, statistics, stack)
            if statistics.grams is not None:
                _watch_stacks(chosen, statistics, statistics.grams, stack)
            yield statistics
        for module in model.modules():
            if isinstance(module, DistributedDataParallel):
                statistics.sum_over(module.process_group)
        for group in groups:
            statistics.sum_over(group, gradients=False)  # already averaged
    finally:
        _watched.discard(model)
        statistics.close()


_watched: WeakSet[nn.Module] = WeakSet()


def _chosen(model: nn.Module, targets: Specs | None) -> list[Target]:
    """Return the tensors that `targets` reach, each component of a pair separately."""
    found = tensors_of(model)
    chosen: list[Target] = []
    for spec in [None] if targets is None else as_list(targets):
        reached = reached_alone(found) if spec is None else [t for t in found if reaches(spec, t)]
        if not reached:
            what = "a sparsity alone" if spec is None else repr(spec)
            raise ValueError(
                f"`targets` must each reach a tensor; {what} reaches none of "
                f"{listed(target.name for target in found)}."
            )
        chosen += [target for target in reached if target not in chosen]
    sites = {site for target in chosen for site in target.sites}
    return [t for t in tensors_of(model, pairs=False) if t.sites[0] in sites]


def _parts(model: nn.Module) -> dict[str, list[str]]:
    """Return the plain names of the components of each tensor, two for a pair."""
    names = {site: t.name for t in tensors_of(model, pairs=False) for site in t.sites}
    return {t.name: [names[site] for site in t.firsts] for t in tensors_of(model)}


def _watch_inputs(target: Target, statistics: Statistics, stack: ExitStack) -> None:
    for site in target.sites:
        record = _recorder(target, site.module, statistics) if site.attr == "weight" else None
        if record is not None:
            hook = _hook(site.module, record, statistics)
            handle = site.module.register_forward_pre_hook(hook, with_kwargs=True)
            stack.callback(handle.remove)


def _watch_stacks(
    targets: list[Target], statistics: Statistics, grams: Grams, stack: ExitStack
) -> None:
    """Watch the products of stacks of matrices, such as fused experts, module by module."""
    owners: dict[nn.Module, dict[str, str]] = {}
    for target in targets:
        for site in target.sites:
            is_stack = len(target.shape) == 3 and not target.stored().is_complex()
            if is_stack and rows_of(site.module) is None:
                owners.setdefault(site.module, {})[target.name] = site.attr
    for owner, attributes in owners.items():
        ignored = partial(_is_ignored, owner=owner, statistics=statistics)
        watch = Watch(owner, attributes, grams.add_products, ignored)
        stack.callback(owner.register_forward_pre_hook(watch.begin).remove)
        stack.callback(owner.register_forward_hook(watch.end, always_call=True).remove)


def _is_ignored(module: nn.Module, owner: nn.Module, statistics: Statistics) -> bool:
    # Copies of the model have its hooks too. Checkpointing runs forward again during backward
    # (test_inputs_are_counted_once_under_checkpointing).
    again = torch._C._current_graph_task_id() != -1
    transformed = torch._C._are_functorch_transforms_active()
    return module is not owner or statistics.is_paused or again or transformed


def _recorder(
    target: Target, module: nn.Module, statistics: Statistics
) -> Callable[[Any, Tensor], None] | None:
    """Return what records an input of `module`; None if nothing can."""
    name, grams = target.name, statistics.grams
    rows = None if grams is None or target.stored().is_complex() else rows_of(module)
    if grams is not None and rows is not None:
        grams.rows.setdefault(name, rows)
        return lambda module, value: grams.add(name, value, rows)
    squares = _squares_of(module)
    if squares is None:
        return None

    def add(module: nn.Module, value: Tensor) -> None:
        with torch.no_grad(), torch.autocast(value.device.type, enabled=False):
            found = squares(module, value.detach())
        known = statistics.squared_inputs.get(name)
        statistics.squared_inputs[name] = found if known is None else known + found

    return add


def _check_masked_everywhere(target: Target) -> None:
    if target.masks() and any(site.mask_module() is None for site in target.sites):
        raise RuntimeError(
            f'"{target.name}" is tied, and only some of its uses are masked. Call `sparsify` on '
            "the whole model to mask all of them."
        )


def _watch_gradients(
    target: Target, statistics: Statistics, stack: ExitStack, sharded: dict[int, Any]
) -> None:
    site, masks = target.sites[0], target.masks()
    parametrizations = stack_of(site.module, site.attr)
    is_plain = parametrizations is None or len(parametrizations) == len(masks[:1])
    is_known = is_plain and all(isinstance(mask, Mask) for mask in masks)
    first = site.originals()[0]
    managed = sharded.get(id(first)) if is_plain else None
    # During computation, the module has the tensor that `fully_shard` has gathered.
    read = site.stored if managed is None else first.detach
    sums = Sums(read, None, first if is_known else None)
    statistics.sums[target.name] = sums
    if statistics.grams is not None:
        return

    def add(grad: Tensor) -> None:
        if not statistics.is_paused:
            sums.add(grad)

    if managed is not None:
        stack.enter_context(reduced(managed, target.stacks()[0], add))
    elif masks:
        sums.leaf = stack.enter_context(probed(target.stacks()[0]))
        # Nobody reads the probe's gradient.
        stack.callback(sums.leaf.register_post_accumulate_grad_hook(_forget).remove)
    elif is_plain and first.requires_grad:
        sums.leaf = first
    if sums.leaf is not None:
        stack.callback(sums.leaf.register_hook(add).remove)


def _forget(probe: Tensor) -> None:
    probe.grad = None


def _hook(
    owner: nn.Module, record: Callable[[Any, Tensor], None], statistics: Statistics
) -> Callable[..., None]:
    def add(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        value = args[0] if args else kwargs["input" if "input" in kwargs else "x"]
        if value.is_meta or _is_ignored(module, owner, statistics):
            return
        record(module, torch.cat(value.unbind()) if value.is_nested else value)

    return add


def _squares_of(module: nn.Module) -> Callable[[Any, Tensor], Tensor] | None:
    """Return the function that sums the squared inputs of each entry of `module.weight`."""
    if isinstance(module, nn.Linear):
        return _of_linear
    if is_conv1d_of_gpt2(module):
        return lambda module, x: _of_linear(module, x).T
    if isinstance(module, _ConvNd) and not isinstance(module, _ConvTransposeNd):
        return _of_convolution
    if isinstance(module, nn.Embedding):
        return _of_embedding
    return None


def _of_linear(module: nn.Linear, x: Tensor) -> Tensor:
    squares = wide(x).abs().square()
    return squares.flatten(0, -2).sum(0, keepdim=True) if x.ndim > 1 else squares[None]


def _of_convolution(module: _ConvNd, x: Tensor) -> Tensor:
    # The derivative of the summed outputs with respect to a weight is the sum of its inputs, which
    # is the same for all outputs of a group.
    with torch.inference_mode(False), torch.enable_grad():
        squares = wide(x.clone()).abs().square()
        inputs = module.in_channels // module.groups
        weight = squares.new_zeros((module.groups, inputs, *module.kernel_size)).requires_grad_()
        total = module._conv_forward(squares, weight, None).sum()
        (found,) = torch.autograd.grad(total, weight)
    return found.repeat_interleave(module.out_channels // module.groups, 0)


def _of_embedding(module: nn.Embedding, index: Tensor) -> Tensor:
    counts = torch.bincount(index.flatten(), minlength=module.num_embeddings)
    return counts.to(torch.get_default_dtype()).unsqueeze(1)
