"""Results as Markdown: what every table has in common."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

Content = dict[str, Any]
Timings = dict[str, dict[str, float]]
Cell = Callable[[dict[str, float]], str]


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table; columns that hold numbers alone, but for the first, are set to the right."""
    right = [
        i > 0 and all(re.match(r"-?\d|-?$", row[i]) for row in rows) for i in range(len(header))
    ]
    rule = ["---:" if is_right else "---" for is_right in right]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (header, rule, *rows))


def asked(content: Content, pattern: str) -> Iterator[tuple[tuple[str, ...], Timings]]:
    """Yield the groups of each question that matches as a whole, and its timings by name."""
    for question, timings in content["results"].items():
        if found := re.fullmatch(pattern, question):
            yield tuple(percent(group) for group in found.groups()), timings


def grid(content: Content, pattern: str, columns: Sequence[str], *, per: float = 1.0) -> str:
    """Return a row for each question that matches: its groups, then every way's time and ratio.

    The first way is what the others are compared with, and has no ratio. `per` is in milliseconds.
    """
    rows, names = [], []
    for groups, timings in asked(content, pattern):
        names = list(timings)
        cells = [with_ratio(timing, per=per) for timing in timings.values()]
        rows.append([*groups, cells[0].partition(" ")[0], *cells[1:]])
    return table([*columns, *map(short, names)], rows)


def flipped(content: Content, pattern: str, corner: str, *, per: float = 1.0) -> str:
    """Return a row for each way, and a column for each question that matches, by its one group."""
    columns = {groups[0]: timings for groups, timings in asked(content, pattern)}
    names = list(dict.fromkeys(name for timings in columns.values() for name in timings))
    rows = [
        [name, *(with_ratio(ts[name], per=per) if name in ts else "-" for ts in columns.values())]
        for name in names
    ]
    return table([corner, *columns], rows)


def with_ratio(timing: dict[str, float], *, per: float = 1.0) -> str:
    return f"{significant(timing['median'] / per)} ({times(timing['ratio'])})"


def significant(value: float) -> str:
    """Return three digits, or all before the point: 0.0586, 1.84, 26,510."""
    digits = 2 - math.floor(math.log10(abs(value))) if value else 0
    return f"{value:,.{max(digits, 0)}f}"


def times(ratio: float) -> str:
    return f"{ratio:.2f}" if ratio < 10 else f"{ratio:.1f}"


def percent(text: str) -> str:
    return re.sub(r"(\d)%", r"\1 %", text)


def short(name: str) -> str:
    """Return the name of a way as a column has it."""
    known = {"clone": "plain copy", "dense": "dense"}
    return known.get(name, re.sub(r"^(torch\.nn\.utils\.|torch\.ao |stock )", "", name))


def machine(content: Content) -> str:
    """Return one line: what the results were had on, and when."""
    about = content["machine"]
    parts = [about["processor"], f"{about['cores']} cores"]
    parts.append(f"torch {about['torch'].partition('+')[0]}")
    parts += [f"{name} {version}" for name, version in content.get("versions", {}).items()]
    return ", ".join([*parts, f"Python {about['python']}", about["date"]]) + "."
