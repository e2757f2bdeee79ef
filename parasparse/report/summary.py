"""The table of a model's masks: sparsity, patterns, bytes, multiply-adds, milliseconds."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from parasparse.acceleration.payoff import Payoff, payoffs
from parasparse.masks.mask import Mask
from parasparse.masks.soft_mask import SoftMask
from parasparse.patterns.recognise import recognised
from parasparse.sharding.dtensors import full_tensor
from parasparse.targets.left_dense import DenseRow, dense_rows
from parasparse.targets.tensors import Site, Target, masked_tensors_of
from parasparse.text import as_html, as_text, noted


@dataclass(frozen=True)
class SummaryRow:
    """One masked tensor, or a total.

    Attributes:
        name: plain name of the tensor.
        shape: its shape; () in a total.
        pattern: recognised patterns of the mask, separated by commas: "dense", "empty",
            "channel(dim)" ("in runs of k": heads of size k), "block(a x b)", "n:m" (along dimension
            1, or "along dim"), "nearly_diagonal(k)", "unstructured"; "soft" or "real-valued" if it
            is not bool; "custom" for your own mask module; "unset"; "unknown" on the meta device
            and for a compact weight of more than 2**28 entries.
        numel: number of entries.
        kept: number of entries whose mask is not 0; None if the mask is not set.
        bytes_dense: bytes of the dense tensor alone.
        bytes_now: bytes of the tensor and its mask; of the values and their places if compact.
        bytes_packed: bytes that `pack` keeps of the tensor; a file of `save` takes fewer. This and
            the next two attributes are None unless example inputs are given.
        multiply_adds_dense: multiply-adds of the dense tensor in one call of the model; None if it
            is used outside linear, convolution, recurrent, attention and embedding layers.
        multiply_adds: multiply-adds of its kept entries.
        dense_ms: milliseconds of its dense kernel in one call; None without `latency=True`.
        sparse_ms: milliseconds of the fastest format, which may be the dense kernel.
    """

    name: str
    shape: tuple[int, ...]
    pattern: str
    numel: int
    kept: int | None
    bytes_dense: int
    bytes_now: int
    bytes_packed: int | None = None
    multiply_adds_dense: int | None = None
    multiply_adds: int | None = None
    dense_ms: float | None = None
    sparse_ms: float | None = None

    @property
    def sparsity(self) -> float | None:
        """Share of zeros; None if the mask is not set."""
        if self.kept is None:
            return None
        return 1 - self.kept / self.numel if self.numel else 0.0


@dataclass(frozen=True)
class Summary:
    """The masked tensors of a model and two totals; prints as a table.

    Attributes:
        rows: one row per masked tensor; tied tensors share a row.
        masked: total of the rows.
        model: total of all parameters, masked or not.
        dense: the large tensors without a mask, and why a sparsity alone leaves them dense.
    """

    rows: tuple[SummaryRow, ...]
    masked: SummaryRow
    model: SummaryRow
    dense: tuple[DenseRow, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Return the table as a dict of plain numbers, strings and lists."""
        *rows, masked, model = (
            {**asdict(row), "sparsity": row.sparsity}
            for row in (*self.rows, self.masked, self.model)
        )
        dense = [asdict(row) for row in self.dense]
        return {"tensors": rows, "masked": masked, "model": model, "dense": dense}

    def __repr__(self) -> str:
        head, *rows = self._cells()
        return as_text(head, rows) + noted(self.dense)

    def _repr_html_(self) -> str:
        head, *rows = self._cells()
        return as_html(head, rows)

    def _cells(self) -> list[tuple[str, ...]]:
        """Return the head and the rows, without columns of None."""
        rows = [*self.rows, self.masked, self.model]
        columns = {head: [cell(row) for row in rows] for head, cell in _COLUMNS.items()}
        for head, name in _ASKED.items():
            values = [getattr(row, name) for row in rows]
            if any(value is not None for value in values):
                columns[head] = [_number(value) for value in values]
        return [tuple(columns), *zip(*columns.values(), strict=True)]


_COLUMNS: dict[str, Callable[[SummaryRow], str]] = {
    "name": lambda row: row.name,
    "shape": lambda row: " x ".join(map(str, row.shape)),
    "pattern": lambda row: row.pattern,
    "kept": lambda row: _number(row.kept),
    "sparsity": lambda row: "?" if row.sparsity is None else f"{row.sparsity:.2%}",
    "bytes dense": lambda row: _number(row.bytes_dense),
    "bytes now": lambda row: _number(row.bytes_now),
}
_RECOGNISED = 2**28  # a larger mask may not fit into memory
_ASKED = {
    "bytes packed": "bytes_packed",
    "mult-adds dense": "multiply_adds_dense",
    "mult-adds": "multiply_adds",
    "dense ms": "dense_ms",
    "sparse ms": "sparse_ms",
}


def _number(value: float | None) -> str:
    if value is None:
        return "?"
    return f"{value:,.3f}" if isinstance(value, float) else f"{value:,}"


def summary(model: nn.Module, example_inputs: Any = None, *, latency: bool = False) -> Summary:
    """Return the table of the masked tensors of `model`: pattern, entries kept, sparsity, bytes.

    Tied tensors count once. An attached mask takes bytes; `squash` frees them.

    Args:
        model: a masked model; it does not change. Call `summary` before `squash`, which removes
            the masks.
        example_inputs: inputs of the model, a tensor, a tuple or a dict; adds columns for the
            multiply-adds of one call and for the packed bytes.
        latency: measure each masked weight, dense and in its fastest format, as `accelerate` does.
            This takes seconds.

    Raises:
        ValueError: `latency` is given without `example_inputs`.

    Examples:
        >>> report = summary(sparsify(nn.Linear(10, 10), 0.9), torch.randn(3, 10))
        >>> report.masked.kept, report.masked.multiply_adds_dense, report.masked.multiply_adds
        (10, 300, 30)
    """
    if latency and example_inputs is None:
        raise ValueError("`latency` must come with `example_inputs`; got None.")
    asked = example_inputs is not None
    known = payoffs(model, example_inputs, latency=latency) if asked else {}
    targets = masked_tensors_of(model)
    rows = [_row(target, known) for target in targets if target.masks()]
    total = _total("masked tensors", rows, asked=asked)
    others = [t for t in targets if not t.is_buffer and not t.masks()]
    unmasked = [_row(target, known) for target in others]
    every = _total("all parameters", [*rows, *unmasked], asked=asked)
    every = replace(every, dense_ms=None, sparse_ms=None)
    return Summary(tuple(rows), total, every, dense_rows(targets, {row.name for row in rows}))


def _row(target: Target, known: Mapping[Site, Payoff]) -> SummaryRow:
    each = target.shape.numel()
    numel = each * len(target.components)
    size = sum(each * site.originals()[0].itemsize for site in target.firsts)
    row = SummaryRow(target.name, tuple(target.shape), "", numel, numel, size, size)
    if target.is_compact:
        row = _with_places(row, target)
    elif target.masks():
        row = _with_mask(row, target)
    return _with_payoff(row, target, known) if known else row


def _with_mask(row: SummaryRow, target: Target) -> SummaryRow:
    module, mask = target.masks()[0], target.mask()
    mask = None if mask is None else full_tensor(mask)
    kept = None if mask is None or mask.is_meta else int(torch.count_nonzero(mask))
    return replace(
        row,
        pattern=_pattern(module, mask),
        kept=None if kept is None else kept * len(target.components),
        bytes_now=row.bytes_now + sum(t.nbytes for t in (*module.parameters(), *module.buffers())),
    )


def _with_places(row: SummaryRow, target: Target) -> SummaryRow:
    places = target.firsts[0].stack().below()[0]  # a pair shares them
    kept = sum(site.originals()[0].numel() for site in target.firsts)
    held = [*target.originals(), *places.buffers()]
    mask = target.mask() if row.numel <= _RECOGNISED else None
    return replace(
        row,
        pattern="unknown" if mask is None or mask.is_meta else ", ".join(recognised(mask)),
        kept=kept,
        bytes_now=sum(tensor.nbytes for tensor in held),
    )


def _with_payoff(row: SummaryRow, target: Target, known: Mapping[Site, Payoff]) -> SummaryRow:
    parts = [known[site] for site in target.firsts]
    rows = _sum(part.rows for part in parts)
    # The work of biases and scales is below a thousandth of the total and not counted.
    rows = 0 if len(target.shape) < 2 else rows
    each = len(parts)
    return replace(
        row,
        bytes_packed=sum(part.bytes_packed for part in parts),
        multiply_adds_dense=None if rows is None else int(rows * row.numel / each),
        multiply_adds=None if rows is None or row.kept is None else int(rows * row.kept / each),
        dense_ms=_sum(part.dense_ms for part in parts),
        sparse_ms=_sum(part.sparse_ms for part in parts),
    )


def _total(name: str, rows: list[SummaryRow], *, asked: bool) -> SummaryRow:
    fields = ["numel", "kept", "bytes_dense", "bytes_now"]
    fields += ["bytes_packed", "multiply_adds_dense", "multiply_adds"] if asked else []
    sums = {field: _sum(getattr(row, field) for row in rows) for field in fields}
    timed = [row for row in rows if row.dense_ms is not None]
    for field in ("dense_ms", "sparse_ms") if timed else ():
        sums[field] = _sum(getattr(row, field) for row in timed)
    return SummaryRow(name, (), "", **sums)


def _sum(values: Iterable[Any]) -> Any:
    """Return the sum, None if any of `values` is None."""
    every = list(values)
    return None if None in every else sum(every)


def _pattern(module: nn.Module, mask: Tensor | None) -> str:
    """Return the names of the patterns that `mask` follows."""
    if mask is None or mask.is_meta:
        return "unset" if mask is None else "unknown"
    if not isinstance(module, Mask):
        return "soft" if isinstance(module, SoftMask) else "custom"
    if mask.dtype != torch.bool:
        return "real-valued"
    return ", ".join(recognised(mask))
