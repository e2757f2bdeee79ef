"""The plan of a smaller network: which indices of which tensors stay, as a table and as JSON."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

from parasparse.text import as_text

Kept = tuple[int, ...]


@dataclass(frozen=True)
class ShrinkRow:
    """What happens to one tensor.

    Attributes:
        name: plain name of the tensor.
        shape: its shape.
        new_shape: its shape in the smaller network.
        kept: the indices that stay along each dimension that loses some. Along dimension 1 of a
            grouped convolution, each row that stays has indices of its own.
        scale: the factor of its values: of an RMSNorm, which averages over fewer channels.
        shift: what the norm adds to its values before it multiplies with them, such as 1.
    """

    name: str
    shape: tuple[int, ...]
    new_shape: tuple[int, ...]
    kept: dict[int, Kept | tuple[Kept, ...]]
    scale: float = 1.0
    shift: float = 0.0


@dataclass(frozen=True)
class AttributeRow:
    """A number in a module or config that changes: a size, or the eps of an RMSNorm.

    Attributes:
        path: name of the module, or of the config in a module.
        name: the attribute.
        index: its place, if the attribute is a tuple.
        old: its value; None: the default eps of torch.
        new: its value in the smaller network.
    """

    path: str
    name: str
    index: int | None
    old: int | float | None
    new: int | float

    def __str__(self) -> str:
        place = "" if self.index is None else f"[{self.index}]"
        return f"{f'{self.path}.' if self.path else ''}{self.name}{place}: {self.old} -> {self.new}"


@dataclass(frozen=True)
class KeptRow:
    """Channels that a mask drops, but that stay in the network.

    Attributes:
        name: plain name of the tensor.
        dim: the dimension that counts the channels.
        channels: their indices.
        reason: why they stay.
    """

    name: str
    dim: int
    channels: Kept
    reason: str

    def __str__(self) -> str:
        number = len(self.channels)
        stay = "dead channel stays" if number == 1 else "dead channels stay"
        return f"{self.name}, dimension {self.dim}: {number} {stay}: {self.reason}"


@dataclass(frozen=True, repr=False)
class Shrinkage:
    """The plan of a smaller network: what `shrink` does to the tensors and attributes of a model.

    Attributes:
        rows: the tensors that change their shape: `name`, `shape`, `new_shape`, and the indices
            `kept` by dimension.
        attributes: the attributes of modules and configs that change: `path`, `name`, `old`, `new`.
        kept_back: the channels that a mask drops, but that stay: `name` of the tensor, `dim`,
            `channels`, `reason`.
        inexact: the modules whose result changes, with `exact=False`.
        bytes: of parameters and buffers, before and after.
        multiply_adds: of products with weights for the example inputs, before and after.
        branches: where the program may have taken a branch because of the example's values.
    """

    rows: tuple[ShrinkRow, ...]
    attributes: tuple[AttributeRow, ...] = ()
    kept_back: tuple[KeptRow, ...] = ()
    inexact: tuple[str, ...] = ()
    bytes: tuple[int, int] = (0, 0)
    multiply_adds: tuple[int, int] = (0, 0)
    branches: tuple[str, ...] = ()

    def __repr__(self) -> str:
        head = ("name", "shape", "new shape")
        lines = [as_text(head, [(row.name, row.shape, row.new_shape) for row in self.rows])]
        for name in ("bytes", "multiply_adds"):
            before, after = getattr(self, name)
            lines.append(f"{name.replace('_', '-')}: {before:,} -> {after:,}")
        lines += [_scaled(row) for row in self.rows if row.scale != 1]
        lines += [str(row) for row in self.attributes]
        lines += [str(row) for row in self.kept_back]
        lines += [f"{module}: its result changes" for module in self.inexact]
        return "\n".join(lines)

    def to_json(self) -> str:
        """Return the plan as JSON; equal plans give equal text."""
        return json.dumps(asdict(self), separators=(",", ":"))

    @staticmethod
    def from_json(text: str) -> Shrinkage:
        """Return the plan that `to_json` wrote.

        Raises:
            ValueError: `text` is not such a plan.
        """
        try:
            found: dict[str, Any] = json.loads(text)
            rows = [
                {**row, "kept": {int(dim): _tuples(kept) for dim, kept in row["kept"].items()}}
                for row in found["rows"]
            ]
            plan = Shrinkage(
                rows=tuple(ShrinkRow(**_with_tuples(row)) for row in rows),
                attributes=tuple(AttributeRow(**row) for row in found["attributes"]),
                kept_back=tuple(KeptRow(**_with_tuples(row)) for row in found["kept_back"]),
                inexact=tuple(found["inexact"]),
                bytes=tuple(found["bytes"]),
                multiply_adds=tuple(found["multiply_adds"]),
                branches=tuple(found["branches"]),
            )
        except (KeyError, TypeError, AttributeError, json.JSONDecodeError) as error:
            why = f"it has no {error}" if isinstance(error, KeyError) else error
            raise ValueError(f"`text` must be a plan written by `to_json`; {why}.") from error
        for row in plan.rows:
            if not _is_possible(row):
                raise ValueError(
                    f'the plan is damaged: the indices that "{row.name}" keeps do not fit its '
                    f"shapes, {row.shape} and {row.new_shape}, or its scale is not above 0."
                )
        return plan


def _is_possible(row: ShrinkRow) -> bool:
    """Whether the indices of a row lead from its shape to its new shape, and its scale is one."""
    if len(row.shape) != len(row.new_shape) or any(d >= len(row.shape) for d in row.kept):
        return False
    for dim, (size, new_size) in enumerate(zip(row.shape, row.new_shape, strict=True)):
        kept = row.kept.get(dim, tuple(range(size)))
        per_row = bool(kept) and isinstance(kept[0], tuple)
        if per_row and len(kept) != row.new_shape[0]:
            return False
        for indices in kept if per_row else (kept,):
            ordered = all(a < b for a, b in pairwise((-1, *indices, size)))  # type: ignore[misc]
            if len(indices) != new_size or not ordered:  # type: ignore[arg-type]
                return False
    return 0 < row.scale < math.inf and math.isfinite(row.shift)


def _scaled(row: ShrinkRow) -> str:
    values = f"({row.name} + {row.shift:g})" if row.shift else row.name
    return f"{values}: times {row.scale:.6g}"


def _tuples(value: Any) -> Any:
    return tuple(_tuples(each) for each in value) if isinstance(value, list) else value


def _with_tuples(row: dict[str, Any]) -> dict[str, Any]:
    return {name: _tuples(value) for name, value in row.items()}
