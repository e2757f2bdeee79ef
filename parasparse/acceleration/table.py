"""The choices for the weights of an accelerated model, as a table and as a plan to save."""

from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

from parasparse.text import as_html, as_text


@dataclass(frozen=True)
class AccelerationRow:
    """The format of one weight at one number of rows.

    Attributes:
        name: name of the weight.
        shape: shape of the weight.
        sparsity: share of zeros, in [0, 1].
        rows: how often a call multiplies each entry: the number of tokens or pixels.
        format: "csr", "bag", "bsr", "channels", "2:4" or "compiled"; None: the dense kernel.
        dense_ms: milliseconds of the dense kernel; None if not measured, as with a saved plan.
        chosen_ms: milliseconds of the format; None if not measured.
    """

    name: str
    shape: tuple[int, ...]
    sparsity: float
    rows: int
    format: str | None
    dense_ms: float | None
    chosen_ms: float | None


class Acceleration(tuple[AccelerationRow, ...]):
    """The choices of `accelerate`, weight by weight; prints as a table."""

    __slots__ = ()

    @property
    def plan(self) -> dict[str, list[tuple[int, str | None]]]:
        """The choices as plain JSON, for `accelerate(model, formats=plan)`."""
        plan: dict[str, list[tuple[int, str | None]]] = {}
        for row in self:
            plan.setdefault(row.name, []).append((row.rows, row.format))
        return plan

    def to_dicts(self) -> list[dict[str, Any]]:
        """Return the rows as dicts of plain numbers and strings."""
        return [asdict(row) for row in self]

    def __repr__(self) -> str:
        return as_text(_HEAD, self._cells())

    def _repr_html_(self) -> str:
        return as_html(_HEAD, self._cells())

    def _cells(self) -> list[tuple[str, ...]]:
        return [
            (row.name, " x ".join(map(str, row.shape)), f"{row.sparsity:.2%}", f"{row.rows:,}",
             row.format or "dense", _milliseconds(row.dense_ms), _milliseconds(row.chosen_ms))
            for row in self
        ]  # fmt: skip


_HEAD = ("layer", "shape", "sparsity", "rows", "format", "dense ms", "chosen ms")


def _milliseconds(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def row_of(name: str, weight: Tensor, *measured: Any) -> AccelerationRow:
    """Return a row of the table; `measured` are rows, format, dense_ms and chosen_ms."""
    sparsity = 1 - int(weight.count_nonzero()) / weight.numel()
    return AccelerationRow(name, tuple(weight.shape), sparsity, *measured)
