"""Rows of text for terminals and notebooks."""

from __future__ import annotations

import html
import re
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class PlanRow:
    """What `sparsify` would do to one tensor.

    Attributes:
        name: plain name of the tensor.
        shape: its shape.
        rule: the left side of the rule that has it; "every weight" for a treatment alone.
        treatment: the right side.
        kept: entries that the mask keeps, of both tensors of a pair; None where that is not known:
            an unset or learned mask, or a tensor on the meta device.
    """

    name: str
    shape: tuple[int, ...]
    rule: str
    treatment: str
    kept: int | None


class Plan(tuple[PlanRow, ...]):
    """The rows of `plan`; prints as a table."""

    __slots__ = ()

    def __repr__(self) -> str:
        rows = [
            (r.name, r.shape, r.rule, r.treatment, "?" if r.kept is None else f"{r.kept:,}")
            for r in self
        ]
        return as_text(("name", "shape", "rule", "treatment", "kept"), rows)


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
