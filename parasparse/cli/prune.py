"""The command `prune`."""

from argparse import Namespace
from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path

import torch
from torch import Tensor

from parasparse.cli import choosing
from parasparse.cli.output import copy, left_out
from parasparse.cli.progress import progress
from parasparse.cli.reaching import Reached, reached
from parasparse.cli.rules import Rule, as_rules, read_config, split_rules
from parasparse.files.checkpoint import Checkpoint, CheckpointError, TensorInfo
from parasparse.files.layout import Layout, Put, pieces
from parasparse.files.opening import open_checkpoint
from parasparse.files.writing import check_file, check_target, writing
from parasparse.patterns import unstructured
from parasparse.patterns.blocks_channels_heads import has_units
from parasparse.text import as_text, listed


def prune(args: Namespace) -> str:
    """Choose masks by rules, and write IN with them folded in."""
    rules, seed = _rules(args)
    source = open_checkpoint(args.input, args.key)
    if not args.dry_run:
        _check_outputs(args, source)
    groups = reached(source, rules)
    if not groups:
        raise CheckpointError("every rule is none, so nothing is to be pruned.")
    if seed is not None:
        torch.manual_seed(seed)
    with ExitStack() as stack:
        return _pruned(source, _written(args, source, groups, stack), args)


def _rules(args: Namespace) -> tuple[list[Rule], int | None]:
    """Return the rules of the command line or of `--config`, and the seed."""
    options, rules = read_config(args.config) if args.config else ({}, {})
    if args.rule and rules:
        raise CheckpointError("rules must come from --rule or from --config, not from both.")
    names = ("pattern", "scope", "score", "distribution", "max_sparsity", "seed")
    given = {name: getattr(args, name) for name in names}
    options |= {key: value for key, value in given.items() if value is not None}
    return as_rules(rules or split_rules(args.rule), options), options.get("seed")


def _check_outputs(args: Namespace, source: Checkpoint) -> None:
    check_target(args.output, source, force=args.force)
    if args.masks:
        check_file(args.masks, force=args.force)
        masks = Path(args.masks).resolve()
        for place in (Path(args.input).resolve(), Path(args.output).resolve()):
            if place in (masks, *masks.parents):
                raise CheckpointError(
                    "--masks must name another file than IN and OUT, and not one inside them."
                )


def _written(
    args: Namespace, source: Checkpoint, groups: list[list[Reached]], stack: ExitStack
) -> list[tuple[Reached, int]]:
    """Write the pruned checkpoint and the masks; return the number of kept entries."""
    every = [each for group in groups for each in group]
    put: Put = _ignored
    put_mask: Put = _ignored
    if not args.dry_run:
        put = stack.enter_context(writing(args.output, source, Layout(source.infos, source.ties)))
        if args.masks:
            put_mask = stack.enter_context(writing(args.masks, source, _of_masks(source, every)))
    passes = sum(_nbytes(source, each) * _passes(each) for each in every)
    advance = stack.enter_context(progress("prune", source.nbytes + passes))
    rows = []
    for group in groups:
        for each, mask in choosing.masks(source, group, lambda e: advance(_nbytes(source, e))):
            rows.append((each, int(mask.count_nonzero())))
            put_mask(each.name, pieces(mask))
            for name in each.parts:
                put(name, pieces(source.read(name), mask))
            advance(_nbytes(source, each))
    pruned = {name for each in every for name in each.parts}
    for name in source.infos if not args.dry_run else ():
        if name not in pruned and name not in source.ties:
            copy(source, name, put, advance)
    return rows


def _of_masks(source: Checkpoint, every: list[Reached]) -> Layout:
    shapes = {each.name: source.infos[each.parts[0]].shape for each in every}
    infos = {name: TensorInfo(torch.bool, shape) for name, shape in shapes.items()}
    return Layout(infos, is_whole=False)


def _pruned(source: Checkpoint, rows: list[tuple[Reached, int]], args: Namespace) -> str:
    numels = [source.infos[each.parts[0]].numel for each, _ in rows]
    kept, total = sum(kept for _, kept in rows), sum(numels)
    emptied = _emptied(source, rows)
    line = f"{1 - kept / max(1, total):.2%} of {total:,} entries in {len(rows)} tensors are masked"
    if not args.dry_run:
        return f"{args.output}: {line}.{emptied}{left_out(source, args.output)}"
    table = as_text(
        ("tensor", "shape", "rule", "kept", "sparsity"),
        [
            (each.name, tuple(source.infos[each.parts[0]].shape), each.rule.target, f"{kept:,}",
             f"{1 - kept / max(1, numel):.2%}")
            for (each, kept), numel in zip(rows, numels, strict=True)
        ],
    )  # fmt: skip
    return (
        f"{table}\n{line.replace('are masked', 'would be masked')}; nothing was written.{emptied}"
    )


def _emptied(source: Checkpoint, rows: list[tuple[Reached, int]]) -> str:
    """Return a sentence on the tensors that a sparsity below 1 makes all zeros."""
    names = []
    for each, kept in rows:
        prune = each.rule.prune
        full = prune is None or prune.sparsity in (None, 1.0)
        if not kept and not full and source.infos[each.parts[0]].numel:
            names.append(each.name)
    if not names:
        return ""
    return f" No entry is left of {listed(names)}; --max-sparsity keeps some of each tensor."


def _passes(each: Reached) -> int:
    """Return how often `each` is read to be ranked."""
    prune = each.rule.prune
    assert prune is not None
    alone = prune.scope == "local" and prune.pattern is not unstructured
    if alone or has_units(prune.pattern):
        return 0 if alone else 1
    return 4 if prune.scope == "global" and prune.max_sparsity < 1 else 2


def _nbytes(source: Checkpoint, each: Reached) -> int:
    return sum(source.infos[name].nbytes for name in each.parts)


def _ignored(name: str, pieces: Iterable[Tensor]) -> None:
    """Ignore a tensor, for `--dry-run`."""
