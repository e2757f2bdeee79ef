"""Where the kept entries of a weight are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor, nn

from parasparse.masks.kept_entries import KeptEntries


class Places(nn.Module):
    """The places of the kept entries of a weight; makes the dense weight of their values.

    A weight of shape (outputs, ...) is seen as a matrix of shape (outputs, inputs). Its places are
    stored row by row, and once more column by column for the gradient of a layer's input. Indices
    are int32 wherever they fit.

    Attributes:
        starts: (outputs + 1,), the number of the first entry of each row.
        columns: (kept,), the column of each entry.
        column_starts, rows: the same, column by column. Not in the state dict.
        order: (kept,), the number by rows of each entry by columns. Not in the state dict.
        shape: of the weight.
    """

    starts: Tensor
    columns: Tensor
    column_starts: Tensor
    rows: Tensor
    order: Tensor

    def __init__(self, starts: Tensor, columns: Tensor, shape: torch.Size) -> None:
        super().__init__()
        self.shape = shape
        self._parts: dict[tuple[int, ...], list[Places]] = {}
        for name in _INDICES:
            self.register_buffer(name, None, persistent=name in ("starts", "columns"))
        self.put_(starts, columns)

    @classmethod
    def of(cls, mask: Tensor) -> Self:
        """Return the places where a bool mask is True."""
        return cls.at(mask.flatten().nonzero().flatten(), mask.shape)

    @classmethod
    def at(cls, positions: Tensor, shape: torch.Size) -> Self:
        """Return the places at sorted int64 positions of the flattened weight."""
        return cls(*_row_by_row(positions, shape[0], shape[1:].numel()), shape)

    def move_to(self, positions: Tensor) -> None:
        """Replace all places by those at sorted int64 positions of the flattened weight."""
        self.put_(*_row_by_row(positions, *self.matrix_shape))

    @torch.inference_mode(False)  # because they outlive it, and are saved for backward
    def put_(self, starts: Tensor, columns: Tensor) -> None:
        """Replace all places, in place if their number stays."""
        outputs, inputs = self.matrix_shape
        dtype = _index_dtype(max(len(columns), outputs, inputs))
        columns = columns.to(dtype)  # before the rest, which then needs half of the memory
        in_order, order = columns.sort(stable=True)
        order = order.to(dtype)
        column_starts = _starts(in_order, inputs)
        rows = _rows(starts, len(columns), dtype).index_select(0, order)
        self._parts = {}
        every = (starts, columns, column_starts, rows, order)
        for name, tensor in zip(_INDICES, every, strict=True):
            held = self._buffers[name]
            like = dtype, tensor.shape, tensor.device
            if held is not None and (held.dtype, held.shape, held.device) == like:
                held.copy_(tensor)
            else:
                new = tensor.to(dtype)
                self._buffers[name] = new.clone() if new.is_inference() else new

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """The number of outputs and of inputs."""
        return self.shape[0], self.shape[1:].numel()

    def __len__(self) -> int:
        return len(self.columns)

    def indices(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Return `starts`, `columns`, `column_starts`, `rows`, `order`, for `products`."""
        return self.starts, self.columns, self.column_starts, self.rows, self.order

    @torch.inference_mode(False)
    def parts(self, sizes: tuple[int, ...]) -> list[Places]:
        """Return the places of `sizes` outputs each, which are computed once."""
        if sizes not in self._parts:
            starts = [int(self.starts[sum(sizes[:i])]) for i in range(len(sizes) + 1)]
            self._parts[sizes] = [
                Places(
                    self.starts[sum(sizes[:i]) : sum(sizes[: i + 1]) + 1] - starts[i],
                    self.columns[starts[i] : starts[i + 1]],
                    torch.Size((size, *self.shape[1:])),
                )
                for i, size in enumerate(sizes)
            ]
        return self._parts[sizes]

    def positions(self) -> Tensor:
        """Return the position of each entry in the flattened weight, int64 and sorted."""
        return _rows(self.starts, len(self)) * self.matrix_shape[1] + self.columns

    def mask(self) -> Tensor:
        """Return a bool tensor of the weight's shape, True at the places."""
        mask = torch.zeros(self.shape.numel(), dtype=torch.bool, device=self.starts.device)
        return mask.index_fill_(0, self.positions(), True).view(self.shape)

    def forward(self, values: Tensor) -> Tensor:
        """Return the dense weight."""
        dense = values.new_zeros(self.shape.numel())
        return dense.index_copy(0, self.positions(), values).view(self.shape)

    def traced(self, values: Tensor) -> Tensor:
        """Return the dense weight by operations that every exporter knows, though more slowly."""
        order = self.order.long()
        positions = self.rows.long() * self.matrix_shape[1] + self.columns[order]
        dense = values.new_zeros(self.shape.numel())
        return dense.index_copy(0, positions, values[order]).view(self.shape)

    def right_inverse(self, weight: Tensor) -> Tensor:
        """Return the values of a dense weight at the places."""
        return weight.flatten()[self.positions()]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        self._parts = {}  # they are on the old device
        return super()._apply(fn, recurse)  # type: ignore[no-untyped-call, no-any-return]

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any) -> None:
        """Only report keys: the list of parametrizations loads values and places together."""
        _, strict, missing_keys, unexpected_keys, _ = rest
        own = [f"{prefix}{name}" for name in ("starts", "columns")]
        if strict:
            missing_keys += [key for key in own if key not in state_dict]
            unexpected_keys += [k for k in state_dict if k.startswith(prefix) and k not in own]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_parts": {}}

    def extra_repr(self) -> str:
        """Return the number of entries and the shape."""
        return f"{len(self)} of {tuple(self.shape)}"


_INDICES = ("starts", "columns", "column_starts", "rows", "order")


def check_places(values: Tensor, starts: Tensor, columns: Tensor, shape: torch.Size) -> None:
    """Raise ValueError if these cannot be the values and places of a weight of `shape`."""
    outputs, inputs = shape[0], shape[1:].numel()
    shapes = [tuple(tensor.shape) for tensor in (values, starts, columns)]
    kept = values.numel()
    if shapes != [(kept,), (outputs + 1,), (kept,)]:
        raise ValueError(
            f"a compact weight of shape {tuple(shape)} must have `starts` of shape "
            f"({outputs + 1},), and as many `columns` as values; got {shapes[1]} starts, "
            f"{shapes[2]} columns and {shapes[0]} values."
        )
    if starts.is_meta or columns.is_meta:
        return
    counts = starts.diff()
    good = int(starts[0]) == 0 and int(starts[-1]) == kept and bool((counts >= 0).all())
    if good and kept:
        inside = int(columns.min()) >= 0 and int(columns.max()) < inputs
        positions = _rows(starts, kept) * inputs + columns
        good = inside and bool((positions.diff() > 0).all())
    if not good:
        raise ValueError(
            f"the places of a compact weight of shape {tuple(shape)} must be in it, row by row and "
            "each once; the checkpoint is damaged, or made for another shape."
        )


def _row_by_row(positions: Tensor, outputs: int, inputs: int) -> tuple[Tensor, Tensor]:
    """Return the starts of the rows, and the columns, of sorted positions."""
    firsts = torch.arange(outputs + 1, device=positions.device) * inputs
    columns = positions.remainder(max(1, inputs))
    return torch.searchsorted(positions, firsts), columns.to(_index_dtype(inputs))


def _rows(starts: Tensor, kept: int, dtype: torch.dtype = torch.int64) -> Tensor:
    """Return the row of each of `kept` entries."""
    rows = torch.arange(len(starts) - 1, dtype=dtype, device=starts.device)
    # With the size, torch.compile can trace it, and an accelerator need not wait.
    return rows.repeat_interleave(starts.diff(), output_size=kept)


def _starts(sorted_numbers: Tensor, count: int) -> Tensor:
    """Return where each of the numbers 0 to `count` starts in a sorted tensor."""
    every = torch.arange(count + 1, dtype=sorted_numbers.dtype, device=sorted_numbers.device)
    return torch.searchsorted(sorted_numbers, every)


def _index_dtype(largest: int) -> torch.dtype:
    return torch.int32 if largest <= torch.iinfo(torch.int32).max else torch.int64


class Kept(nn.Module):
    """The mask of a weight that `Places` makes, which has its zeros already."""

    places: Places

    def __init__(self, places: Places) -> None:
        super().__init__()
        self.__dict__["places"] = places  # not a submodule: the list of parametrizations has it

    @property
    def mask(self) -> Tensor:
        """True at the kept places. It is computed at each read."""
        return self.places.mask()

    def entries(self) -> KeptEntries:
        """Return the kept places."""
        return KeptEntries(self.places.positions(), self.places.shape)

    def forward(self, weight: Tensor) -> Tensor:
        """Return `weight`."""
        return weight

    def merged(self, value: Tensor, stored: Tensor) -> Tensor:
        """Return the dense tensor of which the kept values are stored."""
        return value.to(stored)
