"""Formats that store single values, or blocks, with their indices."""

import warnings
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from functools import cache, cached_property
from typing import ClassVar, Self

import torch
from torch import Tensor

# Rows of x per call of a kernel: they stay in the caches (benchmarks/payoff.py).
_SLICE = 64
_WIDE = (torch.float32, torch.float64)


@dataclass(frozen=True)
class _Rows(ABC):
    """The kept values of W, row by row. Indices are int32: int64 is converted in each call."""

    starts: Tensor  # index of the first value of each row
    columns_kept: Tensor  # the column of each value
    kept: Tensor  # the values
    shape: tuple[int, int]  # of W
    _diagonals: dict[int, Self] = field(default_factory=dict, repr=False, compare=False)

    @staticmethod
    @abstractmethod
    def can_multiply(values: Tensor) -> bool:
        """Whether there is a kernel for the device and dtype of `values`."""

    @classmethod
    def of(cls, weight: Tensor) -> Self | None:
        """Return `weight` in this format, or None if less than half of it is zeros."""
        if not cls.can_multiply(weight) or weight.dtype not in _WIDE:
            return None
        numel = weight.numel()
        if numel > torch.iinfo(torch.int32).max or 2 * weight.count_nonzero() > numel:
            return None
        found = weight.flatten(1).to_sparse_csr()
        # A clone, because torch.compile cannot take a view of a sparse tensor.
        kept = found.values().clone()
        return cls(found.crow_indices().int(), found.col_indices().int(), kept, _shape(found))

    @cached_property
    def _matrix(self) -> Tensor:
        starts, columns, kept = self.tensors()
        return csr(starts, columns, kept, self.shape)

    def dense(self) -> Tensor:
        return self._matrix.to_dense()

    def tensors(self) -> list[Tensor]:
        return [self.starts, self.columns_kept, self.kept]

    def diagonal(self, groups: int) -> Self:
        """Return the block-diagonal matrix of `groups` blocks, which lie below each other in W."""
        if groups == 1:
            return self
        if groups not in self._diagonals:
            outputs, inputs = self.shape
            first = torch.arange(outputs, device=self.starts.device) // (outputs // groups) * inputs
            columns = self.columns_kept + first.repeat_interleave(self.starts.diff()).int()
            shape = outputs, inputs * groups
            self._diagonals[groups] = type(self)(self.starts, columns, self.kept, shape)
        return self._diagonals[groups]


class CSR(_Rows):
    """Compressed sparse rows, multiplied by the vendor's library (MKL; cuSPARSE on CUDA)."""

    kind: ClassVar[str] = "csr"

    @staticmethod
    def can_multiply(values: Tensor) -> bool:  # noqa: D102
        return _has_mkl() or not values.is_cpu

    @cached_property
    def _transposed(self) -> Tensor:
        _warn_once()
        starts, rows, kept = self.tensors()
        return torch.sparse_csc_tensor(
            starts, rows, kept, self.shape[::-1], device=kept.device, check_invariants=False
        )

    def rows(self, x: Tensor, bias: Tensor | None) -> Tensor:  # noqa: D102
        if len(x) == 1:
            return _vector(self._matrix, x, bias)
        if len(x) < 4:  # one matrix-vector product per row
            result = x @ self._transposed
            return result if bias is None else result.add_(bias)
        return _upright(self._matrix @ x.t(), bias)

    def columns(self, u: Tensor) -> Tensor:  # noqa: D102
        return self._matrix @ u


class Bag(_Rows):
    """Each row of W as a weighted sum of rows of x.T, by torch's `embedding_bag` (FBGEMM).

    It is vectorized over x, which pays from about ten rows on.
    """

    kind: ClassVar[str] = "bag"

    @staticmethod
    def can_multiply(values: Tensor) -> bool:  # noqa: D102
        return values.is_cpu and values.dtype == torch.float32

    @classmethod
    def beside(cls, csr: CSR) -> Self | None:
        """Return the same rows, sharing the tensors of `csr`."""
        return (
            cls(csr.starts, csr.columns_kept, csr.kept, csr.shape)
            if cls.can_multiply(csr.kept)
            else None
        )

    def rows(self, x: Tensor, bias: Tensor | None) -> Tensor:  # noqa: D102
        return _sliced(self, x, bias)

    def columns(self, u: Tensor) -> Tensor:  # noqa: D102
        starts, columns, kept = self.tensors()
        u = u.contiguous()
        sums: Tensor = torch.embedding_bag(u, columns, starts, False, 0, False, kept, True)[0]
        return sums


@dataclass(frozen=True)
class BSR:
    """Dense blocks: one row of x by the vendor's library, more as a batch of small products."""

    kind: ClassVar[str] = "bsr"
    starts: Tensor  # index of the first block of each row of blocks; int32
    block_columns: Tensor  # the column of each block, counted in blocks
    block_rows: Tensor  # the row of each block
    blocks: Tensor  # (number of blocks, size, size)
    shape: tuple[int, int]  # of W

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
            # Kept entries may be zero by accident: up to a tenth more values are stored.
            if found.values().numel() <= min(1.1 * kept, weight.numel() / 2):
                starts, columns = found.crow_indices(), found.col_indices().int()
                rows = (
                    torch.arange(len(starts) - 1, device="cpu")
                    .repeat_interleave(starts.diff())
                    .int()
                )
                blocks = found.values().clone()  # see `_Rows.of`
                return cls(starts.int(), columns, rows, blocks, _shape(matrix))
        return None

    @cached_property
    def _matrix(self) -> Tensor:
        starts, columns, _, blocks = self.tensors()
        return torch.sparse_bsr_tensor(
            starts, columns, blocks, self.shape, device=blocks.device, check_invariants=False
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


def csr(starts: Tensor, columns: Tensor, values: Tensor, shape: tuple[int, int]) -> Tensor:
    """Return a sparse tensor of compressed rows, without torch's warning that it is in beta."""
    _warn_once()
    return torch.sparse_csr_tensor(
        starts, columns, values, shape, device=values.device, check_invariants=False
    )


@cache
def _warn_once() -> None:
    """Let torch give its warning, which it does once in a process, where nobody sees it."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta")
        index = torch.zeros(1, dtype=torch.int32)
        torch.sparse_csr_tensor(index, index[:0], torch.zeros(0), (0, 1), check_invariants=False)


def _has_mkl() -> bool:
    # torch.compile cannot trace `is_available` (test_compiled_models_grow_the_same_entries).
    compiling = torch.compiler.is_compiling()
    return bool(torch._C.has_mkl if compiling else torch.backends.mkl.is_available())


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
    """Return columns.T + bias, contiguous."""
    if out is None:
        out = columns.new_empty(columns.shape[::-1])
    return out.copy_(columns.t()) if bias is None else torch.add(columns.t(), bias, out=out)
