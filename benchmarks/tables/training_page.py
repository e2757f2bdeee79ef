"""The tables of training with compact weights, in docs/how-to/train-compact.md."""

from __future__ import annotations

import re
from statistics import mean

from benchmarks.tables.losses import NOISE
from benchmarks.tables.markdown import (
    Content,
    Table,
    Timings,
    significant,
    table,
    time_in,
    times,
)


def questions(content: Content) -> list[tuple[str, str, Timings]]:
    """Return network and threads, zeros, and the timings of each question."""
    found = []
    for question, timings in content["results"].items():
        network, zeros, number = re.fullmatch(r"(.*), (\d+%), (\d) threads", question).groups()
        found.append((f"{network}, {number} thread{'s' * (number != '1')}", zeros, timings))
    return found


def compact(content: Content) -> str:
    """Return how many times faster than dense a step is, with a column for each sparsity."""
    rows: dict[str, dict[str, str]] = {}
    for network, zeros, timings in questions(content):
        rows.setdefault(network, {})[zeros] = f"{1 / timings['compact']['ratio']:.1f}"
    columns = list(dict.fromkeys(zeros for row in rows.values() for zeros in row))
    cells = [[name, *(row.get(zeros, "-") for zeros in columns)] for name, row in rows.items()]
    return table(["times faster than dense", *(f"{zeros} zeros" for zeros in columns)], cells)


def slower(content: Content) -> str:
    """Return where a step with compact weights is slower than with dense ones or SparseLab's."""
    return "\n\n".join(_slower(content, peer) for peer in ("dense", "SparseLab"))


def _slower(content: Content, peer: str) -> str:
    found = {
        f"{network}, {zeros}": timings["compact"]["ratio"] / timings[peer]["ratio"]
        for network, zeros, timings in questions(content)
        if peer in timings
    }
    lost = sorted((ratio, case) for case, ratio in found.items() if ratio > NOISE)
    text = f"Slower than {peer} in {len(lost)} of {len(found)} cases"
    return f"{text}, at worst {times(lost[-1][0])} times: {lost[-1][1]}." if lost else f"{text}."


def steps(content: Content) -> str:
    """Return the ratio to the dense step, and milliseconds, of each kind of weights."""
    every = questions(content)
    ways = list(dict.fromkeys(way for *_, timings in every for way in timings if way != "dense"))
    rows = [
        [
            f"{network}, {zeros}",
            *(_ratio(timings, way) for way in ways),
            time_in(timings["dense"], "ms"),
        ]
        for network, zeros, timings in every
    ]
    return table(["network, threads, zeros", *ways, "dense, ms"], rows)


def _ratio(timings: Timings, way: str) -> str:
    return times(timings[way]["ratio"]) if way in timings else "-"


def updates(content: Content) -> str:
    """Return how long an update of the places takes, relative to a dense step."""
    found = content["results"]
    ways = list(next(iter(found.values())))[1:]
    rows = [
        [network, *(_ratio(each, way) for way in ways), time_in(each["dense step"], "ms")]
        for network, each in found.items()
    ]
    return table(["an update, in dense steps", *ways, "dense step, ms"], rows)


def memory(content: Content) -> str:
    """Return the peak memory of a process over that of the dense one."""
    found = content["memory"]
    ways = list(dict.fromkeys(way for each in found.values() for way in each if way != "dense"))
    rows = [
        [
            network,
            *(f"{each[way] / each['dense']:.2f}" if way in each else "-" for way in ways),
            significant(each["dense"] / 1e6),
        ]
        for network, each in found.items()
    ]
    return table(["network, 95% zeros", *ways, "dense, MB"], rows)


def accuracy(content: Content) -> str:
    """Return test accuracy and seconds per epoch of each kind of network on MNIST."""
    rows = [
        [
            f"{row['network']}, {row['zeros']} zeros, {row['weights']}",
            f"{mean(row['accuracies']):.2%}",
            ", ".join(f"{each:.2%}" for each in row["accuracies"]),
            f"{row['seconds per epoch']:.2f}",
            f"{row['epochs']} of batch {row['batch']}",
            ", ".join(map(str, row["seeds"])),
        ]
        for row in content["rows"]
    ]
    header = ["network", "test accuracy", "of each seed", "seconds per epoch", "epochs", "seeds"]
    return table(header, rows)


TABLES: dict[str, Table] = {
    "training.compact": compact,
    "training.slower": slower,
    "training.steps": steps,
    "training.memory": memory,
    "compact_updates.updates": updates,
    "mnist_compact.accuracy": accuracy,
}
