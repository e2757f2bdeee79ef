"""Comparisons with dense networks and other tools, and where parasparse is slower or larger."""

from __future__ import annotations

import re
from dataclasses import dataclass

from benchmarks.tables.markdown import Content, plain, table, times

NOISE = 1.02  # smaller ratios count as equal


@dataclass(frozen=True)
class Compared:
    """The questions of a results file in which the time or bytes of `ours` and `theirs` compare.

    With `speed`, the times of that are compared of which the file has speeds.
    """

    what: str
    file: str
    questions: str
    ours: str
    theirs: tuple[str, ...]
    key: str = "results"
    speed: str = ""


PRUNE, FAKE = "torch.nn.utils.prune", "torch.ao FakeSparsity"
MASKERS = (PRUNE, FAKE, "stock where", "stock product")
COMPARED = (
    Compared("one masked weight", "overhead", r"2\^.*", "parasparse", MASKERS),
    Compared("reading a small weight", "overhead", "reading.*", "parasparse", MASKERS),
    Compared("networks with masks", "overhead", ".*", "masked", ("dense",)),
    Compared("selecting global masks", "selection", ".*", "parasparse",
             ("kthvalue", "topk", "global_unstructured")),
    Compared("computing all masks", "updates", ".*", "parasparse",
             (PRUNE, "torch.ao WeightNormSparsifier")),
    Compared("compiling blocks", "blocks", ".*", "parasparse",
             ("dense", PRUNE, FAKE, "stock where")),
    Compared("one layer, unstructured", "payoff", r"\d+ x .*", "accelerated", ("dense", "raw")),
    Compared("networks, unstructured", "payoff", ".* of the ceiling", "accelerated", ("dense",)),
    Compared("one layer, blocks of 16 x 16", "payoff", ".*", "accelerated, 16 x 16 blocks",
             ("dense",)),
    Compared("whole channels, time", "channels", ".*", "parasparse", ("dense", "Torch-Pruning")),
    Compared("whole channels, bytes", "channels", ".*", "parasparse", ("dense", "Torch-Pruning"),
             "bytes"),
    Compared("networks in other runtimes", "runtimes", ".*", "parasparse",
             ("torch", "onnxruntime", "OpenVINO", "MNN", "DeepSparse"), "processor"),
    Compared("training with compact weights", "training", ".*", "compact",
             ("dense", "torch's prune", "SparseLab")),
    Compared("training with compact weights, bytes", "training", ".*", "compact",
             ("dense", "torch's prune", "SparseLab"), "memory"),
    Compared("pruning a layer as SparseGPT does", "oneshot", "layer.*", "parasparse, obs",
             ("SparseGPT, plain",)),
    Compared("masked checkpoint, bytes", "sizes", ".*", "parasparse, masked",
             ("dense", PRUNE, "torch.ao.pruning"), "bytes"),
    Compared("packed checkpoint, bytes", "sizes", ".*", "parasparse, packed .pt",
             ("dense", "gzip -6, squashed"), "bytes"),
    Compared("packed checkpoint, writing", "sizes", ".*", "parasparse, packed .pt",
             ("dense", "gzip -6, squashed")),
    Compared("writing a packed file", "packing", ".*", "save .pt", ("torch.save, dense",)),
    Compared("reading a packed file", "packing", ".*", "load_packed .pt", ("torch.load, dense",)),
    Compared("packed file, bytes", "packed_sizes", ".*", "parasparse",
             ("one bit per entry", "xz", "pcodec 12", "OpenZL"), "sizes"),
    Compared("writing a packed file", "packed_sizes", ".*", "parasparse",
             ("one bit per entry", "pcodec 8", "OpenZL"), "speeds", "save"),
    Compared("reading a packed file", "packed_sizes", ".*", "parasparse",
             ("one bit per entry", "pcodec 8", "OpenZL"), "speeds", "load"),
)  # fmt: skip


def losses(contents: dict[str, Content]) -> str:
    """Return a row for each comparison with a loss: the worst ratio, how often, and the case."""
    rows = []
    for compared in COMPARED:
        for peer in compared.theirs:
            found = quotients(contents.get(compared.file, {}), compared, peer)
            lost = {question: by for question, by in found.items() if by > NOISE}
            if lost:
                worst = max(lost, key=lambda question: lost[question])
                often = f"{len(lost)} of {len(found)}"
                rows.append([compared.what, times(lost[worst]), peer, often, plain(worst)])
    return table(["comparison", "worst ratio", "against", "cases", "worst case"], rows)


def quotients(content: Content, compared: Compared, peer: str) -> dict[str, float]:
    """Return ours over theirs, for each question that has both."""
    found = {}
    for question, ways in content.get(compared.key, {}).items():
        if re.fullmatch(compared.questions, question) and {compared.ours, peer} <= ways.keys():
            ours, theirs = ways[compared.ours], ways[peer]
            if compared.speed:
                ours, theirs = theirs[compared.speed], ours[compared.speed]
            elif isinstance(ours, dict):  # a timing: the medians of ratios within a round
                ours, theirs = ours["ratio"], theirs["ratio"]
            found[question] = ours / theirs
    return found
