"""Words things: lists of names, the nearest names, missing libraries, tables as text and HTML."""

import difflib
import html
import re
from collections.abc import Iterable, Sequence
from numbers import Real
from typing import Any

from torch import Tensor


def listed(names: Iterable[object], *, most: int = 8) -> str:
    """Return `names` quoted and joined by commas, up to `most` of them."""
    quoted = [f'"{name}"' for name in names]
    rest = len(quoted) - most
    return ", ".join(quoted[:most]) + (f" and {rest} more" if rest > 0 else "")


def quoted_module(name: str) -> str:
    """Return the name of a module in quotes: a bare 3 reads as a number."""
    return f'"{name}"' if name else "the model"


def nearest(name: str, names: Iterable[str]) -> str:
    """Return ' (nearest: ...)' with the names that resemble `name`, or '' if there are none."""
    found = difflib.get_close_matches(name, list(names), n=3, cutoff=0.5)
    return f" (nearest: {listed(found)})" if found else ""


def needs(what: str, library: str, extra: str) -> str:
    """Return that `what` needs `library`, and the commands that install it."""
    return (
        f'{what} needs {library}: run `pip install "parasparse[{extra}]"`, or '
        f'`pip install ".[{extra}]"` in a checkout.'
    )


def as_text(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Return a table with a line below `head`, whose first column is left-aligned."""
    cells = [tuple(map(str, row)) for row in (head, *rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = [
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in cells
    ]
    return "\n".join([lines[0], "-" * (sum(widths) + 2 * len(widths) - 2), *lines[1:]])


def noted(rows: Sequence[object]) -> str:
    """Return the line below a table that names the tensors left dense."""
    if not rows:
        return ""
    more = f" and {len(rows) - 8} more" if len(rows) > 8 else ""
    return f"\nleft dense: {', '.join(map(str, rows[:8]))}{more}"


def as_html(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Return an HTML table for notebooks."""
    cells = [
        "<tr>" + "".join(f"<{tag}>{html.escape(str(cell))}</{tag}>" for cell in row) + "</tr>"
        for tag, row in [("th", head), *(("td", row) for row in rows)]
    ]
    return "<table>" + "".join(cells) + "</table>"


def described(value: Any) -> str:
    """Return a rule's target or treatment in a few words."""
    if isinstance(value, re.Pattern):
        return str(value.pattern)
    if isinstance(value, tuple) and value and all(isinstance(v, type) for v in value):
        return " | ".join(v.__name__ for v in value)
    if isinstance(value, (str, Real)) or value is None:
        return str(value)
    if isinstance(value, Tensor) or hasattr(value, "__array__"):
        return f"mask of shape {tuple(value.shape)}"
    if isinstance(value, (list, tuple)):
        return "mask in a list"
    if repr(value) == object.__repr__(value):
        return type(value).__name__
    text = re.sub(r"<(?:function|built-in method) (\S+) .*?>", r"\1", repr(value))
    return str(getattr(value, "__name__", text))
