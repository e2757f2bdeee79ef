"""The tables of docs/one-shot-results.md."""

from __future__ import annotations

from statistics import mean

from benchmarks.tables.markdown import Content, Table, table


def perplexities(content: Content) -> str:
    """Return the mean perplexity of each method, and how long all took."""
    found = content["perplexities"]
    sparsities = list(found["SparseGPT"])
    dense = f"{mean(found['dense']['']):.2f}"
    rows = [["dense", *[dense] * len(sparsities)]]
    rows += [
        [method, *(f"{mean(row[s]):.2f}" for s in sparsities)]
        for method, row in found.items()
        if method != "dense"
    ]
    minutes = f"{content['seconds'] / 60:.1f} minutes of processor time, on one thread"
    return f"{table(['', *sparsities], rows)}\n\nTraining, pruning and measuring took {minutes}."


def rises(content: Content) -> str:
    """Return how much perplexities rise, relative to SparseGPT: the mean, and the worst model."""
    found = content["perplexities"]
    dense, sparsegpt = found["dense"][""], found["SparseGPT"]

    def cell(method: str, sparsity: str) -> str:
        every = zip(found[method][sparsity], sparsegpt[sparsity], dense, strict=True)
        shares = [(one - least) / (other - least) for one, other, least in every]
        return f"{mean(shares):.2f} ({max(shares):.2f})"

    rows = [
        [method, *(cell(method, sparsity) for sparsity in sparsegpt)]
        for method in found
        if method not in ("dense", "SparseGPT")
    ]
    return table(["rise, relative to SparseGPT", *sparsegpt], rows)


def calibration(content: Content) -> str:
    """Return the mean perplexity at 70%, by text and method."""
    found = content["calibration"]
    methods = list(next(iter(found.values())))
    rows = [[text, *(f"{mean(row[m]):.2f}" for m in methods)] for text, row in found.items()]
    return table(["calibration text", *methods], rows)


MEASURES = {"cosine": ".3f", "ranks": ".3f", "pairs": ".0%"}


def kept(content: Content) -> str:
    """Return what a pruned sentence encoder keeps, by method, measure and sparsity."""
    found = content["rows"]
    sparsities = list(next(row for method, row in found.items() if method != "dense"))

    def cells(row: dict[str, dict[str, float]]) -> list[str]:
        return [
            f"{row.get(sparsity, row.get(''))[measure]:{digits}}"
            for measure, digits in MEASURES.items()
            for sparsity in sparsities
        ]

    header = ["", *(f"{measure}, {sparsity}" for measure in MEASURES for sparsity in sparsities)]
    return table(header, [[method, *cells(row)] for method, row in found.items()])


TABLES: dict[str, Table] = {
    "language_model.perplexities": perplexities,
    "language_model.rises": rises,
    "language_model.calibration": calibration,
    "sentence_encoder.kept": kept,
}
