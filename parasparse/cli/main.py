"""The command line: arguments in, an exit code out."""

import os
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Sequence
from typing import Any

from parasparse.cli import commands, inspect_and_diff, prune, prune_blocks, shrink
from parasparse.files.checkpoint import CheckpointError

_Argument = tuple[str, dict[str, Any]]
_KEY: _Argument = (
    "--key",
    {
        "help": "the state dict to read, of a torch file that holds several: ema, or ema.module",
    },
)
_PATHS: list[_Argument] = [
    ("input", {"metavar": "IN"}),
    ("output", {"metavar": "OUT"}),
    ("--force", {"action": "store_true", "help": "replace OUT if it exists"}),
]
_IN_OUT = [*_PATHS, _KEY]
# Each command returns its text, and an exit code or nothing (0).
_COMMANDS: dict[str, tuple[Callable[[Namespace], str | tuple[str, int]], str, list[_Argument]]] = {
    "inspect": (inspect_and_diff.inspect, "list the tensors: zeros, patterns, bytes", [
        ("input", {"metavar": "FILE"}),
        _KEY,
        ("--json", {"action": "store_true", "help": "print JSON"}),
        ("--plot", {"metavar": "PNG", "help": "draw the sparsity of each weight"}),
    ]),
    "diff": (inspect_and_diff.diff, "list the differences; exit code 1 if there are any", [
        ("one", {"metavar": "A"}),
        ("two", {"metavar": "B"}),
        _KEY,
    ]),
    "prune": (prune.prune, "prune by rules", [
        *_IN_OUT,
        ("--rule", {"action": "append", "default": [], "metavar": "TARGET=VALUE",
                    "help": 'a name or glob, and a sparsity, "none" or N:M; each tensor follows '
                    "the first rule that reaches it"}),
        ("--config", {"metavar": "TOML", "help": "rules and options in a file"}),
        ("--pattern", {"help": "unstructured (default), N:M, block:16x16 or channel:0"}),
        ("--scope", {"help": "local (default), or global: rank the tensors of a rule jointly"}),
        ("--score", {"help": "magnitude (default) or random"}),
        ("--distribution", {"help": "uniform (default), erk or erdos-renyi"}),
        ("--max-sparsity", {"type": float, "help": "the highest sparsity that any tensor gets; "
                            "below 1, each keeps at least one entry"}),
        ("--masks", {"metavar": "FILE", "help": "also write the masks, by name"}),
        ("--seed", {"type": int, "help": "seed of random scores"}),
        ("--dry-run", {"action": "store_true", "help": "list what would be masked"}),
    ]),
    "prune-blocks": (prune_blocks.prune_blocks, "prune a language model in one shot from text", [
        *_PATHS,
        ("--text", {"nargs": "+", "required": True, "metavar": "FILE",
                    "help": "text to prune from; its last tenth measures the perplexity"}),
        ("--tokenizer", {"metavar": "FOLDER", "help": "folder of the tokenizer; default IN"}),
        ("--method", {"choices": [*prune_blocks.METHODS], "default": "admm"}),
        ("--sparsity", {"type": float, "help": "share of zeros, in [0, 1]"}),
        ("--pattern", {"help": "unstructured (default), N:M, block:16x16 or channel:0"}),
        ("--blocks", {"nargs": "+", "metavar": "GLOB", "help": "default: the largest ModuleList"}),
        ("--samples", {"type": int, "default": 128, "help": "sequences of text (default 128)"}),
        ("--length", {"type": int, "default": 512, "help": "tokens of each (default 512)"}),
        ("--batch-size", {"type": int, "default": 8, "help": "sequences at a time (default 8)"}),
        ("--device", {"help": "where a block runs while it is pruned"}),
    ]),
    "squash": (commands.squash, "fold the checkpoint's masks into dense weights", _IN_OUT),
    "binarize": (commands.binarize, "make the masks bool and fold their scale in", _IN_OUT),
    "masks": (commands.masks, "extract the masks", [
        *_IN_OUT,
        ("--zeros", {"action": "store_true", "help": "the nonzero entries of a dense one"}),
    ]),
    "shrink": (shrink.shrink, "cut the tensors by a plan of plan_shrink", [
        *_IN_OUT,
        ("--plan", {"required": True, "metavar": "JSON", "help": "a plan, as JSON"}),
    ]),
    "pack": (commands.pack, "write the checkpoint without its zeros", _IN_OUT),
    "unpack": (commands.unpack, "write a packed checkpoint dense", _PATHS),
}  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; return 0 if it is done, 1 if it failed or found differences, 2 if misused.

    Examples:
        >>> main(["inspect", "nowhere.safetensors"])
        1
    """
    try:
        args = _parser().parse_args(arguments)
    except SystemExit as error:  # argparse has printed the error, or help
        return int(error.code or 0)
    try:
        result = _COMMANDS[args.command][0](args)
        text, code = (result, 0) if isinstance(result, str) else result
        print(text, flush=True)
    except KeyboardInterrupt:
        print("parasparse: interrupted; nothing was written.", file=sys.stderr)
        return 130
    except BrokenPipeError:  # as by `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (CheckpointError, OSError, MemoryError, ValueError, RuntimeError) as error:
        place = getattr(args, "output", None)
        print(f"parasparse: error: {_in_a_line(error, place)}", file=sys.stderr)
        return 1
    return code


def _in_a_line(error: BaseException, output: str | None) -> str:
    if isinstance(error, OSError) and error.strerror:
        place = error.filename or output
        return f'"{place}": {error.strerror}. Nothing was written.'
    notes = "; ".join(getattr(error, "__notes__", ()))
    text = f"{error} ({notes})" if notes else str(error)
    return " ".join(text.split()) or type(error).__name__


def _parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog="parasparse",
        description="Inspect checkpoints, prune them, fold their masks: .safetensors, .pt, .pth "
        "and Hugging Face folders, one tensor at a time.",
    )
    add = parser.add_subparsers(dest="command", required=True, metavar="command").add_parser
    for name, (_, help_, arguments) in _COMMANDS.items():
        command = add(name, help=help_)
        for argument, options in arguments:
            command.add_argument(argument, **options)
    return parser
