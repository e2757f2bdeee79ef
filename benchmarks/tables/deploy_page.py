"""The table of docs/how-to/deploy.md."""

from __future__ import annotations

from benchmarks.tables.markdown import Content, Table, asked, significant, table, times

KINDS = {"sparse": "unstructured", "sparse, blocks": "4 x 1"}


def networks(content: Content) -> str:
    """Return file size and processor time over those of the network that MNN runs dense."""
    rows = []
    for (name, zeros), ts in sorted(asked(content, r"(.*), (\d+%)")):
        sizes = content["sizes"][f"{name}, {zeros}"]
        for kind, zeros_are in KINDS.items():
            if kind in ts:
                about = f"{name}, {zeros}, {zeros_are}"
                ratios = [f"{sizes[kind]:.2f}", times(ts[kind]["ratio"])]
                ms = [significant(ts[each]["median"]) for each in ("dense", kind)]
                rows.append([about, *ratios, *ms])
    return table(["network, zeros", "file", "time", "dense, ms", "sparse, ms"], rows)


TABLES: dict[str, Table] = {"mnn.networks": networks}
