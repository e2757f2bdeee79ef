"""Progress: a bar on a terminal if rich is installed, plain lines otherwise."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

Advance = Callable[[int], None]


@contextmanager
def progress(what: str, total: int) -> Iterator[Advance]:
    """Yield a function that adds to the bytes done, of `total`; progress goes to stderr."""
    bar = _bar() if sys.stderr.isatty() else None
    if bar is None:
        yield _lines(what, total)
        return
    with bar:
        task = bar.add_task(what, total=total)
        yield lambda nbytes: bar.advance(task, nbytes)


def _bar() -> Any:
    try:
        from rich.console import Console
        from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn
    except ImportError:
        return None
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn())
    return Progress(*columns, console=Console(stderr=True))


def _lines(what: str, total: int) -> Advance:
    """Return a function that prints a line at each quarter of large work."""
    done, quarter = 0, 1

    def advance(nbytes: int) -> None:
        nonlocal done, quarter
        done += nbytes
        while total > 1 << 28 and quarter <= 4 and done * 4 >= total * quarter:
            print(f"{what}: {25 * quarter}% of {total / 1e6:,.0f} MB", file=sys.stderr, flush=True)
            quarter += 1

    return advance
