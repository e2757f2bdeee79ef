"""What the commands that write share: the output, how far the work is, what is left out."""

from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager

from parasparse.cli.progress import Advance, progress
from parasparse.files.checkpoint import Checkpoint
from parasparse.files.layout import Layout, Put, pieces
from parasparse.files.writing import TORCH, writing


@contextmanager
def output(args: Namespace, source: Checkpoint, layout: Layout) -> Iterator[tuple[Put, Advance]]:
    """Open what `args` names for writing; yield what takes tensors, and what counts bytes."""
    with (
        writing(args.output, source, layout) as put,
        progress(args.command, source.nbytes) as advance,
    ):
        yield put, advance


def copy(source: Checkpoint, key: str, put: Put, advance: Advance) -> None:
    """Write tensor `key` of `source` as it is."""
    put(key, pieces(source.read(key)))
    advance(source.infos[key].nbytes)


def left_out(source: Checkpoint, path: str) -> str:
    """Return the sentence on entries of the file that a file at `path` does not take."""
    if path.lower().endswith(TORCH) or not source.beside_state_dict:
        return ""
    return f" Left out: {', '.join(source.beside_state_dict)}."
