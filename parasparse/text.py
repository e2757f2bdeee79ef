"""How things are worded: lists of names, the nearest name, tables as text and as HTML."""

import difflib
import html
import re
from collections.abc import Iterable, Sequence
from numbers import Real
from typing import Any

from torch import Tensor


def listed(names: Iterable[object], *, most: int = 8) -> str:
    """Return `names` quoted and joined by commas; past `most`, how many more there are."""
    quoted = [f'"{name}"' for name in names]
    rest = len(quoted) - most
    return ", ".join(quoted[:most]) + (f" and {rest} more" if rest > 0 else "")


def nearest(name: str, names: Iterable[str]) -> str:
    """Return ' (nearest: ...)' with the names most like `name`, or '' if none is like it."""
    found = difflib.get_close_matches(name, list(names), n=3, cutoff=0.5)
    return f" (nearest: {listed(found)})" if found else ""


def as_text(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Return a table with a line under its head; the first column to the left, others right."""
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


def as_html(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Return the same table for a notebook."""
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
    text = re.sub(r"<(?:function|built-in method) (\S+) .*?>", r"\1", repr(value))
    return str(getattr(value, "__name__", text))
