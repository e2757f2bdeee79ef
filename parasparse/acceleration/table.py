"""What was chosen for the weights of an accelerated model, as a table and as a plan to save."""

from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

from parasparse.text import as_html, as_text


@dataclass(frozen=True)
class AccelerationRow:
    """How one weight multiplies one number of rows.

    Attributes:
        name: plain name of the weight.
        shape: its shape.
        sparsity: its share of zeros.
        rows: how often a call multiplies each of its entries: tokens, pixels.
        format: "csr", "bag", "bsr", "channels", "2:4"; None: the dense kernel.
        dense_ms: milliseconds of the dense kernel; None: not measured, by a saved plan.
        chosen_ms: milliseconds of the format.
    """

    name: str
    shape: tuple[int, ...]
    sparsity: float
    rows: int
    format: str | None
    dense_ms: float | None
    chosen_ms: float | None


class Acceleration(tuple[AccelerationRow, ...]):
    """What `accelerate` chose, weight by weight; prints as a table."""

    __slots__ = ()

    @property
    def plan(self) -> dict[str, list[tuple[int, str | None]]]:
        """What `accelerate(model, formats=...)` takes to choose the same again; plain JSON."""
        plan: dict[str, list[tuple[int, str | None]]] = {}
        for row in self:
            plan.setdefault(row.name, []).append((row.rows, row.format))
        return plan

    def to_dicts(self) -> list[dict[str, Any]]:
        """Return the rows as plain numbers and strings."""
        return [asdict(row) for row in self]

    def __repr__(self) -> str:
        return as_text(_HEAD, self._cells())

    def _repr_html_(self) -> str:
        return as_html(_HEAD, self._cells())

    def _cells(self) -> list[tuple[str, ...]]:
        return [
            (
                row.name,
                " x ".join(map(str, row.shape)),
                f"{row.sparsity:.2%}",
                f"{row.rows:,}",
                row.format or "dense",
                _milliseconds(row.dense_ms),
                _milliseconds(row.chosen_ms),
            )
            for row in self
        ]


_HEAD = ("layer", "shape", "sparsity", "rows", "format", "dense ms", "chosen ms")


def _milliseconds(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def row_of(name: str, weight: Tensor, *measured: Any) -> AccelerationRow:
    """Return the row of a table: rows, format, and both times, or None, are `measured`."""
    sparsity = 1 - int(weight.count_nonzero()) / weight.numel()
    return AccelerationRow(name, tuple(weight.shape), sparsity, *measured)
