"""Results as Markdown: shared by all tables."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

Content = dict[str, Any]
Timings = dict[str, dict[str, float]]
Table = Callable[[Content], str]


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table; all columns of numbers except the first are aligned to the right."""
    right = [
        i > 0 and all(re.match(r"-?\d|-?$", row[i]) for row in rows) for i in range(len(header))
    ]
    rule = ["---:" if is_right else "---" for is_right in right]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (header, rule, *rows))


def asked(content: Content, pattern: str) -> Iterator[tuple[tuple[str, ...], Timings]]:
    """Yield the groups of each question that matches completely, and its timings by name."""
    for question, timings in content["results"].items():
        if found := re.fullmatch(pattern, question):
            yield tuple(plain(group) for group in found.groups()), timings


def grid(content: Content, pattern: str, corner: str, *, unit: str = "ms") -> str:
    """Return a row for each question that matches.

    The first cell joins the groups of the question. Then come the ratios to the baseline, which is
    the first timing, each with its time in parentheses and parasparse first; last the baseline's
    time.
    """
    questions = list(asked(content, pattern))
    baseline, *others = dict.fromkeys(name for _, timings in questions for name in timings)
    others.sort(key=lambda name: name != "parasparse")  # stable
    rows = []
    for groups, timings in questions:
        cells = [ratio_first(timings.get(name), unit=unit) for name in others]
        rows.append([", ".join(groups), *cells, time_in(timings[baseline], unit)])
    return table([corner, *map(short, others), f"{short(baseline)}, {unit}"], rows)


def flipped(content: Content, pattern: str, corner: str, *, unit: str = "ms") -> str:
    """Return a row for each timing, and a column for each question that matches, by its group."""
    columns = {groups[0]: timings for groups, timings in asked(content, pattern)}
    names = list(dict.fromkeys(name for timings in columns.values() for name in timings))
    rows = [
        [
            name,
            *(ratio_first(ts[name], unit=unit) if name in ts else "-" for ts in columns.values()),
        ]
        for name in names
    ]
    return table([corner, *columns], rows)


PER = {"s": 1e3, "ms": 1.0, "us": 1e-3}  # in milliseconds


def time_in(timing: dict[str, float], unit: str) -> str:
    return significant(timing["median"] / PER[unit])


def ratio_first(timing: dict[str, float] | None, *, unit: str) -> str:
    return "-" if timing is None else f"{times(timing['ratio'])} ({time_in(timing, unit)})"


def significant(value: float) -> str:
    """Return three digits, or all before the point: 0.0586, 1.84, 26,510."""
    digits = 2 - math.floor(math.log10(abs(value))) if value else 0
    return f"{value:,.{max(digits, 0)}f}"


def times(ratio: float) -> str:
    return f"{ratio:.2f}" if ratio < 10 else f"{ratio:.1f}"


def plain(text: str) -> str:
    """Return a question, or part of one, with its singulars and plurals written out."""
    text = re.sub(r"\b1 thread\(s\)", "1 thread", text).replace("thread(s)", "threads")
    return re.sub(r"\b1 rows", "1 row", text)


def short(name: str) -> str:
    """Return the name of a timing as a column header has it."""
    known = {"clone": "plain copy"}
    return known.get(name, re.sub(r"^(torch\.nn\.utils\.|torch\.ao |stock )", "", name))


def machine(content: Content) -> str:
    """Return one line: the machine, the versions and the date of the results."""
    about = content["machine"]
    parts = [about["processor"], f"{about['cores']} cores"]
    parts.append(f"torch {about['torch'].partition('+')[0]}")
    parts += [f"{name} {version}" for name, version in content.get("versions", {}).items()]
    return ", ".join([*parts, f"Python {about['python']}", about["date"]]) + "."
