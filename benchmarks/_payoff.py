"""The tables of docs/payoff.md."""

from __future__ import annotations

import re
from collections.abc import Callable

from benchmarks._markdown import Content, asked, percent, significant, table


def faster(timing: dict[str, float]) -> str:
    """Return how many times faster than dense."""
    return f"{1 / timing['ratio']:.2f}"


def layers(content: Content) -> str:
    rows = []
    pattern = r"(\d+ x \d+), (\d+%), (\d+) rows \((\w+), blocks (\w+)\)"
    for (*about, entries, blocks), ts in asked(content, pattern):
        dense, raw, ours, our_blocks = ts.values()
        given = [*about, significant(dense["median"]), faster(raw), faster(ours), f"`{entries}`"]
        rows.append([*given, faster(our_blocks), f"`{blocks}`"])
    header = ["weight", "zeros", "rows", "dense ms", "raw", "accelerated", "format"]
    return table([*header, "blocks", "format"], rows)


def networks(content: Content) -> str:
    rows = []
    pattern = r"(.*), (\d+%), (\d) thread\(s\), .* of the ceiling"
    for about, ts in asked(content, pattern):
        ms = [significant(ts[name]["median"]) for name in ("dense", "accelerated")]
        estimate = f"{ts['dense']['median'] / ts['ceiling']['median']:.2f}"
        rows.append([*about, *ms, faster(ts["accelerated"]), estimate])
    header = ["network", "zeros", "threads", "dense ms", "accelerated ms", "times faster"]
    return table([*header, "estimate"], rows)


def sizes(content: Content) -> str:
    rows: dict[str, list[str]] = {}
    columns = []
    for question, ratio in content["sizes"].items():
        kind, dtype, zeros, suffix = question.replace("torch.", "").split(", ")
        columns.append(f"{kind}, {dtype}")
        rows.setdefault(f"{percent(zeros)}, `{suffix}`", []).append(f"{ratio:.3f}")
    header = ["zeros, file", *dict.fromkeys(columns)]
    return table(header, [[name, *cells] for name, cells in rows.items()])


def speeds(content: Content) -> str:
    """Return megabytes of dense bytes a second."""
    rows, names = [], []
    pattern = r"(.*), torch\.(\w+), (\d+%), (\d) thread\(s\), (\d+) MB of dense bytes"
    for (kind, dtype, zeros, number, size), ts in asked(content, pattern):
        speed = [f"{int(size) * 1e3 / timing['median']:,.0f}" for timing in ts.values()]
        rows.append([f"{kind}, {zeros}", dtype, number, *speed])
        names = [re.sub(r" (\.\w+)$", r" `\1`", name) for name in ts]
    return table(["zeros", "type", "threads", *names], rows)


TABLES: dict[str, Callable[[Content], str]] = {
    "payoff.layers": layers,
    "payoff.networks": networks,
    "packing.sizes": sizes,
    "packing.speeds": speeds,
}
