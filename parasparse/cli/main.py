"""The command line itself: arguments in, an exit code out."""

import argparse
import os
import sys
from collections.abc import Callable, Sequence

from parasparse.cli import commands, inspect_and_diff, prune
from parasparse.files.checkpoint import CheckpointError

_WRITES: dict[str, Callable[[argparse.Namespace], str]] = {
    "prune": prune.prune,
    "squash": commands.squash,
    "binarize": commands.binarize,
    "masks": commands.masks,
    "pack": commands.pack,
    "unpack": commands.unpack,
}
_LOOKS: dict[str, Callable[[argparse.Namespace], tuple[str, int]]] = {
    "inspect": inspect_and_diff.inspect,
    "diff": inspect_and_diff.diff,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; return 0 if it is done, 1 if it failed or found differences, 2 if misused.

    Examples:
        >>> main(["inspect", "nowhere.safetensors"])
        1
    """
    parser = _parser()
    try:
        args = parser.parse_args(arguments)
    except SystemExit as error:  # argparse has printed what is wrong, or help
        return int(error.code or 0)
    try:
        if args.command in _LOOKS:
            text, code = _LOOKS[args.command](args)
        else:
            text, code = _WRITES[args.command](args), 0
        print(text, flush=True)
    except KeyboardInterrupt:
        print("parasparse: interrupted; nothing was written.", file=sys.stderr)
        return 130
    except BrokenPipeError:  # of `| head`
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
    return " ".join(str(error).split()) or type(error).__name__


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="parasparse",
        description="Look at checkpoints, prune them, fold their masks: .safetensors, .pt, .pth "
        "and Hugging Face folders, a tensor at a time.",
    )
    add = parser.add_subparsers(dest="command", required=True, metavar="command").add_parser

    inspect = add("inspect", help="list the tensors: zeros, patterns, bytes")
    inspect.add_argument("input", metavar="FILE")
    inspect.add_argument("--json", action="store_true", help="print JSON")
    inspect.add_argument("--plot", metavar="PNG", help="draw the sparsity of each weight")

    diff = add("diff", help="say what differs; exit code 1 if anything does")
    diff.add_argument("one", metavar="A")
    diff.add_argument("two", metavar="B")

    prune = _writing(add("prune", help="prune by rules"))
    prune.add_argument(
        "--rule",
        action="append",
        default=[],
        metavar="TARGET=VALUE",
        help='a name or glob, and a sparsity, "none" or N:M; the first rule that reaches a tensor '
        "has it",
    )
    prune.add_argument("--config", metavar="TOML", help="rules and options in a file")
    prune.add_argument("--pattern", help="unstructured (default), N:M, block:16x16 or channel:0")
    prune.add_argument(
        "--scope", help="local (default), or global: rank what a rule reaches jointly"
    )
    prune.add_argument("--score", help="magnitude (default) or random")
    prune.add_argument("--distribution", help="uniform (default), erk or erdos-renyi")
    prune.add_argument("--masks", metavar="FILE", help="write the masks as well, by name")
    prune.add_argument("--seed", type=int, help="of random scores")
    prune.add_argument("--dry-run", action="store_true", help="say what would be masked")

    _writing(add("squash", help="fold the masks that the checkpoint holds into dense weights"))
    _writing(add("binarize", help="make its masks bool, their scale in the weights"))
    masks = _writing(add("masks", help="extract its masks"))
    masks.add_argument("--zeros", action="store_true", help="of a dense one: what is not 0")
    _writing(add("pack", help="write it without its zeros"))
    _writing(add("unpack", help="write what was packed"))
    return parser


def _writing(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    parser.add_argument("input", metavar="IN")
    parser.add_argument("output", metavar="OUT")
    parser.add_argument("--force", action="store_true", help="replace OUT if it is there")
    return parser
