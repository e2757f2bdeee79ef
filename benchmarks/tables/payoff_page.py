"""The tables of docs/payoff.md."""

from __future__ import annotations

import re

from benchmarks.tables.markdown import Content, Table, asked, plain, significant, table, times


def faster(timing: dict[str, float]) -> str:
    """Return how many times faster than dense."""
    return f"{1 / timing['ratio']:.2f}"


def layers(content: Content) -> str:
    rows = []
    pattern = r"(\d+ x \d+, \d+%, \d+ rows) \((\w+), blocks (\w+)\)"
    for (about, entries, blocks), ts in asked(content, pattern):
        dense, raw, ours, our_blocks = ts.values()
        given = [about, faster(ours), faster(raw), faster(our_blocks), f"`{entries}`"]
        rows.append([*given, f"`{blocks}`", significant(dense["median"])])
    header = ["weight, zeros, rows", "unstructured", "raw", "blocks", "format", "format of blocks"]
    return table([*header, "dense, ms"], rows)


def networks(content: Content) -> str:
    rows = []
    pattern = r"(.*, \d+%, \d thread\(s\)), .* of the ceiling"
    for (about,), ts in asked(content, pattern):
        ms = [significant(ts[name]["median"]) for name in ("dense", "accelerated")]
        estimate = f"{ts['dense']['median'] / ts['ceiling']['median']:.2f}"
        rows.append([about, faster(ts["accelerated"]), estimate, *ms])
    header = ["network, zeros, threads", "times faster", "estimate"]
    return table([*header, "dense, ms", "accelerated, ms"], rows)


def steps_of_fuse(content: Content) -> str:
    rows = [
        [question.split(", ")[1], *(significant(each["median"]) for each in ts.values())]
        for question, ts in content["results"].items()
    ]
    names = next(iter(content["results"].values()))
    return table(["zeros", *names], rows)


def sizes(content: Content) -> str:
    rows: dict[str, list[str]] = {}
    columns = []
    for question, ratio in content["sizes"].items():
        kind, dtype, zeros, suffix = question.replace("torch.", "").split(", ")
        columns.append(f"{kind}, {dtype}")
        rows.setdefault(f"{zeros}, `{suffix}`", []).append(f"{ratio:.3f}")
    header = ["zeros, file", *dict.fromkeys(columns)]
    return table(header, [[name, *cells] for name, cells in rows.items()])


def speeds(content: Content) -> str:
    """Return the time over that of torch, and megabytes of dense bytes per second."""
    rows, names = [], []
    pattern = r"(.*), torch\.(\w+), (\d+%), (\d thread\(s\)), (\d+) MB of dense bytes"
    for (kind, dtype, zeros, number, size), ts in asked(content, pattern):
        save = ts["save .pt"]["ratio"] / ts["torch.save, dense"]["ratio"]
        load = ts["load_packed .pt"]["ratio"] / ts["torch.load, dense"]["ratio"]
        speed = [f"{int(size) * 1e3 / timing['median']:,.0f}" for timing in ts.values()]
        about = f"{kind}, {zeros}, {dtype}, {plain(number)}"
        rows.append([about, times(save), times(load), *speed])
        names = [re.sub(r" (\.\w+)$", r" `\1`", name) for name in ts]
    header = ["zeros, type, threads", "`save` / `torch.save`", "`load_packed` / `torch.load`"]
    return table([*header, *names], rows)


def shares(content: Content) -> str:
    """Return the share of the dense bytes that each tool takes."""
    names = list(dict.fromkeys(name for row in content["sizes"].values() for name in row))
    rows = [
        [question, *(plain_share(row.get(name, "-")) for name in names)]
        for question, row in content["sizes"].items()
    ]
    return table(["weights, type, zeros", *names], rows)


def plain_share(share: float | str) -> str:
    return share if isinstance(share, str) else f"{share:.4f}"


def packed_speeds(content: Content) -> str:
    """Return for each tool the gigabytes of dense bytes that it writes, and that it reads."""
    names = list(dict.fromkeys(name for row in content["speeds"].values() for name in row))
    rows = []
    for question, row in content["speeds"].items():
        both = [row.get(name) for name in names]
        cells = [f"{one['save']:.3f} / {one['load']:.3f}" if one else "-" for one in both]
        rows.append([question, *cells])
    return table(["weights, type, zeros", *names], rows)


TABLES: dict[str, Table] = {
    "payoff.layers": layers,
    "payoff.networks": networks,
    "fuse_steps.steps": steps_of_fuse,
    "packing.sizes": sizes,
    "packing.speeds": speeds,
    "packed_sizes.sizes": shares,
    "packed_sizes.speeds": packed_speeds,
}
