"""The tables of docs/one-shot-results.md."""

from __future__ import annotations

from functools import partial

from benchmarks.tables.markdown import Content, Table, grid, significant, table


def layers(content: Content) -> str:
    return grid(content, "layer, (.*)", "layer", unit="s")


def errors(content: Content) -> str:
    """Return the relative squared error of the outputs of each layer."""
    ways = sorted({way for found in content["errors"].values() for way in found})
    rows = [
        [layer, *(f"{found[way]:.5f}" if way in found else "-" for way in ways)]
        for layer, found in content["errors"].items()
    ]
    return table(["layer", *ways], rows)


def block(content: Content, size: str) -> str:
    """Return the seconds for each number of tokens, and the peak memory."""
    found = content["blocks"][size]
    seconds = [key for key in next(iter(found.values())) if key != "bytes"]
    rows = [
        [way, *(significant(of[key]) for key in seconds), significant(of["bytes"] / 1e6)]
        for way, of in found.items()
    ]
    return table([f"one block, {size}", *seconds, "memory, MB"], rows)


TABLES: dict[str, Table] = {
    "oneshot.layers": layers,
    "oneshot.errors": errors,
    "oneshot.block-of-1-b": partial(block, size="1 B"),
    "oneshot.block-of-7-b": partial(block, size="7 B"),
}
