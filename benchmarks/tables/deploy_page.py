"""The table of docs/how-to/deploy.md."""

from __future__ import annotations

from benchmarks.tables.markdown import Content, Table, asked, significant, table, times


def networks(content: Content) -> str:
    """Return file size and processor time over those of the network that MNN runs dense."""
    rows = []
    for (about,), ts in asked(content, r"(.*, \d+%)"):
        dense, sparse = ts["dense"], ts["sparse"]
        ratios = [f"{content['sizes'][about]:.2f}", times(sparse["ratio"])]
        rows.append([about, *ratios, significant(dense["median"]), significant(sparse["median"])])
    return table(["network, zeros", "file", "time", "dense, ms", "sparse, ms"], rows)


TABLES: dict[str, Table] = {"mnn.networks": networks}
