"""What the commands do that write a checkpoint. Each returns the line to be printed."""

from __future__ import annotations

import os
from argparse import Namespace
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch
from torch import Tensor

from parasparse._tables import as_text
from parasparse._units import has_units
from parasparse.cli import folding, pruning
from parasparse.cli.checkpoint import Checkpoint, CheckpointError, Info
from parasparse.cli.layout import Layout, Put, pieces
from parasparse.cli.opening import PackedFile, open_checkpoint
from parasparse.cli.progress import Advance, progress
from parasparse.cli.reaching import Reached, reached
from parasparse.cli.rules import as_rules, read_config, split_rules
from parasparse.cli.writing import TORCH, check_file, check_target, writing
from parasparse.patterns import unstructured
from parasparse.sparse import files


def prune(args: Namespace) -> str:
    """Write IN with masks folded in, chosen by rules."""
    options, rules = read_config(args.config) if args.config else ({}, {})
    if args.rule and rules:
        raise CheckpointError("rules must come from --rule or from --config, not from both.")
    names = ("pattern", "scope", "score", "distribution", "seed")
    given = {name: getattr(args, name) for name in names}
    options |= {key: value for key, value in given.items() if value is not None}
    parsed = as_rules(rules or split_rules(args.rule), options)
    source = open_checkpoint(args.input)
    if not args.dry_run:
        check_target(args.output, source, force=args.force)
    if args.masks and not args.dry_run:
        check_file(args.masks, force=args.force)
        masks = Path(args.masks).resolve()
        for place in (Path(args.input).resolve(), Path(args.output).resolve()):
            if place in (masks, *masks.parents):
                raise CheckpointError("--masks must name another file than IN and OUT, outside.")
    groups = reached(source, parsed)
    if not groups:
        raise CheckpointError("every rule is none: nothing is to be pruned.")
    if options.get("seed") is not None:
        torch.manual_seed(options["seed"])
    every = [each for group in groups for each in group]
    layout = Layout(source.infos, source.same)
    of_masks = Layout(
        {each.name: Info(torch.bool, source.infos[each.parts[0]].shape) for each in every},
        is_whole=False,
    )
    rows = []
    with ExitStack() as stack:
        put: Put = _ignored
        put_mask: Put = _ignored
        if not args.dry_run:
            put = stack.enter_context(writing(args.output, source, layout))
            if args.masks:
                put_mask = stack.enter_context(writing(args.masks, source, of_masks))
        passes = sum(_nbytes(source, each) * _passes(each) for each in every)
        advance = stack.enter_context(progress("prune", source.nbytes + passes))
        for group in groups:
            for each, mask in pruning.masks(source, group, lambda e: advance(_nbytes(source, e))):
                rows.append((each, int(mask.count_nonzero())))
                put_mask(each.name, pieces(mask))
                for name in each.parts:
                    put(name, pieces(source.read(name), mask))
                advance(_nbytes(source, each))
        pruned = {name for each in every for name in each.parts}
        for name in source.infos if not args.dry_run else ():
            if name not in pruned and name not in source.same:
                _copy(source, name, put, advance)
    return _pruned(source, rows, args)


def _pruned(source: Checkpoint, rows: list[tuple[Reached, int]], args: Namespace) -> str:
    numels = [source.infos[each.parts[0]].numel for each, _ in rows]
    kept, total = sum(kept for _, kept in rows), sum(numels)
    line = f"{1 - kept / max(1, total):.2%} of {total:,} entries in {len(rows)} tensors are masked"
    if not args.dry_run:
        return f"{args.output}: {line}.{_left_out(source, args.output)}"
    table = as_text(
        ("tensor", "shape", "rule", "kept", "sparsity"),
        [
            (each.name, tuple(source.infos[each.parts[0]].shape), each.rule.target, f"{kept:,}",
             f"{1 - kept / max(1, numel):.2%}")
            for (each, kept), numel in zip(rows, numels, strict=True)
        ],
    )  # fmt: skip
    return f"{table}\n{line.replace('are masked', 'would be masked')}; nothing was written."


def squash(args: Namespace) -> str:
    """Write IN with the masks that it holds folded in, and with dense names."""
    source, held = _masked(args)
    weights, masks = {one.weight: one.name for one in held}, {one.mask for one in held}
    names = {key: weights.get(key, key) for key in source.infos if key not in masks}
    _fold(args, source, held, names)
    return f"{args.output}: {len(held)} masks were folded in.{_left_out(source, args.output)}"


def binarize(args: Namespace) -> str:
    """Write IN with bool masks, their scale in the weights."""
    source, held = _masked(args)
    _fold(args, source, held, {key: key for key in source.infos})
    number = len({one.mask for one in held})
    return f"{args.output}: {number} masks are bool.{_left_out(source, args.output)}"


def _fold(
    args: Namespace, source: Checkpoint, held: list[folding.Held], names: dict[str, str]
) -> None:
    """Write the tensors of `names`, key -> new name: weights masked, masks bool."""
    mask_of, masks = {one.weight: one.mask for one in held}, {one.mask for one in held}
    layout = Layout({}, origin={name: key for key, name in names.items()})
    first: dict[tuple[str, str], str] = {}
    for key, name in names.items():
        info, mask = source.infos[key], mask_of.get(key, "")
        layout.infos[name] = Info(torch.bool, info.shape) if key in masks else info
        tied = (source.same.get(key, key), source.same.get(mask, mask))  # under one mask, too
        if first.setdefault(tied, name) != name:
            layout.same[name] = first[tied]
    with _output(args, source, layout) as (put, advance):
        for key, name in names.items():
            if name in layout.same:
                continue
            tensor = source.read(key) != 0 if key in masks else source.read(key)
            put(name, pieces(tensor, source.read(mask_of[key]) if key in mask_of else None))
            advance(source.infos[key].nbytes)


def masks(args: Namespace) -> str:
    """Write the masks of IN alone, bool, by the names of the dense tensors."""
    source = open_checkpoint(args.input)
    check_file(args.output, force=args.force)
    if args.zeros:
        names = {n: n for n, t in source.tensors() if _has_zeros(t)}
        if not names:
            raise CheckpointError(f'"{args.input}" holds no weight with a zero.')
    else:
        names = folding.mask_names(source)
    infos = {name: Info(torch.bool, source.infos[key].shape) for name, key in names.items()}
    with _output(args, source, Layout(infos, is_whole=False)) as (put, advance):
        for name, key in names.items():
            put(name, pieces(source.read(key) != 0))
            advance(source.infos[key].nbytes)
    return f"{args.output}: {len(names)} masks."


def pack(args: Namespace) -> str:
    """Write IN without its zeros."""
    source = open_checkpoint(args.input)
    check_file(args.output, force=args.force)
    like = {n: torch.empty(i.shape, dtype=i.dtype, device="meta") for n, i in source.infos.items()}
    state = {**like, **source.others}
    try:
        files.check_storable(state, state)
    except TypeError as error:
        raise CheckpointError(str(error)) from error
    header = {
        "entries": files.entries_of(state, source.same),
        "modules": source.modules,
        "metadata": source.metadata,
    }
    with progress("pack", source.nbytes) as advance:

        def read(name: str) -> Tensor:
            advance(source.infos[name].nbytes)
            return source.read(name)

        files.write(args.output, read, header)
    size = os.path.getsize(args.output)
    line = f"{args.output}: {size:,} bytes, {size / max(1, source.nbytes):.1%} of the tensors'."
    return line + _left_out(source, "")


def unpack(args: Namespace) -> str:
    """Write the dense checkpoint that was packed."""
    source = open_checkpoint(args.input)
    if not isinstance(source, PackedFile):
        raise CheckpointError(f'"{args.input}" is not packed; there is nothing to do.')
    check_target(args.output, source, force=args.force)
    with _output(args, source, Layout(source.infos, source.same)) as (put, advance):
        for name in source.infos:
            if name not in source.same:
                _copy(source, name, put, advance)
    return f"{args.output}: {len(source.infos)} tensors."


def _left_out(source: Checkpoint, output: str) -> str:
    """Return what is said of the things around a state dict that do not come along."""
    stays = output.lower().endswith(TORCH)
    return "" if stays or not source.around else f" Left out: {', '.join(source.around)}."


def _masked(args: Namespace) -> tuple[Checkpoint, list[folding.Held]]:
    source = open_checkpoint(args.input)
    check_target(args.output, source, force=args.force)
    return source, folding.held(source)


@contextmanager
def _output(args: Namespace, source: Checkpoint, layout: Layout) -> Iterator[tuple[Put, Advance]]:
    with (
        writing(args.output, source, layout) as put,
        progress(args.command, source.nbytes) as advance,
    ):
        yield put, advance


def _copy(source: Checkpoint, key: str, put: Put, advance: Advance) -> None:
    put(key, pieces(source.read(key)))
    advance(source.infos[key].nbytes)


def _passes(each: Reached) -> int:
    """Return how often the scores of `each` are read to be ranked."""
    prune = each.rule.prune
    assert prune is not None
    alone = prune.scope == "local" and prune.pattern is not unstructured
    return 0 if alone else 1 if has_units(prune.pattern) else 2


def _nbytes(source: Checkpoint, each: Reached) -> int:
    return sum(source.infos[name].nbytes for name in each.parts)


def _has_zeros(tensor: Tensor) -> bool:
    weight = tensor.ndim > 1 and (tensor.is_floating_point() or tensor.is_complex())
    return weight and not bool((tensor != 0).all())


def _ignored(name: str, pieces: Iterable[Tensor]) -> None:
    """Take a tensor, and do nothing: a dry run."""
