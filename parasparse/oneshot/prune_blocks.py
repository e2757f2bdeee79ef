"""`prune_blocks`: prune a model block by block, each from the inputs that it gets."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from parasparse.acceleration.measure import undisturbed
from parasparse.oneshot.block_report import BlockReport
from parasparse.oneshot.block_rules import Group, block_rules
from parasparse.oneshot.finding_blocks import blocks_of
from parasparse.oneshot.on_disk import OnDisk
from parasparse.oneshot.placement import placed
from parasparse.oneshot.report import OneShotRow
from parasparse.oneshot.walk import Walk, batches_in
from parasparse.rules.types import Rules
from parasparse.scores.collecting import collect
from parasparse.scores.statistics import Statistics
from parasparse.sharding.dtensors import count_nonzero
from parasparse.targets.tensors import Target
from parasparse.text import listed
from parasparse.verbs.frozen import frozen
from parasparse.verbs.sparsify import sparsify


def prune_blocks(
    model: nn.Module,
    batches: Iterable[Any],
    rules: Rules,
    *,
    blocks: str | Sequence[str] | None = None,
    recompute: bool = True,
    resume: bool = False,
    device: torch.device | str | None = None,
    storage: torch.device | str = "cpu",
    source: str | os.PathLike[str] | None = None,
    output: str | os.PathLike[str] | None = None,
    progress: Callable[[BlockReport], object] | None = None,
) -> nn.Module:
    """Prune `model` block by block, from the inputs that each block gets; return the model.

    All batches run through the model side by side and stop at each block. The block runs on all of
    them, to collect the statistics of its layers; its tensors are pruned; it runs again, and what
    it returns goes on. So each block is pruned from the outputs of pruned blocks, and runs twice.
    Tensors outside the blocks stay as they are. The model is in evaluation mode meanwhile.

    Args:
        model: any module, not compiled; changed in place.
        batches: inputs of the model, each a tensor, a tuple of arguments or a dict of keyword
            arguments. Each runs in a thread of its own. The first calls each block as often as any
            other does, and in the same order.
        rules: as for `sparsify`, with names in the whole model. The tensors of one block that a
            rule reaches are one group. `OneShot` gets the statistics of the block.
        blocks: names or globs of modules; a ModuleList stands for the modules in it. None: the
            modules in the largest ModuleList, and in others at least a quarter as large.
        recompute: False prunes each block from the outputs of dense blocks. A block then runs once,
            unless it is a layer itself.
        resume: leave blocks as they are in which all tensors that rules reach have masks.
        device: where the model runs. Each block is there only for its turn, everything else all
            the time; afterwards all are where they were. None: where they are.
        storage: where the arguments of blocks wait for their turn.
        source: a checkpoint with the tensors of `model`, whose parameters are on the meta device.
            They are read when they are needed, one block at a time, so the model may be larger than
            memory. So are the saved buffers, wherever they are.
        output: a new folder for the pruned weights of `source`, a safetensors file a block, and the
            other files of `source`. Masks are folded into the weights, and the model is as it was
            afterwards. With `resume`, blocks that are there are not pruned again.
        progress: called with a `BlockReport` after each block, as in `progress=print`.

    Raises:
        ValueError: `blocks` reaches nothing, a block is not called or lies in another, a rule
            reaches no tensor in a block, there are no batches, one calls other blocks than the
            first, weights are on the meta device without a `source`, `source` lacks a tensor,
            `output` has other files, or arguments exclude each other.
        TypeError: a tensor cannot be masked, or `batches` is a single batch.
        RuntimeError: the statistics are not finite. After any error, the blocks before this one
            are pruned, and this one is as it was.

    Warns:
        UserWarning: tensors had no inputs, such as experts that saw no token, and are pruned by
            magnitude.

    Examples:
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> batches = [torch.rand(16, 4), torch.rand(16, 4)]
        >>> model = prune_blocks(model, batches, OneShot(0.5), blocks="*")
        >>> model[0].weight.count_nonzero()
        tensor(16)

    Reference: Frantar, Alistarh, "SparseGPT", 2023, arXiv:2301.00774, section 3. Differs: the
        inputs of a block are those of the run itself, whatever the model passes to it.
    """
    found = blocks_of(model, blocks)
    groups = block_rules(model, found, rules)
    disk = _on_disk(model, found, source, output, resume=resume)
    if disk is None:
        _check_in_memory(groups)
    walk = Walk(model, found, batches_in(batches), device=device, storage=storage)
    with undisturbed(model), placed(model, found, device, disk) as places, walk.entered():
        walk.count()
        _check_calls(walk, is_given=blocks is not None, recompute=recompute, resume=resume)
        walk.start()
        for number, name in enumerate(walk.calls, 1):
            with places[name].held():
                made = _Made()
                is_new = not (resume and _is_pruned(name, groups[name], disk))
                if is_new:
                    made = _pruned(walk, name, groups[name], recompute=recompute)
                report = _report(name, number, len(walk.calls), groups[name], made)
                if disk is not None and is_new:
                    disk.write(name)
                with frozen(found[name]):  # masks are applied once, not for each batch
                    walk.leave(name)
            if progress is not None:
                progress(report)
        if disk is not None:
            disk.finish()
    return model


def _on_disk(
    model: nn.Module, blocks: Mapping[str, nn.Module],
    source: str | os.PathLike[str] | None, output: str | os.PathLike[str] | None, *, resume: bool,
) -> OnDisk | None:  # fmt: skip
    """Return what reads from `source` and writes to `output`, if they are given."""
    if (source is None) != (output is None):
        raise ValueError("`source` and `output` must be given together.")
    if source is None or output is None:
        return None
    if os.path.exists(output) and not os.path.isdir(output):
        raise ValueError(f'`output` must be a folder; "{output}" is a file.')
    if os.path.exists(output) and not resume and any(Path(output).iterdir()):
        raise ValueError(
            f'`output` must be a new folder, but "{output}" has files. Give another, or `resume`.'
        )
    return OnDisk(model, blocks, source, output)


def _check_in_memory(groups: Mapping[str, list[Group]]) -> None:
    targets = [target for each in groups.values() for group in each for target in group.targets]
    empty = [target.name for target in targets if target.stored().is_meta]
    if empty:
        raise ValueError(
            f"weights must be in memory, but {listed(empty)} are on the meta device. Give "
            "`source`, a checkpoint that has them, and `output`, or load the model into memory."
        )


@dataclass(frozen=True)
class _Made:
    """The rows of `OneShot`, and the names of tensors without inputs."""

    rows: list[OneShotRow] = field(default_factory=list)
    unseen: list[str] = field(default_factory=list)


def _pruned(walk: Walk, name: str, groups: list[Group], *, recompute: bool) -> _Made:
    """Prune the block that the runs wait at."""
    made = _Made()
    if not groups:
        return made
    wanted = [t for group in groups if group.needs_statistics for t in group.targets]
    statistics = _statistics(walk, name, wanted, recompute=recompute) if wanted else None
    if not recompute:
        walk.leave(name)
    rules = [rule for group in groups for rule in group.rules(statistics, made.rows)]
    sparsify(walk.model, rules)
    for group in groups:
        group.tell(made.rows)
    if statistics is not None:
        made.unseen.extend(
            t.name for g in groups if g.needs_statistics for t in g.unseen(statistics)
        )
    if made.unseen:
        warnings.warn(
            f"no inputs of {listed(made.unseen)} were recorded, so they are pruned by magnitude. "
            "Their modules may not have run, as experts that saw no token, or multiply the weight "
            "in ways that `scores.collect` does not know.",
            stacklevel=3,
        )
    return made


def _statistics(walk: Walk, name: str, wanted: list[Target], *, recompute: bool) -> Statistics:
    """Run the block on what it is called with, and return the statistics of its tensors.

    Without `recompute`, what it returns may go on at once. Not if the block itself has the tensors:
    the runs that wait in its call would not call the hooks of `collect`.
    """
    has_own = any(site.module is walk.blocks[name] for t in wanted for site in t.sites)
    with collect(walk.model, [target.name for target in wanted], grams=True) as statistics:
        if not recompute and not has_own:
            walk.leave(name)
        elif walk.calls[name] > 1:
            walk.run_all()
        else:
            for call in walk.at(name):
                with call.brought():
                    call.repeated()
    return statistics


def _check_calls(walk: Walk, *, is_given: bool, recompute: bool, resume: bool) -> None:
    """Raise ValueError if the model does not call the blocks, or more often than it may."""
    uncalled = [name for name in walk.blocks if name not in walk.calls]
    if (is_given and uncalled) or not walk.calls:
        raise ValueError(
            "`blocks` must be modules that run when the model is called with a batch; not "
            f"{listed(uncalled)}."
        )
    again = [name for name, number in walk.calls.items() if number > 1]
    if again and not recompute:
        raise ValueError(
            f"`recompute` must be True, because the model calls {listed(again)} more than once."
        )
    if resume and not recompute:
        raise ValueError("`recompute` must be True with `resume`: dense outputs are not kept.")


def _is_pruned(name: str, groups: list[Group], disk: OnDisk | None) -> bool:
    if disk is not None:
        return disk.is_written(name)
    return all(target.masks() for group in groups for target in group.targets)


def _report(name: str, number: int, blocks: int, groups: list[Group], made: _Made) -> BlockReport:
    targets = [target for group in groups for target in group.targets]
    kept = {}
    for target in targets:  # folded masks are zeros
        mask = target.mask() if target.masks() else None
        kept[target.name] = count_nonzero(target.stored() if mask is None else mask)
    numel = {target.name: target.shape.numel() for target in targets}
    unseen, rows = tuple(made.unseen), tuple(made.rows)
    return BlockReport(name, number, blocks, kept, numel, unseen, rows)
