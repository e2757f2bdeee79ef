"""The tables of other runtimes, in docs/payoff.md."""

from __future__ import annotations

import re

from benchmarks.tables.markdown import Content, Table, plain, significant, table

SPARSITIES = ("0%", "80%", "90%", "95%", "98%")
QUESTION = re.compile(r"(.*), (\d+%), (batch \d+, \d thread)\(s\)")
Figures = dict[str, dict[str, float]]


def processor(content: Content) -> str:
    """Return milliseconds of processor time, the fastest runtime, and what is not measured."""
    found = content["processor"]
    rows, header = _rows(found)
    for row, times in zip(rows, _in_order(found).values(), strict=True):
        row.append(min(times, key=times.__getitem__))
    return f"{table([*header, 'least'], rows)}\n\n{_missing(found)}"


def wall(content: Content) -> str:
    return table(*reversed(_rows(content["wall"])))


def differences(content: Content) -> str:
    """Return the largest difference of an output from torch's, over the largest output."""
    found = content["differences"]
    names = _runtimes(found)
    rows = [
        [plain(question), *(f"{each[name]:.0e}" if name in each else "-" for name in names)]
        for question, each in _in_order(found).items()
    ]
    return table(["network, zeros", *names], rows)


def _rows(found: Figures) -> tuple[list[list[str]], list[str]]:
    names = _runtimes(found)
    rows = [
        [plain(question), *(significant(each[name]) if name in each else "-" for name in names)]
        for question, each in _in_order(found).items()
    ]
    return rows, ["network, zeros", *names]


def _runtimes(found: Figures) -> list[str]:
    return list(dict.fromkeys(name for each in found.values() for name in each))


def _in_order(found: Figures) -> Figures:
    """Sort the questions by batch and threads, network and sparsity."""

    def key(question: str) -> tuple[int, int, str, int]:
        name, zeros, setting = QUESTION.fullmatch(question).groups()
        batch, threads = map(int, re.findall(r"\d+", setting))
        return threads, batch, name, SPARSITIES.index(zeros)

    return {question: found[question] for question in sorted(found, key=key)}


def _missing(found: Figures) -> str:
    """Return a sentence with the sparsities of each network that are not measured."""
    asked = [QUESTION.fullmatch(question).groups() for question in found]
    parts = []
    for setting in (f"batch {batch}, {threads} thread" for threads in (1, 2) for batch in (1, 16)):
        if setting not in {each for *_, each in asked}:
            parts.append(f"{plain(setting + '(s)')}: all networks")
            continue
        left = []
        for name in sorted({name for name, *_ in asked}):
            zeros = [each for each in SPARSITIES if (name, each, setting) not in asked]
            if zeros:
                left.append(f"{name} ({', '.join(zeros)})")
        if left:
            parts.append(f"{plain(setting + '(s)')}: {', '.join(left)}")
    return f"Not measured yet: {'; '.join(parts)}." if parts else "All are measured."


TABLES: dict[str, Table] = {
    "runtimes.processor": processor,
    "runtimes.wall": wall,
    "runtimes.differences": differences,
}
