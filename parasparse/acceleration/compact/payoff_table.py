"""The milliseconds of compact layers beside dense and masked ones, as a table."""

from dataclasses import asdict, dataclass
from typing import Any

from parasparse.text import as_html, as_text, listed

# A smaller gain is within the noise of a machine.
_GAIN = 0.95


@dataclass(frozen=True)
class CompactPayoffRow:
    """The time of the layers that use one weight: a forward and a backward pass.

    Attributes:
        name: name of the weight.
        shape: shape of the weight.
        sparsity: share of zeros, in [0, 1].
        rows: number of rows that multiply the weight: samples, tokens or pixels.
        dense_ms: milliseconds with a dense weight; None if not measured.
        masked_ms: milliseconds with a dense weight and a mask; None if not measured.
        compact_ms: milliseconds with the compact weight; None if not measured.
        weights: number of weights that were measured together because one call uses them all, as
            in attention and LSTM. The times are of the whole call.
        reason: why nothing was measured; "" if it was.
    """

    name: str
    shape: tuple[int, ...]
    sparsity: float
    rows: int
    dense_ms: float | None
    masked_ms: float | None
    compact_ms: float | None
    weights: int
    reason: str

    @property
    def ratio(self) -> float | None:
        """Compact time over dense time; None if not measured."""
        if self.compact_ms is None or not self.dense_ms:
            return None
        return self.compact_ms / self.dense_ms

    @property
    def faster(self) -> str:
        """Which is faster: "compact", "dense", or "equal" within 5%; "" if not measured."""
        if self.compact_ms is None or self.dense_ms is None:
            return ""
        if self.compact_ms < _GAIN * self.dense_ms:
            return "compact"
        return "dense" if self.dense_ms < _GAIN * self.compact_ms else "equal"


class CompactPayoff(tuple[CompactPayoffRow, ...]):
    """The measurements of `compact_payoff`, weight by weight; prints as a table."""

    __slots__ = ()

    @property
    def targets(self) -> list[str]:
        """The weights to make compact, for `compact(model, targets)`.

        Left out are those that are faster with a mask, and those that were not measured.
        """
        return [row.name for row in self if not row.reason and not _is_faster_masked(row)]

    def to_dicts(self) -> list[dict[str, Any]]:
        """Return the rows as dicts of plain numbers and strings."""
        return [{**asdict(row), "ratio": row.ratio, "faster": row.faster} for row in self]

    def __repr__(self) -> str:
        return "\n".join([as_text(_HEAD, self._cells()), *self._advice()])

    def _repr_html_(self) -> str:
        return as_html(_HEAD, self._cells()) + "".join(f"<p>{line}</p>" for line in self._advice())

    def _cells(self) -> list[tuple[str, ...]]:
        return [
            (row.name, " x ".join(map(str, row.shape)), f"{row.sparsity:.2%}", f"{row.rows:,}",
             *map(_number, (row.dense_ms, row.masked_ms, row.compact_ms, row.ratio)),
             row.faster, row.reason or _together(row.weights))
            for row in self
        ]  # fmt: skip

    def _advice(self) -> list[str]:
        masked = [row.name for row in self if _is_faster_masked(row)]
        slower = [row.name for row in self if row.faster == "dense" and row.name not in masked]
        lines = []
        if masked:
            lines.append(
                f"Faster with a mask: {listed(masked)}. Leave them masked with `compact(model, "
                "payoff.targets)`, or `expand` them."
            )
        if slower:
            lines.append(f"Slower than dense, but not than with a mask: {listed(slower)}.")
        return lines


_HEAD = (
    "weight", "shape", "sparsity", "rows", "dense ms", "masked ms", "compact ms", "ratio",
    "faster", "note",
)  # fmt: skip


def _is_faster_masked(row: CompactPayoffRow) -> bool:
    if row.compact_ms is None or row.masked_ms is None:
        return False
    return row.masked_ms < _GAIN * row.compact_ms


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def _together(weights: int) -> str:
    return f"{weights} weights together" if weights > 1 else ""
