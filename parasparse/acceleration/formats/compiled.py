"""Compressed rows, multiplied by a kernel in C++ that is compiled on the user's machine."""

from __future__ import annotations

import ctypes
import math
from functools import cached_property
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from parasparse.acceleration.formats.compressed import CSR, Bag
from parasparse.acceleration.formats.library import library

# Columns of W that the kernel multiplies at once: their inputs stay in the caches.
_PART = 256


class Compiled(Bag):
    """The values of `Bag`, multiplied by `compiled.cpp`; by `Bag`'s kernel without a compiler.

    The kernel takes one part of the columns after the other, so the first part of all rows is
    stored first, then the second. `starts` has as many entries for each part as W has rows.
    """

    kind: ClassVar[str] = "compiled"

    @classmethod
    def of(cls, weight: Tensor) -> Self | None:
        """Return `weight` in this format, or None if less than half of it is zeros."""
        bag = Bag.of(weight)
        return None if bag is None else cls._of_rows(bag)

    @classmethod
    def beside(cls, csr: CSR) -> Self | None:
        """Return the same rows, sharing the tensors of `csr` if they are a single part."""
        return cls._of_rows(csr) if cls.can_multiply(csr.kept) else None

    @classmethod
    def _of_rows(cls, rows: CSR | Bag) -> Self:
        outputs, inputs = rows.shape
        if inputs <= _PART:
            return cls(rows.starts, rows.columns_kept, rows.kept, rows.shape)
        of_row = torch.arange(outputs, device="cpu").repeat_interleave(rows.starts.diff())
        part = rows.columns_kept // _PART
        order = part.argsort(stable=True)
        counts = (part * outputs + of_row).bincount(minlength=-(-inputs // _PART) * outputs)
        starts = F.pad(counts.cumsum(0), (1, 0)).int()
        return cls(starts, rows.columns_kept[order], rows.kept[order], rows.shape)

    @cached_property
    def _bag(self) -> Bag:
        """The same values row by row."""
        outputs = self.shape[0]
        with torch.inference_mode(False), torch.no_grad():  # it is kept for other modes
            counts = self.starts.diff().view(-1, outputs)
            of_row = (
                torch.arange(outputs, device="cpu")
                .repeat(len(counts))
                .repeat_interleave(counts.flatten())
            )
            order = of_row.argsort(stable=True)
            starts = F.pad(counts.sum(0).cumsum(0), (1, 0)).int()
            return Bag(starts, self.columns_kept[order], self.kept[order], self.shape)

    def dense(self) -> Tensor:  # noqa: D102
        return self._bag.dense()

    def diagonal(self, groups: int) -> Self:  # noqa: D102
        if groups != 1 and groups not in self._diagonals:
            self._diagonals[groups] = self._of_rows(self._bag.diagonal(groups))
        return self if groups == 1 else self._diagonals[groups]

    def rows(self, x: Tensor, bias: Tensor | None) -> Tensor:  # noqa: D102
        kernel = library()
        if kernel is None or not self.can_read(x, bias):
            return self._bag.rows(x, bias)
        x = x.contiguous()
        result = x.new_empty(len(x), self.shape[0])
        kernel.parasparse_rows(
            self._for_kernel, _pointer(bias), _pointer(x), ctypes.c_int64(len(x)), _pointer(result),
            torch.get_num_threads(),
        )  # fmt: skip
        return result

    def columns(self, u: Tensor) -> Tensor:  # noqa: D102
        return self._bag.columns(u)

    def convolution(
        self, windows: Windows, x: Tensor, bias: Tensor | None, added: Tensor | None,
        activation: str | None, out: Tensor,
    ) -> Tensor:  # fmt: skip
        """Write activation(convolution of x + added) to `out`, which may be `added`.

        `can_read` must be true, and `out` and `added` be contiguous.
        """
        kernel = library()
        assert kernel is not None
        kernel.parasparse_convolution(
            self._for_kernel, ctypes.byref(windows), _pointer(x), _pointer(bias), _pointer(added),
            ctypes.byref(_ACTIVATIONS[activation]), _pointer(out), torch.get_num_threads(),
        )  # fmt: skip
        return out

    def can_read(self, x: Tensor, bias: Tensor | None) -> bool:
        """Whether there is a kernel that can read the memory of the tensors."""
        if library() is None or not is_plain(x):
            return False
        return bias is None or (
            bias.shape == self.shape[:1] and bias.is_contiguous() and is_plain(bias)
        )

    @cached_property
    def _for_kernel(self) -> Any:
        outputs, inputs = self.shape
        parts = (tensor.data_ptr() for tensor in self.tensors())
        return ctypes.byref(_Matrix(outputs, inputs, min(_PART, inputs), *parts))


class _Matrix(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_int64) for name in ("outputs", "inputs", "part")),
        *((name, ctypes.c_void_p) for name in ("starts", "columns", "kept")),
    )


class Windows(ctypes.Structure):
    """Where a convolution reads its input; see shifts.py. Sizes are those of three dimensions."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("batch", "groups", "channels")),
        *((name, ctypes.c_int64 * 3) for name in ("sizes", "stride", "padding", "within")),
        ("places", ctypes.c_void_p),  # where the window of each entry of a patch begins
        ("length", ctypes.c_int64),
        ("runs", ctypes.c_void_p),  # where the rows of the output begin in a window
        ("number_of_runs", ctypes.c_int64),
        ("length_of_runs", ctypes.c_int64),
    )


class _Activation(ctypes.Structure):
    """min(max(slope * x + shift, least), most), times x if `gate`."""

    _fields_ = (
        *((name, ctypes.c_float) for name in ("slope", "shift", "least", "most")),
        ("gate", ctypes.c_int),
    )


_ACTIVATIONS = {
    None: _Activation(1, 0, -math.inf, math.inf),
    "relu": _Activation(1, 0, 0, math.inf),
    "relu6": _Activation(1, 0, 0, 6),
    "hardsigmoid": _Activation(1 / 6, 1 / 2, 0, 1),
    "hardswish": _Activation(1 / 6, 1 / 2, 0, 1, gate=True),
}


def is_plain(tensor: Tensor) -> bool:
    """Whether float32 values of `tensor` lie in memory; those of other classes need not."""
    if type(tensor) not in (Tensor, nn.Parameter) or tensor.layout is not torch.strided:
        return False
    return tensor.is_cpu and tensor.dtype == torch.float32 and not tensor.is_neg()


def _pointer(tensor: Tensor | None) -> ctypes.c_void_p | None:
    return None if tensor is None else ctypes.c_void_p(tensor.data_ptr())
