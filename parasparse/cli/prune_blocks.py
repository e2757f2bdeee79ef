"""The command `prune-blocks`: a language model, pruned in one shot from text."""

from __future__ import annotations

import json
import sys
from argparse import Namespace
from dataclasses import asdict
from typing import Any

from torch import Tensor, nn

from parasparse.cli.language_model import (
    check_fits,
    load,
    perplexity,
    tokens_of,
    windows,
    without_cache,
)
from parasparse.cli.rules import as_pattern
from parasparse.files.checkpoint import CheckpointError
from parasparse.files.replacing import replacing_folder
from parasparse.files.writing import check_folder
from parasparse.oneshot.block_report import BlockReport
from parasparse.oneshot.prune_blocks import prune_blocks as prune
from parasparse.oneshot.treatment import OneShot
from parasparse.patterns import takes_sparsity
from parasparse.rules.prune import Prune
from parasparse.text import as_text
from parasparse.verbs.squash import squash

REPORT = "parasparse.json"
METHODS: dict[str, dict[str, Any]] = {
    "admm": {"update": "admm", "scope": "tensor"},
    "sparsegpt": {"update": "obs", "score": "sparsegpt", "scope": "tensor"},
    "wanda": {"update": "none", "score": "wanda"},
    "magnitude": {},
}


def prune_blocks(args: Namespace) -> str:
    """Prune the model of a folder of transformers block by block, and measure its perplexity."""
    treatment = _treatment(args)
    _check_numbers(args)
    check_folder(args.output, args.input, force=args.force)
    model, tokenizer = load(args.input, args.tokenizer or args.input)
    tokens = tokens_of(args.text, tokenizer)
    calibration, held_out = _split(tokens, args)
    check_fits(model, tokens, args.length)
    reports: list[BlockReport] = []

    def tell(report: BlockReport) -> None:
        reports.append(report)
        print(report, file=sys.stderr, flush=True)

    with without_cache(model):
        before = perplexity(model, held_out)
        batches = [{"input_ids": ids} for ids in calibration.split(args.batch_size)]
        prune(model, batches, treatment, blocks=args.blocks, device=args.device, progress=tell)
        after = perplexity(model, held_out)
    found = _report(args, calibration, held_out, reports, before, after)
    _write(args.output, squash(model), tokenizer, found)
    return _table(found, args.output)


def _treatment(args: Namespace) -> Any:
    """Return the treatment of a method."""
    pattern = as_pattern(args.pattern or "unstructured")
    sparsity = args.sparsity
    if takes_sparsity(pattern) and sparsity is None:
        raise CheckpointError("--sparsity must be given, a share of zeros in [0, 1].")
    if not takes_sparsity(pattern) and sparsity is not None:
        raise CheckpointError(f"--sparsity must be omitted with {args.pattern}; got {sparsity:g}.")
    if args.method == "magnitude":
        return Prune(sparsity, pattern=pattern)
    return OneShot(sparsity, pattern=pattern, **METHODS[args.method])


def _check_numbers(args: Namespace) -> None:
    for name, least in (("samples", 1), ("length", 2), ("batch_size", 1)):
        value = getattr(args, name)
        if value < least:
            option = name.replace("_", "-")
            raise CheckpointError(f"--{option} must be at least {least}; got {value}.")


def _split(tokens: Tensor, args: Namespace) -> tuple[Tensor, Tensor]:
    """Return sequences for calibration, and others from the last tenth of the text."""
    last = len(tokens) // 10
    if last < args.length:
        raise CheckpointError(
            "the text must have at least ten times --length tokens, of which the last tenth is "
            f"held out; it has {len(tokens):,}, and --length is {args.length}. Give more text, or "
            "a smaller --length."
        )
    seen, held_out = tokens[:-last], tokens[-last:]
    return (
        windows(seen, args.length, args.samples), windows(held_out, args.length, args.samples),
    )  # fmt: skip


def _report(
    args: Namespace, calibration: Tensor, held_out: Tensor, reports: list[BlockReport],
    before: float, after: float,
) -> dict[str, Any]:  # fmt: skip
    numel = sum(sum(report.numel.values()) for report in reports)
    kept = sum(sum(report.kept.values()) for report in reports)
    return {
        "model": args.input, "method": args.method, "sparsity": 1 - kept / max(numel, 1),
        "pattern": args.pattern or "unstructured",
        "calibration": {"sequences": len(calibration), "length": args.length, "text": args.text},
        "perplexity": {"sequences": len(held_out), "before": before, "after": after},
        "blocks": [{**asdict(report), "sparsity": report.sparsity} for report in reports],
    }  # fmt: skip


def _write(path: str, model: nn.Module, tokenizer: Any, report: dict[str, Any]) -> None:
    with replacing_folder(path) as folder:
        model.save_pretrained(folder)  # type: ignore[operator]
        tokenizer.save_pretrained(folder)
        (folder / REPORT).write_text(json.dumps(report, indent=1))


def _table(report: dict[str, Any], path: str) -> str:
    rows = [
        [block["name"], len(block["kept"]), f"{block['sparsity']:.2%}", _error(block)]
        for block in report["blocks"]
    ]
    before, after = (report["perplexity"][when] for when in ("before", "after"))
    return (
        as_text(["block", "tensors", "sparsity", "mean error"], rows)
        + f"\n{path}: perplexity on held-out text {before:.3f} -> {after:.3f}, sparsity of the "
        f"blocks {report['sparsity']:.2%}. The report is in {REPORT}."
    )


def _error(block: dict[str, Any]) -> str:
    errors = [row["error"] for row in block["rows"]]
    return f"{sum(errors) / len(errors):.4f}" if errors else "-"
