"""The command `prune`."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path

import torch
from torch import Tensor

from parasparse.cli import choosing
from parasparse.cli.commands import _copy, _left_out, _nbytes
from parasparse.cli.progress import progress
from parasparse.cli.reaching import Reached, reached
from parasparse.cli.rules import as_rules, read_config, split_rules
from parasparse.files.checkpoint import Checkpoint, CheckpointError, Info
from parasparse.files.layout import Layout, Put, pieces
from parasparse.files.opening import open_checkpoint
from parasparse.files.writing import check_file, check_target, writing
from parasparse.patterns import unstructured
from parasparse.patterns.units import has_units
from parasparse.text import as_text


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
            for each, mask in choosing.masks(source, group, lambda e: advance(_nbytes(source, e))):
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


def _passes(each: Reached) -> int:
    """Return how often the scores of `each` are read to be ranked."""
    prune = each.rule.prune
    assert prune is not None
    alone = prune.scope == "local" and prune.pattern is not unstructured
    return 0 if alone else 1 if has_units(prune.pattern) else 2


def _ignored(name: str, pieces: Iterable[Tensor]) -> None:
    """Take a tensor, and do nothing: a dry run."""
