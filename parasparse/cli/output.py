"""Parts that the writing commands share: the output, and the note on missing entries."""

from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager

from parasparse.cli.progress import Advance, progress
from parasparse.files.checkpoint import Checkpoint
from parasparse.files.layout import Layout, Put, pieces
from parasparse.files.writing import TORCH, writing
from parasparse.text import listed


@contextmanager
def output(args: Namespace, source: Checkpoint, layout: Layout) -> Iterator[tuple[Put, Advance]]:
    """Open the output of a command; yield functions that take tensors and count bytes."""
    work = progress(args.command, source.nbytes)
    with writing(args.output, source, layout) as put, work as advance:
        yield put, advance


def copy(source: Checkpoint, key: str, put: Put, advance: Advance) -> None:
    """Write tensor `key` of `source` unchanged."""
    put(key, pieces(source.read(key)))
    advance(source.infos[key].nbytes)


def left_out(source: Checkpoint, path: str) -> str:
    """Return sentences on what a file at `path` lacks, and on other state dicts of `source`."""
    if not path.lower().endswith(TORCH) and source.beside_state_dict:
        return f" Left out: {', '.join(source.beside_state_dict)}.{others(source)}"
    return others(source)


def others(source: Checkpoint) -> str:
    """Return a sentence on the state dicts of `source` that were not read."""
    names = listed(source.other_state_dicts)
    return f" Not read: {names}; choose with --key." if names else ""
