"""Formats that store single values, or blocks, with their places."""

from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar, Self

import torch
from torch import Tensor

# The slice of x that a kernel works on stays in the caches (benchmarks/payoff.py).
_SLICE = 64
_WIDE = (torch.float32, torch.float64)


@dataclass(frozen=True)
class CSR:
    """Compressed sparse rows, multiplied by the vendor's library (MKL; cuSPARSE on CUDA).

    Attributes:
        starts: where each row starts among the values; int32, as are the columns: from 64 bits each
            call would convert them first.
        columns_kept: the column of each value.
        kept: the values.
        shape: that of W.
    """

    kind: ClassVar[str] = "csr"
    starts: Tensor
    columns_kept: Tensor
    kept: Tensor
    shape: tuple[int, int]

    @classmethod
    def of(cls, weight: Tensor) -> Self | None:
        """Return `weight` in this format."""
        parts = _rows_of(weight) if _has_mkl() or not weight.is_cpu else None
        return None if parts is None else cls(*parts)

    @cached_property
    def _matrix(self) -> Tensor:
        starts, columns, kept = self.tensors()
        return torch.sparse_csr_tensor(starts, columns, kept, self.shape, check_invariants=False)

    @cached_property
    def _transposed(self) -> Tensor:
        starts, rows, kept = self.tensors()
        shape = self.shape[::-1]
        return torch.sparse_csc_tensor(starts, rows, kept, shape, check_invariants=False)

    def rows(self, x: Tensor, bias: Tensor | None) -> Tensor:  # noqa: D102
        if len(x) == 1:
            return _vector(self._matrix, x, bias)
        if len(x) < 4:  # one matrix-vector product a row
            result = x @ self._transposed
            return result if bias is None else result.add_(bias)
        return _upright(self._matrix @ x.t(), bias)

    def columns(self, u: Tensor) -> Tensor:  # noqa: D102
        return self._matrix @ u

    def dense(self) -> Tensor:  # noqa: D102
        return self._matrix.to_dense()

    def tensors(self) -> list[Tensor]:  # noqa: D102
        return [self.starts, self.columns_kept, self.kept]


@dataclass(frozen=True)
class Bag:
    """The same rows, each a weighted sum of rows of x.T: torch's `embedding_bag` (FBGEMM).

    Vectorized over x, which pays from some ten rows on.

    Attributes:
        starts, columns_kept, kept, shape: as those of CSR.
    """

    kind: ClassVar[str] = "bag"
    starts: Tensor
    columns_kept: Tensor
    kept: Tensor
    shape: tuple[int, int]

    @classmethod
    def of(cls, weight: Tensor) -> Self | None:
        """Return `weight` in this format."""
        parts = _rows_of(weight) if _has_bags(weight) else None
        return None if parts is None else cls(*parts)

    @classmethod
    def beside(cls, csr: CSR) -> Self | None:
        """Return what shares the tensors of `csr`."""
        parts = (csr.starts, csr.columns_kept, csr.kept, csr.shape)
        return cls(*parts) if _has_bags(csr.kept) else None

    def rows(self, x: Tensor, bias: Tensor | None) -> Tensor:  # noqa: D102
        return _sliced(self, x, bias)

    def columns(self, u: Tensor) -> Tensor:  # noqa: D102
        starts, columns, kept = self.tensors()
        sums: Tensor = torch.embedding_bag(
            u.contiguous(), columns, starts, False, 0, False, kept, True
        )[0]
        return sums

    def dense(self) -> Tensor:  # noqa: D102
        return CSR(self.starts, self.columns_kept, self.kept, self.shape).dense()

    def tensors(self) -> list[Tensor]:  # noqa: D102
        return [self.starts, self.columns_kept, self.kept]


@dataclass(frozen=True)
class BSR:
    """Dense blocks: one row by the vendor's library, more as a batch of small products.

    Attributes:
        starts: where each row of blocks starts among them; int32.
        block_columns: in which column of blocks each stands.
        block_rows: in which row of blocks.
        blocks: (number of blocks, size, size).
        shape: that of W.
    """

    kind: ClassVar[str] = "bsr"
    starts: Tensor
    block_columns: Tensor
    block_rows: Tensor
    blocks: Tensor
    shape: tuple[int, int]

    @classmethod
    def of(cls, weight: Tensor) -> Self | None:
        """Return `weight` in this format, in the largest blocks that its zeros allow."""
        kept = torch.count_nonzero(weight).item()
        if not weight.is_cpu or weight.dtype not in _WIDE or not kept or not _has_mkl():
            return None
        matrix = weight.flatten(1)
        for size in (64, 32, 16):
            if any(length % size for length in matrix.shape):
                continue
            found = matrix.to_sparse_bsr((size, size))
            # A tenth more than what is kept is what accidental zeros in blocks may cost.
            if found.values().numel() <= min(1.1 * kept, weight.numel() / 2):
                starts, columns = found.crow_indices(), found.col_indices().int()
                rows = torch.arange(len(starts) - 1).repeat_interleave(starts.diff()).int()
                blocks = found.values().clone()  # as in _rows_of
                return cls(starts.int(), columns, rows, blocks, _shape(matrix))
        return None

    @cached_property
    def _matrix(self) -> Tensor:
        starts, columns = self.starts, self.block_columns
        return torch.sparse_bsr_tensor(
            starts, columns, self.blocks, self.shape, check_invariants=False
        )

    def rows(self, x: Tensor, bias: Tensor | None) -> Tensor:  # noqa: D102
        if len(x) > 1:
            return _sliced(self, x, bias)
        return _vector(self._matrix, x, bias)

    def columns(self, u: Tensor) -> Tensor:  # noqa: D102
        size, n = self.blocks.shape[1], u.shape[1]
        taken = u.reshape(-1, size, n).index_select(0, self.block_columns)
        result = u.new_zeros(self.shape[0] // size, size, n)
        products = torch.bmm(self.blocks, taken)
        return result.index_add_(0, self.block_rows, products).flatten(0, 1)

    def dense(self) -> Tensor:  # noqa: D102
        return self._matrix.to_dense()

    def tensors(self) -> list[Tensor]:  # noqa: D102
        return [self.starts, self.block_columns, self.block_rows, self.blocks]


def _has_mkl() -> bool:
    return bool(torch.backends.mkl.is_available())


def _has_bags(weight: Tensor) -> bool:
    return weight.is_cpu and weight.dtype == torch.float32


def _rows_of(weight: Tensor) -> tuple[Tensor, Tensor, Tensor, tuple[int, int]] | None:
    """Return starts, columns, values and shape of the rows of `weight`, if half of it is zeros."""
    if weight.dtype not in _WIDE or 2 * weight.count_nonzero() > weight.numel():
        return None
    if weight.numel() > torch.iinfo(torch.int32).max:
        return None
    found = weight.flatten(1).to_sparse_csr()
    # A clone: torch.compile cannot take a view of a sparse tensor.
    kept = found.values().clone()
    return found.crow_indices().int(), found.col_indices().int(), kept, _shape(found)


def _shape(matrix: Tensor) -> tuple[int, int]:
    outputs, inputs = matrix.shape
    return outputs, inputs


def _vector(matrix: Tensor, x: Tensor, bias: Tensor | None) -> Tensor:
    x = x[0]
    return (torch.mv(matrix, x) if bias is None else torch.addmv(bias, matrix, x))[None]


def _sliced(kept: Bag | BSR, x: Tensor, bias: Tensor | None) -> Tensor:
    if len(x) <= _SLICE:
        return _upright(kept.columns(x.t()), bias)
    result = x.new_empty(len(x), kept.shape[0])
    for start in range(0, len(x), _SLICE):
        stop = start + _SLICE
        _upright(kept.columns(x[start:stop].t()), bias, result[start:stop])
    return result


def _upright(columns: Tensor, bias: Tensor | None, out: Tensor | None = None) -> Tensor:
    """Return columns.T + bias, written once."""
    if out is None:
        out = columns.new_empty(columns.shape[::-1])
    return out.copy_(columns.t()) if bias is None else torch.add(columns.t(), bias, out=out)
