"""What the masks of a model amount to, as a table."""

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
from parasparse.targets.reach import masked_targets
from parasparse.targets.tensors import Site, Target, masked_tensors_of
from parasparse.text import as_html, as_text


@dataclass(frozen=True)
class SummaryRow:
    """One masked tensor, or a total.

    Attributes:
        name: plain name of the tensor.
        shape: its shape; () in a total.
        pattern: which patterns the mask keeps to, by commas: "dense", "empty",
            "channel(dim)" ("in runs of k": heads of size k), "block(a x b)", "n:m" (along dimension
            1, or "along dim"), "nearly_diagonal(k)", "unstructured"; "soft" or "real-valued" if it
            is not bool; "custom" under a module of your own; "unset".
        numel: number of entries.
        kept: entries whose mask is not 0; None where the mask is not set.
        bytes_dense: of the tensor alone.
        bytes_now: of the tensor with its mask.
        bytes_packed: of the tensor when it is packed; this and what follows is None unless example
            inputs were given.
        multiply_adds_dense: of the dense tensor in one call of the model; None where it is used
            other than in linear, convolution, recurrent, attention and embedding layers.
        multiply_adds: of its kept entries.
        dense_ms: milliseconds of its dense kernel in one call; None unless `latency` was asked.
        sparse_ms: of the fastest format, the dense kernel included.
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
        """Share of zeros; None where the mask is not set."""
        if self.kept is None:
            return None
        return 1 - self.kept / self.numel if self.numel else 0.0


@dataclass(frozen=True)
class Summary:
    """The masked tensors of a model, tied ones once, and two totals; prints as a table.

    Attributes:
        rows: one for each masked tensor.
        masked: their total.
        model: the total over all parameters, masked or not.
    """

    rows: tuple[SummaryRow, ...]
    masked: SummaryRow
    model: SummaryRow

    def to_dict(self) -> dict[str, Any]:
        """Return the same as plain numbers, strings and lists."""
        rows = [{**asdict(row), "sparsity": row.sparsity} for row in self.rows]
        totals = {
            key: {**asdict(row), "sparsity": row.sparsity}
            for key, row in (("masked", self.masked), ("model", self.model))
        }
        return {"tensors": rows, **totals}

    def __repr__(self) -> str:
        head, *rows = self._cells()
        return as_text(head, rows)

    def _repr_html_(self) -> str:
        head, *rows = self._cells()
        return as_html(head, rows)

    def _cells(self) -> list[tuple[str, ...]]:
        """Return the head and the rows, without columns that were not asked for."""
        rows = [*self.rows, self.masked, self.model]
        columns = [(head, [cell(row) for row in rows]) for head, cell in _COLUMNS.items()]
        more = {head: [getattr(row, name) for row in rows] for head, name in _ASKED.items()}
        columns += [
            (head, [_number(value) for value in values])
            for head, values in more.items()
            if any(value is not None for value in values)
        ]
        return [tuple(head for head, _ in columns), *zip(*(c for _, c in columns), strict=True)]


_COLUMNS: dict[str, Callable[[SummaryRow], str]] = {
    "name": lambda row: row.name,
    "shape": lambda row: " x ".join(map(str, row.shape)),
    "pattern": lambda row: row.pattern,
    "kept": lambda row: _number(row.kept),
    "sparsity": lambda row: "?" if row.sparsity is None else f"{row.sparsity:.2%}",
    "bytes dense": lambda row: _number(row.bytes_dense),
    "bytes now": lambda row: _number(row.bytes_now),
}
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

    Tensors that are shared count once. A mask adds bytes while it is attached; `squash` drops them.

    Args:
        model: masked, and stays as it is; a squashed one has no masked tensors left to tell of.
        example_inputs: what the model is called with, a tensor, a tuple or a dict: adds multiply-
            adds of one call, for the dense and for the kept entries, and bytes when packed.
        latency: also measure each masked weight, dense and in its fastest format, as `accelerate`
            does; takes seconds.

    Raises:
        ValueError: `latency` without `example_inputs`.

    Examples:
        >>> from parasparse import sparsify
        >>> report = summary(sparsify(nn.Linear(10, 10), 0.9), torch.randn(3, 10))
        >>> report.masked.kept, report.masked.multiply_adds_dense, report.masked.multiply_adds
        (10, 300, 30)
    """
    if latency and example_inputs is None:
        raise ValueError("`latency` must come with `example_inputs`; got None.")
    asked = example_inputs is not None
    known = payoffs(model, example_inputs, latency=latency) if asked else {}
    rows = [_row(target, known) for target in masked_targets(model)]
    total = _total("masked tensors", rows, asked=asked)
    others = [t for t in masked_tensors_of(model) if not t.is_buffer and not t.masks()]
    dense = [_dense_row(target, known) for target in others]
    every = _total("all parameters", [*rows, *dense], asked=asked)
    return Summary(tuple(rows), total, replace(every, dense_ms=None, sparse_ms=None))


def _row(target: Target, known: Mapping[Site, Payoff]) -> SummaryRow:
    tensor = target.stored()
    module = target.masks()[0]
    mask = target.mask()
    mask = None if mask is None else full_tensor(mask)
    size = _bytes(target)
    extra = sum(t.nbytes for t in (*module.parameters(), *module.buffers()))
    parts = len(target.components)
    row = SummaryRow(
        name=target.name,
        shape=tuple(tensor.shape),
        pattern=_pattern(module, mask),
        numel=tensor.numel() * parts,
        kept=None if mask is None or mask.is_meta else int(torch.count_nonzero(mask)) * parts,
        bytes_dense=size,
        bytes_now=size + extra,
    )
    return _with_payoff(row, target, known)


def _dense_row(target: Target, known: Mapping[Site, Payoff]) -> SummaryRow:
    size, numel = _bytes(target), target.stored().numel() * len(target.components)
    shape = tuple(target.stored().shape)
    row = SummaryRow(target.name, shape, "", numel, numel, size, size)
    return _with_payoff(row, target, known)


def _with_payoff(row: SummaryRow, target: Target, known: Mapping[Site, Payoff]) -> SummaryRow:
    if not known:
        return row
    parts = [known[site] for site in target.firsts]
    rows = _sum(part.rows for part in parts)
    # A vector is added or scales what comes by: less than a thousandth, and not counted.
    rows = 0 if target.ndim < 2 else rows
    each = len(parts)
    return replace(
        row,
        bytes_packed=sum(part.bytes_packed for part in parts),
        multiply_adds_dense=None if rows is None else int(rows * row.numel / each),
        multiply_adds=None if rows is None or row.kept is None else int(rows * row.kept / each),
        dense_ms=_sum(part.dense_ms for part in parts),
        sparse_ms=_sum(part.sparse_ms for part in parts),
    )


def _bytes(target: Target) -> int:
    return sum(site.stored().nbytes for site in target.firsts)


def _total(name: str, rows: list[SummaryRow], *, asked: bool) -> SummaryRow:
    timed = [row for row in rows if row.dense_ms is not None]
    return SummaryRow(
        name=name,
        shape=(),
        pattern="",
        numel=sum(row.numel for row in rows),
        kept=_sum(row.kept for row in rows),
        bytes_dense=sum(row.bytes_dense for row in rows),
        bytes_now=sum(row.bytes_now for row in rows),
        bytes_packed=_sum(row.bytes_packed for row in rows) if asked else None,
        multiply_adds_dense=_sum(row.multiply_adds_dense for row in rows) if asked else None,
        multiply_adds=_sum(row.multiply_adds for row in rows) if asked else None,
        dense_ms=_sum(row.dense_ms for row in timed) if timed else None,
        sparse_ms=_sum(row.sparse_ms for row in timed) if timed else None,
    )


def _sum(values: Iterable[Any]) -> Any:
    """Return the sum, None if any of `values` is."""
    every = list(values)
    return None if None in every else sum(every)


def _pattern(module: nn.Module, mask: Tensor | None) -> str:
    """Return the names of the patterns that `mask` keeps to."""
    if mask is None or mask.is_meta:
        return "unset" if mask is None else "unknown"
    if not isinstance(module, Mask):
        return "soft" if isinstance(module, SoftMask) else "custom"
    if mask.dtype != torch.bool:
        return "real-valued"
    return ", ".join(recognised(mask))
