"""What the masks of a model amount to, as a table."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from parasparse import _attach
from parasparse._held import held
from parasparse._tables import as_html, as_text
from parasparse._tensors import Target, collect_as_masked
from parasparse.parametrizations import Mask, SoftMask
from parasparse.targets import masked


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
    """

    name: str
    shape: tuple[int, ...]
    pattern: str
    numel: int
    kept: int | None
    bytes_dense: int
    bytes_now: int

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
        return as_text(_HEAD, list(self._cells()))

    def _repr_html_(self) -> str:
        return as_html(_HEAD, list(self._cells()))

    def _cells(self) -> Iterator[tuple[str, ...]]:
        for row in (*self.rows, self.masked, self.model):
            yield (
                row.name,
                " x ".join(map(str, row.shape)),
                row.pattern,
                "?" if row.kept is None else f"{row.kept:,}",
                "?" if row.sparsity is None else f"{row.sparsity:.2%}",
                f"{row.bytes_dense:,}",
                f"{row.bytes_now:,}",
            )


_HEAD = ("name", "shape", "pattern", "kept", "sparsity", "bytes dense", "bytes now")


def summary(model: nn.Module) -> Summary:
    """Return the table of the masked tensors of `model`: pattern, entries kept, sparsity, bytes.

    Tensors that are shared count once. A mask adds bytes while it is attached; `squash` drops them.

    Examples:
        >>> from parasparse import sparsify
        >>> summary(sparsify(nn.Linear(10, 10), 0.9)).masked.kept
        10
    """
    rows = [_row(target) for target in masked(model)]
    total = _total("masked tensors", rows)
    others = [t for t in collect_as_masked(model) if not t.is_buffer and not t.masks()]
    dense = [_dense_row(target) for target in others]
    return Summary(tuple(rows), total, _total("all parameters", [*rows, *dense]))


def _row(target: Target) -> SummaryRow:
    tensor = target.stored()
    module = target.masks()[0]
    mask = target.mask()
    size = _bytes(target)
    extra = sum(t.nbytes for t in (*module.parameters(), *module.buffers()))
    parts = len(target.parts)
    return SummaryRow(
        name=target.name,
        shape=tuple(tensor.shape),
        pattern=_pattern(module, mask),
        numel=tensor.numel() * parts,
        kept=None if mask is None or mask.is_meta else int(torch.count_nonzero(mask)) * parts,
        bytes_dense=size,
        bytes_now=size + extra,
    )


def _dense_row(target: Target) -> SummaryRow:
    size, numel = _bytes(target), target.stored().numel() * len(target.parts)
    return SummaryRow(target.name, tuple(target.stored().shape), "", numel, numel, size, size)


def _bytes(target: Target) -> int:
    firsts = [part[0] for part in target.parts]
    return sum(_attach.stored(site.module, site.attr).nbytes for site in firsts)


def _total(name: str, rows: list[SummaryRow]) -> SummaryRow:
    kept = [row.kept for row in rows]
    return SummaryRow(
        name=name,
        shape=(),
        pattern="",
        numel=sum(row.numel for row in rows),
        kept=None if None in kept else sum(k for k in kept if k is not None),
        bytes_dense=sum(row.bytes_dense for row in rows),
        bytes_now=sum(row.bytes_now for row in rows),
    )


def _pattern(module: nn.Module, mask: Tensor | None) -> str:
    """Return the names of the patterns that `mask` keeps to."""
    if mask is None or mask.is_meta:
        return "unset" if mask is None else "unknown"
    if not isinstance(module, Mask):
        return "soft" if isinstance(module, SoftMask) else "custom"
    if mask.dtype != torch.bool:
        return "real-valued"
    return ", ".join(held(mask))
